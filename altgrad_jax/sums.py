"""Sums in float64 over the elements of leaves, inside ``jax.enable_x64``: as fast as XLA's reductions are.

In torch it is NumPy that sums, see ``altgrad_torch/cpu.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from altgrad_jax.axes import AxisName, by_axes, is_split, is_whole, sum_over

_FLOATS = tuple(map(jnp.dtype, ("float64", "float32", "bfloat16", "float16")))
_MAGNITUDE = np.int32(0x7FFFFFFF)
_IMPLICIT_ONE = np.int32(1 << 23)
_ROW = 64
"""The last axis makes rows from this length on."""
_SHORT = 2**12
"""Numbers of one leaf at most that are summed up together with those of others."""
_TOGETHER = 2**14
"""Numbers of several leaves that are."""
_LONG = 2**20
"""Numbers that are summed up in one go at most."""
_LONG_ROW = 2**14
"""Numbers that a GPU sums up in one go, of a leaf that has more than that."""

Term = Callable[[jax.Array], jax.Array]
"""What is summed up of a leaf or a part of it: float64, of the same shape, above -1e308."""


def sum_of(term: Term, leaves: Sequence[jax.Array], axis_name: AxisName | None) -> tuple[jax.Array, int]:
    """The sum of a term over leaves and mapped axes in float64, and how many roundings in a row it has at most.

    Of positive numbers n are added with at most n - 1, in any order whatever. Over the axes it adds parts of leaves, as
    :func:`altgrad_jax.axes.axes_of` says of them.
    """
    total, in_a_row = jnp.float64(0), 0
    for axes, group in by_axes(leaves, axis_name).items():
        part, roundings = _sum_of_group(term, [leaves[k] for k in group])
        total, in_a_row = total + sum_over(part, axes), max(in_a_row, roundings) + 2
    return total, in_a_row


def _sum_of_group(term: Term, leaves: Sequence[jax.Array]) -> tuple[jax.Array, int]:
    apart = [joined([leaves[k] for k in group]) for group in together(leaves)]
    parts, in_a_row = zip(*(_partial_sums(term, each) for each in apart), strict=True) if apart else ((), (0,))
    total, longest = jnp.float64(0), 0
    groups = together(parts)
    for group in groups:
        sums = joined([parts[k] for k in group])
        total, longest = total + jnp.sum(_kept_apart(sums)), max(longest, sums.size)
    return total, max(in_a_row) + longest + 2 * len(groups)


def _kept_apart(sums: jax.Array) -> jax.Array:
    """The same sums: none is as low as that, but XLA cannot know, or it would pull the sum over them apart again."""
    return jnp.where(sums < -1e308, jnp.nan, sums)


def _partial_sums(term: Term, leaf: jax.Array) -> tuple[jax.Array, int]:
    """Numbers whose sum is that of the terms, 1-D, and how many roundings in a row there were.

    XLA's CPU backend is fast at sums over the last axis, as it is, and over all, and slow where it has to cut anew.
    """
    if not is_whole(leaf):
        return _sum_by_axes(term, leaf)
    if leaf.size <= _SHORT:
        return term(leaf).reshape(-1), 0
    if _by_rows(leaf):
        sums = jnp.sum(term(leaf), axis=-1).reshape(-1)
        if sums.size <= _SHORT:
            return sums, leaf.shape[-1]
        return jnp.sum(_kept_apart(sums))[None], leaf.shape[-1] + sums.size
    flat = leaf.reshape(-1)
    if flat.size <= _LONG:
        return jnp.sum(term(flat))[None], flat.size

    if jax.default_backend() != "cpu":
        return _sums_of_long_rows(term, flat), _LONG_ROW

    def add(k: jax.Array, total: jax.Array) -> jax.Array:
        return total + jnp.sum(term(lax.dynamic_slice_in_dim(flat, k * _LONG, _LONG)))

    whole = flat.size // _LONG
    rest = jnp.sum(term(flat[whole * _LONG :]))
    return lax.fori_loop(0, whole, add, rest)[None], _LONG + whole


def _sum_by_axes(term: Term, leaf: jax.Array) -> tuple[jax.Array, int]:
    """The sum over one axis after the other, since an array that may be sharded must not be flattened.

    Where it is sharded, devices' own sums are added up: no more roundings than elements all the same.
    """
    shape = _in_short_axes(leaf.shape)
    sums = term(leaf if shape == leaf.shape or is_split(leaf) else leaf.reshape(shape))
    roundings = sum(sums.shape)
    while sums.ndim:
        sums = _kept_apart(jnp.sum(sums, axis=-1))
    return sums[None], roundings


def _in_short_axes(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape with each axis of several whole rows cut into these, since of a long one more roundings would count."""
    return tuple(
        part
        for length in shape
        for part in ((length // _LONG_ROW, _LONG_ROW) if length > _LONG_ROW and length % _LONG_ROW == 0 else (length,))
    )


def _sums_of_long_rows(term: Term, flat: jax.Array) -> jax.Array:
    """For a GPU, which would take the turns of a loop one after the other. That of what is left comes last."""
    whole = flat.size - flat.size % _LONG_ROW
    rows = jnp.sum(term(flat[:whole].reshape(-1, _LONG_ROW)), axis=-1)
    return jnp.append(rows, jnp.sum(term(flat[whole:])))


def together(leaves: Sequence[jax.Array]) -> list[list[int]]:
    """Which of several arrays, by their places, are best put together before they are reduced: of one dtype.

    Each reduction is three programs for XLA's CPU backend to compile, whatever it reduces. What is long is reduced by
    itself, where a copy would cost more, and so is what is split over explicit axes of a mesh, which cannot be put
    together; what is empty is in no group.

    >>> together([jnp.ones(10), jnp.ones(0), jnp.ones(10**6), jnp.ones(20)])
    [[0, 3], [2]]
    """
    groups: dict[np.dtype, list[list[int]]] = {}
    alone = []
    for k, leaf in enumerate(leaves):
        of_dtype = groups.setdefault(leaf.dtype, [])
        if leaf.size > _SHORT or (leaf.size and is_split(leaf)):
            alone.append([k])
        elif leaf.size:
            if not of_dtype or sum(leaves[j].size for j in of_dtype[-1]) + leaf.size > _TOGETHER:
                of_dtype.append([])
            of_dtype[-1].append(k)
    return [group for of_dtype in groups.values() for group in of_dtype] + alone


def joined(leaves: Sequence[jax.Array]) -> jax.Array:
    """A group of :func:`together`, one leaf after the other: what is made of it is one kernel for all.

    A leaf alone stays as it is, its axes as they are sharded. Others are put together as bits: where they are sharded
    XLA adds parts to zeros, and on a CPU an addition of floats would take subnormals for zero.
    """
    if len(leaves) == 1:
        return leaves[0]
    dtype = leaves[0].dtype
    if dtype not in _FLOATS:
        return jnp.concatenate([leaf.reshape(-1) for leaf in leaves])
    words = jnp.dtype(f"int{8 * dtype.itemsize}")
    return lax.bitcast_convert_type(
        jnp.concatenate([lax.bitcast_convert_type(leaf.reshape(-1), words) for leaf in leaves]), dtype
    )


def _by_rows(leaf: jax.Array) -> bool:
    return leaf.ndim > 1 and leaf.shape[-1] >= _ROW and leaf.size <= leaf.shape[-1] * _LONG


def square(leaf: jax.Array) -> jax.Array:
    """Squares in float64; of float32 subnormals whatever the processor makes of them."""
    return widen(leaf) * widen(leaf)


def square_of_any(leaf: jax.Array) -> jax.Array:
    """:func:`square` of float32 subnormals too; exact, since a float32 has half of float64's bits at most."""
    wide = widen_subnormals(leaf)
    return wide * wide


def widen(leaf: jax.Array) -> jax.Array:
    """To float64, inside ``jax.enable_x64``."""
    return lax.convert_element_type(leaf, jnp.float64)


def widen_subnormals(leaf: jax.Array) -> jax.Array:
    """Exact conversion to float64 of float32 subnormals too, which XLA's CPU backend would read as zero."""
    if leaf.dtype == jnp.float64:
        return leaf
    with jax.enable_x64(True):
        leaf = leaf.astype(jnp.float32)
        bits = lax.bitcast_convert_type(leaf, jnp.int32)
        magnitude = bits & _MAGNITUDE
        return jnp.where(magnitude < _IMPLICIT_ONE, widen(magnitude) * 2.0**-149, widen(leaf))

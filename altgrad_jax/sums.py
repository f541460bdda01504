"""Sums in float64 over the elements of leaves, inside ``jax.enable_x64``: as fast as XLA's reductions are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from altgrad_jax.axes import AxisName, by_axes, sum_over

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
    """Small leaves are summed up together, by their terms or by sums of rows.

    Each sum by itself is three programs for XLA's CPU backend to compile.
    """
    parts = [_partial_sums(term, leaf) for leaf in leaves]
    groups, in_a_row = _grouped([part for part, _ in parts]), max(each for _, each in parts)
    total = jnp.float64(0)
    for group in groups:
        total = total + jnp.sum(_kept_apart(jnp.concatenate(group)))
    return total, in_a_row + max(sum(part.size for part in group) for group in groups) + 2 * len(groups)


def _kept_apart(sums: jax.Array) -> jax.Array:
    """The same sums: none is as low as that, but XLA cannot know, or it would pull the sum over them apart again."""
    return jnp.where(sums < -1e308, jnp.nan, sums)


def _partial_sums(term: Term, leaf: jax.Array) -> tuple[jax.Array, int]:
    """Numbers whose sum is that of the terms, 1-D, and how many roundings in a row there were.

    XLA's CPU backend is fast at sums over the last axis, as it is, and over all, and slow where it has to cut anew.
    """
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


def _sums_of_long_rows(term: Term, flat: jax.Array) -> jax.Array:
    """For a GPU, which would take the turns of a loop one after the other. That of what is left comes last."""
    whole = flat.size - flat.size % _LONG_ROW
    rows = jnp.sum(term(flat[:whole].reshape(-1, _LONG_ROW)), axis=-1)
    return jnp.append(rows, jnp.sum(term(flat[whole:])))


def _grouped(parts: Sequence[jax.Array]) -> list[list[jax.Array]]:
    """Vectors in groups of bounded length; a single zero where all are empty."""
    groups, room = [], 0
    for part in (part for part in parts if part.size):
        if part.size > room:
            groups.append([])
            room = max(_TOGETHER, part.size)
        groups[-1].append(part)
        room -= part.size
    return groups or [[jnp.zeros(1, jnp.float64)]]


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

"""Norms of trees of gradients, taken in float64. The Euclidean one is correctly rounded, whatever the order of the sum.

A float64 sum of squares has a known worst error. Almost always both ends of that interval round to the same float32,
which then is the norm; where they do not, the sum is taken again in integers. ``altgrad_torch/norms.py`` does the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from altgrad_core.norms import EXPONENTS, FLOAT64_ROUNDOFF, LIMB_BITS
from altgrad_jax.axes import AxisName, by_axes, places, sum_over

_MAGNITUDE = np.int32(0x7FFFFFFF)
_IMPLICIT_ONE = np.int32(1 << 23)
_MAX_BITS = np.int32(0x7F7FFFFF)
_FLOAT32_MAX = float(np.finfo(np.float32).max)
_MIN_NORMAL = 2.0**-126
_SUBNORMALS_COUNT_BELOW = 2.0**-160
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
_CHUNK = 2**16
_UNIT = 300
"""Sums of squares are counted in units of 2^-300."""
_POSITIONS = (2 * np.maximum(np.arange(EXPONENTS) - 1, 0) + 2)[:, None] + np.array([0, LIMB_BITS])
"""Of the limbs of the sum of each exponent field: what one in them is worth is two to this power, in such units."""
_WORDS = 20
_WORD = (1 << 32) - 1


class Norm(NamedTuple):
    """A norm rounded to float32, in two dtypes.

    Attributes:
        single: float32.
        double: float64, the same value: a subnormal float32, which XLA's CPU backend reads as zero, keeps its value.
    """

    single: jax.Array
    double: jax.Array


def global_norm(tree: optax.Updates, *, axis_name: AxisName | None = None) -> jax.Array:
    """The Euclidean norm of all leaves together: the float32 nearest to the true one, ties to even.

    It does not depend on the order of the sum, and so neither on devices nor on the framework. Nothing overflows or
    vanishes on the way, float32 subnormals included. A norm beyond float32's maximum, of leaves that are all finite, is
    that maximum: not inf, which would clip them all to zero. Under ``vmap`` the exact sum, which is hardly ever needed,
    is taken every time.

    float64 leaves are the exception: with one of them the result may be off by one step next to a tie, and a norm
    beyond 2^511 overflows.

    Args:
        tree: pytree of floating-point arrays of any shapes and dtypes.
        axis_name: inside ``shard_map`` or ``vmap``, the axes over which leaves are parts of larger ones. A leaf that is
            replicated over an axis counts once, as :func:`altgrad_jax.axes.axes_of` says; but with
            ``check_vma=False``, where JAX does not know, as often as the axis is long.

    Returns:
        float32 scalar; inf or NaN if a leaf holds one.

    Raises:
        ValueError: if the tree has no leaves.
        TypeError: if a leaf is not real floating point.

    >>> norm = global_norm({"w": jnp.array([3.0, 4.0]) * 2.0**-120, "b": jnp.zeros(2)})
    >>> float(norm) == 5 * 2.0**-120
    True
    """
    return _single(float_leaves(tree), axis_name)


@partial(jax.jit, static_argnums=1, inline=True)  # one program also outside of jit
def _single(leaves: list[jax.Array], axis_name: AxisName | None) -> jax.Array:
    return euclidean_norm(leaves, axis_name).single


def float_leaves(tree: optax.Updates) -> list[jax.Array]:
    """The leaves of a tree of gradients.

    Raises:
        ValueError: if there are none.
        TypeError: if one is not real floating point.
    """
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    if not leaves:
        raise ValueError("the tree of gradients is empty; expected at least one array")
    for leaf in leaves:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(f"gradients are real floating-point arrays; got one of {leaf.dtype}")
    return leaves


def norm_of(leaves: Sequence[jax.Array], norm_type: float = 2.0, axis_name: AxisName | None = None) -> Norm:
    """The norm of order p of all leaves together, ``(sum |x|^p)^(1/p)``; the largest magnitude for inf.

    That of order 2 is :func:`euclidean_norm`, and that of order inf is exact. The others are float64 sums, rounded
    once: right but next to a tie.
    """
    if norm_type == 2:
        return euclidean_norm(leaves, axis_name)
    largest = _largest_magnitude(leaves, axis_name)
    with jax.enable_x64(True):
        if math.isinf(norm_type):
            return _of_bits(_rounded_bits(largest))
        # Relative to the largest, no power overflows. Infinities and NaN, which that would lose, are the largest.
        finite = jnp.isfinite(largest)
        unit = jnp.where(finite & (largest > 0), largest, 1.0)
        total = jnp.float64(0)
        for axes, group in by_axes(leaves, axis_name).items():
            powers = [jnp.sum((jnp.abs(_widen_subnormals(leaves[k])) / unit) ** norm_type) for k in group]
            total = total + sum_over(sum(powers, jnp.float64(0)), axes)
        return _of_bits(_rounded_bits(jnp.where(finite, unit * total ** (1 / norm_type), largest)))


def euclidean_norm(leaves: Sequence[jax.Array], axis_name: AxisName | None = None) -> Norm:
    """:func:`global_norm` of leaves, in two dtypes."""
    with jax.enable_x64(True):
        total, in_a_row = jnp.float64(0), 0
        for axes, group in by_axes(leaves, axis_name).items():
            part, roundings = _sum_of_squares([leaves[k] for k in group])
            total, in_a_row = total + sum_over(part, axes), max(in_a_row, roundings) + 2
        root = jnp.sqrt(total)
        bits = _rounded_bits(root)
        if any(leaf.dtype == jnp.float64 for leaf in leaves):
            return _of_bits(bits)
        slack = _relative_error(in_a_row, axis_name)
        is_certain = _rounded_bits(root * (1 - slack)) == _rounded_bits(root * (1 + slack))
        # Subnormals add less than 2^-252 each: they count only in a sum so small that XLA may have dropped some of it.
        is_certain = (is_certain & (total >= _SUBNORMALS_COUNT_BELOW)) | ~jnp.isfinite(total)
        bits = lax.cond(
            is_certain,
            lambda _: bits,
            lambda leaves: _rounded_exactly(leaves, axis_name),
            list(leaves),
        )
        return _of_bits(bits)


def _relative_error(in_a_row: int, axis_name: AxisName | None) -> float:
    """By how much the root of a float64 sum may be off, relatively, from the true norm.

    Twice what is added up over devices; one rounding for each square; the root halves it all, and adds two of its own.
    """
    return (in_a_row + 2 * places(axis_name) + 4) * FLOAT64_ROUNDOFF


def _sum_of_squares(leaves: Sequence[jax.Array]) -> tuple[jax.Array, int]:
    """The sum in float64, and how many roundings in a row it has at most.

    Of positive numbers n are added with at most n - 1, in any order whatever. Small leaves are summed up together, as
    squares or as sums of rows: each sum by itself is three programs for XLA's CPU backend to compile.
    """
    parts = [_partial_sums(leaf) for leaf in leaves]
    groups, in_a_row = _grouped([part for part, _ in parts]), max(each for _, each in parts)
    total = jnp.float64(0)
    for group in groups:
        sums = jnp.concatenate(group)
        # Sums of squares are not negative, but XLA cannot know: else it would pull the sum apart again.
        total = total + jnp.sum(jnp.where(sums < 0, jnp.nan, sums))
    return total, in_a_row + max(sum(part.size for part in group) for group in groups) + 2 * len(groups)


def _partial_sums(leaf: jax.Array) -> tuple[jax.Array, int]:
    """Numbers whose sum is that of the squares, 1-D, and how many roundings in a row there were.

    XLA's CPU backend is fast at sums over the last axis, as it is, and over all, and slow where it has to cut anew.
    """
    if leaf.size <= _SHORT:
        return (_widen(leaf) * _widen(leaf)).reshape(-1), 0
    if _by_rows(leaf):
        sums = jnp.sum(_widen(leaf) * _widen(leaf), axis=-1).reshape(-1)
        if sums.size <= _SHORT:
            return sums, leaf.shape[-1]
        return jnp.sum(jnp.where(sums < 0, jnp.nan, sums))[None], leaf.shape[-1] + sums.size
    flat = leaf.reshape(-1)
    if flat.size <= _LONG:
        return jnp.sum(_widen(flat) * _widen(flat))[None], flat.size

    if jax.default_backend() != "cpu":
        return _sums_of_long_rows(flat), _LONG_ROW

    def add(k: jax.Array, total: jax.Array) -> jax.Array:
        part = _widen(lax.dynamic_slice_in_dim(flat, k * _LONG, _LONG))
        return total + jnp.sum(part * part)

    whole = flat.size // _LONG
    rest = _widen(flat[whole * _LONG :])
    return lax.fori_loop(0, whole, add, jnp.sum(rest * rest))[None], _LONG + whole


def _sums_of_long_rows(flat: jax.Array) -> jax.Array:
    """For a GPU, which would take the turns of a loop one after the other. That of what is left comes last."""
    whole = flat.size - flat.size % _LONG_ROW
    rows, rest = _widen(flat[:whole]).reshape(-1, _LONG_ROW), _widen(flat[whole:])
    return jnp.append(jnp.sum(rows * rows, axis=-1), jnp.sum(rest * rest))


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


def _largest_magnitude(leaves: Sequence[jax.Array], axis_name: AxisName | None) -> jax.Array:
    """float64; NaN if there is one."""
    with jax.enable_x64(True):
        largest = jnp.float64(0)
        for leaf in leaves:
            # As integers: a float maximum may lose a NaN.
            wide = jnp.abs(_widen_subnormals(leaf))
            bits = jnp.max(lax.bitcast_convert_type(wide, jnp.int64), initial=0)
            largest = jnp.maximum(largest, lax.bitcast_convert_type(bits, jnp.float64))
        bits = lax.bitcast_convert_type(largest, jnp.int64)
        bits = bits if axis_name is None else lax.pmax(bits, axis_name)
        return lax.bitcast_convert_type(bits, jnp.float64)


def _widen(leaf: jax.Array) -> jax.Array:
    return lax.convert_element_type(leaf, jnp.float64)


def _widen_subnormals(leaf: jax.Array) -> jax.Array:
    """Exact conversion to float64 of float32 subnormals too, which XLA's CPU backend would read as zero."""
    if leaf.dtype == jnp.float64:
        return leaf
    with jax.enable_x64(True):
        leaf = leaf.astype(jnp.float32)
        bits = lax.bitcast_convert_type(leaf, jnp.int32)
        magnitude = bits & _MAGNITUDE
        return jnp.where(magnitude < _IMPLICIT_ONE, _widen(magnitude) * 2.0**-149, _widen(leaf))


def as_norm(norm: jax.Array) -> Norm:
    """A norm that :func:`global_norm` has taken, in two dtypes."""
    with jax.enable_x64(True):
        return _of_bits(lax.bitcast_convert_type(norm, jnp.int32))


def _rounded_bits(value: jax.Array) -> jax.Array:
    """The bits of a non-negative float64 rounded to float32: subnormals from their steps, no overflow to infinity."""
    bounded = jnp.where(jnp.isfinite(value), jnp.minimum(value, _FLOAT32_MAX), value)
    normal = lax.bitcast_convert_type(lax.convert_element_type(bounded, jnp.float32), jnp.int32)
    steps = lax.convert_element_type(jnp.round(jnp.minimum(bounded, _MIN_NORMAL) * 2.0**149), jnp.int32)
    return jnp.where(bounded < _MIN_NORMAL, steps, normal)


def _of_bits(bits: jax.Array) -> Norm:
    single = lax.bitcast_convert_type(bits, jnp.float32)
    return Norm(single, jnp.where(bits < _IMPLICIT_ONE, _widen(bits) * 2.0**-149, _widen(single)))


# --- the exact sum --------------------------------------------------------------------------------------------------


def _rounded_exactly(leaves: Sequence[jax.Array], axis_name: AxisName | None) -> jax.Array:
    """The bits of the norm, from an exact sum."""
    sums = jnp.zeros((EXPONENTS, 2), jnp.int64)
    for axes, group in by_axes(leaves, axis_name).items():
        sums = sums + sum_over(_exponent_sums([leaves[k] for k in group]), axes)
    return _mended(_rounded_bits(jnp.sqrt(jnp.sum(_widen(sums) * np.exp2(_POSITIONS - _UNIT)))), sums)


def _mended(bits: jax.Array, sums: jax.Array) -> jax.Array:
    """The right one of a float32 and its two neighbours, by the exact sum of squares."""
    # Against the squares half way to the next float32, and half way from the last one.
    total = _words(sums.reshape(-1), jnp.asarray(_POSITIONS.reshape(-1)))
    above, below = jax.vmap(lambda bits: _sign(total - _square_half_way(bits)))(jnp.stack([bits, bits - 1]))
    below = jnp.where(bits > 0, below, 1)
    is_odd = (bits & 1) == 1
    up = (above > 0) | ((above == 0) & is_odd)
    down = (below < 0) | ((below == 0) & is_odd)
    return jnp.minimum(bits + up.astype(jnp.int32) - down.astype(jnp.int32), _MAX_BITS)


def _exponent_sums(leaves: Sequence[jax.Array]) -> jax.Array:
    """Sums of squares of significands for each exponent field: int64 of shape ``(255, 2)``, two limbs."""

    def add(sums: jax.Array, part: jax.Array) -> jax.Array:
        magnitude = lax.bitcast_convert_type(part, jnp.int32) & _MAGNITUDE
        field = jnp.maximum(magnitude >> 23, 1)
        significand = (magnitude - ((field - 1) << 23)).astype(jnp.int64)
        square = significand * significand
        limbs = jnp.stack([square & ((1 << LIMB_BITS) - 1), square >> LIMB_BITS], -1)
        return sums.at[field].add(limbs)

    def add_unless_zero(sums: jax.Array, part: jax.Array) -> tuple[jax.Array, None]:
        nothing = jnp.max(lax.bitcast_convert_type(part, jnp.int32) & _MAGNITUDE) == 0
        return lax.cond(nothing, lambda sums, _: sums, add, sums, part), None

    flat = [leaf.astype(jnp.float32).reshape(-1) for leaf in leaves]
    # Inside shard_map a loop has to start from what hangs on the device as much as what it ends in.
    nothing = sum(jnp.sum(lax.bitcast_convert_type(leaf[:1], jnp.int32) & 0) for leaf in flat)
    sums = jnp.zeros((EXPONENTS, 2), jnp.int64) + nothing
    rests = []
    for leaf in flat:
        whole = leaf.size - leaf.size % _CHUNK
        if whole:
            sums, _ = lax.scan(add_unless_zero, sums, leaf[:whole].reshape(-1, _CHUNK))
        rests.append(leaf[whole:])
    # What is left of all of them together: each loop is a program of its own to compile.
    rest = jnp.concatenate(rests)
    rest = jnp.pad(rest, (0, -rest.size % min(_CHUNK, max(rest.size, 1))))
    return lax.scan(add_unless_zero, sums, rest.reshape(-1, min(_CHUNK, rest.size)))[0] if rest.size else sums


def _square_half_way(bits: jax.Array) -> jax.Array:
    """The square of what lies half way to the next float32, in words."""
    field = jnp.maximum(bits >> 23, 1)
    middle = (2 * (bits - ((field - 1) << 23)) + 1).astype(jnp.int64)
    return _words((middle * middle)[None], 2 * (field - 1)[None])


def _words(values: jax.Array, positions: jax.Array) -> jax.Array:
    """``sum(values * 2^positions)`` in units of 2^-300: words of 32 bits, the lowest first, not carried, in int64."""
    # Values below 2^62 in two pieces of 31 bits, each of which covers at most two words.
    pieces = jnp.concatenate([values & ((1 << 31) - 1), values >> 31])
    at = jnp.concatenate([positions, positions + 31]).astype(jnp.int64)
    moved, word = pieces << (at & 31), at >> 5
    return jnp.zeros(_WORDS, jnp.int64).at[jnp.stack([word, word + 1])].add(jnp.stack([moved & _WORD, moved >> 32]))


def _sign(words: jax.Array) -> jax.Array:
    """-1, 0 or 1: the sign of a number in words, which may be negative and are carried here."""

    def carry(carried: jax.Array, word: jax.Array) -> tuple[jax.Array, jax.Array]:
        whole = word + carried
        return whole >> 32, whole & _WORD

    # A zero that varies over the axes of shard_map over which the words do, as a loop wants it.
    highest, rest = lax.scan(carry, words[0] & 0, words)
    return jnp.where(highest < 0, -1, jnp.max(jnp.sign(rest))).astype(jnp.int32)

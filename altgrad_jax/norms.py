"""Norms of trees of gradients, taken in float64. The Euclidean one is correctly rounded, whatever the order of the sum.

A float64 sum of squares has a known worst error. Almost always both ends of that interval round to the same float32,
which then is the norm; where they do not, an exact sum decides. ``altgrad_torch/norms.py`` gets its own by other means.
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

from altgrad_core.norms import FLOAT64_ROUNDOFF
from altgrad_jax.axes import AxisName, by_axes, places, sum_over, varying_as
from altgrad_jax.sums import square, square_of_any, sum_of, widen, widen_subnormals

_IMPLICIT_ONE = np.int32(1 << 23)
_MAX_BITS = np.int32(0x7F7FFFFF)
_FLOAT32_MAX = float(np.finfo(np.float32).max)
_MIN_NORMAL = 2.0**-126
_SUBNORMALS_COUNT_BELOW = 2.0**-160
_FINEST = 2.0**-300
"""Squares of float32, and of what lies half way between two of them, are multiples of this."""


class Norm(NamedTuple):
    """A norm rounded to float32, in two dtypes.

    Attributes:
        single: float32. Its derivative is that of both: one in float64 could not be transposed outside of float64.
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

    Its derivative is that of the true norm, ``sum(x * dx) / norm``, as a float32 sum, forward, in reverse and of any
    order; where the norm is zero it is zero, which is a subgradient. JAX (0.10) forgets rules such as this one where it
    differentiates a gradient that was taken in reverse through ``lax.scan``: such second derivatives leave the norm's
    out. Forward first, as in ``jax.jacrev(jax.jacfwd(f))``, or without a scan they are right.

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
    return norm_of(leaves, axis_name=axis_name).single


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

    That of order 2 is the norm of :func:`global_norm`, and that of order inf is exact. The others are float64 sums,
    rounded once: right but next to a tie.

    Derivatives are those of the true norm. Where it has none they are a subgradient: zero where the norm is zero, zero
    for elements that are zero, and of several largest magnitudes an equal share for each.
    """
    return _norm_of(list(leaves), norm_type, axis_name)


@partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _norm_of(leaves: list[jax.Array], norm_type: float, axis_name: AxisName | None) -> Norm:
    if norm_type == 2:
        return _euclidean_norm(leaves, axis_name)
    largest = _largest_magnitude(leaves, axis_name)
    with jax.enable_x64(True):
        if math.isinf(norm_type):
            return _of_bits(_rounded_bits(largest))
        # Relative to the largest, no power overflows. Infinities and NaN, which that would lose, are the largest.
        finite = jnp.isfinite(largest)
        unit = jnp.where(finite & (largest > 0), largest, 1.0)
        total = jnp.float64(0)
        for axes, group in by_axes(leaves, axis_name).items():
            powers = [jnp.sum((jnp.abs(widen_subnormals(leaves[k])) / unit) ** norm_type) for k in group]
            total = total + sum_over(sum(powers, jnp.float64(0)), axes)
        return _of_bits(_rounded_bits(jnp.where(finite, unit * total ** (1 / norm_type), largest)))


@_norm_of.defjvp
def _norm_of_tangent(
    norm_type: float,
    axis_name: AxisName | None,
    primals: tuple[list[jax.Array]],
    tangents: tuple[list[jax.Array]],
) -> tuple[Norm, Norm]:
    ((leaves,), (moves,)) = primals, tangents
    norm = _norm_of(leaves, norm_type, axis_name)
    slopes = _slopes(leaves, norm, norm_type, axis_name)
    tangent = _sum_of_singles(
        [slope * move.astype(slope.dtype) for slope, move in zip(slopes, moves, strict=True)], axis_name
    )
    with jax.enable_x64(True):
        return norm, Norm(tangent, jnp.zeros_like(norm.double))


def _slopes(leaves: Sequence[jax.Array], norm: Norm, norm_type: float, axis_name: AxisName | None) -> list[jax.Array]:
    """By how much the norm moves with each element: float32, or float64 of leaves of that dtype."""
    if norm_type == 1:
        return [_sign(leaf) for leaf in leaves]
    if math.isinf(norm_type):
        return _shares_of_largest(leaves, axis_name)
    quotients = [quotient(leaf, norm) for leaf in leaves]
    return quotients if norm_type == 2 else [_signed_power(each, norm_type - 1) for each in quotients]


def _shares_of_largest(leaves: Sequence[jax.Array], axis_name: AxisName | None) -> list[jax.Array]:
    largest = _largest_magnitude(leaves, axis_name)
    with jax.enable_x64(True):
        at = [jnp.abs(widen_subnormals(leaf)) == largest for leaf in leaves]
    count = _sum_of_singles([each.astype(jnp.float32) for each in at], axis_name)
    return [
        _sign(leaf) * where.astype(_of_derivatives(leaf)) / count.astype(_of_derivatives(leaf))
        for where, leaf in zip(at, leaves, strict=True)
    ]


def _sign(leaf: jax.Array) -> jax.Array:
    with jax.enable_x64(True):
        return lax.convert_element_type(jnp.sign(widen_subnormals(leaf)), _of_derivatives(leaf))


def _signed_power(x: jax.Array, exponent: float) -> jax.Array:
    """``sign(x) |x|^exponent``, zero where x is, for negative exponents too."""
    is_zero = x == 0
    # Not 0 ** exponent, whose own derivative may be infinite.
    magnitude = jnp.where(is_zero, jnp.ones_like(x), jnp.abs(x))
    return jnp.where(is_zero, jnp.zeros_like(x), jnp.sign(x) * magnitude**exponent)


def _sum_of_singles(terms: Sequence[jax.Array], axis_name: AxisName | None) -> jax.Array:
    """float32: the sum over leaves and mapped axes of terms that vary over them as leaves do."""
    total = jnp.float32(0)
    for axes, group in by_axes(terms, axis_name).items():
        parts = [jnp.sum(terms[k]).astype(jnp.float32) for k in group]
        total = total + sum_over(sum(parts, jnp.float32(0)), axes)
    return total


@jax.custom_jvp
def quotient(x: jax.Array, divisor: Norm) -> jax.Array:
    """``x / divisor``, divided in float64 and rounded to float32 unless x is float64; zero where the divisor is zero.

    For derivatives: its own are products of float32, or of x's float64, so that they can be transposed anywhere.
    """
    with jax.enable_x64(True):
        is_zero = divisor.double == 0
        ratio = widen_subnormals(x) / jnp.where(is_zero, 1.0, divisor.double)
        return lax.convert_element_type(jnp.where(is_zero, 0.0, ratio), _of_derivatives(x))


@quotient.defjvp
def _quotient_tangent(primals: tuple[jax.Array, Norm], tangents: tuple[jax.Array, Norm]) -> tuple[jax.Array, jax.Array]:
    (x, divisor), (x_move, divisor_move) = primals, tangents
    ratio = quotient(x, divisor)
    inverse = quotient(jnp.ones_like(divisor.single), divisor).astype(ratio.dtype)
    return ratio, (x_move.astype(ratio.dtype) - ratio * divisor_move.single.astype(ratio.dtype)) * inverse


def _of_derivatives(leaf: jax.Array) -> jnp.dtype:
    return jnp.dtype(jnp.float64 if leaf.dtype == jnp.float64 else jnp.float32)


def _euclidean_norm(leaves: Sequence[jax.Array], axis_name: AxisName | None) -> Norm:
    """:func:`global_norm` of leaves, in two dtypes."""
    with jax.enable_x64(True):
        total, in_a_row = sum_of(square, leaves, axis_name)
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


def _largest_magnitude(leaves: Sequence[jax.Array], axis_name: AxisName | None) -> jax.Array:
    """float64; NaN if there is one."""
    with jax.enable_x64(True):
        largest = jnp.float64(0)
        for leaf in leaves:
            # As integers: a float maximum may lose a NaN.
            wide = jnp.abs(widen_subnormals(leaf))
            bits = jnp.max(lax.bitcast_convert_type(wide, jnp.int64), initial=0)
            largest = jnp.maximum(largest, lax.bitcast_convert_type(bits, jnp.float64))
        bits = lax.bitcast_convert_type(largest, jnp.int64)
        bits = bits if axis_name is None else lax.pmax(bits, axis_name)
        return lax.bitcast_convert_type(bits, jnp.float64)


def as_norm(norm: jax.Array) -> Norm:
    """A norm that :func:`global_norm` has taken, in two dtypes."""
    with jax.enable_x64(True):
        # Not the float32 of the bits: it would have no derivative.
        return _of_bits(lax.bitcast_convert_type(norm, jnp.int32))._replace(single=norm)


def _rounded_bits(value: jax.Array) -> jax.Array:
    """The bits of a non-negative float64 rounded to float32: subnormals from their steps, no overflow to infinity."""
    bounded = jnp.where(jnp.isfinite(value), jnp.minimum(value, _FLOAT32_MAX), value)
    normal = lax.bitcast_convert_type(lax.convert_element_type(bounded, jnp.float32), jnp.int32)
    steps = lax.convert_element_type(jnp.round(jnp.minimum(bounded, _MIN_NORMAL) * 2.0**149), jnp.int32)
    return jnp.where(bounded < _MIN_NORMAL, steps, normal)


def _of_bits(bits: jax.Array) -> Norm:
    single = lax.bitcast_convert_type(bits, jnp.float32)
    return Norm(single, jnp.where(bits < _IMPLICIT_ONE, widen(bits) * 2.0**-149, widen(single)))


# --- the exact sum --------------------------------------------------------------------------------------------------


def _rounded_exactly(leaves: Sequence[jax.Array], axis_name: AxisName | None) -> jax.Array:
    """The bits of the norm, whatever the sum is close to.

    First the sum of squares is taken once more, subnormals counted, which leaves three float32 to choose from. Then
    it is compared with the squares half way between them, as far as that needs it. Squares are cut into slices, from
    the top: rounded to multiples of a unit, then what that left to those of a finer one, and so on. Those of one slice
    are so few bits above its unit that float64 sums them up exactly, in any order; what is left after it is at most
    half of the unit for each square, and a difference beyond that has its sign. Three or four slices are enough, but
    next to a tie. For up to 2^40 elements.

    Source of the slices: the error-free extraction of Rump, Ogita and Oishi, "Accurate floating-point summation", SIAM
    Journal on Scientific Computing 31 (2008), here with units that are the same for all.
    """
    count = places(axis_name) * sum(leaf.size for leaf in leaves) + 1

    def is_undecided(turn: _Turn) -> jax.Array:
        last = turn.unit_before(count)
        return (turn.number < 2) | (jnp.any(jnp.abs(turn.differences) <= count * last) & (last > _FINEST))

    def take(state: jax.Array) -> jax.Array:
        # Squares that do not depend on the turn XLA would keep, in float64, for all of them. One by one: together the
        # leaves would all vary, by their types, over what one of them does.
        parts = [lax.optimization_barrier((leaf, state))[0] for leaf in leaves]
        turn = _Turn.of(state)
        unit, last = turn.unit(count), turn.unit_before(count)
        part, _ = sum_of(lambda leaf: _slice(square_of_any(leaf), unit, last), parts, axis_name)
        return turn.after(part, part - _slice(turn.half_way_squared(), unit, last))

    start = varying_as(jnp.zeros(4, jnp.float64), leaves, axis_name)
    return _Turn.of(lax.while_loop(lambda state: is_undecided(_Turn.of(state)), take, start)).decided()


class _Turn(NamedTuple):
    """Where :func:`_rounded_exactly` is: float64, in one array on the way, since each by itself is compiled by itself.

    Attributes:
        number: of turns that have been taken: the first takes the sum, the others a slice each.
        total: the sum of squares, but for a small relative error.
        differences: of the slices so far from those of the squares half way to the next float32, and from the last.
    """

    number: jax.Array
    total: jax.Array
    differences: jax.Array

    @classmethod
    def of(cls, state: jax.Array) -> _Turn:
        return cls(state[0], state[1], state[2:])

    def after(self, part: jax.Array, differences: jax.Array) -> jax.Array:
        is_first = self.number == 0
        total = jnp.where(is_first, part, self.total)
        return jnp.concatenate(
            [jnp.stack([self.number + 1, total]), jnp.where(is_first, 0.0, self.differences + differences)]
        )

    def unit(self, count: int, turns_ago: int = 0) -> jax.Array:
        """Of this turn: the last bit of the sum, or a power of two so far above that no square is as large as half."""
        slice_ = (self.number - turns_ago).astype(jnp.int64) - 1
        exponent = (lax.bitcast_convert_type(self.total, jnp.int64) >> 52) - 1023 - 48
        exponent = jnp.maximum(exponent - slice_ * (50 - count.bit_length()), -300)
        exponent = jnp.where(slice_ < 0, -300 if turns_ago == 0 else 400, exponent)
        return lax.bitcast_convert_type((exponent + 1023) << 52, jnp.float64)

    def unit_before(self, count: int) -> jax.Array:
        return self.unit(count, turns_ago=1)

    @property
    def bits(self) -> jax.Array:
        return _rounded_bits(jnp.sqrt(self.total))

    def half_way_squared(self) -> jax.Array:
        """Exact: of 25 bits each."""
        bits = self.bits
        neighbours = jnp.stack([bits, jnp.minimum(bits + 1, _MAX_BITS), jnp.maximum(bits - 1, 0), bits])
        half_way = jnp.sum(_of_bits(neighbours).double.reshape(2, 2), axis=1) / 2
        return half_way * half_way

    def decided(self) -> jax.Array:
        """The bits of the right one of the three."""
        above, below = self.differences
        is_odd = (self.bits & 1) == 1
        up = (above > 0) | ((above == 0) & is_odd)
        down = (below < 0) | ((below == 0) & is_odd)
        return jnp.minimum(self.bits + up.astype(jnp.int32) - down.astype(jnp.int32), _MAX_BITS)


def _slice(x: jax.Array, unit: jax.Array, last: jax.Array) -> jax.Array:
    return _to_multiple(x, unit) - _to_multiple(x, last)


def _to_multiple(x: jax.Array, unit: jax.Array) -> jax.Array:
    """To the nearest multiple of a power of two, which large numbers of up to 51 bits are already: float64."""
    raised = 1.5 * 2.0**52 * unit
    return jnp.where(x < 2.0**51 * unit, (x + raised) - raised, x)

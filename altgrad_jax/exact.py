"""Matrix products that are the exact sum, rounded once to float32: the same bits in any order, anywhere.

One float64 dot where its bits suffice, else dots of slices of the operands; :mod:`altgrad_core.exact` says how many.
``altgrad_torch/exact.py`` does the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from altgrad_core.errors import InputError
from altgrad_core.exact import (
    LOWEST_EXPONENT,
    SIGNIFICAND_BITS,
    bits_of_spans,
    bits_until_rounded,
    cut_of,
    largest_rest,
)
from altgrad_core.norms import ROUNDS_TO_NORMAL
from altgrad_jax.axes import AxisName, places
from altgrad_jax.casting import widened

DotDimensionNumbers: TypeAlias = tuple[
    tuple[Sequence[int], Sequence[int]],
    tuple[Sequence[int], Sequence[int]],
]
"""As of ``lax.dot_general``: contracted axes of both operands, and batch axes of both."""

_Axes: TypeAlias = tuple[tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]]]
_Dot: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]

_MAGNITUDE = np.int32(0x7FFFFFFF)
_IMPLICIT_ONE = np.int32(1 << 23)
_NO_PLACE = np.int32(1 << 10)
_PLACES = np.int32(254 + SIGNIFICAND_BITS)
"""Of bits, the lowest one of a subnormal float32 being the first, up to those of infinities and NaN."""
_BELOW_FLOAT32 = 29
"""Bits of a float64 significand that float32 does not have."""


def exact_matmul(a: jax.Array, b: jax.Array, *, axis_name: AxisName | None = None) -> jax.Array:
    """The matrix product, each element the exact sum rounded once to float32, to nearest, ties to even.

    It depends neither on the order of the sum nor on devices, and has the bits of :func:`altgrad_torch.exact_matmul`.
    It takes one float64 dot where the operands' bits allow, as found at run time: always for operands on the grids of
    E0M7 to E4M3 and sums of up to 2^17 terms. Under ``vmap`` the slices that are needed elsewhere are taken every
    time. A sum beyond float32 is inf; one below 2^-126 is zero and keeps its sign; one that is exactly zero is +0,
    whatever the signs of its terms. Infinities and NaN give what they would give in any matrix product, as the one
    canonical NaN.

    There is no gradient rule: what an operand's gradient is rounded to is up to the caller's ``custom_vjp``.

    Args:
        a: float32, bfloat16 or float16, of any values, subnormals included; of a shape that ``jnp.matmul`` takes.
        b: likewise.
        axis_name: inside ``shard_map`` or ``vmap``, axes over which both operands are parts along the contracted one.
            The sum is over all parts, and rounded once; under ``jit`` it is without this, however operands are split.

    Returns:
        float32, of the shape of ``a @ b``.

    Raises:
        TypeError: for operands of other dtypes, float64 among them; and under differentiation.
        ValueError: for shapes that do not match, and sums of more than 2^30 terms.

    >>> a = jnp.array([[2.0**64, 1.0, -(2.0**64)]])
    >>> exact_matmul(a, jnp.ones((3, 1))).tolist()
    [[1.0]]
    """
    a, b = _operand(a, "exact_matmul"), _operand(b, "exact_matmul")
    if a.ndim == 0 or b.ndim == 0 or a.shape[-1] != b.shape[0 if b.ndim == 1 else -2]:
        raise InputError(f"the operands have shapes {a.shape} and {b.shape}; expected (..., n, k) and (..., k, m)")
    if b.ndim <= 2:
        return exact_dot_general(a, b, (((a.ndim - 1,), (0,)), ((), ())), axis_name=axis_name)
    rows = a[None] if a.ndim == 1 else a
    batch = jnp.broadcast_shapes(rows.shape[:-2], b.shape[:-2])
    rows, b = (jnp.broadcast_to(x, (*batch, *x.shape[-2:])) for x in (rows, b))
    axes = tuple(range(len(batch)))
    product = exact_dot_general(rows, b, (((len(batch) + 1,), (len(batch),)), (axes, axes)), axis_name=axis_name)
    return product[..., 0, :] if a.ndim == 1 else product


def exact_dot_general(
    lhs: jax.Array,
    rhs: jax.Array,
    dimension_numbers: DotDimensionNumbers,
    *,
    axis_name: AxisName | None = None,
) -> jax.Array:
    """:func:`exact_matmul` of any axes: ``lax.dot_general`` that rounds once.

    Args:
        lhs: float32, bfloat16 or float16, of any values.
        rhs: likewise.
        dimension_numbers: as of ``lax.dot_general``.
        axis_name: as of :func:`exact_matmul`.

    Returns:
        float32: batch axes, then the other ones of ``lhs``, then of ``rhs``.

    Raises:
        TypeError: for operands of other dtypes, float64 among them; and under differentiation.
        ValueError: for shapes that do not match, and sums of more than 2^30 terms.

    >>> x = jnp.arange(6.0).reshape(2, 3)
    >>> exact_dot_general(x, x, (((1,), (1,)), ((), ()))).tolist()
    [[5.0, 14.0], [14.0, 50.0]]
    """
    lhs, rhs = _operand(lhs, "exact_dot_general"), _operand(rhs, "exact_dot_general")
    (lhs_contracted, rhs_contracted), (lhs_batch, rhs_batch) = dimension_numbers
    axes = (tuple(lhs_contracted), tuple(rhs_contracted)), (tuple(lhs_batch), tuple(rhs_batch))
    for left, right in axes:
        if [lhs.shape[axis] for axis in left] != [rhs.shape[axis] for axis in right]:
            raise InputError(
                f"the operands have shapes {lhs.shape} and {rhs.shape}; expected axes {left} of one to be as long as"
                f" axes {right} of the other"
            )
    length = math.prod(lhs.shape[axis] for axis in lhs_contracted) * places(axis_name)
    return _in_one_program(axes, length, axis_name, lhs, rhs)


def _operand(x: jax.Array, taker: str) -> jax.Array:
    x = jnp.asarray(x)
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise TypeError(f"{taker} takes float32, bfloat16 and float16, whose products float64 holds; got {x.dtype}")
    return widened(x)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _product(axes: _Axes, length: int, axis_name: AxisName | None, a: jax.Array, b: jax.Array) -> jax.Array:
    def dot(a: jax.Array, b: jax.Array) -> jax.Array:
        # Without a dtype asked for: vmap, which happens later, where x64 is off, would make float32 of float64.
        part = lax.dot_general(a, b, axes)
        return part if axis_name is None else lax.psum(part, axis_name)

    # Of transposed constants XLA reads the bits in another order than the values, where it computes while compiling.
    a, b = lax.optimization_barrier((a, b))
    with jax.enable_x64(True):
        spans = _span(a, axis_name), _span(b, axis_name)
        return lax.cond(
            spans[0].bits + spans[1].bits <= bits_of_spans(length),
            lambda operands, spans: _rounded(dot(*map(_wide, operands))),
            partial(_by_slices, dot, length),
            (a, b),
            spans,
        )


@_product.defjvp
def _no_gradient(
    axes: _Axes, length: int, axis_name: AxisName | None, primals: object, tangents: object
) -> tuple[jax.Array, jax.Array]:
    raise TypeError("exact products have no gradient rule; expected to be called in a jax.custom_vjp, which is one")


_in_one_program = jax.jit(_product, static_argnums=(0, 1, 2), inline=True)  # outside of jit, too


class _Span(NamedTuple):
    """Where the bits of an operand lie.

    Attributes:
        ends: int32 ``(2,)``: how far the lowest bit set in any element lies below the lowest of all, which is not
            positive, and how far the highest lies above. What is not finite counts as the binade beyond float32.
    """

    ends: jax.Array

    @property
    def exponent(self) -> jax.Array:
        """Int32 scalar: the lowest bit is worth two to this."""
        return LOWEST_EXPONENT - self.ends[0]

    @property
    def bits(self) -> jax.Array:
        """Int32 scalar: how many there are from the lowest to the highest; none if all elements are zero."""
        return jnp.maximum(self.ends[1] + self.ends[0], 0)

    @property
    def is_finite(self) -> jax.Array:
        """Bool scalar: whether all elements are."""
        return self.ends[1] < _PLACES


def _span(x: jax.Array, axis_name: AxisName | None = None) -> _Span:
    magnitude = lax.bitcast_convert_type(x, jnp.int32) & _MAGNITUDE
    is_zero = magnitude == 0
    place = jnp.maximum(magnitude >> 23, 1) - 1
    # The bit above a fraction is always set, so that an integer conversion finds the lowest.
    significand = magnitude | _IMPLICIT_ONE
    lowest_bit = (significand & -significand).astype(jnp.float32)
    trailing = (lax.bitcast_convert_type(lowest_bit, jnp.int32) >> 23) - 127
    above_lowest = jnp.where(is_zero, -_NO_PLACE, -place - trailing)
    highest = jnp.where(is_zero, 0, place + SIGNIFICAND_BITS)
    # One reduction with two results: ten times as fast as two in XLA's CPU backend, which makes vector code of it.
    start = (-_NO_PLACE, np.int32(0))
    ends = jnp.stack(lax.reduce((above_lowest, highest), start, _larger_of_each, tuple(range(x.ndim))))
    return _Span(ends if axis_name is None else lax.pmax(ends, axis_name))


def _larger_of_each(left: tuple[jax.Array, ...], right: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    return tuple(lax.max(a, b) for a, b in zip(left, right, strict=True))


def _wide(x: jax.Array) -> jax.Array:
    """float32 as float64, subnormals at their value, which XLA's CPU backend would read as zero."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    magnitude = bits & _MAGNITUDE
    steps = jnp.where(bits < 0, -magnitude, magnitude)
    subnormal = lax.convert_element_type(steps, jnp.float64) * 2.0**LOWEST_EXPONENT
    return jnp.where(magnitude < _IMPLICIT_ONE, subnormal, lax.convert_element_type(x, jnp.float64))


def _rounded(total: jax.Array) -> jax.Array:
    """float64 rounded to float32 by the library's rules: no subnormals, one NaN, no negative zero but from those."""
    vanished = jnp.where(total < 0, jnp.float32(-0.0), jnp.float32(0))
    single = lax.convert_element_type(total, jnp.float32)
    single = jnp.where(jnp.abs(total) < ROUNDS_TO_NORMAL, vanished, single)
    return jnp.where(jnp.isnan(total), jnp.float32(jnp.nan), single)


# --- sums that one float64 dot does not hold ------------------------------------------------------------------------


def _by_slices(dot: _Dot, length: int, operands: tuple[jax.Array, jax.Array], spans: tuple[_Span, _Span]) -> jax.Array:
    """As many dots as it takes, each an integer that float64 holds, added up until the rounding is certain."""
    cut = cut_of(spans[0].bits, spans[1].bits, length, jnp.where, _quotient)
    # In one array, since each number by itself is compiled by itself.
    numbers = jnp.stack([spans[0].exponent, spans[1].exponent, cut.left, cut.right, cut.bits])
    values = tuple(jnp.where(jnp.isfinite(x), _wide(x), 0.0) for x in operands)
    are_two = cut.left * cut.right == 2
    total = lax.cond(are_two, partial(_sum_of_two, dot), partial(_sum_of_many, dot), values, numbers)
    are_finite = spans[0].is_finite & spans[1].is_finite
    return _rounded(lax.cond(are_finite, lambda total, *_: total, partial(_with_specials, dot), total, *operands))


def _quotient(dividend: jax.Array, divisor: jax.typing.ArrayLike) -> jax.Array:
    """Of numbers that are not negative: rounding to the floor, which that is, takes two more programs to compile."""
    return lax.div(dividend, jnp.asarray(divisor, dividend.dtype))


def _with_specials(dot: _Dot, total: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """Sums of finite elements, and what infinities and NaN make of the others: signs tell as much as values do."""
    special = dot(*(jnp.where(jnp.isfinite(x), jnp.sign(_wide(x)), _wide(x)) for x in (a, b)))
    return jnp.where(jnp.isfinite(special), total, special)


class _Sliced(NamedTuple):
    """An operand that is cut into slices.

    Attributes:
        values: float64; what is not finite is zero.
        exponent: int32 scalar: the lowest slice counts in units of two to this.
        count: int32 scalar, of slices.
        bits: int32 scalar, of a slice.
    """

    values: jax.Array
    exponent: jax.Array
    count: jax.Array
    bits: jax.Array

    def slice(self, k: jax.Array) -> jax.Array:
        """The bits of a slice, the lowest being slice 0, as integers with the sign of the element."""
        scaled = self.values * _power_of_two(-self.exponent - self.bits * k)
        above = jnp.trunc(scaled * _power_of_two(-self.bits)) * _power_of_two(self.bits)
        return jnp.trunc(scaled) - jnp.where(k < self.count - 1, above, 0.0)

    def halves(self) -> tuple[jax.Array, jax.Array]:
        """The lower and the upper one of two slices; the whole twice, if that is all there is."""
        scaled = self.values * _power_of_two(-self.exponent)
        high = jnp.trunc(scaled * _power_of_two(-self.bits))
        low = scaled - high * _power_of_two(self.bits)
        is_whole = self.count == 1
        return jnp.where(is_whole, scaled, low), jnp.where(is_whole, scaled, high)


def _sliced(values: tuple[jax.Array, jax.Array], numbers: jax.Array) -> tuple[_Sliced, _Sliced]:
    """Both operands, by their exponents, counts and the bits of a slice: int32 ``(5,)``."""
    left, right = (_Sliced(values[k], numbers[k], numbers[2 + k], numbers[4]) for k in range(2))
    return left, right


def _sum_of_two(dot: _Dot, values: tuple[jax.Array, jax.Array], numbers: jax.Array) -> jax.Array:
    """The sum where one operand is whole and the other in two, rounded to odd: it rounds on as the exact one would."""
    left, right = _sliced(values, numbers)
    (left_low, left_high), (right_low, right_high) = left.halves(), right.halves()
    exponent = left.exponent + right.exponent
    low = dot(left_low, right_low) * _power_of_two(exponent)
    high = dot(left_high, right_high) * _power_of_two(exponent + left.bits)
    # Knuth's sum: what the float64 sum lacks, exact itself, fused with these products or not, since they are exact.
    total = high + low
    of_low = total - high
    error = (high - (total - of_low)) + (low - of_low)
    bits = lax.bitcast_convert_type(total, jnp.int64)
    is_beyond = ((error < 0) != (total < 0)).astype(jnp.int64)
    odd = lax.bitcast_convert_type((bits - is_beyond) | 1, jnp.float64)
    return jnp.where(error == 0, total, odd)


class _Sum(NamedTuple):
    """A sum of digits that arrive from the highest to the lowest; int64 and float64, of the shape of the result.

    Attributes:
        rest: the digits so far, as one integer; once a midpoint is chosen, by how much they lie above that.
        midpoint: half way between the two float32 around the sum, or zero as long as that is not settled.
        last: the sum of the dots of the last place.
        before_last: that of the place before it.
    """

    rest: jax.Array
    midpoint: jax.Array
    last: jax.Array
    before_last: jax.Array


def _sum_of_many(dot: _Dot, values: tuple[jax.Array, jax.Array], numbers: jax.Array) -> jax.Array:
    """The exact sum, or a float64 that rounds to the same float32."""
    left, right = _sliced(values, numbers)
    # A sum without terms is zero, however many digits there are.
    has_terms = dot((left.values != 0).astype(jnp.float32), (right.values != 0).astype(jnp.float32)) > 0

    def is_undecided(state: tuple[jax.Array, _Sum]) -> jax.Array:
        place, total = state
        largest = largest_rest(left.bits.astype(jnp.int64), _quotient)
        is_decided = (total.midpoint != 0) & (jnp.abs(total.rest) > largest)
        return (place >= -2) & jnp.any(~is_decided & has_terms)

    def add(state: tuple[jax.Array, _Sum]) -> tuple[jax.Array, _Sum]:
        place, total = state
        left, right = _sliced(values, _in_this_turn(numbers, place))
        slice_bits = left.bits.astype(jnp.int64)
        # The dots of a place reach into the two above it, so that the digit two places above is now known.
        worth = _power_of_two(left.exponent + right.exponent + slice_bits * (place + 2))
        return place - 1, _with_digit(total, _dots_of_place(dot, values, numbers, place, nothing), worth, slice_bits)

    # Zeros that vary over the axes of shard_map over which the dots do, as a loop wants them.
    nothing = has_terms.astype(jnp.int64) & 0
    start = left.count + right.count - 2, _Sum(nothing, nothing.astype(jnp.float64), nothing, nothing)
    _, total = lax.while_loop(is_undecided, add, start)
    whole = lax.convert_element_type(total.rest, jnp.float64) * _power_of_two(left.exponent + right.exponent)
    nudged = total.midpoint + jnp.sign(total.rest) * jnp.abs(total.midpoint) * 2.0**-40
    return jnp.where(total.midpoint == 0, whole, nudged)


def _dots_of_place(
    dot: _Dot, values: tuple[jax.Array, jax.Array], numbers: jax.Array, place: jax.Array, nothing: jax.Array
) -> jax.Array:
    """The sum of the dots of all pairs of slices whose numbers add up to a place; int64."""

    def add(k: jax.Array, total: jax.Array) -> jax.Array:
        left, right = _sliced(values, _in_this_turn(numbers, k))
        return total + dot(left.slice(k), right.slice(place - k))

    left, right = _sliced(values, _in_this_turn(numbers, place))
    first, last = jnp.maximum(place - right.count + 1, 0), jnp.minimum(place, left.count - 1)
    total = lax.fori_loop(first, last + 1, add, nothing.astype(jnp.float64))
    return lax.convert_element_type(total, jnp.int64)


def _in_this_turn(numbers: jax.Array, turn: jax.Array) -> jax.Array:
    """The same numbers, of which XLA cannot know: what depends on them alone it would compute once before the loop.

    Each number in a program of its own, to save an operation on a scalar.
    """
    return lax.optimization_barrier((numbers, turn))[0]


def _with_digit(total: _Sum, dots: jax.Array, worth: jax.Array, slice_bits: jax.Array) -> _Sum:
    """A sum with the next digit, worth so much: what the dots of three places leave in that one."""
    mask, settled = (1 << slice_bits) - 1, 1 << bits_until_rounded(slice_bits)
    digit = (dots >> (2 * slice_bits)) + ((total.last >> slice_bits) & mask) + (total.before_last & mask)
    # Beyond that the sign is settled, and all that is asked of the rest.
    rest = (jnp.clip(total.rest, -settled, settled) << slice_bits) + digit
    choose = (total.midpoint == 0) & (jnp.abs(rest) >= settled)
    bits = lax.bitcast_convert_type(lax.convert_element_type(rest, jnp.float64), jnp.int64)
    # Where the conversion rounds up to the next float32, the sum is below the midpoint after that: as right.
    cut = bits >> _BELOW_FLOAT32 << _BELOW_FLOAT32 | 1 << (_BELOW_FLOAT32 - 1)
    midpoint = lax.bitcast_convert_type(cut, jnp.float64)
    return _Sum(
        jnp.where(choose, rest - lax.convert_element_type(midpoint, jnp.int64), rest),
        jnp.where(choose, midpoint * worth, total.midpoint),
        dots,
        total.last,
    )


def _power_of_two(exponent: jax.Array) -> jax.Array:
    """Two to this, within float64's normal range; ``exp2`` is not exact under XLA."""
    return lax.bitcast_convert_type((exponent.astype(jnp.int64) + 1023) << 52, jnp.float64)

"""Sums of products that one float64 dot does not hold: of slices of the operands, until the rounding is certain.

Each dot of two slices is a sum of integers that float64 holds, in whatever order; :mod:`altgrad_core.exact` says how
operands are cut. ``altgrad_torch/slices.py`` does the same. All of it wants ``jax.enable_x64``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from altgrad_core.exact import bits_until_rounded, largest_rest

Dot: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]

_BELOW_FLOAT32 = 29
"""Bits of a float64 significand that float32 does not have."""


class Sliced(NamedTuple):
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


def _sliced(values: tuple[jax.Array, jax.Array], numbers: jax.Array) -> tuple[Sliced, Sliced]:
    """Both operands, by their exponents, counts and the bits of a slice: int32 ``(5,)``."""
    left, right = (Sliced(values[k], numbers[k], numbers[2 + k], numbers[4]) for k in range(2))
    return left, right


def sum_of_two(dot: Dot, values: tuple[jax.Array, jax.Array], numbers: jax.Array) -> jax.Array:
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


def sum_of_many(dot: Dot, values: tuple[jax.Array, jax.Array], numbers: jax.Array) -> jax.Array:
    """The exact sum, or a float64 that rounds to the same float32."""
    left, right = _sliced(values, numbers)
    # A sum without terms is zero, however many digits there are.
    has_terms = dot((left.values != 0).astype(jnp.float32), (right.values != 0).astype(jnp.float32)) > 0

    def is_undecided(state: tuple[jax.Array, _Sum]) -> jax.Array:
        place, total = state
        largest = largest_rest(left.bits.astype(jnp.int64), quotient)
        is_decided = (total.midpoint != 0) & (jnp.abs(total.rest) > largest)
        return (place >= -2) & jnp.any(~is_decided & has_terms)

    def add(state: tuple[jax.Array, _Sum]) -> tuple[jax.Array, _Sum]:
        place, total = state
        left, right = _sliced(values, _in_this_turn(numbers, place))
        slice_bits = left.bits.astype(jnp.int64)
        # The dots of a place reach into the two above it, so that the digit two places above is now known.
        worth = _power_of_two(left.exponent + right.exponent + left.bits * (place + 2))
        return place - 1, _with_digit(total, _dots_of_place(dot, values, numbers, place, nothing), worth, slice_bits)

    # Zeros that vary over the axes of shard_map over which the dots do, as a loop wants them.
    nothing = has_terms.astype(jnp.int64) & 0
    start = left.count + right.count - 2, _Sum(nothing, nothing.astype(jnp.float64), nothing, nothing)
    _, total = lax.while_loop(is_undecided, add, start)
    rest = lax.convert_element_type(total.rest, jnp.float64)
    nudged = total.midpoint + jnp.sign(rest) * jnp.abs(total.midpoint) * 2.0**-40
    return jnp.where(total.midpoint == 0, rest * _power_of_two(left.exponent + right.exponent), nudged)


def _dots_of_place(
    dot: Dot, values: tuple[jax.Array, jax.Array], numbers: jax.Array, place: jax.Array, nothing: jax.Array
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


def quotient(dividend: jax.Array, divisor: jax.typing.ArrayLike) -> jax.Array:
    """Of numbers that are not negative: rounding to the floor, which that is, takes two more programs to compile."""
    return lax.div(dividend, jnp.asarray(divisor, dividend.dtype))

"""Matrix products that are exact until one rounding: how many bits there are, and how they are shared out.

A finite float32 is an integer times a power of two, and so are products and sums of them. As long as all integers on
the way are below 2^53, float64 holds every partial sum, in whatever order it is made. An operand's *span* is the number
of bits from the lowest that is set in any of its elements to the highest. Two spans and the bits of the number of terms
add up to more than 53 if operands mix magnitudes enough; they are then cut into slices of so few bits that they do not.

Source: Ozaki, Ogita, Oishi and Rump, "Error-free transformations of matrix multiplication by using fast routines of
matrix multiplication and its applications", Numerical Algorithms 59 (2012). That the digits are added up from the top,
and only until the rounding is certain, is AltGrad's.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import floordiv
from typing import Any, NamedTuple

from altgrad_core.errors import InputError

FLOAT64_BITS = 53
"""Integers of so many bits are exact in float64."""

LOWEST_EXPONENT = -149
"""The lowest bit that a float32 can have is worth two to this; places of bits are counted from it."""

SIGNIFICAND_BITS = 24

MAX_LENGTH = 2**30
"""Terms of a sum at most, so that slices have 9 bits at least."""

_PAIRS_BITS = 5
"""A float32 spans 277 bits: at most 31 pairs of slices, of 9 bits, have products of the same place."""
_SHORTEST_SLICE = 9
_LONGEST_SLICE = 26
"""Two of them are not more than float64 holds, whatever else is to be added."""
_INT64_BITS = 62
"""Bits of an integer in an int64, one left to be safe by."""


def _either(condition: bool, yes: Any, no: Any) -> Any:
    return yes if condition else no


class Cut(NamedTuple):
    """How operands are cut into slices; ints, or integer arrays of a framework.

    Attributes:
        bits: of a slice; the highest one of an operand has whatever there is above.
        left: how many slices the left operand has; none if it is zero.
        right: likewise.
    """

    bits: Any
    left: Any
    right: Any


def bits_of_length(length: int) -> int:
    """By how many bits a sum of so many terms may be longer than each.

    Raises:
        InputError: if there are more than 2^30.

    >>> [bits_of_length(k) for k in (0, 1, 2, 512, 513)]
    [0, 0, 1, 9, 10]
    """
    if length > MAX_LENGTH:
        raise InputError(f"the contracted axes have {length} elements; expected 2^30 at most")
    return max(length - 1, 0).bit_length()


def bits_of_spans(length: int) -> int:
    """How many bits the spans of both operands may have together for one float64 dot to be exact.

    >>> bits_of_spans(2**17)  # two operands in E4M3, whose span has 18 bits
    36
    """
    return FLOAT64_BITS - bits_of_length(length)


def cut_of(
    left: Any,
    right: Any,
    length: int,
    where: Callable[[Any, Any, Any], Any] = _either,
    divide: Callable[[Any, Any], Any] = floordiv,
) -> Cut:
    """How to cut operands of two spans so that all dots of one place have a sum that float64 holds.

    The shorter operand may stay whole, and the slices of the longer one take what is left; or both are cut alike. What
    takes fewer dots is taken.

    Args:
        left: the bits of one span: an int, or an integer array of a framework.
        right: likewise, of the other.
        length: terms of a sum.
        where: for arrays, the function of this name.
        divide: integers that are not negative, to whole numbers.

    >>> cut_of(21, 25, 512)
    Cut(bits=23, left=1, right=2)
    >>> cut_of(127, 127, 512)
    Cut(bits=19, left=7, right=7)
    """
    alike = (FLOAT64_BITS - _PAIRS_BITS - bits_of_length(length)) // 2
    of_left, of_right = (divide(span + (alike - 1), alike) for span in (left, right))
    is_left_shorter = left < right
    rest = bits_of_spans(length) - where(is_left_shorter, left, right)
    rest = where(rest > _LONGEST_SLICE, _LONGEST_SLICE, rest)
    is_possible = rest >= _SHORTEST_SLICE
    slice_bits = where(is_possible, rest, 1)
    of_longer = divide(where(is_left_shorter, right, left) + (slice_bits - 1), slice_bits)
    one_is_whole = is_possible & (of_longer < of_left * of_right)
    return Cut(
        where(one_is_whole, rest, alike),
        where(one_is_whole, where(is_left_shorter, 1, of_longer), of_left),
        where(one_is_whole, where(is_left_shorter, of_longer, 1), of_right),
    )


def bits_until_rounded(slice_bits: Any) -> Any:
    """How many bits a sum must have before the place where a float32 next to it would be rounded is settled.

    One place more and the integer is still an int64. What is yet to come is less than a quarter of float32's step
    there, so that it reaches no midpoint but the one between the two float32 around the sum.

    >>> bits_until_rounded(19)
    42
    """
    return _INT64_BITS - 1 - slice_bits


def largest_rest(slice_bits: Any, divide: Callable[[Any, Any], Any] = floordiv) -> Any:
    """What all digits below one can add up to at most, in units of that one.

    A digit is what three neighbouring sums leave in one place: less than ``2^slice_bits`` from each of two, and the top
    of the third, of ``53 - 2 * slice_bits`` bits.

    >>> largest_rest(19), largest_rest(9)
    (3, 67240195)
    """
    digit = (2 << slice_bits) + (1 << FLOAT64_BITS - 2 * slice_bits)
    return divide(digit, (1 << slice_bits) - 1) + 1

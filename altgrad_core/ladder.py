"""The eight 8-bit formats as a ladder from precision to range, and the next rung either way."""

from __future__ import annotations

from fractions import Fraction

from altgrad_core.formats import EIGHT, Format, parse


def with_more_range(format: str | Format) -> str | None:
    """The nearest of the eight formats with more exponent bits that mean more range (AltGrad rule).

    Range is the ratio of the largest to the smallest positive value: E0M7 and E1M6 are one grid at two scales and have
    the same, so the one is no remedy for the other.

    Args:
        format: any format, by name or as it is.

    Returns:
        Its name, or None at the end of the ladder.

    >>> [with_more_range(name) for name in ("E0M7", "E4M3", "E7M0")]
    ['E2M5', 'E5M2', None]
    """
    current = parse(format)
    return next((name for name in EIGHT if _range(parse(name)) > _range(current)), None)


def with_more_precision(format: str | Format) -> str | None:
    """The nearest of the eight formats with more mantissa bits that mean more precision (AltGrad rule).

    Precision is the number of steps from zero to the largest value at the spacing that values have there.

    Args:
        format: any format, by name or as it is.

    Returns:
        Its name, or None at the end of the ladder.

    >>> [with_more_precision(name) for name in ("E7M0", "E3M4", "E1M6", "E0M7")]
    ['E6M1', 'E2M5', None, None]
    """
    current = parse(format)
    return next((name for name in reversed(EIGHT) if _precision(parse(name)) > _precision(current)), None)


def _range(format: Format) -> Fraction:
    smallest = format.smallest_subnormal or format.min_normal or 1.0
    return Fraction(format.max_representable_value) / Fraction(smallest)


def _precision(format: Format) -> int:
    """The significand of the largest value: E4M3 ends at 1.75 * 2^8, not at 1.875 * 2^8."""
    return format.finite_parts(format.max_code)[0]

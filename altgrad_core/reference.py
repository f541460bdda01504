"""The definition of a cast, written to be read: one value at a time, and vectorised from the code book.

These are the oracles that every fast implementation is tested against. Neither is meant to be quick.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from altgrad_core.errors import InputError
from altgrad_core.formats import OVERFLOWS, ROUNDINGS, STOCHASTIC_BITS, Format, Overflow, Rounding


def round_to_format(
    value: float | Fraction,
    format: Format,
    *,
    rounding: Rounding = "nearest_even",
    overflow: Overflow = "native",
    random_bits: int | None = None,
) -> float:
    """Round a real number to the grid of a format, by rational arithmetic.

    Args:
        value: any float or fraction; NaN gives NaN.
        format: the grid.
        rounding: ties to the even code, ties away from zero, truncation, or stochastic.
        overflow: what becomes of a value that rounds beyond max; see :data:`altgrad_core.formats.Overflow`.
        random_bits: for stochastic rounding, an integer of which the lowest 24 bits are used. With f the fraction of
            a quantum that is cut off, the magnitude goes up if ``floor(f * 2^24) + bits >= 2^24``.

    Returns:
        The rounded value, exact in float64, with the sign of ``value`` (so -0 for what underflows from below).

    Raises:
        ValueError: for an unknown mode, and where ``random_bits`` is missing or without effect.

    >>> from altgrad_core.formats import parse
    >>> round_to_format(1.5, parse("E7M0")), round_to_format(500.0, parse("E4M3"), overflow="saturate")
    (2.0, 448.0)
    """
    check_modes(rounding, overflow)
    if (rounding == "stochastic") != (random_bits is not None):
        raise InputError(f"random_bits go with rounding='stochastic' and with nothing else; rounding is {rounding!r}")
    if isinstance(value, float) and math.isnan(value):
        return math.nan
    sign = math.copysign(1.0, value) if isinstance(value, float) else (-1.0 if value < 0 else 1.0)
    if isinstance(value, float) and math.isinf(value):
        return sign * (math.inf if overflow == "saturate_finite" else _beyond_max(format, overflow))
    magnitude = abs(Fraction(value))
    exponent = max(_floor_log2(magnitude), format.min_exponent)
    quantum = Fraction(2) ** (exponent - format.mantissa_bits)
    steps = _round_steps(magnitude / quantum, exponent, format, rounding, random_bits)
    rounded = steps * quantum
    if rounded > Fraction(format.max_representable_value):
        return sign * _beyond_max(format, overflow)
    return math.copysign(float(rounded), sign)


def _beyond_max(format: Format, overflow: Overflow) -> float:
    return format.overflow_value if overflow == "native" else format.max_representable_value


def _floor_log2(magnitude: Fraction) -> int:
    if magnitude == 0:
        return -(10**6)
    estimate = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    return estimate if Fraction(2) ** estimate <= magnitude else estimate - 1


def _round_steps(steps: Fraction, exponent: int, format: Format, rounding: Rounding, random_bits: int | None) -> int:
    """Round a number of quanta to an integer; a code's parity is that of its last bit, an exponent bit if M = 0."""
    whole, rest = divmod(steps, 1)
    if rounding == "toward_zero":
        return int(whole)
    if rounding == "stochastic":
        assert random_bits is not None
        drawn = random_bits & (2**STOCHASTIC_BITS - 1)
        return int(whole) + (int(rest * 2**STOCHASTIC_BITS) + drawn >= 2**STOCHASTIC_BITS)
    if rest != Fraction(1, 2) or rounding == "nearest_away":
        return int(whole) + (rest >= Fraction(1, 2))
    code = int(whole) + ((exponent - format.min_exponent) << format.mantissa_bits)
    return int(whole) + (code & 1)


def quantize_reference(
    values: npt.NDArray[np.float32 | np.float64], format: Format, *, overflow: Overflow = "native"
) -> npt.NDArray[np.float64]:
    """Round an array to nearest (ties to the even code) by looking each value up between the codes of the format.

    An independent second definition: it knows nothing of exponents, only the sorted code book and its midpoints.

    Args:
        values: float32 or float64, any shape.
        format: of at most 16 bits.
        overflow: see :data:`altgrad_core.formats.Overflow`.

    Returns:
        float64 of the same shape, on the grid, with the sign of the input (and canonical NaN).
    """
    check_modes("nearest_even", overflow)
    grid = format.code_book()[: format.max_code + 1]
    ends = np.concatenate([(grid[1:] + grid[:-1]) / 2, [_upper_end(format)]])
    is_nan = np.isnan(values)
    magnitudes = np.abs(np.where(is_nan, 0, values).astype(np.float64))
    code = np.searchsorted(ends, magnitudes, side="left")
    on_tie = magnitudes == ends[np.minimum(code, format.max_code)]
    code = code + (on_tie & (code % 2 == 1))
    beyond = code > format.max_code
    result = np.where(beyond, _beyond_max(format, overflow), grid[np.minimum(code, format.max_code)])
    if overflow == "saturate_finite":
        result = np.where(np.isinf(magnitudes), np.inf, result)
    return np.where(is_nan, np.nan, np.where(np.signbit(values), -result, result))


def _upper_end(format: Format) -> float:
    """Half a quantum beyond max: what rounds past it overflows."""
    top = format.max_representable_value
    below = format.to_real(format.max_code - 1)
    next_up = top + (top - below) if format.mantissa_bits else 2 * top
    return (top + next_up) / 2


def check_modes(rounding: str, overflow: str) -> None:
    """Check the names of a rounding and an overflow mode.

    Raises:
        ValueError: naming the bad value and what was expected.
    """
    if rounding not in ROUNDINGS:
        raise InputError(f"unknown rounding {rounding!r}; expected one of {', '.join(ROUNDINGS)}")
    if overflow not in OVERFLOWS:
        raise InputError(f"unknown overflow policy {overflow!r}; expected one of {', '.join(OVERFLOWS)}")

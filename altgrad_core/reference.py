"""The definition of a cast, written to be read: one value at a time, and vectorised from the code book.

These are the oracles that every fast implementation is tested against. Neither is meant to be quick.
"""

from __future__ import annotations

import math
import numbers
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from altgrad_core.errors import InputError, check_choice
from altgrad_core.formats import OVERFLOWS, ROUNDINGS, STOCHASTIC_BITS, Format, Overflow, Rounding
from altgrad_core.scalars import is_integer


def round_to_format(
    value: float | Fraction,
    format: Format,
    *,
    rounding: Rounding = "nearest_even",
    overflow: Overflow = "native",
    random_bits: int | None = None,
    stochastic_bits: int = STOCHASTIC_BITS,
) -> float:
    """Round a real number to the grid of a format, in integers.

    Args:
        value: any real number; NaN gives NaN.
        format: the grid.
        rounding: ties to the even code, ties away from zero, truncation, or stochastic.
        overflow: what becomes of a value that rounds beyond max; see :data:`altgrad_core.formats.Overflow`.
        random_bits: for stochastic rounding, an integer of which the lowest ``stochastic_bits`` are used.
        stochastic_bits: how many, 1 to 24. With f the fraction of a quantum that is cut off, the magnitude goes up
            if ``floor(f * 2^stochastic_bits) + bits >= 2^stochastic_bits``.

    Returns:
        The rounded value, exact in float64, with the sign of ``value`` (so -0 for what underflows from below, if the
        format has -0). Without a sign, zero and negative values are NaN and what is below the smallest is that.

    Raises:
        ValueError: for an unknown mode, what is no real number, and where ``random_bits`` is missing, no integer or
            without effect.

    >>> from altgrad_core.formats import parse
    >>> round_to_format(1.5, parse("E7M0")), round_to_format(500.0, parse("E4M3"), overflow="saturate")
    (2.0, 448.0)
    """
    check_modes(rounding, overflow)
    stochastic_bits = check_stochastic_bits(stochastic_bits)
    if (rounding == "stochastic") != (random_bits is not None):
        raise InputError(f"random_bits go with rounding='stochastic' and with nothing else; rounding is {rounding!r}")
    if random_bits is not None and not is_integer(random_bits):
        raise InputError(f"random_bits is {random_bits!r}; expected an integer")
    value = _as_python(value)
    if isinstance(value, float) and math.isnan(value):
        return math.nan
    sign = math.copysign(1.0, value) if isinstance(value, float) else (-1.0 if value < 0 else 1.0)
    if not format.is_signed and (sign < 0 or value == 0):
        return math.nan
    if isinstance(value, float) and math.isinf(value):
        return sign * (math.inf if overflow == "saturate_finite" else _beyond_max(format, overflow))
    over, under = abs(value).as_integer_ratio()
    if not format.is_signed and _is_below(over, under, format.min_exponent):
        over, under = _power_of_two(format.min_exponent)
    exponent = max(_floor_log2(over, under), format.min_exponent)
    quantum = exponent - format.mantissa_bits
    raised, lowered = _power_of_two(quantum)
    draw = None if random_bits is None else (int(random_bits), stochastic_bits)
    steps = _round_steps((over * lowered, under * raised), exponent, format, rounding, draw)
    if _exceeds((steps, quantum), format.finite_parts(format.max_code)):
        return sign * _beyond_max(format, overflow)
    if steps == 0 and not format.has_negative_zero:
        return 0.0
    return math.copysign(math.ldexp(steps, quantum), sign)


def _as_python(value: object) -> float | Fraction:
    """A real number as one of Python's: of NumPy's floats, -0, NaN and infinities would not be told."""
    if isinstance(value, (float, Fraction)):
        return value
    if is_integer(value):
        return Fraction(int(value))
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise InputError(f"the value is {value!r} ({type(value).__name__}); expected a real number, such as a float")
    return float(value)


def _beyond_max(format: Format, overflow: Overflow) -> float:
    return format.overflow_value if overflow == "native" else format.max_representable_value


def _floor_log2(over: int, under: int) -> int:
    """Of ``over / under``; far down for zero."""
    if over == 0:
        return -(10**6)
    estimate = over.bit_length() - under.bit_length()
    return estimate - 1 if _is_below(over, under, estimate) else estimate


def _is_below(over: int, under: int, exponent: int) -> bool:
    """Whether ``over / under`` is less than a power of two."""
    raised, lowered = _power_of_two(exponent)
    return over * lowered < under * raised


def _power_of_two(exponent: int) -> tuple[int, int]:
    """As a ratio of integers."""
    return 1 << max(exponent, 0), 1 << max(-exponent, 0)


def _round_steps(
    quanta: tuple[int, int], exponent: int, format: Format, rounding: Rounding, draw: tuple[int, int] | None
) -> int:
    """Round a ratio of integers to one; a code's parity is that of its last bit, an exponent bit if M = 0."""
    over, under = quanta
    whole, rest = divmod(over, under)
    if rounding == "toward_zero":
        return whole
    if draw is not None:
        random_bits, count = draw
        return whole + ((rest << count) // under + random_bits % 2**count >= 2**count)
    if 2 * rest != under or rounding == "nearest_away":
        return whole + (2 * rest >= under)
    # Signed formats spend code 0 on zero, so that their smallest power of two has code 1.
    first = whole - 1 if not format.is_signed else whole
    code = first + ((exponent - format.min_exponent) << format.mantissa_bits)
    return whole + (code & 1)


def _exceeds(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether one significand times a power of two is more than another."""
    lowest = min(one[1], other[1])
    return one[0] << (one[1] - lowest) > other[0] << (other[1] - lowest)


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
        float64 of the same shape, on the grid, with the sign of the input (and canonical NaN); signs and zeros as
        in :func:`round_to_format`.
    """
    check_modes("nearest_even", overflow)
    grid = format.code_book()[: format.max_code + 1]
    floor = 0.0 if format.is_signed else grid[0]
    ends = np.concatenate([(grid[1:] + grid[:-1]) / 2, [_upper_end(format)]])
    is_nan = np.isnan(values)
    if not format.is_signed:
        is_nan |= (values == 0) | np.signbit(values)
    magnitudes = np.maximum(np.abs(np.where(is_nan, floor, values).astype(np.float64)), floor)
    code = np.searchsorted(ends, magnitudes, side="left")
    on_tie = magnitudes == ends[np.minimum(code, format.max_code)]
    code = code + (on_tie & (code % 2 == 1))
    beyond = code > format.max_code
    result = np.where(beyond, _beyond_max(format, overflow), grid[np.minimum(code, format.max_code)])
    if overflow == "saturate_finite":
        result = np.where(np.isinf(magnitudes), np.inf, result)
    negative = np.signbit(values) & (format.has_negative_zero | (result != 0))
    return np.where(is_nan, np.nan, np.where(negative, -result, result))


def _upper_end(format: Format) -> float:
    """Half way from max to what the next code would be worth, were it not special: what rounds past it overflows."""
    return (format.max_representable_value + math.ldexp(*format.finite_parts(format.max_code + 1))) / 2


def check_stochastic_bits(count: int) -> int:
    """Return a number of random bits that is an integer from 1 to 24.

    Raises:
        ValueError: for anything else.
    """
    if not is_integer(count) or not 1 <= count <= STOCHASTIC_BITS:
        raise InputError(f"stochastic_bits is {count!r}; expected an integer from 1 to {STOCHASTIC_BITS}")
    return int(count)


def check_width(count: int, dtype: str, width: int) -> None:
    """Check that random integers have as many bits as are used: with fewer, fractions would be rounded down more often.

    Args:
        count: how many bits are used.
        dtype: the name of what holds them.
        width: its bits.

    Raises:
        InputError: if those are fewer.
    """
    if width < count:
        raise InputError(
            f"random_bits of {dtype} have {width} bits; expected stochastic_bits of at most {width}, not {count}, or "
            "a wider dtype, such as uint32"
        )


def check_modes(rounding: str, overflow: str) -> None:
    """Check the names of a rounding and an overflow mode.

    Raises:
        ValueError: naming the bad value, what was expected and the nearest of that.
    """
    check_choice("rounding", rounding, ROUNDINGS)
    check_choice("overflow policy", overflow, OVERFLOWS)

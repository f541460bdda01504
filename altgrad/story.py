"""What there is to know about a format, as data: its binades, its other names, its neighbours in range."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from altgrad.libraries import dtype_names
from altgrad.numbers import write_number
from altgrad_core.formats import FORMAT_REGISTRY, Format

_MOST_BITS = 16


@dataclass(frozen=True)
class Binade:
    """Neighbouring values with the same step.

    Attributes:
        first: code of the lowest positive value.
        last: code of the highest.
        low: the lowest value.
        high: the highest.
        step: from each value to the next.
        is_subnormal: whether these are the values below the smallest normal one.
    """

    first: int
    last: int
    low: float
    high: float
    step: float
    is_subnormal: bool

    @property
    def relative_step(self) -> float:
        """The step as a fraction of the lowest value: the largest relative gap in the binade."""
        return self.step / self.low


def binades(format: Format) -> list[Binade]:
    """The positive values of a format by step, from the smallest.

    >>> from altgrad_core.formats import parse
    >>> [(b.low, b.high, b.step) for b in binades(parse("E2M1"))]
    [(0.5, 0.5, 0.5), (1.0, 1.5, 0.5), (2.0, 3.0, 1.0), (4.0, 6.0, 2.0)]
    """
    width = 1 << format.mantissa_bits
    first = 1 if format.is_signed else 0
    found: list[Binade] = []
    while first <= format.max_code:
        last = min(first | (width - 1), format.max_code)
        is_subnormal = format.is_signed and first < width
        exponent = format.min_exponent if is_subnormal else math.frexp(_value(format, first))[1] - 1
        step = math.ldexp(1.0, exponent - format.mantissa_bits)
        found.append(Binade(first, last, _value(format, first), _value(format, last), step, is_subnormal))
        first = last + 1
    return found


def _value(format: Format, code: int) -> float:
    return math.ldexp(*format.finite_parts(code))


def positive_values(format: Format) -> int:
    """How many finite values above zero a format has."""
    return format.max_code if format.is_signed else format.max_code + 1


def other_names(format: Format) -> list[str]:
    """The registry's other names of the same format.

    >>> other_names(FORMAT_REGISTRY["E4M3"])
    ['float8_e4m3fn']
    """
    return [name for name, known in FORMAT_REGISTRY.items() if known == format and name != str(format)]


def multiples(format: Format) -> list[tuple[str, Fraction]]:
    """Formats of the registry that equal this one up to a power of two on every code: name, and how many times this.

    >>> multiples(FORMAT_REGISTRY["E0M7"])
    [('E1M6', Fraction(4, 1))]
    """
    found: list[tuple[str, Fraction]] = []
    for known in distinct_formats():
        if known == format or max(known.bits, format.bits) > _MOST_BITS or known.bits != format.bits:
            continue
        ratio = Fraction(known.max_representable_value) / Fraction(format.max_representable_value)
        if np.array_equal(known.code_book(), format.code_book() * float(ratio), equal_nan=True):
            found.append((str(known), ratio))
    return found


def distinct_formats() -> list[Format]:
    """The registry's formats, each once, under the first of its names."""
    return list(dict.fromkeys(FORMAT_REGISTRY.values()))


def namesakes(format: Format) -> list[Format]:
    """Dtypes of the same split of exponent and mantissa that are another format.

    >>> [str(other) for other in namesakes(FORMAT_REGISTRY["E3M4"])]
    ['float8_e3m4']
    """
    split = (format.is_signed, format.exponent_bits, format.mantissa_bits)
    return [
        known
        for name, known in FORMAT_REGISTRY.items()
        if (known.is_signed, known.exponent_bits, known.mantissa_bits) == split
        and known != format
        and name in dtype_names(known)
    ]


def specials(format: Format) -> str:
    """What a format has besides numbers, in a few words.

    >>> [specials(FORMAT_REGISTRY[name]) for name in ("E3M4", "E4M3", "E5M2", "binary8p3se")]
    ['none', 'NaN', 'inf NaN', 'inf NaN, no -0']
    """
    if not format.is_signed:
        return "NaN, no sign"
    has = [name for name, there in (("inf", format.has_inf), ("NaN", format.has_nan)) if there]
    return " ".join(has or ["none"]) + ("" if format.has_negative_zero else ", no -0")


def in_words(format: Format) -> str:
    """What a format is, in two or three plain sentences."""
    return " ".join([_of_fields(format), _of_specials(format), _of_spacing(format)])


def _of_fields(format: Format) -> str:
    name, bits = str(format), format.bits
    if not format.is_signed:
        return f"{name} has {bits} bits, all of them exponent (bias {format.bias}): powers of two without sign or zero."
    if format.exponent_bits == 0:
        return f"{name} has {bits} bits: a sign and {format.mantissa_bits} bits of fraction, a fixed-point grid."
    mantissa = f"{format.mantissa_bits} of mantissa" if format.mantissa_bits else "no mantissa, so powers of two only"
    return f"{name} has {bits} bits: a sign, {format.exponent_bits} of exponent with bias {format.bias}, {mantissa}."


def _of_specials(format: Format) -> str:
    maximum = write_number(format.max_representable_value)
    if not format.has_nan:
        return f"Every code is a number, so what overflows becomes ±{maximum} and NaN has no code."
    kinds = "infinities and NaN" if format.has_inf else "NaN but no infinities"
    becomes = "an infinity" if format.has_inf else "NaN"
    zero = "" if format.has_negative_zero or not format.is_signed else ", which takes the code of -0"
    return f"It has {kinds}{zero}; what overflows natively becomes {becomes}."


def _of_spacing(format: Format) -> str:
    low, high = format.min_normal, write_number(format.max_representable_value)
    if low is None:
        return f"All neighbours are {write_number(_value(format, 1))} apart, from 0 to {high}."
    if format.mantissa_bits == 0:
        start = low if format.is_signed else _value(format, 0)
        return f"Each value is twice the one before, from {write_number(start)} to {high}."
    step = math.ldexp(1.0, -format.mantissa_bits)
    grid = format.smallest_subnormal
    below = "" if grid is None else f"; below it they are all {write_number(grid)} apart"
    return f"From {write_number(low)} to {high} neighbours lie {_percent(step / 2)} to {_percent(step)} apart{below}."


def _percent(fraction: float) -> str:
    return f"{fraction * 100:.2g}%"

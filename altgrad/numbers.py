"""Numbers as people type them, and as they like to read them: exact both ways."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise
from typing import Literal

import numpy as np

from altgrad_core.errors import InputError
from altgrad_core.formats import FORMAT_REGISTRY, Format
from altgrad_core.reference import round_to_format
from altgrad_core.scalars import is_integer
from altgrad_core.vectors import float32_bits

Kind = Literal["decimal number", "hex float", "power of two", "float32 bit pattern", "special value", "number"]

Real = float | Fraction | np.floating | np.integer
"""A number as Python or NumPy has it."""

_FLOAT32 = FORMAT_REGISTRY["float32"]
_EXPECTED = (
    "expected a decimal (1.5, -3e-5), a hex float (0x1.8p0), a power of two (2^-9, 3*2^40), nan, inf or a float32 bit "
    "pattern (0x3fc00000)"
)
_SPECIAL = re.compile(r"([+-]?)(nan|inf|infinity)", re.IGNORECASE)
_BIT_PATTERN = re.compile(r"0x([0-9a-f]{8})", re.IGNORECASE)
_HEX_FLOAT = re.compile(r"([+-]?)0x([0-9a-f]*)\.?([0-9a-f]*)p([+-]?\d{1,5})", re.IGNORECASE)
_POWER = re.compile(r"([+-]?)(?:([0-9.]+)[*·×])?2\^([+-]?\d{1,5})")
_DECIMAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d{1,9})?", re.IGNORECASE | re.ASCII)
_FAR_BEYOND_FLOAT32 = 100
"""Decimal exponent from which on a number is far beyond float32's range, or far below it when negative."""


@dataclass(frozen=True)
class Number:
    """A number that somebody typed, or gave as one, and the float32 that casts see of it.

    Attributes:
        text: as typed.
        kind: how it was read; ``number`` where nothing was typed.
        exact: what was typed, or given; None for NaN and infinities.
        bits: of the float32 nearest to it.
    """

    text: str
    kind: Kind
    exact: Fraction | None
    bits: int

    @property
    def value(self) -> float:
        """The float32, as a Python float."""
        with np.errstate(invalid="ignore"):
            return float(np.uint32(self.bits).view(np.float32))

    @property
    def is_rounded(self) -> bool:
        """Whether float32 does not hold what was typed."""
        return self.exact is not None and (math.isinf(self.value) or Fraction(self.value) != self.exact)


def as_number(value: str | Real | Number) -> Number:
    """A number as it was typed (see :func:`read_number`), or as Python or NumPy has it: at its exact value.

    Raises:
        ValueError: for a string that cannot be read.
        TypeError: for what is neither a string nor a real number of Python's or NumPy's.

    >>> as_number("0.1").exact, as_number(0.1).exact == Fraction(0.1), as_number(-0.0).value
    (Fraction(1, 10), True, -0.0)
    """
    if isinstance(value, Number):
        return value
    if isinstance(value, str):
        return read_number(value)
    if is_integer(value):
        return _rounded(str(int(value)), "number", abs(Fraction(int(value))))
    if isinstance(value, Fraction):
        return _rounded(str(value), "number", abs(value))
    if not isinstance(value, (float, np.floating)):
        expected = "expected a string, such as '1.5', or a real number, such as a float"
        raise TypeError(f"the number is {value!r} ({type(value).__name__}); {expected}")
    if np.isfinite(value):
        return _rounded(str(value), "number", abs(Fraction(*value.as_integer_ratio())))
    sign, magnitude = bool(np.signbit(value)), abs(float(value))
    return Number(f"{'-' * sign}{magnitude}", "number", None, float32_bits(magnitude) | sign << 31)


def read_number(text: str) -> Number:
    """Read a number in any of the ways one is written.

    ``0x`` followed by exactly eight hexadecimal digits is a float32 bit pattern; with a binary exponent, ``p``, it is a
    hex float. Anything else that starts with ``0x`` is refused, as it could be meant as either.

    Raises:
        ValueError: if it is none of them; the message says what was expected.

    >>> [(n.kind, n.value) for n in map(read_number, ("1.5", "0x1.8p0", "0x3fc00000", "3·2^-1"))]
    [('decimal number', 1.5), ('hex float', 1.5), ('float32 bit pattern', 1.5), ('power of two', 1.5)]
    >>> read_number("0.1").is_rounded
    True
    """
    typed = text.strip().replace("−", "-")
    if match := _SPECIAL.fullmatch(typed):
        value = math.nan if match[2].lower() == "nan" else math.inf
        return Number(typed, "special value", None, float32_bits(value) | (match[1] == "-") << 31)
    if match := _BIT_PATTERN.fullmatch(typed):
        return _from_bits(typed, int(match[1], 16))
    if (match := _HEX_FLOAT.fullmatch(typed)) and match[2] + match[3]:
        digits = Fraction(int(match[2] + match[3], 16))
        return _rounded(typed, "hex float", digits * Fraction(2) ** (int(match[4]) - 4 * len(match[3])))
    if (match := _POWER.fullmatch(typed)) and _DECIMAL.fullmatch(match[2] or "1"):
        return _rounded(typed, "power of two", Fraction(match[2] or 1) * Fraction(2) ** int(match[3]))
    if _DECIMAL.fullmatch(typed):
        return _rounded(typed, "decimal number", _from_decimal(Decimal(typed)))
    raise InputError(f"cannot read the number {text!r}; {_hint(typed)}")


def _from_decimal(typed: Decimal) -> Fraction:
    """The exact value, but a stand-in for one so large or so small that only its size counts."""
    if typed and abs(typed.adjusted()) > _FAR_BEYOND_FLOAT32:
        return Fraction(10) ** (_FAR_BEYOND_FLOAT32 if typed.adjusted() > 0 else -_FAR_BEYOND_FLOAT32)
    return abs(Fraction(typed))


def _rounded(typed: str, kind: Kind, magnitude: Fraction) -> Number:
    sign = typed.startswith("-")
    bits = float32_bits(round_to_format(magnitude, _FLOAT32)) | sign << 31
    return Number(typed, kind, -magnitude if sign else magnitude, bits)


def _from_bits(typed: str, bits: int) -> Number:
    number = Number(typed, "float32 bit pattern", None, bits)
    return Number(typed, number.kind, Fraction(number.value) if math.isfinite(number.value) else None, bits)


def _hint(typed: str) -> str:
    if re.fullmatch(r"[+-]?0x[0-9a-f.]+", typed, re.IGNORECASE):
        digits = typed.lower().partition("0x")[2]
        pattern = f"8 digits (0x{digits:0>8})" if re.fullmatch("[0-9a-f]{1,8}", digits) else "8 digits and no sign"
        return f"a float32 bit pattern has {pattern}, a hex float has an exponent ({typed}p0)"
    corrected = typed.replace(",", ".").replace("_", "").replace(" ", "")
    if corrected != typed and _DECIMAL.fullmatch(corrected):
        return f"did you mean {corrected}? {_EXPECTED}"
    return _EXPECTED


def write_number(value: float | Fraction, width: int = 9) -> str:
    """A number whose denominator is a power of two, exactly: as a decimal if it fits the width, else as ``m·2^e``.

    >>> [write_number(v) for v in (1.5, -0.0, 57344.0, 2.0**-9, 3 * 2.0**40, 0.0126953125)]
    ['1.5', '-0', '57344', '2^-9', '3·2^40', '13·2^-10']
    """
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if value == 0:
        return "-0" if isinstance(value, float) and math.copysign(1, value) < 0 else "0"
    fraction = Fraction(value)
    power = fraction.denominator.bit_length() - 1
    decimal = write_decimal(fraction) if power <= width and abs(fraction) < 10**width else ""
    if decimal and len(decimal.lstrip("-")) <= width:
        return decimal
    trailing = (fraction.numerator & -fraction.numerator).bit_length() - 1
    odd, exponent = fraction.numerator >> trailing, trailing - power
    return f"{'-' if odd < 0 else ''}{'' if abs(odd) == 1 else f'{abs(odd)}·'}2^{exponent}"


def write_decimal(value: float | Fraction, most: int = 160) -> str:
    """A finite number whose denominator is a power of two, in decimal and exactly; beyond ``most`` digits, with an e.

    >>> write_decimal(Fraction(1, 128)), write_decimal(0.1)[:20]
    ('0.0078125', '0.100000000000000005')
    """
    fraction = Fraction(value)
    power = fraction.denominator.bit_length() - 1
    digits = f"{abs(fraction.numerator) * 5**power:0{power + 1}d}"
    whole, part = (digits[:-power], digits[-power:]) if power else (digits, "")
    text = f"{'-' if fraction < 0 else ''}{whole}{'.' if part else ''}{part}"
    return text if len(text) <= most else f"{float(fraction):.17g}"


def code_fields(code: int, format: Format) -> str:
    """A code in binary, sign, exponent and mantissa apart.

    >>> code_fields(0x40, FORMAT_REGISTRY["E4M3"]), code_fields(0x40, FORMAT_REGISTRY["E7M0"])
    ('0 1000 000', '0 1000000')
    """
    text, widths = f"{code:0{format.bits}b}", (int(format.is_signed), format.exponent_bits, format.mantissa_bits)
    ends = [sum(widths[:k]) for k in range(4)]
    return " ".join(text[start:end] for start, end in pairwise(ends) if end > start)


def code_hex(code: int, format: Format) -> str:
    """A code in hexadecimal, of the format's width.

    >>> code_hex(5, FORMAT_REGISTRY["fp16"])
    '0x0005'
    """
    return f"0x{code:0{-(-format.bits // 4)}x}"

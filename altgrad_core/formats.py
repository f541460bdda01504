"""Floating-point formats of one sign, E exponent and M mantissa bits: what their codes mean, exactly.

A :class:`Format` is a value: frozen, hashable, equal to any other that maps every code to the same real number (its
name aside). Everything here is exact: integers, :class:`fractions.Fraction`, or float64 results that hold the real
value without rounding.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from types import MappingProxyType
from typing import Literal

import numpy as np
import numpy.typing as npt

from altgrad_core.errors import InputError

Rounding = Literal["nearest_even", "nearest_away", "toward_zero", "stochastic"]
"""How a value between two neighbours of the grid is rounded; ``nearest_even`` means ties to the even *code*."""

Overflow = Literal["native", "saturate", "saturate_finite"]
"""What becomes of a value that rounds beyond max.

``native``: inf if the format has it, else NaN if it has that, else ±max. ``saturate``: ±max, infinities included.
``saturate_finite``: ±max for finite values, while ±inf in value space stays as it is.
"""

CastPath = Literal["fast", "integer", "identity"]
"""Which implementation of the cast serves a format: see :attr:`Format.cast_path`."""

ROUNDINGS: tuple[Rounding, ...] = ("nearest_even", "nearest_away", "toward_zero", "stochastic")
OVERFLOWS: tuple[Overflow, ...] = ("native", "saturate", "saturate_finite")

STOCHASTIC_BITS = 24
"""Random bits that stochastic rounding uses of each random integer: the lowest 24."""

_CODE_BOOK_BITS = 16


class UnknownFormatError(InputError):
    """A name that is neither in the registry nor of the form ``E4M3`` or ``E4M3b11``."""


@dataclass(frozen=True)
class Format:
    """A binary floating-point format of ``1 + exponent_bits + mantissa_bits`` bits.

    A code is ``s|e|m``. With ``e = 0`` it is worth ``(-1)^s * 2^(1-bias) * m / 2^M``, otherwise
    ``(-1)^s * 2^(e-bias) * (1 + m / 2^M)``. Without exponent bits it is fixed point: ``(-1)^s * m / 2^M``.
    ``has_inf`` and ``has_nan`` together reserve the topmost exponent as IEEE 754 does; ``has_nan`` alone takes the
    single topmost code of each sign (as in ``float8_e4m3fn``).

    Args:
        name: what the format is called; not part of its identity.
        exponent_bits: E, 0 to 8.
        mantissa_bits: M, 0 to 23 (stored bits, the implicit one not counted).
        bias: what is subtracted from a stored exponent; 0 for E = 0.
        has_inf: whether the format represents ±inf; needs ``has_nan``.
        has_nan: whether the format represents NaN.

    Raises:
        ValueError: for a combination that no code could have.

    >>> e3m4 = Format("E3M4", exponent_bits=3, mantissa_bits=4, bias=1)
    >>> e3m4.max_representable_value, e3m4.smallest_subnormal
    (124.0, 0.0625)
    """

    name: str = field(compare=False)
    exponent_bits: int
    mantissa_bits: int
    bias: int
    has_inf: bool = False
    has_nan: bool = False

    def __post_init__(self) -> None:
        """Check that the fields describe a format."""
        if not 0 <= self.exponent_bits <= 8:
            raise InputError(f"exponent_bits is {self.exponent_bits}; expected 0 to 8")
        if not 0 <= self.mantissa_bits <= 23:
            raise InputError(f"mantissa_bits is {self.mantissa_bits}; expected 0 to 23")
        if self.bits < 2:
            raise InputError("a format needs at least one exponent or mantissa bit; both are 0")
        if self.exponent_bits == 0 and self.bias != 0:
            raise InputError(f"bias is {self.bias}; a fixed-point format (exponent_bits=0) has bias 0")
        if self.exponent_bits == 0 and (self.has_inf or self.has_nan):
            raise InputError("a fixed-point format (exponent_bits=0) has neither inf nor NaN")
        if self.has_inf and not self.has_nan:
            raise InputError("has_inf without has_nan: a format with infinities has NaN as well")
        if self.has_inf and (self.exponent_bits == 0 or self.mantissa_bits == 0):
            raise InputError("infinities and NaN share one exponent: that needs exponent_bits and mantissa_bits >= 1")
        if self.min_exponent - self.mantissa_bits < -149 or self.max_exponent > 127:
            raise InputError(
                f"bias {self.bias} puts values outside float32 (2^-149 to 2^127): "
                f"quanta from 2^{self.min_exponent - self.mantissa_bits}, largest exponent {self.max_exponent}"
            )
        if self.max_exponent < -126:
            raise InputError(f"bias {self.bias} puts all values below 2^-126, where results are zero")

    def __str__(self) -> str:
        """The name."""
        return self.name

    @property
    def bits(self) -> int:
        """Width of a code, the sign included."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def sign_mask(self) -> int:
        """The code with only the sign bit set: the code of -0."""
        return 1 << (self.bits - 1)

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal number, which subnormals share (0 for fixed point, which has only those)."""
        return 1 - self.bias if self.exponent_bits else 0

    @property
    def max_code(self) -> int:
        """The code of the largest finite value."""
        top = self.sign_mask - 1
        if self.has_inf:
            return top - (1 << self.mantissa_bits)
        return top - 1 if self.has_nan else top

    @property
    def max_exponent(self) -> int:
        """Exponent of the largest finite value: floor(log2(max))."""
        significand, exponent = self._decode(self.max_code)
        return significand.bit_length() - 1 + exponent

    @property
    def max_representable_value(self) -> float:
        """The largest finite value, exact."""
        return math.ldexp(*self._decode(self.max_code))

    @property
    def min_normal(self) -> float | None:
        """The smallest normal value, 2^min_exponent; None for fixed point, which has none."""
        return math.ldexp(1.0, self.min_exponent) if self.exponent_bits else None

    @property
    def smallest_subnormal(self) -> float | None:
        """The smallest positive value below ``min_normal``; None where M = 0 leaves no subnormals."""
        return math.ldexp(1.0, self.min_exponent - self.mantissa_bits) if self.mantissa_bits else None

    @property
    def is_float32(self) -> bool:
        """Whether this is IEEE binary32, in which float32 values are what they are."""
        return (self.exponent_bits, self.mantissa_bits, self.bias, self.has_inf) == (8, 23, 127, True)

    @property
    def cast_path(self) -> CastPath:
        """Which cast serves the format.

        ``identity`` for float32; ``fast`` (one float addition rounds) while its magic number ``2^(e + 23 - M)``, up to
        that of twice the maximum, is finite float32 and half a quantum is normal float32; ``integer`` for the rest.
        """
        if self.is_float32:
            return "identity"
        fits = self.max_exponent <= min(103 + self.mantissa_bits, 126) and self.mantissa_bits <= 22
        return "fast" if fits and self.min_exponent - self.mantissa_bits >= -125 else "integer"

    @property
    def overflow_value(self) -> float:
        """What rounds beyond max becomes natively: inf, NaN, or max where the format has neither."""
        if self.has_inf:
            return math.inf
        return math.nan if self.has_nan else self.max_representable_value

    def to_real(self, code: int) -> float:
        """The real value of a code, exact in float64.

        Args:
            code: 0 to 2^bits - 1.

        Raises:
            ValueError: if the code has more bits than the format.

        >>> parse("E5M2").to_real(0b0_01111_01)
        1.25
        """
        if not 0 <= code < 2 * self.sign_mask:
            raise InputError(f"code {code} is not one of {self.name}; expected 0 to {2 * self.sign_mask - 1}")
        magnitude = code & (self.sign_mask - 1)
        if magnitude > self.max_code:
            value = math.inf if self.has_inf and magnitude == self.max_code + 1 else math.nan
        else:
            value = math.ldexp(*self._decode(magnitude))
        return -value if code & self.sign_mask else value

    def to_bits(
        self, value: float | Fraction, rounding: Rounding = "nearest_even", overflow: Overflow = "native"
    ) -> int:
        """The code that a value rounds to, by exact rational arithmetic.

        NaN becomes the canonical NaN code (quiet, positive), or 0 where the format has none: whoever encodes counts
        those. An infinity becomes ±max where the format cannot represent it.

        Args:
            value: any float or fraction.
            rounding: ``nearest_even``, ``nearest_away`` or ``toward_zero``; stochastic rounding needs random bits, see
                :func:`altgrad_core.reference.round_to_format`.
            overflow: see :data:`Overflow`.

        Raises:
            ValueError: for a rounding or overflow mode that is unknown or needs random bits.

        >>> [parse("E7M0").to_real(parse("E7M0").to_bits(v)) for v in (0.75, 1.5, 3, 6)]
        [0.5, 2.0, 2.0, 8.0]
        """
        from altgrad_core.reference import round_to_format

        return self._encode_on_grid(round_to_format(value, self, rounding=rounding, overflow=overflow))

    def code_book(self) -> npt.NDArray[np.float64]:
        """The value of every code, in the order of the codes: float64 of shape ``(2**bits,)``, read-only.

        Raises:
            ValueError: for formats of more than 16 bits.
        """
        if self.bits > _CODE_BOOK_BITS:
            raise InputError(f"{self.name} has {self.bits} bits; a code book is made up to {_CODE_BOOK_BITS}")
        return _code_book(self)

    def _decode(self, magnitude: int) -> tuple[int, int]:
        """Significand and exponent of a finite code without its sign: its value is significand * 2^exponent."""
        stored, fraction = divmod(magnitude, 1 << self.mantissa_bits)
        if self.exponent_bits == 0:
            return magnitude, -self.mantissa_bits
        implicit = 0 if stored == 0 else 1 << self.mantissa_bits
        return implicit + fraction, max(stored, 1) - self.bias - self.mantissa_bits

    def _encode_on_grid(self, value: float) -> int:
        """The code of a value that is on the grid already (or inf or NaN)."""
        sign = self.sign_mask if math.copysign(1.0, value) < 0 else 0
        if math.isnan(value):
            quiet = 1 << (self.mantissa_bits - 1) if self.has_inf else 0
            return self.max_code + 1 + quiet if self.has_nan else 0
        if math.isinf(value):
            return sign | (self.max_code + 1 if self.has_inf else self.max_code)
        if value == 0.0:
            return sign
        significand, power = abs(value).as_integer_ratio()
        exponent = max(significand.bit_length() - power.bit_length(), self.min_exponent)
        steps = abs(Fraction(value)) / Fraction(2) ** (exponent - self.mantissa_bits)
        return sign | (int(steps) + ((exponent - self.min_exponent) << self.mantissa_bits))


@lru_cache(maxsize=256)
def _code_book(format: Format) -> npt.NDArray[np.float64]:
    book = np.array([format.to_real(code) for code in range(2 * format.sign_mask)], dtype=np.float64)
    book.setflags(write=False)
    return book


_FLOAT32 = Format("float32", 8, 23, 127, has_inf=True, has_nan=True)
_BFLOAT16 = Format("bf16", 8, 7, 127, has_inf=True, has_nan=True)

FORMAT_REGISTRY: Mapping[str, Format] = MappingProxyType(
    {
        known.name: known
        for known in (
            Format("E0M7", 0, 7, 0),
            Format("E1M6", 1, 6, 0),
            Format("E2M5", 2, 5, 1),
            Format("E3M4", 3, 4, 1),
            Format("E4M3", 4, 3, 7, has_nan=True),
            Format("E5M2", 5, 2, 15, has_inf=True, has_nan=True),
            Format("E6M1", 6, 1, 31),
            Format("E7M0", 7, 0, 63),
            _BFLOAT16,
            Format("fp16", 5, 10, 15, has_inf=True, has_nan=True),
            _FLOAT32,
        )
    }
)
"""Formats by name: the eight splits of 8 bits, and bf16, fp16 and float32 as controls.

E4M3 is ``float8_e4m3fn`` and E5M2 is ``float8_e5m2``. E3M4 has bias 1 and max 124: it is not
``ml_dtypes.float8_e3m4`` (bias 3, with inf and NaN). E1M6 is 4 x E0M7 on every code.
"""

_GRAMMAR = re.compile(r"E(?P<exponent>\d+)M(?P<mantissa>\d+)(?:b(?P<bias>-?\d+))?")


def parse(name: str | Format) -> Format:
    """The format of a name: of the registry, or ``E<bits>M<bits>`` with an optional ``b<bias>``, of 3 to 16 bits.

    A bare name that is in the registry means the registry's format. Any other has no specials and, unless it names
    one, the bias ``2^(E-1) - 1``.

    Args:
        name: the name; a :class:`Format` is returned as it is.

    Raises:
        UnknownFormatError: if the name is neither; the message suggests the nearest known ones.

    >>> parse("E4M3").max_representable_value, parse("E2M3").max_representable_value
    (448.0, 7.5)
    >>> parse("E4M4b3").bias
    3
    """
    if isinstance(name, Format):
        return name
    if not isinstance(name, str):
        raise UnknownFormatError(f"a format is named by a string or is a Format; got {name!r} ({type(name).__name__})")
    if name in FORMAT_REGISTRY:
        return FORMAT_REGISTRY[name]
    match = _GRAMMAR.fullmatch(name)
    if match is None:
        raise UnknownFormatError(f"unknown format {name!r}; {_suggestion(name)}")
    exponent_bits, mantissa_bits = int(match["exponent"]), int(match["mantissa"])
    if not 3 <= 1 + exponent_bits + mantissa_bits <= 16 or exponent_bits > 8:
        raise UnknownFormatError(
            f"format {name!r} has {1 + exponent_bits + mantissa_bits} bits, {exponent_bits} of them exponent; expected "
            f"3 to 16 bits with at most 8 of exponent; {_suggestion(name)}"
        )
    default_bias = 2 ** (exponent_bits - 1) - 1 if exponent_bits else 0
    bias = default_bias if match["bias"] is None else int(match["bias"])
    try:
        return Format(name, exponent_bits, mantissa_bits, bias)
    except ValueError as error:
        raise UnknownFormatError(f"format {name!r}: {error}") from None


def _suggestion(name: str) -> str:
    by_fold = {known.casefold(): known for known in FORMAT_REGISTRY}
    near = [by_fold[fold] for fold in difflib.get_close_matches(name.casefold(), by_fold, n=3, cutoff=0.5)]
    known = ", ".join(FORMAT_REGISTRY)
    return (
        f"did you mean {' or '.join(near)}? Known: {known}" if near else f"expected one of {known}, or E<bits>M<bits>"
    )

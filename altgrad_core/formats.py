"""Floating-point formats of E exponent and M mantissa bits: what their codes mean, exactly.

A :class:`Format` is a value: frozen, hashable, equal to any other with the same fields (the name aside), and so with
the same real number for every code. Everything here is exact: integers, :class:`fractions.Fraction`, or float64 results
that hold the real value without rounding.
"""

from __future__ import annotations

import difflib
import math
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from itertools import islice
from types import MappingProxyType
from typing import Literal

import numpy as np
import numpy.typing as npt

from altgrad_core.errors import InputError, did_you_mean
from altgrad_core.scalars import is_integer

Rounding = Literal["nearest_even", "nearest_away", "toward_zero", "stochastic"]
"""How a value between two neighbours of the grid is rounded; ``nearest_even`` means ties to the even *code*."""

Overflow = Literal["native", "saturate", "saturate_finite"]
"""What becomes of a value that rounds beyond max.

``native``: inf if the format has it, else NaN if it has that, else ±max. ``saturate``: ±max, infinities included.
``saturate_finite``: ±max for finite values, while ±inf in value space stays as it is.
"""

CastPath = Literal["fast", "wide", "integer", "unsigned", "identity"]
"""Which implementation of the cast serves a format: see :attr:`Format.cast_path`."""

ROUNDINGS: tuple[Rounding, ...] = ("nearest_even", "nearest_away", "toward_zero", "stochastic")
OVERFLOWS: tuple[Overflow, ...] = ("native", "saturate", "saturate_finite")

STOCHASTIC_BITS = 24
"""Random bits that stochastic rounding uses of each random integer, unless told to use fewer: the lowest 24."""

_CODE_BOOK_BITS = 16


class UnknownFormatError(InputError):
    """A name that is neither in the registry nor of the form ``E4M3`` or ``E4M3b11``."""


@dataclass(frozen=True)
class Format:
    """A binary floating-point format of E exponent and M mantissa bits, with or without a sign.

    A code is ``s|e|m``. With ``e = 0`` it is worth ``(-1)^s * 2^(1-bias) * m / 2^M``, otherwise
    ``(-1)^s * 2^(e-bias) * (1 + m / 2^M)``. Without exponent bits it is fixed point: ``(-1)^s * m / 2^M``. Without a
    sign (the scales of MX blocks) it has neither mantissa nor zero: ``2^(e-bias)``.

    Which codes are special follows from what the format has:

    ========================  =====  =====  ==================  =================================================
    family                    inf    NaN    -0                  special codes
    ========================  =====  =====  ==================  =================================================
    finite                    no     no     yes                 none
    ``fn``                    no     yes    yes                 NaN: the topmost of each sign
    ``ieee``                  yes    yes    yes                 the topmost exponent: inf, then NaN
    ``fnuz``, P3109 finite    no     yes    no                  NaN: the code that -0 would have
    ``nuz``, P3109 extended   yes    yes    no                  NaN likewise; inf: the topmost of each sign
    ``fnu``                   no     yes    no (nor a sign)     NaN: the topmost
    ========================  =====  =====  ==================  =================================================

    Args:
        name: what the format is called; not part of its identity.
        exponent_bits: E, 0 to 8.
        mantissa_bits: M, 0 to 22 (stored bits, the implicit one not counted), or 23 in float32 itself.
        bias: what is subtracted from a stored exponent; 0 for E = 0. Normal values begin at 2^127 or below, and quanta
            of formats other than float32 are at least 2^-148: half of one is a float32.
        has_inf: whether the format represents infinities; needs ``has_nan``.
        has_nan: whether the format represents NaN.
        has_negative_zero: whether it tells -0 from 0; without, its code is the only NaN.
        is_signed: whether there is a sign; without, M is 0, and the format has NaN but neither zero nor infinity.

    Raises:
        ValueError: for fields of other types, and a combination that no code could have.

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
    has_negative_zero: bool = True
    is_signed: bool = True

    def __post_init__(self) -> None:
        """Check that the fields describe a format."""
        self._take_plain_fields()
        if not 0 <= self.exponent_bits <= 8:
            raise InputError(f"exponent_bits is {self.exponent_bits}; expected 0 to 8")
        if not 0 <= self.mantissa_bits <= 23:
            raise InputError(f"mantissa_bits is {self.mantissa_bits}; expected 0 to 23")
        if self.exponent_bits + self.mantissa_bits < 1:
            raise InputError("a format needs at least one exponent or mantissa bit; both are 0")
        self._check_specials()
        if self.max_code < 1:
            raise InputError(
                "inf or NaN takes the only code that is not zero; that needs another exponent or mantissa bit"
            )
        if self.is_float32:
            return
        if self.mantissa_bits == 23:
            raise InputError(
                "mantissa_bits is 23; expected 0 to 22 in any format but float32, which leaves no bit to round"
            )
        quantum = self.min_exponent - self.mantissa_bits
        if quantum < -148 or self.max_exponent > 127 or self.min_exponent > 127:
            raise InputError(
                f"bias {self.bias} puts values outside float32 (quanta from 2^-148, exponents to 127): quanta from "
                f"2^{quantum}, exponents from {self.min_exponent} to {self.max_exponent}"
            )
        if self.max_exponent < -126:
            raise InputError(f"bias {self.bias} puts all values below 2^-126, where results are zero")

    def _take_plain_fields(self) -> None:
        """Check the fields' types, and keep NumPy's numbers as Python's, which no shift overflows."""
        if not isinstance(self.name, str):
            raise InputError(f"the name is {self.name!r}; expected a string")
        for name in ("exponent_bits", "mantissa_bits", "bias"):
            value = getattr(self, name)
            if not is_integer(value):
                raise InputError(f"{name} is {value!r}; expected an integer")
            object.__setattr__(self, name, int(value))
        for name in ("has_inf", "has_nan", "has_negative_zero", "is_signed"):
            value = getattr(self, name)
            if not isinstance(value, (bool, np.bool_)):
                raise InputError(f"{name} is {value!r}; expected True or False")
            object.__setattr__(self, name, bool(value))

    def _check_specials(self) -> None:
        if self.exponent_bits == 0 and self.bias != 0:
            raise InputError(f"bias is {self.bias}; a fixed-point format (exponent_bits=0) has bias 0")
        if self.exponent_bits == 0 and (self.has_inf or self.has_nan):
            raise InputError("a fixed-point format (exponent_bits=0) has neither inf nor NaN")
        if self.has_inf and not self.has_nan:
            raise InputError("has_inf without has_nan: a format with infinities has NaN as well")
        if self.has_inf and self.has_negative_zero and self.mantissa_bits == 0:
            raise InputError("infinities and NaN share one exponent: that needs exponent_bits and mantissa_bits >= 1")
        if not self.has_negative_zero and not self.has_nan:
            raise InputError("has_negative_zero=False without has_nan: the code that -0 would have is the NaN")
        if not self.is_signed and (
            self.mantissa_bits or self.has_inf or not self.has_nan or self.has_negative_zero or self.exponent_bits < 2
        ):
            raise InputError(
                "a format without a sign has exponent bits (at least 2) and NaN, no mantissa, infinity or zero: "
                "mantissa_bits=0, has_nan=True, has_negative_zero=False"
            )

    def __str__(self) -> str:
        """A name that :func:`parse` takes for this format: its own if that one does, else its spelling."""
        return self.name if _names(self.name, self) else self.spelling

    @property
    def spelling(self) -> str:
        """The name by the grammar of :func:`parse`, such as ``E4M3b11fnuz``; the own name beyond 16 bits.

        >>> Format("mine", 4, 3, 11, has_nan=True, has_negative_zero=False).spelling
        'E4M3b11fnuz'
        """
        bare, suffix = f"E{self.exponent_bits}M{self.mantissa_bits}", _suffix_of(self)
        candidates = (bare + suffix, f"{bare}b{self.bias}{suffix}")
        return next((spelled for spelled in candidates if _names(spelled, self)), self.name)

    @property
    def dtype(self) -> np.dtype | None:
        """The NumPy dtype of the same codes and values, from ``ml_dtypes`` where NumPy has none; None without one.

        >>> parse("E4M3").dtype, parse("E3M4").dtype
        (dtype(float8_e4m3fn), None)
        """
        return next((_numpy_dtype(name) for name in _DTYPE_NAMES if FORMAT_REGISTRY[name] == self), None)

    @classmethod
    def from_dtype(cls, dtype: object) -> Format:
        """The format of a floating-point dtype of NumPy, ml_dtypes, JAX or torch, or of its name.

        Raises:
            UnknownFormatError: for a dtype that is no floating-point format of at most 32 bits.

        >>> Format.from_dtype("bfloat16").max_exponent, Format.from_dtype(np.float16).mantissa_bits
        (127, 10)
        """
        name = _dtype_name(dtype)
        if name not in _DTYPE_NAMES:
            raise UnknownFormatError(
                f"no format for dtype {dtype!r}; {_dtype_hint(name)}expected one of {', '.join(_DTYPE_NAMES)}"
            )
        return FORMAT_REGISTRY[name]

    @property
    def bits(self) -> int:
        """Width of a code, the sign included."""
        return self.is_signed + self.exponent_bits + self.mantissa_bits

    @property
    def sign_mask(self) -> int:
        """The code with only the sign bit set: of -0, or of NaN where there is no -0; 0 without a sign."""
        return 1 << (self.bits - 1) if self.is_signed else 0

    @property
    def magnitude_mask(self) -> int:
        """The code with all bits set but the sign's."""
        return (1 << (self.exponent_bits + self.mantissa_bits)) - 1

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal number, which subnormals share (0 for fixed point, which has only those)."""
        if not self.is_signed:
            return -self.bias
        return 1 - self.bias if self.exponent_bits else 0

    @property
    def max_code(self) -> int:
        """The code of the largest finite value."""
        if self.has_inf and self.has_negative_zero:
            return self.magnitude_mask - (1 << self.mantissa_bits)
        topmost_is_special = self.has_inf or (self.has_nan and (self.has_negative_zero or not self.is_signed))
        return self.magnitude_mask - 1 if topmost_is_special else self.magnitude_mask

    @property
    def inf_code(self) -> int | None:
        """The code of +inf; None without one."""
        return self.max_code + 1 if self.has_inf else None

    @property
    def nan_code(self) -> int | None:
        """The code of the canonical NaN (quiet, positive where NaN has a sign); None without one."""
        if not self.has_nan:
            return None
        if not self.has_negative_zero:
            return self.sign_mask if self.is_signed else self.magnitude_mask
        return self.magnitude_mask - (1 << (self.mantissa_bits - 1)) + 1 if self.has_inf else self.magnitude_mask

    @property
    def max_exponent(self) -> int:
        """Exponent of the largest finite value: floor(log2(max))."""
        significand, exponent = self.finite_parts(self.max_code)
        return significand.bit_length() - 1 + exponent

    @property
    def max_representable_value(self) -> float:
        """The largest finite value, exact."""
        return math.ldexp(*self.finite_parts(self.max_code))

    @property
    def min_normal(self) -> float | None:
        """The smallest normal value, 2^min_exponent; None where all values are subnormal, as in fixed point."""
        smallest_normal_code = 1 << self.mantissa_bits if self.is_signed else 0
        return math.ldexp(1.0, self.min_exponent) if smallest_normal_code <= self.max_code else None

    @property
    def smallest_subnormal(self) -> float | None:
        """The smallest positive value below ``min_normal``; None where M = 0 leaves no subnormals."""
        return math.ldexp(1.0, self.min_exponent - self.mantissa_bits) if self.mantissa_bits else None

    @property
    def is_float32(self) -> bool:
        """Whether this is IEEE binary32, in which float32 values are what they are."""
        fields = self.exponent_bits, self.mantissa_bits, self.bias, self.has_inf, self.has_negative_zero
        return fields == (8, 23, 127, True, True)

    @property
    def cast_path(self) -> CastPath:
        """Which cast serves the format.

        ``identity`` for float32; ``fast`` (one float addition rounds) while its magic number ``2^(e + 23 - M)``, up to
        that of twice the maximum, is finite float32 and half a quantum is normal float32; ``unsigned`` for powers of
        two without a sign; ``wide`` for the rest.
        """
        if self.is_float32:
            return "identity"
        if not self.is_signed:
            return "unsigned"
        fits = self.max_exponent <= min(103 + self.mantissa_bits, 126)
        return "fast" if fits and self.min_exponent - self.mantissa_bits >= -125 else "wide"

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
            ValueError: if the code is no integer, or has more bits than the format.

        >>> parse("E5M2").to_real(0b0_01111_01)
        1.25
        """
        if not is_integer(code) or not 0 <= code < 1 << self.bits:
            last = (1 << self.bits) - 1
            raise InputError(f"code {code!r} is not one of {self}; expected an integer from 0 to {last}")
        code = int(code)
        magnitude, negative = code & self.magnitude_mask, bool(code & self.sign_mask)
        if negative and magnitude == 0 and not self.has_negative_zero:
            return math.nan
        if magnitude > self.max_code:
            value = math.inf if magnitude == self.inf_code else math.nan
        else:
            value = math.ldexp(*self.finite_parts(magnitude))
        return -value if negative else value

    def to_bits(
        self, value: float | Fraction, rounding: Rounding = "nearest_even", overflow: Overflow = "native"
    ) -> int:
        """The code that a value rounds to, by exact rational arithmetic.

        NaN becomes the canonical NaN code (quiet, positive), or 0 where the format has none: whoever encodes counts
        those. An infinity becomes ±max where the format cannot represent it.

        Args:
            value: any real number.
            rounding: ``nearest_even``, ``nearest_away`` or ``toward_zero``; stochastic rounding needs random bits, see
                :func:`altgrad_core.reference.round_to_format`.
            overflow: see :data:`Overflow`.

        Raises:
            ValueError: for what is no real number, and a rounding or overflow mode that is unknown or needs random
                bits.

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
            raise InputError(f"{self} has {self.bits} bits; a code book is made up to {_CODE_BOOK_BITS}")
        return _code_book(self)

    def finite_parts(self, magnitude: int) -> tuple[int, int]:
        """Significand and exponent (its value is significand * 2^exponent) of a code without its sign, if finite."""
        magnitude = operator.index(magnitude)
        stored, fraction = divmod(magnitude, 1 << self.mantissa_bits)
        if not self.is_signed:
            return 1, stored - self.bias
        if self.exponent_bits == 0:
            return magnitude, -self.mantissa_bits
        implicit = 0 if stored == 0 else 1 << self.mantissa_bits
        return implicit + fraction, max(stored, 1) - self.bias - self.mantissa_bits

    def _encode_on_grid(self, value: float) -> int:
        """The code of a value that is on the grid already (or inf or NaN)."""
        if math.isnan(value):
            return self.nan_code or 0
        sign = self.sign_mask if math.copysign(1.0, value) < 0 else 0
        if math.isinf(value):
            return sign | (self.inf_code or self.max_code)
        if value == 0.0:
            return sign if self.has_negative_zero else 0
        significand, power = abs(value).as_integer_ratio()
        exponent = max(significand.bit_length() - power.bit_length(), self.min_exponent)
        if not self.is_signed:
            return exponent - self.min_exponent
        steps = int(math.ldexp(abs(value), self.mantissa_bits - exponent))
        return sign | (steps + ((exponent - self.min_exponent) << self.mantissa_bits))


@lru_cache(maxsize=256)
def _code_book(format: Format) -> npt.NDArray[np.float64]:
    book = np.array([format.to_real(code) for code in range(1 << format.bits)], dtype=np.float64)
    book.setflags(write=False)
    return book


def _ieee(name: str, exponent_bits: int, mantissa_bits: int) -> Format:
    bias = 2 ** (exponent_bits - 1) - 1
    return Format(name, exponent_bits, mantissa_bits, bias, has_inf=True, has_nan=True)


def _fnuz(name: str, exponent_bits: int, mantissa_bits: int, bias: int) -> Format:
    return Format(name, exponent_bits, mantissa_bits, bias, has_nan=True, has_negative_zero=False)


def _p3109(precision: int, infinite: bool) -> Format:
    """``binary8p{precision}``, signed, of IEEE P3109: precision counts the implicit bit, the bias is half the codes."""
    exponent_bits, name = 8 - precision, f"binary8p{precision}s{'e' if infinite else 'f'}"
    bias = 2 ** (exponent_bits - 1)
    return Format(name, exponent_bits, precision - 1, bias, has_inf=infinite, has_nan=True, has_negative_zero=False)


_FLOAT32 = _ieee("float32", 8, 23)

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
            _ieee("bf16", 8, 7),
            _ieee("fp16", 5, 10),
            _FLOAT32,
            _ieee("bfloat16", 8, 7),
            _ieee("float16", 5, 10),
            _ieee("float8_e3m4", 3, 4),
            _ieee("float8_e4m3", 4, 3),
            Format("float8_e4m3fn", 4, 3, 7, has_nan=True),
            _fnuz("float8_e4m3fnuz", 4, 3, 8),
            _fnuz("float8_e4m3b11fnuz", 4, 3, 11),
            _ieee("float8_e5m2", 5, 2),
            _fnuz("float8_e5m2fnuz", 5, 2, 16),
            Format("float8_e8m0fnu", 8, 0, 127, has_nan=True, has_negative_zero=False, is_signed=False),
            Format("float6_e2m3fn", 2, 3, 1),
            Format("float6_e3m2fn", 3, 2, 3),
            Format("float4_e2m1fn", 2, 1, 1),
            *(_p3109(precision, infinite=True) for precision in range(1, 8)),
            *(_p3109(precision, infinite=False) for precision in range(1, 8)),
        )
    }
)
"""Formats by name: the eight splits of 8 bits, controls, the floats of NumPy and ml_dtypes, and P3109's 8-bit family.

E4M3 is ``float8_e4m3fn`` and E5M2 is ``float8_e5m2``. E3M4 has bias 1 and max 124: it is not ``float8_e3m4`` (bias 3,
with inf and NaN). E1M6 is 4 x E0M7 on every code. ``binary8p{P}se`` has infinities, ``binary8p{P}sf`` has none
(IEEE P3109, interim report); ``binary8p4sf`` is ``float8_e4m3fnuz``.
"""

EIGHT = ("E0M7", "E1M6", "E2M5", "E3M4", "E4M3", "E5M2", "E6M1", "E7M0")
"""The eight ways to split the 7 bits beside the sign, by name: what :data:`FORMAT_REGISTRY` begins with."""

_DTYPE_NAMES = tuple(name for name in FORMAT_REGISTRY if name.startswith(("float", "bfloat")))


def _dtype_name(dtype: object) -> str:
    """What a dtype of NumPy, ml_dtypes, JAX or torch is called; a string is a name already."""
    named = dtype if isinstance(dtype, str) else str(getattr(dtype, "__name__", dtype))
    return named.removeprefix("torch.")


def _dtype_hint(name: str) -> str:
    """Asks for the dtype that a name without one is nearest to: as the same format, else by its letters."""
    if name in FORMAT_REGISTRY:
        dtype = FORMAT_REGISTRY[name].dtype
        return "" if dtype is None else f"did you mean {dtype.name!r}? "
    if name not in np.sctypeDict:
        return did_you_mean(name, _DTYPE_NAMES)
    # What NumPy has is not misspelt: the letters of float64 are nearest to float16, and those of half to nothing.
    known = np.dtype(np.sctypeDict[name])
    if known.kind != "f":
        return ""
    return f"did you mean {known.name!r}? " if known.name in _DTYPE_NAMES else "did you mean 'float32', the widest? "


def _numpy_dtype(name: str) -> np.dtype:
    if name in ("float16", "float32"):
        return np.dtype(name)
    import ml_dtypes  # late: reading formats needs no more than NumPy

    return np.dtype(getattr(ml_dtypes, name))


@dataclass(frozen=True)
class _Specials:
    """What a suffix of a format's name says."""

    has_inf: bool = False
    has_nan: bool = True
    has_negative_zero: bool = True
    is_signed: bool = True

    @classmethod
    def of(cls, format: Format) -> _Specials:
        return cls(format.has_inf, format.has_nan, format.has_negative_zero, format.is_signed)


_SUFFIXES: Mapping[str, _Specials] = MappingProxyType(
    {
        "": _Specials(has_nan=False),
        "fn": _Specials(),
        "fnuz": _Specials(has_negative_zero=False),
        "nuz": _Specials(has_inf=True, has_negative_zero=False),
        "ieee": _Specials(has_inf=True),
        "fnu": _Specials(has_negative_zero=False, is_signed=False),
    }
)
"""By LLVM's letters: finite, one NaN, unsigned zero; ``fnu`` is unsigned altogether, as in ml_dtypes."""

_BIASES = range(-128, 151)
"""All that formats of any bits can have."""

_COUNT, _BIAS = (
    "0|[1-9][0-9]{0,3}",
    "0|-?[1-9][0-9]{0,3}",
)  # one spelling for each number: E04M3 would not be the registry's E4M3
_GRAMMAR = re.compile(
    rf"E(?P<exponent>{_COUNT})M(?P<mantissa>{_COUNT})(?:b(?P<bias>{_BIAS}))?(?P<suffix>{'|'.join(_SUFFIXES)})"
)


def parse(name: str | Format) -> Format:
    """The format of a name: of the registry, or ``E<bits>M<bits>[b<bias>][suffix]``, of 3 to 16 bits.

    A bare name that is in the registry means the registry's format. Any other has, unless it names one, the bias
    ``2^(E-1) - 1``, or ``2^(E-1)`` with ``fnuz`` and ``nuz``, as ml_dtypes and P3109 have it. The suffix says what is
    special: nothing without one, ``fn``, ``fnuz``, ``nuz``, ``ieee`` or ``fnu``; see :class:`Format`.

    Args:
        name: the name; a :class:`Format` is returned as it is.

    Raises:
        UnknownFormatError: if the name is neither; the message suggests the nearest known ones.

    >>> parse("E4M3").max_representable_value, parse("E2M3").max_representable_value
    (448.0, 7.5)
    >>> parse("E4M4b3").bias, parse("E4M3b11fnuz") == parse("float8_e4m3b11fnuz")
    (3, True)
    """
    if isinstance(name, Format):
        return name
    if not isinstance(name, str):
        raise UnknownFormatError(
            f"a format is named by a string or is a Format; got {name!r} ({type(name).__name__}){_named_hint(name)}"
        )
    if name in FORMAT_REGISTRY:
        return FORMAT_REGISTRY[name]
    match = _GRAMMAR.fullmatch(name)
    if match is None:
        raise UnknownFormatError(f"unknown format {name!r}; {_suggestion(name)}")
    specials = _SUFFIXES[match["suffix"]]
    exponent_bits, mantissa_bits = int(match["exponent"]), int(match["mantissa"])
    bits = specials.is_signed + exponent_bits + mantissa_bits
    if not 3 <= bits <= 16 or exponent_bits > 8:
        raise UnknownFormatError(
            f"format {name!r} has {bits} bits, {exponent_bits} of them exponent; expected "
            f"3 to 16 bits with at most 8 of exponent; {_suggestion(name)}"
        )
    try:
        return _made(match)
    except ValueError as error:
        raise UnknownFormatError(f"format {name!r}: {error}; {_near_ones(match)}") from None


def _named_hint(dtype: object) -> str:
    """Asks for the format of a dtype, which does not name one by itself; empty for what is no dtype with a format."""
    name = _dtype_name(dtype)
    return f"; did you mean {name!r}? (Format.from_dtype takes dtypes)" if name in _DTYPE_NAMES else ""


def _bias(match: re.Match[str]) -> int:
    """The bias that a name of the grammar has, by default or in words."""
    if match["bias"] is not None:
        return int(match["bias"])
    half = 2 ** (int(match["exponent"]) - 1) if match["exponent"] != "0" else 1
    specials = _SUFFIXES[match["suffix"]]
    return half if specials.is_signed and not specials.has_negative_zero else half - 1


def _made(match: re.Match[str]) -> Format:
    """What a name of the grammar describes, if there can be such a format."""
    specials = vars(_SUFFIXES[match["suffix"]])
    return Format(match[0], int(match["exponent"]), int(match["mantissa"]), _bias(match), **specials)


def _can_be(name: str) -> bool:
    match = _GRAMMAR.fullmatch(name)
    try:
        return bool(match and _made(match))
    except InputError:
        return False


def _near_ones(match: re.Match[str]) -> str:
    """Asks for formats of the bits of one that cannot be: with another bias, and where it names none of other kinds."""
    bits, suffix, bias = (int(match["exponent"]), int(match["mantissa"])), match["suffix"], _bias(match)
    bare = f"E{bits[0]}M{bits[1]}"
    biased = (f"{bare}b{other}{suffix}" for other in sorted(_BIASES, key=lambda other: abs(other - bias)))
    near = list(islice(filter(_can_be, biased), 1))
    if match["bias"] is None or not near:
        by_value = {known: name for name, known in FORMAT_REGISTRY.items()}
        same = [name for known, name in by_value.items() if (known.exponent_bits, known.mantissa_bits) == bits]
        others = same or filter(_can_be, (f"{bare}ieee", f"{bare}fn", bare))
        near = [*islice(others, 2), *near]
    return f"did you mean {' or '.join(near)}?"


def _suffix_of(format: Format) -> str:
    return next(suffix for suffix, specials in _SUFFIXES.items() if specials == _Specials.of(format))


def _names(name: str, format: Format) -> bool:
    try:
        return parse(name) == format
    except UnknownFormatError:
        return False


def _suggestion(name: str) -> str:
    by_fold = {known.casefold(): known for known in FORMAT_REGISTRY}
    near = [by_fold[fold] for fold in difflib.get_close_matches(name.casefold(), by_fold, n=3, cutoff=0.5)]
    known = ", ".join((*EIGHT, "bf16", "fp16", "float32"))
    others = "the names of ml_dtypes and P3109 (all: altgrad formats), or E<bits>M<bits>[b<bias>][suffix]"
    return f"did you mean {' or '.join(near)}? " * bool(near) + f"Known: {known}, {others}"

"""The registry and the codes of formats, against a table, ml_dtypes, gfloat and exact arithmetic."""

from __future__ import annotations

import itertools
import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest
from gfloat import decode_float, encode_float
from gfloat.formats import (
    format_info_bfloat16,
    format_info_binary16,
    format_info_binary32,
    format_info_ocp_e2m1,
    format_info_ocp_e2m3,
    format_info_ocp_e3m2,
    format_info_ocp_e4m3,
    format_info_ocp_e5m2,
    format_info_ocp_e8m0,
    format_info_p3109,
)
from gfloat.types import Domain, FormatInfo, Signedness
from hypothesis import assume, example, given
from hypothesis import strategies as st

from altgrad.parity import lockstep
from altgrad_core.errors import InputError
from altgrad_core.formats import EIGHT, FORMAT_REGISTRY, Format, UnknownFormatError, parse
from altgrad_core.scaling import PerBlock, PerChannel, checked_axes, checked_axis
from altgrad_core.settings import Policy
from altgrad_core.snapshots import check_back
from tests.oracles import DISTINCT, gfloat_info, same, small_formats


class Specials(NamedTuple):
    """Which special values a family of formats has."""

    has_inf: bool
    has_nan: bool
    has_negative_zero: bool
    is_signed: bool


FINITE = Specials(has_inf=False, has_nan=False, has_negative_zero=True, is_signed=True)
FN = Specials(has_inf=False, has_nan=True, has_negative_zero=True, is_signed=True)
IEEE = Specials(has_inf=True, has_nan=True, has_negative_zero=True, is_signed=True)
FNUZ = Specials(has_inf=False, has_nan=True, has_negative_zero=False, is_signed=True)
NUZ = Specials(has_inf=True, has_nan=True, has_negative_zero=False, is_signed=True)
FNU = Specials(has_inf=False, has_nan=True, has_negative_zero=False, is_signed=False)
FAMILIES = {"": FINITE, "fn": FN, "ieee": IEEE, "fnuz": FNUZ, "nuz": NUZ, "fnu": FNU}

# name: exponent bits, mantissa bits, bias, family, max, smallest normal, smallest subnormal
# The eight: DESIGN, section 3. NumPy's and ml_dtypes' own: their documentation (OCP FP8 and MX for fn, ieee e5m2 and
# fnu). P3109: bias 2^(7-P); infinity takes the place of the largest value.
TABLE = {
    "E0M7": (0, 7, 0, FINITE, 127 / 128, None, 1 / 128),
    "E1M6": (1, 6, 0, FINITE, 3.96875, 2.0, 1 / 32),
    "E2M5": (2, 5, 1, FINITE, 7.875, 1.0, 1 / 32),
    "E3M4": (3, 4, 1, FINITE, 124.0, 1.0, 1 / 16),
    "E4M3": (4, 3, 7, FN, 448.0, 2.0**-6, 2.0**-9),
    "E5M2": (5, 2, 15, IEEE, 57344.0, 2.0**-14, 2.0**-16),
    "E6M1": (6, 1, 31, FINITE, 1.5 * 2.0**32, 2.0**-30, 2.0**-31),
    "E7M0": (7, 0, 63, FINITE, 2.0**64, 2.0**-62, None),
    "bf16": (8, 7, 127, IEEE, float.fromhex("0x1.fep127"), 2.0**-126, 2.0**-133),
    "fp16": (5, 10, 15, IEEE, 65504.0, 2.0**-14, 2.0**-24),
    "float32": (8, 23, 127, IEEE, float.fromhex("0x1.fffffep127"), 2.0**-126, 2.0**-149),
    "bfloat16": (8, 7, 127, IEEE, float.fromhex("0x1.fep127"), 2.0**-126, 2.0**-133),
    "float16": (5, 10, 15, IEEE, 65504.0, 2.0**-14, 2.0**-24),
    "float8_e3m4": (3, 4, 3, IEEE, 15.5, 0.25, 2.0**-6),
    "float8_e4m3": (4, 3, 7, IEEE, 240.0, 2.0**-6, 2.0**-9),
    "float8_e4m3fn": (4, 3, 7, FN, 448.0, 2.0**-6, 2.0**-9),
    "float8_e4m3fnuz": (4, 3, 8, FNUZ, 240.0, 2.0**-7, 2.0**-10),
    "float8_e4m3b11fnuz": (4, 3, 11, FNUZ, 30.0, 2.0**-10, 2.0**-13),
    "float8_e5m2": (5, 2, 15, IEEE, 57344.0, 2.0**-14, 2.0**-16),
    "float8_e5m2fnuz": (5, 2, 16, FNUZ, 57344.0, 2.0**-15, 2.0**-17),
    "float8_e8m0fnu": (8, 0, 127, FNU, 2.0**127, 2.0**-127, None),
    "float6_e2m3fn": (2, 3, 1, FINITE, 7.5, 1.0, 0.125),
    "float6_e3m2fn": (3, 2, 3, FINITE, 28.0, 0.25, 0.0625),
    "float4_e2m1fn": (2, 1, 1, FINITE, 6.0, 1.0, 0.5),
    "binary8p1se": (7, 0, 64, NUZ, 2.0**62, 2.0**-63, None),
    "binary8p2se": (6, 1, 32, NUZ, 2.0**31, 2.0**-31, 2.0**-32),
    "binary8p3se": (5, 2, 16, NUZ, 49152.0, 2.0**-15, 2.0**-17),
    "binary8p4se": (4, 3, 8, NUZ, 224.0, 2.0**-7, 2.0**-10),
    "binary8p5se": (3, 4, 4, NUZ, 15.0, 2.0**-3, 2.0**-7),
    "binary8p6se": (2, 5, 2, NUZ, 3.875, 0.5, 2.0**-6),
    "binary8p7se": (1, 6, 1, NUZ, 1.96875, 1.0, 2.0**-6),
    "binary8p1sf": (7, 0, 64, FNUZ, 2.0**63, 2.0**-63, None),
    "binary8p2sf": (6, 1, 32, FNUZ, 1.5 * 2.0**31, 2.0**-31, 2.0**-32),
    "binary8p3sf": (5, 2, 16, FNUZ, 57344.0, 2.0**-15, 2.0**-17),
    "binary8p4sf": (4, 3, 8, FNUZ, 240.0, 2.0**-7, 2.0**-10),
    "binary8p5sf": (3, 4, 4, FNUZ, 15.5, 2.0**-3, 2.0**-7),
    "binary8p6sf": (2, 5, 2, FNUZ, 3.9375, 0.5, 2.0**-6),
    "binary8p7sf": (1, 6, 1, FNUZ, 1.984375, 1.0, 2.0**-6),
}

# name: the codes of NaN, that of inf, the canonical NaN
SPECIAL_CODES: dict[str, tuple[set[int], int | None, int]] = {
    "E4M3": ({0x7F, 0xFF}, None, 0x7F),
    "E5M2": ({0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF}, 0x7C, 0x7E),
    "bf16": ({*range(0x7F81, 0x8000), *range(0xFF81, 0x10000)}, 0x7F80, 0x7FC0),
    "fp16": ({*range(0x7C01, 0x8000), *range(0xFC01, 0x10000)}, 0x7C00, 0x7E00),
    "float8_e3m4": ({*range(0x71, 0x80), *range(0xF1, 0x100)}, 0x70, 0x78),
    "float8_e4m3": ({*range(0x79, 0x80), *range(0xF9, 0x100)}, 0x78, 0x7C),
    "float8_e8m0fnu": ({0xFF}, None, 0xFF),
    **{name: ({0x80}, None, 0x80) for name in TABLE if name.endswith(("fnuz", "sf"))},
    **{f"binary8p{precision}se": ({0x80}, 0x7F, 0x80) for precision in range(1, 8)},
}

DTYPES = {
    "float32": np.float32,
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
    "float8_e3m4": ml_dtypes.float8_e3m4,
    "float8_e4m3": ml_dtypes.float8_e4m3,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "float8_e4m3b11fnuz": ml_dtypes.float8_e4m3b11fnuz,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "float8_e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "float8_e8m0fnu": ml_dtypes.float8_e8m0fnu,
    "float6_e2m3fn": ml_dtypes.float6_e2m3fn,
    "float6_e3m2fn": ml_dtypes.float6_e3m2fn,
    "float4_e2m1fn": ml_dtypes.float4_e2m1fn,
}

ALIASES = {
    frozenset({"E4M3", "float8_e4m3fn"}),
    frozenset({"E5M2", "float8_e5m2"}),
    frozenset({"bf16", "bfloat16"}),
    frozenset({"fp16", "float16"}),
    frozenset({"float8_e4m3fnuz", "binary8p4sf"}),
    frozenset({"float8_e5m2fnuz", "binary8p3sf"}),
}

NAMED_BY_GFLOAT = {
    "E4M3": format_info_ocp_e4m3,
    "E5M2": format_info_ocp_e5m2,
    "bf16": format_info_bfloat16,
    "fp16": format_info_binary16,
    "float32": format_info_binary32,
    "float8_e8m0fnu": format_info_ocp_e8m0,
    "float6_e2m3fn": format_info_ocp_e2m3,
    "float6_e3m2fn": format_info_ocp_e3m2,
    "float4_e2m1fn": format_info_ocp_e2m1,
    **{
        f"binary8p{precision}s{letter}": format_info_p3109(8, precision, Signedness.Signed, domain)
        for precision in range(1, 8)
        for letter, domain in (("e", Domain.Extended), ("f", Domain.Finite))
    },
}

every_format = pytest.mark.parametrize("format", FORMAT_REGISTRY.values(), ids=lambda known: known.name)
every_dtype = pytest.mark.parametrize("name", DTYPES)


def default_bias(exponent_bits: int, family: Specials) -> int:
    half = 2 ** (exponent_bits - 1) if exponent_bits else 1
    return half if family in (FNUZ, NUZ) else half - 1


def codes_of_dtype(format: Format, dtype: type) -> np.ndarray:
    """All codes, as an array of a dtype."""
    return np.arange(2**format.bits, dtype=f"u{np.dtype(dtype).itemsize}").view(dtype)


# The registry


def test_the_registry_is_the_table() -> None:
    assert set(FORMAT_REGISTRY) == set(TABLE)
    assert all(name == known.name for name, known in FORMAT_REGISTRY.items())


@pytest.mark.parametrize("name", TABLE)
def test_registry_values(name: str) -> None:
    known = FORMAT_REGISTRY[name]
    exponent_bits, mantissa_bits, bias, specials, maximum, min_normal, subnormal = TABLE[name]
    assert (known.exponent_bits, known.mantissa_bits, known.bias) == (exponent_bits, mantissa_bits, bias)
    assert (known.has_inf, known.has_nan, known.has_negative_zero, known.is_signed) == specials
    assert known.bits == specials.is_signed + exponent_bits + mantissa_bits
    assert known.max_representable_value == maximum
    assert known.min_normal == min_normal
    assert known.smallest_subnormal == subnormal
    assert known.max_exponent == math.floor(math.log2(maximum))
    assert known.min_exponent == (0 if min_normal is None else math.log2(min_normal))


def test_the_registry_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        FORMAT_REGISTRY["E5M2"] = parse("E4M3")  # type: ignore[index]


def test_the_eight_are_all_splits_of_seven_bits() -> None:
    assert list(EIGHT) == list(FORMAT_REGISTRY)[:8]
    assert [(parse(name).exponent_bits, parse(name).mantissa_bits) for name in EIGHT] == [(e, 7 - e) for e in range(8)]
    assert all(parse(name).bits == 8 for name in EIGHT)


def test_equal_formats_of_the_registry() -> None:
    by_value: dict[Format, set[str]] = {}
    for name, known in FORMAT_REGISTRY.items():
        by_value.setdefault(known, set()).add(name)
    assert {frozenset(names) for names in by_value.values() if len(names) > 1} == ALIASES


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("E2M1", "float4_e2m1fn"),
        ("E2M3", "float6_e2m3fn"),
        ("E3M2", "float6_e3m2fn"),
        ("E3M4b3ieee", "float8_e3m4"),
        ("E4M3ieee", "float8_e4m3"),
        ("E4M3fn", "E4M3"),
        ("E4M3fnuz", "float8_e4m3fnuz"),
        ("E4M3b11fnuz", "float8_e4m3b11fnuz"),
        ("E5M2fnuz", "binary8p3sf"),
        ("E5M2ieee", "float8_e5m2"),
        ("E5M10ieee", "float16"),
        ("E8M7b127ieee", "bfloat16"),
        ("E8M0fnu", "float8_e8m0fnu"),
        ("E4M3nuz", "binary8p4se"),
        ("E1M6nuz", "binary8p7se"),
        ("E7M0nuz", "binary8p1se"),
        ("E7M0fnuz", "binary8p1sf"),
        ("E1M6b0", "E1M6"),
    ],
)
def test_names_of_one_format(name: str, other: str) -> None:
    assert parse(name) == parse(other)
    assert hash(parse(name)) == hash(parse(other))


@pytest.mark.parametrize(
    ("name", "other"),
    [("E3M4", "float8_e3m4"), ("E4M3", "float8_e4m3"), ("E4M3b7", "E4M3"), ("E5M2b15", "E5M2"), ("E3M4ieee", "E3M4")],
)
def test_names_of_different_formats(name: str, other: str) -> None:
    assert parse(name) != parse(other)


# What codes mean


@small_formats
def test_table_by_enumeration(format: Format) -> None:
    """Largest, smallest normal and smallest subnormal are among the codes, and nothing lies beyond or between."""
    book = format.code_book()[: format.magnitude_mask + 1]
    finite = book[np.isfinite(book)]
    assert finite.max() == format.max_representable_value
    assert (np.diff(finite) > 0).all()
    if format.is_signed:
        assert finite[0] == 0
        assert finite[1] == (format.smallest_subnormal or format.min_normal)
    else:
        assert finite[0] == format.min_normal
    assert format.min_normal is None or format.min_normal in finite


@small_formats
def test_special_codes(format: Format) -> None:
    nan_codes, inf_code, canonical = SPECIAL_CODES.get(format.name, (set(), None, None))
    book = format.code_book()
    assert set(np.flatnonzero(np.isnan(book)).tolist()) == nan_codes
    assert (format.nan_code, format.inf_code) == (canonical, inf_code)
    infinite = [] if inf_code is None else [(inf_code, math.inf), (inf_code | format.sign_mask, -math.inf)]
    assert [(code, book[code]) for code in np.flatnonzero(np.isinf(book))] == infinite
    assert format.overflow_value == (
        math.inf if infinite else pytest.approx(math.nan, nan_ok=True) if nan_codes else book[format.max_code]
    )


@small_formats
def test_codes_mean_what_the_definition_says(format: Format) -> None:
    """``s|e|m``, read with integers and powers of two alone."""
    nan_codes, inf_code, _ = SPECIAL_CODES.get(format.name, (set(), None, 0))
    fields = (format.exponent_bits, format.mantissa_bits, format.bias, format.is_signed)
    special = nan_codes | ({inf_code, inf_code | format.sign_mask} if inf_code else set())
    for code in range(2**format.bits):
        value = format.to_real(code)
        sign = -1 if format.is_signed and code >> (format.bits - 1) else 1
        if code in special:
            assert not math.isfinite(value)
        else:
            assert Fraction(value) == sign * magnitude_by_definition(code & format.magnitude_mask, *fields)
        assert math.copysign(1, value) == sign or math.isnan(value)


def magnitude_by_definition(
    magnitude: int, exponent_bits: int, mantissa_bits: int, bias: int, is_signed: bool
) -> Fraction:
    stored, mantissa = divmod(magnitude, 2**mantissa_bits)
    fraction = Fraction(mantissa, 2**mantissa_bits)
    if exponent_bits == 0:
        return fraction
    if stored == 0 and is_signed:
        return Fraction(2) ** (1 - bias) * fraction
    return Fraction(2) ** (stored - bias) * (1 + fraction)


@small_formats
def test_round_trip_of_every_code(format: Format) -> None:
    nan_code = format.to_bits(math.nan)
    for code, value in enumerate(format.code_book().tolist()):
        assert format.to_bits(value) == (nan_code if math.isnan(value) else code)


def test_e1m6_is_four_times_e0m7_on_every_code() -> None:
    assert (parse("E1M6").code_book() == 4 * parse("E0M7").code_book()).all()


def test_formats_that_differ_have_a_code_that_differs() -> None:
    """All of 4 bits with small biases. Only fixed point has a twin, which spends an exponent bit on the same grid."""
    books: dict[bytes, list[str]] = {}
    for exponent_bits, bias, (suffix, family) in itertools.product(range(5), range(-3, 4), FAMILIES.items()):
        mantissa_bits = 4 - family.is_signed - exponent_bits
        if mantissa_bits < 0:
            continue
        try:
            made = parse(f"E{exponent_bits}M{mantissa_bits}b{bias}{suffix}")
        except UnknownFormatError:
            continue
        assert len(made.code_book()) == 16
        canonical = np.where(np.isnan(made.code_book()), math.nan, made.code_book())
        books.setdefault(canonical.tobytes(), []).append(str(made))
    assert len(books) > 60
    assert [names for names in books.values() if len(names) > 1] == [["E0M3b0", "E1M2b2"]]


# Against ml_dtypes and NumPy


@every_dtype
def test_dtypes_of_the_registry(name: str) -> None:
    assert parse(name).dtype == np.dtype(DTYPES[name])


@pytest.mark.parametrize("name", sorted(set(TABLE) - set(DTYPES)))
def test_dtypes_of_other_names(name: str) -> None:
    """That of the format under its other name, or none."""
    others = set().union(*(names for names in ALIASES if name in names)) & set(DTYPES)
    expected = np.dtype(DTYPES[others.pop()]) if others else None
    assert parse(name).dtype == expected


@pytest.mark.parametrize("name", ["E4M3b7", "E2M3b2", "E5M2", "E2M1", "E5M10ieee"])
def test_dtypes_of_own_formats_follow_their_values(name: str) -> None:
    expected = {"E5M2": "float8_e5m2", "E2M1": "float4_e2m1fn", "E5M10ieee": "float16"}.get(name)
    dtype = replace(parse(name), name="my own").dtype
    assert (None if dtype is None else dtype.name) == expected


@pytest.mark.parametrize("name", [name for name in DTYPES if name != "float32"])
def test_code_books_of_dtypes(name: str) -> None:
    with np.errstate(invalid="ignore"):  # signalling NaN
        theirs = codes_of_dtype(parse(name), DTYPES[name]).astype(np.float64)
    assert same(parse(name).code_book(), theirs)


def test_codes_of_float32() -> None:
    codes = np.random.default_rng(0).integers(0, 2**32, 2000, dtype=np.uint32)
    with np.errstate(invalid="ignore"):
        theirs = codes.view(np.float32).astype(np.float64)
    assert same(np.array([parse("float32").to_real(code) for code in codes.tolist()]), theirs)


@every_dtype
def test_finfo_of_ml_dtypes(name: str) -> None:
    known, info = parse(name), ml_dtypes.finfo(DTYPES[name])
    assert (known.bits, known.exponent_bits, known.mantissa_bits) == (info.bits, info.nexp, info.nmant)
    assert known.max_representable_value == float(info.max)
    assert known.min_normal == float(info.smallest_normal)
    assert (known.min_exponent, known.max_exponent + 1) == (info.minexp, info.maxexp)
    if name == "float8_e8m0fnu":  # without subnormals: theirs says its smallest value
        assert (known.smallest_subnormal, float(info.smallest_subnormal)) == (None, 2.0**-127)
    else:
        assert known.smallest_subnormal == float(info.smallest_subnormal)


def test_e3m4_is_not_that_of_ml_dtypes() -> None:
    assert float(ml_dtypes.finfo(ml_dtypes.float8_e3m4).max) == 15.5
    assert parse("E3M4").max_representable_value == 124.0


# Against gfloat


@pytest.mark.parametrize("name", NAMED_BY_GFLOAT)
def test_formats_that_gfloat_has(name: str) -> None:
    """Its own descriptions are those that ours are translated to."""
    ours, theirs = gfloat_info(parse(name)), NAMED_BY_GFLOAT[name]
    theirs = FormatInfo(**{**vars(theirs), "name": ours.name})
    assert ours == theirs
    assert parse(name).max_representable_value == theirs.max
    assert parse(name).min_normal == theirs.smallest_normal


@small_formats
def test_code_books_of_gfloat(format: Format) -> None:
    info = gfloat_info(format)
    assert same(format.code_book(), np.array([decode_float(info, code).fval for code in range(2**format.bits)]))


@small_formats
def test_gfloat_encodes_the_same_codes(format: Format) -> None:
    """Of NaN it takes the topmost code, the sign included, where we take the quiet positive one."""
    info = gfloat_info(format)
    for code, value in enumerate(format.code_book()[:: 1 if format.bits <= 8 else 37].tolist()):
        if not math.isnan(value):
            assert encode_float(info, value) == format.to_bits(value), code
    if format.has_nan and (format.has_negative_zero or not format.is_signed):
        assert encode_float(info, math.nan) == 2**format.bits - 1
    elif format.has_nan:
        assert encode_float(info, math.nan) == format.to_bits(math.nan)


@pytest.mark.parametrize("width", range(3, 11))
def test_p3109_of_other_widths(width: int) -> None:
    """binary{K}p{P} has K-P exponent bits, and the default bias of fnuz and nuz is its bias."""
    for precision, (suffix, domain) in itertools.product(
        range(max(1, width - 8), width), (("nuz", Domain.Extended), ("fnuz", Domain.Finite))
    ):
        made = parse(f"E{width - precision}M{precision - 1}{suffix}")
        info = format_info_p3109(width, precision, Signedness.Signed, domain)
        assert gfloat_info(made) == FormatInfo(**{**vars(info), "name": made.name})
        assert same(made.code_book(), np.array([decode_float(info, code).fval for code in range(2**width)]))


# Rounding to codes


@pytest.mark.parametrize(
    ("name", "value", "code_value"),
    [
        ("E7M0", 0.75, 0.5),
        ("E7M0", 1.5, 2.0),
        ("E7M0", 3.0, 2.0),
        ("E7M0", 6.0, 8.0),
        ("E7M0", 2.0**-63, 0.0),
        ("E7M0", 2.0**-63 * (1 + 2.0**-20), 2.0**-62),
        ("E4M3", 464.0, 448.0),
        ("E4M3", 465.0, math.nan),
        ("E5M2", 61439.0, 57344.0),
        ("E5M2", 61440.0, math.inf),
        ("E5M2", -61440.0, -math.inf),
        ("E3M4", 126.0, 124.0),
        ("E3M4", 1e30, 124.0),
        ("E3M4", math.inf, 124.0),
        ("E3M4", -math.inf, -124.0),
        ("E0M7", 1.0, 127 / 128),
        ("float8_e8m0fnu", 1.5, 2.0),
        ("float8_e8m0fnu", 3.0, 2.0),
        ("float8_e8m0fnu", 2.0**-149, 2.0**-127),
        ("float8_e8m0fnu", 1.5 * 2.0**127, 2.0**127),
        ("float8_e8m0fnu", 1.75 * 2.0**127, math.nan),
        ("float8_e8m0fnu", 0.0, math.nan),
        ("float8_e8m0fnu", -1.0, math.nan),
        ("binary8p4se", 231.9, 224.0),
        ("binary8p4se", 232.0, 224.0),
        ("binary8p4se", -232.1, -math.inf),
        ("binary8p4sf", 247.9, 240.0),
        ("binary8p4sf", 248.0, math.nan),
        ("binary8p4sf", -1e-30, 0.0),
        ("float4_e2m1fn", 2.5, 2.0),
        ("float4_e2m1fn", -0.25, -0.0),
    ],
)
def test_to_bits_rounds_ties_to_the_even_code(name: str, value: float, code_value: float) -> None:
    assert same(parse(name).to_real(parse(name).to_bits(value)), code_value)


def test_to_bits_of_what_no_code_has() -> None:
    assert parse("E3M4").to_bits(math.nan) == 0
    assert parse("E4M3").to_bits(math.nan) == 0x7F
    assert parse("E5M2").to_bits(math.nan) == 0x7E  # quiet: the topmost fraction bit is set
    assert parse("bf16").to_bits(math.nan) == 0x7FC0
    assert parse("fp16").to_bits(-math.nan) == 0x7E00
    assert parse("E4M3").to_bits(math.inf) == 0x7F
    assert parse("E4M3").to_bits(math.inf, overflow="saturate") == 0x7E
    assert parse("E4M3").to_bits(-math.inf, overflow="saturate_finite") == 0xFE
    assert parse("E5M2").to_bits(math.inf, overflow="saturate") == 0x7B
    assert parse("E5M2").to_bits(math.inf, overflow="saturate_finite") == 0x7C
    assert parse("E5M2").to_bits(-0.0) == 0x80
    assert parse("E5M2").to_bits(-1e-30) == 0x80
    assert parse("binary8p3se").to_bits(-0.0) == 0
    assert parse("binary8p3se").to_bits(-1e-30) == 0
    assert parse("binary8p3se").to_bits(-math.inf) == 0xFF
    assert parse("binary8p3sf").to_bits(-math.inf) == 0x80
    assert parse("binary8p3sf").to_bits(-math.inf, overflow="saturate_finite") == 0xFF
    assert parse("binary8p3se").to_bits(math.nan) == 0x80
    assert parse("float8_e8m0fnu").to_bits(0.0) == 0xFF
    assert parse("float8_e8m0fnu").to_bits(math.inf) == 0xFF
    assert parse("float8_e8m0fnu").to_bits(math.inf, overflow="saturate") == 0xFE
    assert parse("float4_e2m1fn").to_bits(math.nan) == 0


def test_to_bits_of_fractions_is_exact() -> None:
    just_above = Fraction(3, 2) + Fraction(1, 10**30)
    assert parse("E7M0").to_real(parse("E7M0").to_bits(Fraction(3))) == 2.0
    assert parse("E2M5").to_real(parse("E2M5").to_bits(just_above / 64 + 1)) == 1.03125


@pytest.mark.parametrize("mode", ["stochastic", "up"])
def test_to_bits_refuses_modes_without_a_single_answer(mode: str) -> None:
    with pytest.raises(ValueError, match="rounding"):
        parse("E5M2").to_bits(1.0, mode)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "code", "last"),
    [("E5M2", -1, 255), ("E5M2", 256, 255), ("float6_e2m3fn", 64, 63), ("float8_e8m0fnu", 256, 255)],
)
def test_to_real_refuses_codes_of_other_widths(name: str, code: int, last: int) -> None:
    with pytest.raises(ValueError, match=f"code {code} is not one of {name}; expected an integer from 0 to {last}"):
        parse(name).to_real(code)


@pytest.mark.parametrize("kind", [np.uint8, np.int64, np.uint64])
def test_to_real_takes_integers_of_numpy(kind: type) -> None:
    assert parse("E4M3").to_real(kind(0x78)) == 256.0
    assert math.ldexp(*parse("E4M3").finite_parts(kind(0x78))) == 256.0


@pytest.mark.parametrize("code", [56.0, "56", None, True, np.float32(56)])
def test_to_real_refuses_what_is_no_integer(code: object) -> None:
    with pytest.raises(InputError, match=re.escape(f"code {code!r} is not one of E4M3; expected an integer from 0")):
        parse("E4M3").to_real(code)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [1.5, -0.0, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_to_bits_takes_floats_of_numpy(kind: type, value: float) -> None:
    assert parse("E5M2").to_bits(kind(value)) == parse("E5M2").to_bits(value)


def test_to_bits_takes_integers_and_nothing_else() -> None:
    assert parse("E4M3").to_bits(np.int8(-3)) == parse("E4M3").to_bits(-3) == parse("E4M3").to_bits(-3.0)
    for value in ("3", None, True, 3j):
        with pytest.raises(InputError, match=re.escape(f"the value is {value!r} (")):
            parse("E4M3").to_bits(value)  # type: ignore[arg-type]


def test_code_books_are_read_only_and_limited() -> None:
    with pytest.raises(ValueError, match="read-only"):
        parse("E5M2").code_book()[0] = 1.0
    with pytest.raises(ValueError, match="32 bits"):
        parse("float32").code_book()


@given(st.floats(allow_nan=False), st.sampled_from(DISTINCT))
def test_to_bits_finds_a_nearest_code(value: float, format: Format) -> None:
    """No other finite code is nearer, and of two that are as near it is the even one."""
    assume(format.is_signed or value > 0)
    code = format.to_bits(value, overflow="saturate")
    distances = np.abs(format.code_book()[: format.max_code + 1] - min(abs(value), format.max_representable_value))
    magnitude = code & format.magnitude_mask
    assert distances[magnitude] == distances.min()
    rivals = np.flatnonzero(distances == distances.min())
    assert len(rivals) == 1 or magnitude % 2 == 0
    assert bool(code & format.sign_mask) == (
        math.copysign(1, value) < 0 and (magnitude > 0 or format.has_negative_zero)
    )


# Names


@pytest.mark.parametrize("name", TABLE)
def test_names_of_the_registry_win(name: str) -> None:
    assert parse(name) is FORMAT_REGISTRY[name]
    assert str(parse(name)) == name


def test_formats_pass_through() -> None:
    own = Format("own", 4, 4, 3)
    assert parse(own) is own


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("E2M3", (2, 3, 1, *FINITE)),
        ("E3M4b3", (3, 4, 3, *FINITE)),
        ("E4M3b11", (4, 3, 11, *FINITE)),
        ("E4M3b-2", (4, 3, -2, *FINITE)),
        ("E0M2", (0, 2, 0, *FINITE)),
        ("E5M10", (5, 10, 15, *FINITE)),
        ("E1M1", (1, 1, 0, *FINITE)),
        ("E1M1fnuz", (1, 1, 1, *FNUZ)),
        ("E4M3fn", (4, 3, 7, *FN)),
        ("E4M3b11fn", (4, 3, 11, *FN)),
        ("E4M3fnuz", (4, 3, 8, *FNUZ)),
        ("E4M3b11fnuz", (4, 3, 11, *FNUZ)),
        ("E4M3nuz", (4, 3, 8, *NUZ)),
        ("E4M3ieee", (4, 3, 7, *IEEE)),
        ("E4M3b-2ieee", (4, 3, -2, *IEEE)),
        ("E8M0fnu", (8, 0, 127, *FNU)),
        ("E5M0fnu", (5, 0, 15, *FNU)),
        ("E8M0b130fnu", (8, 0, 130, *FNU)),
    ],
)
def test_names_of_the_grammar(name: str, fields: tuple[int | bool, ...]) -> None:
    made = parse(name)
    assert made == Format("any", *fields)
    assert made.name == name
    assert str(made) == name


@pytest.mark.parametrize("exponent_bits", range(10))
def test_every_name_of_the_grammar_without_a_bias(exponent_bits: int) -> None:
    """Either the format that it says, or, for one that cannot be, an error."""
    for mantissa_bits, (suffix, family) in itertools.product(range(17), FAMILIES.items()):
        name = f"E{exponent_bits}M{mantissa_bits}{suffix}"
        if name in FORMAT_REGISTRY:
            continue
        bias = default_bias(exponent_bits, family)
        in_range = 3 <= family.is_signed + exponent_bits + mantissa_bits <= 16
        if in_range and is_possible(exponent_bits, mantissa_bits, bias, family):
            assert parse(name) == Format("any", exponent_bits, mantissa_bits, bias, *family)
        else:
            with pytest.raises(UnknownFormatError, match=name):
                parse(name)


def is_possible(exponent_bits: int, mantissa_bits: int, bias: int, family: tuple[bool, ...]) -> bool:
    """What :class:`Format` must accept, once more, from codes: the special ones must fit, and float32 hold the rest."""
    if not (0 <= exponent_bits <= 8 and 0 <= mantissa_bits <= 23) or family not in FAMILIES.values():
        return False
    codes = 2 ** (exponent_bits + mantissa_bits)
    if exponent_bits == 0 and (bias != 0 or family != FINITE):
        return False
    if family == FNU and (mantissa_bits > 0 or exponent_bits < 2):
        return False
    if family == IEEE and mantissa_bits == 0:
        return False
    specials = {FINITE: 0, FN: 1, FNUZ: 0, NUZ: 1, FNU: 1, IEEE: 2**mantissa_bits}[Specials(*family)]
    first = 0 if family == FNU else 1
    last = codes - 1 - specials
    if last < 1:
        return False
    smallest, largest = (
        magnitude_by_definition(code, exponent_bits, mantissa_bits, bias, family[3]) for code in (first, last)
    )
    if (exponent_bits, mantissa_bits, bias, family) == (8, 23, 127, IEEE):
        return True
    smallest_normal = -bias if family == FNU else 1 - bias if exponent_bits else 0
    in_range = smallest >= Fraction(2) ** -148 and Fraction(2) ** -126 <= largest < Fraction(2) ** 128
    return in_range and smallest_normal <= 127 and mantissa_bits < 23


@given(
    st.integers(-1, 9),
    st.integers(-1, 24),
    st.integers(-300, 300) | st.integers(-5, 5),
    st.tuples(*[st.booleans()] * 4) | st.sampled_from(list(FAMILIES.values())),
)
@example(4, 3, 141, FINITE)
@example(4, 3, 142, FINITE)
@example(8, 0, 128, FINITE)
@example(8, 0, 127, FINITE)
@example(4, 3, 146, FN)
@example(2, 15, 135, FN)
@example(2, 15, 136, FN)
def test_what_is_a_format(exponent_bits: int, mantissa_bits: int, bias: int, family: tuple[bool, ...]) -> None:
    fields = (exponent_bits, mantissa_bits, bias, *family)
    if is_possible(exponent_bits, mantissa_bits, bias, family):
        made = Format("any", *fields)
        assert made.smallest_subnormal is None or made.smallest_subnormal >= 2.0**-149
        assert made.max_representable_value >= 2.0**-126
    else:
        with pytest.raises(ValueError, match=r"expected|needs|puts|neither|without|fixed-point"):
            Format("any", *fields)


@st.composite
def nameable_formats(draw: st.DrawFn) -> Format:
    """Formats of 3 to 16 bits, with biases that reach from one end of float32 to the other."""
    family = draw(st.sampled_from(list(FAMILIES.values())))
    if family == FNU:
        exponent_bits, mantissa_bits = draw(st.integers(3, 8)), 0
    else:
        exponent_bits = draw(st.integers(0 if family == FINITE else 1, 8))
        mantissa_bits = draw(st.integers(max(family == IEEE, 2 - exponent_bits), 15 - exponent_bits))
    low, high = 2**exponent_bits - 129, 150 - mantissa_bits
    usual = default_bias(exponent_bits, family)
    bias = draw(st.integers(low, high) | st.just(usual)) if exponent_bits else 0
    assume(is_possible(exponent_bits, mantissa_bits, bias, family))
    return Format("mine", exponent_bits, mantissa_bits, bias, *family)


@given(nameable_formats())
@example(replace(parse("E4M3"), name="E5M2"))
@example(Format("mine", 4, 3, 7))
@example(Format("mine", 3, 4, 1))
@example(Format("mine", 3, 4, 3))
@example(Format("mine", 0, 7, 0))
def test_every_format_can_be_named(format: Format) -> None:
    assert parse(str(format)) == format
    assert parse(format.spelling) == format
    assert parse(format.spelling).name == format.spelling == str(replace(format, name="not a name"))
    assert str(format) == format.spelling, "its own name means nothing, or another format"


@every_format
def test_spellings_of_the_registry(format: Format) -> None:
    assert parse(format.spelling) == format
    assert format.is_float32 or format.spelling.startswith("E")


@pytest.mark.parametrize(
    ("name", "spelling"),
    [
        ("E3M4", "E3M4"),
        ("E4M3", "E4M3fn"),
        ("E4M3b7", "E4M3b7"),
        ("E5M2", "E5M2ieee"),
        ("float8_e3m4", "E3M4ieee"),
        ("float8_e4m3b11fnuz", "E4M3b11fnuz"),
        ("float8_e8m0fnu", "E8M0fnu"),
        ("binary8p1se", "E7M0nuz"),
        ("float4_e2m1fn", "E2M1"),
        ("bfloat16", "E8M7ieee"),
        ("float32", "float32"),
    ],
)
def test_spellings(name: str, spelling: str) -> None:
    assert parse(name).spelling == spelling


def test_names_beyond_sixteen_bits_are_kept() -> None:
    tf32 = Format("tf32", 8, 10, 127, has_inf=True, has_nan=True)
    assert (str(tf32), tf32.spelling) == ("tf32", "tf32")


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("E5M3x", "E5M2"),
        ("e5m2", "E5M2"),
        ("E3m4", "E3M4"),
        ("fp32", "fp16"),
        ("bf61", "bf16"),
        ("flaot32", "float32"),
        ("e4m3fn", "float8_e4m3fn"),
        ("E4M3FN", "float8_e4m3fn"),
        ("float8_e4m3fnz", "float8_e4m3fnuz"),
        ("float8_e8m0", "float8_e8m0fnu"),
        ("binary8p3", "binary8p3se"),
        ("Binary8P3SF", "binary8p3sf"),
        ("float6_e3m2", "float6_e3m2fn"),
    ],
)
def test_unknown_names_suggest_near_ones(name: str, suggestion: str) -> None:
    with pytest.raises(
        UnknownFormatError, match=rf"unknown format '{name}'; did you mean .*\b{suggestion}\b.*\? Known: E0M7"
    ):
        parse(name)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "",
            "garbage",
            "E",
            "E5",
            "M2",
            "E5M2b",
            "E-1M3",
            " E5M2",
            "E5M2 ",
            "E5M2\n",
            "E4M3fnuzfn",
            "E4M3unz",
            "E4M3uz",
        ),
        *(
            "E4M3fnb7",
            "E4M3b7.5",
            "E4M3b+7",
            "E4M3b--7",
            "E04M3",
            "E4M03",
            "E4M3b07",
            "E4M3b-0",
            "E\u0664M3",
            "E\uff14M3",
        ),
        "E4M3b" + "9" * 5000,
    ],
)
def test_other_unknown_names_list_what_is_known(name: str) -> None:
    with pytest.raises(UnknownFormatError, match=r"unknown format .*E5M2"):
        parse(name)


@pytest.mark.parametrize("name", ["E1M0", "E0M1", "E9M2", "E8M8", "E5M11", "E0M16", "E99M1", "E2M0fnu", "E9M0fnu"])
def test_widths_out_of_range(name: str) -> None:
    with pytest.raises(UnknownFormatError, match=f"'{name}' has .* 3 to 16 bits with at most 8 of exponent"):
        parse(name)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("E4M3b200", "bias 200 puts values outside float32"),
        ("E4M3b-200", "bias -200 puts values outside float32"),
        ("E8M4", "bias 127 puts values outside float32"),
        ("E8M0fnuz", None),
        ("E2M1b148", "bias 148 puts all values below 2\\^-126"),
        ("E0M7b1", "bias is 1; a fixed-point format"),
        ("E0M7fn", "neither inf nor NaN"),
        ("E0M7ieee", "neither inf nor NaN"),
        ("E7M0ieee", "infinities and NaN share one exponent"),
        ("E7M1fnu", "a format without a sign"),
        ("E8M0b200fnu", "outside float32"),
    ],
)
def test_names_of_what_no_format_has(name: str, reason: str | None) -> None:
    if reason is None:  # its largest exponent is 255 - 128
        assert parse(name).max_exponent == 127
        return
    with pytest.raises(UnknownFormatError, match=f"format '{name}': .*{reason}"):
        parse(name)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("E8M7", "bfloat16 or E8M7b128"),
        ("E8M7fn", "bfloat16 or E8M7b128fn"),
        ("E8M0", "float8_e8m0fnu or E8M0b128"),
        ("E8M3", "E8M3ieee or E8M3b128"),
        ("E4M3b200", "E4M3b141"),
        ("E4M3b-200ieee", "E4M3b-113ieee"),
        ("E8M0b200fnu", "E8M0b148fnu"),
        ("E0M7b1", "E0M7b0"),
        ("E0M7ieee", "E0M7"),
        ("E5M0ieee", "E5M0fn or E5M0"),
    ],
)
def test_what_no_format_has_suggests_near_ones(name: str, near: str) -> None:
    with pytest.raises(UnknownFormatError, match=rf"; did you mean {near}\?$"):
        parse(name)
    for each in near.split(" or "):
        assert parse(each).mantissa_bits == int(name[3])


@pytest.mark.parametrize("name", [None, 5, b"E5M2", np.float16])
def test_names_are_strings(name: object) -> None:
    with pytest.raises(UnknownFormatError, match="named by a string or is a Format; got"):
        parse(name)  # type: ignore[arg-type]


def test_unknown_format_is_a_value_error() -> None:
    assert issubclass(UnknownFormatError, ValueError)


@pytest.mark.parametrize(
    ("given", "near"),
    [
        (np.float16, "float16"),
        (np.dtype(np.float16), "float16"),
        (ml_dtypes.float8_e4m3fn, "float8_e4m3fn"),
        (np.float64, None),
        (None, None),
    ],
)
def test_dtypes_in_place_of_names_suggest_their_formats(given: object, near: str | None) -> None:
    hint = f"; did you mean {near!r}? (Format.from_dtype takes dtypes)" if near else ""
    with pytest.raises(UnknownFormatError, match=re.escape(f"({type(given).__name__}){hint}") + "$"):
        parse(given)  # type: ignore[arg-type]


@pytest.mark.parametrize("framework", ["jax.numpy", "torch"])
def test_dtypes_of_frameworks_in_place_of_names(framework: str) -> None:
    with pytest.raises(UnknownFormatError, match=r"did you mean 'float8_e4m3fn'\? \(Format.from_dtype takes dtypes"):
        parse(pytest.importorskip(framework).float8_e4m3fn)


# Formats of dtypes


@every_dtype
def test_from_dtypes_of_numpy_and_ml_dtypes(name: str) -> None:
    dtype = DTYPES[name]
    for given_as in (name, dtype, np.dtype(dtype), np.zeros(1, dtype).dtype):
        assert Format.from_dtype(given_as) is FORMAT_REGISTRY[name]


def test_from_dtypes_of_jax() -> None:
    jnp = pytest.importorskip("jax.numpy")
    shared = [name for name in DTYPES if hasattr(jnp, name)]
    assert {"float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e8m0fnu", "float4_e2m1fn"} <= set(shared)
    for name in shared:
        assert Format.from_dtype(getattr(jnp, name)) is FORMAT_REGISTRY[name]
        assert Format.from_dtype(jnp.dtype(name)) is FORMAT_REGISTRY[name]


def test_from_dtypes_of_torch() -> None:
    torch = pytest.importorskip("torch")
    shared = [name for name in DTYPES if hasattr(torch, name)]
    assert {"float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2fnuz"} <= set(shared)
    for name in shared:
        assert Format.from_dtype(getattr(torch, name)) is FORMAT_REGISTRY[name]
    for unknown in (torch.float64, torch.int8, getattr(torch, "float4_e2m1fn_x2", torch.bool)):
        with pytest.raises(UnknownFormatError, match=f"no format for dtype {unknown}"):
            Format.from_dtype(unknown)


@pytest.mark.parametrize("name", DTYPES)
def test_there_and_back_through_dtypes(name: str) -> None:
    assert Format.from_dtype(parse(name).dtype) == parse(name)


@pytest.mark.parametrize(
    "dtype",
    [float, int, bool, None, np.float64, np.int8, np.dtype(">f4"), ml_dtypes.int4, "E4M3", "float64", "bf16", "", 8],
)
def test_dtypes_without_a_format(dtype: object) -> None:
    with pytest.raises(UnknownFormatError, match=r"no format for dtype .* expected one of float32, bfloat16, float16"):
        Format.from_dtype(dtype)


@pytest.mark.parametrize(
    ("dtype", "near"),
    [
        ("float8_e4m3fnz", "float8_e4m3fnuz"),
        ("torch.bfloat61", "bfloat16"),
        ("E4M3", "float8_e4m3fn"),
        ("bf16", "bfloat16"),
        ("E3M4", None),  # float8_e3m4 is another format
        (np.float64, "float32"),  # not float16, whose letters are nearest
        ("double", "float32"),
        ("longdouble", "float32"),
        ("half", "float16"),
        ("single", "float32"),
        ("complex64", None),
        (np.int8, None),
    ],
)
def test_dtypes_without_a_format_suggest_near_ones(dtype: object, near: str | None) -> None:
    hint = f"did you mean {near!r}" if near else "expected one of"
    with pytest.raises(UnknownFormatError, match=re.escape(f"no format for dtype {dtype!r}; {hint}")):
        Format.from_dtype(dtype)


def test_formats_need_numpy_alone() -> None:
    """Reading and rounding bring in no ml_dtypes, dtypes bring in no framework."""
    code = """
import sys
sys.modules["ml_dtypes"] = None  # an import of it fails
import numpy as np
from altgrad_core.formats import Format, parse
assert parse("float8_e4m3fn").to_bits(1.1) == 0x39
assert Format.from_dtype(np.float16).dtype == np.float16
assert not {"jax", "torch"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# The class


def test_formats_are_values() -> None:
    """Equal and hashable by meaning, the name aside; frozen."""
    twin = replace(parse("E5M2"), name="my format")
    assert twin == parse("E5M2")
    assert hash(twin) == hash(parse("E5M2"))
    assert twin != replace(twin, bias=16)
    with pytest.raises(AttributeError):
        twin.bias = 3  # type: ignore[misc]


def test_fields_may_be_numbers_of_numpy() -> None:
    made = Format("mine", np.int64(4), np.uint8(3), np.int8(7), has_nan=np.True_)  # type: ignore[arg-type]
    assert (made, hash(made), str(made)) == (parse("E4M3"), hash(parse("E4M3")), str(replace(parse("E4M3"), name="?")))
    assert repr(made) == repr(replace(parse("E4M3"), name="mine"))
    assert made.code_book().tobytes() == parse("E4M3").code_book().tobytes()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"exponent_bits": 9}, "exponent_bits is 9; expected 0 to 8"),
        ({"exponent_bits": -1}, "exponent_bits is -1; expected 0 to 8"),
        ({"exponent_bits": 4.0}, "exponent_bits is 4.0; expected an integer"),
        ({"mantissa_bits": 24}, "mantissa_bits is 24; expected 0 to 23"),
        ({"mantissa_bits": -1}, "mantissa_bits is -1; expected 0 to 23"),
        ({"mantissa_bits": 23}, "mantissa_bits is 23; expected 0 to 22 in any format but float32"),
        ({"exponent_bits": 1, "bias": -127, "has_inf": True, "has_nan": True}, "exponents from 128"),
        ({"mantissa_bits": True}, "mantissa_bits is True; expected an integer"),
        ({"bias": 7.5}, "bias is 7.5; expected an integer"),
        ({"bias": np.float32(7)}, r"bias is np.float32\(7.0\); expected an integer"),
        ({"has_nan": "no"}, "has_nan is 'no'; expected True or False"),
        ({"has_inf": 1}, "has_inf is 1; expected True or False"),
        ({"has_negative_zero": None}, "has_negative_zero is None; expected True or False"),
        ({"is_signed": np.int64(1)}, r"is_signed is np.int64\(1\); expected True or False"),
        ({"bias": None}, "bias is None; expected an integer"),
        ({"exponent_bits": 0, "mantissa_bits": 0, "bias": 0}, "at least one exponent or mantissa bit; both are 0"),
        ({"exponent_bits": 0, "bias": 1}, r"bias is 1; a fixed-point format \(exponent_bits=0\) has bias 0"),
        ({"exponent_bits": 0, "bias": 0, "has_nan": True}, "neither inf nor NaN"),
        ({"exponent_bits": 0, "bias": 0, "has_inf": True, "has_nan": True}, "neither inf nor NaN"),
        ({"has_inf": True}, "has_inf without has_nan"),
        ({"mantissa_bits": 0, "has_inf": True, "has_nan": True}, "mantissa_bits >= 1"),
        ({"has_negative_zero": False}, "has_negative_zero=False without has_nan"),
        ({"is_signed": False}, "a format without a sign has exponent bits"),
        ({"is_signed": False, "mantissa_bits": 0, "has_nan": True}, "has_negative_zero=False"),
        ({"is_signed": False, "has_nan": True, "has_negative_zero": False}, "no mantissa, infinity or zero"),
        (
            {"is_signed": False, "mantissa_bits": 0, "has_inf": True, "has_nan": True, "has_negative_zero": False},
            "no mantissa, infinity or zero",
        ),
        (
            {"is_signed": False, "exponent_bits": 1, "mantissa_bits": 0, "has_nan": True, "has_negative_zero": False},
            r"exponent bits \(at least 2\)",
        ),
        ({"exponent_bits": 1, "mantissa_bits": 0, "bias": 0, "has_nan": True}, "the only code that is not zero"),
        ({"bias": 200}, r"bias 200 puts values outside float32 .*: quanta from 2\^-202, exponents from -199 to -185"),
        ({"bias": -200}, r"bias -200 puts values outside float32 .* exponents from 201 to 215"),
        ({"bias": 142}, r"bias 142 puts all values below 2\^-126"),
        ({"bias": 148}, r"outside float32 .*: quanta from 2\^-150"),
        ({"exponent_bits": 2, "mantissa_bits": 1, "bias": 148}, r"bias 148 puts all values below 2\^-126"),
    ],
)
def test_what_no_format_has(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Format("bad", **({"exponent_bits": 4, "mantissa_bits": 3, "bias": 7} | fields))  # type: ignore[arg-type]


def test_a_format_is_named_by_a_string() -> None:
    with pytest.raises(InputError, match="the name is None; expected a string"):
        Format(None, 4, 3, 7)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "path"),
    [
        *((name, "fast") for name in EIGHT),
        *((f"binary8p{precision}s{letter}", "fast") for precision in range(1, 8) for letter in "ef"),
        ("fp16", "fast"),
        ("float8_e4m3b11fnuz", "fast"),
        ("float4_e2m1fn", "fast"),
        ("bf16", "wide"),
        ("bfloat16", "wide"),
        ("float8_e8m0fnu", "unsigned"),
        ("E5M0fnu", "unsigned"),
        ("float32", "identity"),
    ],
)
def test_cast_paths(name: str, path: str) -> None:
    assert parse(name).cast_path == path


@given(nameable_formats())
@example(Format("quanta of 2^-125", 4, 3, 123))
@example(Format("quanta of 2^-126", 4, 3, 124))
@example(Format("max below 2^107", 4, 3, -91))
@example(Format("max below 2^108", 4, 3, -92))
def test_the_fast_path_stays_within_normal_float32(format: Format) -> None:
    """Its magic number at twice the maximum, and half of its smallest quantum, are finite normal float32."""
    if format.is_signed and not format.is_float32:
        half_quantum = Fraction(2) ** (format.min_exponent - format.mantissa_bits - 1)
        twice_max = Fraction(2) ** (format.max_exponent + 1)
        magic = twice_max * Fraction(2) ** (23 - format.mantissa_bits)
        in_range = half_quantum >= Fraction(2) ** -126 and max(magic, twice_max) <= Fraction(2) ** 127
        assert (format.cast_path == "fast") == in_range


# Integers of NumPy where formats are used


def test_granularities_keep_plain_integers() -> None:
    for made, plain in (
        (PerBlock(np.int64(32), np.int8(0)), PerBlock(32, 0)),
        (PerChannel(np.int64(1)), PerChannel(1)),
        (PerChannel((np.int64(0), np.uint8(2))), PerChannel((0, 2))),
        (PerChannel([0, 2]), PerChannel((0, 2))),
    ):
        assert (made, hash(made), repr(made)) == (plain, hash(plain), repr(plain))
    assert (checked_axis(np.int64(-1), 3), checked_axes(np.int64(1), 3)) == (2, (1,))
    assert repr(checked_axes((np.int64(1), 0), 3)) == "(0, 1)"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PerBlock(32.0), "the block size is 32.0; expected an integer"),
        (lambda: PerBlock(axis="last"), "the axis is 'last'; expected an integer"),
        (lambda: PerChannel("0"), "the axes are '0'; expected an integer, such as -1, the last, or a tuple of"),
        (lambda: PerChannel((0, 1.0)), "the axis is 1.0; expected an integer"),
        (lambda: checked_axis(True, 2), "the axis is True; expected an integer"),
        (lambda: checked_axes(None, 2), "the axes are None; expected an integer"),
    ],
)
def test_axes_and_sizes_are_integers(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        make()


@pytest.mark.parametrize("package", ["altgrad_jax", "altgrad_torch"])
def test_casts_take_integers_of_numpy(package: str) -> None:
    module = pytest.importorskip(package)
    as_array = pytest.importorskip("torch").from_numpy if package == "altgrad_torch" else np.asarray
    x = as_array(np.linspace(-3, 3, 16, dtype=np.float32).reshape(4, 4))
    drawn = module.hash_bits((4, 4), 0)
    for kind in (np.uint8, np.int64):
        for function in (
            lambda number: module.amax(x, axes=number(1)),
            lambda number: module.amaxes(x, PerChannel(number(1))),
            lambda number: module.quantize_blocks(x, "E4M3", block=number(2), axis=number(0)),
            lambda number: module.quantize(
                x, "E4M3", rounding="stochastic", random_bits=drawn, stochastic_bits=number(8)
            ),
        ):
            assert np.array_equal(np.asarray(function(kind)), np.asarray(function(int)))


def test_numbers_of_steps_may_be_integers_of_numpy() -> None:
    def at_rest() -> tuple[np.ndarray, Callable[..., tuple[np.ndarray, dict[str, np.ndarray]]]]:
        return np.zeros(1, np.float32), lambda state, _: (state, {"x": state})

    assert lockstep(at_rest, at_rest, steps=np.int64(2), repeat_steps=np.int8(1)).passed
    made = Policy(window=np.int64(10), recover_after=np.uint8(3))
    assert repr(made) == repr(Policy(window=10, recover_after=3))
    check_back(np.int64(2), 3)
    with pytest.raises(InputError, match=r"window is np.float64\(10.0\); expected an integer of at least 1"):
        Policy(window=np.float64(10))  # type: ignore[arg-type]


@every_format
def test_derived_values_of_every_format(format: Format) -> None:
    assert format.sign_mask == (2 ** (format.bits - 1) if format.is_signed else 0)
    assert format.sign_mask ^ format.magnitude_mask == 2**format.bits - 1
    assert format.to_real(format.max_code) == format.max_representable_value
    if format.is_signed:
        assert format.to_real(format.max_code | format.sign_mask) == -format.max_representable_value
    assert format.overflow_value == math.inf or not format.has_inf
    assert format.is_float32 == (format.name == "float32")
    assert (format.inf_code is None, format.nan_code is None) == (not format.has_inf, not format.has_nan)


@pytest.mark.parametrize("name", ["E0M7", "E1M2ieee", "E1M1ieee"])
def test_formats_of_subnormals_alone_have_no_smallest_normal(name: str) -> None:
    assert parse(name).min_normal is None
    book = parse(name).code_book()
    assert np.isfinite(book).sum() == 2 * 2 ** parse(name).mantissa_bits

"""The registry and the codes of formats, against a table and exact arithmetic."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from altgrad_core.formats import FORMAT_REGISTRY, Format, UnknownFormatError, parse

NAN_ONLY, INF_AND_NAN, NONE = (False, True), (True, True), (False, False)

# name: exponent bits, mantissa bits, bias, (inf, NaN), max, smallest normal, smallest subnormal
TABLE = {
    "E0M7": (0, 7, 0, NONE, 127 / 128, None, 1 / 128),
    "E1M6": (1, 6, 0, NONE, 3.96875, 2.0, 1 / 32),
    "E2M5": (2, 5, 1, NONE, 7.875, 1.0, 1 / 32),
    "E3M4": (3, 4, 1, NONE, 124.0, 1.0, 1 / 16),
    "E4M3": (4, 3, 7, NAN_ONLY, 448.0, 2.0**-6, 2.0**-9),
    "E5M2": (5, 2, 15, INF_AND_NAN, 57344.0, 2.0**-14, 2.0**-16),
    "E6M1": (6, 1, 31, NONE, 1.5 * 2.0**32, 2.0**-30, 2.0**-31),
    "E7M0": (7, 0, 63, NONE, 2.0**64, 2.0**-62, None),
    "bf16": (8, 7, 127, INF_AND_NAN, float.fromhex("0x1.fep127"), 2.0**-126, 2.0**-133),
    "fp16": (5, 10, 15, INF_AND_NAN, 65504.0, 2.0**-14, 2.0**-24),
    "float32": (8, 23, 127, INF_AND_NAN, float.fromhex("0x1.fffffep127"), 2.0**-126, 2.0**-149),
}

every_format = pytest.mark.parametrize("format", FORMAT_REGISTRY.values(), ids=str)
small_formats = pytest.mark.parametrize("format", [f for f in FORMAT_REGISTRY.values() if f.bits <= 16], ids=str)


def test_the_registry_is_the_table() -> None:
    assert set(FORMAT_REGISTRY) == set(TABLE)
    assert all(name == known.name for name, known in FORMAT_REGISTRY.items())


@pytest.mark.parametrize("name", TABLE)
def test_registry_values(name: str) -> None:
    known = FORMAT_REGISTRY[name]
    exponent_bits, mantissa_bits, bias, specials, maximum, min_normal, subnormal = TABLE[name]
    assert (known.exponent_bits, known.mantissa_bits, known.bias) == (exponent_bits, mantissa_bits, bias)
    assert (known.has_inf, known.has_nan) == specials
    assert known.bits == 1 + exponent_bits + mantissa_bits
    assert known.max_representable_value == maximum
    assert known.min_normal == min_normal
    assert known.smallest_subnormal == subnormal
    assert known.max_exponent == math.floor(math.log2(maximum))
    assert known.min_exponent == (0 if min_normal is None else math.log2(min_normal))


def test_the_registry_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        FORMAT_REGISTRY["E5M2"] = parse("E4M3")  # type: ignore[index]


@small_formats
def test_table_by_enumeration(format: Format) -> None:
    """Largest, smallest normal and smallest subnormal are among the codes, and nothing lies beyond or between."""
    book = format.code_book()[: format.sign_mask]
    finite = book[np.isfinite(book)]
    assert finite.max() == format.max_representable_value
    assert (np.diff(finite) > 0).all()
    assert finite[0] == 0
    assert finite[1] == (format.smallest_subnormal or format.min_normal)
    assert np.isinf(book).sum() == format.has_inf
    assert np.isnan(book).sum() == (2**format.mantissa_bits - 1 if format.has_inf else format.has_nan)


@small_formats
def test_codes_mean_what_the_definition_says(format: Format) -> None:
    """``s|e|m``, read with integers and powers of two alone."""
    for code in range(2 * format.sign_mask):
        sign = -1 if code >> (format.bits - 1) else 1
        stored = (code >> format.mantissa_bits) & (2**format.exponent_bits - 1)
        fraction = Fraction(code & (2**format.mantissa_bits - 1), 2**format.mantissa_bits)
        value = format.to_real(code)
        if (code & (format.sign_mask - 1)) > format.max_code:
            assert not math.isfinite(value)
        elif format.exponent_bits == 0:
            assert Fraction(value) == sign * fraction
        elif stored == 0:
            assert Fraction(value) == sign * Fraction(2) ** (1 - format.bias) * fraction
        else:
            assert Fraction(value) == sign * Fraction(2) ** (stored - format.bias) * (1 + fraction)
        assert math.copysign(1, value) == sign or math.isnan(value)


@small_formats
def test_round_trip_of_every_code(format: Format) -> None:
    nan_code = format.to_bits(math.nan)
    for code in range(2 * format.sign_mask):
        value = format.to_real(code)
        assert format.to_bits(value) == (nan_code if math.isnan(value) else code)


def test_e1m6_is_four_times_e0m7_on_every_code() -> None:
    assert (parse("E1M6").code_book() == 4 * parse("E0M7").code_book()).all()


def test_e3m4_is_not_that_of_ml_dtypes() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    theirs = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e3m4).astype(np.float64)
    assert np.nanmax(theirs[np.isfinite(theirs)]) == 15.5
    assert parse("E3M4").max_representable_value == 124.0


@pytest.mark.parametrize(("name", "dtype"), [("E4M3", "float8_e4m3fn"), ("E5M2", "float8_e5m2"), ("bf16", "bfloat16")])
def test_code_books_of_ml_dtypes(name: str, dtype: str) -> None:
    ml_dtypes, book = pytest.importorskip("ml_dtypes"), parse(name).code_book()
    codes = np.arange(book.size, dtype=np.uint8 if book.size == 256 else np.uint16)
    with np.errstate(invalid="ignore"):  # signalling NaN
        theirs = codes.view(getattr(ml_dtypes, dtype)).astype(np.float64)
    assert np.array_equal(theirs, book, equal_nan=True)


def test_the_code_book_of_float16() -> None:
    theirs = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float64)
    assert np.array_equal(theirs, parse("fp16").code_book(), equal_nan=True)


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
    ],
)
def test_to_bits_rounds_ties_to_the_even_code(name: str, value: float, code_value: float) -> None:
    actual = parse(name).to_real(parse(name).to_bits(value))
    assert actual == code_value or (math.isnan(actual) and math.isnan(code_value))


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


def test_to_bits_of_fractions_is_exact() -> None:
    just_above = Fraction(3, 2) + Fraction(1, 10**30)
    assert parse("E7M0").to_real(parse("E7M0").to_bits(Fraction(3))) == 2.0
    assert parse("E2M5").to_real(parse("E2M5").to_bits(just_above / 64 + 1)) == 1.03125


@pytest.mark.parametrize("mode", ["stochastic", "up"])
def test_to_bits_refuses_modes_without_a_single_answer(mode: str) -> None:
    with pytest.raises(ValueError, match="rounding"):
        parse("E5M2").to_bits(1.0, mode)  # type: ignore[arg-type]


@pytest.mark.parametrize("code", [-1, 256])
def test_to_real_refuses_codes_of_other_widths(code: int) -> None:
    with pytest.raises(ValueError, match="expected 0 to 255"):
        parse("E5M2").to_real(code)


def test_code_books_are_read_only_and_limited() -> None:
    with pytest.raises(ValueError, match="read-only"):
        parse("E5M2").code_book()[0] = 1.0
    with pytest.raises(ValueError, match="32 bits"):
        parse("float32").code_book()


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
        ("E2M3", (2, 3, 1)),
        ("E3M4b3", (3, 4, 3)),
        ("E4M3b11", (4, 3, 11)),
        ("E4M3b-2", (4, 3, -2)),
        ("E0M2", (0, 2, 0)),
        ("E5M10", (5, 10, 15)),
        ("E1M1", (1, 1, 0)),
    ],
)
def test_names_of_the_grammar(name: str, fields: tuple[int, int, int]) -> None:
    made = parse(name)
    assert (made.exponent_bits, made.mantissa_bits, made.bias) == fields
    assert not made.has_inf
    assert not made.has_nan
    assert made.name == name


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [("E5M3x", "E5M2"), ("e5m2", "E5M2"), ("E3m4", "E3M4"), ("fp32", "fp16"), ("bf61", "bf16"), ("flaot32", "float32")],
)
def test_unknown_names_suggest_near_ones(name: str, suggestion: str) -> None:
    with pytest.raises(UnknownFormatError, match=rf"{name}.*did you mean .*{suggestion}"):
        parse(name)


@pytest.mark.parametrize("name", ["", "garbage", "E", "E5", "M2", "E5M2b", "E-1M3", " E5M2", "E5M2 ", "E5M2\n"])
def test_other_unknown_names_list_what_is_known(name: str) -> None:
    with pytest.raises(UnknownFormatError, match=r"E5M2"):
        parse(name)


@pytest.mark.parametrize("name", ["E1M0", "E0M1", "E9M2", "E8M8", "E5M11", "E0M16", "E99M1"])
def test_widths_out_of_range(name: str) -> None:
    with pytest.raises(UnknownFormatError, match="3 to 16 bits"):
        parse(name)


@pytest.mark.parametrize("name", ["E4M3b200", "E4M3b-200", "E0M7b1", "E8M4"])
def test_biases_out_of_range(name: str) -> None:
    with pytest.raises(UnknownFormatError, match=name):
        parse(name)


@pytest.mark.parametrize("name", [None, 5, b"E5M2"])
def test_names_are_strings(name: object) -> None:
    with pytest.raises(UnknownFormatError, match="string"):
        parse(name)  # type: ignore[arg-type]


def test_unknown_format_is_a_value_error() -> None:
    assert issubclass(UnknownFormatError, ValueError)


# The class


def test_formats_are_values() -> None:
    """Equal and hashable by meaning, the name aside; frozen."""
    twin = replace(parse("E5M2"), name="my format")
    assert twin == parse("E5M2")
    assert hash(twin) == hash(parse("E5M2"))
    assert twin != replace(twin, bias=16)
    with pytest.raises(AttributeError):
        twin.bias = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"exponent_bits": 9}, "exponent_bits is 9"),
        ({"exponent_bits": -1}, "exponent_bits is -1"),
        ({"mantissa_bits": 24}, "mantissa_bits is 24"),
        ({"exponent_bits": 0, "mantissa_bits": 0, "bias": 0}, "at least one"),
        ({"exponent_bits": 0, "bias": 1}, "bias is 1"),
        ({"exponent_bits": 0, "bias": 0, "has_nan": True}, "neither inf nor NaN"),
        ({"has_inf": True}, "has_inf without has_nan"),
        ({"mantissa_bits": 0, "has_inf": True, "has_nan": True}, "mantissa_bits >= 1"),
        ({"bias": 200}, "outside float32"),
        ({"bias": -200}, "outside float32"),
    ],
)
def test_what_no_format_has(fields: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Format("bad", **({"exponent_bits": 4, "mantissa_bits": 3, "bias": 7} | fields))


@pytest.mark.parametrize(
    ("name", "path"),
    [("E5M2", "fast"), ("E7M0", "fast"), ("fp16", "fast"), ("bf16", "integer"), ("float32", "identity")],
)
def test_cast_paths(name: str, path: str) -> None:
    assert parse(name).cast_path == path


@every_format
def test_derived_values_of_every_format(format: Format) -> None:
    assert format.sign_mask == 2 ** (format.bits - 1)
    assert format.to_real(format.max_code) == format.max_representable_value
    assert format.to_real(format.max_code | format.sign_mask) == -format.max_representable_value
    assert format.overflow_value == math.inf or not format.has_inf
    assert format.is_float32 == (format.name == "float32")


@given(st.floats(allow_nan=False), st.sampled_from([f for f in FORMAT_REGISTRY.values() if f.bits <= 16]))
def test_to_bits_finds_a_nearest_code(value: float, format: Format) -> None:
    """No other finite code is nearer, and of two that are as near it is the even one."""
    code = format.to_bits(value, overflow="saturate")
    distances = np.abs(format.code_book()[: format.max_code + 1] - min(abs(value), format.max_representable_value))
    magnitude = code & (format.sign_mask - 1)
    assert distances[magnitude] == distances.min()
    rivals = np.flatnonzero(distances == distances.min())
    assert len(rivals) == 1 or magnitude % 2 == 0
    assert bool(code & format.sign_mask) == (math.copysign(1, value) < 0)

"""The references: by hand where the answer is known, against each other, against ml_dtypes and against gfloat."""

from __future__ import annotations

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from gfloat import RoundMode, encode_float, round_float, round_ndarray
from hypothesis import assume, given
from hypothesis import strategies as st

from altgrad_core.formats import FORMAT_REGISTRY, OVERFLOWS, Format, Overflow, Rounding, parse
from altgrad_core.reference import check_modes, check_stochastic_bits, quantize_reference, round_to_format
from tests.oracles import DISTINCT, boundaries, gfloat_info, same, small_formats

SIGNED = [known for known in DISTINCT if known.is_signed]
E8M0 = parse("float8_e8m0fnu")
FINITE_ML_DTYPES = ("float6_e2m3fn", "float6_e3m2fn", "float4_e2m1fn")
ML_DTYPES = [known for known in DISTINCT if known.dtype is not None]
P3109 = [known for known in FORMAT_REGISTRY.values() if known.name.startswith("binary8p")]
RANDOM = np.random.default_rng(0)

signed_formats = pytest.mark.parametrize("format", SIGNED, ids=str)
nearest_modes = pytest.mark.parametrize(
    ("rounding", "mode"), [("nearest_even", RoundMode.TiesToEven), ("nearest_away", RoundMode.TiesToAway)]
)


def one_by_one(
    values: npt.NDArray[np.floating], format: Format, rounding: Rounding = "nearest_even", overflow: Overflow = "native"
) -> npt.NDArray[np.float64]:
    return np.array([round_to_format(value, format, rounding=rounding, overflow=overflow) for value in values.tolist()])


# By hand


@pytest.mark.parametrize(
    ("name", "rounding", "values", "expected"),
    [
        ("E7M0", "nearest_even", [0.75, 1.5, 3, 6], [0.5, 2, 2, 8]),
        ("E7M0", "nearest_away", [0.75, 1.5, 3, 6], [1, 2, 4, 8]),
        ("E7M0", "toward_zero", [0.75, 1.5, 3.9, 7.9], [0.5, 1, 2, 4]),
        ("E2M5", "nearest_even", [1 + 1 / 64, 1 + 3 / 64, -1 - 1 / 64], [1, 1 + 1 / 16, -1]),
        ("E2M5", "nearest_away", [1 + 1 / 64, 1 + 3 / 64, -1 - 1 / 64], [1 + 1 / 32, 1 + 1 / 16, -1 - 1 / 32]),
        ("E2M5", "toward_zero", [1.999, -1.999, 1 / 33], [1.96875, -1.96875, 0]),
        ("E0M7", "nearest_even", [1 / 256, 3 / 256, -0.5], [0, 1 / 64, -0.5]),
        ("E4M3", "nearest_even", [2.0**-10, 3 * 2.0**-10, 449, 464], [0, 2.0**-8, 448, 448]),
        ("E4M3", "toward_zero", [479.99, 2.0**-9 * 0.999], [448, 0]),
        ("float4_e2m1fn", "nearest_even", [0.25, 0.75, 1.25, 2.5, 5, 7], [0, 1, 1, 2, 4, 6]),
        ("float8_e8m0fnu", "nearest_even", [0.75, 1.5, 3, 6, 1e-45], [0.5, 2, 2, 8, 2.0**-127]),
        ("float8_e8m0fnu", "nearest_even", [1.5 * 2.0**-127, 1.51 * 2.0**-127], [2.0**-127, 2.0**-126]),
        ("float8_e8m0fnu", "nearest_away", [0.75, 1.5, 3, 6, 1.5 * 2.0**-127], [1, 2, 4, 8, 2.0**-126]),
        ("float8_e8m0fnu", "toward_zero", [0.75, 1.99, 3.99, 2.0**-130], [0.5, 1, 2, 2.0**-127]),
        ("binary8p1se", "nearest_even", [0.75, 1.5, 3, 6, 1.5 * 2.0**62], [1, 1, 4, 4, 2.0**62]),
        ("binary8p7sf", "nearest_even", [1.984375 + 2.0**-8, -1e-9], [1.984375, 0]),
    ],
)
def test_by_hand(name: str, rounding: Rounding, values: list[float], expected: list[float]) -> None:
    assert [round_to_format(float(value), parse(name), rounding=rounding) for value in values] == expected


@pytest.mark.parametrize(
    ("name", "overflow", "finite", "infinite"),
    [
        ("E5M2", "native", math.inf, math.inf),
        ("E5M2", "saturate", 57344.0, 57344.0),
        ("E5M2", "saturate_finite", 57344.0, math.inf),
        ("E4M3", "native", math.nan, math.nan),
        ("E4M3", "saturate", 448.0, 448.0),
        ("E4M3", "saturate_finite", 448.0, math.inf),
        ("E3M4", "native", 124.0, 124.0),
        ("E3M4", "saturate", 124.0, 124.0),
        ("E3M4", "saturate_finite", 124.0, math.inf),
        ("binary8p3se", "native", math.inf, math.inf),
        ("binary8p3se", "saturate", 49152.0, 49152.0),
        ("binary8p3se", "saturate_finite", 49152.0, math.inf),
        ("binary8p3sf", "native", math.nan, math.nan),
        ("binary8p3sf", "saturate", 57344.0, 57344.0),
    ],
)
def test_overflow_policies(name: str, overflow: Overflow, finite: float, infinite: float) -> None:
    for value, expected in ((1e30, finite), (math.inf, infinite)):
        for sign in (1, -1):
            assert same(round_to_format(sign * value, parse(name), overflow=overflow), sign * expected)
            assert same(quantize_reference(np.array([sign * value]), parse(name), overflow=overflow), [sign * expected])


@pytest.mark.parametrize(
    ("overflow", "finite", "infinite"),
    [("native", math.nan, math.nan), ("saturate", 2.0**127, 2.0**127), ("saturate_finite", 2.0**127, math.inf)],
)
def test_without_a_sign(overflow: Overflow, finite: float, infinite: float) -> None:
    """Neither zero nor anything negative has a code; what is small becomes the smallest; above, as elsewhere."""
    values = np.array([0.0, -0.0, -1.0, -1e-300, -math.inf, math.nan, 1e-300, 1e300, math.inf])
    expected = [*[math.nan] * 6, 2.0**-127, finite, infinite]
    assert same(one_by_one(values, E8M0, overflow=overflow), expected)
    assert same(quantize_reference(values, E8M0, overflow=overflow), expected)


@small_formats
def test_nan_stays_nan(format: Format) -> None:
    for overflow in OVERFLOWS:
        assert math.isnan(round_to_format(math.nan, format, overflow=overflow))
        assert np.isnan(quantize_reference(np.array([math.nan, -math.nan]), format, overflow=overflow)).all()


@signed_formats
def test_zero_keeps_its_sign_where_the_format_has_minus_zero(format: Format) -> None:
    values = np.array([0.0, -0.0, -1e-300, 1e-300])
    negative = -0.0 if format.has_negative_zero else 0.0
    expected = [0.0, negative, negative, 0.0]
    assert same(quantize_reference(values, format), expected)
    for rounding in ("nearest_even", "nearest_away", "toward_zero"):
        assert same(one_by_one(values, format, rounding), expected)
    assert same(round_to_format(-1e-300, format, rounding="stochastic", random_bits=0), negative)


@small_formats
def test_what_is_on_the_grid_stays(format: Format) -> None:
    grid = format.code_book()
    grid = grid[np.isfinite(grid)]
    for overflow in OVERFLOWS:
        assert same(quantize_reference(grid, format, overflow=overflow), grid)
        for rounding in ("nearest_even", "nearest_away", "toward_zero"):
            assert same(one_by_one(grid[::37], format, rounding, overflow), grid[::37])


@small_formats
def test_the_edge_of_overflow(format: Format) -> None:
    """Half a quantum beyond max is the tie: it goes to max if that code is even."""
    top = Fraction(format.max_representable_value)
    quantum = Fraction(2) ** (max(format.max_exponent, format.min_exponent) - format.mantissa_bits)
    tie, sliver = top + quantum / 2, quantum / 2**40
    beyond = format.overflow_value
    assert same(round_to_format(tie - sliver, format), float(top))
    assert same(round_to_format(tie + sliver, format), beyond)
    assert same(round_to_format(tie, format), float(top) if format.max_code % 2 == 0 else beyond)


@pytest.mark.parametrize(
    ("rounding", "overflow"), [("up", "native"), ("nearest_even", "wrap"), ("", ""), (None, "native")]
)
def test_unknown_modes(rounding: str, overflow: str) -> None:
    with pytest.raises(ValueError, match=r"unknown (rounding|overflow)"):
        check_modes(rounding, overflow)
    with pytest.raises(ValueError, match=r"unknown (rounding|overflow)"):
        round_to_format(1.0, parse("E5M2"), rounding=rounding, overflow=overflow)  # type: ignore[arg-type]


def test_arrays_keep_their_shape() -> None:
    assert quantize_reference(np.zeros((2, 3), np.float32), parse("E5M2")).shape == (2, 3)
    assert quantize_reference(np.ones((2, 3), np.float32), E8M0).shape == (2, 3)
    assert quantize_reference(np.zeros((0,), np.float32), parse("E5M2")).shape == (0,)


# Against each other


@small_formats
def test_the_references_agree_on_boundaries(format: Format) -> None:
    values = boundaries(format)
    for overflow in OVERFLOWS:
        looked_up = quantize_reference(values, format, overflow=overflow)
        assert same(one_by_one(values, format, overflow=overflow), looked_up), overflow


@given(st.floats(), st.sampled_from(DISTINCT), st.sampled_from(OVERFLOWS))
def test_the_references_agree(value: float, format: Format, overflow: Overflow) -> None:
    one = round_to_format(value, format, overflow=overflow)
    assert same(one, quantize_reference(np.array([value]), format, overflow=overflow)[0])


@given(st.floats(allow_nan=False, allow_infinity=False), st.sampled_from(DISTINCT), st.sampled_from(OVERFLOWS))
def test_fractions_and_integers_round_as_floats_do(value: float, format: Format, overflow: Overflow) -> None:
    expected = round_to_format(value if value else 0.0, format, overflow=overflow)  # a fraction has no -0
    assert same(round_to_format(Fraction(value), format, overflow=overflow), expected)
    if value.is_integer():
        assert same(round_to_format(int(value), format, overflow=overflow), expected)


@small_formats
def test_modes_differ_on_ties_alone(format: Format) -> None:
    """To the even code or away from zero; and truncation goes to the neighbour that is nearer zero."""
    values = boundaries(format)
    values = values[np.abs(values) < format.max_representable_value]
    even, away = one_by_one(values, format), one_by_one(values, format, "nearest_away")
    truncated = one_by_one(values, format, "toward_zero")
    differ = even != away if format.is_signed else (even != away) & ~np.isnan(even)
    assert (np.abs(values - even)[differ] == np.abs(values - away)[differ]).all()
    assert (np.abs(even) < np.abs(away))[differ].all()
    assert differ.any()
    above_least = np.abs(values) >= (0 if format.is_signed else format.code_book()[0])
    numbers = ~np.isnan(truncated) & above_least
    assert numbers.any()
    assert (np.abs(truncated) <= np.abs(values))[numbers].all()
    assert (np.abs(truncated) <= np.abs(even))[numbers].all()


# Stochastic rounding


@given(st.floats(-1e6, 1e6), st.sampled_from(DISTINCT), st.integers(0, 2**24 - 1), st.integers(1, 24))
def test_stochastic_rounding_stays_between_neighbours(value: float, format: Format, drawn: int, count: int) -> None:
    """It is one of the two neighbours; all zeros truncate; larger draws never round lower."""
    assume(format.is_signed or value > 0)
    results = [
        round_to_format(
            value, format, rounding="stochastic", overflow="saturate", random_bits=bits, stochastic_bits=count
        )
        for bits in (0, drawn % 2**count, 2**count - 1)
    ]
    truncated = round_to_format(value, format, rounding="toward_zero", overflow="saturate")
    assert results[0] == truncated
    assert sorted(map(abs, results)) == list(map(abs, results))
    code = format.to_bits(truncated, overflow="saturate") & format.magnitude_mask
    assert abs(results[2]) in {abs(truncated), format.to_real(min(code + 1, format.max_code))}


def test_stochastic_rounding_is_unbiased() -> None:
    """Over all draws of the top bits, up exactly as often as the fraction says."""
    draws = [k << 16 for k in range(256)]
    rounded = [
        round_to_format(1 + 77 / 256 / 4, parse("E5M2"), rounding="stochastic", random_bits=bits + 0xFFFF)
        for bits in draws
    ]
    assert rounded.count(1.25) == 77
    assert rounded.count(1.0) == 256 - 77


@pytest.mark.parametrize("count", range(1, 11))
@pytest.mark.parametrize("fraction", [0.0, 2.0**-11, 0.3, 0.5, 77 / 256, 1 - 2.0**-11])
def test_few_random_bits_go_up_as_often_as_they_can_tell(fraction: float, count: int) -> None:
    """floor(f * 2^N) draws of the 2^N, whatever is left of f: with few bits it leans toward zero."""
    rounded = [
        round_to_format(
            -(1 + fraction / 8), parse("E4M3"), rounding="stochastic", random_bits=bits, stochastic_bits=count
        )
        for bits in range(2**count)
    ]
    assert rounded.count(-1.125) == math.floor(fraction * 2**count)
    assert rounded.count(-1.0) == 2**count - math.floor(fraction * 2**count)


@pytest.mark.parametrize("count", [1, 5, 24])
def test_random_bits_beyond_those_used_are_ignored(count: int) -> None:
    def rounded(bits: int) -> float:
        return round_to_format(1.15, parse("E5M2"), rounding="stochastic", random_bits=bits, stochastic_bits=count)

    for low in (0, 123 % 2**count, 2**count - 1):
        assert rounded(low) == rounded(low + 2**count * 0xFF) == rounded(low - 2**31)
    assert rounded(0) != rounded(2**count - 1)


def test_stochastic_overflow_follows_the_policy() -> None:
    """Between max and the next power of two of steps, the draw decides whether it overflows."""
    for overflow, beyond in (("native", math.nan), ("saturate", 448.0), ("saturate_finite", 448.0)):
        low, high = (
            round_to_format(464.0, parse("E4M3"), rounding="stochastic", overflow=overflow, random_bits=bits)
            for bits in (0, 2**24 - 1)
        )
        assert same([low, high], [448.0, beyond])


@pytest.mark.parametrize(("rounding", "random_bits"), [("stochastic", None), ("nearest_even", 5), ("toward_zero", 0)])
def test_random_bits_go_with_stochastic_rounding(rounding: Rounding, random_bits: int | None) -> None:
    with pytest.raises(ValueError, match="random_bits"):
        round_to_format(1.0, parse("E5M2"), rounding=rounding, random_bits=random_bits)


@pytest.mark.parametrize("count", [0, -1, 25, 1.0, True, None, "8"])
def test_numbers_of_random_bits(count: object) -> None:
    message = rf"stochastic_bits is {count!r}; expected an integer from 1 to 24"
    with pytest.raises(ValueError, match=message):
        check_stochastic_bits(count)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        round_to_format(1.0, E8M0, rounding="stochastic", random_bits=0, stochastic_bits=count)  # type: ignore[arg-type]


# Against ml_dtypes and NumPy


def all_of_sixteen_bits() -> dict[str, npt.NDArray[np.generic]]:
    """All values of bfloat16 and float16, quiet NaN for the signalling ones."""
    codes = np.arange(2**16, dtype=np.uint16)
    both = {"bfloat16": codes.view(ml_dtypes.bfloat16), "float16": codes.view(np.float16)}
    with np.errstate(invalid="ignore"):
        return {name: np.where(np.isnan(values), values.dtype.type(math.nan), values) for name, values in both.items()}


def cast_by_dtype(values: npt.NDArray[np.generic], format: Format) -> npt.NDArray[np.float64]:
    with np.errstate(over="ignore", under="ignore"):
        return values.astype(format.dtype).astype(np.float64)


@pytest.mark.parametrize("source", ["bfloat16", "float16"])
@pytest.mark.parametrize("format", [known for known in ML_DTYPES if known.is_signed], ids=str)
def test_all_inputs_of_sixteen_bits_as_ml_dtypes_rounds_them(format: Format, source: str) -> None:
    """float6 and float4 have no NaN: theirs becomes zero, ours stays."""
    values = all_of_sixteen_bits()[source]
    wide = values.astype(np.float32)
    ours = quantize_reference(wide, format)
    if not format.has_nan:
        assert (cast_by_dtype(values, format)[np.isnan(wide)] == 0).all()
        assert np.isnan(ours[np.isnan(wide)]).all()
        values, wide, ours = values[~np.isnan(wide)], wide[~np.isnan(wide)], ours[~np.isnan(wide)]
    assert same(ours, cast_by_dtype(wide, format))
    assert same(ours, cast_by_dtype(values, format))


@pytest.mark.parametrize("format", [known for known in ML_DTYPES if known.is_signed], ids=str)
def test_float32_as_ml_dtypes_rounds_it(format: Format) -> None:
    random = RANDOM.integers(0, 2**32, 3000, dtype=np.uint32).view(np.float32)
    with np.errstate(over="ignore"):
        edges = boundaries(format, most=40).astype(np.float32)
    values = np.concatenate([random, edges, np.nextafter(edges, np.float32(0)), np.nextafter(edges, np.float32(1e38))])
    values = values[~np.isnan(values)]
    ours = one_by_one(values, format)
    assert same(ours, cast_by_dtype(values, format))
    assert same(ours, quantize_reference(values, format))


@pytest.mark.parametrize("name", FINITE_ML_DTYPES)
def test_ml_dtypes_turns_nan_into_zero_of_the_other_sign(name: str) -> None:
    """float6 and float4 have nothing else to say; to_bits gives code 0, whatever the sign of the NaN."""
    minus_zero = parse(name).sign_mask
    theirs = np.array([math.nan, -math.nan], np.float32).astype(parse(name).dtype).view(np.uint8)
    assert theirs.tolist() == [minus_zero, 0]
    assert [parse(name).to_bits(math.nan), parse(name).to_bits(-math.nan)] == [0, 0]


@pytest.mark.parametrize("name", ["E4M3", "E5M2", "float8_e4m3", "float8_e3m4", "bf16", "fp16"])
def test_nan_codes_of_ml_dtypes_carry_a_sign(name: str) -> None:
    """Its quiet NaN is ours with the sign of the input; ours is always positive."""
    known = parse(name)
    nan = np.array([math.nan, -math.nan], np.float32).astype(known.dtype)
    codes = nan.view(f"u{nan.dtype.itemsize}").tolist()
    assert codes == [known.nan_code, known.nan_code | known.sign_mask]  # type: ignore[operator]
    assert known.to_bits(-math.nan) == known.nan_code


@pytest.mark.parametrize("name", ["float8_e4m3fnuz", "float8_e4m3b11fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"])
def test_the_one_nan_code_of_ml_dtypes_is_ours(name: str) -> None:
    known = parse(name)
    values = np.array([math.nan, -math.nan, math.inf, -math.inf], np.float32)
    assert values.astype(known.dtype).view(np.uint8).tolist() == [known.nan_code] * 4
    assert [known.to_bits(value) for value in values.tolist()] == [known.nan_code] * 4


@pytest.mark.parametrize("source", ["bfloat16", "float16"])
def test_ml_dtypes_rounds_ties_of_e8m0_away(source: str) -> None:
    """It is our nearest_away; our nearest_even, the default, differs on ties alone: on every other one."""
    values = all_of_sixteen_bits()[source].astype(np.float32)
    values = values[~rounded_up_from_subnormals(values)]
    theirs, even = cast_by_dtype(values, E8M0), quantize_reference(values, E8M0)
    assert same(one_by_one(values, E8M0, "nearest_away"), theirs)
    differ = ~((even == theirs) | (np.isnan(even) & np.isnan(theirs)))
    mantissa, exponent = np.frexp(values[differ])
    assert (mantissa == 0.75).all(), "half way between two powers of two"
    assert sorted(exponent - 1) == {"bfloat16": [*range(-127, 128, 2)], "float16": [*range(-23, 16, 2)]}[source]
    assert (even[differ] == np.ldexp(1.0, exponent - 1)).all()
    beyond = exponent - 1 == 127
    assert same(theirs[differ], np.where(beyond, math.nan, np.ldexp(1.0, exponent)))


def rounded_up_from_subnormals(values: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    return (values > 2.0**-127) & (values < 1.5 * 2.0**-127)


def test_ml_dtypes_rounds_float32_subnormals_above_the_smallest_scale_up() -> None:
    """From anywhere above 2^-127, although 2^-127 is nearer below 1.5 * 2^-127. Ours takes the nearer."""
    bits = np.arange(0x40_0001, 0x60_0000, 997, dtype=np.uint32)
    values = bits.view(np.float32)
    assert rounded_up_from_subnormals(values).all()
    assert (cast_by_dtype(values, E8M0) == 2.0**-126).all()
    for rounding in ("nearest_even", "nearest_away", "toward_zero"):
        assert (one_by_one(values, E8M0, rounding) == 2.0**-127).all()
    assert (quantize_reference(values, E8M0) == 2.0**-127).all()


@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "float8_e5m2", "float6_e3m2fn", "float4_e2m1fn"])
def test_ml_dtypes_rounds_float64_twice(name: str) -> None:
    """By way of float32: what lies closer to a tie than float32 can tell is a tie to it. Ours rounds once."""
    known = parse(name)
    half = 2.0 ** -(known.mantissa_bits + 1)
    above_even, below_even = 1 + half + 2.0**-40, 1 + 3 * half - 2.0**-40
    values = np.array([above_even, below_even])
    assert cast_by_dtype(values, known).tolist() == [1.0, 1 + 4 * half]
    assert cast_by_dtype(values, known).tolist() == cast_by_dtype(values.astype(np.float32), known).tolist()
    assert one_by_one(values, known).tolist() == [1 + 2 * half, 1 + 2 * half]
    assert quantize_reference(values, known).tolist() == [1 + 2 * half, 1 + 2 * half]


def test_numpy_rounds_float64_to_float16_once() -> None:
    values = np.array([1 + 2.0**-11 + 2.0**-40, 1 + 3 * 2.0**-11 - 2.0**-40])
    assert same(one_by_one(values, parse("fp16")), values.astype(np.float16).astype(np.float64))


# Against gfloat: rounding


def gfloat_rounds(
    values: npt.NDArray[np.float64], format: Format, mode: RoundMode, saturate: bool
) -> npt.NDArray[np.float64]:
    info = gfloat_info(format)
    return np.array([round_float(info, value, mode, saturate) for value in values.tolist()])


@signed_formats
@nearest_modes
def test_gfloat_rounds_to_nearest_as_we_do(format: Format, rounding: Rounding, mode: RoundMode) -> None:
    """``sat=False`` is our native, ``sat=True`` our saturate, on float32 values."""
    with np.errstate(over="ignore"):
        values = np.unique(boundaries(format).astype(np.float32)).astype(np.float64)
    values = values if format.has_nan else values[~np.isnan(values)]
    ours = one_by_one(values, format, rounding, "saturate")
    assert same(ours, gfloat_rounds(values, format, mode, saturate=True))
    assert same(ours, round_ndarray(gfloat_info(format), values, mode, sat=True))
    native = one_by_one(values, format, rounding, "native")
    if format.has_nan:
        assert same(native, gfloat_rounds(values, format, mode, saturate=False))
        assert same(native, round_ndarray(gfloat_info(format), values, mode, sat=False))
    else:
        assert same(native, ours)


@signed_formats
def test_gfloat_truncates_as_we_do_up_to_max(format: Format) -> None:
    """Its ``TowardZero`` never overflows a finite value (IEEE 754); ours takes what a longer grid would hold."""
    values = boundaries(format)
    values = values if format.has_nan else values[~np.isnan(values)]
    ours = one_by_one(values, format, "toward_zero", "saturate")
    assert same(ours, gfloat_rounds(values, format, RoundMode.TowardZero, saturate=True))
    if format.has_nan:
        beyond = math.ldexp(*format.finite_parts(format.max_code + 1))
        native = one_by_one(values, format, "toward_zero", "native")
        theirs = gfloat_rounds(values, format, RoundMode.TowardZero, saturate=False)
        within = ~((np.abs(values) >= beyond) & np.isfinite(values))
        assert same(native[within], theirs[within])
        assert (~within).any()
        assert (np.abs(theirs[~within]) == format.max_representable_value).all()
        assert same(native[~within], np.copysign(format.overflow_value, values[~within]))


@pytest.mark.parametrize("format", [known for known in SIGNED if not known.has_nan], ids=str)
def test_gfloat_refuses_what_finite_formats_cannot_hold(format: Format) -> None:
    """Ours: ±max for what overflows, and NaN remains NaN."""
    info = gfloat_info(format)
    for value in (math.inf, -2 * format.max_representable_value):
        with pytest.raises(ValueError, match="No Infs or NaNs"):
            round_float(info, value)
        assert abs(round_to_format(value, format)) == format.max_representable_value
    with pytest.raises(ValueError, match="No NaN"):
        round_float(info, math.nan, sat=True)
    assert math.isnan(round_to_format(math.nan, format))


@pytest.mark.parametrize("format", [known for known in SIGNED if known.has_nan], ids=str)
def test_saturating_finite_values_alone_is_between_the_two_of_gfloat(format: Format) -> None:
    """``sat=True`` for what is finite; ±inf as ``sat=False`` has it, or, in a format without inf, as it came."""
    values = boundaries(format)
    finite = np.isfinite(values)
    ours = one_by_one(values, format, overflow="saturate_finite")
    assert same(ours[finite], gfloat_rounds(values[finite], format, RoundMode.TiesToEven, saturate=True))
    assert same(ours[~finite], values[~finite])
    native = gfloat_rounds(values[~finite], format, RoundMode.TiesToEven, saturate=False)
    assert same(ours[~finite], native) == format.has_inf


def test_gfloat_adds_a_half_to_round_ties_away() -> None:
    """In float64, so that the largest fraction below a half counts as one; float32 values do not come near."""
    e5m2, value = parse("E5M2"), 2.0**-16 * float(np.nextafter(0.5, 0))
    assert round_float(gfloat_info(e5m2), value, RoundMode.TiesToAway) == 2.0**-16
    assert round_ndarray(gfloat_info(e5m2), np.array([value]), RoundMode.TiesToAway).tolist() == [0.0]
    assert round_to_format(value, e5m2, rounding="nearest_away") == 0.0


@nearest_modes
def test_gfloat_rounds_scales_as_we_do_within_their_range(rounding: Rounding, mode: RoundMode) -> None:
    values = boundaries(E8M0)
    values = values[(values >= 2.0**-127) | np.isnan(values)]
    assert same(one_by_one(values, E8M0, rounding), gfloat_rounds(values, E8M0, mode, saturate=False))
    assert same(one_by_one(values, E8M0, rounding, "saturate"), gfloat_rounds(values, E8M0, mode, saturate=True))


@pytest.mark.parametrize(
    ("value", "theirs", "ours"), [(0.0, 0.0, math.nan), (-1.5, -1.0, math.nan), (2.0**-130, 2.0**-130, 2.0**-127)]
)
def test_gfloat_leaves_scales_that_have_no_code(value: float, theirs: float, ours: float) -> None:
    """Zero, negative values and what is below 2^-127 come out of its rounding although E8M0 has none of them."""
    assert same(round_float(gfloat_info(E8M0), value), theirs)
    assert same(round_to_format(value, E8M0), ours)


@small_formats
def test_gfloat_encodes_what_it_rounds_as_we_do(format: Format) -> None:
    info, values = gfloat_info(format), boundaries(format, most=60)
    values = values[~np.isnan(values) & ((values >= 2.0**-127) | format.is_signed)]
    rounded = gfloat_rounds(values, format, RoundMode.TiesToEven, saturate=True)
    theirs = [encode_float(info, value) for value in rounded.tolist()]
    assert [format.to_bits(value, overflow="saturate") for value in values.tolist()] == theirs


# Against gfloat: stochastic rounding


def stochastic_both(
    mode: RoundMode, value: float, format: Format, bits: int, count: int, overflow: Overflow = "native"
) -> tuple[float, float]:
    theirs = round_float(gfloat_info(format), value, mode, overflow == "saturate", srbits=bits, srnumbits=count)
    ours = round_to_format(
        value, format, rounding="stochastic", overflow=overflow, random_bits=bits, stochastic_bits=count
    )
    return ours, theirs


@pytest.mark.parametrize("count", range(1, 25))
def test_our_stochastic_rounding_is_the_fastest_of_gfloat(count: int) -> None:
    """floor(f * 2^N) + bits >= 2^N, which for integer bits is f + bits / 2^N >= 1."""
    rng = np.random.default_rng(count)
    for known in P3109 + [known for known in SIGNED if known.has_nan and known not in P3109]:
        top = min(known.max_representable_value, 1e38)
        least = known.smallest_subnormal or known.min_normal or 1.0
        inside = np.exp(rng.uniform(math.log(least), math.log(top), 8))
        for value in np.float32([1.0, top * 1.01, least * 0.7, least * 1.3, *inside]).tolist():
            for bits in (0, 2**count - 1, *rng.integers(0, 2**count, 3).tolist()):
                signed = -value if bits % 2 else value
                assert same(*stochastic_both(RoundMode.StochasticFastest, signed, known, bits, count))
                assert same(*stochastic_both(RoundMode.StochasticFastest, signed, known, bits, count, "saturate"))


@given(
    st.floats(width=32, allow_nan=False),
    st.sampled_from([known for known in SIGNED if known.has_nan]),
    st.data(),
    st.integers(1, 24),
)
def test_our_stochastic_rounding_is_the_fastest_of_gfloat_for_any_float32(
    value: float, format: Format, data: st.DataObject, count: int
) -> None:
    bits = data.draw(st.integers(0, 2**count - 1))
    assert same(*stochastic_both(RoundMode.StochasticFastest, value, format, bits, count))


@pytest.mark.parametrize(
    ("mode", "fraction", "bits", "count", "why"),
    [
        (RoundMode.StochasticFast, 0.25, 1, 1, "adds half a step to the bits: 0.25 + 1.5 / 2 >= 1"),
        (RoundMode.Stochastic, 0.375, 1, 1, "rounds f * 2^N to nearest, ties to even: 0.75 becomes 1"),
        (RoundMode.Stochastic, 0.875, 0, 1, "and 1.75 becomes 2, so that even bits of 0 go up"),
        (RoundMode.StochasticOdd, 0.25, 1, 1, "rounds f * 2^N to nearest, ties to odd: 0.5 becomes 1"),
    ],
)
def test_other_stochastic_modes_of_gfloat_differ(
    mode: RoundMode, fraction: float, bits: int, count: int, why: str
) -> None:
    ours, theirs = stochastic_both(mode, 1 + fraction / 8, parse("binary8p4se"), bits, count)
    assert (ours, theirs) == (1.0, 1.125), why


def test_the_modes_of_gfloat_agree_where_all_fractions_are_whole_numbers_of_bits() -> None:
    """A value of M + N mantissa bits leaves N bits to cut, and then only StochasticFast's half step changes nothing."""
    for mode in (RoundMode.Stochastic, RoundMode.StochasticOdd, RoundMode.StochasticFast, RoundMode.StochasticFastest):
        for fraction in range(16):
            for bits in range(16):
                ours, theirs = stochastic_both(mode, 1 + fraction / 128, parse("binary8p4se"), bits, 4)
                assert ours == theirs


def test_gfloat_adds_the_random_bits_in_float64() -> None:
    """A fraction a sliver below 2^-24 is lost in the sum, which becomes 1; no float32 value has such a fraction."""
    value = 2.0**-10 * (2.0**-24 - 2.0**-77)
    ours, theirs = stochastic_both(RoundMode.StochasticFastest, value, parse("binary8p4se"), 2**24 - 1, 24)
    assert (ours, theirs) == (0.0, 2.0**-10)

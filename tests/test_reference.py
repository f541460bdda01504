"""The references: by hand on values where the answer is known, and against each other."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from altgrad_core.formats import FORMAT_REGISTRY, OVERFLOWS, Format, Overflow, Rounding, parse
from altgrad_core.reference import check_modes, quantize_reference, round_to_format

SMALL = [known for known in FORMAT_REGISTRY.values() if known.bits <= 16]
small_formats = pytest.mark.parametrize("format", SMALL, ids=str)


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
    ],
)
def test_overflow_policies(name: str, overflow: Overflow, finite: float, infinite: float) -> None:
    for value, expected in ((1e30, finite), (math.inf, infinite)):
        for sign in (1, -1):
            actual = [
                round_to_format(sign * value, parse(name), overflow=overflow),
                float(quantize_reference(np.array([sign * value]), parse(name), overflow=overflow)[0]),
            ]
            assert actual == [sign * expected] * 2 or (math.isnan(expected) and all(map(math.isnan, actual)))


@small_formats
@pytest.mark.parametrize("overflow", OVERFLOWS)
def test_nan_stays_nan_and_zero_keeps_its_sign(format: Format, overflow: Overflow) -> None:
    assert math.isnan(round_to_format(math.nan, format, overflow=overflow))
    result = quantize_reference(np.array([math.nan, 0.0, -0.0, -1e-300]), format, overflow=overflow)
    assert math.isnan(result[0])
    assert result[1:].tolist() == [0, 0, 0]
    assert np.signbit(result[1:]).tolist() == [False, True, True]
    assert math.copysign(1, round_to_format(-0.0, format)) == -1
    assert math.copysign(1, round_to_format(-1e-300, format)) == -1


@small_formats
def test_what_is_on_the_grid_stays(format: Format) -> None:
    grid = format.code_book()
    grid = grid[np.isfinite(grid)]
    assert np.array_equal(quantize_reference(grid, format), grid)
    for rounding in ("nearest_even", "nearest_away", "toward_zero"):
        assert all(round_to_format(value, format, rounding=rounding) == value for value in grid[::37].tolist())


@small_formats
def test_the_edge_of_overflow(format: Format) -> None:
    """Half a quantum beyond max is the tie: it goes to max if that code is even."""
    top = Fraction(format.max_representable_value)
    quantum = top - Fraction(format.to_real(format.max_code - 1)) if format.mantissa_bits else top
    tie, sliver = top + quantum / 2, quantum / 2**40
    beyond = format.overflow_value
    for value, expected in ((tie - sliver, float(top)), (tie + sliver, beyond)):
        actual = round_to_format(value, format)
        assert actual == expected or (math.isnan(actual) and math.isnan(expected))
    at = round_to_format(tie, format)
    assert (at == float(top)) == (format.max_code % 2 == 0 or beyond == float(top))


@given(st.floats(), st.sampled_from(SMALL), st.sampled_from(OVERFLOWS))
def test_the_references_agree(value: float, format: Format, overflow: Overflow) -> None:
    one = round_to_format(value, format, overflow=overflow)
    many = float(quantize_reference(np.array([value]), format, overflow=overflow)[0])
    assert (math.isnan(one) and math.isnan(many)) or (one == many and math.copysign(1, one) == math.copysign(1, many))


@given(st.floats(-1e6, 1e6), st.sampled_from(SMALL), st.integers(0, 2**24 - 1))
def test_stochastic_rounding_stays_between_neighbours(value: float, format: Format, drawn: int) -> None:
    """It is one of the two neighbours; all zeros truncate; larger draws never round lower."""
    results = [
        round_to_format(value, format, rounding="stochastic", overflow="saturate", random_bits=bits)
        for bits in (0, drawn, 2**24 - 1)
    ]
    truncated = round_to_format(value, format, rounding="toward_zero", overflow="saturate")
    assert results[0] == truncated
    assert sorted(map(abs, results)) == list(map(abs, results))
    code = format.to_bits(truncated, overflow="saturate") & (format.sign_mask - 1)
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


def test_random_bits_above_the_24th_are_ignored() -> None:
    low = round_to_format(1.1, parse("E5M2"), rounding="stochastic", random_bits=123)
    assert round_to_format(1.1, parse("E5M2"), rounding="stochastic", random_bits=123 + 2**24 * 0xFF) == low
    assert round_to_format(1.1, parse("E5M2"), rounding="stochastic", random_bits=123 - 2**31) == low


@pytest.mark.parametrize(("rounding", "random_bits"), [("stochastic", None), ("nearest_even", 5), ("toward_zero", 0)])
def test_random_bits_go_with_stochastic_rounding(rounding: Rounding, random_bits: int | None) -> None:
    with pytest.raises(ValueError, match="random_bits"):
        round_to_format(1.0, parse("E5M2"), rounding=rounding, random_bits=random_bits)


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
    assert quantize_reference(np.zeros((0,), np.float32), parse("E5M2")).shape == (0,)

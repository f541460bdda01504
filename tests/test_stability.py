"""The threshold of clipping, the checks of what users give, and the shifter's edges."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from types import MappingProxyType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from altgrad_core.clip_rules import check_quantile
from altgrad_core.errors import InputError
from altgrad_core.formats import EIGHT, FORMAT_REGISTRY, Format, UnknownFormatError, parse
from altgrad_core.norms import check_norm_type
from altgrad_core.scaling import check_window
from altgrad_core.stability import (
    CLIP_EPSILON,
    FORMAT_FALLBACK,
    EmergencyMantissaShift,
    check_base_clip,
    check_epsilon,
    check_max_norm,
    check_rate,
    clip_threshold,
)

SELECTED = [name for name, known in FORMAT_REGISTRY.items() if known.max_representable_value < 2.0**65]
"""Of which no threshold overflows float32 under the bases tried; the eight are among them."""


@pytest.mark.parametrize(
    ("name", "ratio"),
    [
        ("E0M7", Fraction(127, 128) / 57344),
        ("E1M6", Fraction(127, 32) / 57344),
        ("E2M5", Fraction(63, 8) / 57344),
        ("E3M4", Fraction(124, 57344)),
        ("E4M3", Fraction(448, 57344)),
        ("E5M2", Fraction(1)),
        ("E6M1", Fraction(3 * 2**31, 57344)),
        ("E7M0", Fraction(2**64, 57344)),
    ],
)
def test_threshold_is_the_ratio_of_ranges(name: str, ratio: Fraction) -> None:
    assert clip_threshold(name) == float(np.float32(float(ratio)))
    assert clip_threshold(FORMAT_REGISTRY[name]) == clip_threshold(name)


@given(st.floats(1e-20, 1e15), st.sampled_from(SELECTED))
def test_threshold_follows_the_base(base: float, name: str) -> None:
    """Rounded to float32 before and after, and in between exact but for float64's last bit."""
    exact = Fraction(float(np.float32(base))) * Fraction(FORMAT_REGISTRY[name].max_representable_value) / 57344
    threshold = clip_threshold(name, base)
    assert threshold == float(np.float32(threshold))
    assert abs(Fraction(threshold) - exact) <= exact * (Fraction(1, 2**24) + Fraction(1, 2**50))


def test_thresholds_of_equal_formats_are_equal() -> None:
    """By any name, and of the format as it is; all but the eight too."""
    for known in FORMAT_REGISTRY.values():
        twins = [name for name, other in FORMAT_REGISTRY.items() if other == known]
        thresholds = {clip_threshold(name, 0.3) for name in [*twins, known, replace(known, name="mine")]}
        assert len(thresholds) == 1
    assert clip_threshold("float8_e4m3fn") == clip_threshold("E4M3") == 448 / 57344
    assert clip_threshold("binary8p3sf") == 1.0
    assert clip_threshold("float8_e3m4") == float(np.float32(15.5 / 57344))


def test_thresholds_beyond_float32_are_infinite() -> None:
    """Nothing is clipped, without a warning."""
    assert clip_threshold("float8_e8m0fnu", 1e6) == math.inf
    assert math.isfinite(clip_threshold("float8_e8m0fnu", 1.0))


def test_known_thresholds() -> None:
    assert round(clip_threshold("E3M4"), 5) == 0.00216
    assert clip_threshold("E7M0") == pytest.approx(3.2e14, rel=0.01)
    assert CLIP_EPSILON == 1e-6


@pytest.mark.parametrize(
    "base_clip", [0, 0.0, -1.0, math.inf, -math.inf, math.nan, "1", None, [1.0], True, pytest.param(10**400, id="huge")]
)
def test_base_clip_is_a_positive_finite_number(base_clip: object) -> None:
    with pytest.raises(ValueError, match="base_clip is"):
        check_base_clip(base_clip)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="base_clip is"):
        clip_threshold("E5M2", base_clip)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "base_clip", [1, 1e-30, np.float64(2.5), np.float32(0.1), np.float16(1), np.int64(3), Fraction(1, 3)]
)
def test_good_base_clips(base_clip: float) -> None:
    assert check_base_clip(base_clip) == float(base_clip)
    assert type(check_base_clip(base_clip)) is float


@pytest.mark.parametrize("rate", [-0.1, 1.1, math.nan, math.inf, -math.inf, "0.5", None, True])
def test_rates_lie_between_zero_and_one(rate: object) -> None:
    with pytest.raises(ValueError, match="some_rate is"):
        check_rate("some_rate", rate)  # type: ignore[arg-type]


@pytest.mark.parametrize("rate", [0, 1, 0.0, -0.0, 1.0, 5e-324, np.float64(0.3), np.float32(0.3), np.int64(1)])
def test_good_rates(rate: float) -> None:
    assert check_rate("some_rate", rate) == rate


def test_good_limits_of_norms() -> None:
    for good in (0, 1, np.float32(0.1), np.int64(2), math.inf):
        assert check_max_norm(good) == good
        assert type(check_max_norm(good)) is float
    for good in (0, 1e-6, np.float32(1e-6)):
        assert check_epsilon(good) == good
    for good in (1, np.float32(2), np.int64(3), math.inf):
        assert check_norm_type(good) == good


@pytest.mark.parametrize(
    "bad", [-1, np.float32(-1), math.nan, np.float32(np.nan), True, "1", None, pytest.param(10**400, id="huge")]
)
def test_bad_limits_of_norms(bad: object) -> None:
    for check in (check_max_norm, check_epsilon, check_norm_type):
        with pytest.raises(InputError, match=r"(max_norm|eps|norm_type) is"):
            check(bad)


def test_numpy_integers_are_windows() -> None:
    check_window(np.int64(4))
    assert check_quantile(np.float32(0.5), np.int64(8), "quantile") == (0.5, 8)
    for bad in (True, 0, 4.0, np.float32(4)):
        with pytest.raises(InputError, match="window is"):
            check_window(bad)


def test_threshold_of_an_unknown_format() -> None:
    with pytest.raises(UnknownFormatError, match="did you mean"):
        clip_threshold("E5M2x")


# The shifter


@pytest.mark.parametrize("nan_patience", [0, -1, 1.5, True, None, "3"])
def test_patience_is_a_positive_integer(nan_patience: object) -> None:
    with pytest.raises(ValueError, match="nan_patience is"):
        EmergencyMantissaShift(nan_patience=nan_patience)  # type: ignore[arg-type]


@pytest.mark.parametrize("stall_threshold", [-0.1, 1.5, math.nan])
def test_stall_threshold_is_a_rate(stall_threshold: float) -> None:
    with pytest.raises(ValueError, match="stall_threshold is"):
        EmergencyMantissaShift(stall_threshold=stall_threshold)


@pytest.mark.parametrize("stall_rate", [-0.1, 1.5, math.nan])
def test_stall_rate_is_a_rate(stall_rate: float) -> None:
    shifter = EmergencyMantissaShift()
    with pytest.raises(ValueError, match="stall_rate is"):
        shifter.check_and_shift("E3M4", has_nan=True, stall_rate=stall_rate)
    assert shifter.consecutive_nans == 0, "a refused observation is not counted"


@pytest.mark.parametrize(
    "name", ["float32", "bf16", "fp16", "E2M3", "e5m2", "", "E5M2b15", "E4M3b7", "float8_e3m4", "binary8p3se", None]
)
def test_formats_without_a_fallback_are_refused(name: str) -> None:
    """Also where nothing triggers: a run that cannot shift should say so at once."""
    with pytest.raises(ValueError, match="E7M0, E6M1, E5M2"):
        EmergencyMantissaShift().check_and_shift(name, has_nan=False, stall_rate=0.0)
    with pytest.raises(ValueError, match=rf"no fallback is known for format '{name}'"):
        EmergencyMantissaShift().is_exhausted(name)
    assert not EmergencyMantissaShift().knows(name)


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("float8_e4m3fn", "E4M3"),
        ("E4M3fn", "E4M3"),
        ("float8_e5m2", "E5M2"),
        ("E5M2ieee", "E5M2"),
        ("E1M6b0", "E1M6"),
        (parse("E7M0"), "E7M0"),
        (Format("mine", 3, 4, 1), "E3M4"),
        (Format("E5M2", 7, 0, 63), "E7M0"),
    ],
)
def test_equal_formats_fall_back_to_the_same(alias: str | Format, name: str) -> None:
    """What counts is the format, not what it is called."""
    shifter = EmergencyMantissaShift(nan_patience=1)
    assert shifter.knows(alias)
    assert shifter.check_and_shift(alias, has_nan=True, stall_rate=0.0) == FORMAT_FALLBACK[name]
    assert shifter.is_exhausted(alias) == (name == "E5M2")


def test_a_table_of_ones_own() -> None:
    class Towards16(EmergencyMantissaShift):
        FORMAT_FALLBACK = MappingProxyType({"float8_e5m2": "bf16", "bf16": None})

    shifter = Towards16(stall_threshold=0.0)
    assert shifter.check_and_shift("E5M2", has_nan=False, stall_rate=0.1) == "bf16"
    assert shifter.is_exhausted("bfloat16")
    with pytest.raises(ValueError, match="the known ones are float8_e5m2, bf16"):
        shifter.check_and_shift("E4M3", has_nan=False, stall_rate=0.1)


def test_patience_of_one_shifts_at_once() -> None:
    assert EmergencyMantissaShift(nan_patience=1).check_and_shift("E7M0", has_nan=True, stall_rate=0.0) == "E5M2"


@pytest.mark.parametrize(("threshold", "rate", "shifts"), [(0.0, 0.0, False), (0.0, 1e-9, True), (1.0, 1.0, False)])
def test_stall_thresholds_are_exceeded_not_reached(threshold: float, rate: float, shifts: bool) -> None:
    decision = EmergencyMantissaShift(stall_threshold=threshold).check_and_shift("E7M0", False, rate)
    assert (decision is not None) == shifts


def test_the_table_is_complete_and_fixed() -> None:
    assert sorted(FORMAT_FALLBACK) == sorted(EIGHT)
    assert EmergencyMantissaShift.FORMAT_FALLBACK is FORMAT_FALLBACK
    with pytest.raises(TypeError):
        FORMAT_FALLBACK["E5M2"] = "E3M4"  # type: ignore[index]


def test_shifters_do_not_share_their_count() -> None:
    one, other = EmergencyMantissaShift(), EmergencyMantissaShift()
    one.check_and_shift("E7M0", has_nan=True, stall_rate=0.0)
    assert (one.consecutive_nans, other.consecutive_nans) == (1, 0)

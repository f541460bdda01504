"""The fourteen cases that the idea came with, each through torch's class and, where it applies, JAX's element."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
import torch

from altgrad_core.stability import clip_threshold
from altgrad_jax.clipping import PartitionRelativeClipState, partition_relative_clip
from altgrad_torch import EmergencyMantissaShift, PartitionRelativeClipper


@pytest.fixture
def model() -> torch.nn.Module:
    """Gradients of norm 100, far above the thresholds of narrow formats."""
    model = torch.nn.Linear(50, 2, bias=False)
    model.weight.grad = torch.full((2, 50), 10.0)
    return model


def norm_after_jax(name: str, rate: float) -> tuple[float, PartitionRelativeClipState]:
    gradients = {"weight": jnp.full((2, 50), 10.0)}
    element = partition_relative_clip(name)
    clipped, state = element.update(gradients, element.init(gradients), overflow_rate=rate)
    return float(jnp.linalg.norm(clipped["weight"])), state


def norm_of(model: torch.nn.Module) -> float:
    return float(torch.linalg.vector_norm(torch.cat([parameter.grad.flatten() for parameter in model.parameters()])))


def test_01_threshold_of_e3m4_is_about_a_five_hundredth_of_e5m2() -> None:
    narrow, wide = PartitionRelativeClipper("E3M4"), PartitionRelativeClipper("E5M2")
    assert wide.clip_threshold == 1.0
    assert narrow.clip_threshold / wide.clip_threshold == pytest.approx(124 / 57344, rel=1e-7)
    assert narrow.clip_threshold / wide.clip_threshold == pytest.approx(0.002, rel=0.1)
    assert clip_threshold("E3M4") == narrow.clip_threshold


def test_02_no_clip_below_one_percent(model: torch.nn.Module) -> None:
    PartitionRelativeClipper("E3M4").clip_if_needed(model, overflow_rate=0.005)
    assert norm_of(model) == pytest.approx(100.0)
    norm, state = norm_after_jax("E3M4", 0.005)
    assert norm == pytest.approx(100.0)
    assert not state.clipped


def test_03_clip_at_one_percent(model: torch.nn.Module) -> None:
    PartitionRelativeClipper("E3M4").clip_if_needed(model, overflow_rate=0.01)
    assert norm_of(model) == pytest.approx(124 / 57344, rel=1e-6)
    norm, state = norm_after_jax("E3M4", 0.01)
    assert norm == pytest.approx(124 / 57344, rel=1e-6)
    assert state.clipped


def test_04_clip_above_one_percent(model: torch.nn.Module) -> None:
    PartitionRelativeClipper("E3M4").clip_if_needed(model, overflow_rate=0.02)
    assert norm_of(model) == pytest.approx(124 / 57344, rel=1e-6)
    norm, _ = norm_after_jax("E3M4", 0.02)
    assert norm == pytest.approx(124 / 57344, rel=1e-6)


@pytest.mark.parametrize(("rate", "clipped"), [(0.0, False), (0.0099, False), (0.01, True), (0.5, True)])
def test_05_the_flag_says_whether_it_clipped(model: torch.nn.Module, rate: float, clipped: bool) -> None:
    assert PartitionRelativeClipper("E3M4").clip_if_needed(model, overflow_rate=rate) is clipped
    assert bool(norm_after_jax("E3M4", rate)[1].clipped) is clipped


def test_06_the_range_of_e7m0_makes_its_threshold_huge(model: torch.nn.Module) -> None:
    clipper = PartitionRelativeClipper("E7M0")
    assert clipper.clip_threshold == pytest.approx(2.0**64 / 57344, rel=1e-7)
    assert clipper.clip_threshold > 1e14
    assert clipper.clip_if_needed(model, overflow_rate=0.5)
    assert norm_of(model) == pytest.approx(100.0)
    norm, state = norm_after_jax("E7M0", 0.5)
    assert norm == pytest.approx(100.0)
    assert state.clipped


def test_07_shift_after_three_nan_batches() -> None:
    shifter = EmergencyMantissaShift()
    assert [shifter.check_and_shift("E7M0", has_nan=True, stall_rate=0.0) for _ in range(3)] == [None, None, "E5M2"]


def test_08_shift_when_more_than_half_of_the_updates_stall() -> None:
    assert EmergencyMantissaShift().check_and_shift("E3M4", has_nan=False, stall_rate=0.51) == "E5M2"


def test_09_no_shift_when_exactly_half_of_the_updates_stall() -> None:
    assert EmergencyMantissaShift().check_and_shift("E3M4", has_nan=False, stall_rate=0.5) is None


def test_10_a_valid_batch_resets_the_count() -> None:
    shifter = EmergencyMantissaShift()
    seen = [True, True, False, True, True]
    assert [shifter.check_and_shift("E7M0", has_nan, 0.0) for has_nan in seen] == [None] * 5
    assert shifter.consecutive_nans == 2
    assert shifter.check_and_shift("E7M0", has_nan=True, stall_rate=0.0) == "E5M2"
    assert shifter.consecutive_nans == 0


def test_11_nothing_triggers_nothing() -> None:
    shifter = EmergencyMantissaShift()
    assert [shifter.check_and_shift("E7M0", has_nan=False, stall_rate=rate) for rate in (0.0, 0.1, 0.49)] == [None] * 3


@pytest.mark.parametrize(
    ("name", "fallback"),
    [
        ("E7M0", "E5M2"),
        ("E1M6", "E3M4"),
        ("E0M7", "E3M4"),
        ("E3M4", "E5M2"),
        ("E2M5", "E3M4"),
        ("E4M3", "E5M2"),
        ("E6M1", "E5M2"),
    ],
)
def test_12_each_arrow_of_the_fallback_chain(name: str, fallback: str) -> None:
    assert EmergencyMantissaShift().check_and_shift(name, has_nan=False, stall_rate=1.0) == fallback
    assert EmergencyMantissaShift.FORMAT_FALLBACK[name] == fallback


def test_13_e5m2_has_nowhere_to_go() -> None:
    shifter = EmergencyMantissaShift()
    assert [shifter.check_and_shift("E5M2", has_nan=True, stall_rate=1.0) for _ in range(5)] == [None] * 5
    assert shifter.is_exhausted("E5M2")
    assert not shifter.is_exhausted("E3M4")


@pytest.mark.parametrize(("nan_batches", "stall_rate"), [(3, 0.0), (0, 0.9), (3, 0.9)])
def test_14_either_trigger_is_enough(nan_batches: int, stall_rate: float) -> None:
    shifter = EmergencyMantissaShift()
    for _ in range(nan_batches - 1):
        shifter.check_and_shift("E1M6", has_nan=True, stall_rate=0.0)
    assert shifter.check_and_shift("E1M6", has_nan=nan_batches > 0, stall_rate=stall_rate) == "E3M4"


def test_the_element_works_under_jit() -> None:
    """The cases above go step by step; the same element inside one compiled program decides the same."""
    gradients = {"weight": jnp.full((2, 50), 10.0)}
    element = partition_relative_clip("E3M4")
    update = jax.jit(lambda rate: element.update(gradients, element.init(gradients), overflow_rate=rate)[1].clipped)
    assert [bool(update(rate)) for rate in (0.0, 0.009, 0.01, 0.02)] == [False, False, True, True]

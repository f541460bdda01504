"""The shifter: one object for both frameworks, and right for any sequence of observations."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

import altgrad_core
import altgrad_torch
from altgrad_core.formats import FORMAT_REGISTRY
from altgrad_core.stability import FORMAT_FALLBACK, EmergencyMantissaShift

OBSERVATIONS = st.lists(st.tuples(st.booleans(), st.floats(0, 1)), max_size=60)


def test_both_packages_have_the_same_object() -> None:
    jax_side = pytest.importorskip("altgrad_jax")
    assert altgrad_torch.EmergencyMantissaShift is altgrad_core.EmergencyMantissaShift is EmergencyMantissaShift
    assert altgrad_torch.FORMAT_FALLBACK is FORMAT_FALLBACK
    assert jax_side.EmergencyMantissaShift is EmergencyMantissaShift


@dataclass
class Model:
    """The rule once more, from the whole history instead of a count."""

    patience: int
    threshold: float
    since_reset: tuple[bool, ...] = ()

    def decide(self, current: str, has_nan: bool, stall_rate: float) -> str | None:
        self.since_reset += (has_nan,)
        last = self.since_reset[-self.patience :]
        if (len(last) == self.patience and all(last)) or stall_rate > self.threshold:
            self.since_reset = ()
            return FORMAT_FALLBACK[current]
        return None


@given(OBSERVATIONS, st.sampled_from(sorted(FORMAT_FALLBACK)), st.integers(1, 5), st.floats(0, 1))
def test_any_sequence(observations: list[tuple[bool, float]], start: str, patience: int, threshold: float) -> None:
    """Followed through the chain of formats, as a run would."""
    shifter = altgrad_torch.EmergencyMantissaShift(nan_patience=patience, stall_threshold=threshold)
    model, current = Model(patience, threshold), start
    for has_nan, stall_rate in observations:
        decision = shifter.check_and_shift(current, has_nan, stall_rate)
        assert decision == model.decide(current, has_nan, stall_rate)
        current = decision or current
        trailing = next((k for k, nan in enumerate(reversed(model.since_reset)) if not nan), len(model.since_reset))
        assert shifter.consecutive_nans == trailing


@given(OBSERVATIONS)
def test_reset_forgets(observations: list[tuple[bool, float]]) -> None:
    shifter = EmergencyMantissaShift()
    for has_nan, stall_rate in observations:
        shifter.check_and_shift("E7M0", has_nan, stall_rate)
    shifter.reset()
    assert shifter.consecutive_nans == 0
    assert shifter.check_and_shift("E7M0", has_nan=True, stall_rate=0.0) is None


@pytest.mark.parametrize("start", sorted(FORMAT_FALLBACK))
def test_every_chain_ends_in_e5m2(start: str) -> None:
    """Each arrow leads to a format with no smaller range, and none leads round in a circle."""
    seen: list[str] = [start]
    while (following := FORMAT_FALLBACK[seen[-1]]) is not None:
        assert following not in seen
        seen.append(following)
    assert seen[-1] == "E5M2"
    assert set(seen) <= set(FORMAT_REGISTRY)


def test_a_shift_resets_the_count() -> None:
    shifter = EmergencyMantissaShift()
    shifter.check_and_shift("E3M4", has_nan=True, stall_rate=0.0)
    assert shifter.check_and_shift("E3M4", has_nan=True, stall_rate=0.9) == "E5M2"
    assert shifter.consecutive_nans == 0

"""The policies on evidence made by hand: what each calls for, at its limits and below, and what it never does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from altgrad_core.errors import InputError
from altgrad_core.evidence import Evidence, Reading
from altgrad_core.formats import EIGHT, FORMAT_REGISTRY, ROUNDINGS, UnknownFormatError, parse
from altgrad_core.ladder import with_more_precision, with_more_range
from altgrad_core.policies import RULES, by_cause, fallback_chain, off, recover, relative_stall, rule_of
from altgrad_core.remedies import Remedy
from altgrad_core.settings import POLICY_NAMES, Policy
from altgrad_core.stability import FORMAT_FALLBACK, EmergencyMantissaShift

POLICY = Policy("by_cause")
SHIFTER = EmergencyMantissaShift()


def below(limit: float) -> float:
    return math.nextafter(limit, 0.0)


def above(limit: float) -> float:
    return math.nextafter(limit, 1.0)


def judged(format: str = "E4M3", rounding: Any = None, **rates: float) -> Evidence:
    return Evidence(99, format, start_format=format, rounding=rounding, window=Reading(1.0, **rates))


def told(calls: Sequence[Remedy]) -> list[tuple[str, object]]:
    return [(call.cause, call.format or call.rounding or call.learning_rate or call.scales) for call in calls]


# ---- the ladder


@pytest.mark.parametrize(
    ("name", "wider", "finer"),
    [
        ("E0M7", "E2M5", None),  # E1M6 is the same grid at another scale
        ("E1M6", "E2M5", None),
        ("E2M5", "E3M4", "E1M6"),
        ("E3M4", "E4M3", "E2M5"),
        ("E4M3", "E5M2", "E3M4"),
        ("E5M2", "E6M1", "E4M3"),
        ("E6M1", "E7M0", "E5M2"),
        ("E7M0", None, "E6M1"),
        ("float8_e4m3fn", "E5M2", "E3M4"),
        ("fp16", "E6M1", None),
    ],
)
def test_ladder(name: str, wider: str | None, finer: str | None) -> None:
    assert (with_more_range(name), with_more_precision(name)) == (wider, finer)


@given(st.sampled_from(sorted(FORMAT_REGISTRY)))
def test_ladder_stays_among_the_eight_and_never_goes_the_other_way(name: str) -> None:
    for step in (with_more_range, with_more_precision):
        following = step(name)
        assert following is None or (following in EIGHT and parse(following) != parse(name))
        climbed = [following]
        while (last := climbed[-1]) is not None:
            climbed.append(step(last))
        assert len(climbed) <= len(EIGHT) + 1


def test_ladder_needs_a_format() -> None:
    with pytest.raises(UnknownFormatError, match="E5M2"):
        with_more_range("E5M22x")


# ---- NaN, in every policy


@pytest.mark.parametrize("name", POLICY_NAMES)
@pytest.mark.parametrize("patience", [1, 3])
def test_nan_batches_shift_by_the_table_at_the_patience_and_not_before(name: Any, patience: int) -> None:
    shifter = EmergencyMantissaShift(nan_patience=patience)
    for count in range(1, patience + 2):
        failing = Evidence(9, "E1M6", start_format="E1M6", finite=False, consecutive_nans=count)
        calls = RULES[name](failing, POLICY, shifter)
        assert told(calls) == ([("nan", "E3M4")] if count >= patience else [])
    assert shifter.consecutive_nans == 0, "a policy is pure"
    assert not RULES[name](failing, POLICY, None)


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_exhausted_is_a_call_that_changes_nothing(name: Any) -> None:
    (call,) = RULES[name](Evidence(9, "E5M2", finite=False, consecutive_nans=3), POLICY, SHIFTER)
    assert call.kinds == ("exhausted",)
    assert call.numbers == {"consecutive_nans": 3}


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_without_a_window_no_rate_is_judged(name: Any) -> None:
    unjudged = Evidence(99, "E4M3", rounding="nearest_even", whole=True)
    assert not RULES[name](unjudged, POLICY, SHIFTER)


# ---- fallback_chain


@pytest.mark.parametrize("limit", [0.1, 0.5])
def test_fallback_chain_acts_above_the_threshold_and_not_at_it(limit: float) -> None:
    shifter = EmergencyMantissaShift(stall_threshold=limit)
    assert not fallback_chain(judged(stall=limit), POLICY, shifter)
    (call,) = fallback_chain(judged(stall=above(limit)), POLICY, shifter)
    assert (call.cause, call.format, call.limits) == ("stall", "E5M2", {})
    assert not off(judged(stall=1.0), POLICY, shifter)


# ---- relative_stall


def rising(now: Reading, previous: Reading, rounding: Any = "nearest_even") -> Evidence:
    return Evidence(99, "E3M4", rounding=rounding, window=now, whole=True, previous=previous, baseline=previous)


def test_relative_stall_at_its_limits() -> None:
    policy = Policy("relative_stall", moving_share=0.5, plateau=0.25)
    usual = Reading(2.0, stall=0.5)
    worse = Reading(2.0, stall=above(0.75))
    assert told(relative_stall(rising(worse, usual, "stochastic"), policy, SHIFTER)) == [("stall", "E5M2")]
    for calm in (
        replace(worse, stall=0.75),  # half of the usual share moves: not below half of it
        replace(worse, loss=1.75),  # has improved by the plateau
        replace(worse, stall=0.5),
    ):
        assert not relative_stall(rising(calm, usual, "stochastic"), policy, SHIFTER)
    improved = replace(worse, loss=1.76)
    assert told(relative_stall(rising(improved, usual, "stochastic"), policy, SHIFTER)) == [("stall", "E5M2")]


@pytest.mark.parametrize("shifter", [SHIFTER, None])
def test_relative_stall_rounds_stochastically_at_once(shifter: Any) -> None:
    """Without a baseline, a plateau or a format to shift to: no update that stalls is lost for longer than a window."""
    stalled = replace(judged(stall=above(0.5)), rounding="nearest_even")
    assert told(relative_stall(stalled, POLICY, shifter)) == [("stall", "stochastic")]
    for calm in (judged(stall=0.5), judged(stall=0.9, saturation=0.4)):
        assert not relative_stall(replace(calm, rounding="nearest_even"), POLICY, shifter)


@pytest.mark.parametrize(("rounding", "expected"), [("stochastic", [("stall", "E5M2")]), (None, [])])
def test_relative_stall_shifts_next_and_leaves_masters_alone(rounding: Any, expected: list[Any]) -> None:
    evidence = rising(Reading(1.0, stall=0.9), Reading(1.0, stall=0.6), rounding)
    assert told(relative_stall(evidence, POLICY, SHIFTER)) == expected
    assert not relative_stall(replace(evidence, whole=False), POLICY, SHIFTER)


# ---- by_cause

LIMITS = [
    ("overflow", POLICY.overflow_limit, "overflow", "E5M2"),
    ("worst_overflow", POLICY.worst_overflow_limit, "overflow", "E5M2"),
    ("underflow", POLICY.underflow_limit, "underflow", "E5M2"),
    ("worst_underflow", POLICY.worst_underflow_limit, "underflow", "E5M2"),
]


@pytest.mark.parametrize(("rate", "limit", "cause", "target"), LIMITS)
def test_by_cause_acts_at_the_limit_and_not_below(rate: str, limit: float, cause: str, target: str) -> None:
    assert not by_cause(judged(**{rate: below(limit)}), POLICY, SHIFTER)
    (call,) = by_cause(judged(**{rate: limit}), POLICY, SHIFTER)
    assert (call.cause, call.format) == (cause, target)
    assert call.numbers[f"{rate}_rate"] == limit
    assert set(call.limits) == {cause, f"worst_{cause}"}


def test_by_cause_looks_at_stalls_of_committed_weights_only() -> None:
    stalled = {"stall": 0.9, "saturation": 0.25}
    assert not by_cause(judged(**stalled), POLICY, SHIFTER)
    calls = by_cause(judged(rounding="nearest_even", **stalled), POLICY, SHIFTER)
    assert told(calls) == [("saturation", "E5M2"), ("stall", "stochastic")]


def test_by_cause_tells_a_precision_stall_from_one_at_the_maximum() -> None:
    for saturation, expected in ((0.0, [("stall", "E3M4")]), (0.5, [("saturation", "E5M2")])):
        evidence = judged(rounding="stochastic", stall=0.75, saturation=saturation)
        assert told(by_cause(evidence, POLICY, SHIFTER)) == expected
    at_limits = judged(rounding="stochastic", stall=0.5 + below(0.2), saturation=below(0.2))
    assert not by_cause(at_limits, POLICY, SHIFTER)
    assert told(by_cause(judged(rounding="stochastic", saturation=0.2), POLICY, SHIFTER)) == [("saturation", "E5M2")]


@pytest.mark.parametrize("policy", [by_cause, relative_stall])
@pytest.mark.parametrize("rounding", [each for each in ROUNDINGS if each != "stochastic"])
def test_a_precision_stall_under_any_other_rounding_is_rounded_stochastically_first(policy: Any, rounding: Any) -> None:
    assert told(policy(judged(rounding=rounding, stall=0.9), POLICY, SHIFTER)) == [("stall", "stochastic")]


def test_by_cause_follows_the_table_where_it_leads_a_stall_further() -> None:
    stalled = judged("E7M0", rounding="stochastic", stall=0.9)
    assert told(by_cause(stalled, POLICY, SHIFTER)) == [("stall", "E5M2")]
    assert told(by_cause(replace(stalled, left_format="E5M2"), POLICY, SHIFTER)) == [("stall", "E6M1")]
    (call,) = by_cause(replace(stalled, left_format="E6M1"), POLICY, SHIFTER)
    assert call.kinds == ("exhausted",)
    others = {name: by_cause(replace(stalled, format=name), POLICY, SHIFTER)[0].format for name in EIGHT}
    assert others == {name: "E5M2" if name == "E7M0" else with_more_precision(name) for name in EIGHT}


def test_by_cause_without_a_shifter_only_rounds() -> None:
    evidence = judged(rounding="nearest_even", overflow=1.0, underflow=1.0, stall=1.0)
    assert told(by_cause(evidence, POLICY, None)) == [("stall", "stochastic")]
    assert not by_cause(replace(evidence, rounding="stochastic"), POLICY, None)


def test_by_cause_puts_the_gravest_first() -> None:
    evidence = judged(rounding="nearest_even", overflow=1.0, underflow=1.0, stall=1.0)
    assert [call.cause for call in by_cause(evidence, POLICY, SHIFTER)] == ["overflow", "stall", "underflow"]


def test_by_cause_takes_what_costs_no_bit_before_a_shift_and_what_acts_before_what_does_not() -> None:
    both = replace(judged(rounding="stochastic", stall=0.9, underflow=0.5), scales="static")
    assert told(by_cause(both, POLICY, SHIFTER)) == [("underflow", "delayed"), ("stall", "E3M4")]
    at_the_end = judged("E7M0", rounding="nearest_even", stall=0.9, saturation=0.3)
    calls = by_cause(at_the_end, POLICY, SHIFTER)
    assert [(call.cause, call.kinds) for call in calls] == [("stall", ("rounding",)), ("saturation", ("exhausted",))]


def test_by_cause_does_not_go_straight_back() -> None:
    evidence = replace(judged("E5M2", rounding="stochastic", stall=0.9), left_format="E4M3")
    (call,) = by_cause(evidence, POLICY, SHIFTER)
    assert (call.cause, call.kinds) == ("stall", ("exhausted",))
    assert told(by_cause(replace(evidence, left_format="E3M4"), POLICY, SHIFTER)) == [("stall", "E4M3")]


def test_by_cause_keeps_to_a_table_of_ones_own() -> None:
    class Short(EmergencyMantissaShift):
        FORMAT_FALLBACK = MappingProxyType({"E4M3": "E5M2", "float8_e5m2": None})

    assert told(by_cause(judged(overflow=0.5), POLICY, Short())) == [("overflow", "E5M2")]
    (call,) = by_cause(judged("E5M2", overflow=0.5), POLICY, Short())
    assert call.kinds == ("exhausted",)


@pytest.mark.parametrize(
    ("factor", "expected"),
    [(None, ("exhausted",)), (1.0, 0.5), (0.25, 0.125), (0.125, ("exhausted",))],
)
def test_overflow_with_no_format_left_lowers_the_learning_rate(factor: float | None, expected: Any) -> None:
    evidence = replace(judged("E7M0", overflow=0.5), learning_rate=factor)
    (call,) = by_cause(evidence, POLICY, SHIFTER)
    assert (call.learning_rate or call.kinds) == expected
    (other,) = by_cause(replace(evidence, window=Reading(1.0, underflow=0.5)), POLICY, SHIFTER)
    assert other.kinds == ("exhausted",)


@pytest.mark.parametrize(
    ("scales", "rates", "expected"),
    [
        ("static", {"overflow": 0.5}, [("overflow", "delayed")]),
        ("static", {"underflow": 0.5}, [("underflow", "delayed")]),
        ("delayed", {"overflow": 0.5}, [("overflow", "repaired")]),
        ("delayed", {"underflow": 0.5}, [("underflow", "E5M2")]),  # doubled scales would make it worse
        ("repaired", {"overflow": 0.5}, [("overflow", "E5M2")]),
        ("static", {"saturation": 0.5}, [("saturation", "E5M2")]),  # stored weights have scales of their own amax
        ("static", {"stall": 0.9}, [("stall", "E3M4")]),
    ],
)
def test_by_cause_tries_scales_before_exponent_bits(scales: Any, rates: dict[str, float], expected: Any) -> None:
    evidence = replace(judged(rounding="stochastic", **rates), scales=scales)
    assert told(by_cause(evidence, POLICY, SHIFTER)) == expected


# ---- recover


def away(**changes: Any) -> Evidence:
    return replace(Evidence(99, "E5M2", start_format="E4M3", window=Reading(1.0), quiet=10), **changes)


def test_recover_waits_for_quiet_and_twice_as_long_after_each_failure() -> None:
    rule = recover(off, after=10)
    for failed in range(4):
        wait = 10 * 2**failed
        assert not rule(away(quiet=wait - 1, failed_returns=failed), POLICY, SHIFTER)
        (call,) = rule(away(quiet=wait, failed_returns=failed), POLICY, SHIFTER)
        assert (call.cause, call.format) == ("quiet", "E4M3")
        assert call.numbers == {"quiet_steps": wait, "failed_returns": failed}


def test_recover_adds_nothing_where_it_should_not() -> None:
    rule = recover(by_cause, after=10)
    for evidence in (
        away(format="E4M3"),
        away(format="float8_e4m3fn"),  # the same format by another name
        away(window=None),
    ):
        assert not rule(evidence, POLICY, SHIFTER)
    assert not rule(away(), POLICY, None)
    called = rule(away(window=Reading(1.0, overflow=0.5)), POLICY, SHIFTER)
    assert told(called) == [("overflow", "E6M1")]


@pytest.mark.parametrize("after", [0, -1, 1.5, True, None])
def test_recover_needs_steps_to_wait(after: Any) -> None:
    with pytest.raises(InputError, match="recover_after is"):
        recover(off, after)


# ---- settings


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"rule": "by_case"}, "policy is 'by_case'; did you mean by_cause"),
        ({"rule": 3}, "policy is 3; Known: by_cause, relative_stall"),
        ({"window": 0}, "window is 0; expected an integer of at least 1"),
        ({"cooldown": -1}, "cooldown is -1"),
        ({"warmup": 1.5}, "warmup is 1.5"),
        ({"release": 1.5}, "release is 1.5"),
        ({"overflow_limit": math.nan}, "overflow_limit is nan"),
        ({"recover_after": 0}, "recover_after is 0"),
        ({"smallest_learning_rate": 0}, "smallest_learning_rate is 0; expected a positive finite number of at most 1"),
        ({"smallest_learning_rate": 4}, "smallest_learning_rate is 4; expected a positive finite number of at most 1"),
        ({"runaway_margin": math.nan}, "runaway_margin is nan; expected a number above 0"),
        ({"runaway_margin": -5}, "runaway_margin is -5"),
        ({"runaway_margin": 0}, "runaway_margin is 0"),
        ({"moving_share": -1}, "moving_share is -1; expected a finite number of at least 0"),
        ({"moving_share": math.nan}, "moving_share is nan"),
        ({"moving_share": math.inf}, "moving_share is inf"),
        ({"plateau": math.nan}, "plateau is nan; expected a number of at least 0"),
        ({"plateau": "0.1"}, "plateau is '0.1'"),
        ({"spike_factor": 0.5}, "spike_factor is 0.5; expected a number above 1"),
        ({"spike_factor": 1}, "spike_factor is 1"),
        ({"spike_factor": math.nan}, "spike_factor is nan"),
    ],
)
def test_settings_that_could_not_work(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        Policy(**settings)


def test_settings_at_their_ends() -> None:
    Policy(moving_share=0, plateau=0, smallest_learning_rate=1)
    Policy(moving_share=2.0, plateau=math.inf, runaway_margin=math.inf, spike_factor=math.inf)


def test_names() -> None:
    assert set(RULES) == set(POLICY_NAMES)
    assert [rule_of(Policy(name)) for name in ("relative_stall", "fallback_chain", "off")] == [
        relative_stall,
        fallback_chain,
        off,
    ]
    assert rule_of(Policy()) is rule_of(Policy("by_cause")) is rule_of(Policy(by_cause)) is by_cause
    assert replace(Policy("fallback_chain"), window=3).rule == "fallback_chain"


# ---- all of them, on any evidence

rates = st.sampled_from([0.0, 0.005, 0.01, 0.1, 0.2, 0.5, 0.51, 1.0])
readings = st.builds(
    Reading,
    loss=st.sampled_from([1.0, 2.0]),
    **dict.fromkeys(("overflow", "worst_overflow", "underflow", "worst_underflow", "stall", "saturation"), rates),
)
evidences = st.builds(
    Evidence,
    step=st.just(99),
    format=st.sampled_from(EIGHT),
    start_format=st.sampled_from(EIGHT),
    left_format=st.sampled_from([None, *EIGHT]),
    rounding=st.sampled_from([None, *ROUNDINGS]),
    learning_rate=st.sampled_from([None, 1.0, 0.125]),
    finite=st.just(True),
    window=st.none() | readings,
    whole=st.booleans(),
    previous=st.none() | readings,
    baseline=st.none() | readings,
    quiet=st.integers(0, 40),
    failed_returns=st.integers(0, 3),
) | st.builds(
    Evidence,
    step=st.just(99),
    format=st.sampled_from(EIGHT),
    start_format=st.sampled_from(EIGHT),
    finite=st.just(False),
    consecutive_nans=st.integers(1, 5),
)


@given(evidences, st.sampled_from(POLICY_NAMES), st.sampled_from([None, 10]), st.booleans())
def test_no_policy_leaves_the_table_or_asks_for_what_there_is_not(
    evidence: Evidence, name: Any, recover_after: int | None, may_shift: bool
) -> None:
    policy = Policy(name, recover_after=recover_after)
    shifter = EmergencyMantissaShift() if may_shift else None
    calls = rule_of(policy)(evidence, policy, shifter)
    for call in calls:
        assert call.format is None or (may_shift and call.format in FORMAT_FALLBACK and call.format != evidence.format)
        assert call.rounding is None or evidence.rounding not in (None, "stochastic")
        assert call.learning_rate is None or 0 < call.learning_rate < (evidence.learning_rate or 0)
        assert not call.rollback
    assert calls == rule_of(policy)(evidence, policy, shifter), "the same evidence, the same calls"
    assert shifter is None or shifter.consecutive_nans == 0

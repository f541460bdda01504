"""The controller over sequences of steps: windows, warm-up, cooldown, hysteresis, returns, and its saved state."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from altgrad_core.control import DECISIONS, Controller, Decision
from altgrad_core.errors import InputError
from altgrad_core.evidence import Evidence, Observation, Reading
from altgrad_core.remedies import Remedy
from altgrad_core.settings import POLICY_NAMES, Policy
from altgrad_core.stability import FORMAT_FALLBACK, EmergencyMantissaShift

CALM = Observation(0, 1.0, finite=True)
HOT = replace(CALM, overflow_rate=0.5)
STALLED = replace(CALM, stall_rate=0.9)
NAN = Observation(0, math.nan, finite=False)


def by_cause(**settings: Any) -> Policy:
    return Policy("by_cause", **{"window": 1, "warmup": 0, "cooldown": 0, **settings})


def shifting(format: Any, policy: Any, **more: Any) -> Controller:
    return Controller(format, policy=policy, shifter=EmergencyMantissaShift(), **more)


def feed(controller: Controller, seen: Iterable[Observation], start: int = 0, lag: int = 0) -> list[Decision]:
    return [controller.observe(replace(each, step=step), in_flight=step + lag) for step, each in enumerate(seen, start)]


def log(controller: Controller) -> list[tuple[int, str, str]]:
    return [(event.step, event.kind, event.cause) for event in controller.events]


# ---- windows


def test_a_window_is_judged_when_it_is_full_and_by_its_mean() -> None:
    controller = shifting("E4M3", by_cause(window=4, overflow_limit=0.25, worst_overflow_limit=1.0))
    rates = [0.0, 0.0, 0.5, 0.499, 0.501]  # the last four have a mean of 0.375; the first four of less than 0.25
    feed(controller, [replace(CALM, overflow_rate=rate) for rate in rates])
    assert log(controller) == [(4, "shift", "overflow")]


def test_the_worst_site_counts_beside_the_mean() -> None:
    controller = shifting("E4M3", by_cause(window=2))
    sites = {"worst_overflow": "logits", "worst_stall": "up"}
    feed(controller, [replace(CALM, overflow_rate=1e-3, worst_overflow_rate=0.1, worst_sites=sites)] * 2)
    assert log(controller) == [(1, "shift", "overflow")]
    assert controller.events[0].numbers == {
        "overflow_rate": 1e-3,
        "worst_overflow_rate": 0.1,
        "worst_overflow_site": "logits",
        "from": "E4M3",
        "to": "E5M2",
    }


def test_operands_count_as_gradients_do() -> None:
    for name in ("overflow_rate", "operand_overflow_rate", "underflow_rate", "operand_underflow_rate"):
        controller = shifting("E4M3", by_cause())
        feed(controller, [replace(CALM, **{name: 0.3})])
        assert controller.format == "E5M2"


def test_a_window_starts_anew_after_a_decision() -> None:
    controller = shifting("E4M3", by_cause(window=3, release=1.0))
    hot_then_calm = [HOT] * 3 + [CALM] * 3 + [replace(HOT, overflow_rate=0.02)] * 2 + [CALM] * 3
    feed(controller, hot_then_calm)
    # Two steps of 2% in a window of three: 1.3%, judged at step 7 with nothing left of the first three.
    assert log(controller) == [(2, "shift", "overflow"), (7, "shift", "overflow")]
    at_once = shifting("E4M3", Policy("fallback_chain", window=3, warmup=0, cooldown=0))
    feed(at_once, [STALLED] * 3 + [CALM] * 2 + [STALLED])
    assert log(at_once) == [(2, "shift", "stall")], "what stalled before the shift is not counted after it"


def test_steps_that_are_not_finite_are_in_no_window() -> None:
    controller = shifting("E4M3", by_cause(window=3))
    feed(controller, [HOT, NAN, HOT, NAN, HOT])
    assert log(controller) == [(4, "shift", "overflow")]


SPIKED = replace(HOT, norm=11.0)
RUNNING_AWAY = replace(HOT, loss=1.5)


@pytest.mark.parametrize("fault", [SPIKED, RUNNING_AWAY])
@pytest.mark.parametrize("can_roll_back", [False, True])
def test_a_fault_that_passes_is_in_no_window(fault: Observation, can_roll_back: bool) -> None:
    """One step of 50% in a window of 20 is 2.5%: no reason to leave a format for good."""
    usual = replace(CALM, norm=1.0)
    controller = shifting("E4M3", by_cause(window=20), can_roll_back=can_roll_back)
    feed(controller, [*[usual] * 20, fault, fault, *[usual] * 30, fault, *[usual] * 30])
    assert not controller.events


@pytest.mark.parametrize("fault", [SPIKED, RUNNING_AWAY])
def test_a_fault_that_stays_is_judged_where_nothing_goes_back(fault: Observation) -> None:
    usual = replace(CALM, norm=1.0)
    for can_roll_back, expected in ((False, "shift"), (True, "rollback")):
        controller = shifting("E4M3", by_cause(window=4), can_roll_back=can_roll_back)
        feed(controller, [*[usual] * 20, *[fault] * 3])
        assert [(event.step, event.kind) for event in controller.events] == [(22, expected)]


@pytest.mark.parametrize("warmup", [0, 7])
def test_warm_up(warmup: int) -> None:
    controller = shifting("E4M3", by_cause(warmup=warmup))
    feed(controller, [HOT] * (warmup + 1))
    assert log(controller) == [(warmup, "shift", "overflow")]


def test_cooldown() -> None:
    controller = shifting("E4M3", by_cause(cooldown=5, release=1.0))
    feed(controller, [HOT, CALM, *[HOT] * 20])  # the calm step sets the trigger free again
    assert log(controller)[:2] == [(0, "shift", "overflow"), (5, "shift", "overflow")]


def test_what_was_in_flight_is_in_no_window() -> None:
    controller = shifting("E4M3", by_cause(window=2))
    feed(controller, [HOT, HOT, HOT, CALM, CALM, CALM], lag=1)
    assert log(controller) == [(1, "shift", "overflow")]
    assert controller.events[0].numbers["overflow_rate"] == 0.5


# ---- hysteresis


def test_a_rate_must_fall_before_it_calls_again() -> None:
    policy = by_cause(overflow_limit=0.1, worst_overflow_limit=1.0, release=0.5)
    lingering = replace(CALM, overflow_rate=0.05)  # at the level, not below it
    controller = shifting("E3M4", policy)
    feed(controller, [HOT, *[HOT, lingering] * 5, HOT])
    assert log(controller) == [(0, "shift", "overflow")]
    feed(controller, [replace(lingering, overflow_rate=0.0499), HOT], start=20)
    assert log(controller) == [(0, "shift", "overflow"), (21, "shift", "overflow")]
    assert controller.format == "E5M2"


def test_every_rate_of_a_cause_must_fall() -> None:
    controller = shifting("E3M4", by_cause(overflow_limit=0.1, worst_overflow_limit=0.4))
    still_at_one_site = replace(CALM, worst_overflow_rate=0.2)
    feed(controller, [HOT, still_at_one_site, HOT, replace(CALM, worst_overflow_rate=0.19), HOT])
    assert log(controller) == [(0, "shift", "overflow"), (4, "shift", "overflow")]


def test_another_cause_and_another_remedy_are_not_held_back() -> None:
    controller = shifting("E4M3", by_cause(), rounding="nearest_even")
    both = replace(HOT, stall_rate=0.9)
    feed(controller, [both] * 6)
    assert [(event.kind, event.cause) for event in controller.events] == [
        ("shift", "overflow"),
        ("rounding", "stall"),
        ("exhausted", "stall"),  # finer is E4M3 again, which the overflow made it leave
    ]


def test_a_release_of_one_is_no_more_than_the_limit() -> None:
    controller = shifting("E3M4", by_cause(release=1.0, overflow_limit=0.1, worst_overflow_limit=1.0))
    feed(controller, [HOT, replace(CALM, overflow_rate=0.0999), HOT])
    assert len(controller.events) == 2


def test_the_literal_rule_knows_no_hysteresis() -> None:
    controller = shifting("E1M6", Policy("fallback_chain", window=1, warmup=0, cooldown=0))
    feed(controller, [STALLED] * 4)
    assert log(controller) == [
        (0, "shift", "stall"),
        (1, "shift", "stall"),
        (2, "exhausted", "stall"),
        (3, "exhausted", "stall"),
    ]


# ---- the learning rate


def test_the_learning_rate_is_lowered_where_no_format_is_left() -> None:
    controller = shifting("E7M0", by_cause(), learning_rate=1.0)
    decisions = feed(controller, [HOT, HOT, CALM, HOT, CALM, HOT, CALM, HOT])
    assert [each.learning_rate for each in decisions if each.learning_rate] == [0.5, 0.25, 0.125]
    assert controller.learning_rate == 0.125
    assert log(controller)[-1] == (7, "exhausted", "overflow")
    assert controller.events[1].numbers == {
        "overflow_rate": 0.5,
        "worst_overflow_rate": 0.5,
        "from": 0.5,
        "to": 0.25,
    }


# ---- layers


def in_layers(policy: Policy | None = None, layers: Iterable[str] = ("mlp", "logits"), **more: Any) -> Controller:
    return Controller(
        dict.fromkeys(layers, "E4M3"), policy=policy or by_cause(), shifter=EmergencyMantissaShift(), **more
    )


def shown(seen: Observation = CALM, **layers: Observation) -> Observation:
    return replace(seen, layers={"mlp": CALM, "logits": CALM} | layers)


def test_a_layer_shifts_by_its_own_rates_and_the_others_stay() -> None:
    controller = in_layers()
    decision = feed(controller, [shown(HOT, mlp=replace(CALM, worst_overflow_rate=0.1))])[0]
    assert (decision.formats, decision.format, decision.acts) == ({"mlp": "E5M2"}, None, True)
    assert controller.formats == {"mlp": "E5M2", "logits": "E4M3"}
    (event,) = controller.events
    numbers = {"overflow_rate": 0.0, "worst_overflow_rate": 0.1, "layer": "mlp", "from": "E4M3", "to": "E5M2"}
    assert (event.kind, event.cause, event.numbers) == ("shift", "overflow", numbers)


def test_a_layer_is_judged_as_a_run_of_its_own_would_be() -> None:
    """Windows, cooldown, hysteresis, returns and what was in flight: layer by layer, whatever the others do."""
    policy = by_cause(window=2, cooldown=3, recover_after=6)
    courses = {
        "mlp": [HOT, CALM, *[HOT] * 3, *[CALM] * 9, *[HOT] * 6],
        "logits": [CALM, HOT, HOT, HOT, *[CALM] * 4, *[HOT] * 4, *[CALM] * 8],
        "qkv": [CALM] * 20,
    }
    together = in_layers(policy, courses)
    steps = [
        replace(CALM, layers=dict(zip(courses, each, strict=True))) for each in zip(*courses.values(), strict=True)
    ]
    feed(together, steps, lag=1)
    assert together.events
    for layer, course in courses.items():
        alone = shifting("E4M3", policy)
        feed(alone, course, lag=1)
        expected = [(event.step, event.kind, {**event.numbers, "layer": layer}) for event in alone.events]
        of_layer = [event for event in together.events if event.numbers["layer"] == layer]
        assert [(event.step, event.kind, event.numbers) for event in of_layer] == expected
        assert together.formats[layer] == alone.format


def test_nan_batches_shift_every_layer_by_the_table() -> None:
    controller = Controller({"mlp": "E4M3", "logits": "E1M6"}, policy="off", shifter=EmergencyMantissaShift(2))
    decisions = feed(controller, [shown(NAN)] * 2, lag=1)
    assert [each.formats for each in decisions] == [{}, {"mlp": "E5M2", "logits": "E3M4"}]
    assert [event.numbers["layer"] for event in controller.events] == ["mlp", "logits"]


def test_thresholds_for_all_layers_follow_the_smallest_maximum() -> None:
    controller = Controller({"mlp": "E4M3", "logits": "E7M0"}, shifter=EmergencyMantissaShift())
    assert controller.format == "E4M3"
    assert Controller("E7M0").formats == {}


def test_what_concerns_the_run_is_decided_once_and_starts_all_layers_anew() -> None:
    controller = in_layers(by_cause(window=2), scales="static", can_roll_back=True)
    decisions = feed(controller, [shown(mlp=HOT, logits=HOT)] * 3, lag=1)
    assert [(each.scales, each.formats) for each in decisions] == [(None, {}), ("delayed", {}), (None, {})]
    assert [(event.kind, event.numbers["layer"]) for event in controller.events] == [("scales", "mlp")]
    poisoned = shown(replace(NAN, params_finite=False))
    back = feed(controller, [shown(mlp=HOT), poisoned, poisoned, shown(mlp=HOT), shown(mlp=HOT)], start=3, lag=1)
    assert [each.rollback for each in back] == [False, True, False, False, False]  # the second was in flight
    assert [each.scales for each in back] == [None, None, None, None, "repaired"]  # two steps since then


def test_one_layer_shifts_while_another_calls_for_what_concerns_the_run() -> None:
    controller = in_layers(scales="repaired", learning_rate=1.0)
    controller.restore({**controller.saved(), "formats": {"mlp": "E7M0", "logits": "E4M3"}})
    decision = feed(controller, [shown(mlp=HOT, logits=HOT)])[0]
    assert (decision.learning_rate, decision.formats, decision.format) == (0.5, {"logits": "E5M2"}, None)
    assert [(event.kind, event.numbers["layer"]) for event in decision.events] == [
        ("learning_rate", "mlp"),
        ("shift", "logits"),
    ]


def test_a_policy_of_ones_own_knows_the_layer() -> None:
    def logits_alone(evidence: Evidence, policy: Policy, shifter: object) -> list[Remedy]:
        return [Remedy("mine", "E6M1")] if evidence.layer == "logits" and evidence.step == 1 else []

    controller = in_layers(Policy(logits_alone))
    assert [each.formats for each in feed(controller, [shown()] * 3)] == [{}, {"logits": "E6M1"}, {}]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (
            lambda: Controller({"mlp": "E4M3"}),
            "formats of 1 layers in a run whose formats must stay; expected a shifter",
        ),
        (lambda: in_layers(layers=[]), r"layers are \[\]; expected at least one"),
        (lambda: in_layers(layers=["mlp", ""]), "expected at least one, and a name for each"),
        (
            lambda: Controller({"mlp": "E4M3", "logits": "bf16"}, shifter=EmergencyMantissaShift()),
            "a bf16 run cannot shift",
        ),
        (
            lambda: in_layers().observe(replace(CALM, layers={"mpl": CALM})),
            "nothing of layer 'mlp'.* did you mean 'mpl'",
        ),
        (lambda: in_layers().observe(CALM), "expected a rate such as 'mlp/overflow_rate' among its metrics"),
    ],
)
def test_layers_that_could_not_be_judged(make: Any, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        make()


# ---- scales


def test_scales_come_before_exponent_bits() -> None:
    controller = shifting("E4M3", by_cause(), scales="static")
    decisions = feed(controller, [HOT] * 4)
    assert [each.scales for each in decisions] == ["delayed", "repaired", None, None]
    assert [(event.kind, event.numbers["from"], event.numbers["to"]) for event in controller.events] == [
        ("scales", "static", "delayed"),
        ("scales", "delayed", "repaired"),
        ("shift", "E4M3", "E5M2"),
    ]
    assert (controller.scales, controller.format) == ("repaired", "E5M2")


def test_what_underflows_gets_delayed_scales_and_then_exponent_bits() -> None:
    controller = shifting("E4M3", by_cause(), scales="static")
    feed(controller, [replace(CALM, worst_underflow_rate=0.6, worst_sites={"worst_underflow": "logits"})] * 3)
    assert log(controller) == [(0, "scales", "underflow"), (1, "shift", "underflow")]
    assert controller.events[0].numbers["worst_underflow_site"] == "logits"


def test_scales_may_change_where_the_format_must_stay() -> None:
    controller = Controller("E4M3", policy=by_cause(), scales="static")
    assert [each.scales for each in feed(controller, [HOT] * 3)] == ["delayed", "repaired", None]


# ---- coming back


def returning(after: int = 5, cooldown: int = 0) -> Controller:
    return shifting("E4M3", by_cause(recover_after=after, cooldown=cooldown))


def shifts(controller: Controller) -> list[tuple[int, object]]:
    return [(event.step, event.numbers["to"]) for event in controller.events if event.kind == "shift"]


def test_returns_after_quiet_steps() -> None:
    controller = returning()
    feed(controller, [HOT, *[CALM] * 20])
    assert shifts(controller) == [(0, "E5M2"), (5, "E4M3")]
    assert log(controller)[1] == (5, "shift", "quiet")


@pytest.mark.parametrize(
    ("noise", "back"),
    [(NAN, 10), (replace(CALM, loss=2.0), 5)],  # one high loss is no reason
    ids=["nan", "loss"],
)
def test_a_step_that_is_not_finite_starts_the_wait_anew(noise: Observation, back: int) -> None:
    controller = returning()
    feed(controller, [HOT, CALM, CALM, CALM, CALM, noise, *[CALM] * 5])
    assert shifts(controller) == [(0, "E5M2"), (back, "E4M3")]


def test_no_return_while_the_cause_lasts() -> None:
    controller = returning()
    feed(controller, [HOT] * 50)
    assert "quiet" not in {event.cause for event in controller.events}


def test_no_return_before_the_cooldown_is_over() -> None:
    controller = returning(cooldown=12)
    feed(controller, [HOT, *[CALM] * 20])
    assert shifts(controller) == [(0, "E5M2"), (12, "E4M3")]


def test_after_a_failed_return_it_waits_twice_as_long() -> None:
    controller, step, waits = returning(), 0, []
    for _ in range(4):  # the first format overflows whenever it is tried, the other never does
        left = step
        feed(controller, [HOT], start=step)
        assert controller.format == "E5M2"
        while controller.format == "E5M2":
            step += 1
            feed(controller, [CALM], start=step)
        waits.append(step - left)
        step += 1
    assert waits == [5, 10, 20, 40]


def test_a_return_that_holds_ends_the_matter() -> None:
    controller = returning()
    feed(controller, [HOT, *[CALM] * 500])
    assert len(controller.events) == 2


# ---- policies of one's own


def asking(remedy: Remedy) -> Any:
    return lambda evidence, policy, shifter: [remedy] if evidence.step == 3 else []


def test_a_function_may_be_the_policy() -> None:
    seen: list[Evidence] = []

    def once(evidence: Evidence, policy: Policy, shifter: object) -> list[Remedy]:
        seen.append(evidence)
        remedy = Remedy("mine", "E2M5", "stochastic", rollback=True, learning_rate=0.3, scales="repaired")
        return [remedy] if evidence.step == 3 else []

    more = {"rounding": "nearest_even", "can_roll_back": True, "learning_rate": 1.0, "scales": "delayed"}
    controller = shifting("E4M3", once, **more)
    decision = feed(controller, [CALM] * 6)[3]
    assert (decision.format, decision.rounding, decision.learning_rate) == ("E2M5", "stochastic", 0.3)
    assert (decision.rollback, decision.scales) == (True, "repaired")
    assert [event.kind for event in decision.events] == ["shift", "rounding", "learning_rate", "scales", "rollback"]
    assert set(DECISIONS) == {event.kind for event in decision.events} | {"exhausted"}
    assert [each.since_decision for each in seen] == [None] * 4 + [1, 2]
    in_force = seen[4]
    assert (in_force.format, in_force.rounding, in_force.learning_rate) == ("E2M5", "stochastic", 0.3)
    assert in_force.scales == "repaired"


@pytest.mark.parametrize(
    ("remedy", "expected"),
    [
        (Remedy("mine", "E2M5"), "another format; expected a run with a shifter"),
        (Remedy("mine", "E2M5x"), "unknown format 'E2M5x'"),
        (Remedy("mine", rounding="stochastic"), "expected a run with committed weights"),
        (Remedy("mine", learning_rate=0.5), "another learning rate; expected a run with a factor"),
        (Remedy("mine", learning_rate=0.0), "the factor on the learning rate is 0.0"),
        (Remedy("mine", scales="repaired"), "other scales; expected a run with scales"),
        (Remedy("mine", rollback=True), "a rollback; expected a run with snapshots"),
        (Remedy("mine", rounding="stochastc"), "unknown rounding 'stochastc'; did you mean 'stochastic'"),  # type: ignore[arg-type]
        (Remedy("mine", scales="delaid"), "unknown rule of scales 'delaid'; did you mean 'delayed'"),  # type: ignore[arg-type]
    ],
)
def test_a_function_cannot_ask_for_what_the_run_has_not(remedy: Remedy, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        feed(Controller("E4M3", policy=asking(remedy)), [CALM] * 4)


def test_a_return_needs_a_format_that_may_change() -> None:
    with pytest.raises(InputError, match="recover_after is 5 in a run whose format must stay; expected a shifter"):
        Controller("E4M3", policy=Policy(recover_after=5))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"rounding": "nearest_evn"}, "unknown rounding 'nearest_evn'; did you mean 'nearest_even'"),
        ({"scales": "statik"}, "unknown rule of scales 'statik'; did you mean 'static'"),
        ({"learning_rate": math.nan}, "learning_rate is nan; expected a positive finite number"),
        ({"learning_rate": -1}, "learning_rate is -1; expected a positive finite number"),
        ({"policy": 3}, "policy is 3; Known: by_cause"),
    ],
)
def test_settings_of_a_controller_that_could_not_work(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        Controller("E4M3", **settings)


@pytest.mark.parametrize("margin", [0.3, math.inf])
def test_a_margin_without_end_turns_the_loss_trigger_off(margin: float) -> None:
    controller = Controller("E4M3", policy=Policy(runaway_margin=margin), can_roll_back=True)
    feed(controller, [*[CALM] * 20, *[replace(CALM, loss=99.0)] * 5])
    assert bool(controller.events) is (margin == 0.3)


def test_a_policy_by_name() -> None:
    assert Controller("E4M3", policy="by_cause").policy == Policy("by_cause")
    assert Controller("E4M3").policy == Policy() == Policy("by_cause")
    with pytest.raises(InputError, match="did you mean fallback_chain"):
        Controller("E4M3", policy="fallback_chian")  # type: ignore[arg-type]


# ---- saved and restored

observations = st.lists(
    st.builds(
        Observation,
        step=st.just(0),
        loss=st.sampled_from([1.0, 1.2, 5.0]),
        finite=st.sampled_from([True, True, True, False]),
        params_finite=st.sampled_from([True] * 9 + [False]),
        stall_rate=st.sampled_from([0.0, 0.1 + 0.2, 0.95]),
        saturation_rate=st.sampled_from([0.0, 0.3]),
        overflow_rate=st.sampled_from([0.0, 0.004, 0.3]),
        worst_overflow_rate=st.sampled_from([0.0, 0.2]),
        operand_underflow_rate=st.sampled_from([0.0, 0.0, 1 / 3]),
    ),
    min_size=6,
    max_size=80,
)


@given(
    observations,
    st.floats(0, 1),
    st.sampled_from(POLICY_NAMES),
    st.sampled_from(sorted(FORMAT_FALLBACK)),
    st.sampled_from([None, "nearest_even", "stochastic"]),
    st.sampled_from([None, 2, 7]),
    st.sampled_from([None, "static", "delayed"]),
    st.booleans(),
    st.integers(1, 4),
    st.integers(0, 6),
)
def test_decisions_are_the_same_after_a_restart_at_any_point(
    seen: list[Observation],
    share: float,
    name: Any,
    start: str,
    rounding: Any,
    recover_after: int | None,
    scales: Any,
    layered: bool,
    window: int,
    cooldown: int,
) -> None:
    policy = Policy(name, window=window, warmup=2, cooldown=cooldown, recover_after=recover_after, plateau=0.3)

    def fresh() -> Controller:
        formats: Any = dict.fromkeys(("mlp", "logits"), start) if layered else start
        return shifting(formats, policy, rounding=rounding, can_roll_back=True, learning_rate=1.0, scales=scales)

    # In a run of layers one shows what all do, the other never shows anything.
    seen = [replace(each, layers={"mlp": each, "logits": CALM}) for each in seen]

    whole, again, first, second = fresh(), fresh(), fresh(), fresh()
    cut = round(share * len(seen))
    expected = feed(whole, seen, lag=1)
    assert repr(feed(again, seen, lag=1)) == repr(expected), "the same steps, the same decisions"
    before = feed(first, seen[:cut], lag=1)
    text = json.dumps(first.saved(), allow_nan=False)
    second.restore(json.loads(text))
    after = feed(second, seen[cut:], lag=1, start=cut)
    assert repr(before + after) == repr(expected)
    assert second.saved() == whole.saved()
    assert json.dumps(first.saved()) == text, "what was saved is a copy"
    assert {name for each in expected for name in (each.format, *each.formats.values())} <= {None, *FORMAT_FALLBACK}


# ---- observations


def test_observations_take_what_they_know_from_metrics() -> None:
    metrics = {
        "loss": 2.0,
        "finite": True,
        "stall_rate": 0.25,
        "norm": 3.0,
        "worst_stall_site": "up",
        "saturation_rate": 0.125,
    }
    seen = Observation.of(7, metrics)
    expected = Observation(7, 2.0, finite=True, norm=3.0, stall_rate=0.25, saturation_rate=0.125)
    assert seen == replace(expected, worst_sites={"worst_stall": "up"})
    assert Reading.of(seen).precision_stall == 0.125
    with pytest.raises(KeyError, match="finite"):
        Observation.of(7, {"loss": 2.0})


# ---- saved and restored with a step in flight


def late(controller: Controller, courses: Iterable[dict[str, Any]], start: int = 0) -> list[Decision]:
    return [controller.observe_late(step, lambda numbers=each: numbers) for step, each in enumerate(courses, start)]


@pytest.mark.parametrize("cut", range(9))
def test_a_loop_that_reads_late_decides_the_same_after_a_restart_at_any_point(cut: int) -> None:
    calm = {"loss": 1.0, "finite": True, "stall_rate": 1 / 3, "worst_stall_site": "up"}
    courses = [calm, calm, *[calm | {"loss": math.nan, "finite": False}] * 3, calm, calm, calm]
    whole, first, second = (shifting("E7M0", "off") for _ in range(3))
    expected = late(whole, courses)
    before = late(first, courses[:cut])
    text = json.dumps(first.saved(), allow_nan=False)
    assert json.dumps(first.saved()) == text, "to save changes nothing"
    second.restore(json.loads(text))
    after = late(second, courses[cut:], cut)
    assert before + after == expected
    assert [each.format for each in expected] == [None] * 5 + ["E5M2"] + [None] * 2
    assert (second.events, second.saved()) == (whole.events, whole.saved())
    assert second.observe_last() == whole.observe_last()


def test_what_was_saved_without_events_and_a_step_in_flight_can_be_restored() -> None:
    old, again = shifting("E7M0", "off"), shifting("E7M0", "off")
    feed(old, [NAN, NAN])
    saved = {name: value for name, value in old.saved().items() if name not in ("events", "in_flight")}
    late(again, [{"loss": 1.0, "finite": True}])
    again.restore(json.loads(json.dumps(saved)))
    assert again.observe_last() == Decision(), "of the run that is left nothing is in flight"
    assert feed(again, [NAN], start=2)[0].format == "E5M2"


def test_numbers_in_flight_are_asked_for_once() -> None:
    asked: list[int] = []

    def read() -> dict[str, float]:
        asked.append(1)
        return {"loss": 1.0, "finite": 1.0}

    controller = shifting("E7M0", "off")
    controller.observe_late(0, read)
    assert not asked
    assert [controller.saved()["in_flight"] for _ in range(2)] == [[[0, read()]]] * 2
    controller.observe_last()
    assert len(asked) == 2, "once by the controller"

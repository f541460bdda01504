"""The controller's rules on observations made by hand, and formats written into states without a new trace."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from altgrad_core import FORMAT_FALLBACK, EmergencyMantissaShift, UnknownFormatError, parse
from altgrad_core.errors import InputError
from altgrad_jax import (
    Decision,
    FormatController,
    FormatParams,
    Observation,
    Policy,
    partition_relative_clip,
    quantize,
    set_format,
    skip_nonfinite,
    stall_monitor,
)
from altgrad_jax.control import get_format

OFF = Policy("off")
LITERAL = Policy("fallback_chain", window=4, warmup=0, cooldown=10)
RELATIVE = Policy("relative_stall", window=4, warmup=0, cooldown=8, moving_share=0.75, plateau=0.01)
PARAMS = {"w": jnp.array([1.0, -2.0, 3.0]), "b": jnp.array([0.5])}


def good(loss: float = 1.0, stall: float = 0.0) -> Observation:
    return Observation(0, loss, finite=True, stall_rate=stall)


def nan(params_finite: bool = True) -> Observation:
    return Observation(0, math.nan, finite=False, params_finite=params_finite)


def shifting(format: str, policy: Policy = OFF, patience: int = 3, **more: Any) -> FormatController:
    return FormatController(format, policy=policy, shifter=EmergencyMantissaShift(patience), **more)


def feed(controller: FormatController, seen: Iterable[Observation], lag: int = 0, start: int = 0) -> list[Decision]:
    """One observation for each step; with a lag of 1, as in training, a decision lands when the next step runs."""
    return [controller.observe(replace(each, step=step), in_flight=step + lag) for step, each in enumerate(seen, start)]


def kinds(controller: FormatController) -> list[tuple[int, str, str]]:
    return [(event.step, event.kind, event.cause) for event in controller.events]


# ---- NaN


@pytest.mark.parametrize("patience", [1, 3, 5])
def test_shift_after_nan_batches(patience: int) -> None:
    controller = shifting("E7M0", patience=patience)
    decisions = feed(controller, [good(), *[nan()] * patience])
    assert [each.format for each in decisions] == [None] * patience + ["E5M2"]
    assert controller.format == "E5M2"
    assert kinds(controller) == [(patience, "shift", "nan")]
    assert decisions[-1].events[0].numbers == {"consecutive_nans": patience, "from": "E7M0", "to": "E5M2"}


def test_a_valid_batch_starts_the_count_anew() -> None:
    controller = shifting("E7M0")
    assert not any(each.acts for each in feed(controller, [nan(), nan(), good()] * 5))
    assert controller.format == "E7M0"


@pytest.mark.parametrize(("start", "target"), FORMAT_FALLBACK.items())
def test_every_arrow_of_the_fallback(start: str, target: str | None) -> None:
    controller = shifting(start)
    last = feed(controller, [nan()] * 3)[-1]
    assert last.format == target
    assert kinds(controller) == [(2, "shift" if target else "exhausted", "nan")]


@pytest.mark.parametrize(("alias", "target"), [("float8_e4m3fn", "E5M2"), ("float8_e5m2", None), ("E1M6b0", "E3M4")])
def test_other_names_of_a_format_fall_back_as_it_does(alias: str, target: str | None) -> None:
    assert feed(shifting(alias), [nan()] * 3)[-1].format == target


def test_exhausted_does_nothing_and_says_so() -> None:
    controller = shifting("E5M2")
    decisions = feed(controller, [nan()] * 7)
    assert not any(each.acts for each in decisions)
    assert kinds(controller) == [(2, "exhausted", "nan"), (5, "exhausted", "nan")]


def test_no_cascade_in_consecutive_steps() -> None:
    controller = shifting("E0M7")
    decisions = feed(controller, [nan()] * 12, lag=1)
    assert [(step, each.format) for step, each in enumerate(decisions) if each.format] == [(2, "E3M4"), (6, "E5M2")]
    assert kinds(controller)[-1] == (10, "exhausted", "nan")


def test_what_was_in_flight_is_not_judged() -> None:
    controller = shifting("E1M6")
    feed(controller, [nan()] * 3, lag=1)
    assert controller.observe(replace(nan(False), step=3)) == Decision()
    assert not any(each.acts for each in feed(controller, [nan(), nan(), good()], start=4))


def test_without_a_shifter_the_format_stays() -> None:
    for name in ("float32", "bf16", "E7M0", "E4M4b3"):
        controller = FormatController(name)
        assert not any(each.acts for each in feed(controller, [nan()] * 20))


@pytest.mark.parametrize("name", ["float32", "bf16", "fp16", "E4M4b3"])
def test_formats_that_cannot_shift(name: str) -> None:
    with pytest.raises(ValueError, match=rf"a {name} run cannot shift.*E7M0"):
        shifting(name)


def test_unknown_format() -> None:
    with pytest.raises(UnknownFormatError, match="E5M2"):
        FormatController("E5M22x")


# ---- going back


def test_poisoned_weights_go_back_at_once() -> None:
    controller = FormatController("E5M2", can_roll_back=True)
    decisions = feed(controller, [good(), nan(params_finite=False), good()], lag=0)
    assert [each.rollback for each in decisions] == [False, True, False]
    assert kinds(controller) == [(1, "rollback", "poisoned weights")]


def test_nan_steps_go_back_after_a_while() -> None:
    controller = FormatController("E5M2", can_roll_back=True)
    decisions = feed(controller, [nan()] * 13)
    assert [step for step, each in enumerate(decisions) if each.rollback] == [5, 11]


def test_shift_first_and_back_if_that_does_not_help() -> None:
    controller = shifting("E7M0", can_roll_back=True)
    decisions = feed(controller, [nan()] * 8, lag=1)
    assert [(step, each.format, each.rollback) for step, each in enumerate(decisions) if each.acts] == [
        (2, "E5M2", False),
        (6, None, True),
    ]


def test_runaway_loss_goes_back() -> None:
    controller = FormatController("E5M2", can_roll_back=True)
    calm = [good(2.0 - 0.01 * k) for k in range(20)]
    assert not any(each.acts for each in feed(controller, [*calm, good(9.0), good(9.0), good(1.8), good(9.0)]))
    decisions = feed(controller, [good(9.0), good(9.0)], start=24)
    assert [each.rollback for each in decisions] == [False, True]
    assert kinds(controller) == [(25, "rollback", "runaway loss")]
    assert controller.events[0].numbers["mean"] == pytest.approx(1.9, abs=0.05)  # what ran away is not in the mean


@pytest.mark.parametrize("rise", [0.29, 0.31])
def test_runaway_margin(rise: float) -> None:
    controller = FormatController("E5M2", can_roll_back=True)
    decisions = feed(controller, [*[good(2.0)] * 30, *[good(2.0 + rise)] * 3])
    assert decisions[-1].rollback is (rise > 0.3)


def test_going_back_to_a_higher_loss_is_not_running_away() -> None:
    controller = FormatController("E5M2", can_roll_back=True)
    falling = [good(4.0 - 0.1 * k) for k in range(25)]
    decisions = feed(controller, [*falling, *[good(9.0)] * 3, *falling], lag=1)
    assert [step for step, each in enumerate(decisions) if each.rollback] == [27]


@pytest.mark.parametrize("first", [[1.6], [2.4, 1.6], [1.6, 2.4, 1.7], [9.0, 1.6, 2.4, 2.4, 2.4, 2.4, 1.6, 1.6]])
def test_noise_after_a_rollback_does_not_send_a_run_back_once_more(first: list[float]) -> None:
    controller = FormatController("E5M2", can_roll_back=True)
    usual = [good(2.0 + 0.4 * (k % 2)) for k in range(30)]
    feed(controller, [*usual, *[good(9.0)] * 3, *map(good, first), *[good(2.4)] * 40])
    assert kinds(controller) == [(32, "rollback", "runaway loss")]


@pytest.mark.parametrize("spikes", [0, 1, 3])
def test_a_run_that_went_back_is_sent_back_again_where_its_loss_runs_away(spikes: int) -> None:
    """Spikes among the first losses do not hide what follows."""
    controller = FormatController("E5M2", can_roll_back=True)
    restarted = [*[good(1e4)] * spikes, *[good(2.0)] * (8 - spikes)]
    feed(controller, [*[good(2.0)] * 20, *[good(9.0)] * 3, *restarted, *[good(2.4)] * 3])
    assert kinds(controller) == [(22, "rollback", "runaway loss"), (33, "rollback", "runaway loss")]


def test_a_run_that_went_back_is_judged_only_by_what_it_shows_since() -> None:
    """Seven losses are too few to tell what is usual."""
    controller = FormatController("E5M2", can_roll_back=True)
    feed(controller, [*[good(2.0)] * 20, *[good(9.0)] * 3, *[good(2.0)] * 7, *[good(9.0)] * 30])
    assert kinds(controller) == [(22, "rollback", "runaway loss"), (33, "rollback", "runaway loss")]


def test_no_snapshots_no_way_back() -> None:
    controller = FormatController("E5M2")
    assert not any(each.acts for each in feed(controller, [good(), *[nan(False)] * 9, *[good(99.0)] * 9]))


def test_calm() -> None:
    controller = FormatController("E5M2", can_roll_back=True)
    seen = []
    usual = replace(good(), norm=1.0)
    for step, each in enumerate([*[usual] * 8, nan(), good(), good(9.0), good(), replace(usual, norm=11.0), usual]):
        controller.observe(replace(each, step=step))
        seen.append(controller.calm)
    assert seen[8:] == [False, True, False, True, False, True]


def test_norms_that_stay_spikes_go_back_and_one_does_not() -> None:
    controller = FormatController("E5M2", can_roll_back=True)
    usual = [replace(good(), norm=1.0 + 0.1 * (k % 3)) for k in range(20)]
    spike, edge = replace(good(), norm=11.1), replace(good(), norm=11.0)  # the median is 1.1
    seen = [*usual, spike, spike, *usual, edge, edge, edge, *usual, spike, nan(), spike, spike, *usual]
    assert not any(each.acts for each in feed(controller, seen))
    decisions = feed(controller, [spike] * 3, start=len(seen))
    assert [each.rollback for each in decisions] == [False, False, True]
    (event,) = controller.events
    assert (event.cause, event.numbers) == ("norm spikes", {"norm": 11.1, "median": 1.1})


def test_an_infinite_norm_of_finite_gradients_does_not_become_what_is_usual() -> None:
    controller = FormatController("E5M2", can_roll_back=True)
    beyond_float32, spike = replace(good(), norm=math.inf), replace(good(), norm=20.0)
    usual = replace(good(), norm=1.0)
    assert not any(each.rollback for each in feed(controller, [beyond_float32] * 8 + [usual] * 8))
    assert feed(controller, [spike] * 3, start=16)[-1].rollback


def test_spikes_do_not_become_what_is_usual() -> None:
    controller = FormatController("E5M2", can_roll_back=True)
    usual, spike = replace(good(), norm=1.0), replace(good(), norm=20.0)
    assert not any(each.acts for each in feed(controller, [*[usual] * 8, *[spike, spike, usual] * 20]))
    assert feed(controller, [spike] * 3, start=68)[-1].rollback


@pytest.mark.parametrize("norms", [[1.0] * 4, [0.0] * 40], ids=["too few to tell", "nobody measures"])
def test_norms_are_no_spikes_without_others_to_compare_with(norms: list[float]) -> None:
    controller = FormatController("E5M2", can_roll_back=True)
    seen = [replace(good(), norm=norm) for norm in norms]
    assert not any(each.acts for each in feed(controller, [*seen, *[replace(good(), norm=1e6)] * 20]))


def test_norms_that_have_grown_for_good_send_a_run_back_once() -> None:
    controller = FormatController("E5M2", can_roll_back=True)
    seen = [replace(good(), norm=norm) for norm in [1.0] * 20 + [100.0] * 60]
    assert sum(each.rollback for each in feed(controller, seen)) == 1


def test_spikes_count_across_a_restart() -> None:
    before, after = (FormatController("E5M2", can_roll_back=True) for _ in range(2))
    spike = replace(good(), norm=99.0)
    feed(before, [*[replace(good(), norm=1.0)] * 20, spike, spike])
    after.restore(json.loads(json.dumps(before.saved())))
    assert [each.rollback for each in feed(after, [spike], start=22)] == [True]


# ---- stalls


@pytest.mark.parametrize(("rate", "shifts"), [(0.5, False), (0.51, True), (1.0, True)])
def test_literal_rule(rate: float, shifts: bool) -> None:
    controller = shifting("E3M4", LITERAL)
    decisions = feed(controller, [good(stall=rate)] * 4)
    assert [each.format for each in decisions] == [None, None, None, "E5M2" if shifts else None]
    assert kinds(controller) == ([(3, "shift", "stall")] if shifts else [])


def test_literal_rule_slides_its_window() -> None:
    controller = shifting("E3M4", LITERAL)
    rates = [0.0, 0.0, 0.0, 0.9, 0.9, 0.9]  # means of four: 0.225, 0.45, 0.675
    assert [each.format for each in feed(controller, [good(stall=rate) for rate in rates])][-2:] == [None, "E5M2"]


def test_literal_rule_waits_for_warm_up_and_cooldown() -> None:
    controller = shifting("E1M6", replace(LITERAL, warmup=7))
    decisions = feed(controller, [good(stall=0.9)] * 40, lag=1)
    acted = [(step, each.format) for step, each in enumerate(decisions) if each.acts]
    assert acted == [(7, "E3M4"), (17, "E5M2")]
    assert kinds(controller)[2] == (27, "exhausted", "stall")


def test_nan_steps_are_no_stalls() -> None:
    controller = shifting("E3M4", LITERAL)
    seen = [good(stall=0.9), nan(), good(stall=0.9), nan(), good(stall=0.9), nan(), good(stall=0.9)]
    decisions = feed(controller, seen)
    assert [each.format for each in decisions] == [None] * 6 + ["E5M2"]


def test_rule_off() -> None:
    controller = shifting("E3M4", replace(LITERAL, rule="off"))
    assert not any(each.acts for each in feed(controller, [good(stall=1.0)] * 50))


RISING = [*[good(stall=0.6)] * 4, *[good(stall=0.9)] * 4]


def test_relative_rule_leaves_masters_alone() -> None:
    controller = shifting("E3M4", RELATIVE)
    assert not any(each.acts for each in feed(controller, RISING * 5))


def test_relative_rule_rounds_stochastically_first() -> None:
    controller = shifting("E3M4", RELATIVE, rounding="nearest_even")
    first = feed(controller, RISING[:4], lag=1)
    assert [each.rounding for each in first] == [None] * 3 + ["stochastic"]
    assert controller.rounding == "stochastic"
    second = feed(controller, [good(), *RISING], lag=1, start=4)  # step 4 was in flight
    assert [each.format for each in second] == [None] * 8 + ["E5M2"]
    assert kinds(controller) == [(3, "rounding", "stall"), (12, "shift", "stall")]


def test_remedy_needs_no_shifter() -> None:
    controller = FormatController("E5M2", policy=RELATIVE, rounding="nearest_even")
    assert [each.rounding for each in feed(controller, RISING[:4])][-1] == "stochastic"


@pytest.mark.parametrize(
    "later",
    [
        [good(0.9, stall=0.9)] * 4,  # the loss still falls
        [good(1.0, stall=0.69)] * 4,  # 0.31 of the updates move, 0.40 did: not below three quarters of that
        [good(1.0, stall=0.6)] * 4,
    ],
    ids=["no plateau", "hardly risen", "not risen"],
)
def test_relative_rule_needs_a_rise_and_a_plateau_to_shift(later: Sequence[Observation]) -> None:
    controller = shifting("E3M4", RELATIVE, rounding="stochastic")
    assert not any(each.acts for each in feed(controller, [*[good(1.0, stall=0.6)] * 4, *later]))


def test_relative_rule_needs_a_stall_above_the_threshold() -> None:
    controller = shifting("E3M4", RELATIVE, rounding="nearest_even")
    assert not any(each.acts for each in feed(controller, [*[good(stall=0.1)] * 4, *[good(stall=0.5)] * 4]))


# ---- saved and restored


@pytest.mark.parametrize("cut", [1, 2])
def test_nan_batches_count_across_a_restart(cut: int) -> None:
    before, after = shifting("E7M0"), shifting("E7M0")
    feed(before, [nan()] * cut)
    after.restore(json.loads(json.dumps(before.saved())))
    assert [each.format for each in feed(after, [nan()] * (3 - cut), start=cut)][-1] == "E5M2"


observations = st.lists(
    st.builds(
        Observation,
        step=st.just(0),
        loss=st.sampled_from([1.0, 1.2, 1.6, 5.0]),
        finite=st.booleans(),
        params_finite=st.sampled_from([True, True, True, False]),
        stall_rate=st.sampled_from([0.0, 0.4, 0.6, 0.95]),
    ),
    min_size=6,
    max_size=60,
)


@given(
    observations,
    st.floats(0, 1),
    st.sampled_from([OFF, LITERAL, RELATIVE]),
    st.sampled_from(["E0M7", "E7M0", "E5M2"]),
    st.sampled_from([None, "nearest_even", "stochastic"]),
)
def test_saved_and_restored_decides_the_same(
    seen: list[Observation], share: float, policy: Policy, name: str, rounding: Any
) -> None:
    def fresh() -> FormatController:
        return shifting(name, policy, rounding=rounding, can_roll_back=True)

    whole, first, second = fresh(), fresh(), fresh()
    cut = round(share * len(seen))
    expected = feed(whole, seen, lag=1)
    before = feed(first, seen[:cut], lag=1)
    second.restore(json.loads(json.dumps(first.saved(), allow_nan=False)))
    after = feed(second, seen[cut:], lag=1, start=cut)
    # As text, since the loss of a rolled-back step may be NaN, which equals nothing.
    assert repr(before + after) == repr(expected)
    assert second.saved() == whole.saved()


# ---- set_format


def states() -> dict[str, Any]:
    tx = skip_nonfinite(optax.chain(partition_relative_clip("E7M0"), optax.adamw(1e-3), stall_monitor("E7M0")))
    optimizer = tx.init(PARAMS)
    stacked = jax.vmap(tx.init)(jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), PARAMS))
    mesh = Mesh(np.array(jax.devices()[:1]), ("runs",))
    return {
        "optax": optimizer,
        "stacked": stacked,
        "sharded": jax.device_put(stacked, NamedSharding(mesh, PartitionSpec("runs"))),
        "replicated": jax.device_put(optimizer, NamedSharding(mesh, PartitionSpec())),
        "integer": FormatParams.from_format("E7M0", rounding="stochastic", overflow="saturate"),
    }


def looks(state: Any) -> list[Any]:
    return [(leaf.shape, leaf.dtype, leaf.weak_type, leaf.committed, leaf.sharding) for leaf in jax.tree.leaves(state)]


@pytest.mark.parametrize("kind", states())
def test_set_format_keeps_all_but_the_format(kind: str) -> None:
    state = states()[kind]
    changed = set_format(state, "E5M2")
    assert jax.tree.structure(changed) == jax.tree.structure(state)
    assert looks(changed) == looks(state)
    before, after = get_format(state), get_format(changed)
    assert np.all(np.asarray(after.max_value) == 57344)
    assert np.all(np.asarray(after.native_overflow).view(np.float32) == np.inf)
    assert np.all(np.asarray(before.max_value) == 2.0**64)
    np.testing.assert_array_equal(after.rounding, before.rounding)
    np.testing.assert_array_equal(after.overflow, before.overflow)
    there_and_back = set_format(changed, "E7M0")
    chex.assert_trees_all_equal(there_and_back, state)


@pytest.mark.parametrize("kind", states())
def test_set_format_neither_traces_nor_compiles(kind: str) -> None:
    chex.clear_trace_counter()
    step = jax.jit(
        chex.assert_max_traces(lambda state: jax.tree.map(lambda leaf: leaf + leaf.dtype.type(0), state), n=1)
    )
    state = states()[kind]
    step(state)
    for name in ("E5M2", "E0M7", "E3M4", "E7M0"):
        state = set_format(state, name)
        assert np.all(np.asarray(get_format(step(state)).max_value) == parse(name).max_representable_value)
        assert step._cache_size() == 1


def test_every_format_in_a_state_changes() -> None:
    state = set_format(states()["optax"], "E3M4")
    found = [leaf for path, leaf in jax.tree.leaves_with_path(state) if "max_value" in jax.tree_util.keystr(path)]
    assert [float(leaf) for leaf in found] == [124.0, 124.0]


def test_a_format_for_each_run() -> None:
    state = set_format(states()["stacked"], ["E3M4", "E5M2", "E0M7"])
    assert get_format(state).max_value.tolist() == [124.0, 57344.0, 127 / 128]
    with pytest.raises(ValueError, match=r"2 formats for params of shape \(3,\)"):
        set_format(state, ["E3M4", "E5M2"])
    with pytest.raises(ValueError, match=r"2 formats for params of shape \(\)"):
        set_format(states()["optax"], ["E3M4", "E5M2"])


@pytest.mark.parametrize("name", ["bf16", "float32", "E8M2b140"])
def test_another_path_would_have_to_compile(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is cast on the .* path; this state was compiled for the fast path"):
        set_format(states()["optax"], name)


def test_integer_path_takes_the_fast_formats() -> None:
    params = set_format(states()["integer"], "bf16")
    assert float(set_format(params, "E3M4").max_value) == 124.0


def test_bad_set_format() -> None:
    with pytest.raises(UnknownFormatError, match="E5M2"):
        set_format(states()["optax"], "E5m2")
    for function in (lambda: set_format({"w": jnp.ones(2)}, "E5M2"), lambda: get_format({"w": jnp.ones(2)})):
        with pytest.raises(ValueError, match="holds no FormatParams"):
            function()


# ---- in a loop of one's own


def test_a_loop_of_ones_own() -> None:
    tx = skip_nonfinite(optax.chain(partition_relative_clip("E7M0"), optax.adam(0.1)))

    def train_step(state: Any, batch: jax.Array) -> Any:
        params, opt_state = state
        grid = get_format(opt_state)

        def loss_of(params: Any) -> jax.Array:
            return jnp.sum((quantize(params["w"], grid) - 1.1) ** 2) * batch

        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        metrics = {"loss": loss, "finite": jnp.isfinite(loss), "max": grid.max_value}
        return (optax.apply_updates(params, updates), opt_state), metrics

    chex.clear_trace_counter()
    jitted = jax.jit(chex.assert_max_traces(train_step, n=1), donate_argnums=0)
    controller = shifting("E7M0")
    state, maxima = (PARAMS, tx.init(PARAMS)), []
    state = jax.tree.map(jnp.copy, state)
    for step in range(10):
        state, metrics = jitted(state, jnp.float32(math.nan if step in (3, 4, 5) else 1.0))
        maxima.append(metrics["max"])
        state = controller.step(step, metrics, state)
    # Seen at step 5, decided while 6 ran, in force from 7 on.
    assert kinds(controller) == [(5, "shift", "nan")]
    assert [float(value) for value in maxima] == [2.0**64] * 7 + [57344.0] * 3
    assert jitted._cache_size() == 1
    assert int(optax.tree.get(state[1], "skipped")) == 3
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state[0]))


def test_step_rolls_back() -> None:
    controller = FormatController("E5M2", can_roll_back=True)
    state = get_format(partition_relative_clip("E5M2").init(PARAMS))
    marked, calls = replace(state, overflow=jnp.int32(2)), []

    def roll_back(state: FormatParams) -> FormatParams:
        calls.append(state)
        return marked

    for step, fine in enumerate((True, False, True, True)):
        metrics = {"loss": jnp.float32(1), "finite": jnp.asarray(fine), "params_finite": jnp.asarray(fine)}
        state = controller.step(step, metrics, state, roll_back)
    assert len(calls) == 1
    assert int(state.overflow) == 2


def test_step_refuses_what_it_cannot_carry_out():
    metrics = {"loss": jnp.float32(1), "finite": jnp.asarray(True)}
    state = partition_relative_clip("E7M0").init(jnp.zeros(2))
    with pytest.raises(ValueError, match="can_roll_back is True"):
        FormatController("E7M0", can_roll_back=True).step(0, metrics, state)
    with pytest.raises(ValueError, match="can_roll_back is False"):
        FormatController("E7M0").step(0, metrics, state, roll_back=lambda state: state)
    with pytest.raises(ValueError, match="how weights are rounded"):
        FormatController("E7M0", rounding="nearest_even").step(0, metrics, state)


def test_drain_decides_on_the_last_step():
    bad = {"loss": jnp.float32(jnp.nan), "finite": jnp.asarray(False)}
    state = partition_relative_clip("E7M0").init(jnp.zeros(2))
    controller = FormatController("E7M0", shifter=EmergencyMantissaShift(nan_patience=2))
    for step in range(2):
        state = controller.step(step, bad, state)
    assert controller.format == "E7M0"
    state = controller.drain(state)
    assert controller.format == "E5M2"
    assert float(state.format.max_value) == 57344.0
    assert controller.drain(state) is state


def steps_of(controller: FormatController, state: Any, goods: Sequence[bool], roll_back: Any) -> Any:
    """Hand over steps whose numbers and parameters are finite or not, and decide on all of them."""
    for step, fine in enumerate(goods):
        metrics = {"loss": jnp.float32(1), "finite": jnp.asarray(fine), "params_finite": jnp.asarray(fine)}
        state = controller.step(step, metrics, state, roll_back)
    return controller.drain(state, roll_back)


def test_a_rollback_leaves_formats_alone_until_there_was_a_shift() -> None:
    start = partition_relative_clip({"w": "E3M4", ".*": "E5M2"}).init(PARAMS)
    maxima = [group.format.max_value.item() for group in start.groups.values()]
    assert maxima == [124.0, 57344.0]
    calm = FormatController("E5M2", can_roll_back=True)
    state = steps_of(calm, start, [True, False, True, True], lambda state: start)
    assert [event.kind for event in calm.events] == ["rollback"]
    assert [group.format.max_value.item() for group in state.groups.values()] == maxima
    # The snapshot is older than the shift, which concerns all groups.
    shifted = shifting("E3M4", patience=1, can_roll_back=True)
    state = steps_of(shifted, start, [True, False, True, False, True, False, True], lambda state: start)
    assert [event.kind for event in shifted.events] == ["rollback", "shift"] + ["rollback", "exhausted"] * 2
    assert [group.format.max_value.item() for group in state.groups.values()] == [57344.0, 57344.0]


@pytest.mark.parametrize("cut", range(1, 8))
def test_a_loop_of_ones_own_resumes_across_a_shift(cut: int) -> None:
    bad = {"loss": jnp.float32(jnp.nan), "finite": jnp.asarray(False)}
    fine = {"loss": jnp.float32(0.1), "finite": jnp.asarray(True), "stall_rate": jnp.bfloat16(0.3)}
    state = partition_relative_clip("E7M0").init(jnp.zeros(2))

    def go_on(controller: FormatController, state: Any, steps: Iterable[int]) -> tuple[Any, list[float]]:
        maxima = []
        for step in steps:
            state = controller.step(step, bad if 2 <= step <= 4 else fine, state)
            maxima.append(float(state.format.max_value))
        return state, maxima

    whole, first, second = (shifting("E7M0") for _ in range(3))
    _, expected = go_on(whole, state, range(8))
    assert expected == [2.0**64] * 5 + [57344.0] * 3
    state, before = go_on(first, state, range(cut))
    second.restore(json.loads(json.dumps(first.saved(), allow_nan=False)))
    _, after = go_on(second, state, range(cut, 8))
    assert before + after == expected
    assert kinds(second) == kinds(whole) == [(4, "shift", "nan")]
    assert second.saved() == whole.saved()


# ---- metrics

MANY = {"per_layer": jnp.ones(3), "names": ["a"], "applied": None, "lr": np.float32(0.1), "max": jnp.float32(448)}
KINDS: dict[str, Any] = {
    "device": lambda value: jnp.asarray(value),
    "one element": lambda value: jnp.asarray(value).reshape(1),
    "bfloat16": lambda value: jnp.asarray(value, jnp.bfloat16),
    "python": lambda value: value,
    "numpy": lambda value: np.array(value, np.float32),
    "numpy scalar": np.float32,
}


@pytest.mark.parametrize("kind", KINDS)
def test_metrics_may_be_any_numbers_and_more_than_is_read(kind: str) -> None:
    controller = FormatController("E4M3", policy=Policy(window=1, warmup=0), shifter=EmergencyMantissaShift())
    state = partition_relative_clip("E4M3").init(PARAMS)
    numbers = {"loss": 1.0, "finite": True, "params_finite": True, "norm": 2.0, "overflow_rate": 0.5}
    metrics = {name: KINDS[kind](value) for name, value in numbers.items()}
    for step in range(2):
        state = controller.step(step, {**metrics, **MANY, "worst_overflow_site": "logits"}, state)
    (event,) = controller.events
    assert (event.kind, event.numbers["overflow_rate"], event.numbers["worst_overflow_site"]) == (
        "shift",
        0.5,
        "logits",
    )
    assert float(state.format.max_value) == 57344.0


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("norm", jnp.ones(3), r"metric 'norm' has the shape \(3,\); expected one number"),
        ("loss", np.ones((1, 2)), r"metric 'loss' has the shape \(1, 2\)"),
        ("mlp/overflow_rate", jnp.ones(2), r"metric 'mlp/overflow_rate' has the shape \(2,\)"),
        ("norm", [1.0], r"metric 'norm' is \[1.0\]; expected one number"),
        ("loss", "high", "metric 'loss' is 'high'; expected one number"),
        ("loss", np.array("high"), "metric 'loss' is array.*; expected one number"),
        ("loss", 1j, "metric 'loss' is 1j; expected one number"),
        ("norm", None, "metric 'norm' is None; expected one number"),
    ],
)
def test_metrics_that_are_no_single_number_are_refused_at_once(name: str, value: Any, told: str) -> None:
    controller = FormatController("E4M3")
    state = partition_relative_clip("E4M3").init(PARAMS)
    with pytest.raises(InputError, match=told):
        controller.step(0, {"loss": 1.0, "finite": True, name: value}, state)
    assert controller.saved()["in_flight"] == []

"""One training step as a pure function: what it keeps out, what it lets through, and where it ends up."""

from dataclasses import replace
from functools import cache
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from altgrad_core import parse
from altgrad_core.formats import EIGHT
from altgrad_jax import clip_by_global_norm, partition_relative_clip, power_of_two_scale, set_format
from altgrad_jax.control import get_format
from altgrad_jax.data import load_corpus
from altgrad_jax.mapped import RUNS, steps_of
from altgrad_jax.models import GPTConfig
from altgrad_jax.nn.products import GRADIENT, LHS, RHS
from altgrad_jax.schedules import Schedule
from altgrad_jax.state import Fault, Recoverable, RunSpec, StepMetrics, TrainState
from altgrad_jax.training import OptimizerConfig, Program

MODEL = GPTConfig(len(load_corpus(None, 8).vocabulary), context=8, layers=1, width=16, heads=2)
"""With four sequences in a batch that of other files, too, so that what one of them compiles serves all."""
SCHEDULE = Schedule(steps=60, learning_rate=1e-2, warmup=3)
NAN_BATCH, SPIKE, POISON = Fault(jnp.nan), Fault(1e6), Fault(1.0, True, jnp.nan)


def tokens(step: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(step).integers(0, 11, (4, MODEL.context + 1)), jnp.int32)


def bits(tree: Any) -> Any:
    return jax.tree.map(lambda x: np.asarray(x).view(f"u{x.dtype.itemsize}"), tree)


def assert_same_bits(left: Any, right: Any) -> None:
    chex.assert_trees_all_equal(bits(left), bits(right))


class Compiled:
    """A program's functions, compiled once for all tests: those of a fleet with a single run."""

    def __init__(self, format: str) -> None:
        self.program = Program.for_format(format, MODEL)
        self.params = self.program.fresh_params(0)
        mesh = Mesh(np.array(jax.devices()[:1]), (RUNS,))
        self._steps = steps_of(self.program, mesh)
        spread = NamedSharding(mesh, PartitionSpec(RUNS))
        self._many = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf[None], tree), out_shardings=spread)
        self._one = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf[0], tree))

    def start(self, spec: RunSpec) -> TrainState:
        """Calibrated on the first batch, where the spec says so."""
        schedule = SCHEDULE if spec.schedule == Schedule() else spec.schedule
        data = self.program.run_data(replace(spec, schedule=schedule))
        return self._one(self._steps.start(*self._many((self.params, data, tokens(0)))))

    def step(self, state: TrainState, batch: jax.Array, fault: Fault) -> tuple[TrainState, StepMetrics]:
        return self._one(self._steps.train(*self._many((state, batch, fault))))

    @property
    def traces(self) -> int:
        """How often a step was traced; files that share the program come and go between tests, not within them."""
        return self._steps.train._cache_size()  # type: ignore[attr-defined]

    def run(self, spec: RunSpec, faults: dict[int, Fault], steps: int) -> tuple[list[TrainState], list[StepMetrics]]:
        """States before the first and after each step, and what each step showed."""
        states, shown = [self.start(spec)], []
        for step in range(steps):
            fault = jax.tree.map(jnp.float32, faults.get(step, Fault()))
            fault = fault._replace(poison=fault.poison > 0, corrupt=fault.corrupt > 0)
            state, metrics = self.step(states[-1], tokens(step), fault)
            states.append(state)
            shown.append(metrics)
        return states, shown


@cache
def compiled(format: str) -> Compiled:
    return Compiled(format)


def fast() -> Compiled:
    return compiled("E5M2")


def losses(shown: list[StepMetrics]) -> list[float]:
    return [float(metrics.loss) for metrics in shown]


# ---- what a step keeps out


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_a_gradient_with_one_bad_element_is_skipped_like_a_nan_batch(value: float) -> None:
    fault = Fault(corrupt=True, gradient=value)
    states, shown = fast().run(RunSpec("E5M2"), {5: fault}, 7)
    assert [bool(metrics.applied) for metrics in shown] == [True] * 5 + [False, True]
    assert np.isfinite(losses(shown)).all()
    assert_same_bits(states[6].recoverable, states[5].recoverable)
    states, shown = fast().run(RunSpec("E5M2", recover=False), {5: fault}, 7)
    assert not bool(shown[5].params_finite)


def test_nan_batch_leaves_everything_as_it_was() -> None:
    states, shown = fast().run(RunSpec("E5M2"), {5: NAN_BATCH}, 8)
    assert_same_bits(states[6].recoverable, states[5].recoverable)
    assert_same_bits(states[6].run, states[5].run)
    assert (int(states[6].step), bool(states[6].sound), bool(states[7].sound)) == (6, False, True)
    assert [bool(metrics.applied) for metrics in shown] == [True] * 5 + [False] + [True] * 2
    assert not bool(shown[5].finite)
    assert bool(shown[5].params_finite)
    assert np.isnan(losses(shown)[5])
    assert np.isfinite(losses(shown)[6:]).all()
    without, _ = fast().run(RunSpec("E5M2"), {}, 5)
    assert_same_bits(states[5].recoverable, without[5].recoverable)


def test_nan_batch_without_recovery_is_for_good() -> None:
    states, shown = fast().run(RunSpec("E5M2", recover=False), {5: NAN_BATCH}, 8)
    assert [bool(metrics.applied) for metrics in shown] == [True] * 8
    assert not bool(shown[5].params_finite)
    assert np.isnan(losses(shown)[5:]).all()
    assert all(np.isnan(leaf).any() for leaf in jax.tree.leaves(states[-1].params))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_poisoned_weight_is_told_and_not_trained_on(value: float) -> None:
    states, shown = fast().run(RunSpec("E5M2"), {5: POISON._replace(weight=value)}, 7)
    assert [bool(metrics.params_finite) for metrics in shown] == [True] * 5 + [False] * 2
    assert not bool(states[6].sound)
    before, after = (jax.tree.leaves(states[k].params) for k in (5, 6))
    changed = sum(int(np.sum(bits(a) != bits(b))) for a, b in zip(before, after, strict=True))
    assert changed == 1
    assert_same_bits(states[6].amax_history, states[5].amax_history)


def test_spike_stays_out_of_the_amax_history() -> None:
    states, shown = fast().run(RunSpec("E5M2"), {10: SPIKE}, 12)
    assert [bool(metrics.amax_refused) for metrics in shown] == [False] * 10 + [True, False]
    assert_same_bits(states[11].amax_history, states[10].amax_history)
    assert not np.array_equal(states[12].amax_history, states[11].amax_history)
    assert float(shown[10].norm) > 10 * float(shown[9].norm)  # not 1e6 times: gradients saturate
    assert bool(shown[10].applied)
    assert bool(shown[10].clipped)
    assert not bool(shown[11].clipped)


@pytest.mark.parametrize(
    ("spec", "at"),
    [
        (RunSpec("E5M2", recover=False), 10),
        (RunSpec("E5M2", refuse_spikes=False), 10),
        (RunSpec("E5M2"), 3),  # a median needs eight norms
    ],
    ids=["no recovery", "switched off", "too early"],
)
def test_spike_that_comes_through(spec: RunSpec, at: int) -> None:
    states, shown = fast().run(spec, {at: SPIKE}, at + 1)
    assert not bool(shown[at].amax_refused)
    assert float(jnp.max(states[at + 1].amax_history)) > 100 * float(jnp.max(states[at].amax_history))


def test_clip_is_a_switch() -> None:
    clipping, shown = fast().run(RunSpec("E3M4"), {10: SPIKE}, 11)
    plain, unclipped = fast().run(RunSpec("E3M4", clip=False), {10: SPIKE}, 11)
    assert_same_bits(clipping[10].params, plain[10].params)
    assert bool(shown[10].clipped)
    assert not bool(unclipped[10].clipped)
    assert float(shown[10].overflow_rate) == float(unclipped[10].overflow_rate) >= OptimizerConfig().overflow_threshold
    assert float(jnp.max(shown[10].overflow_rates[:, GRADIENT])) >= float(shown[10].overflow_rate)


def test_rates_of_each_site_and_weight() -> None:
    """A weight that dwarfs its tensor makes the rest of it vanish, at its own site and as the right operand there."""
    assert fast().program.sites_of_weights == (5, 3, 0, 4, 6)  # down, proj, qkv, up, logits: the order of leaves
    _, shown = fast().run(RunSpec("E3M4"), {3: POISON._replace(weight=1e6)}, 4)
    before, after = shown[2], shown[3]
    up = MODEL.site_names().index("block0.up")
    grown = np.asarray(after.underflow_rates - before.underflow_rates)
    assert np.unravel_index(np.argmax(grown[:, :GRADIENT]), (MODEL.sites, GRADIENT)) == (up, RHS)
    assert float(after.underflow_rates[up, RHS]) > 0.9
    place = fast().program.sites_of_weights.index(up)
    assert float(after.stall_rates[place]) > 0.99 > float(before.stall_rates[place])
    assert float(before.saturation_rates[place]) == 0


# ---- formats as data


def test_one_program_for_all_formats() -> None:
    final, traces = {}, set()
    for name in EIGHT:
        states, shown = fast().run(RunSpec(name), {}, 12)
        traces.add(fast().traces)
        assert np.isfinite(losses(shown)).all()
        final[name] = losses(shown)[-1]
        assert float(get_format(states[-1].opt_state).max_value) == parse(name).max_representable_value
    assert len(traces) == 1
    assert final["E0M7"] == final["E1M6"]  # one fixed-point grid, at scales that differ by 4
    assert len(set(final.values())) == len(EIGHT) - 1


def test_format_can_be_set_between_steps() -> None:
    states, _ = fast().run(RunSpec("E7M0"), {}, 5)
    shifted, traces = set_format(states[-1], "E3M4"), fast().traces
    state, metrics = fast().step(shifted, tokens(5), FAULTLESS)
    assert fast().traces == traces
    other, unshifted = fast().step(states[-1], tokens(5), FAULTLESS)
    assert float(metrics.loss) != float(unshifted.loss)
    assert state.run.operand.max_value.tolist() == [124.0] * MODEL.sites
    assert other.run.operand.max_value.tolist() == [2.0**64] * MODEL.sites


def test_one_site_in_another_format_leaves_all_before_it_as_they_were() -> None:
    states, _ = fast().run(RunSpec("E5M2"), {}, 3)
    logits, step, traces = MODEL.sites - 1, fast().step, fast().traces
    stacked = jax.tree.map(lambda leaf: leaf[None], states[-1])
    moved = fast().program.with_formats(stacked, [["E5M2"] * logits + ["E0M7"]])
    moved = jax.tree.map(lambda leaf: leaf[0], moved)
    assert get_format(moved.opt_state).max_value == 57344
    places = [fast().program.sites_of_weights.index(logits)]
    for params, changed in (
        (moved.run.operand, [logits]),
        (moved.run.storage, places),
        (moved.opt_state[-1].format, places),
    ):
        assert np.flatnonzero(params.max_value != 57344).tolist() == changed
    _, before = step(states[-1], tokens(3), FAULTLESS)
    _, after = step(moved, tokens(3), FAULTLESS)
    assert fast().traces == traces
    forward = slice(LHS, GRADIENT)
    assert_same_bits(after.underflow_rates[:logits, forward], before.underflow_rates[:logits, forward])
    assert (after.underflow_rates > before.underflow_rates)[logits, forward].all()
    assert after.stall_rates[places[0]] != before.stall_rates[places[0]]


FAULTLESS = jax.tree.map(lambda value: jnp.asarray(value, bool if isinstance(value, bool) else jnp.float32), Fault())


def test_factor_on_the_learning_rate_is_data() -> None:
    """Half of it is the schedule of half the learning rate, in every bit, and nothing is compiled again."""
    (whole, _), _ = fast().run(RunSpec("E5M2"), {}, 1)
    traces = fast().traces
    halved = replace(whole, run=replace(whole.run, learning_rate=jnp.float32(0.5)))
    expected = fast().start(RunSpec("E5M2", schedule=replace(SCHEDULE, learning_rate=1e-2 / 2)))
    for step in range(4):
        halved, _ = fast().step(halved, tokens(step), FAULTLESS)
        whole, _ = fast().step(whole, tokens(step), FAULTLESS)
        expected, _ = fast().step(expected, tokens(step), FAULTLESS)
    assert_same_bits(halved.params, expected.params)
    assert not np.array_equal(halved.params["logits"]["weight"], whole.params["logits"]["weight"])
    assert fast().traces == traces


def test_same_seed_same_bits_other_seed_other_bits() -> None:
    stochastic = RunSpec("E4M3", storage="committed", storage_rounding="stochastic")
    first, again, other = (
        fast().run(replace(stochastic, seed=seed), {}, 4)[0][-1].params["logits"]["weight"] for seed in (0, 0, 1)
    )
    assert_same_bits(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("overflow", ["native", "saturate", "saturate_finite"])
def test_overflow_in_gradients(overflow: Any) -> None:
    states, shown = fast().run(RunSpec("E5M2", gradient_overflow=overflow, clip=False), {10: SPIKE}, 11)
    # E5M2 natively overflows to inf, and the spike overflows the delayed scale.
    assert float(shown[10].overflow_rate) > 0
    assert bool(shown[10].finite) is bool(shown[10].applied) is (overflow != "native")
    assert bool(shown[10].params_finite)
    assert np.isfinite(states[11].amax_history).all()


# ---- committed weights


def matmul_weights(params: Any) -> list[np.ndarray]:
    block = params["blocks"][0]
    linear = [block[name] for name in ("qkv", "proj", "up", "down")]
    return [np.asarray(layer["weight"]) for layer in [*linear, params["logits"]]]


@pytest.mark.parametrize("name", EIGHT)
@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic"])
def test_committed_weights_are_on_the_grid_after_every_step(name: str, rounding: Any) -> None:
    known = parse(name)
    grid = known.code_book()
    spec = RunSpec(name, storage="committed", storage_rounding=rounding)
    states, shown = fast().run(spec, {2: NAN_BATCH}, 4)
    for state in states:
        for weight in matmul_weights(state.params):
            unit = float(power_of_two_scale(np.max(np.abs(weight)), known.max_representable_value))
            assert np.isin(weight / np.float64(unit), grid[np.isfinite(grid)]).all()
    assert not np.isin(np.asarray(states[-1].params["tokens"], np.float64), grid).all()
    assert np.isfinite(losses(shown)[3])
    assert any(
        (a != b).any() for a, b in zip(matmul_weights(states[0].params), matmul_weights(states[-1].params), strict=True)
    )


def test_masters_are_not() -> None:
    states, _ = fast().run(RunSpec("E5M2"), {}, 2)
    assert_same_bits(states[0].params, fast().params)
    grid = parse("E5M2").code_book()
    assert not any(np.isin(weight.astype(np.float64), grid).all() for weight in matmul_weights(states[-1].params))


def test_rounding_of_committed_weights_is_data() -> None:
    nearest, _ = fast().run(RunSpec("E7M0", storage="committed"), {}, 3)
    traces = fast().traces
    stochastic, _ = fast().run(RunSpec("E7M0", storage="committed", storage_rounding="stochastic"), {}, 3)
    assert not np.array_equal(nearest[-1].params["logits"]["weight"], stochastic[-1].params["logits"]["weight"])
    assert fast().traces == traces


def test_stall_is_that_of_the_real_update() -> None:
    """Under nearest rounding, what stalls leaves the committed weights as they were."""
    states, shown = fast().run(RunSpec("E5M2", storage="committed"), {}, 6)
    for before, after, metrics in zip(states, states[1:], shown, strict=False):
        pairs = zip(matmul_weights(before.params), matmul_weights(after.params), strict=True)
        unmoved = total = 0
        for old, new in pairs:
            unmoved, total = unmoved + int((old == new).sum()), total + old.size
        assert float(metrics.stall_rate) == pytest.approx(unmoved / total, abs=0.02)


# ---- calibration


@pytest.mark.parametrize("name", ["E0M7", "E5M2", "E7M0"])
def test_calibration_fills_the_history_and_nothing_else(name: str) -> None:
    start = fast().start(RunSpec(name, calibrate=False))
    assert not start.amax_history.any()
    state = fast().start(RunSpec(name))
    assert (np.asarray(state.amax_history) > 0).all()
    assert np.isfinite(state.amax_history).all()
    np.testing.assert_array_equal(state.amax_history, np.broadcast_to(state.amax_history[:1], state.amax_history.shape))
    assert_same_bits(replace(state, amax_history=start.amax_history, run=start.run), start)


def test_calibrated_first_step_is_close_to_float32() -> None:
    exact = float(compiled("float32").run(RunSpec("float32"), {}, 1)[1][0].loss)
    narrow = RunSpec("E0M7")
    calibrated = float(fast().run(narrow, {}, 1)[1][0].loss)
    _, (blind,) = fast().run(replace(narrow, calibrate=False), {}, 1)
    assert abs(calibrated - exact) < 0.05
    assert float(blind.operand_overflow_rate) > 0.01


# ---- controls


def dense(x: jax.Array, weight: jax.Array) -> jax.Array:
    return lax.dot_general(x, weight, (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def normed(x: jax.Array, gain: jax.Array) -> jax.Array:
    return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5) * gain


def attended(qkv: jax.Array) -> jax.Array:
    batch, time, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    size, heads = width // MODEL.heads, ((0, 1), (0, 1))
    query, key, value = jnp.moveaxis(qkv.reshape(batch, time, 3, MODEL.heads, size), (2, 3), (0, 2))
    scores = lax.dot_general(query * size**-0.5, key, (((3,), (3,)), heads), preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((time, time), bool)), scores, -1e9))
    mixed = lax.dot_general(weights, value, (((3,), (2,)), heads), preferred_element_type=jnp.float32)
    return jnp.moveaxis(mixed, 1, 2).reshape(batch, time, width)


def plain_loss(params: Any, tokens: jax.Array) -> jax.Array:
    """A GPT without any cast."""
    seen, wanted = tokens[:, :-1], tokens[:, 1:]
    x = params["tokens"][seen] + params["positions"][: seen.shape[1]]
    block = params["blocks"][0]
    weight = {name: block[name]["weight"] for name in ("qkv", "proj", "up", "down")}
    x = x + dense(attended(dense(normed(x, block["attention_gain"]), weight["qkv"])), weight["proj"])
    x = x + dense(jax.nn.relu(dense(normed(x, block["mlp_gain"]), weight["up"])), weight["down"])
    logits = dense(normed(x, params["gain"]), params["logits"]["weight"])
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), wanted[..., None], axis=-1))


@pytest.mark.parametrize("recover", [False, True])
def test_float32_is_a_plain_gpt_bit_for_bit(recover: bool) -> None:
    def adamw(schedule: Schedule) -> optax.GradientTransformation:
        matrices = lambda params: jax.tree.map(lambda leaf: leaf.ndim >= 2, params)  # noqa: E731
        return optax.adamw(schedule, b2=0.99, weight_decay=0.01, mask=matrices)

    @jax.jit
    def plain_step(params: Any, state: Any, tokens: jax.Array, schedule: Schedule) -> Any:
        loss, gradients = jax.value_and_grad(plain_loss)(params, tokens)
        updates, state = adamw(schedule).update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    control = compiled("float32")
    schedule = SCHEDULE.on_device()
    params, opt_state, expected = control.params, adamw(schedule).init(control.params), []
    for step in range(30):
        params, opt_state, loss = plain_step(params, opt_state, tokens(step), schedule)
        expected.append(float(loss))
    states, shown = control.run(RunSpec("float32", clip=False, recover=recover), {}, 30)
    assert losses(shown) == expected
    assert_same_bits(states[-1].params, params)
    assert expected[-1] < expected[0]
    assert {float(metrics.overflow_rate) for metrics in shown} == {0.0}


def test_bf16_has_operands_in_bfloat16() -> None:
    program = Program.for_format("bf16", MODEL)
    assert program.bf16_operands
    state = jax.eval_shape(program.start, program.fresh_params(0), program.run_data(RunSpec("bf16")))
    lowered = jax.jit(program.step).lower(state, tokens(0), FAULTLESS).as_text()
    products = [line.split(":")[-1] for line in lowered.splitlines() if "stablehlo.dot_general" in line]
    assert len(products) == 3 * MODEL.sites
    for product in products[: MODEL.sites]:  # the forward ones; the others multiply bfloat16 values in float32
        operands, result = product.split("->")
        assert operands.count("bf16>") == 2
        assert "xf32>" in result


def test_a_format_is_served_by_its_path_alone() -> None:
    assert {Program.for_format(name, MODEL) for name in EIGHT} == {fast().program}
    for program, name in (("float32", "E5M2"), ("bf16", "float32"), ("E5M2", "bf16")):
        with pytest.raises(ValueError, match=r"path '.*' cannot cast to"):
            Program.for_format(program, MODEL).run_data(RunSpec(name))


def test_recoverable_is_what_a_rollback_replaces() -> None:
    states, _ = fast().run(RunSpec("E5M2"), {}, 3)
    back = states[3].recovered(states[1].recoverable)
    assert isinstance(back.recoverable, Recoverable)
    assert_same_bits(back.recoverable, states[1].recoverable)
    assert int(back.step) == 3


# ---- scales


def test_static_scales_are_one_and_can_be_repaired() -> None:
    """At a scale of 1 the operands of E0M7 saturate: its largest value is 127/128. Doubled scales end that."""
    plain, repaired = (
        fast().run(set_spec, {}, 12)
        for set_spec in (
            RunSpec("E0M7", scaling="static"),
            RunSpec("E0M7", scaling="static", repair_scales=True),
        )
    )
    assert {float(metrics.operand_overflow_rate) > 0.05 for metrics in plain[1]} == {True}
    assert_same_bits(plain[0][-1].widening, np.ones_like(plain[0][-1].widening))
    widening = np.asarray(repaired[0][-1].widening)
    assert set(np.unique(np.log2(widening) % 1)) == {0.0}
    assert widening.max() >= 4
    assert float(repaired[1][-1].operand_overflow_rate) < 0.01


def test_delayed_scales_need_a_repair_only_until_their_history_has_it() -> None:
    states, shown = fast().run(RunSpec("E5M2", repair_scales=True), {10: SPIKE}, 12)
    assert float(jnp.max(states[10].widening)) == 1
    assert float(shown[10].overflow_rate) > 0.01
    assert float(jnp.max(states[11].widening)) == 2  # the spike's amax was refused
    assert float(jnp.max(states[12].widening)) == 1


def test_the_factor_on_the_learning_rate_of_a_run() -> None:
    halved, _ = fast().run(RunSpec("E5M2", learning_rate=0.5), {}, 2)
    assert float(halved[0].run.learning_rate) == 0.5
    whole, _ = fast().run(RunSpec("E5M2"), {}, 2)
    assert not np.array_equal(halved[2].params["tokens"], whole[2].params["tokens"])


# ---- other clip rules


@pytest.mark.parametrize("rule", ["scaled_max", "ungated"])
def test_a_job_clips_by_the_rule_of_its_program(rule: Any) -> None:
    """What the optimizer does first to two gradients, the second a spike, is what the rule's own element does."""
    program = Program.for_format("E5M2", MODEL, OptimizerConfig(clip_rule=rule, base_clip=0.5, overflow_threshold=0.1))
    run = program.run_data(RunSpec("E5M2"))
    if rule == "ungated":
        alone = clip_by_global_norm(0.5)
    else:
        alone = partition_relative_clip("E5M2", 0.5, 0.1, rule=rule, window=program.amax_window)
    inside = optax.with_extra_args_support(program._clipper(run))
    calm = {"w": jnp.array([0.03, -0.04], jnp.float32)}
    states = [clipper.init(calm) for clipper in (inside, alone)]
    for gradients, rate in ((calm, 0.05), (jax.tree.map(lambda leaf: 1e4 * leaf, calm), 0.5)):
        results = []
        for place, clipper in enumerate((inside, alone)):
            update = jax.jit(clipper.update)
            clipped, states[place] = update(gradients, states[place], overflow_rate=jnp.float32(rate))
            results.append((clipped, optax.tree.get(states[place], "total_norm")))
        assert_same_bits(*results)
    assert float(results[0][0]["w"][0]) < 300


@pytest.mark.exhaustive
@pytest.mark.parametrize("rule", ["binades", "scaled_max", "quantile", "ungated"])
def test_a_job_can_clip_by_any_rule(rule: Any) -> None:
    base = 1e-3
    program = Program.for_format("E5M2", MODEL, OptimizerConfig(clip_rule=rule, base_clip=base))
    state = program.calibrate(program.start(program.fresh_params(0), program.run_data(RunSpec("E5M2"))), tokens(0))
    step = jax.jit(program.step)
    for k in range(10):
        fault = jax.tree.map(jnp.asarray, SPIKE._replace(loss_factor=1e6 if k == 9 else 1.0, corrupt=False))
        state, metrics = step(state, tokens(k), fault)
        assert bool(metrics.clipped) is (rule == "ungated" or k == 9)
    assert float(optax.tree.get(state.opt_state[0], "total_norm")) == float(metrics.norm)

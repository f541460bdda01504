"""The loop around the step: faults that a run heals from, shifts that compile nothing, fleets that are single runs."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from altgrad_core.errors import InputError
from altgrad_core.events import Event
from altgrad_core.evidence import Observation
from altgrad_core.formats import ROUNDINGS, parse
from altgrad_jax import Policy, all_finite, get_format
from altgrad_jax.data import load_corpus
from altgrad_jax.faults import check_faults
from altgrad_jax.fleet import Fleet
from altgrad_jax.job import Job, RunPlan, StepReport
from altgrad_jax.models import GPTConfig, site_names
from altgrad_jax.nn.products import GRADIENT
from altgrad_jax.schedules import Schedule
from altgrad_jax.shown import Shown
from altgrad_jax.state import RunSpec, TrainState
from altgrad_jax.training import Program

ROOT = Path(__file__).resolve().parents[1]
STEPS, FAULT, LATE = 120, 60, 125
SCHEDULE = Schedule(STEPS, learning_rate=1e-2, warmup=5)
SITES = tuple(site_names(1))
MARGIN = 0.1
"""Nats between a healed run and an undisturbed one; an untrained model is at 4.2, these end near 3.0."""

EAGER = Policy("relative_stall", window=4, warmup=0, cooldown=20, moving_share=2.0, plateau=10.0)
"""Judges every second window of a committed run."""
LITERAL = Policy("fallback_chain", window=4, warmup=0, cooldown=20)
ALWAYS_OVERFLOWING = Policy("by_cause", window=4, warmup=0, overflow_limit=0.0)
FOLLOWING = Policy("by_cause", window=4, warmup=0, underflow_limit=1.0, worst_underflow_limit=1.0)
BY_LAYER = Policy("by_cause", window=4, warmup=0, underflow_limit=0.3, worst_underflow_limit=0.3)
RETURNING = Policy("off", window=4, cooldown=0, recover_after=25)


def spec(format: str = "E4M3", **options: Any) -> RunSpec:
    return RunSpec(format, schedule=SCHEDULE, **options)


def guarded(*faults: str) -> RunPlan:
    return RunPlan(spec(), check_faults(faults, 1000), shift=True)


def bare(*faults: str) -> RunPlan:
    return RunPlan(spec(clip=False, recover=False), check_faults(faults, 1000))


PLANS = {
    "calm, on": guarded(f"nan@{LATE}:4"),
    "calm, off": bare(),
    "nan, on": guarded(f"nan@{FAULT}:5"),
    "nan, off": bare(f"nan@{FAULT}:5"),
    "spike, on": guarded(f"spike@{FAULT}:1e4"),
    "weight, on": guarded(f"weight@{FAULT}:nan"),
    "weight, off": bare(f"weight@{FAULT}:nan"),
    "rounding": RunPlan(spec("E5M2", storage="committed"), shift=True, policy=EAGER, stall_threshold=0.0),
    "literal": RunPlan(spec("E0M7"), shift=True, policy=LITERAL, stall_threshold=0.1),
    "slower": RunPlan(spec("E7M0", repair_scales=True), shift=True, policy=ALWAYS_OVERFLOWING),
    "scales": RunPlan(spec("E0M7", scaling="static"), shift=True, policy=FOLLOWING),
    "layers, calm": RunPlan(spec(), check_faults([f"nan@{LATE}:4"], 1000), shift=True, layers=SITES),
    "layers": RunPlan(spec("E0M7"), shift=True, policy=BY_LAYER, layers=SITES),
    "back again": RunPlan(spec(), check_faults(["nan@10:3"], 1000), shift=True, policy=RETURNING),
}


def program(vocabulary: int) -> Program:
    model = GPTConfig(vocabulary, context=8, layers=1, width=16, heads=2)
    return Program.for_format("E4M3", model)


@dataclass
class Trained:
    """All plans, trained side by side in one job."""

    job: Job
    losses: dict[str, float]
    reports: list[StepReport]
    states: dict[str, TrainState]
    compiled: list[str] = field(default_factory=list)

    def events(self, name: str, *kinds: str) -> list[Event]:
        index = list(PLANS).index(name)
        found = [event for report in self.reports for event in report.events[index]]
        return [event for event in found if not kinds or event.kind in kinds]

    def formats(self, name: str) -> list[str]:
        return [report.formats[list(PLANS).index(name)] for report in self.reports]


class Compilations(logging.Handler):
    """Collects what JAX says it compiles."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith("Compiling"):
            self.seen.append(record.getMessage())


def train_traces(job: Job) -> int:
    return job._fleet._steps.train._cache_size()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def trained() -> Trained:
    corpus = load_corpus(None, 8)
    job = Job(program(len(corpus.vocabulary)), list(PLANS.values()), corpus, batch=4, snapshot_every=10)
    reports = [report for _ in range(40) if (report := job.advance())]  # all programs but the rollback have run
    compilations, logger = Compilations(), logging.getLogger("jax")
    logger.addHandler(compilations)
    try:
        with jax.log_compiles():
            reports += list(job.run(STEPS))
    finally:
        logger.removeHandler(compilations)
    losses = job.evaluate(corpus.validation_batches(8, 32, 8))
    states = [jax.tree.map(lambda leaf, k=k: leaf[k], job.state) for k in range(len(PLANS))]
    return Trained(
        job,
        dict(zip(PLANS, losses.tolist(), strict=True)),
        reports,
        dict(zip(PLANS, states, strict=True)),
        compilations.seen,
    )


# ---- healing


@pytest.mark.parametrize("fault", ["nan", "spike", "weight"])
def test_with_interventions_a_run_heals(trained: Trained, fault: str) -> None:
    healed, undisturbed = trained.losses[f"{fault}, on"], trained.losses["calm, on"]
    assert undisturbed < 3.3
    assert abs(healed - undisturbed) < MARGIN
    assert bool(all_finite(trained.states[f"{fault}, on"].params))


@pytest.mark.parametrize("fault", ["nan", "weight"])
def test_without_it_does_not(trained: Trained, fault: str) -> None:
    assert np.isnan(trained.losses[f"{fault}, off"])
    assert not bool(all_finite(trained.states[f"{fault}, off"].params))


def test_interventions_leave_a_calm_run_alone(trained: Trained) -> None:
    assert trained.losses["calm, on"] == trained.losses["calm, off"]
    assert trained.events("calm, on") == trained.events("calm, off") == []


# ---- what happened when


def test_every_step_is_reported_once_and_in_order(trained: Trained) -> None:
    assert [report.step for report in trained.reports] == list(range(STEPS))
    assert {len(values) for report in trained.reports for values in report.metrics.values()} == {len(PLANS)}


def test_nan_batches_are_skipped_and_then_shift_one_step_late(trained: Trained) -> None:
    happened = [(event.step, event.kind) for event in trained.events("nan, on")]
    faults = [(FAULT + k, kind) for k in range(5) for kind in ("fault", "skip")]
    assert happened == [*faults[:6], (FAULT + 2, "shift"), *faults[6:]]
    formats = trained.formats("nan, on")
    assert set(formats[: FAULT + 4]) == {"E4M3"}
    assert set(formats[FAULT + 4 :]) == {"E5M2"}
    assert [event.kind for event in trained.events("nan, off")] == ["fault"] * 5


def test_poisoned_weight_goes_back_and_nothing_shifts(trained: Trained) -> None:
    assert [(event.step, event.kind, event.cause) for event in trained.events("weight, on", "rollback", "shift")] == [
        (FAULT, "rollback", "poisoned weights")
    ]
    assert [event.step for event in trained.events("weight, on", "skip")] == [FAULT, FAULT + 1]
    assert set(trained.formats("weight, on")) == {"E4M3"}


def test_spike_opens_the_gate_and_stays_out_of_the_history(trained: Trained) -> None:
    (gate,) = trained.events("spike, on", "gate")
    assert (gate.step, gate.cause) == (FAULT, "overflow")
    assert gate.numbers["overflow_rate"] >= 0.01
    assert gate.numbers["worst_overflow_site"] in trained.job.sites
    index = list(PLANS).index("spike, on")
    assert [report.step for report in trained.reports if report.metrics["amax_refused"][index]] == [FAULT]


def test_worst_sites_are_those_of_each_run(trained: Trained) -> None:
    rates = np.zeros((2, 7, 3), np.float32)
    rates[0, 6, GRADIENT], rates[1, 2, GRADIENT], rates[1, 3, :GRADIENT] = 0.5, 0.25, (0.5, 0.75)
    stalls = np.array([[0, 0, 0.5, 0, 0.25], [1, 0, 0, 0, 0]], np.float32)
    raw = {"loss": np.ones(2), "overflow_rates": rates, "underflow_rates": rates[::-1], "stall_rates": stalls}
    shown = Shown.of(raw | {"saturation_rates": stalls / 2}, trained.job.sites, (5, 3, 0, 4, 6))
    assert {name: values.tolist() for name, values in shown.metrics.items()} == {
        "loss": [1, 1],
        "worst_overflow_rate": [0.5, 0.25],  # of gradients: operands are not looked at
        "worst_underflow_rate": [0.25, 0.5],
        "worst_stall_rate": [0.5, 1],
        "worst_overflow_site": [6, 2],
        "worst_underflow_site": [2, 6],
        "worst_stall_site": [0, 5],
    }
    assert shown.numbers(1)["worst_overflow_site"] == "block0.values"
    of_layers = Observation.of(0, {"finite": 1.0, **shown.numbers(1, ["block0.proj", "block0.down"])}).layers
    down = Observation(0, 1.0, finite=True, stall_rate=1.0, saturation_rate=0.5)
    assert of_layers == {"block0.proj": Observation(0, 1.0, True, operand_overflow_rate=0.75), "block0.down": down}
    numbers = trained.reports[FAULT].numbers(list(PLANS).index("spike, on"))
    assert numbers["worst_overflow_site"] in trained.job.sites
    assert numbers["worst_overflow_rate"] >= numbers["overflow_rate"]


def test_stalled_committed_weights_are_rounded_stochastically(trained: Trained) -> None:
    events = trained.events("rounding", "rounding")
    assert [(event.cause, event.numbers["to"]) for event in events] == [("stall", "stochastic")]
    roundings = {name: ROUNDINGS[int(state.run.storage.rounding)] for name, state in trained.states.items()}
    assert roundings == {name: "stochastic" if name == "rounding" else "nearest_even" for name in PLANS}
    assert {event.kind for event in trained.events("rounding")} <= {"rounding", "exhausted"}


def test_literal_rule_goes_down_the_chain_with_pauses(trained: Trained) -> None:
    shifts = trained.events("literal", "shift")
    assert [(event.numbers["from"], event.numbers["to"]) for event in shifts] == [("E0M7", "E3M4"), ("E3M4", "E5M2")]
    assert shifts[1].step - shifts[0].step >= LITERAL.cooldown
    assert trained.events("literal", "exhausted")


def test_overflow_with_no_format_left_lowers_the_learning_rate(trained: Trained) -> None:
    (event,) = trained.events("slower")
    assert (event.step, event.kind, event.cause) == (3, "learning_rate", "overflow")
    assert (event.numbers["from"], event.numbers["to"]) == (1.0, 0.5)
    factors = {name: float(state.run.learning_rate) for name, state in trained.states.items()}
    assert factors == {name: 0.5 if name == "slower" else 1.0 for name in PLANS}


def test_static_scales_that_saturate_become_delayed_and_nothing_shifts(trained: Trained) -> None:
    (event,) = trained.events("scales")
    assert (event.step, event.kind, event.cause) == (3, "scales", "overflow")
    assert (event.numbers["from"], event.numbers["to"]) == ("static", "delayed")
    assert event.numbers["worst_overflow_site"] in trained.job.sites
    static = {name: bool(state.run.switches.static_scales) for name, state in trained.states.items()}
    assert static == dict.fromkeys(PLANS, False)
    index = list(PLANS).index("scales")
    rates = [report.metrics["operand_overflow_rate"][index] for report in trained.reports]
    assert min(rates[:5]) > 0.05 > 0.01 > max(rates[5:])


def test_layers_in_one_format_are_the_run_in_that_format(trained: Trained) -> None:
    assert trained.losses["layers, calm"] == trained.losses["calm, on"]


def test_layers_that_underflow_shift_and_the_others_stay(trained: Trained) -> None:
    shifts, index = trained.events("layers"), list(PLANS).index("layers")
    assert {(event.kind, event.cause) for event in shifts} == {("shift", "underflow")}
    assert all(event.numbers["underflow_rate"] >= 0.3 for event in shifts)
    formats = dict.fromkeys(SITES, "E0M7")
    for report in trained.reports:  # what is decided on a step is in force two steps later
        formats |= {str(e.numbers["layer"]): str(e.numbers["to"]) for e in shifts if e.step == report.step - 2}
        assert report.of_layers[index] == formats
    assert len(set(formats.values())) > 1
    state, weights = trained.states["layers"], trained.job._program.sites_of_weights
    maxima = [parse(formats[site]).max_representable_value for site in SITES]
    for params in (state.run.operand, state.run.gradient):
        assert params.max_value.tolist() == maxima
    for params in (state.run.storage, get_format(state.opt_state[-1])):
        assert params.max_value.tolist() == [maxima[site] for site in weights]
    assert float(get_format(state.opt_state).max_value) == min(maxima)


def test_layers_must_be_all_sites() -> None:
    with pytest.raises(InputError, match=r"layers are logits; expected none, or all sites: block0\.qkv"):
        Job(program(9), [RunPlan(spec(), shift=True, layers=("logits",))], load_corpus(None, 8), batch=2)
    with pytest.raises(InputError, match="formats of 7 layers in a run whose formats must stay"):
        RunPlan(spec(), layers=SITES).controller()


def test_the_first_format_is_tried_again_after_quiet_steps(trained: Trained) -> None:
    shifts = [(event.step, event.cause, event.numbers["to"]) for event in trained.events("back again", "shift")]
    assert shifts == [(12, "nan", "E5M2"), (38, "quiet", "E4M3")]  # step 13 was in flight; 14 to 38 are 25
    assert trained.formats("back again") == ["E4M3"] * 14 + ["E5M2"] * 26 + ["E4M3"] * (STEPS - 40)


def test_events_and_metrics_are_json(trained: Trained) -> None:
    for name in PLANS:
        for event in trained.events(name):
            assert repr(Event.from_json(event.to_json())) == repr(event)


# ---- nothing compiles again


def test_shifts_roundings_and_rollbacks_compile_nothing(trained: Trained) -> None:
    assert len(trained.compiled) == 1, trained.compiled  # the rollback, when it is first needed


# ---- saved and restored


def test_restored_job_goes_on_as_it_would_have(trained: Trained) -> None:
    job = trained.job

    def onwards(steps: int) -> list[str]:
        reports = [job.advance() for _ in range(steps)]
        return [
            repr((r.step, r.formats, r.events, {k: v.tolist() for k, v in r.metrics.items()})) for r in reports if r
        ]

    onwards(LATE + 2 - job.step)  # two NaN batches in, the second one not read yet
    saved = json.loads(json.dumps(job.saved()))
    arrays = jax.tree.map(jnp.copy, (job.state, job.snapshots))
    expected = onwards(10)
    final = jax.tree.map(np.asarray, job.state)
    assert any("'shift'" in line for line in expected)
    traced = train_traces(job)
    job.restore(saved, *arrays)
    assert job.reported_through == LATE
    assert onwards(10) == expected
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, job.state), final)
    assert train_traces(job) == traced


# ---- more snapshots, new moments


def test_rollback_to_the_oldest_of_three_with_new_moments(trained: Trained) -> None:
    corpus = load_corpus(None, 8)
    job = Job(
        program(len(corpus.vocabulary)),
        [guarded()] * len(PLANS),  # as many as above, whose step then serves
        corpus,
        batch=4,
        snapshot_every=2,
        snapshots_kept=3,
        rollback_moments="reset",
    )
    seen = []
    for _ in range(9):
        seen.append(jax.tree.map(np.asarray, job.state.recoverable))
        job.advance()
    assert train_traces(job) == train_traces(trained.job)
    now = jax.tree.map(np.asarray, job.state)
    every, logits = len(PLANS), {"logits": "E5M2"}
    back, _ = job._fleet.roll_back(
        job.snapshots, job.state, [True] * every, ["E3M4"] * every, [logits, *[{}] * (every - 1)]
    )
    found = jax.tree.map(np.asarray, back)
    same = partial(jax.tree.map, np.testing.assert_array_equal)
    same((found.params, found.amax_history, found.norm_history), tuple(seen[4][k] for k in (0, 2, 3)))
    clipper, (moments, _, schedule), monitor = found.opt_state
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(moments))
    same((schedule, monitor.stall_rate), (now.opt_state[1][2], now.opt_state[2].stall_rate))
    assert int(schedule.count[0]) == 9
    assert set(get_format(clipper).max_value.tolist()) == {124.0}
    for params, place in ((get_format(monitor), 4), (found.run.operand, 6), (found.run.gradient, 6)):
        assert np.argwhere(params.max_value != 124.0).tolist() == [[0, place]]
        assert params.max_value[0, place] == 57344.0


# ---- fleets


SIDE_BY_SIDE = """
import jax, numpy as np
from altgrad_core.formats import parse
from altgrad_jax.data import load_corpus
from altgrad_jax.fleet import Fleet
from altgrad_jax.models import GPTConfig
from altgrad_jax.schedules import Schedule
from altgrad_jax.state import Fault, RunSpec
from altgrad_jax.training import Program

corpus = load_corpus(None, 8)
model = GPTConfig(len(corpus.vocabulary), context=8, layers=1, width=16, heads=2)
program = Program.for_format("E5M2", model)
schedule = Schedule(60, learning_rate=1e-2, warmup=5)
specs = [
    RunSpec("E4M3", 0, schedule=schedule),
    RunSpec("E7M0", 1, storage="committed", storage_rounding="stochastic", schedule=schedule),
    RunSpec("E0M7", 2, clip=False, schedule=schedule),
]
faults = {(1, 10): Fault(np.nan), (2, 12): Fault(1e4), (0, 14): Fault(1.0, True, np.nan)}

def trained(specs, devices=None):
    fleet = Fleet(program, specs, devices)
    tokens = lambda step: np.stack([corpus.batch(spec.seed, step, 2, 8) for spec in specs])
    (state, snapshots), seen = fleet.start(tokens(0)), []
    for step in range(24):
        state, metrics = fleet.step(state, tokens(step), [faults.get((spec.seed, step), Fault()) for spec in specs])
        seen.append(metrics)
        if step % 5 == 4:
            snapshots = fleet.keep_snapshot(snapshots, state, [True] * len(specs))
        if step == 15:
            back = [spec.seed == 0 for spec in specs]
            formats = ["E5M2" if spec.seed == 0 else spec.format for spec in specs]
            state, snapshots = fleet.roll_back(snapshots, state, back, formats)
            state = fleet.set_roundings(state, [spec.storage_rounding for spec in specs])
    losses = fleet.evaluate(state, corpus.validation_batches(2, 4, 8))
    shared = (fleet._steps.train, fleet._ring.keep, fleet._ring.roll_back)
    assert [each._cache_size() for each in shared] == [1, 1, 1]
    each = [jax.tree.map(lambda leaf: np.asarray(leaf)[run].tobytes(), (seen, state)) for run in range(len(specs))]
    return each, losses, seen, state

assert len(jax.devices()) == 2
forward, losses, seen, state = trained(specs)
assert {len(leaf) for leaf in jax.tree.leaves(seen)} == {4}  # three runs on two devices: one place is filled up
assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(state)} == {2}
maxima = [parse(name).max_representable_value for name in ("E5M2", "E7M0", "E0M7", "E0M7")]
assert np.asarray(state.run.operand.max_value).tolist() == [[each] * model.sites for each in maxima]
assert np.asarray(state.run.seed).tolist() == [0, 1, 2, 2]
assert losses.shape == (3,) and len(set(losses.tolist())) == 3 and np.isfinite(losses).all()
backward, reversed_losses, _, _ = trained(specs[::-1])
assert backward[::-1] == forward
assert reversed_losses[::-1].tolist() == losses.tolist()
print("same bits")
"""


@pytest.mark.exhaustive
def test_places_in_a_fleet_on_two_devices() -> None:
    settings = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SIDE_BY_SIDE],
        cwd=ROOT,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "same bits\n"


@pytest.mark.exhaustive  # all programs are compiled again for one run
def test_a_run_in_a_fleet_is_the_run_alone(trained: Trained) -> None:
    """On as many devices, every bit."""
    name = "nan, on"
    place = list(PLANS).index(name)
    corpus = load_corpus(None, 8)
    alone = Job(program(len(corpus.vocabulary)), [PLANS[name]], corpus, batch=4, snapshot_every=10)
    for ours, theirs in zip(alone.run(STEPS), trained.reports, strict=True):
        assert (ours.formats[0], repr(ours.events[0])) == (theirs.formats[place], repr(theirs.events[place]))
        for metric, values in ours.metrics.items():
            assert values[0].tobytes() == theirs.metrics[metric][place].tobytes(), (ours.step, metric)
    for left, right in zip(jax.tree.leaves(alone.state), jax.tree.leaves(trained.states[name]), strict=True):
        assert np.asarray(left)[0].tobytes() == np.asarray(right).tobytes()
    assert alone.evaluate(corpus.validation_batches(8, 32, 8)).tolist() == [trained.losses[name]]


@pytest.mark.parametrize(
    ("plan", "told"),
    [
        (RunPlan(RunSpec("E5M2", recover=False), shift=True), "a shift needs recovery"),
        (RunPlan(RunSpec("bf16"), shift=True), "bf16 run cannot shift"),
        (RunPlan(RunSpec("E5M2"), shift=True, nan_patience=0), "nan_patience is 0"),
        (RunPlan(RunSpec("E5M2"), shift=True, stall_threshold=1.5), "stall_threshold is 1.5"),
    ],
)
def test_plans_that_cannot_work(plan: RunPlan, told: str) -> None:
    with pytest.raises(InputError, match=told):
        plan.controller()


def test_a_fleet_needs_a_run() -> None:
    none: Sequence[RunSpec] = ()
    with pytest.raises(ValueError, match="at least one run"):
        Fleet(program(11), none)

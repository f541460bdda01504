"""The matrix in JAX: all runs of the training job in one fleet, so that its step is compiled once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from altgrad_core.events import Event
from altgrad_jax.data import load_corpus
from altgrad_jax.faults import check_faults
from altgrad_jax.job import Job, RunPlan
from altgrad_jax.models import GPTConfig
from altgrad_jax.schedules import Schedule
from altgrad_jax.state import RunSpec
from altgrad_jax.training import Program
from benchmarks.faults.cases import FAULTS, STALLED, Case, Outcome


@dataclass(frozen=True)
class Size:
    """How large the runs are. The fault comes in the middle, at a step that differs from seed to seed."""

    steps: int = 240
    batch: int = 8
    context: int = 32
    layers: int = 1
    width: int = 32
    heads: int = 2
    learning_rate: float = 1e-2
    snapshot_every: int = 20


def outcomes(cases: Sequence[Case], size: Size) -> dict[Case, Outcome]:
    """Train all cases side by side."""
    corpus = load_corpus(None, size.context)
    model = GPTConfig(len(corpus.vocabulary), size.context, size.layers, size.width, size.heads)
    program = Program.for_format(cases[0].format, model)
    plans = [plan(case, Schedule(size.steps, size.learning_rate)) for case in cases]
    job = Job(program, plans, corpus, batch=size.batch, snapshot_every=size.snapshot_every)
    events: list[list[Event]] = [[] for _ in cases]
    for report in job.run(size.steps):
        for kept, seen in zip(events, report.events, strict=True):
            kept.extend(seen)
    losses = job.evaluate(corpus.validation_batches(8, 4 * size.batch, size.context)).tolist()
    ended = (Outcome(loss, tuple(seen)) for loss, seen in zip(losses, events, strict=True))
    return dict(zip(cases, ended, strict=True))


def plan(case: Case, schedule: Schedule) -> RunPlan:
    """The run of a case."""
    steps = int(schedule.steps)
    spec = RunSpec(
        case.format,
        case.seed,
        case.storage,
        "stochastic" if case.storage == "committed" and case.fault != STALLED else "nearest_even",
        clip=case.on,
        recover=case.on,
        schedule=schedule,
        learning_rate=case.learning_rate,
    )
    return RunPlan(spec, check_faults(injections(case, steps), steps), shift=case.on)


def injections(case: Case, steps: int) -> tuple[str, ...]:
    """The faults of a case."""
    at = steps // 2 + 7 * case.seed
    return tuple(each.format(step=at) for each in FAULTS.get(case.fault, ()))

"""The host never waits for the step it has just dispatched: shown on a fleet that computes nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pytest

from altgrad_jax import job as job_module
from altgrad_jax.data import load_corpus
from altgrad_jax.faults import check_faults
from altgrad_jax.job import Job, RunPlan
from altgrad_jax.models import GPTConfig
from altgrad_jax.state import Fault, RunSpec, StepMetrics
from altgrad_jax.training import Program

STEPS = 30
SHAPES = {"overflow_rates": (7, 3), "underflow_rates": (7, 3), "stall_rates": (5,), "saturation_rates": (5,)}
"""Of the metrics that are no scalars: one block has seven sites, five of them with weights."""


class Opaque:
    """Stands for arrays on the device: whatever reads it fails, since it has no attribute and no value."""

    __slots__ = ()

    def __bool__(self) -> bool:
        raise AssertionError("the host read the state")


@dataclass(frozen=True)
class Metric:
    """One metric on its way: knows when it is read."""

    fleet: "LateFleet"
    step: int
    value: float | bool
    shape: tuple[int, ...] = ()

    def copy_to_host_async(self) -> None:
        self.fleet.announced.add(self.step)

    def __array__(self, dtype: object = None, copy: object = None) -> npt.NDArray:
        self.fleet.reads.append((self.step, self.fleet.dispatched))
        return np.full((1, *self.shape), self.value)


@dataclass
class LateFleet:
    """Takes the place of a fleet; steps 5 to 8 are NaN, and those from 20 on leave NaN parameters."""

    program: Program
    runs: Sequence[RunSpec]
    dispatched: int = -1
    reads: list[tuple[int, int]] = field(default_factory=list)
    announced: set[int] = field(default_factory=set)
    formats: list[str] = field(default_factory=list)
    rolled_back: int = 0
    snapshots_kept: int = 2
    rollback_moments: str = "kept"

    def start(self, calibration: object) -> tuple[Opaque, Opaque]:
        return Opaque(), Opaque()

    def step(self, state: Opaque, tokens: object, faults: Sequence[Fault]) -> tuple[Opaque, StepMetrics]:
        self.dispatched += 1
        good, sound = not 5 <= self.dispatched <= 8, self.dispatched < 20
        values = {"loss": 3.0 if good else float("nan"), "finite": good, "params_finite": sound, "applied": good}
        metrics = {
            name: Metric(self, self.dispatched, values.get(name, 0), SHAPES.get(name, ()))
            for name in StepMetrics._fields
        }
        return Opaque(), StepMetrics(**metrics)  # pyrefly: ignore[bad-argument-type]

    def keep_snapshot(self, snapshots: Opaque, state: Opaque, wanted: Sequence[bool]) -> Opaque:
        return Opaque()

    def set_formats(self, state: Opaque, formats: Sequence[str], of_layers: Sequence[Mapping[str, str]]) -> Opaque:
        self.formats.extend(formats)
        return Opaque()

    def roll_back(
        self,
        snapshots: Opaque,
        state: Opaque,
        chosen: Sequence[bool],
        formats: Sequence[str],
        of_layers: Sequence[Mapping[str, str]],
    ) -> tuple[Opaque, Opaque]:
        self.rolled_back += 1
        return Opaque(), Opaque()


def test_metrics_are_read_while_the_next_step_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a shift and rollbacks: what is read of step k is read once step k + 1 is on its way, and nothing else."""
    monkeypatch.setattr(job_module, "Fleet", LateFleet)
    corpus = load_corpus(None, 8)
    program = Program.for_format("E7M0", GPTConfig(len(corpus.vocabulary), 8, 1, 16, 2))
    plan = RunPlan(RunSpec("E7M0"), check_faults(["nan@5:4"], STEPS), shift=True)
    job = Job(program, [plan], corpus, batch=2, snapshot_every=7)
    fleet = job._fleet
    assert isinstance(fleet, LateFleet)
    for _ in range(STEPS):
        job.advance()
    assert fleet.formats == ["E5M2"]
    assert fleet.rolled_back > 0
    assert {step for step, _ in fleet.reads} == set(range(STEPS - 1))
    assert all(dispatched == step + 1 for step, dispatched in fleet.reads)
    assert fleet.announced == set(range(STEPS))

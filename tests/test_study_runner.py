"""How a study goes about its fleets, with jobs that do not train."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from altgrad.study import runner
from altgrad.study.results import SERIES
from altgrad.study.runner import StudyConfig, entries, run_study
from altgrad_jax.job import RunPlan, StepReport
from altgrad_jax.shown import Shown
from altgrad_jax.training import Program

FORMATS = ("float32", "bf16", "E5M2", "E7M0")
FLEETS = {"float32", "bf16", "8-bit formats"}


class UntrainedJob:
    """Shows the step as the loss of every run, and waits for the other fleets before the first, as if it compiled."""

    together: threading.Barrier | None = None

    def __init__(self, program: Program, plans: Sequence[RunPlan], *_: object, **__: object) -> None:
        self.controllers = [plan.controller() for plan in plans]
        self.seeds = np.array([plan.spec.seed for plan in plans], np.float32)

    def run(self, until: int) -> Iterator[StepReport]:
        for step in range(until):
            if self.together is not None and step == 0:
                self.together.wait(timeout=20)
            time.sleep(1e-4)  # for another thread to come between
            shown, runs = Shown(dict.fromkeys(SERIES, step + self.seeds), {}, ()), len(self.seeds)
            yield StepReport(step, shown, ("",) * runs, ({},) * runs, ((),) * runs)

    def evaluate(self, batches: object) -> np.ndarray:
        return self.seeds


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> StudyConfig:
    monkeypatch.setattr(runner, "Job", UntrainedJob)
    return StudyConfig(formats=FORMATS, seeds=2, steps=10)


def test_fleets_compile_together_and_train_in_turn_and_results_keep_their_order(
    config: StudyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(UntrainedJob, "together", threading.Barrier(len(FLEETS)))
    shown: list[tuple[str, int]] = []
    study = run_study(config, lambda name, size, report: shown.append((name, report.step)))
    listed = entries(config)
    assert [(run.format, run.seed, run.scene) for run in study.runs] == [
        (entry.plan.spec.format, entry.plan.spec.seed, entry.scene) for entry in listed
    ]
    assert [run.final_loss for run in study.runs] == [run.seed for run in study.runs]
    seeds = np.array([run.seed for run in study.runs])
    for values in study.series.values():
        np.testing.assert_array_equal(values, np.arange(10) + seeds[:, None])
    turns = [shown[first : first + 10] for first in (0, 10, 20)]
    assert {turn[0][0] for turn in turns} == FLEETS
    assert turns == [[(turn[0][0], step) for step in range(10)] for turn in turns]


@pytest.mark.parametrize("error", [RuntimeError("no device"), KeyboardInterrupt()])
def test_where_one_fleet_fails_the_others_stop(config: StudyConfig, error: BaseException) -> None:
    seen: list[tuple[str, int]] = []

    def failing(name: str, size: int, report: StepReport) -> None:
        seen.append((name, report.step))
        if name == seen[0][0] and report.step == 2:
            raise error

    endless = StudyConfig(formats=FORMATS, seeds=1, steps=20_000)
    with pytest.raises(type(error)):
        run_study(endless, failing)
    assert max(step for _, step in seen) < 19_000

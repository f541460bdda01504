"""Runs a study: all formats, seeds and scenes, as few fleets as there are cast paths."""

from __future__ import annotations

import math
import platform
import shlex
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from itertools import chain, product
from pathlib import Path
from threading import Event as Flag
from threading import Lock

import jax
import numpy as np
import numpy.typing as npt

from altgrad.study.results import SERIES, RunResult, Scene, Study, StudyError
from altgrad_core.events import Event
from altgrad_core.formats import parse
from altgrad_core.stability import FORMAT_FALLBACK, EmergencyMantissaShift
from altgrad_jax.data import Corpus, load_corpus
from altgrad_jax.faults import check_faults
from altgrad_jax.job import Job, RunPlan, StepReport
from altgrad_jax.models import GPTConfig
from altgrad_jax.schedules import Schedule
from altgrad_jax.state import RunSpec
from altgrad_jax.training import OptimizerConfig, Program

_VALIDATION_BATCHES = 8
_VALIDATION_SIZE = 32

CONTROLS = ("float32", "bf16")


@dataclass(frozen=True)
class StudyConfig:
    """Train every format in three scenes with paired seeds, and write a report: the demo's main job."""

    out: Path = Path("altgrad-study")
    """Folder for study.json, series.npz, report.html and report.md; what is there is replaced."""
    formats: tuple[str, ...] = ("float32", "bf16", "E0M7", "E1M6", "E3M4", "E5M2", "E7M0")
    """Formats to train. float32 is the control that the others are compared with."""
    scenes: tuple[Scene, ...] = ("clean", "committed", "stress")
    """clean: float32 masters. committed: weights stored on the grid. stress: faults, interventions off and on."""
    seeds: int = 3
    """Number of paired seeds: the same seed means the same first weights and the same batches."""
    steps: int = 200
    """Optimizer steps of each run."""
    faults: tuple[str, ...] = ()
    """Faults of the stress scene; by default a spike at 40% of the steps and five NaN batches at 55%."""
    data: Path | None = None
    """Text file to train on; by default the Shakespeare that ships."""
    batch: int = 8
    """Sequences in a batch."""
    context: int = 32
    """Characters in a sequence."""
    layers: int = 2
    """Transformer blocks."""
    width: int = 64
    """Size of the residual stream."""
    heads: int = 4
    """Attention heads."""
    learning_rate: float = 3e-3
    """Peak learning rate, the same for every format."""

    def __post_init__(self) -> None:
        """Refuse what could not work, before anything is compiled."""
        for name in ("seeds", "steps", "batch", "context"):
            if getattr(self, name) < 1:
                raise StudyError(f"--{name} is {getattr(self, name)}; expected at least 1")
        if not 0 < self.learning_rate < math.inf:
            raise StudyError(f"--learning-rate is {self.learning_rate}; expected a positive number")
        for name, values in (("formats", self.formats), ("scenes", self.scenes)):
            if len(set(values)) != len(values):
                raise StudyError(f"--{name} names something twice: {' '.join(values)}")
        if not self.formats or not self.scenes:
            raise StudyError("a study needs at least one format and one scene")
        for name in self.formats:
            parse(name)
            if name not in CONTROLS and not EmergencyMantissaShift().knows(name) and "stress" in self.scenes:
                known = ", ".join(FORMAT_FALLBACK)
                raise StudyError(f"the stress scene shifts formats, and {name} has no fallback; expected {known}")
        if self.faults and "stress" not in self.scenes:
            raise StudyError("--faults have no effect without the stress scene")
        check_faults(self.faults, self.steps)

    def injected(self) -> tuple[str, ...]:
        """The faults of the stress scene as they are written."""
        if self.faults:
            return self.faults
        first_nan = int(self.steps * 0.55)
        return (f"spike@{int(self.steps * 0.4)}:1e4", f"nan@{first_nan}:{max(1, min(5, self.steps - first_nan))}")


@dataclass(frozen=True)
class _Entry:
    """A run of the study: what it computes and under which heading its result goes."""

    plan: RunPlan
    scene: Scene
    interventions: bool | None


def entries(config: StudyConfig) -> list[_Entry]:
    """All runs of a study, in the order of its results."""
    listed: list[_Entry] = []
    schedule = Schedule(config.steps, config.learning_rate)
    for name, seed in product(config.formats, range(config.seeds)):
        bare = RunSpec(name, seed, clip=False, recover=False, schedule=schedule)
        if "clean" in config.scenes:
            listed.append(_Entry(RunPlan(bare), "clean", None))
        if "committed" in config.scenes and not parse(name).is_float32:
            for rounding in ("nearest_even", "stochastic"):
                spec = replace(bare, storage="committed", storage_rounding=rounding)
                listed.append(_Entry(RunPlan(spec), "committed", None))
        if "stress" in config.scenes:
            faults = check_faults(config.injected(), config.steps)
            listed.append(_Entry(RunPlan(bare, faults), "stress", False))
            can_shift = name not in CONTROLS
            guarded = replace(bare, clip=can_shift, recover=True)
            listed.append(_Entry(RunPlan(guarded, faults, shift=can_shift), "stress", True))
    return listed


def run_study(config: StudyConfig, on_step: Callable[[str, int, StepReport], None] | None = None) -> Study:
    """Train all runs of a study: its fleets are compiled at the same time and train in turn.

    What is traced and compiled leaves cores to others; training does not, and two fleets would take the cache from each
    other.

    Args:
        config: the study.
        on_step: called with the name of a fleet, its number of runs and what a step of it showed; by the threads of
            all fleets, each step of a fleet after the one before.

    Returns:
        The results, nothing written yet.

    Raises:
        StudyError: for a config that cannot work.
        DataError: for a data file that cannot be used.
    """
    started = time.monotonic()
    corpus = load_corpus(config.data, config.context)
    listed = entries(config)
    fleets: dict[Program, list[int]] = {}
    for index, entry in enumerate(listed):
        fleets.setdefault(_program(config, entry.plan.spec.format, corpus), []).append(index)
    series = {name: np.full((len(listed), config.steps), np.nan, np.float32) for name in SERIES}
    shared = _Shared(config, corpus, listed, series, on_step, Lock(), Flag())
    runs: dict[int, RunResult] = {}
    with ThreadPoolExecutor(len(fleets)) as pool:
        longest_first = sorted(fleets.items(), key=lambda fleet: -len(fleet[1]))
        training = [pool.submit(_run_fleet, shared, program, members) for program, members in longest_first]
        try:
            for each in as_completed(training):
                runs.update(each.result())
        except BaseException:  # Ctrl-C, or a fleet that failed: the others are not worth waiting for
            shared.stop.set()
            raise
    return Study(
        config=_described(config, corpus, len(listed)),
        environment=_environment(),
        sites=tuple(next(iter(fleets)).model.site_names()),
        runs=tuple(runs[index] for index in range(len(listed))),
        series=series,
        wall_seconds=time.monotonic() - started,
    )


@dataclass(frozen=True)
class _Shared:
    """What the threads of all fleets share: ``turn`` is held by the one that trains, ``stop`` tells all to end."""

    config: StudyConfig
    corpus: Corpus
    listed: Sequence[_Entry]
    series: Mapping[str, npt.NDArray[np.float32]]
    on_step: Callable[[str, int, StepReport], None] | None
    turn: Lock
    stop: Flag


def _run_fleet(shared: _Shared, program: Program, members: Sequence[int]) -> dict[int, RunResult]:
    config, listed = shared.config, shared.listed
    job = Job(program, [listed[index].plan for index in members], shared.corpus, batch=config.batch)
    reports = job.run(config.steps)
    first = next(reports)  # by now the step is compiled
    with shared.turn:
        events = _trained(shared, program, members, chain([first], reports))
        if shared.stop.is_set():
            return {}
        batches = shared.corpus.validation_batches(_VALIDATION_BATCHES, _VALIDATION_SIZE, config.context)
        losses = job.evaluate(batches)
    return {
        index: _result(listed[index], job.controllers[place].format, float(losses[place]), tuple(events[place]))
        for place, index in enumerate(members)
    }


def _trained(
    shared: _Shared, program: Program, members: Sequence[int], reports: Iterable[StepReport]
) -> list[list[Event]]:
    """Take all steps of a fleet, record them, and return the events of each run."""
    fleet = "bf16" if program.bf16_operands else ("float32" if program.path == "identity" else "8-bit formats")
    events: list[list[Event]] = [[] for _ in members]
    for report in reports:
        if shared.stop.is_set():
            break
        for name, values in shared.series.items():
            values[members, report.step] = report.metrics[name]
        for kept, new in zip(events, report.events, strict=True):
            kept.extend(new)
        if shared.on_step is not None:
            shared.on_step(fleet, len(members), report)
    return events


def _result(entry: _Entry, final_format: str, final_loss: float, events: tuple[Event, ...]) -> RunResult:
    spec = entry.plan.spec
    return RunResult(
        format=spec.format,
        seed=spec.seed,
        scene=entry.scene,
        storage=spec.storage,
        storage_rounding=spec.storage_rounding,
        interventions=entry.interventions,
        final_format=final_format,
        final_loss=final_loss,
        events=events,
    )


def _program(config: StudyConfig, name: str, corpus: Corpus) -> Program:
    model = GPTConfig(len(corpus.vocabulary), config.context, config.layers, config.width, config.heads)
    return Program.for_format(name, model)


def _described(config: StudyConfig, corpus: Corpus, runs: int) -> dict[str, object]:
    return {
        "command": _command(config),
        "steps": config.steps,
        "seeds": config.seeds,
        "formats": list(config.formats),
        "scenes": list(config.scenes),
        "faults": list(config.injected()) if "stress" in config.scenes else [],
        "data": "Shakespeare, as shipped" if config.data is None else config.data.name,
        "characters": len(corpus.train) + len(corpus.validation),
        "vocabulary": len(corpus.vocabulary),
        "batch": config.batch,
        "context": config.context,
        "layers": config.layers,
        "width": config.width,
        "heads": config.heads,
        "learning_rate": config.learning_rate,
        "base_clip": OptimizerConfig().base_clip,
        "overflow_threshold": OptimizerConfig().overflow_threshold,
        "unigram_loss": _unigram_loss(corpus),
        "runs": runs,
    }


def _command(config: StudyConfig) -> str:
    """The command line that gives this study again: the options that are not at their defaults."""
    words = ["altgrad", "study"]
    for each in fields(config):
        value = getattr(config, each.name)
        if value != each.default and each.name != "out":
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--{each.name.replace('_', '-')}", *map(str, values)]
    return shlex.join(words)


def _unigram_loss(corpus: Corpus) -> float:
    """Entropy of the character frequencies, in nats: the loss of a model that has learnt nothing else."""
    frequencies = np.bincount(corpus.train, minlength=len(corpus.vocabulary)) / len(corpus.train)
    present = frequencies[frequencies > 0]
    return float(-np.sum(present * np.log(present)))


def _environment() -> dict[str, str]:
    devices = jax.devices()
    packages = {name: version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy", "ml_dtypes")}
    return {
        "python": platform.python_version(),
        **packages,
        "machine": platform.machine(),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
    }

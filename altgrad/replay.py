"""``altgrad replay``: makes every decision of a run's controller again from what the run logged, and compares."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import tyro
from rich.console import Console

from altgrad.show.tables import WholeTable
from altgrad_core.control import DECISIONS, Controller
from altgrad_core.errors import InputError
from altgrad_core.events import Event, unjsonable
from altgrad_core.evidence import Observation

if TYPE_CHECKING:
    from altgrad.train import TrainConfig


class ReplayError(InputError):
    """A folder that holds no run, or one whose log cannot be read."""


@dataclass(frozen=True)
class ReplayConfig:
    """Make every decision of a run's controller again from its log, and compare with what was done."""

    run: tyro.conf.Positional[Path]
    """Folder of the run, as altgrad train wrote it; the run may have been interrupted, and resumed."""


@dataclass(frozen=True)
class Difference:
    """The first place where a run and its replay part.

    Attributes:
        step: which step.
        logged: what the run logged there; None for nothing.
        derived: what its controller decides there by the log; None for nothing.
    """

    step: int
    logged: str | None
    derived: str | None

    def __str__(self) -> str:
        """In one line."""
        return f"step {self.step}: the log says {self.logged or 'nothing'}, the replay {self.derived or 'nothing'}"


@dataclass(frozen=True)
class Replay:
    """A run's controller, replayed.

    Attributes:
        steps: steps in the log.
        decisions: what the controller decides by the log, in order.
        logged: the decisions that the run logged.
        difference: where they part first; None where they agree, in every number and in every step's format.
    """

    steps: int
    decisions: tuple[Event, ...]
    logged: tuple[Event, ...]
    difference: Difference | None


def replay(config: ReplayConfig, console: Console | None = None) -> bool:
    """Run ``altgrad replay``.

    Returns:
        Whether every decision in the log follows from its numbers, and none is missing.

    Raises:
        ReplayError: for a folder that holds no run, or one whose log cannot be read.
    """
    console = console or Console()
    found = replay_run(config.run)
    if found.decisions or found.logged:
        console.print(_table(found), highlight=False, crop=False)
    counted = f"{len(found.decisions)} decision{'s' * (len(found.decisions) != 1)} in {found.steps} steps"
    if found.difference is None:
        console.print(f"{counted}: all agree with the log", highlight=False)
        return True
    console.print(f"{counted}: the log differs. First at {found.difference}", highlight=False, soft_wrap=True)
    return False


def replay_run(folder: Path) -> Replay:
    """Make every decision of a run again.

    Args:
        folder: of the run: ``config.json``, ``metrics.jsonl`` and ``events.jsonl`` are read, and ``result.json`` looked
            for, which a run writes that came to its end.

    Raises:
        ReplayError: for a folder that holds no run, or one whose log cannot be read.
    """
    controller = _config(folder).plan().controller()
    steps = [_step(line, folder) for line in _lines(folder / "metrics.jsonl")]
    events = [_event(line, folder) for line in _lines(folder / "events.jsonl")]
    # A run that was killed may have logged the events of a step whose numbers it did not come to write.
    end = math.inf if (folder / "result.json").is_file() else len(steps)
    logged = tuple(event for event in events if event.kind in DECISIONS and event.step < end)
    difference = _follow(controller, steps, folder)
    decisions = tuple(controller.events)
    apart = (_apart(*pair) for pair in zip_longest(logged, decisions))
    earliest = [each for each in (difference, next(filter(None, apart), None)) if each is not None]
    return Replay(len(steps), decisions, logged, min(earliest, key=lambda each: each.step, default=None))


def _follow(controller: Controller, steps: Sequence[tuple[Observation, str]], folder: Path) -> Difference | None:
    """Show the controller all steps as the run did; where a step ran in another format than was in force, if any."""
    difference, formats = None, [_in_force(controller)] * 2
    for step, (seen, ran_in) in enumerate(steps):
        if seen.step != step:
            raise ReplayError(f"{folder / 'metrics.jsonl'} has step {seen.step} where {step} was expected")
        # What was decided on step k lands while k+1 runs, and is in force from k+2 on.
        in_force = formats.pop(0)
        if difference is None and ran_in != in_force:
            difference = Difference(step, f"format {ran_in}", f"format {in_force}")
        controller.observe(seen, in_flight=step + 1)
        formats.append(_in_force(controller))
    return difference


def _in_force(controller: Controller) -> str:
    return _formats(controller.format, controller.formats)


def _formats(format: str, of_layers: Mapping[str, str]) -> str:
    """The format of a run, with those of its layers if it is in layers."""
    return " ".join([format, *(f"{layer}:{each}" for layer, each in of_layers.items())])


def _apart(logged: Event | None, derived: Event | None) -> Difference | None:
    """Where two decisions differ, compared as the lines of the log: floats survive those exactly."""
    lines = [None if event is None else event.to_json() for event in (logged, derived)]
    if lines[0] == lines[1]:
        return None
    first = min((event for event in (logged, derived) if event is not None), key=lambda event: event.step)
    told = [None if event is None or event.step > first.step else event.to_json() for event in (logged, derived)]
    return Difference(first.step, *told)


def _config(folder: Path) -> TrainConfig:
    from altgrad.train import TrainConfig  # late: it brings JAX along, which --help can do without

    path = folder / "config.json"
    if not path.is_file():
        raise ReplayError(f"{folder} holds no run ({path.name} is missing); expected a folder that altgrad train wrote")
    try:
        return TrainConfig.of_identity(json.loads(path.read_text()))
    except (ValueError, AttributeError) as error:
        raise ReplayError(f"{path} does not tell what was run: {error}") from None


def _lines(path: Path) -> Iterator[str]:
    """The whole lines of a log; the last may have been cut off when the run was killed."""
    if not path.is_file():
        raise ReplayError(f"{path.parent} holds no run that has begun ({path.name} is missing)")
    lines = path.read_text().splitlines()
    return (line for index, line in enumerate(lines) if index + 1 < len(lines) or line.endswith("}"))


def _step(line: str, folder: Path) -> tuple[Observation, str]:
    """What a step showed, and the format that it ran in."""
    try:
        logged = json.loads(line)
        ran_in = _formats(logged.pop("format"), logged.pop("layer_formats", {}))
        numbers = {name: unjsonable(value) for name, value in logged.items()}
        return Observation.of(int(numbers["step"]), numbers), ran_in
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ReplayError(f"{folder / 'metrics.jsonl'} is damaged: {line!r} is not the numbers of a step") from None


def _event(line: str, folder: Path) -> Event:
    try:
        return Event.from_json(line)
    except ValueError as error:
        raise ReplayError(f"{folder / 'events.jsonl'} is damaged: {error}") from None


def _table(found: Replay) -> WholeTable:
    table = WholeTable(title="Decisions of the controller", title_justify="left")
    for name in ("step", "decision", "cause", "numbers", "log"):
        table.add_column(name, justify="right" if name == "step" else "left", no_wrap=name == "step")
    kept = [event.to_json() for event in found.logged]
    for event in found.decisions:
        line = event.to_json()
        agrees = line in kept
        if agrees:
            kept.remove(line)
        table.add_row(str(event.step), event.kind, event.cause, _told(event), "agrees" if agrees else "differs")
    for line in kept:
        event = Event.from_json(line)
        table.add_row(str(event.step), event.kind, event.cause, _told(event), "only in the log")
    return table


def _told(event: Event) -> str:
    shown = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in event.numbers.items()}
    return ", ".join(f"{name} {value}" for name, value in shown.items())

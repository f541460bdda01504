"""What a lockstep found, as a page that opens offline: the verdict on top, every step, the first difference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jinja2

from altgrad.parity.runs import Lockstep, Run, StepRecord
from altgrad.parity.show import difference_facts, environment_facts, outcome, verdict

_TEMPLATES = Path(__file__).parent / "templates"
_STYLES = Path(__file__).parents[1] / "study" / "templates"


def page_of(found: Lockstep, about: str) -> str:
    """The page, in HTML.

    Args:
        found: the lockstep.
        about: what was run, in a line.

    >>> import numpy as np
    >>> from altgrad.parity import lockstep
    >>> still = lambda: (0, lambda state, step: (state, {"w": np.float32(1)}))
    >>> "a and b are identical in 3 steps" in page_of(lockstep(still, still, steps=3), "nothing to speak of")
    True
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([_TEMPLATES, _STYLES]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    first, run = found.first_difference, found.decisive
    return environment.get_template("parity.html.j2").render(
        about=about,
        passed=found.passed,
        verdict=verdict(found),
        runs=[(each, outcome(each)) for each in (*found.repeats, *([found.run] if found.run else []))],
        repeats=len(found.repeats),
        run=run,
        marks=[(step, _kind(run, step), _told(record)) for step, record in enumerate(run.history)],
        stretches=list(_stretches(run)),
        difference={} if first is None else difference_facts(first, run.labels),
        environment=environment_facts(found.environment),
    )


@dataclass(frozen=True)
class _Stretch:
    """Steps one after another that compare alike.

    Attributes:
        steps: the first and the last.
        kind: ``identical``, ``near`` or ``differs``.
        record: of each of them.
    """

    steps: tuple[int, int]
    kind: str
    record: StepRecord


def _stretches(run: Run) -> Iterator[_Stretch]:
    start = 0
    for step, record in enumerate(run.history):
        is_last = step + 1 == len(run.history)
        if is_last or run.history[step + 1] != record or _kind(run, step + 1) != _kind(run, step):
            yield _Stretch((start, step), _kind(run, step), record)
            start = step + 1


def _kind(run: Run, step: int) -> str:
    if run.first_difference is not None and run.first_difference.step == step:
        return "differs"
    record = run.history[step]
    return "identical" if record.identical == record.tensors else "near"


def _told(record: StepRecord) -> str:
    same = f"{record.identical} of {record.tensors} tensors identical"
    return same if record.first is None else f"{same}, {record.first} the first that is not"

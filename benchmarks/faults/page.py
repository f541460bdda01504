"""The page of the matrix: docs/fault-matrix.md."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.faults.cases import NOISE, Case, Outcome, Row, Storage, difference, harmless, rows
from benchmarks.faults.processes import ProcessRow
from benchmarks.page import machine

PAGE = Path(__file__).parents[2] / "docs" / "fault-matrix.md"

_HEAD = f"""# What each fault costs

Written by `python -m benchmarks.faults --write` on {{machine}}.

A character model is trained on the Shakespeare that ships, and in the middle something breaks: in each run once, at
another step for each seed. **Off**: no clipping, no skipping, no rollback, no shift. **On**: `clip`, `recover` and
`shift`, with every setting at its default. Shown is the held-out loss, in nats per character, minus that of the
undisturbed twin, which has the same seed, weights, batches and interventions: the mean over {{seeds}} seeds ± their
standard deviation.

**Healed** means that with the interventions a run ends, on average, at most {NOISE} nats above its twin. For scale,
undisturbed twins of which one learns a thousandth faster end up to
{{harmless}}
nats apart for a single seed. A shift may end well below zero, in the better format. Committed weights are rounded
stochastically, except where the format is to stall. Masters do not stall, since they keep what their casts lose: so
there is no such row for them.
"""


@dataclass
class Matrix:
    """What was measured so far."""

    rows: dict[str, list[Row]] = field(default_factory=dict)
    harmless: dict[tuple[str, str, Storage], tuple[float, ...]] = field(default_factory=dict)
    processes: list[ProcessRow] = field(default_factory=list)

    def add(self, framework: str, outcomes: Mapping[Case, Outcome]) -> None:
        """Take in the runs of a framework."""
        self.rows[framework] = rows(framework, outcomes)
        self.harmless |= {(framework, *kind): values for kind, values in harmless(outcomes).items()}


def write(matrix: Matrix) -> Path:
    """Write the page."""
    PAGE.write_text(written(matrix))
    return PAGE


def written(matrix: Matrix) -> str:
    """The page as Markdown."""
    seeds = max((len(row.on) for each in matrix.rows.values() for row in each), default=0)
    head = _HEAD.format(machine=machine(("jax", "torch")), seeds=seeds, harmless=_told_harmless(matrix))
    parts = [head, *(_table(name, each) for name, each in matrix.rows.items())]
    if matrix.processes:
        parts.append(_process_table(matrix.processes))
    return "\n".join(parts)


def _table(framework: str, found: Sequence[Row]) -> str:
    lines = [
        f"## {framework}",
        "",
        "| fault | format | weights | twin, off / on | off | on | healed | what was done, times a run |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(found, key=lambda row: [each.fault for each in found].index(row.fault)):
        off, on = difference(row.off), difference(row.on)
        lines.append(
            f"| {row.fault} | {row.format} | {row.storage} | {row.twin[0]:.3f} / {row.twin[1]:.3f} | {off} | {on} | "
            f"{'yes' if row.heals else '**no**'} | {row.done} |"
        )
    return "\n".join([*lines, ""])


def _process_table(found: Sequence[ProcessRow]) -> str:
    lines = [
        "## The process",
        "",
        "`altgrad train` in E4M3, with two NaN batches and a spike, and a checkpoint every 20 of 160 steps. Off: what",
        "a run without checkpoints loses. On: the same command with `--resume`.",
        "",
        "| what befell it | weights | twin | off: lost | on | difference | logs, events and result |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found:
        same = "the twin's, every byte" if row.same_bits else "**differ**"
        told = f"{row.off} | {row.on} | {row.difference:+.3f}"
        lines.append(f"| {row.fault} | {row.storage} | {row.twin:.3f} | {told} | {same} |")
    return "\n".join([*lines, ""])


def _told_harmless(matrix: Matrix) -> str:
    """The largest difference between twins of which one learns a thousandth faster, for each kind of run."""
    largest = {kind: max(map(abs, values), default=math.nan) for kind, values in matrix.harmless.items()}
    return ", ".join(f"{value:.3f} ({' '.join(kind)})" for kind, value in largest.items()) or "an unknown number of"

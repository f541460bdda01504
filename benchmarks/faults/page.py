"""The page of the matrix: docs/fault-matrix.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.faults.cases import NOISE, Case, Outcome, Row, difference, harmless, rows
from benchmarks.faults.processes import ProcessRow
from benchmarks.page import machine

PAGE = Path(__file__).parents[2] / "docs" / "fault-matrix.md"

_HEAD = f"""# What each fault costs

Written by `python -m benchmarks.faults --write` on {{machine}}.

A character model is trained on the Shakespeare that ships, and in the middle something breaks: in each run once, at
another step for each seed. **Off**: no clipping, no skipping, no rollback, no shift. **On**: `clip`, `recover` and
`shift`, with every setting at its default. Shown is the held-out loss, in nats per character, minus that of the
undisturbed twin, which has the same seed, weights, batches and interventions: the mean over all seeds ± their standard
deviation.

**Healed** means that with the interventions a run ends, on average, at most {NOISE} nats above its twin. For scale, it
is said how far apart undisturbed twins end of which one learns a thousandth faster. A shift may end well below zero, in
the better format. A rollback costs the steps since the older of two snapshots. Committed weights are rounded
stochastically, except where the format is to stall. Masters do not stall, since they keep what their casts lose: so
there is no such row for them.
"""

_NOTE = """{about} Snapshots every {snapshot_every} of {steps} steps, {seeds} seeds.
Harmless twins end up to {harmless} apart.

"""


@dataclass
class Matrix:
    """What was measured so far: rows and what is said above them, by framework."""

    rows: dict[str, list[Row]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    processes: list[ProcessRow] = field(default_factory=list)

    def add(self, framework: str, about: str, outcomes: Mapping[Case, Outcome], steps: int, every: int) -> None:
        """Take in the runs of a framework."""
        self.rows[framework] = rows(framework, outcomes)
        apart = {kind: max(map(abs, values)) for kind, values in harmless(outcomes).items()}
        self.notes[framework] = _NOTE.format(
            about=about,
            snapshot_every=every,
            steps=steps,
            seeds=len({case.seed for case in outcomes}),
            harmless=", ".join(f"{value:.3f} ({' '.join(kind)})" for kind, value in apart.items()),
        )


def write(matrix: Matrix) -> Path:
    """Write the page; sections that were not measured stay as they were."""
    kept = _sections(PAGE.read_text()) if PAGE.exists() else {}
    PAGE.write_text(written(matrix, kept))
    return PAGE


def written(matrix: Matrix, kept: Mapping[str, str] | None = None) -> str:
    """The page as Markdown, with sections kept from an earlier one where there are no new ones."""
    new = {name: matrix.notes[name] + _table(each) for name, each in matrix.rows.items()}
    if matrix.processes:
        new["The process"] = _process_table(matrix.processes)
    sections = {**(kept or {}), **{name: f"## {name}\n\n{text}\n" for name, text in new.items()}}
    head = _HEAD.format(machine=machine(("jax", "torch")))
    return "\n".join([head, *(sections[name] for name in ("JAX", "torch", "The process") if name in sections)])


def _sections(page: str) -> dict[str, str]:
    """The sections of a page by their titles."""
    return {part.partition("\n")[0]: f"## {part.rstrip()}\n" for part in page.split("\n## ")[1:]}


def _table(found: Sequence[Row]) -> str:
    lines = [
        "| fault | format | weights | twin, off / on | off | on | healed | what was done, times a run |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(found, key=lambda row: [each.fault for each in found].index(row.fault)):
        twin = f"{row.twin[0]:.3f} / {row.twin[1]:.3f}"
        differences = f"{difference(row.off)} | {difference(row.on)} | {'yes' if row.heals else '**no**'}"
        lines.append(f"| {row.fault} | {row.format} | {row.storage} | {twin} | {differences} | {row.done} |")
    return "\n".join(lines)


def _process_table(found: Sequence[ProcessRow]) -> str:
    lines = [
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
    return "\n".join(lines)

"""``python -m benchmarks.ablation [--write]``: what each intervention changes, with paired seeds and error bars.

Every row of a table compares runs that share seeds, batches and all options but one. ``--write`` makes
``docs/ablation.md`` of it.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress
from scipy import stats

from altgrad_core.settings import Policy
from altgrad_jax.data import Corpus, load_corpus
from altgrad_jax.faults import check_faults
from altgrad_jax.job import Job, RunPlan
from altgrad_jax.models import GPTConfig
from altgrad_jax.schedules import Schedule
from altgrad_jax.state import RunSpec
from altgrad_jax.training import JobClipRule, OptimizerConfig, Program
from benchmarks.page import machine

PAGE = Path(__file__).parents[1] / "docs" / "ablation.md"
FORMATS = ("E0M7", "E3M4", "E7M0")
_BATCH, _CONTEXT, _VALIDATION_BATCHES, _VALIDATION_SIZE = 8, 32, 8, 32
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Setting:
    """Circumstances of a run.

    Attributes:
        name: as the tables show it.
        change: what it changes in a run.
        faults: what is injected, in percent of the steps: ``spike@40:1e4`` comes at 40%.
    """

    name: str
    change: Callable[[RunSpec], RunSpec] = field(default=lambda spec: spec)
    faults: tuple[str, ...] = ()

    def plan(self, spec: RunSpec, steps: int, **options: object) -> RunPlan:
        """A run under these circumstances."""
        at = [fault.partition("@")[0::2] for fault in self.faults]
        placed = [(kind, *rest.partition(":")) for kind, rest in at]
        specs = [f"{kind}@{int(percent) * steps // 100}{colon}{value}" for kind, percent, colon, value in placed]
        return RunPlan(self.change(spec), check_faults(specs, steps), **options)


CALM = Setting("calm")
SPIKE = Setting("one spike of 1e4", faults=("spike@40:1e4",))
SPIKES = Setting("five spikes of 1e3", faults=tuple(f"spike@{percent}:1e3" for percent in range(40, 90, 10)))
NOISE = Setting("five batches of noise", faults=("noise@40:5",))
NANS = Setting("five NaN batches", faults=("nan@40:5",))
STATIC = Setting("static scales", lambda spec: replace(spec, scaling="static"))
FAST = Setting("learning rate times 5", lambda spec: replace(spec, learning_rate=5.0))
CLIP_SETTINGS = (CALM, STATIC, SPIKE, SPIKES, NOISE, FAST)


@dataclass(frozen=True)
class Entry:
    """One run of the ablation: which table, row and variant it is a sample of.

    Attributes:
        table: the question.
        setting: the circumstances.
        variant: what is compared; the first variant of a table is what the others are compared with.
        plan: the run.
        clip_rule: the rule of its program.
    """

    table: str
    setting: str
    variant: str
    plan: RunPlan
    clip_rule: JobClipRule = "max"


@dataclass(frozen=True)
class Outcome:
    """How a run ended: held-out loss, share of steps with the gate open, shifts and rollbacks."""

    loss: float
    clipped: float
    shifts: int
    rollbacks: int


ALONE = "Clipping alone: no skipped steps, no rollback, nothing kept out of the scales"
TOGETHER = "Clipping beside everything else: skipped steps, rollback, spikes kept out of the scales"
HYGIENE = "Hygiene of scales, beside the default clipper"
POLICIES = "Policies of the shift, committed weights to nearest"
MASTERS = "Policies of the shift, float32 masters"

VARIANTS: dict[str, tuple[str, ...]] = {
    ALONE: ("none", "max", "binades", "scaled_max", "quantile", "ungated"),
    TOGETHER: ("none", "max", "ungated"),
    HYGIENE: ("default", "no refusal", "no calibration", "repair"),
    POLICIES: ("no shift", "fallback_chain", "relative_stall", "by_cause"),
    MASTERS: ("no shift", "fallback_chain", "relative_stall", "by_cause"),
}


def entries(steps: int, seeds: int) -> Iterator[Entry]:
    """All runs."""
    for name, seed in itertools.product(FORMATS, range(seeds)):
        spec = RunSpec(name, seed, schedule=Schedule(steps))
        yield from _clip_entries(spec, steps)
        yield from _hygiene_entries(spec, steps)
        yield from _policy_entries(spec, steps)


def _clip_entries(spec: RunSpec, steps: int) -> Iterator[Entry]:
    rules: tuple[JobClipRule, ...] = ("max", "binades", "scaled_max", "quantile", "ungated")
    for table, setting in itertools.product((ALONE, TOGETHER), CLIP_SETTINGS):
        base = replace(spec, recover=table == TOGETHER)
        yield Entry(table, setting.name, "none", setting.plan(replace(base, clip=False), steps))
        for rule in rules:
            if rule in VARIANTS[table]:
                yield Entry(table, setting.name, rule, setting.plan(base, steps), rule)


def _hygiene_entries(spec: RunSpec, steps: int) -> Iterator[Entry]:
    variants = {
        "default": spec,
        "no refusal": replace(spec, refuse_spikes=False),
        "no calibration": replace(spec, calibrate=False),
        "repair": replace(spec, repair_scales=True),
    }
    for setting, (variant, changed) in itertools.product((CALM, STATIC, SPIKE, SPIKES), variants.items()):
        if setting is not STATIC or variant in ("default", "repair"):
            yield Entry(HYGIENE, setting.name, variant, setting.plan(changed, steps))


def _policy_entries(spec: RunSpec, steps: int) -> Iterator[Entry]:
    for table, setting in itertools.product((POLICIES, MASTERS), (CALM, NANS, STATIC)):
        stored = replace(spec, storage="committed" if table == POLICIES else "master")
        yield Entry(table, setting.name, "no shift", setting.plan(stored, steps))
        for policy in ("fallback_chain", "relative_stall", "by_cause"):
            plan = setting.plan(stored, steps, shift=True, policy=Policy(policy))
            yield Entry(table, setting.name, policy, plan)


def run(steps: int, seeds: int, console: Console) -> list[tuple[Entry, Outcome]]:
    """Train everything: one fleet for each clip rule."""
    corpus = load_corpus(None, _CONTEXT)
    listed = list(entries(steps, seeds))
    done: list[tuple[Entry, Outcome]] = []
    with Progress(console=console) as progress:
        task = progress.add_task("", total=len(listed) * steps)
        for rule in dict.fromkeys(entry.clip_rule for entry in listed):
            members = [entry for entry in listed if entry.clip_rule == rule]
            outcomes = _run_fleet(
                rule, [entry.plan for entry in members], corpus, steps, lambda n: progress.advance(task, n)
            )
            done += zip(members, outcomes, strict=True)
    return done


def _run_fleet(
    rule: JobClipRule, plans: Sequence[RunPlan], corpus: Corpus, steps: int, advance: Callable[[int], None]
) -> list[Outcome]:
    model = GPTConfig(len(corpus.vocabulary), _CONTEXT, layers=2, width=64, heads=4)
    program = Program.for_format("E5M2", model, OptimizerConfig(clip_rule=rule))
    job = Job(program, plans, corpus, batch=_BATCH)
    clipped, shifts, rollbacks = (np.zeros(len(plans)) for _ in range(3))
    for report in job.run(steps):
        clipped += report.metrics["clipped"] / steps
        for index, events in enumerate(report.events):
            shifts[index] += sum(event.kind == "shift" for event in events)
            rollbacks[index] += sum(event.kind == "rollback" for event in events)
        advance(len(plans))
    losses = job.evaluate(corpus.validation_batches(_VALIDATION_BATCHES, _VALIDATION_SIZE, _CONTEXT))
    rows = zip(losses, clipped, shifts, rollbacks, strict=True)
    return [Outcome(float(loss), float(share), int(shift), int(back)) for loss, share, shift, back in rows]


@dataclass(frozen=True)
class Difference:
    """A mean of paired differences and half its confidence interval, by Student's t."""

    mean: float
    half: float

    @classmethod
    def of(cls, pairs: Sequence[float]) -> Difference:
        """Of differences of final loss, in nats; NaN if one of the runs has no loss."""
        values = np.asarray(pairs, np.float64)
        spread = stats.t.ppf((1 + _CONFIDENCE) / 2, len(values) - 1) * stats.sem(values)
        return cls(float(values.mean()), float(spread))

    @property
    def verdict(self) -> str:
        """Whether the variant is better, worse, or neither, with confidence."""
        if not np.isfinite(self.mean):
            return "lost"
        return "better" if self.mean < -self.half else "worse" if self.mean > self.half else "same"

    def __str__(self) -> str:
        if not np.isfinite(self.mean):
            return "no loss"
        mark = {"better": "**", "worse": "_", "same": ""}[self.verdict]
        return f"{mark}{self.mean:+.3f} ± {self.half:.3f}{mark}"


def tables(done: Sequence[tuple[Entry, Outcome]]) -> list[str]:
    """The page's tables, as lines of Markdown."""
    lines: list[str] = []
    for table, variants in VARIANTS.items():
        first, others = variants[0], variants[1:]
        lines += ["", f"## {table}", "", f"| setting | format | {first}: loss | {' | '.join(others)} |"]
        lines.append("|---" * (3 + len(others)) + "|")
        tally = {variant: dict.fromkeys(("better", "same", "worse", "lost"), 0) for variant in others}
        here = [(entry, outcome) for entry, outcome in done if entry.table == table]
        for setting in dict.fromkeys(entry.setting for entry, _ in here):
            for name in FORMATS:
                row = {
                    variant: _samples(here, setting, name, variant)
                    for variant in variants
                    if _samples(here, setting, name, variant)
                }
                cells = [_cell(row, first, variant, tally) for variant in others]
                losses = [outcome.loss for outcome in row[first]]
                lines.append(f"| {setting} | {name} | {np.mean(losses):.3f} | {' | '.join(cells)} |")
        lines += ["", *(f"- `{variant}`: {_told(counts)}" for variant, counts in tally.items())]
    return lines


def _samples(here: Sequence[tuple[Entry, Outcome]], setting: str, name: str, variant: str) -> list[Outcome]:
    """In the order of the seeds."""
    wanted = (setting, name, variant)
    return [outcome for entry, outcome in here if (entry.setting, entry.plan.spec.format, entry.variant) == wanted]


def _cell(row: dict[str, list[Outcome]], first: str, variant: str, tally: dict[str, dict[str, int]]) -> str:
    if variant not in row:
        return ""
    pairs = zip(row[variant], row[first], strict=True)
    difference = Difference.of([after.loss - before.loss for after, before in pairs])
    tally[variant][difference.verdict] += 1
    notes = []
    clipped = np.mean([outcome.clipped for outcome in row[variant]])
    shifts = sum(outcome.shifts for outcome in row[variant])
    if clipped > 0 and variant in ("max", "binades", "scaled_max", "quantile"):
        notes.append(f"open {clipped:.1%}")
    if shifts:
        notes.append(f"{shifts} shifts")
    return f"{difference}{' (' + ', '.join(notes) + ')' if notes else ''}"


def _told(counts: dict[str, int]) -> str:
    return ", ".join(f"{verdict} {count}" for verdict, count in counts.items() if count)


def write_page(done: Sequence[tuple[Entry, Outcome]], steps: int, seeds: int) -> Path:
    """Write ``docs/ablation.md``."""
    head = f"""# What each intervention changes

Written by `python -m benchmarks.ablation --write` on {machine(("jax", "optax", "flax"))}.

A character GPT (2 layers of 64, batches of {_BATCH} x {_CONTEXT}, {steps} steps, {len(done)} runs) on the Shakespeare
that ships. Numbers are differences of held-out loss, in nats, to the first column: the mean over {seeds} paired seeds
and its 95% confidence interval (Student's t). **Bold** is better with confidence, _italic_ worse. "open" is the share
of steps in which the gate was open; `ungated` clips to the base at every step, by torch's rule, which differs from
`optax.clip_by_global_norm` by the 1e-6 beside the norm. One learning rate, one small model, many comparisons without a
correction for their number: leads, not laws."""
    PAGE.write_text("\n".join([head, *tables(done)]) + "\n")
    return PAGE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write docs/ablation.md")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    console = Console()
    done = run(arguments.steps, arguments.seeds, console)
    console.print("\n".join(tables(done)), highlight=False)
    if arguments.write:
        console.print(f"wrote {write_page(done, arguments.steps, arguments.seeds)}")


if __name__ == "__main__":
    main()

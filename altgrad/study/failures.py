"""Which runs failed: when, why as far as the rates can tell, and what was done about it.

A cause is the injected fault that came shortly before, else the rates that stand out; it is a lead, not a proof.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from altgrad.study.analysis import (
    CLEAN,
    REFERENCE,
    Variant,
    finite_steps,
    formats_of,
    losses_of,
    mean_rate,
    never_trained,
    runs_of,
    site_name,
    smoothed,
    smoothing_window,
    variants_of,
)
from altgrad.study.results import Study
from altgrad_core.events import Event

FAR_BEHIND = 0.30
"""Nats per character above float32 from which a run counts as a failure."""

STALLING = 0.5
UNDERFLOWING = 0.2
OVERFLOWING = 0.01
SATURATING = 0.2
"""Mean rates from which on a rate is named as the likely cause of a failure."""

_FAULT_REACH = 20

_OVERFLOWS = ("overflow_rate", "operand_overflow_rate")
_UNDERFLOWS = ("underflow_rate", "operand_underflow_rate")
_ACTIONS = {
    "skip": ("step skipped", "steps skipped"),
    "gate": ("open gate", "open gates"),
    "rollback": ("rollback", "rollbacks"),
    "rounding": ("change to stochastic rounding", "changes to stochastic rounding"),
    "learning_rate": ("change of the learning rate", "changes of the learning rate"),
    "scales": ("change of where scales come from", "changes of where scales come from"),
    "exhausted": ("shift wanted without a format to fall back to", "shifts wanted without a format to fall back to"),
}

FailureKind = Literal["lost", "untrained", "behind", "recovered"]


@dataclass(frozen=True)
class Failure:
    """Runs that failed, or that a fault hit and that recovered, in the same way.

    Attributes:
        formats: the formats it happened to.
        variant: where.
        kind: ``lost``: no finite loss at the end; ``untrained``: ended where it began, or no better than character
            frequencies; ``behind``: far above float32; ``recovered``: was hit and came back.
        seeds: the seeds it happened to.
        steps: first step of each of these runs; None where there is no one step.
        cause: the fault, or the rate that stands out.
        action: what was done about it.
    """

    formats: tuple[str, ...]
    variant: Variant
    kind: FailureKind
    seeds: tuple[int, ...]
    steps: tuple[int | None, ...]
    cause: str
    action: str


def failures(study: Study) -> tuple[Failure, ...]:
    """What failed and what recovered from a fault; formats to which the same thing happened share an entry."""
    merged: dict[tuple[object, ...], list[Failure]] = {}
    for variant in variants_of(study):
        for name in formats_of(study):
            for failure in _failures_of(study, variant, name):
                key = (variant, failure.kind, failure.seeds, failure.steps, failure.cause, failure.action)
                merged.setdefault(key, []).append(failure)
    return tuple(replace(group[0], formats=tuple(failure.formats[0] for failure in group)) for group in merged.values())


def lost_at(study: Study, row: int) -> int | None:
    """First step after which loss and gradients of a run never were finite again; None for one that ended finite."""
    if math.isfinite(study.runs[row].final_loss):
        return None
    finite = np.flatnonzero(finite_steps(study, row))
    return int(finite[-1]) + 1 if len(finite) else 0


def describe_faults(events: Iterable[Event]) -> tuple[str, ...]:
    """The injected faults of a run in words, those on consecutive steps together.

    >>> describe_faults(
    ...     [Event(7, "fault", "nan"), Event(8, "fault", "nan"), Event(9, "fault", "spike", {"value": 1e4})]
    ... )
    ('2 NaN batches from step 7', 'loss × 10,000 at step 9')
    """
    return tuple(_fault_text(group) for group in fault_groups(events))


def fault_groups(events: Iterable[Event]) -> list[list[Event]]:
    """The injected faults of a run, NaN batches of consecutive steps together."""
    groups: list[list[Event]] = []
    for event in (event for event in events if event.kind == "fault"):
        last = groups[-1][-1] if groups else None
        if last is not None and last.cause == event.cause == "nan" and event.step == last.step + 1:
            groups[-1].append(event)
        else:
            groups.append([event])
    return groups


@dataclass(frozen=True)
class _Finding:
    """What happened to one run; without a cause if only the rates can tell."""

    kind: FailureKind
    step: int | None
    cause: str | None = None


def _failures_of(study: Study, variant: Variant, format: str) -> list[Failure]:
    grouped: dict[tuple[FailureKind, str | None], list[tuple[int, int | None]]] = {}
    rows = runs_of(study, variant, format)
    for seed in sorted(rows):
        found = _finding(study, rows[seed])
        if found is not None:
            grouped.setdefault((found.kind, found.cause), []).append((seed, found.step))
    failures = []
    for (kind, cause), hits in grouped.items():
        hit = [rows[seed] for seed, _ in hits]
        failures.append(
            Failure(
                formats=(format,),
                variant=variant,
                kind=kind,
                seeds=tuple(seed for seed, _ in hits),
                steps=tuple(step for _, step in hits),
                cause=cause or _cause_by_rates(study, variant, hit),
                action=_action(variant, [study.runs[row].events for row in hit]),
            )
        )
    return failures


def _finding(study: Study, row: int) -> _Finding | None:
    run = study.runs[row]
    lost = lost_at(study, row)
    if lost is not None:
        return _Finding("lost", lost, _cause_of_loss(study, row, lost))
    flat, behind = never_trained(study, row), _distance(study, row) > FAR_BEHIND
    faults = [event.step for event in run.events if event.kind == "fault"]
    if faults:
        words = f"injected: {'; '.join(describe_faults(run.events))}"
        if behind and not flat:
            return _Finding("behind", _behind_from(study, row), words)
        return _Finding("untrained" if flat else "recovered", faults[0], words)
    if flat:
        return _Finding("untrained", None)
    if behind:
        return _Finding("behind", _behind_from(study, row))
    broken = np.flatnonzero(~finite_steps(study, row))
    if len(broken):
        return _Finding("recovered", int(broken[0]), _cause_of_loss(study, row, int(broken[0])))
    return None


def _distance(study: Study, row: int) -> float:
    """Final loss minus that of undisturbed float32 of the same seed; NaN without one."""
    run = study.runs[row]
    return run.final_loss - losses_of(study, CLEAN, REFERENCE).get(run.seed, math.nan)


def _behind_from(study: Study, row: int) -> int | None:
    """First step from which the smoothed training loss stays far above that of float32; None if it does not."""
    control = runs_of(study, CLEAN, REFERENCE)[study.runs[row].seed]
    window = smoothing_window(study)
    gap = smoothed(study.series["loss"][row], window) - smoothed(study.series["loss"][control], window)
    near = np.flatnonzero(~(gap > FAR_BEHIND))
    first = int(near[-1]) + 1 if len(near) else 0
    return first if first < study.steps else None


def _cause_of_loss(study: Study, row: int, step: int) -> str:
    """The last injected fault shortly before, else the rate that stood out on the step or the one before it."""
    faults = [group for group in fault_groups(study.runs[row].events) if group[0].step <= step]
    if faults and step - faults[-1][0].step <= _FAULT_REACH:
        return f"injected: {_fault_text(faults[-1])}"
    around = slice(max(step - 1, 0), min(step, study.steps - 1) + 1)
    overflow = np.nan_to_num(study.series["overflow_rate"][row, around])
    operands = np.nan_to_num(study.series["operand_overflow_rate"][row, around])
    if overflow.max() >= OVERFLOWING:
        site = study.series["worst_overflow_site"][row, around][int(np.argmax(overflow))]
        where = f", most at {site_name(study, int(site))}" if np.isfinite(site) else ""
        return f"gradient overflow{where}"
    if operands.max() >= OVERFLOWING:
        return "operand overflow"
    return "not finite, and no rate stands out"


def _cause_by_rates(study: Study, variant: Variant, rows: Sequence[int]) -> str:
    """The rates that stand out over runs that stayed finite."""
    stall, saturation = mean_rate(study, "stall_rate", rows), mean_rate(study, "saturation_rate", rows)
    stalled, overflow = stall - saturation, max(mean_rate(study, name, rows) for name in _OVERFLOWS)
    committed, stochastic = variant.scene == "committed", variant.storage_rounding == "stochastic"
    small = f"{_percent(stalled)} of updates are under half a quantum"
    gradients, operands = (mean_rate(study, name, rows) for name in _UNDERFLOWS)
    causes = {
        f"saturation: {_percent(saturation)} of updates stall at ±max": committed and saturation >= SATURATING,
        f"precision stall: {small}": committed and not stochastic and stalled >= STALLING,
        f"rounding noise: {small}": committed and stochastic and stalled >= STALLING,
        f"gradient underflow: {_percent(gradients)} of non-zero elements": gradients >= UNDERFLOWING,
        f"operand underflow: {_percent(operands)} of non-zero elements": operands >= UNDERFLOWING,
        f"overflow: {_percent(overflow)} of elements": overflow >= OVERFLOWING,
    }
    return "; ".join(cause for cause, holds in causes.items() if holds) or "no rate stands out"


def _action(variant: Variant, logs: Sequence[Sequence[Event]]) -> str:
    """What was done in runs that had the same happen to them."""
    events = [event for log in logs for event in log]
    counts: Counter[str] = Counter(event.kind for event in events)
    parts = [f"{counts[kind]} {words[counts[kind] != 1]}" for kind, words in _ACTIONS.items() if counts[kind]]
    shifts = Counter(f"{event.numbers['from']} to {event.numbers['to']}" for event in events if event.kind == "shift")
    parts += [f"{count} shift{'s' * (count != 1)} from {shift}" for shift, count in shifts.items()]
    if parts:
        return f"in {len(logs)} run{'s' * (len(logs) != 1)}: {', '.join(parts)}"
    if variant.interventions is None:
        return "nothing: none in this scene"
    return "nothing acted" if variant.interventions else "nothing: interventions off"


def _fault_text(group: Sequence[Event]) -> str:
    first = group[0]
    value = float(first.numbers.get("value", math.nan))
    if first.cause == "nan" and len(group) > 1:
        return f"{len(group)} NaN batches from step {first.step}"
    what = {
        "nan": "NaN batch",
        "spike": f"loss × {value:,g}",
        "weight": f"a weight set to {'NaN' if math.isnan(value) else f'{value:,g}'}",
    }
    return f"{what.get(first.cause, first.cause)} at step {first.step}"


def _percent(rate: float) -> str:
    return f"{rate:.1%}" if rate < 0.1 else f"{rate:.0%}"

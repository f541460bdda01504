"""The cases of the matrix and what came of them, in no framework."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

from altgrad_core.events import Event

Storage = Literal["master", "committed"]

NOISE = 0.03
"""Nats per character. Runs that differ in nothing that matters differ by less; see the matrix."""

FAULTS: Mapping[str, tuple[str, ...]] = {
    "NaN batch": ("nan@{step}:1",),
    "5 NaN batches": ("nan@{step}:5",),
    "inf in one leaf of the gradient": ("gradient@{step}:inf",),
    "spike: the loss times 1e4": ("spike@{step}:1e4",),
    "poisoned weight: NaN": ("weight@{step}:nan",),
    "overflowing forward: a weight of 1e4": ("weight@{step}:1e4",),
    "5 batches of zeros": ("zeros@{step}:5",),
    "25 batches of zeros": ("zeros@{step}:25",),
    "5 batches of noise": ("noise@{step}:5",),
}
"""Faults that hit one moment of a run, as :class:`altgrad_jax.faults.Injection` reads them."""

STALLED = "stalled format: committed, rounded to nearest"
"""The fault that lasts: weights that lose most of their updates. Its twin rounds them stochastically."""


@dataclass(frozen=True)
class Case:
    """One run of the matrix.

    Attributes:
        format: the format it begins in.
        storage: how it keeps its weights.
        fault: a name in ``FAULTS``, ``STALLED``, or "" for the undisturbed twin.
        on: whether it clips, recovers and shifts.
        seed: of weights and batches.
        learning_rate: a factor; 1.001 for a twin that differs in nothing that matters.
    """

    format: str
    storage: Storage
    fault: str
    on: bool
    seed: int
    learning_rate: float = 1.0


@dataclass(frozen=True)
class Outcome:
    """How a run ended: held-out loss in nats per character, and what happened on the way."""

    loss: float
    events: tuple[Event, ...]


@dataclass(frozen=True)
class Row:
    """One fault in one format and storage, over all seeds.

    Attributes:
        twin: mean loss of the undisturbed twins, without interventions and with them.
        off: differences to the twin, seed by seed, without interventions.
        on: differences to the twin that had them too, with them.
        done: what was done about it, in words.
    """

    framework: str
    format: str
    storage: Storage
    fault: str
    twin: tuple[float, float]
    off: tuple[float, ...]
    on: tuple[float, ...]
    done: str

    @property
    def heals(self) -> bool:
        """Whether the runs with interventions end no worse than within noise of their twins, on average."""
        return fmean(self.on) <= NOISE


def cases(
    formats: Sequence[str], seeds: Sequence[int], stalled: str, faults: Sequence[str] = tuple(FAULTS)
) -> list[Case]:
    """All runs of a matrix."""
    storages: tuple[Storage, ...] = ("master", "committed")
    found = [
        Case(name, storage, fault, on, seed)
        for name in formats
        for storage in storages
        for fault in ("", *faults)
        for on in (False, True)
        for seed in seeds
    ]
    found += [Case(name, storage, "", False, seed, 1.001) for name in formats for storage in storages for seed in seeds]
    needed = [
        Case(stalled, "committed", fault, on, seed) for fault in ("", STALLED) for on in (False, True) for seed in seeds
    ]
    return [*found, *(case for case in needed if case not in found)]


def rows(framework: str, outcomes: Mapping[Case, Outcome]) -> list[Row]:
    """The rows of a framework, one for each format, storage and fault that was run."""
    kinds = dict.fromkeys((case.format, case.storage, case.fault) for case in outcomes if case.fault)
    return [_row(framework, *kind, outcomes) for kind in kinds]


def _row(framework: str, name: str, storage: Storage, fault: str, outcomes: Mapping[Case, Outcome]) -> Row:
    seeds = sorted({case.seed for case in outcomes})

    def losses(fault: str, on: bool) -> list[float]:
        return [outcomes[Case(name, storage, fault, on, seed)].loss for seed in seeds]

    def apart(on: bool) -> tuple[float, ...]:
        return tuple(a - b for a, b in zip(losses(fault, on), losses("", on), strict=True))

    healed = [outcomes[Case(name, storage, fault, True, seed)].events for seed in seeds]
    twin = fmean(losses("", False)), fmean(losses("", True))
    return Row(framework, name, storage, fault, twin, apart(False), apart(True), told(healed))


def harmless(outcomes: Mapping[Case, Outcome]) -> dict[tuple[str, Storage], tuple[float, ...]]:
    """Differences between twins of which one learns a thousandth faster: what differs when nothing does."""
    found: dict[tuple[str, Storage], tuple[float, ...]] = {}
    for case, outcome in outcomes.items():
        if case.learning_rate != 1.0:
            twin = outcomes[Case(case.format, case.storage, "", False, case.seed)]
            kind = (case.format, case.storage)
            found[kind] = (*found.get(kind, ()), outcome.loss - twin.loss)
    return found


def told(runs: Sequence[Sequence[Event]]) -> str:
    """What was done in some runs, on average: skipped, clipped, gone back, shifted.

    >>> told([[Event(7, "skip", "nan"), Event(8, "rollback", "nan")], [Event(7, "skip", "nan")]])
    'skipped 1, back 0.5 (nan)'
    """
    words: dict[str, str] = {"skip": "skipped {n}", "gate": "clipped {n}"}
    counts: Counter[str] = Counter()
    for event in (event for run in runs for event in run):
        if event.kind in words:
            counts[words[event.kind]] += 1
        elif event.kind == "rollback":
            counts[f"back {{n}} ({event.cause})"] += 1
        elif event.kind in ("shift", "rounding", "scales"):
            counts[f"to {event.numbers['to']} {{n}} ({event.cause})"] += 1
        elif event.kind == "exhausted":
            counts[f"no format left {{n}} ({event.cause})"] += 1
    return ", ".join(word.format(n=f"{count / len(runs):.2g}") for word, count in counts.items()) or "nothing"


def difference(values: Sequence[float]) -> str:
    """Mean and standard deviation of differences, or that some are not finite.

    >>> difference([0.01, 0.03]), difference([float("nan"), 1.0])
    ('+0.020 ± 0.014', 'lost: NaN in 1 of 2')
    """
    finite = [value for value in values if abs(value) < float("inf")]
    if len(finite) < len(values):
        return f"lost: NaN in {len(values) - len(finite)} of {len(values)}"
    spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{fmean(values):+.3f}{spread}"

"""What a study says, as numbers: differences with intervals, verdicts on the interventions, where and why runs failed.

Pure functions of a :class:`~altgrad.study.results.Study`. Runs of one seed start from the same weights and see the same
batches, so all differences are taken seed by seed. Losses are held-out losses in nats per character.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import special

from altgrad.study.results import RunResult, Scene, StorageRounding, Study
from altgrad_core.events import EVENT_KINDS, Event
from altgrad_core.formats import UnknownFormatError
from altgrad_core.stability import clip_threshold

TRAINS_WITHIN = 0.10
"""Nats per character above float32 up to which a format counts as training."""

UNTRAINED_MARGIN = 0.05
"""A run that ends less than this below its start never trained."""

CONFIDENCE = 0.95
"""Coverage of all intervals: Student's t on the paired differences."""

CONTROLS: tuple[str, ...] = ("float32", "bf16")
"""Formats that are there for comparison."""

REFERENCE = "float32"
STUDIED_FORMATS: tuple[str, ...] = ("float32", "bf16", "E0M7", "E1M6", "E3M4", "E5M2", "E7M0")
SAME_GRID = ("E0M7", "E1M6")
"""Two names for one grid: every code of the second is worth four times that of the first."""

Outcome = Literal["trains", "degraded", "failed", "unknown"]
Verdict = Literal["saved", "helped", "no effect", "harmed", "unclear"]
Stage = Literal["forward", "gradient", "update", "none", "unknown"]


@dataclass(frozen=True)
class Variant:
    """A scene with what was varied in it.

    Attributes:
        scene: the scene.
        storage_rounding: of committed weights; None in other scenes.
        interventions: whether they were on; None in scenes without.
    """

    scene: Scene
    storage_rounding: StorageRounding | None = None
    interventions: bool | None = None

    @classmethod
    def of(cls, run: RunResult) -> Variant:
        """The variant that a run belongs to."""
        return cls(run.scene, run.storage_rounding if run.scene == "committed" else None, run.interventions)

    @property
    def label(self) -> str:
        """What it is called in text and tables."""
        if self.scene == "committed":
            return f"committed, {'nearest' if self.storage_rounding == 'nearest_even' else 'stochastic'}"
        return self.scene if self.interventions is None else f"stress, {'on' if self.interventions else 'off'}"


CLEAN = Variant("clean")
COMMITTED_NEAREST = Variant("committed", "nearest_even")
COMMITTED_STOCHASTIC = Variant("committed", "stochastic")
STRESS_OFF = Variant("stress", interventions=False)
STRESS_ON = Variant("stress", interventions=True)
VARIANTS = (CLEAN, COMMITTED_NEAREST, COMMITTED_STOCHASTIC, STRESS_OFF, STRESS_ON)


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences, in nats per character.

    Attributes:
        mean: over the pairs of which both runs ended finite; NaN without any.
        half_width: half of the 95% confidence interval; NaN with fewer than two pairs.
        pairs: how many went in.
        dropped: how many did not, because a run ended without a finite loss.
    """

    mean: float
    half_width: float
    pairs: int
    dropped: int

    @property
    def known(self) -> bool:
        """Whether there is a mean at all."""
        return self.pairs > 0

    @property
    def above(self) -> bool:
        """Whether the whole interval lies above zero."""
        return self.mean - self.half_width > 0

    @property
    def below(self) -> bool:
        """Whether the whole interval lies below zero."""
        return self.mean + self.half_width < 0

    @property
    def within_noise(self) -> bool:
        """Whether the interval holds zero; False where there is no interval."""
        return abs(self.mean) <= self.half_width


@dataclass(frozen=True)
class FinalLoss:
    """How the runs of one format in one variant ended.

    Attributes:
        variant: the variant.
        format: the format.
        losses: final losses by seed.
        mean: of the finite ones; NaN without any.
        spread: their standard deviation; NaN for fewer than two.
        nonfinite: seeds that ended without a finite loss.
        untrained: seeds that ended about where they began.
        to_float32: against undisturbed float32 on master weights.
        to_float32_here: against float32 in the same variant (committed: master weights).
        outcome: ``failed`` if any seed was not finite or never trained, else by the distance to undisturbed float32.
    """

    variant: Variant
    format: str
    losses: Mapping[int, float]
    mean: float
    spread: float
    nonfinite: tuple[int, ...]
    untrained: tuple[int, ...]
    to_float32: Difference
    to_float32_here: Difference
    outcome: Outcome

    @property
    def is_reference(self) -> bool:
        """Whether this is what the others are compared with."""
        return self.format == REFERENCE and self.variant == CLEAN

    @property
    def failed_seeds(self) -> tuple[int, ...]:
        """Seeds that were lost or never trained."""
        return tuple(sorted({*self.nonfinite, *self.untrained}))


@dataclass(frozen=True)
class Effect:
    """What the interventions did to one format under stress.

    Attributes:
        format: the format.
        verdict: ``saved`` if fewer seeds failed with them, ``harmed`` if more did; else by the difference on - off.
        on_to_off: paired difference, on minus off.
        on_to_clean: paired difference, on minus the same format undisturbed.
        failed_off: seeds that failed without them.
        failed_on: seeds that failed with them.
        seeds: seeds that were run both ways.
        acted: how often what acted, over all seeds; faults not among them.
        idle_gates: open gates behind which nothing was clipped, the norm being below the format's threshold; 0 if the
            study's config does not tell ``base_clip``.
        final_formats: the formats that the runs with interventions ended in, with how many did.
        early_shifts: why formats shifted before the first fault, in the seeds where they did.
    """

    format: str
    verdict: Verdict
    on_to_off: Difference
    on_to_clean: Difference
    failed_off: tuple[int, ...]
    failed_on: tuple[int, ...]
    seeds: tuple[int, ...]
    acted: Mapping[str, int]
    idle_gates: int
    final_formats: Mapping[str, int]
    early_shifts: tuple[str, ...]


@dataclass(frozen=True)
class Rates:
    """Mean rates of one format in one variant: over finite steps, then over seeds. NaN where no step was finite.

    Attributes:
        operand_underflow: of what enters the products.
        operand_overflow: of what enters the products.
        gradient_underflow: of what comes back.
        gradient_overflow: of what comes back.
        worst_site: the product whose gradient overflowed most on any step; empty if none did.
        worst_overflow: its rate on that step.
        stall: updates that leave the quantised weight as it was.
        saturation: those among them that stalled at ±max.
    """

    operand_underflow: float
    operand_overflow: float
    gradient_underflow: float
    gradient_overflow: float
    worst_site: str
    worst_overflow: float
    stall: float
    saturation: float


@dataclass(frozen=True)
class Weakness:
    """Where a format loses.

    Attributes:
        format: the format.
        stage: the stage with the largest cost: the ``forward`` or ``gradient`` casts, or the ``update`` of stored
            weights; ``none`` if no cost stands out; ``unknown`` without the runs to tell.
        cast_cost: clean minus undisturbed float32: what casting operands and gradients costs.
        update_cost: committed with nearest rounding minus the format's own clean runs.
        stochastic_cost: the same with stochastic rounding.
        clean: rates of the clean runs.
        stored_stall: stall rate with committed weights, nearest rounding; NaN without such runs.
    """

    format: str
    stage: Stage
    cast_cost: Difference
    update_cost: Difference
    stochastic_cost: Difference
    clean: Rates
    stored_stall: float


def formats_of(study: Study) -> tuple[str, ...]:
    """The formats of a study, in the order of its runs."""
    return tuple(dict.fromkeys(run.format for run in study.runs))


def seeds_of(study: Study) -> tuple[int, ...]:
    """The seeds of a study, sorted."""
    return tuple(sorted({run.seed for run in study.runs}))


def variants_of(study: Study) -> tuple[Variant, ...]:
    """The variants of a study, in their usual order."""
    present = {Variant.of(run) for run in study.runs}
    return tuple(variant for variant in VARIANTS if variant in present)


def runs_of(study: Study, variant: Variant, format: str) -> dict[int, int]:
    """Rows of the runs of one format in one variant, by seed."""
    rows = enumerate(study.runs)
    return {run.seed: row for row, run in rows if run.format == format and Variant.of(run) == variant}


def paired_difference(left: Mapping[int, float], right: Mapping[int, float]) -> Difference:
    """Mean and 95% confidence interval of ``left - right`` over the seeds that both have.

    Args:
        left: losses by seed.
        right: losses by seed.

    >>> difference = paired_difference({0: 2.0, 1: 2.2, 2: 2.3}, {0: 1.9, 1: 2.0, 2: 2.2})
    >>> round(difference.mean, 3), round(difference.half_width, 3), difference.above
    (0.133, 0.143, False)
    """
    common = sorted(left.keys() & right.keys())
    values = np.array([left[seed] - right[seed] for seed in common], np.float64)
    kept = values[np.isfinite(values)]
    count = len(kept)
    if count == 0:
        return Difference(math.nan, math.nan, 0, len(common))
    half_width = math.nan
    if count > 1:
        quantile = float(special.stdtrit(count - 1, (1 + CONFIDENCE) / 2))
        half_width = quantile * float(kept.std(ddof=1)) / math.sqrt(count)
    return Difference(float(kept.mean()), half_width, count, len(common) - count)


def final_losses(study: Study) -> dict[tuple[Variant, str], FinalLoss]:
    """How the runs ended, for every variant and format that was run."""
    return {
        (variant, name): _final_loss(study, variant, name)
        for variant in variants_of(study)
        for name in formats_of(study)
        if runs_of(study, variant, name)
    }


def effects(study: Study) -> tuple[Effect, ...]:
    """What the interventions did, for every format that was put under stress both with and without them."""
    found = (_effect(study, name) for name in formats_of(study))
    return tuple(effect for effect in found if effect is not None)


def mean_rates(study: Study, variant: Variant, format: str) -> Rates:
    """Mean rates of one format in one variant."""
    rows = list(runs_of(study, variant, format).values())
    site, worst = _worst_site(study, rows)
    return Rates(
        operand_underflow=mean_rate(study, "operand_underflow_rate", rows),
        operand_overflow=mean_rate(study, "operand_overflow_rate", rows),
        gradient_underflow=mean_rate(study, "underflow_rate", rows),
        gradient_overflow=mean_rate(study, "overflow_rate", rows),
        worst_site=site,
        worst_overflow=worst,
        stall=mean_rate(study, "stall_rate", rows),
        saturation=mean_rate(study, "saturation_rate", rows),
    )


def weaknesses(study: Study) -> tuple[Weakness, ...]:
    """Where each format but float32 loses. The attribution compares costs and rates; it is not an ablation."""
    return tuple(_weakness(study, name) for name in formats_of(study) if name != REFERENCE)


def finite_steps(study: Study, row: int) -> npt.NDArray[np.bool_]:
    """Whether loss and gradients of a run were finite, for each step."""
    return np.isfinite(study.series["loss"][row]) & np.isfinite(study.series["norm"][row])


def smoothed(values: npt.NDArray[np.floating], window: int) -> npt.NDArray[np.float64]:
    """A centred running median, then a running mean, each over ``window`` steps; what is not finite stays so.

    The median keeps one injected spike from bending the curve around it.

    Args:
        values: one number for each step.
        window: steps in the window, odd; shortened at both ends.
    """
    kept = np.where(np.isfinite(values), values, np.nan).astype(np.float64)
    return _windowed(_windowed(kept, window, np.nanmedian), window, np.nanmean)


def smoothing_window(study: Study) -> int:
    """An odd number of steps, about a thirtieth of the study's, to smooth curves over."""
    return max(study.steps // 30, 1) | 1


def missing_parts(study: Study) -> tuple[str, ...]:
    """What the study leaves out of the usual formats, scenes and seeds, one line each."""
    formats, variants, seeds = formats_of(study), variants_of(study), seeds_of(study)
    lines = []
    absent = [name for name in STUDIED_FORMATS if name not in formats]
    if absent:
        lines.append(f"formats not in this study: {', '.join(absent)}")
    gone = [variant.label for variant in VARIANTS if variant not in variants]
    if gone:
        lines.append(f"scenes not in this study: {'; '.join(gone)}")
    for variant in variants:
        for name in formats:
            without = [seed for seed in seeds if seed not in runs_of(study, variant, name)]
            if not without or (name == REFERENCE and variant.scene == "committed" and without == list(seeds)):
                continue  # committed to its own grid, float32 is what it is on master weights
            what = "no run" if len(without) == len(seeds) else f"no run of seed {', '.join(map(str, without))}"
            lines.append(f"{name}, {variant.label}: {what}")
    return tuple(lines)


def _final_loss(study: Study, variant: Variant, format: str) -> FinalLoss:
    rows = runs_of(study, variant, format)
    losses = losses_of(study, variant, format)
    finite = np.array([loss for loss in losses.values() if math.isfinite(loss)])
    nonfinite = tuple(seed for seed, loss in losses.items() if not math.isfinite(loss))
    untrained = tuple(seed for seed, row in rows.items() if never_trained(study, row))
    to_float32 = paired_difference(losses, losses_of(study, CLEAN, REFERENCE))
    here = CLEAN if variant.scene == "committed" else variant
    is_reference = (variant, format) == (CLEAN, REFERENCE)
    return FinalLoss(
        variant=variant,
        format=format,
        losses=losses,
        mean=float(finite.mean()) if len(finite) else math.nan,
        spread=float(finite.std(ddof=1)) if len(finite) > 1 else math.nan,
        nonfinite=nonfinite,
        untrained=untrained,
        to_float32=to_float32,
        to_float32_here=paired_difference(losses, losses_of(study, here, REFERENCE)),
        outcome=_outcome(bool(nonfinite or untrained), to_float32, is_reference),
    )


def losses_of(study: Study, variant: Variant, format: str) -> dict[int, float]:
    """Final losses of one format in one variant, by seed."""
    return {seed: float(study.runs[row].final_loss) for seed, row in sorted(runs_of(study, variant, format).items())}


def never_trained(study: Study, row: int) -> bool:
    """Whether a run ended finite, but no better than character frequencies (if known) or its own first loss."""
    start = study.config.get("unigram_loss")
    if not isinstance(start, (int, float)):
        losses = study.series["loss"][row]
        finite = losses[np.isfinite(losses)]
        start = float(finite[0]) if len(finite) else math.nan
    return study.runs[row].final_loss > start - UNTRAINED_MARGIN


def _outcome(failed: bool, to_float32: Difference, is_reference: bool) -> Outcome:
    if failed:
        return "failed"
    if is_reference:
        return "trains"
    if not to_float32.known:
        return "unknown"
    return "trains" if to_float32.mean <= TRAINS_WITHIN else "degraded"


def _effect(study: Study, format: str) -> Effect | None:
    on, off = runs_of(study, STRESS_ON, format), runs_of(study, STRESS_OFF, format)
    seeds = tuple(sorted(on.keys() & off.keys()))
    if not seeds:
        return None
    failed_on = tuple(seed for seed in seeds if _failed(study, on[seed]))
    failed_off = tuple(seed for seed in seeds if _failed(study, off[seed]))
    losses_on = losses_of(study, STRESS_ON, format)
    on_to_off = paired_difference(losses_on, losses_of(study, STRESS_OFF, format))
    events = [event for seed in seeds for event in study.runs[on[seed]].events]
    counts: Counter[str] = Counter(event.kind for event in events)
    return Effect(
        format=format,
        verdict=_verdict(len(failed_on), len(failed_off), len(seeds), on_to_off),
        on_to_off=on_to_off,
        on_to_clean=paired_difference(losses_on, losses_of(study, CLEAN, format)),
        failed_off=failed_off,
        failed_on=failed_on,
        seeds=seeds,
        acted={kind: counts[kind] for kind in EVENT_KINDS if counts[kind] and kind != "fault"},
        idle_gates=sum(_idle_gates(study, on[seed]) for seed in seeds),
        final_formats=Counter(study.runs[on[seed]].final_format for seed in seeds),
        early_shifts=tuple(
            dict.fromkeys(cause for seed in seeds for cause in _early_shifts(study.runs[on[seed]].events))
        ),
    )


def _early_shifts(events: Sequence[Event]) -> Iterator[str]:
    first = min((event.step for event in events if event.kind == "fault"), default=math.inf)
    return (event.cause for event in events if event.kind == "shift" and event.step < first)


def _idle_gates(study: Study, row: int) -> int:
    base, run = study.config.get("base_clip"), study.runs[row]
    if not isinstance(base, (int, float)):
        return 0
    name, idle = run.format, 0
    for event in run.events:
        if event.kind == "shift":
            name = str(event.numbers["to"])
        elif event.kind == "gate":
            idle += float(event.numbers["norm"]) <= _threshold(name, float(base))
    return idle


def _threshold(name: str, base: float) -> float:
    """The clip threshold of a format; NaN for a name that nobody knows any more."""
    try:
        return clip_threshold(name, base)
    except UnknownFormatError:
        return math.nan


def _failed(study: Study, row: int) -> bool:
    return not math.isfinite(study.runs[row].final_loss) or never_trained(study, row)


def _verdict(failed_on: int, failed_off: int, seeds: int, on_to_off: Difference) -> Verdict:
    if failed_on != failed_off:
        return "saved" if failed_on < failed_off else "harmed"
    if failed_on == seeds:
        return "no effect"
    if on_to_off.below:
        return "helped"
    if on_to_off.above:
        return "harmed"
    return "no effect" if abs(on_to_off.mean) <= UNTRAINED_MARGIN else "unclear"


def mean_rate(study: Study, name: str, rows: Sequence[int]) -> float:
    """Mean of a series over finite steps, then over the runs in ``rows``; NaN where no step was finite."""
    means = []
    for row in rows:
        values = study.series[name][row][finite_steps(study, row)]
        values = values[np.isfinite(values)]
        if len(values):
            means.append(float(values.mean(dtype=np.float64)))
    return float(np.mean(means)) if means else math.nan


def _worst_site(study: Study, rows: Sequence[int]) -> tuple[str, float]:
    if not rows:
        return "", math.nan
    rates = np.where(np.isfinite(study.series["loss"][rows]), study.series["worst_overflow_rate"][rows], 0)
    rates = np.nan_to_num(rates)
    run, step = np.unravel_index(int(np.argmax(rates)), rates.shape)
    worst, site = float(rates[run, step]), study.series["worst_overflow_site"][rows][run, step]
    if worst <= 0 or not np.isfinite(site):
        return "", worst
    return site_name(study, int(site)), worst


def site_name(study: Study, site: int) -> str:
    """What a product is called."""
    return study.sites[site] if 0 <= site < len(study.sites) else f"site {site}"


def _weakness(study: Study, format: str) -> Weakness:
    clean = losses_of(study, CLEAN, format)
    finite = {seed: loss for seed, loss in clean.items() if math.isfinite(loss)}
    cast_cost = paired_difference(clean, losses_of(study, CLEAN, REFERENCE))
    update_cost = paired_difference(losses_of(study, COMMITTED_NEAREST, format), finite)
    rates = mean_rates(study, CLEAN, format)
    stored = list(runs_of(study, COMMITTED_NEAREST, format).values())
    return Weakness(
        format=format,
        stage=_stage(cast_cost, update_cost, rates, lost=len(finite) < len(clean)),
        cast_cost=cast_cost,
        update_cost=update_cost,
        stochastic_cost=paired_difference(losses_of(study, COMMITTED_STOCHASTIC, format), finite),
        clean=rates,
        stored_stall=mean_rate(study, "stall_rate", stored),
    )


def _stage(cast_cost: Difference, update_cost: Difference, clean: Rates, *, lost: bool) -> Stage:
    """The stage of the larger cost; of the casts, the one whose rates are higher. A lost clean run is the casts'."""
    cast, update = math.inf if lost else _weight(cast_cost), _weight(update_cost)
    if not (lost or cast_cost.known or update_cost.known or update_cost.dropped):
        return "unknown"
    if max(cast, update) <= 0:
        return "none"
    if update > cast:
        return "update"
    forward = clean.operand_underflow + clean.operand_overflow
    gradient = clean.gradient_underflow + clean.gradient_overflow
    if math.isnan(forward) or math.isnan(gradient):
        return "unknown"
    return "forward" if forward >= gradient else "gradient"


def _weight(cost: Difference) -> float:
    """How much a cost counts: its mean if that stands out of the noise or of what is tolerated, infinity for a loss."""
    if cost.dropped:
        return math.inf
    return cost.mean if cost.above or cost.mean > TRAINS_WITHIN else 0.0


def _windowed(
    values: npt.NDArray[np.float64], window: int, reduce: Callable[..., npt.NDArray[np.float64]]
) -> npt.NDArray[np.float64]:
    """Reduce over the finite values around each finite one."""
    padded = np.pad(values, window // 2, constant_values=np.nan)
    finite = np.isfinite(values)
    result = np.full(len(values), np.nan)
    if finite.any():
        result[finite] = reduce(np.lib.stride_tricks.sliding_window_view(padded, window)[finite], axis=1)
    return result

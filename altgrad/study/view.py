"""The report in words: every number formatted, every table filled, for the HTML and the Markdown template alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from altgrad.study.analysis import (
    CONTROLS,
    REFERENCE,
    TRAINS_WITHIN,
    UNTRAINED_MARGIN,
    VARIANTS,
    Effect,
    FinalLoss,
    Outcome,
    Stage,
    Variant,
    Weakness,
    formats_of,
    missing_parts,
    seeds_of,
    variants_of,
)
from altgrad.study.failures import FAR_BEHIND, Failure, FailureKind
from altgrad.study.figures import MARKS, Mark, reading_note, style_of
from altgrad.study.findings import Facts, Finding, findings, noise_sentence
from altgrad.study.results import Study
from altgrad.study.wording import delta, number, percent, signed

_OUTCOMES: Mapping[Outcome, tuple[str, str]] = {
    "trains": ("●", "trains"),
    "degraded": ("◐", "degraded"),
    "failed": ("✕", "failed"),
    "unknown": ("?", "no control"),
}
_STAGES: Mapping[Stage, str] = {
    "forward": "forward",
    "gradient": "gradient",
    "update": "update",
    "none": "–",
    "unknown": "not known",
}
_KINDS: Mapping[FailureKind, str] = {
    "lost": "lost: not finite at the end",
    "untrained": "ended untrained",
    "behind": f"over {FAR_BEHIND:.1f} nats behind float32",
    "recovered": "recovered",
}
_SCENES: Mapping[Variant, tuple[str, str]] = {
    VARIANTS[0]: ("clean", "float32 master weights, no faults"),
    VARIANTS[1]: ("committed, nearest", "weights stored on the format’s grid, rounded to nearest even"),
    VARIANTS[2]: ("committed, stochastic", "weights stored on the format’s grid, rounded stochastically"),
    VARIANTS[3]: ("stress, off", "clean with faults injected, interventions off"),
    VARIANTS[4]: ("stress, on", "clean with faults injected, interventions on"),
}
_LABELS = {
    "learning_rate": "peak learning rate",
    "batch": "batch [sequences]",
    "context": "context [characters]",
    "width": "width of the residual stream",
    "unigram_loss": "entropy of character frequencies [nats/char]",
    "overflow_threshold": "overflow rate that opens the clipper’s gate",
    "base_clip": "clip threshold that E5M2 has",
}


_ONE_RATE = (
    "One learning rate for all formats. A format with a coarser grid may want another one, and in a study this small "
    "that confounds what the format does with what the learning rate does."
)
_ONE_SEED = "One seed: no difference on this page has an interval, and none can be told from noise."
_INTERVALS = (
    "Intervals (±) are 95%, Student’s t on paired differences: runs of one seed share initial weights and batches, so "
    "± says how far a difference varies from seed to seed. Nothing corrects for the number of comparisons."
)
_E3M4 = "E3M4 here has bias 1 and maximum 124; it is not ml_dtypes.float8_e3m4 (bias 3, maximum 15.5)."
_CAVEATS = (
    "The model is small and the runs are short: what costs little here may cost more later, and the reverse.",
    (
        "Overflow rates are measured against delayed scales (from the largest magnitudes of earlier steps): under its "
        "own current scale a tensor never overflows."
    ),
    (
        "A stall on float32 master weights is normal: the master keeps the update, and the quantised weight moves "
        "later. It is a real loss only where weights are stored on the grid and rounded to nearest; rounded "
        "stochastically, small updates still move weights on average."
    ),
    (
        "Interventions come as one: skipping with rollback, and for the 8-bit formats clipping and a controller that "
        "may change the format, where scales come from and the learning rate, whether a fault or the format itself "
        "calls for it. Which of them did it cannot be told, beyond what the counts show."
    ),
    "Decisions are made on the host from metrics that are read while the next step runs, so they land one step late.",
    "Where a format fails is read off rates and costs; it is not an ablation.",
)


@dataclass(frozen=True)
class Cell:
    """One cell of the matrix on the first screen.

    Attributes:
        outcome: for its colour.
        symbol: the outcome again, for those who do not see colours.
        main: the number that matters.
        note: a second one, or what became of the seeds.
    """

    outcome: str
    symbol: str
    main: str
    note: str


@dataclass(frozen=True)
class Row:
    """A row of a table: its cells as text, by column."""

    cells: tuple[str, ...]
    outcome: str = ""


@dataclass(frozen=True)
class Block:
    """Rows under one heading."""

    title: str
    note: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        columns: headings.
        blocks: rows, under headings of their own where there are several.
        words: indices of the columns that hold words rather than numbers.
    """

    columns: tuple[str, ...]
    blocks: tuple[Block, ...]
    words: frozenset[int] = frozenset({0})


@dataclass(frozen=True)
class Swatch:
    """A format in the key of the figures."""

    name: str
    color: str
    dashes: str


@dataclass(frozen=True)
class View:
    """All that the templates show, as text."""

    title: str
    setup: str
    missing: tuple[str, ...]
    findings: tuple[Finding, ...]
    scenes: tuple[tuple[str, str], ...]
    matrix: tuple[tuple[str, tuple[Cell, ...]], ...]
    legend: tuple[tuple[str, str, str], ...]
    finals: Table
    effects: Table | None
    weaknesses: Table
    failures: Table | None
    caveats: tuple[str, ...]
    reading: str
    swatches: tuple[Swatch, ...]
    marks: tuple[Mark, ...]
    config: tuple[tuple[str, str], ...]
    environment: tuple[tuple[str, str], ...]
    command: str


def view_of(study: Study) -> View:
    """Everything the report says, as text."""
    facts = Facts.of(study)
    return View(
        title=_title(study),
        setup=_setup(study),
        missing=missing_parts(study),
        findings=findings(facts),
        scenes=tuple(_SCENES[variant] for variant in variants_of(study)),
        matrix=tuple((name, _matrix_row(facts, name)) for name in formats_of(study)),
        legend=_legend(facts),
        finals=_finals_table(facts),
        effects=_effects_table(facts.effects),
        weaknesses=_weakness_table(facts.weaknesses),
        failures=_failure_table(facts.failures),
        caveats=_caveats(study),
        reading=reading_note(study),
        swatches=_swatches(study),
        marks=_marks(study),
        config=_settings(study.config),
        environment=_settings(study.environment),
        command=str(study.config.get("command", "altgrad study")),
    )


def _title(study: Study) -> str:
    formats, scenes = len(formats_of(study)), len(variants_of(study))
    return (
        f"{number(formats).capitalize()} number format{'s' * (formats != 1)}, {number(scenes)} "
        f"situation{'s' * (scenes != 1)}: what trains, what fails, what helps"
    )


def _setup(study: Study) -> str:
    """One line on what was run, with as much of it as the configuration tells."""
    config = study.config
    model = "A character GPT"
    if {"layers", "width"} <= config.keys():
        model += f" ({config['layers']} layers of width {config['width']})"
    steps = f"{study.steps} step{'s' * (study.steps != 1)}"
    if {"batch", "context"} <= config.keys():
        steps += f" of {config['batch']} × {config['context']} characters"
    rate = config.get("learning_rate", config.get("lr"))
    optimizer = f", AdamW at learning rate {rate:g}" if isinstance(rate, (int, float)) else ""
    seeds = len(seeds_of(study))
    return (
        f"{model}, {steps}{optimizer}. {number(seeds).capitalize()} {'paired seeds' if seeds != 1 else 'seed'}, "
        f"{len(study.runs)} run{'s' * (len(study.runs) != 1)}, {_duration(study.wall_seconds)}."
    )


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "of unknown duration"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _legend(facts: Facts) -> tuple[tuple[str, str, str], ...]:
    start = "the entropy of character frequencies" if "unigram_loss" in facts.study.config else "its first loss"
    meanings = {
        "trains": f"at most {TRAINS_WITHIN:.2f} nats/char above undisturbed float32",
        "degraded": "further above it",
        "failed": f"a seed ended without a finite loss, or untrained: less than {UNTRAINED_MARGIN:.2f} below {start}",
        "unknown": "finite, but without float32 to compare to",
    }
    present = {final.outcome for final in facts.finals.values()}
    return tuple(
        (outcome, symbol, f"{word}: {meanings[outcome]}")
        for outcome, (symbol, word) in _OUTCOMES.items()
        if outcome in present
    )


def _matrix_row(facts: Facts, name: str) -> tuple[Cell, ...]:
    variants = variants_of(facts.study)
    return tuple(_matrix_cell(facts.finals.get((variant, name)), variant, name) for variant in variants)


def _matrix_cell(final: FinalLoss | None, variant: Variant, name: str) -> Cell:
    if final is None:
        as_clean = name == REFERENCE and variant.scene == "committed"
        return Cell("absent", "", "–", "as clean" if as_clean else "not run")
    symbol, _ = _OUTCOMES[final.outcome]
    if final.failed_seeds:
        word = "lost" if final.nonfinite else "untrained"
        return Cell(final.outcome, symbol, word, f"{len(final.failed_seeds)} of {len(final.losses)}")
    if final.is_reference or final.outcome == "unknown":
        return Cell(final.outcome, symbol, _loss(final.mean), "reference" if final.is_reference else "no control")
    width = final.to_float32.half_width
    return Cell(
        final.outcome, symbol, signed(final.to_float32.mean, 3), "n = 1" if math.isnan(width) else f"± {width:.3f}"
    )


def _finals_table(facts: Facts) -> Table:
    stress = any(variant.scene == "stress" for variant, _ in facts.finals)
    here = ("Δ to float32 in the same scene",) if stress else ()
    blocks = []
    for variant in variants_of(facts.study):
        finals = [final for (where, _), final in facts.finals.items() if where == variant]
        title, note = _SCENES[variant]
        blocks.append(Block(title, note, tuple(_final_row(final, stress) for final in finals)))
    columns = ("Format", "Final loss", "by seed", "Δ to undisturbed float32", *here, "Outcome")
    return Table(columns, tuple(blocks), frozenset({0, len(columns) - 1}))


def _final_row(final: FinalLoss, stress: bool) -> Row:
    symbol, word = _OUTCOMES[final.outcome]
    failed = []
    if final.nonfinite:
        failed.append(f"diverged: {len(final.nonfinite)} of {len(final.losses)} seeds")
    if final.untrained:
        failed.append(f"untrained: {len(final.untrained)} of {len(final.losses)} seeds")
    here = final.to_float32_here
    same_scene = "reference" if final.format == REFERENCE else delta(here, 3)
    if final.format != REFERENCE and not here.known and here.dropped and not final.nonfinite:
        same_scene = "float32 lost"
    return Row(
        (
            final.format,
            _loss(final.mean, 3),
            "\u2002".join(_loss(loss) for loss in final.losses.values()),
            "reference" if final.is_reference else _with_dropped(final),
            *((same_scene if final.variant.scene == "stress" else "",) if stress else ()),
            f"{symbol} {'; '.join(failed) or word}",
        ),
        final.outcome,
    )


def _with_dropped(final: FinalLoss) -> str:
    text = delta(final.to_float32, 3)
    kept = final.to_float32.pairs
    return f"{text} (n = {kept})" if final.to_float32.dropped and kept > 1 else text


def _loss(value: float, digits: int = 2) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "NaN"


def _effects_table(effects: Sequence[Effect]) -> Table | None:
    if not effects:
        return None
    rows = tuple(
        Row(
            (
                effect.format,
                f"{len(effect.failed_off)} of {len(effect.seeds)}",
                f"{len(effect.failed_on)} of {len(effect.seeds)}",
                delta(effect.on_to_off, 3),
                delta(effect.on_to_clean, 3),
                str(effect.acted.get("skip", 0)),
                f"{effect.acted.get('gate', 0)}{f' ({effect.idle_gates} idle)' if effect.idle_gates else ''}",
                str(effect.acted.get("shift", 0)),
                str(effect.acted.get("rollback", 0)),
                _ended(effect),
                effect.verdict,
            ),
            {"saved": "trains", "helped": "trains", "harmed": "failed"}.get(effect.verdict, ""),
        )
        for effect in effects
    )
    columns = (
        "Format",
        "failed, off",
        "failed, on",
        "on − off",
        "on − undisturbed",
        "skips",
        "gate open",
        "shifts",
        "rollbacks",
        "Ended as",
        "Verdict",
    )
    return Table(columns, (Block("", "", rows),), frozenset({0, len(columns) - 2, len(columns) - 1}))


def _ended(effect: Effect) -> str:
    if len(effect.final_formats) == 1:
        return next(iter(effect.final_formats))
    return ", ".join(f"{name} ({count})" for name, count in effect.final_formats.items())


def _weakness_table(weaknesses: Sequence[Weakness]) -> Table:
    rows = tuple(
        Row(
            (
                weakness.format,
                percent(weakness.clean.operand_underflow),
                percent(weakness.clean.operand_overflow),
                percent(weakness.clean.gradient_underflow),
                percent(weakness.clean.gradient_overflow),
                f"{percent(weakness.clean.worst_overflow)} {weakness.clean.worst_site}".strip(),
                percent(weakness.stored_stall),
                delta(weakness.cast_cost, 3),
                delta(weakness.update_cost, 3),
                delta(weakness.stochastic_cost, 3),
                _STAGES[weakness.stage],
            )
        )
        for weakness in weaknesses
    )
    columns = (
        "Format",
        "operand underflow",
        "operand overflow",
        "gradient underflow",
        "gradient overflow",
        "worst step, site",
        "stall, nearest",
        "cost of casts",
        "cost of storing, nearest",
        "cost of storing, stochastic",
        "Loses most in",
    )
    return Table(columns, (Block("", "", rows),), frozenset({0, len(columns) - 1}))


def _failure_table(failures: Sequence[Failure]) -> Table | None:
    if not failures:
        return None
    blocks = tuple(
        Block(*_SCENES[variant], tuple(_failure_row(failure) for failure in failures if failure.variant == variant))
        for variant in dict.fromkeys(failure.variant for failure in failures)
    )
    columns = ("Format", "Seeds", "First step", "Cause", "What was done", "Outcome")
    return Table(columns, blocks, frozenset({0, 3, 4, 5}))


def _failure_row(failure: Failure) -> Row:
    return Row(
        (
            ", ".join(failure.formats),
            ", ".join(map(str, failure.seeds)),
            _first_steps(failure.steps),
            failure.cause,
            failure.action,
            _KINDS[failure.kind],
        ),
        {"recovered": "trains", "behind": "degraded"}.get(failure.kind, "failed"),
    )


def _first_steps(steps: Sequence[int | None]) -> str:
    texts = ["–" if step is None else str(step) for step in steps]
    return texts[0] if len(set(texts)) == 1 else ", ".join(texts)


def _caveats(study: Study) -> tuple[str, ...]:
    seeds = len(seeds_of(study))
    under_test = [name for name in formats_of(study) if name not in CONTROLS]
    few = _ONE_SEED if seeds == 1 else f"{number(seeds).capitalize()} seeds. {_INTERVALS}"
    caveats = [_ONE_RATE, few, *_CAVEATS]
    if "E3M4" in under_test:
        caveats.insert(
            2, "E3M4 here has bias 1 and maximum 124; it is not ml_dtypes.float8_e3m4 (bias 3, maximum 15.5)."
        )
    if {"E0M7", "E1M6"} <= set(under_test):
        caveats.insert(2, noise_sentence(study))
    return tuple(caveats)


def _swatches(study: Study) -> tuple[Swatch, ...]:
    dashes = {"solid": "none", "dash": "6 3", "dot": "2 2"}
    styles = ((name, style_of(study, name)) for name in formats_of(study))
    return tuple(Swatch(name, style.color, dashes[style.dash]) for name, style in styles)


def _marks(study: Study) -> tuple[Mark, ...]:
    """The marks of what happened in this study."""
    kinds = {event.kind for run in study.runs for event in run.events}
    return tuple(mark for kind, mark in MARKS.items() if kind in kinds)


def _settings(settings: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    return tuple(
        (_LABELS.get(key, key.replace("_", " ")), _shown(value)) for key, value in settings.items() if key != "command"
    )


def _shown(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_shown(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_shown(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)

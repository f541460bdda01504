"""The study in sentences made from its numbers: what trains, what fails, where, when, what the interventions did."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from altgrad.study.analysis import (
    CLEAN,
    COMMITTED_NEAREST,
    COMMITTED_STOCHASTIC,
    CONTROLS,
    REFERENCE,
    SAME_GRID,
    STRESS_OFF,
    STRESS_ON,
    TRAINS_WITHIN,
    Effect,
    FinalLoss,
    Outcome,
    Stage,
    Variant,
    Verdict,
    Weakness,
    effects,
    final_losses,
    formats_of,
    losses_of,
    paired_difference,
    seeds_of,
    weaknesses,
)
from altgrad.study.failures import FAR_BEHIND, Failure, failures
from altgrad.study.results import Study
from altgrad.study.wording import delta, listing, number, percent, signed, span


@dataclass(frozen=True)
class Finding:
    """One answer.

    Attributes:
        topic: the question, in a word or two.
        answer: one sentence.
        details: more of them.
    """

    topic: str
    answer: str
    details: tuple[str, ...]


@dataclass(frozen=True)
class Facts:
    """The analyses that the sentences are made from."""

    study: Study
    finals: Mapping[tuple[Variant, str], FinalLoss]
    effects: Sequence[Effect]
    weaknesses: Sequence[Weakness]
    failures: Sequence[Failure]

    @classmethod
    def of(cls, study: Study) -> Facts:
        """Analyse a study."""
        return cls(study, final_losses(study), effects(study), weaknesses(study), failures(study))

    def under_test(self, variant: Variant) -> list[FinalLoss]:
        """How the formats other than the controls ended in a variant."""
        return [final for (where, name), final in self.finals.items() if where == variant and name not in CONTROLS]


def findings(facts: Facts) -> tuple[Finding, ...]:
    """The answers for the first screen; a question that the study cannot answer says so or is left out."""
    topics: dict[str, Callable[[Facts], list[str]]] = {
        "Which train": _which_train,
        "Which fail": _which_fail,
        "Where": _where,
        "When": _when,
        "Interventions": _interventions,
    }
    answers = ((topic, answer(facts)) for topic, answer in topics.items())
    return tuple(Finding(topic, sentences[0], tuple(sentences[1:])) for topic, sentences in answers if sentences)


def noise_sentence(study: Study) -> str:
    """What the two names of one grid say about noise."""
    first, second = SAME_GRID
    left, right = losses_of(study, CLEAN, first), losses_of(study, CLEAN, second)
    gap = paired_difference(right, left)
    rule = f"{second} is exactly 4 × {first} on every code, so under amax scaling the two are one format"
    if not gap.known:
        return f"{rule}: read any difference between them as noise."
    if all(left[seed] == right[seed] for seed in left.keys() & right.keys()):
        return f"{rule}: their clean runs agree to the last digit here, as they must."
    largest = max(abs(left[seed] - right[seed]) for seed in left.keys() & right.keys())
    return (
        f"{rule}, and any difference between them is noise: here {delta(gap, 3)} on clean runs, up to {largest:.3f} "
        "for a single seed. Take that as the noise floor of this page."
    )


def _which_train(facts: Facts) -> list[str]:
    finals = facts.under_test(CLEAN)
    reference = facts.finals.get((CLEAN, REFERENCE))
    if not finals:
        return ["No 8-bit format was run undisturbed, so this study cannot say."]
    if reference is not None and reference.outcome == "failed":
        return [f"Not even {REFERENCE} trains undisturbed: this study is too short, or its setup too broken, to tell."]
    sentences = [_situation(CLEAN, finals)]
    if reference is not None:
        sentences += _against_noise(finals, len(seeds_of(facts.study)))
    return sentences


def _which_fail(facts: Facts) -> list[str]:
    stored = [(variant, facts.under_test(variant)) for variant in (COMMITTED_NEAREST, COMMITTED_STOCHASTIC)]
    sentences = [_situation(variant, finals) for variant, finals in stored if finals]
    sentences += _rounding_gain(facts)
    clean = facts.under_test(CLEAN)
    if not sentences and clean:
        failed = [final.format for final in clean if final.outcome == "failed"]
        names = _all_or(failed, len(clean)) if failed else "no 8-bit format"
        sentences = [f"Undisturbed, {names} fail{'s' * (len(failed) < 2)}."]
    return sentences


def _situation(variant: Variant, finals: Sequence[FinalLoss]) -> str:
    """Who fails, degrades and trains in a variant."""
    parts = []
    for outcome, describe in _OUTCOME_TEXT.items():
        group = [final for final in finals if final.outcome == outcome]
        if group:
            names = _all_or([final.format for final in group], len(finals))
            parts.append(describe(names, "s" if len(group) == 1 else "", group))
    return f"{_start(variant)}, {'; '.join(parts)}."


def _all_or(names: Sequence[str], total: int) -> str:
    """All of the formats under test, if these are all, or their names."""
    return f"{_all(total)} 8-bit formats" if len(names) == total > 1 else listing(names)


def _all(count: int) -> str:
    return "both" if count == 2 else f"all {number(count)}"


def _train_text(names: str, ending: str, finals: Sequence[FinalLoss]) -> str:
    gaps = span([final.to_float32.mean for final in finals], signed)
    return f"{names} train{ending}, {gaps} nats/char from float32"


def _degraded_text(names: str, ending: str, finals: Sequence[FinalLoss]) -> str:
    gaps = span([final.to_float32.mean for final in finals], signed)
    return f"{names} end{ending} {gaps} nats/char above float32"


def _failed_text(names: str, ending: str, finals: Sequence[FinalLoss]) -> str:
    lost = sum(len(final.nonfinite) for final in finals)
    flat = sum(len(final.failed_seeds) for final in finals) - lost
    runs = sum(len(final.losses) for final in finals)
    how = [f"{lost} of {runs} runs not finite"] * bool(lost) + [f"{flat} of {runs} runs untrained"] * bool(flat)
    return f"{names} fail{ending} ({listing(how)})"


def _unknown_text(names: str, ending: str, finals: Sequence[FinalLoss]) -> str:
    losses = span([final.mean for final in finals], lambda loss: f"{loss:.2f}")
    return f"{names} end{ending} at {losses} nats/char, with no float32 to compare to"


_OUTCOME_TEXT: Mapping[Outcome, Callable[[str, str, Sequence[FinalLoss]], str]] = {
    "failed": _failed_text,
    "degraded": _degraded_text,
    "unknown": _unknown_text,
    "trains": _train_text,
}


def _against_noise(finals: Sequence[FinalLoss], seeds: int) -> list[str]:
    if seeds < 2:
        return ["One seed only: differences come without an interval, and none can be told from noise."]
    kept = [final for final in finals if final.outcome != "failed"]
    groups = {
        "within noise of it": [final.format for final in kept if final.to_float32.within_noise],
        "measurably above it": [final.format for final in kept if final.to_float32.above],
        "measurably below it": [final.format for final in kept if final.to_float32.below],
    }
    parts = [f"{words}: {listing(names)}" for words, names in groups.items() if names]
    return [_sentence("; ".join(parts))] if parts else []


def _rounding_gain(facts: Facts) -> list[str]:
    nearest = {final.format: final for final in facts.under_test(COMMITTED_NEAREST)}
    both = [final for final in facts.under_test(COMMITTED_STOCHASTIC) if final.format in nearest]
    gaps = {final.format: paired_difference(final.losses, nearest[final.format].losses).mean for final in both}
    better = [name for name, gap in gaps.items() if gap < 0]
    worse = [name for name, gap in gaps.items() if gap >= 0]
    sentences = []
    if better:
        gains = span([-gaps[name] for name in better], lambda gain: f"{gain:.2f}")
        whose = f" for {listing(better)}" if worse else ""
        sentences.append(f"That is {gains} nats better than rounding to nearest{whose}.")
    if worse:
        sentences.append(f"It is no better than rounding to nearest for {listing(worse)}.")
    return sentences


def _where(facts: Facts) -> list[str]:
    kept = [weakness for weakness in facts.weaknesses if weakness.format not in CONTROLS]
    groups = {stage: [weakness for weakness in kept if weakness.stage == stage] for stage in _STAGE_TEXT}
    return [
        sentence
        for stage, group in groups.items()
        if group
        for sentence in _STAGE_TEXT[stage](group, _all_or([weakness.format for weakness in group], len(kept)))
    ]


def _update_text(group: Sequence[Weakness], names: str) -> list[str]:
    stalls = [weakness.stored_stall for weakness in group if not math.isnan(weakness.stored_stall)]
    costs = [weakness.update_cost.mean for weakness in group if weakness.update_cost.known]
    casts = [weakness.cast_cost.mean for weakness in group if weakness.cast_cost.known]
    parts = [f"{span(stalls, percent)} of updates leave a weight as it was"] if stalls else []
    parts += [f"storing costs {span(costs, signed)} nats"] if costs else []
    sentences = [f"In the update of stored weights: {names}."]
    if parts:
        sentences.append(f"Rounded to nearest, {', and '.join(parts)}.")
    if casts:
        sentences.append(f"Casting operands and gradients costs {span(casts, signed)}.")
    return sentences


def _cast_text(where: str, under: str, over: str) -> Callable[[Sequence[Weakness], str], list[str]]:
    def text(group: Sequence[Weakness], names: str) -> list[str]:
        each = listing(
            f"{weakness.format} ({percent(getattr(weakness.clean, under))} underflow, "
            f"{percent(getattr(weakness.clean, over))} overflow, {signed(weakness.cast_cost.mean)} nats)"
            for weakness in group
        )
        return [f"In the casts of {where}: {names}.", f"Clean runs: {each}."]

    return text


_STAGE_TEXT: Mapping[Stage, Callable[[Sequence[Weakness], str], list[str]]] = {
    "update": _update_text,
    "forward": _cast_text("operands (forward)", "operand_underflow", "operand_overflow"),
    "gradient": _cast_text("gradients (backward)", "gradient_underflow", "gradient_overflow"),
    "none": lambda group, names: [f"Nothing stands out for {names}."],
    "unknown": lambda group, names: [f"The runs do not tell for {names}."],
}


def _when(facts: Facts) -> list[str]:
    variants = dict.fromkeys(failure.variant for failure in facts.failures)
    sentences = [_lost_text(facts, variant) for variant in variants] + [
        _behind_text(facts, variant) for variant in variants
    ]
    return [sentence for sentence in sentences if sentence] or ["No run was lost or fell far behind float32."]


def _lost_text(facts: Facts, variant: Variant) -> str:
    lost = [failure for failure in facts.failures if failure.variant == variant and failure.kind == "lost"]
    if not lost:
        return ""
    names = list(dict.fromkeys(name for failure in lost for name in failure.formats))
    steps = [step for failure in lost for step in failure.steps if step is not None]
    causes = {failure.cause.removeprefix("injected: ") for failure in lost}
    why = f" ({causes.pop()})" if len(causes) == 1 else ""
    at = f"at step {steps[0]}" if len(set(steps)) == 1 else f"between steps {min(steps)} and {max(steps)}"
    return f"{_start(variant)}, {_some(names, facts)} {'is' if len(names) == 1 else 'are'} lost {at}{why}."


def _behind_text(facts: Facts, variant: Variant) -> str:
    behind = [failure for failure in facts.failures if failure.variant == variant and failure.kind == "behind"]
    first = {
        name: min(steps)
        for failure in behind
        if (steps := [step for step in failure.steps if step is not None])
        for name in failure.formats
    }
    if not first:
        return ""
    each = listing(
        f"{step} ({listing(name for name in first if first[name] == step)})" for step in sorted({*first.values()})
    )
    return f"{_start(variant)}, runs fall {FAR_BEHIND:.1f} nats behind float32 for good at step {each}."


def _some(formats: Sequence[str], facts: Facts) -> str:
    total = len(formats_of(facts.study))
    return f"{_all(total)} formats" if len(formats) == total > 1 else listing(formats)


def _interventions(facts: Facts) -> list[str]:
    if not facts.effects:
        ran = {variant for variant, _ in facts.finals} & {STRESS_OFF, STRESS_ON}
        return ["Not tested: no format was put under stress both with and without them."] if ran else []
    groups = {verdict: [e for e in facts.effects if e.verdict == verdict] for verdict in _VERDICT_TEXT}
    sentences = [_VERDICT_TEXT[verdict](group, facts) for verdict, group in groups.items() if group]
    return [*sentences, *_price(facts.effects), *_clipper(facts.effects), *_shifted(facts.effects)]


def _saved_text(group: Sequence[Effect], facts: Facts) -> str:
    off = sum(len(effect.failed_off) for effect in group)
    on = sum(len(effect.failed_on) for effect in group)
    names = _some([effect.format for effect in group], facts)
    still = f", and {on} still {'fails' if on == 1 else 'fail'}" if on else ""
    return f"Of {off} runs that fail under stress without them, they save {off - on} ({names}){still}."


def _each_text(words: str) -> Callable[[Sequence[Effect], Facts], str]:
    def text(group: Sequence[Effect], facts: Facts) -> str:
        reasons: dict[str, list[Effect]] = {}
        for effect in group:
            reasons.setdefault(_reason(effect), []).append(effect)
        each = [f"{_some([e.format for e in effects], facts)} ({_on_off(effects)})" for effects in reasons.values()]
        return f"{words} {listing(each)}."

    return text


def _reason(effect: Effect) -> str:
    """What a verdict rests on: seeds that failed, or the difference."""
    if len(effect.failed_on) == len(effect.failed_off) == len(effect.seeds):
        return "fail with and without them"
    if len(effect.failed_on) > len(effect.failed_off):
        return "fail with them"
    return "" if effect.acted else ", nothing acted"


def _on_off(group: Sequence[Effect]) -> str:
    reason = _reason(group[0])
    if reason == "fail with them":
        on, off = (sum(len(getattr(effect, name)) for effect in group) for name in ("failed_on", "failed_off"))
        return f"{on} of {sum(len(effect.seeds) for effect in group)} runs fail with them, {off} without"
    if reason.startswith("fail"):
        return reason
    one = delta(group[0].on_to_off) if len(group) == 1 else span([effect.on_to_off.mean for effect in group], signed)
    return f"{one} nats on against off{reason}"


_VERDICT_TEXT: Mapping[Verdict, Callable[[Sequence[Effect], Facts], str]] = {
    "saved": _saved_text,
    "helped": _each_text("They help"),
    "harmed": _each_text("They harm"),
    "no effect": _each_text("They do nothing for"),
    "unclear": _each_text("Too noisy to tell:"),
}


def _price(group: Sequence[Effect]) -> list[str]:
    """How far runs with interventions end from undisturbed ones, formats under test first."""
    known = [effect for effect in group if effect.on_to_clean.known]
    tested = [effect for effect in known if effect.format not in CONTROLS]
    controls = [effect for effect in known if effect.format in CONTROLS and effect.verdict == "saved"]
    sentences = []
    if tested:
        above = [effect.format for effect in tested if effect.on_to_clean.above]
        measured = f", measurably above for {listing(above)}" if above else ""
        sentences.append(
            f"With them, 8-bit formats end {_gaps(tested)} nats from their own undisturbed runs{measured}."
        )
    return sentences + ([_skipping_alone(controls)] if controls else [])


def _skipping_alone(controls: Sequence[Effect]) -> str:
    """Controls can only skip and roll back: if that saves them, too, nothing shows a need for more."""
    start = f"With skipping and rollback alone, {listing(effect.format for effect in controls)}"
    ending = "s" if len(controls) == 1 else ""
    failed = sum(len(effect.failed_on) for effect in controls)
    if failed:
        return f"{start} still fail{ending} in {failed} of {sum(len(effect.seeds) for effect in controls)} runs."
    if max(effect.on_to_clean.mean for effect in controls) > TRAINS_WITHIN:
        return f"{start} survive{ending} too, but end{ending} {_gaps(controls)}."
    return f"{start} survive{ending} too and end{ending} {_gaps(controls)}: no need for clipping or shifting is shown."


def _gaps(group: Sequence[Effect]) -> str:
    return span([effect.on_to_clean.mean for effect in group], signed)


def _shifted(group: Sequence[Effect]) -> list[str]:
    moved: dict[str, list[str]] = {}
    for effect in group:
        for name, count in effect.final_formats.items():
            if name != effect.format:
                some = "" if count == len(effect.seeds) else f" (in {count} of {len(effect.seeds)} runs)"
                moved.setdefault(name, []).append(effect.format + some)
    ended = "; ".join(f"{listing(whence)} as {name}" for name, whence in moved.items())
    sentences = [f"Some end in another format: {ended}."] if ended else []
    early = [effect for effect in group if effect.early_shifts]
    if early:
        names, ending = listing(effect.format for effect in early), "s" if len(early) == 1 else ""
        causes = listing(dict.fromkeys(cause for effect in early for cause in effect.early_shifts))
        sentences.append(
            f"{names} shift{ending} before the first fault ({causes}): what that changes is in these numbers, too."
        )
    return sentences


def _clipper(group: Sequence[Effect]) -> list[str]:
    """Where the clipper had nothing to do, or did nothing."""
    tested = [effect for effect in group if effect.format not in CONTROLS]
    shut = [effect.format for effect in tested if not effect.acted.get("gate")]
    idle = [effect.format for effect in tested if effect.idle_gates and effect.idle_gates == effect.acted.get("gate")]
    whom = f" for {listing(shut)}" if len(shut) < len(tested) else ""
    sentences = [f"The clipper’s gate never opens{whom}."] if shut else []
    if idle:
        sentences.append(
            f"The clipper’s gate opens for {listing(idle)} but clips nothing: the threshold is above every norm seen."
        )
    return sentences


def _start(variant: Variant) -> str:
    """How a sentence about a variant begins."""
    return {
        CLEAN: "On float32 master weights, undisturbed",
        COMMITTED_NEAREST: "Stored on the grid, rounded to nearest",
        COMMITTED_STOCHASTIC: "Stored on the grid, rounded stochastically",
        STRESS_OFF: "Under stress without interventions",
        STRESS_ON: "Under stress with interventions",
    }[variant]


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."

"""The study's files, numbers and report, on made-up studies: no training happens here."""

import dataclasses
import hashlib
import io
import json
import math
import re
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from altgrad.study import analysis, failures, figures, findings
from altgrad.study.analysis import CLEAN, COMMITTED_NEAREST, COMMITTED_STOCHASTIC, STRESS_OFF, STRESS_ON, Variant
from altgrad.study.report import write_report
from altgrad.study.results import SERIES, RunResult, Study, StudyError, load, save
from altgrad_core.events import Event

STEPS = 240
SPIKE, NANS = 60, range(120, 125)
SITES = tuple(f"block{layer}.{name}" for layer in (0, 1) for name in ("qkv", "scores", "values", "proj", "up", "down"))
FORMATS = analysis.STUDIED_FORMATS

CAST_COST = {"float32": 0.0, "bf16": 0.002, "E0M7": 0.04, "E1M6": 0.04, "E3M4": 0.006, "E5M2": 0.015, "E7M0": 0.062}
STORED_COST = {"float32": 0.0, "bf16": 0.06, "E0M7": 0.28, "E1M6": 0.28, "E3M4": 0.33, "E5M2": 0.56, "E7M0": 1.1}
STALL = {"float32": 0.0, "bf16": 0.35, "E0M7": 0.78, "E1M6": 0.78, "E3M4": 0.86, "E5M2": 0.93, "E7M0": 0.985}
UNDERFLOW = {"float32": 0.0, "bf16": 0.0, "E0M7": 0.31, "E1M6": 0.31, "E3M4": 0.11, "E5M2": 0.002, "E7M0": 0.0}
FALLBACK = {"E0M7": "E3M4", "E1M6": "E3M4", "E3M4": "E5M2", "E7M0": "E5M2"}


def made_up_run(variant: Variant, name: str, seed: int, steps: int) -> tuple[RunResult, dict[str, np.ndarray]]:
    """A run whose numbers are plausible, and its series."""
    random = np.random.default_rng([seed, len(name), *name.encode(), *variant.label.encode()])
    shared = np.random.default_rng(seed)
    step = np.arange(steps)
    cost = CAST_COST.get(name, 0.05)
    if variant.scene == "committed":
        cost += STORED_COST.get(name, 0.3) * (1.0 if variant == COMMITTED_NEAREST else 0.35)
    final = 2.21 + 0.02 * seed + cost * (1 + 0.1 * random.normal()) + 0.004 * random.normal()
    loss = final + (4.35 - final) * np.exp(-step / (28 + 8 * cost)) + 0.05 * shared.normal(size=steps)
    norm = 0.8 + 0.1 * random.random(steps)
    overflow = random.poisson(1.5, steps) * 2e-6 * (name not in analysis.CONTROLS)
    stalled = STALL.get(name, 0.5) + 0.02 * random.random(steps) * (name != "float32")
    applied, clipped = np.ones(steps), np.zeros(steps)
    events: list[Event] = []
    final_format = name
    if variant.scene == "stress" and steps > NANS[-1]:
        on = bool(variant.interventions)
        eight_bit = name not in analysis.CONTROLS
        events.append(Event(SPIKE, "fault", "spike", {"value": 1e4}))
        loss[SPIKE] *= 1e4
        loss[SPIKE + 1 :] += (0.5 if not on else 0.02) * np.exp(-(step[SPIKE + 1 :] - SPIKE) / 60)
        if eight_bit:
            overflow[SPIKE] = 0.9
        if on and eight_bit and name != "E7M0":
            clipped[SPIKE] = 1
            events.append(Event(SPIKE, "gate", "overflow", {"overflow_rate": 0.9, "norm": 8e3}))
        for fault in NANS:
            events.append(Event(fault, "fault", "nan", {"value": math.nan}))
            loss[fault] = norm[fault] = np.nan
            if on:
                applied[fault] = 0
                events.append(Event(fault, "skip", "nan", {"loss": math.nan}))
            if on and fault == NANS[2] and name in FALLBACK:
                final_format = FALLBACK[name]
                events.append(Event(fault, "shift", "nan", {"from": name, "to": final_format}))
            elif on and fault == NANS[2] and name == "E5M2":
                events.append(Event(fault, "exhausted", "nan", {"format": name}))
        final += 0.01 if on else 0.0
        if not on:
            final = math.nan
            loss[NANS[0] :] = norm[NANS[0] :] = np.nan
            for rates in (overflow, stalled):
                rates[NANS[0] :] = 0
    series = {
        "loss": loss,
        "norm": norm,
        "overflow_rate": overflow,
        "worst_overflow_rate": np.minimum(overflow * 11, 1),
        "worst_overflow_site": np.full(steps, 11.0),
        "underflow_rate": UNDERFLOW.get(name, 0.1)
        * (0.8 + 0.2 * np.sqrt(step / steps))
        * (0.97 + 0.06 * random.random(steps)),
        "operand_overflow_rate": overflow / 3,
        "operand_underflow_rate": UNDERFLOW.get(name, 0.1) * 0.4 * (0.97 + 0.06 * random.random(steps)),
        "stall_rate": np.clip(stalled, 0, 1),
        "saturation_rate": np.zeros(steps),
        "applied": applied,
        "clipped": clipped,
    }
    storage = "committed" if variant.scene == "committed" else "master"
    rounding = variant.storage_rounding or "nearest_even"
    run = RunResult(
        name, seed, variant.scene, storage, rounding, variant.interventions, final_format, float(final), tuple(events)
    )
    return run, {key: values.astype(np.float32) for key, values in series.items()}


def made_up_study(
    formats: Sequence[str] = FORMATS,
    seeds: Sequence[int] = (0, 1, 2),
    variants: Sequence[Variant] = analysis.VARIANTS,
    steps: int = STEPS,
    change: Callable[[RunResult, dict[str, np.ndarray]], RunResult] = lambda run, series: run,
) -> Study:
    """A study whose outcome is known; ``change`` may bend each run before it goes in."""
    made = [made_up_run(variant, name, seed, steps) for variant in variants for name in formats for seed in seeds]
    runs = tuple(change(run, series) for run, series in made)
    config = {
        "layers": 2,
        "width": 64,
        "heads": 4,
        "steps": steps,
        "batch": 8,
        "context": 32,
        "learning_rate": 3e-3,
        "seeds": list(seeds),
        "faults": ["spike@60:1e4", "nan@120:5"],
        "overflow_threshold": 0.01,
        "base_clip": 1.0,
        "unigram_loss": 3.31,
        "corpus": "shakespeare",
        "command": "altgrad study --size demo",
    }
    environment = {"python": "3.11.7", "jax": "0.10.2", "numpy": "2.4.6", "cpu": "2 cores", "altgrad": "0.1.0"}
    return Study(
        config=config,
        environment=environment,
        sites=(*SITES, "logits"),
        runs=runs,
        series={key: np.stack([series[key] for _, series in made]) for key in SERIES},
        wall_seconds=172.4,
    )


def ending(
    losses: dict[tuple[str, Variant], Sequence[float]],
) -> Callable[[RunResult, dict[str, np.ndarray]], RunResult]:
    """A change that sets final losses, one for each seed, of some formats in some variants."""

    def change(run: RunResult, series: dict[str, np.ndarray]) -> RunResult:
        key = (run.format, Variant.of(run))
        return dataclasses.replace(run, final_loss=losses[key][run.seed]) if key in losses else run

    return change


def nothing_finite(run: RunResult, series: dict[str, np.ndarray]) -> RunResult:
    for values in series.values():
        values[:] = np.nan
    return dataclasses.replace(run, final_loss=math.nan)


def small(*formats: str, steps: int = 8, **given: object) -> Study:
    """A study too short for faults, whose losses are then set by hand."""
    return made_up_study(("float32", *formats), steps=steps, **given)  # type: ignore[arg-type]


def fate(study: Study, variant: Variant, name: str) -> analysis.FinalLoss:
    return analysis.final_losses(study)[variant, name]


# --- files


def test_round_trip(tmp_path: Path) -> None:
    study = made_up_study(("float32", "E7M0"))
    save(study, tmp_path / "new")
    back = load(tmp_path / "new")
    assert repr(back.runs) == repr(study.runs)
    assert back.config == study.config
    assert back.environment == study.environment
    assert (back.sites, back.wall_seconds, back.steps) == (study.sites, study.wall_seconds, STEPS)
    for name in SERIES:
        assert back.series[name].dtype == np.float32
        np.testing.assert_array_equal(back.series[name], study.series[name])


def test_what_json_cannot_say_is_written_as_words(tmp_path: Path) -> None:
    study = dataclasses.replace(small(), config={"nested": {"values": [math.nan, -math.inf]}, "word": "infinite"})
    runs = (dataclasses.replace(study.runs[0], final_loss=math.inf), *study.runs[1:])
    save(dataclasses.replace(study, runs=runs), tmp_path)

    def refuse(constant: str) -> None:
        raise AssertionError(f"not JSON: {constant}")

    written = json.loads((tmp_path / "study.json").read_text(), parse_constant=refuse)
    assert written["config"] == {"nested": {"values": ["NaN", "-Infinity"]}, "word": "infinite"}
    back = load(tmp_path)
    assert back.runs[0].final_loss == math.inf
    assert math.isnan(back.config["nested"]["values"][0])
    assert back.config["word"] == "infinite"


def test_saving_again_replaces(tmp_path: Path) -> None:
    save(small("E5M2"), tmp_path)
    save(small("E7M0"), tmp_path)
    assert {run.format for run in load(tmp_path).runs} == {"float32", "E7M0"}
    assert {path.name for path in tmp_path.iterdir()} == {"study.json", "series.npz"}


def edit(folder: Path, change: Callable[[dict], object]) -> None:
    content = json.loads((folder / "study.json").read_text())
    change(content)
    (folder / "study.json").write_text(json.dumps(content))


def put_series(folder: Path, data: bytes) -> None:
    """Replaces the series by bytes that the JSON file vouches for."""
    (folder / "series.npz").write_bytes(data)
    edit(folder, lambda content: content.update(series_sha256=hashlib.sha256(data).hexdigest()))


def pickled() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, loss=np.array([{"not": "numbers"}], object))
    return buffer.getvalue()


DAMAGES = {
    "no json": (lambda folder: (folder / "study.json").unlink(), r"study\.json does not exist"),
    "no series": (lambda folder: (folder / "series.npz").unlink(), r"series\.npz does not exist"),
    "a folder": (
        lambda folder: [(folder / "study.json").unlink(), (folder / "study.json").mkdir()],
        r"study\.json cannot be read",
    ),
    "half of the json": (
        lambda folder: (folder / "study.json").write_text((folder / "study.json").read_text()[:99]),
        r"study\.json is not JSON",
    ),
    "not text": (lambda folder: (folder / "study.json").write_bytes(b"\xff\xfe{"), r"study\.json is not JSON"),
    "other json": (lambda folder: (folder / "study.json").write_text("[1]"), r"study\.json is not a study"),
    "other version": (
        lambda folder: edit(folder, lambda content: content.update(altgrad_study=1)),
        r"study\.json is version 1 .* reads version 2",
    ),
    "changed series": (
        lambda folder: (folder / "series.npz").write_bytes((folder / "series.npz").read_bytes()[:-9]),
        r"series\.npz is damaged",
    ),
    "no archive": (lambda folder: put_series(folder, b"PK\x03\x04 nothing"), r"series\.npz does not hold arrays"),
    "empty": (lambda folder: put_series(folder, b""), r"series\.npz does not hold arrays"),
    "pickled": (lambda folder: put_series(folder, pickled()), r"series\.npz does not hold arrays.*allow_pickle"),
    "missing field": (
        lambda folder: edit(folder, lambda content: content["runs"][0].pop("seed")),
        r"study\.json has no field 'seed'",
    ),
    "unknown scene": (
        lambda folder: edit(folder, lambda content: content["runs"][0].update(scene="calm")),
        r"study\.json: scene is 'calm'; expected one of clean",
    ),
    "a run too few": (lambda folder: edit(folder, lambda content: content["runs"].pop()), r"study\.json: series have"),
    "no event": (
        lambda folder: edit(folder, lambda content: content["runs"][0].update(events=[{"step": 1}])),
        r"study\.json: not an event",
    ),
    "no runs": (lambda folder: edit(folder, lambda content: content.update(runs=3)), r"study\.json: 'int' object"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_files_are_named(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    save(small(), tmp_path)
    damage(tmp_path)
    with pytest.raises(StudyError, match=message):
        load(tmp_path)


def test_contradictions_are_refused() -> None:
    study = small()
    with pytest.raises(StudyError, match="without runs"):
        dataclasses.replace(study, runs=())
    with pytest.raises(StudyError, match="two runs are the same: format float32, seed 0, scene clean"):
        dataclasses.replace(study, runs=(study.runs[0], *study.runs[:-1]))
    with pytest.raises(StudyError, match=r"series missing: \['loss'\], unknown: \['los'\]"):
        dataclasses.replace(study, series={name.replace("loss", "los"): study.series[name] for name in SERIES})
    with pytest.raises(StudyError, match=r"expected all of them to be \(15 runs, steps\)"):
        dataclasses.replace(study, series={**study.series, "norm": study.series["norm"][:, 1:]})
    with pytest.raises(StudyError, match="storage is 'disk'; expected one of master, committed"):
        dataclasses.replace(study.runs[0], storage="disk")
    with pytest.raises(StudyError, match="interventions is None in scene 'stress'"):
        dataclasses.replace(study.runs[0], scene="stress")
    with pytest.raises(StudyError, match="interventions is True in scene 'clean'"):
        dataclasses.replace(study.runs[0], interventions=True)


# --- differences and outcomes


def test_interval_is_students_on_paired_differences() -> None:
    random = np.random.default_rng(0)
    for count in (2, 3, 7):
        left, right = (dict(enumerate(random.normal(size=count))) for _ in range(2))
        gaps = [left[seed] - right[seed] for seed in left]
        low, high = stats.t.interval(0.95, count - 1, np.mean(gaps), stats.sem(gaps))
        found = analysis.paired_difference(left, right)
        assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx((low, high))
        assert (found.pairs, found.dropped) == (count, 0)


def test_pairs_are_those_both_have_and_both_finished() -> None:
    found = analysis.paired_difference({0: 2.0, 1: math.nan, 2: 3.0}, {0: 1.5, 1: 1.0, 3: 1.0})
    assert (found.mean, found.pairs, found.dropped) == (0.5, 1, 1)
    assert math.isnan(found.half_width)
    assert not any((found.above, found.below, found.within_noise))
    assert not analysis.paired_difference({0: math.inf}, {0: math.inf}).known


def test_outcomes() -> None:
    study = small(
        "near",
        "far",
        "lost",
        "flat",
        variants=[CLEAN],
        change=ending(
            {
                ("float32", CLEAN): [2.0, 2.1, 2.2],
                ("near", CLEAN): [2.1, 2.2, 2.3],
                ("far", CLEAN): [2.11, 2.21, 2.31],
                ("lost", CLEAN): [2.0, math.nan, 2.2],
                ("flat", CLEAN): [3.27, 2.1, 2.2],
            }
        ),
    )
    finals = {name: fate(study, CLEAN, name) for name in ("float32", "near", "far", "lost", "flat")}
    assert [final.outcome for final in finals.values()] == ["trains", "trains", "degraded", "failed", "failed"]
    assert finals["float32"].is_reference
    assert finals["near"].to_float32.mean == pytest.approx(0.1)
    assert finals["lost"].failed_seeds == finals["lost"].nonfinite == (1,)
    assert finals["lost"].to_float32.pairs == 2
    assert finals["flat"].failed_seeds == finals["flat"].untrained == (0,)


def test_without_the_entropy_of_characters_a_run_is_measured_by_its_own_start() -> None:
    losses = {("float32", CLEAN): [4.6, 2.0, 2.0]}
    study = small(variants=[CLEAN], change=ending(losses))
    bare = dataclasses.replace(study, config={})
    assert fate(bare, CLEAN, "float32").untrained == (0,)


def test_committed_runs_are_compared_with_masters() -> None:
    study = small("E5M2")
    for rounding in (COMMITTED_NEAREST, COMMITTED_STOCHASTIC):
        final = fate(study, rounding, "E5M2")
        clean = fate(study, CLEAN, "float32").losses
        assert final.to_float32 == final.to_float32_here == analysis.paired_difference(final.losses, clean)
    stressed = fate(study, STRESS_ON, "E5M2")
    here = analysis.paired_difference(stressed.losses, fate(study, STRESS_ON, "float32").losses)
    assert stressed.to_float32_here == here != stressed.to_float32


def test_without_float32_there_is_no_verdict() -> None:
    study = made_up_study(("E5M2",), steps=8, variants=[CLEAN])
    assert fate(study, CLEAN, "E5M2").outcome == "unknown"
    assert not fate(study, CLEAN, "E5M2").to_float32.known


NAN = math.nan


@pytest.mark.parametrize(
    ("off", "on", "verdict"),
    [
        ([NAN, NAN, NAN], [2.2, 2.2, 2.2], "saved"),
        ([NAN, NAN, NAN], [2.2, NAN, NAN], "saved"),
        ([3.3, 2.2, 2.2], [2.2, 2.2, 2.2], "saved"),
        ([2.2, 2.2, 2.2], [2.2, 2.2, NAN], "harmed"),
        ([NAN, NAN, NAN], [NAN, NAN, NAN], "no effect"),
        ([2.5, 2.6, 2.7], [2.2, 2.31, 2.4], "helped"),
        ([2.2, 2.31, 2.4], [2.5, 2.6, 2.7], "harmed"),
        ([2.2, 2.3, 2.4], [2.2, 2.3, 2.4], "no effect"),
        ([2.2, 2.3, 2.4], [2.21, 2.29, 2.41], "no effect"),
        ([2.2, 2.3, 2.4], [2.1, 2.5, 2.6], "unclear"),
    ],
)
def test_verdicts(off: list[float], on: list[float], verdict: str) -> None:
    losses = {("E3M4", STRESS_OFF): off, ("E3M4", STRESS_ON): on}
    (effect,) = analysis.effects(made_up_study(("E3M4",), steps=8, change=ending(losses)))
    assert effect.verdict == verdict
    assert effect.acted == {}


def test_effects_need_both_arms_and_count_what_acted() -> None:
    assert analysis.effects(made_up_study(("E3M4",), variants=[CLEAN, STRESS_ON])) == ()
    (effect,) = analysis.effects(made_up_study(("E3M4",)))
    assert effect.acted == {"skip": 15, "gate": 3, "shift": 3}
    assert effect.final_formats == {"E5M2": 3}
    assert effect.failed_off == (0, 1, 2)
    assert effect.failed_on == ()


def test_one_seed_has_no_interval() -> None:
    study = made_up_study(seeds=[7], steps=8)
    found = fate(study, CLEAN, "E7M0").to_float32
    assert found.pairs == 1
    assert math.isnan(found.half_width)


@pytest.mark.parametrize(
    ("cast", "update", "rates", "stage"),
    [
        (0.0, 0.5, {}, "update"),
        (0.0, NAN, {}, "update"),
        (0.5, 0.1, {"operand_underflow_rate": 0.4}, "forward"),
        (0.5, 0.1, {"underflow_rate": 0.4}, "gradient"),
        (0.5, 0.1, {"underflow_rate": 0.2, "operand_overflow_rate": 0.3}, "forward"),
        (NAN, NAN, {"underflow_rate": 0.9}, "gradient"),
        (0.0, 0.0, {"underflow_rate": 0.9}, "none"),
    ],
)
def test_stages(cast: float, update: float, rates: dict[str, float], stage: str) -> None:
    def change(run: RunResult, series: dict[str, np.ndarray]) -> RunResult:
        for name in ("operand_underflow_rate", "underflow_rate", "overflow_rate", "operand_overflow_rate"):
            series[name][:] = rates.get(name, 0.0)
        clean = 2.0 + 0.1 * run.seed + (cast if run.format != "float32" else 0.0)
        return dataclasses.replace(run, final_loss=clean + (update if run.scene == "committed" else 0.0))

    (weakness,) = analysis.weaknesses(small("E2M5", variants=[CLEAN, COMMITTED_NEAREST], change=change))
    assert weakness.stage == stage


def test_smoothing_drops_spikes_and_keeps_gaps() -> None:
    values = np.linspace(3, 2, 21)
    bent = values.copy()
    bent[10], bent[15] = 1e4, np.nan
    found = analysis.smoothed(bent, 5)
    assert np.flatnonzero(np.isnan(found)).tolist() == [15]
    np.testing.assert_allclose(found[~np.isnan(found)], values[~np.isnan(found)], atol=0.12)
    np.testing.assert_array_equal(analysis.smoothed(values, 1), values)
    assert np.isnan(analysis.smoothed(np.full(4, np.inf), 3)).all()


def test_missing_parts_are_named() -> None:
    assert analysis.missing_parts(made_up_study(steps=8)) == ()
    study = made_up_study(("float32", "E5M2"), variants=[CLEAN, COMMITTED_NEAREST], steps=8)
    kept = [row for row, run in enumerate(study.runs) if (run.format, run.scene, run.seed) != ("E5M2", "clean", 1)]
    study = dataclasses.replace(
        study,
        runs=tuple(study.runs[row] for row in kept),
        series={name: values[kept] for name, values in study.series.items()},
    )
    lines = analysis.missing_parts(study)
    assert "formats not in this study: bf16, E0M7, E1M6, E3M4, E7M0" in lines
    assert "scenes not in this study: committed, stochastic; stress, off; stress, on" in lines
    assert "E5M2, clean: no run of seed 1" in lines


# --- failures


def only(study: Study, kind: str) -> list[failures.Failure]:
    return [failure for failure in failures.failures(study) if failure.kind == kind]


def test_injected_nans_are_the_cause_and_formats_share_an_entry() -> None:
    (lost,) = only(made_up_study(), "lost")
    assert lost.formats == FORMATS
    assert (lost.variant, lost.seeds, lost.steps) == (STRESS_OFF, (0, 1, 2), (120, 120, 120))
    assert (lost.cause, lost.action) == ("injected: 5 NaN batches from step 120", "nothing: interventions off")


def test_recovery_says_what_was_done() -> None:
    recovered = {failure.formats: failure for failure in only(made_up_study(), "recovered")}
    assert recovered["float32", "bf16"].action == "in 3 runs: 15 steps skipped"
    assert recovered["E3M4",].action == "in 3 runs: 15 steps skipped, 3 open gates, 3 shifts from E3M4 to E5M2"
    assert recovered["E3M4",].cause == "injected: loss × 10,000 at step 60; 5 NaN batches from step 120"


def losing(step: int, **rates: float) -> Callable[[RunResult, dict[str, np.ndarray]], RunResult]:
    def change(run: RunResult, series: dict[str, np.ndarray]) -> RunResult:
        if run.format == "float32":
            return run
        series["loss"][step:] = np.nan
        for name, rate in rates.items():
            series[name][step - 1] = rate
        return dataclasses.replace(run, final_loss=math.nan)

    return change


@pytest.mark.parametrize(
    ("rates", "cause"),
    [
        ({"overflow_rate": 0.2, "worst_overflow_site": 12}, "gradient overflow, most at logits"),
        ({"operand_overflow_rate": 0.2}, "operand overflow"),
        ({}, "not finite, and no rate stands out"),
    ],
)
def test_causes_of_a_loss(rates: dict[str, float], cause: str) -> None:
    (lost,) = only(small("E2M5", variants=[CLEAN], change=losing(5, **rates)), "lost")
    assert (lost.steps, lost.cause, lost.action) == ((5, 5, 5), cause, "nothing: none in this scene")


@pytest.mark.parametrize(
    ("variant", "rates", "cause"),
    [
        (COMMITTED_NEAREST, {"stall_rate": 0.9}, "precision stall: 90% of updates are under half a quantum"),
        (COMMITTED_STOCHASTIC, {"stall_rate": 0.9}, "rounding noise: 90% of updates are under half a quantum"),
        (COMMITTED_NEAREST, {"stall_rate": 0.6, "saturation_rate": 0.5}, "saturation: 50% of updates stall at ±max"),
        (CLEAN, {"stall_rate": 0.9, "underflow_rate": 0.25}, "gradient underflow: 25% of non-zero elements"),
        (CLEAN, {"operand_underflow_rate": 0.25}, "operand underflow: 25% of non-zero elements"),
        (CLEAN, {"operand_overflow_rate": 0.02}, "overflow: 2.0% of elements"),
        (CLEAN, {}, "no rate stands out"),
    ],
)
def test_causes_of_falling_behind(variant: Variant, rates: dict[str, float], cause: str) -> None:
    def change(run: RunResult, series: dict[str, np.ndarray]) -> RunResult:
        for name in (
            "stall_rate",
            "underflow_rate",
            "operand_underflow_rate",
            "overflow_rate",
            "operand_overflow_rate",
        ):
            series[name][:] = rates.get(name, 0.0)
        series["saturation_rate"][:] = rates.get("saturation_rate", 0.0)
        slow = run.format != "float32" and Variant.of(run) == variant
        series["loss"][:] = np.where(np.arange(20) < 10, 3.5, 3.0 if slow else 2.0)
        return dataclasses.replace(run, final_loss=3.0 if slow else 2.0)

    variants = [CLEAN] if variant == CLEAN else [CLEAN, variant]
    (behind,) = only(small("E2M5", steps=20, variants=variants, change=change), "behind")
    assert (behind.steps, behind.cause) == ((10, 10, 10), cause)


def test_a_run_that_never_trains_has_no_step() -> None:
    (flat,) = only(small("E2M5", variants=[CLEAN], change=ending({("E2M5", CLEAN): [3.3, 3.4, 2.2]})), "untrained")
    assert (flat.seeds, flat.steps) == ((0, 1), (None, None))


def test_a_passing_nan_without_a_fault_is_reported() -> None:
    def change(run: RunResult, series: dict[str, np.ndarray]) -> RunResult:
        if run.format != "float32":
            series["norm"][3] = np.inf
        return run

    (hit,) = only(small("bf16", variants=[CLEAN], change=change), "recovered")
    assert (hit.formats, hit.steps) == (("bf16",), (3, 3, 3))


def test_other_faults_in_words() -> None:
    events = [Event(3, "fault", "weight", {"value": math.nan}), Event(5, "fault", "weight", {"value": 1e4})]
    words = failures.describe_faults(
        [*events, Event(6, "skip", "nan"), Event(7, "fault", "nan"), Event(9, "fault", "x")]
    )
    assert words == (
        "a weight set to NaN at step 3",
        "a weight set to 10,000 at step 5",
        "NaN batch at step 7",
        "x at step 9",
    )


# --- sentences


def answers(study: Study) -> dict[str, str]:
    found = findings.findings(findings.Facts.of(study))
    return {finding.topic: " ".join((finding.answer, *finding.details)) for finding in found}


def test_the_first_screen_answers() -> None:
    told = answers(made_up_study())
    assert list(told) == ["Which train", "Which fail", "Where", "When", "Interventions"]
    assert "all five 8-bit formats train" in told["Which train"]
    assert "E7M0 fails (3 of 3 runs untrained)" in told["Which fail"]
    assert told["Where"].startswith("In the update of stored weights: all five 8-bit formats.")
    assert "all seven formats are lost at step 120 (5 NaN batches from step 120)" in told["When"]
    assert told["Interventions"].startswith(
        "Of 21 runs that fail under stress without them, they save 21 (all seven formats)."
    )
    assert "The clipper’s gate never opens for E7M0." in told["Interventions"]
    assert re.search(
        "alone, float32 and bf16 survive too and end .*: no need for clipping or shifting is", told["Interventions"]
    )
    assert "E0M7 and E1M6 as E3M4; E3M4 and E7M0 as E5M2" in told["Interventions"]


def test_the_sentences_follow_the_numbers() -> None:
    losses = {
        ("float32", CLEAN): [2.0, 2.1, 2.2],
        ("float32", STRESS_OFF): [2.0, 2.1, 2.2],
        ("float32", STRESS_ON): [2.0, 2.1, 2.2],
        ("E3M4", CLEAN): [NAN, 2.1, 2.2],
        ("E5M2", CLEAN): [1.9, 2.001, 2.1],
        ("E3M4", STRESS_OFF): [2.0, 2.1, 2.2],
        ("E3M4", STRESS_ON): [2.5, 2.6, 2.71],
        ("E5M2", STRESS_OFF): [2.5, 2.6, 2.71],
        ("E5M2", STRESS_ON): [2.0, 2.1, 2.2],
    }
    told = answers(small("E3M4", "E5M2", variants=[CLEAN, STRESS_OFF, STRESS_ON], change=ending(losses)))
    assert "E3M4 fails (1 of 3 runs not finite); E5M2 trains, −0.10 nats/char from float32" in told["Which train"]
    assert "Measurably below it: E5M2" in told["Which train"]
    assert told["Which fail"] == "Undisturbed, E3M4 fails."
    assert "They help E5M2" in told["Interventions"]
    assert "They harm E3M4 (+0.50 ± 0.01 nats on against off, nothing acted)" in told["Interventions"]
    assert "They do nothing for float32 (0.00 ± 0.00 nats on against off, nothing acted)" in told["Interventions"]
    assert "skipping and rollback alone" not in told["Interventions"]


@pytest.mark.parametrize(
    ("on", "said"),
    [
        ([2.5, 2.6, 2.7], "alone, float32 survives too, but ends +0.50."),
        ([2.0, NAN, 2.2], "alone, float32 still fails in 1 of 3 runs."),
    ],
)
def test_what_skipping_alone_cannot_do_is_said(on: list[float], said: str) -> None:
    losses = {
        ("float32", CLEAN): [2.0, 2.1, 2.2],
        ("float32", STRESS_OFF): [NAN, NAN, NAN],
        ("float32", STRESS_ON): on,
    }
    assert said in answers(small("E5M2", change=ending(losses)))["Interventions"]


def test_a_shift_that_no_fault_called_for_is_said() -> None:
    def change(run: RunResult, series: dict[str, np.ndarray]) -> RunResult:
        step = {"E1M6": SPIKE - 1, "E7M0": SPIKE}.get(run.format)
        if not run.interventions or step is None:
            return run
        shift = Event(step, "shift", "underflow", {"from": run.format, "to": "E2M5"})
        return dataclasses.replace(run, events=(shift, *run.events))

    study = made_up_study(change=change)
    early = {effect.format: effect.early_shifts for effect in analysis.effects(study) if effect.early_shifts}
    assert early == {"E1M6": ("underflow",)}
    said = "E1M6 shifts before the first fault (underflow): what that changes is in these numbers, too."
    assert said in answers(study)["Interventions"]
    assert "before the first fault" not in answers(made_up_study())["Interventions"]


def test_a_gate_that_opens_for_nothing_is_said() -> None:
    def change(run: RunResult, series: dict[str, np.ndarray]) -> RunResult:
        gates = [Event(step, "gate", "overflow", {"norm": 50.0}) for step in (3, 6)]
        shift = Event(4, "shift", "nan", {"from": run.format, "to": "E5M2"})
        on = run.interventions and run.format != "float32"
        events = (gates[0], shift, gates[1]) if run.format == "E6M1" else tuple(gates)
        return dataclasses.replace(run, events=events) if on else run

    study = small("E6M1", "E7M0", change=change)
    assert {effect.format: effect.idle_gates for effect in analysis.effects(study)} == {
        "float32": 0,
        "E6M1": 3,
        "E7M0": 6,
    }
    assert "The clipper’s gate opens for E7M0 but clips nothing" in answers(study)["Interventions"]
    without = dataclasses.replace(study, config={})
    assert not any(effect.idle_gates for effect in analysis.effects(without))


def test_a_control_that_fails_is_said_first() -> None:
    told = answers(small("E5M2", change=ending({("float32", CLEAN): [NAN] * 3})))
    assert told["Which train"].startswith("Not even float32 trains undisturbed")


def test_formats_that_share_a_reason_are_told_together() -> None:
    told = answers(made_up_study(("float32", "E3M4", "E5M2"), change=nothing_finite))
    assert "They do nothing for all three formats (fail with and without them)." in told["Interventions"]
    assert told["Where"] == "The runs do not tell for both 8-bit formats."
    assert answers(small("E5M2"))["Interventions"].count("nothing acted") == 1


def test_stochastic_rounding_that_does_not_help_is_said() -> None:
    losses = {("E5M2", COMMITTED_NEAREST): [2.3, 2.3, 2.3], ("E5M2", COMMITTED_STOCHASTIC): [2.4, 2.4, 2.4]}
    told = answers(small("E5M2", change=ending(losses)))
    assert "It is no better than rounding to nearest for E5M2." in told["Which fail"]


def test_noise_floor_of_two_names_for_one_grid() -> None:
    study = small("E0M7", "E1M6", variants=[CLEAN])
    assert "Take that as the noise floor" in findings.noise_sentence(study)
    same = {(name, CLEAN): [2.2, 2.3, 2.4] for name in ("E0M7", "E1M6")}
    study = small("E0M7", "E1M6", variants=[CLEAN], change=ending(same))
    assert "agree to the last digit" in findings.noise_sentence(study)
    assert "read any difference" in findings.noise_sentence(small("E0M7"))


# --- the page


VOID = {"meta", "br", "line", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Checks that tags balance, and keeps what a reader or a browser would look for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.fetched: list[str] = []
        self.scripts: list[str] = []
        self.images: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids += [given["id"]] if given.get("id") else []
        self.fetched += [given[name] or "" for name in ("src", "href", "srcset", "poster", "data") if name in given]
        if given.get("role") == "img":
            self.images.append(given.get("aria-label") or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif self.open and self.open[-1] != "style":
            self.text += data


def read(study: Study, folder: Path) -> tuple[Page, str]:
    path = write_report(study, folder)
    assert path == folder / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    markdown = (folder / "report.md").read_text(encoding="utf-8")
    for text in (page.text, markdown):
        assert not re.search(r"\b(nan|None|inf)\b(?!@)", text)
    assert len(page.ids) == len(set(page.ids))
    return page, markdown


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, str]:
    return read(made_up_study(), tmp_path_factory.mktemp("report"))


def test_the_page_needs_no_network(whole: tuple[Page, str]) -> None:
    page, _ = whole
    assert all(address.startswith("#") for address in page.fetched)
    assert {address[1:] for address in page.fetched} <= set(page.ids)
    assert not any("@import" in script or "import(" in script for script in page.scripts if len(script) < 10**6)


def test_plotly_is_there_once(whole: tuple[Page, str]) -> None:
    page, _ = whole
    assert sum(len(script) > 10**6 for script in page.scripts) == 1
    drawn = sum("Plotly.newPlot(" in script for script in page.scripts if len(script) < 10**6)
    assert drawn == len(page.images) == 18
    assert all(page.images)


def test_sections_come_in_order(whole: tuple[Page, str]) -> None:
    page, markdown = whole
    order = ["answer", "losses", "curves", "stress", "rates", "failures", "caveats", "setup"]
    assert [identity for identity in page.ids if identity in order] == order
    headings = re.findall(r"^## (.*)$", markdown, re.MULTILINE)
    assert headings[0] == "In short"
    assert headings[-1] == "How it was run"
    assert "altgrad study --size demo" in page.text
    assert "2 min 52 s" in page.text


def test_the_numbers_are_on_both(whole: tuple[Page, str]) -> None:
    page, markdown = whole
    final = fate(made_up_study(), COMMITTED_NEAREST, "E7M0")
    shown = f"+{final.to_float32.mean:.3f} ± {final.to_float32.half_width:.3f}"
    assert shown in page.text
    assert shown in markdown
    assert "not ml_dtypes.float8_e3m4" in page.text
    assert r"not ml\_dtypes.float8\_e3m4" in markdown


def check_tables(markdown: str) -> None:
    """Every row of a table has as many cells as its heading."""
    width = 0
    for line in markdown.splitlines():
        cells = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else 0
        assert not (width and cells) or cells == width, line
        width = cells


def test_markdown_tables_are_tables(whole: tuple[Page, str]) -> None:
    check_tables(whole[1])


PARTS = {
    "one seed": ({"seeds": [3]}, "n = 1"),
    "only clean": ({"variants": [CLEAN]}, "scenes not in this study"),
    "only stress with interventions": ({"variants": [STRESS_ON]}, "Not tested: no format was put under stress both"),
    "only committed": ({"variants": [COMMITTED_STOCHASTIC]}, "No 8-bit format was run undisturbed"),
    "no float32": ({"formats": ["E3M4", "E5M2"]}, "no float32 to compare to"),
    "only float32": ({"formats": ["float32"]}, "formats not in this study: bf16"),
    "all NaN": ({"change": nothing_finite}, "Not even float32 trains"),
    "one step": ({"steps": 1}, "1 step of 8 × 32"),
    "two steps": ({"steps": 2}, "2 steps of 8 × 32"),
}


@pytest.mark.parametrize(("given", "said"), PARTS.values(), ids=PARTS)
def test_partial_studies(tmp_path: Path, given: dict, said: str) -> None:
    page, markdown = read(made_up_study(**given), tmp_path)
    assert said in page.text
    assert said in markdown.replace("\\", "")
    check_tables(markdown)


def test_names_are_escaped(tmp_path: Path) -> None:
    nasty = '</script><script>alert("x")</script>|`_*[a](b)\n&<b>'
    study = made_up_study(("float32", nasty), steps=STEPS)
    study = dataclasses.replace(
        study,
        config={**study.config, nasty: nasty, "command": f"altgrad study `{nasty}`"},
        environment={nasty: nasty},
        sites=tuple(f"{nasty}{site}" for site in study.sites),
    )
    page, markdown = read(study, tmp_path)
    assert not any("alert(" in script and "Plotly" not in script for script in page.scripts)
    assert nasty.replace("\n", " ") in " ".join(page.text.split("\n"))
    assert "<script" not in re.sub(r"\\<|```.*?```", "", markdown, flags=re.DOTALL)
    check_tables(re.sub(r"```.*?```", "", markdown, flags=re.DOTALL))


def test_formats_are_told_apart() -> None:
    study = made_up_study((*FORMATS, "E2M5", "E4M3", "E6M1", "fp16", "bfloat16"), steps=2)
    styles = [figures.style_of(study, name) for name in analysis.formats_of(study)]
    assert len(set(styles)) == len(styles)


def test_lost_runs_are_marked_where_they_end() -> None:
    group = figures.stress_group(made_up_study())
    assert group is not None
    off = group.panels[0].figure
    ends = [trace for trace in off.data if trace.hovertemplate and "lost after" in trace.hovertemplate]
    assert len(ends) == len(FORMATS)
    assert all(tuple(trace.x) == (119,) for trace in ends)
    events = [trace for trace in group.panels[2].figure.data if "shift" in trace.text[0]]
    assert len(events[0].x) == 3 * len(FALLBACK)


def test_the_figures_show_the_series() -> None:
    study = made_up_study(("float32", "E5M2"))
    group = figures.rate_group(study)
    assert group is not None
    stall = next(panel for panel in group.panels if panel.id == "stall-rate-variant1")
    line = next(trace for trace in stall.figure.data if trace.name == "E5M2")
    assert np.mean(line.y) == pytest.approx(analysis.mean_rates(study, COMMITTED_NEAREST, "E5M2").stall, rel=1e-3)

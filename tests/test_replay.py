"""``altgrad replay`` on real runs: every decision follows from the log, and what does not is found."""

from __future__ import annotations

import io
import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from altgrad.cli import main
from altgrad.replay import ReplayConfig, ReplayError, replay, replay_run
from altgrad.train import TrainConfig, train
from altgrad_jax.job import Job, StepReport

_STEPS, _DIES_AT = 140, 123
# Stalls of committed weights, NaN batches that shift and then exhaust, a poisoned weight; stopped amid NaN batches.
_RUN = {
    "batch": 4,
    "context": 8,
    "layers": 1,
    "width": 16,
    "heads": 2,
    "steps": _STEPS,
    "checkpoint_every": 20,
    "format": "E2M5",
    "storage": "committed",
    "shift": True,
    "recover_after": 12,
    "inject": ("nan@82:3", "weight@110:nan", "nan@120:7"),
}


def _quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def _dying(at: int) -> Callable[[Job], StepReport | None]:
    advance = Job.advance

    def dies(job: Job) -> StepReport | None:
        if job.step == at:
            raise KeyboardInterrupt
        return advance(job)

    return dies


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run that was stopped and resumed; beside it, as ``cut_off``, what there was when it stopped."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Job, "advance", _dying(_DIES_AT))
        with pytest.raises(KeyboardInterrupt):
            train(TrainConfig(out=out, **_RUN), _quiet())
    shutil.copytree(out, out.with_name("cut_off"), ignore=shutil.ignore_patterns("checkpoints"))
    assert train(TrainConfig(out=out, resume=True, **_RUN), _quiet()) is not None
    return out


@pytest.fixture(scope="module")
def layered(finished) -> Path:
    """A run whose layers shift apart, stopped between two such shifts and resumed."""
    out = finished.with_name("layered")
    settings: dict[str, Any] = {
        **_RUN,
        "format": "E0M7",
        "storage": "master",
        "per_layer": True,
        "recover_after": None,
        "steps": 60,
        "inject": ("nan@50:3",),
    }
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Job, "advance", _dying(45))
        with pytest.raises(KeyboardInterrupt):
            train(TrainConfig(out=out, **settings), _quiet())
    assert train(TrainConfig(out=out, resume=True, **settings), _quiet()) is not None
    return out


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    return tmp_path / "run"


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _rewrite(path: Path, change: Callable[[list[dict[str, Any]]], object]) -> None:
    lines = _lines(path)
    change(lines)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _command(monkeypatch, capsys, *arguments: str) -> tuple[object, str]:
    """Exit code and what was printed, to stderr where it could not run."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=1")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["altgrad", "replay", *arguments])
    try:
        main()
        code: object = 0
    except SystemExit as stopped:
        code = stopped.code
    said = capsys.readouterr()
    return code, said.err if code == 2 else said.out


def test_every_decision_follows_from_the_log(finished, monkeypatch, capsys):
    assert json.loads((finished / "config.json").read_text())["policy"] == "by_cause", "the default"
    found = replay_run(finished)
    assert found.difference is None
    assert found.steps == _STEPS
    assert [event.to_json() for event in found.decisions] == [event.to_json() for event in found.logged]
    decided = {(event.kind, event.cause) for event in found.decisions}
    assert decided >= {("rounding", "stall"), ("shift", "stall"), ("shift", "nan"), ("exhausted", "nan")}
    assert decided >= {("rollback", "poisoned weights"), ("rollback", "nan")}
    code, printed = _command(monkeypatch, capsys, str(finished))
    assert code == 0
    assert f"{len(found.decisions)} decisions in 140 steps: all agree with the log" in printed
    assert "differs" not in printed


def test_decisions_on_layers_follow_from_the_log(layered):
    found = replay_run(layered)
    assert (found.difference, found.steps) == (None, 60)
    shifts = [(event.step, event.numbers["layer"]) for event in found.decisions if event.kind == "shift"]
    last = _lines(layered / "metrics.jsonl")[-1]["layer_formats"]
    assert json.loads((layered / "result.json").read_text())["final_layer_formats"] == last
    assert 0 < len({layer for step, layer in shifts if step < 45}) < len(last), "by rates, some and not all"
    assert {layer for step, layer in shifts if step == 52} == set(last), "by NaN batches, all"
    assert "E0M7" not in last.values()
    moved = min(last)

    def claim(lines: list[dict[str, Any]]) -> None:
        lines[-1]["layer_formats"][moved] = "E7M0"

    shutil.copytree(layered, layered.with_name("claimed"), ignore=shutil.ignore_patterns("checkpoints"))
    _rewrite(layered.with_name("claimed") / "metrics.jsonl", claim)
    difference = replay_run(layered.with_name("claimed")).difference
    assert difference is not None
    assert f"{moved}:E7M0" in str(difference)


def test_any_event_that_is_missing_is_named(finished, copied, monkeypatch, capsys):
    decisions = [event for event in _lines(copied / "events.jsonl") if event["kind"] not in ("fault", "skip", "gate")]
    for event in decisions:
        shutil.copy(finished / "events.jsonl", copied)
        _rewrite(copied / "events.jsonl", lambda lines, gone=event: lines.remove(gone))
        difference = replay_run(copied).difference
        assert difference is not None
        assert difference.step == event["step"]
        assert difference.logged is None or json.loads(difference.logged)["step"] == event["step"]
        assert json.loads(difference.derived or "") == event
    code, printed = _command(monkeypatch, capsys, str(copied))
    assert code == 1
    assert f"the log differs. First at step {decisions[-1]['step']}: the log says nothing, the replay {{" in printed


def test_an_event_that_nothing_called_for(copied, capsys, monkeypatch):
    extra = {"step": 2, "kind": "shift", "cause": "nan", "consecutive_nans": 3, "from": "E2M5", "to": "E3M4"}
    _rewrite(copied / "events.jsonl", lambda lines: lines.insert(0, extra))
    difference = replay_run(copied).difference
    assert difference is not None
    assert (difference.step, difference.derived) == (2, None)
    code, printed = _command(monkeypatch, capsys, str(copied))
    assert code == 1
    assert "only in the log" in printed


def _shift(lines: list[dict[str, Any]]) -> dict[str, Any]:
    return next(line for line in lines if line["kind"] == "shift")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("events.jsonl", lambda lines: _shift(lines).update(to="E5M2")),
        ("events.jsonl", lambda lines: _shift(lines).update(cause="nan")),
        ("events.jsonl", lambda lines: _shift(lines).update(step=_shift(lines)["step"] - 1)),
        ("metrics.jsonl", lambda lines: lines[83].update(finite=True, loss=3.0)),
        ("metrics.jsonl", lambda lines: lines[20].update(format="E5M2")),
        ("metrics.jsonl", lambda lines: lines[20].update(params_finite=False)),
    ],
    ids=["target", "cause", "step", "a NaN less", "format", "poisoned"],
)
def test_what_was_changed_is_found(copied, name, change):
    _rewrite(copied / name, change)
    assert replay(ReplayConfig(copied), _quiet()) is False


def test_a_number_changed_in_its_last_bit_is_found(copied):
    def nudge(lines: list[dict[str, Any]]) -> None:
        event, name = next(
            (line, name) for line in lines for name in line if name.endswith("_rate") and line["kind"] == "rounding"
        )
        event[name] = math.nextafter(event[name], 2.0)

    _rewrite(copied / "events.jsonl", nudge)
    assert replay_run(copied).difference is not None


def test_a_run_that_was_cut_off(finished):
    """It goes on from the checkpoint at 120: its log ends where the decision on step 122 was still to be made."""
    cut_off, whole = replay_run(finished.with_name("cut_off")), replay_run(finished)
    assert (cut_off.difference, cut_off.steps) == (None, _DIES_AT - 1)
    before = [event.to_json() for event in whole.decisions if event.step < cut_off.steps]
    assert [event.to_json() for event in cut_off.decisions] == before
    assert len(before) < len(whole.decisions)


def test_a_run_killed_while_it_logged(copied):
    """The last line is torn, and the events of a step whose numbers were not written are there already."""
    steps, events = ((copied / name).read_text().splitlines() for name in ("metrics.jsonl", "events.jsonl"))
    last = max(json.loads(line)["step"] for line in events if json.loads(line)["kind"] == "shift")
    (copied / "result.json").unlink()
    (copied / "metrics.jsonl").write_text("\n".join([*steps[:last], steps[last][:40]]))
    (copied / "events.jsonl").write_text("\n".join([*events, events[-1][:20]]))
    found = replay_run(copied)
    assert found.difference is None
    assert found.steps == last
    (copied / "result.json").write_text("{}")
    assert replay_run(copied).difference is not None, "a run that came to its end has logged all of its steps"


@pytest.mark.parametrize(
    ("break_it", "expected"),
    [
        (lambda run: shutil.rmtree(run), "holds no run"),
        (lambda run: (run / "config.json").unlink(), "config.json is missing"),
        (lambda run: (run / "metrics.jsonl").unlink(), "metrics.jsonl is missing"),
        (lambda run: (run / "events.jsonl").unlink(), "events.jsonl is missing"),
        (lambda run: (run / "config.json").write_text("{"), "does not tell what was run"),
        (lambda run: (run / "config.json").write_text("[]"), "does not tell what was run"),
        (lambda run: (run / "config.json").write_text('{"polcy": "off", "inject": []}'), "polcy"),
        (lambda run: _rewrite(run / "metrics.jsonl", lambda lines: lines.pop(7)), "has step 8 where 7 was expected"),
        (lambda run: _rewrite(run / "metrics.jsonl", lambda lines: lines[7].pop("loss")), "not the numbers of a step"),
        (lambda run: _rewrite(run / "events.jsonl", lambda lines: lines[0].pop("kind")), "not an event"),
    ],
)
def test_a_folder_that_is_no_run(copied, monkeypatch, capsys, break_it, expected):
    break_it(copied)
    with pytest.raises(ReplayError, match=expected):
        replay_run(copied)
    code, told = _command(monkeypatch, capsys, str(copied))
    assert code == 2
    assert told.startswith("altgrad: ")
    assert expected in told
    assert str(copied) in told


def test_help_needs_no_framework(monkeypatch, capsys):
    loaded = set(sys.modules)
    for name in [each for each in loaded if each.partition(".")[0] == "altgrad"]:
        monkeypatch.delitem(sys.modules, name)
    code, printed = _command(monkeypatch, capsys, "--help")
    assert code == 0
    assert "Folder of the run" in printed
    assert "altgrad.train" not in sys.modules

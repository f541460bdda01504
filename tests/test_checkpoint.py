"""Interrupted and resumed is never interrupted: the same bits in every file, whatever stopped the run and where.

Run as a module it is one of two processes that share a checkpoint.
"""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console

from altgrad.replay import replay_run
from altgrad.runfiles import LineFile, RunFiles, UnwrittenError
from altgrad.train import RunError, TrainConfig, train
from altgrad_jax import checkpoint as checkpoint_module
from altgrad_jax.checkpoint import CheckpointError, Checkpoints, UnsavedError
from altgrad_jax.data import load_corpus
from altgrad_jax.job import Job, StepReport
from tests.processes import results_of, write_result

_ROOT = Path(__file__).parents[1]
_SMALL = {"batch": 4, "context": 8, "layers": 1, "width": 16, "heads": 2, "steps": 40, "checkpoint_every": 12}
# NaN batches around the checkpoints at 12 and 24, so that a count of two and metrics in flight have to survive.
_RUN = {**_SMALL, "format": "E7M0", "clip": True, "shift": True, "inject": ("nan@10:2", "nan@22:4", "spike@30:1e4")}
_FILES = ("metrics.jsonl", "events.jsonl", "result.json")


def _quiet() -> Console:
    return Console(file=io.StringIO())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert train(TrainConfig(out=out, **_RUN), _quiet()) is not None
    return out


def _arguments(out: Path, *more: str) -> list[str]:
    options: list[str] = []
    for name, value in _RUN.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            options.append(flag)
        else:
            options += [flag, *(value if isinstance(value, tuple) else (str(value),))]
    return [sys.executable, "-c", "from altgrad.cli import main; main()", "train", "--out", str(out), *options, *more]


# One device, as in this process: the bits of a run may depend on how its devices share the threads.
_ENVIRONMENT = {**os.environ, "PYTHONPATH": str(_ROOT), "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}


def _interrupt(out: Path, number: signal.Signals, after_step: int) -> int:
    """Start the run, wait until it has logged a step, send a signal, and return the exit code."""
    with subprocess.Popen(
        _arguments(out), env=_ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        log = out / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not (log.exists() and len(log.read_text().splitlines()) > after_step):
            assert process.poll() is None, "the run ended before it could be interrupted"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(number)
        return process.wait(120)


@pytest.mark.parametrize(
    ("number", "after_step", "code"),
    [
        pytest.param(signal.SIGINT, 10, 130, marks=pytest.mark.exhaustive),
        pytest.param(signal.SIGTERM, 23, 130, marks=pytest.mark.exhaustive),
        (signal.SIGKILL, 26, -signal.SIGKILL),
    ],
)
def test_interrupted_and_resumed_is_never_interrupted(tmp_path, undisturbed, number, after_step, code):
    out = tmp_path / "run"
    assert _interrupt(out, number, after_step) == code
    assert not (out / "result.json").exists()
    train(TrainConfig(out=out, resume=True, **_RUN), _quiet())
    for name in _FILES:
        assert (out / name).read_text() == (undisturbed / name).read_text(), name
    last = max(int(path.name) for path in (out / "checkpoints").iterdir())
    assert last == _RUN["steps"]


def test_the_undisturbed_run_shows_what_the_test_needs(undisturbed):
    events = [json.loads(line) for line in (undisturbed / "events.jsonl").read_text().splitlines()]
    kinds = [(event["step"], event["kind"]) for event in events]
    assert (24, "shift") in kinds
    assert [step for step, kind in kinds if kind == "skip"] == [10, 11, 22, 23, 24, 25]
    steps = [json.loads(line)["step"] for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(_RUN["steps"]))


def test_resuming_a_finished_run_changes_nothing(tmp_path, undisturbed):
    before = {name: (undisturbed / name).read_text() for name in _FILES}
    train(TrainConfig(out=undisturbed, resume=True, **_RUN), _quiet())
    assert {name: (undisturbed / name).read_text() for name in _FILES} == before


@pytest.mark.parametrize(
    ("change", "named"),
    [({"format": "E5M2"}, "format is 'E7M0' there, 'E5M2' here"), ({"width": 32}, "width"), ({"seed": 1}, "seed")],
)
def test_another_run_is_refused(undisturbed, change, named):
    before = (undisturbed / "metrics.jsonl").read_text()
    with pytest.raises(CheckpointError, match=named):
        train(TrainConfig(out=undisturbed, resume=True, **{**_RUN, **change}), _quiet())
    assert (undisturbed / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("damaged", ["host/metadata", "arrays", "host"])
def test_a_damaged_checkpoint_is_told_and_the_one_before_it_serves(tmp_path, undisturbed, damaged):
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    newest = out / "checkpoints" / str(_RUN["steps"])
    for path in [newest / damaged, *(newest / damaged).rglob("*")]:
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    if damaged in ("arrays", "host"):
        shutil.rmtree(newest / damaged)
    with pytest.raises(CheckpointError, match=rf"{newest} is damaged.*remove that folder"):
        train(TrainConfig(out=out, resume=True, **_RUN), _quiet())
    if damaged != "host":
        return  # going on once is enough
    shutil.rmtree(newest)
    train(TrainConfig(out=out, resume=True, **_RUN), _quiet())
    for name in _FILES:
        assert (out / name).read_text() == (undisturbed / name).read_text(), name


def test_damage_is_told_on_one_line_and_nothing_else_is(tmp_path, undisturbed):
    """In a process of its own: Orbax would read on in threads, which say what they meet when the process ends."""
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    newest = out / "checkpoints" / str(_RUN["steps"])
    (newest / "arrays" / "array_metadatas" / "process_0").write_bytes(b"")
    done = subprocess.run(
        _arguments(out, "--resume"), env=_ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2
    (told,) = done.stderr.splitlines()
    assert told.startswith(f"altgrad: the checkpoint {newest} is damaged: its arrays/array_metadatas/process_0 is not")


def test_a_damaged_config_is_told(tmp_path):
    (tmp_path / "config.json").write_text('{"format": "E7')
    with pytest.raises(RunError, match=r"config\.json is damaged"):
        train(TrainConfig(out=tmp_path, resume=True, **_RUN), _quiet())


def test_other_data_is_refused(tmp_path, undisturbed):
    text = tmp_path / "other.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 50)
    with pytest.raises(CheckpointError, match="data_sha256"):
        train(TrainConfig(out=undisturbed, resume=True, data=text, **_RUN), _quiet())


def _job(config: TrainConfig) -> Job:
    corpus = load_corpus(None, config.context)
    return Job(config.program(len(corpus.vocabulary)), [config.plan()], corpus, batch=config.batch)


def test_a_checkpoint_of_another_model_is_refused_by_itself(tmp_path):
    config = TrainConfig(out=tmp_path, **_SMALL)
    job = _job(config)
    with Checkpoints(tmp_path / "checkpoints", {"format": "E5M2"}) as checkpoints:
        checkpoints.save(job)
    with (
        Checkpoints(tmp_path / "checkpoints", {"format": "E3M4"}) as checkpoints,
        pytest.raises(CheckpointError, match="format is 'E5M2' there, 'E3M4' here"),
    ):
        checkpoints.restore(job)


def test_no_checkpoint_is_an_error_of_restore(tmp_path):
    with Checkpoints(tmp_path / "none", {}) as checkpoints, pytest.raises(CheckpointError, match="no checkpoint"):
        checkpoints.restore(_job(TrainConfig(**_SMALL)))


def test_nothing_is_unpickled_and_every_bit_comes_back(tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something was unpickled")

    config = TrainConfig(out=tmp_path, **_SMALL)
    job = _job(config)
    for _ in range(3):
        job.advance()
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    with Checkpoints(tmp_path / "checkpoints", {}) as checkpoints:
        checkpoints.save(job)
    other = _job(config)
    with Checkpoints(tmp_path / "checkpoints", {}) as checkpoints:
        assert checkpoints.restore(other) == 3
    for ours, theirs in zip(
        jax.tree.leaves((job.state, job.snapshots)), jax.tree.leaves((other.state, other.snapshots)), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs), strict=True)
    assert other.saved() == job.saved()


def test_a_resume_without_a_run_is_refused(tmp_path):
    with pytest.raises(RunError, match="holds no run to resume"):
        train(TrainConfig(out=tmp_path / "none", resume=True, **_SMALL), _quiet())


# ---- damage


@dataclass
class _Held:
    """What stands for a job: arrays, and no program to compile."""

    state: Any
    step: int = 0
    snapshots: Any = ()
    restored: Any = None

    def saved(self) -> dict[str, Any]:
        return {"step": self.step}

    def restore(self, saved: Mapping[str, Any], state: Any, snapshots: Any) -> None:
        self.restored = saved, state, snapshots


def _held(step: int = 0) -> Any:
    """Arrays of more than a page: bits that cannot be compressed, those of NaNs among them, and others that can."""
    bits = np.random.default_rng(step).integers(0, 2**32, (3, 1024), np.uint32)
    return _Held({"a": jax.numpy.asarray(bits.view(np.float32)), "b": jax.numpy.arange(5000) > 17 + step}, step)


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    with Checkpoints(folder, {}) as checkpoints:
        for step in (0, 1):
            checkpoints.save(_held(step))
    return folder


def _zeroed_pages(raw: bytes) -> list[bytes]:
    last = (len(raw) - 1) // 4096
    offsets = [4096 * page for page in sorted({0, last // 3, last // 2, last})]
    return [raw[:at] + bytes(min(4096, len(raw) - at)) + raw[at + 4096 :] for at in offsets]


def _flipped_bits(raw: bytes) -> list[bytes]:
    places = sorted({0, len(raw) // 3, 2 * len(raw) // 3, len(raw) - 1})
    return [raw[:at] + bytes([raw[at] ^ 1 << at % 8]) + raw[at + 1 :] for at in places]


_DAMAGES: dict[str, Callable[[bytes], list[bytes | None]]] = {
    "zeroed page": lambda raw: [*_zeroed_pages(raw)],
    "flipped bit": lambda raw: [*_flipped_bits(raw)],
    "truncated": lambda raw: [raw[: len(raw) // 2]],
    "emptied": lambda raw: [b""],
    "removed": lambda raw: [None],
}


def _write(path: Path, raw: bytes | None) -> None:
    if raw is None:
        path.unlink()
    else:
        path.write_bytes(raw)


@pytest.mark.parametrize("damage", _DAMAGES)
def test_damage_of_any_file_is_told_before_anything_is_used(tmp_path, two_saved, capfd, damage):
    folder, job = tmp_path / "checkpoints", _held()
    shutil.copytree(two_saved, folder)
    for path in [path for path in (folder / "1").rglob("*") if path.is_file()]:
        whole = path.read_bytes()
        for changed in _DAMAGES[damage](whole):
            _write(path, changed)
            with Checkpoints(folder, {}) as checkpoints:
                assert checkpoints.latest_step == 1
                with pytest.raises(CheckpointError, match=rf"{folder / '1'} is damaged: its .*; remove that folder to"):
                    checkpoints.restore(job)
        path.write_bytes(whole)
    assert job.restored is None
    assert capfd.readouterr().err == ""


def test_a_file_that_was_not_saved_is_told(tmp_path, two_saved):
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_saved, folder)
    metadata = folder / "1" / "arrays" / "array_metadatas"
    shutil.copy(metadata / "process_0", metadata / "process_1")
    with Checkpoints(folder, {}) as checkpoints, pytest.raises(CheckpointError, match="process_1 is not the one"):
        checkpoints.restore(_held())


def test_one_that_is_whole_comes_back_and_so_does_the_one_before_it(tmp_path, two_saved):
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_saved, folder)
    for step in (1, 0):
        job, expected = _held(), _held(step)
        with Checkpoints(folder, {}) as checkpoints:
            assert checkpoints.restore(job) == step
        saved, state, _ = job.restored
        assert saved == {"step": step}
        for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(expected.state), strict=True):
            assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()
        shutil.rmtree(folder / str(step))


def test_a_checkpoint_that_is_being_written_is_waited_for(tmp_path):
    job = _held(3)
    with Checkpoints(tmp_path, {}) as checkpoints:
        checkpoints.save(job)
        assert checkpoints.restore(job) == 3


def test_sums_are_made_in_the_background_and_there_is_no_checkpoint_without_them(tmp_path, monkeypatch):
    folder, killed = tmp_path / "checkpoints", tmp_path / "killed"
    write_sums, begun, go_on = checkpoint_module._write_sums, threading.Event(), threading.Event()

    def slowly(whole: Path) -> None:
        begun.set()
        assert go_on.wait(60)
        write_sums(whole)

    with Checkpoints(folder, {}) as checkpoints:
        checkpoints.save(_held(0))
        checkpoints.wait()
        monkeypatch.setattr(checkpoint_module, "_write_sums", slowly)
        checkpoints.save(_held(1))
        assert begun.wait(60)
        shutil.copytree(folder, killed)  # what there is if the process is killed now
        go_on.set()
    assert sorted(path.name for path in folder.iterdir()) == ["0", "1"]
    with Checkpoints(killed, {}) as checkpoints:
        assert checkpoints.restore(_held()) == 0
    assert [path.name for path in killed.iterdir()] == ["0"]


def test_sums_that_cannot_be_written_are_told_and_the_one_before_serves(tmp_path, monkeypatch):
    def full(whole: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Checkpoints(tmp_path, {}) as checkpoints:
        checkpoints.save(_held(0))
        checkpoints.wait()
        monkeypatch.setattr(checkpoint_module, "_write_sums", full)
        checkpoints.save(_held(1))
        with pytest.raises(UnsavedError, match=r"last checkpoint could not be written .*No space left on device"):
            checkpoints.wait()
        assert [path.name for path in tmp_path.iterdir()] == ["0"]
        assert checkpoints.restore(_held()) == 0


def test_processes_share_a_checkpoint_and_each_is_told_of_damage(tmp_path):
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=1", "SHARED": str(tmp_path)}
    for found in results_of("tests.test_checkpoint", 2, environment=environment):
        assert found["same"] is True
        assert "ocdbt.process_1" in found["told"]


def _main(rank: int, count: int, port: int, file: str) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        f"127.0.0.1:{port}", count, rank, heartbeat_timeout_seconds=20, shutdown_timeout_seconds=5
    )
    folder = Path(os.environ["SHARED"]) / "checkpoints"
    sharding = NamedSharding(Mesh(np.array(jax.devices()), ("x",)), PartitionSpec("x"))
    whole = np.random.default_rng(0).normal(size=(count, 4096)).astype(np.float32)
    job: Any = _Held(jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index]))
    with Checkpoints(folder, {}) as checkpoints:
        checkpoints.save(job)
        checkpoints.restore(job)
    (part,) = job.restored[1].addressable_shards
    multihost_utils.sync_global_devices("restored")
    if rank == 0:
        path = next((folder / "0" / "arrays" / "ocdbt.process_1" / "d").iterdir())
        path.write_bytes(_flipped_bits(path.read_bytes())[1])
    multihost_utils.sync_global_devices("damaged")
    with Checkpoints(folder, {}) as checkpoints, pytest.raises(CheckpointError) as told:
        checkpoints.restore(job)
    write_result(file, {"same": np.array_equal(part.data, whole[part.index]), "told": str(told.value)})
    jax.distributed.shutdown()
    os._exit(0)  # what gloo does on the way down is not under test


# ---- a full disk


class _Disk:
    """Fills up at a step and may have room again at another: no file can grow beyond a size meanwhile."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, full_from: int, until: int | None = None) -> None:
        self._hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        log = RunFiles.log

        def logged(files: RunFiles, report: StepReport) -> object:
            if report.step == full_from:
                files._checkpoints.wait()  # so that it does not matter how fast that is
                self.fill(2000)
            if report.step == until:
                self.clear()
            return log(files, report)

        monkeypatch.setattr(RunFiles, "log", logged)

    def fill(self, size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, self._hard))

    def clear(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (self._hard, self._hard))


def _same_files(out: Path, undisturbed: Path) -> None:
    for name in _FILES:
        assert (out / name).read_text() == (undisturbed / name).read_text(), name
    assert replay_run(out).difference is None


def _telling() -> Console:
    return Console(file=io.StringIO(), width=500)


def test_a_disk_that_is_full_for_a_while_costs_nothing(tmp_path, undisturbed, monkeypatch):
    out, console = tmp_path / "run", _telling()
    disk = _Disk(monkeypatch, full_from=9, until=29)
    try:
        train(TrainConfig(out=out, **_RUN), console)
    finally:
        disk.clear()
    _same_files(out, undisturbed)
    told = console.file.getvalue()
    for once in ("metrics.jsonl (File too large)", "logs can be written again", "step 12 could not be written"):
        assert told.count(once) == 1, told
    assert "checkpoints can be written again" in told
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["36", "40"]


def test_a_disk_that_stays_full_is_an_error_at_the_end_and_a_resumed_run_is_whole(tmp_path, undisturbed, monkeypatch):
    out, console = tmp_path / "run", _telling()
    disk = _Disk(monkeypatch, full_from=20)
    try:
        with pytest.raises(UnwrittenError) as raised:
            train(TrainConfig(out=out, **_RUN), console)
    finally:
        disk.clear()
    for part in (f"lines of {out / 'metrics.jsonl'} could not be written", "checkpoint of step 40", "--resume --out"):
        assert part in str(raised.value)
    assert not (out / "result.json").exists()
    assert replay_run(out).difference is None  # what there is of the logs agrees
    monkeypatch.undo()
    train(TrainConfig(out=out, resume=True, **_RUN), console)
    assert "resuming at step 12" in console.file.getvalue()
    _same_files(out, undisturbed)


def test_a_checkpoint_holds_the_lines_that_were_waiting(tmp_path, undisturbed, monkeypatch):
    """One log alone cannot be written, so that the last checkpoint is ahead of it."""
    out, console = tmp_path / "run", _telling()
    flush = LineFile.flush

    def failing(file: LineFile) -> bool:
        if file.path.name == "events.jsonl" and any('"step": 10,' in line for line in file.state["unwritten"]):
            file.trouble = OSError(errno.ENOSPC, "No space left on device")
            return False
        return flush(file)

    monkeypatch.setattr(LineFile, "flush", failing)
    with pytest.raises(UnwrittenError, match=r"30 lines of .*metrics\.jsonl could not be written; \d+ lines of .*eve"):
        train(TrainConfig(out=out, **_RUN), console)
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(10))  # no step without all of its events
    monkeypatch.undo()
    train(TrainConfig(out=out, resume=True, **_RUN), console)
    assert "resuming at step 40" in console.file.getvalue()
    _same_files(out, undisturbed)


def test_a_checkpoint_without_room_leaves_the_last_good_one(tmp_path, monkeypatch):
    job, disk = _job(TrainConfig(out=tmp_path, **_SMALL)), _Disk(monkeypatch, full_from=0)
    with Checkpoints(tmp_path / "checkpoints", {}) as checkpoints:
        checkpoints.save(job, {"kept": 1})
        checkpoints.wait()
        job.step += 1
        disk.fill(4000)
        try:
            with pytest.raises(UnsavedError, match=r"step 1 could not be written to .* \(File too large\)"):
                checkpoints.save(job)
        finally:
            disk.clear()
        assert checkpoints.latest_step == 0
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["0"]
        assert checkpoints.restore(job) == 0
        assert checkpoints.notes == {"kept": 1}


def test_a_checkpoint_that_fails_in_the_background_is_told_and_taken_away(tmp_path, monkeypatch):
    job, folder = _job(TrainConfig(out=tmp_path, **_SMALL)), tmp_path / "checkpoints"

    def failed() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Checkpoints(folder, {}) as checkpoints:
        (folder / "0.orbax-checkpoint-tmp").mkdir()  # as a save that fails leaves it
        monkeypatch.setattr(checkpoints._manager, "wait_until_finished", failed)
        with pytest.raises(
            UnsavedError, match=r"last checkpoint could not be written to .* \(No space left on device\)"
        ):
            checkpoints.wait()
        monkeypatch.setattr(checkpoints._manager, "wait_until_finished", failed)
        with pytest.raises(UnsavedError, match="last checkpoint"):
            checkpoints.save(job)  # and yet this one is written
        checkpoints.wait()
        assert [path.name for path in folder.iterdir()] == ["0"]


if __name__ == "__main__":
    _main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])

"""What befalls the process and not the numbers: ``altgrad train`` killed, its checkpoint torn, its disk full."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.faults.cases import Storage

ROOT = Path(__file__).parents[2]
_FILES = ("metrics.jsonl", "events.jsonl", "result.json")
_STEPS, _EVERY, _LIMIT = 160, 20, 600
_FULL_FOR = 0.15  # seconds: a few dozen steps


@dataclass(frozen=True)
class ProcessRow:
    """One fault of the process.

    Attributes:
        off: what it costs a run without checkpoints, in words.
        on: what it cost here, in words.
        difference: of the held-out loss to the undisturbed twin's.
        same_bits: whether logs, events and result are the twin's in every byte.
    """

    fault: str
    storage: Storage
    twin: float
    off: str
    on: str
    difference: float
    same_bits: bool


def rows(seed: int = 0) -> list[ProcessRow]:
    """All faults of the process in both storages; the moments are drawn from the seed."""
    with tempfile.TemporaryDirectory() as folder:
        found = []
        for storage in ("master", "committed"):
            storage_folder = Path(folder) / storage
            runs = _Runs(storage_folder, storage, random.Random(seed))
            found += [runs.row(name, befall) for name, befall in _BEFALLS.items()]
        return found


class _Runs:
    """Runs of one storage, with what they have compiled in common."""

    def __init__(self, folder: Path, storage: Storage, draw: random.Random) -> None:
        folder.mkdir(parents=True)
        self.folder, self.storage, self.draw = folder, storage, draw
        self.twin = self.path("twin")
        self.finish(self.start(self.twin))

    def path(self, name: str) -> Path:
        return self.folder / name

    def row(self, name: str, befall: Callable[[_Runs, Path], tuple[str, str]]) -> ProcessRow:
        out = self.path(name.replace(" ", "-"))
        off, on = befall(self, out)
        losses = [json.loads((each / "result.json").read_text())["validation_loss"] for each in (self.twin, out)]
        same = all((out / file).read_bytes() == (self.twin / file).read_bytes() for file in _FILES)
        return ProcessRow(name, self.storage, losses[0], off, on, losses[1] - losses[0], same)

    def start(self, out: Path, *more: str) -> subprocess.Popen[str]:
        options = [
            *("--format", "E4M3", "--storage", self.storage, "--clip", "--shift", "--out", str(out), *more),
            *("--steps", str(_STEPS), "--checkpoint-every", str(_EVERY), "--batch", "8", "--context", "32"),
            *("--layers", "1", "--width", "32", "--heads", "2", "--inject", "nan@70:2", "spike@90:1e4"),
        ]
        if self.storage == "committed":
            options += ["--storage-rounding", "stochastic"]
        environment = {
            "PYTHONPATH": str(ROOT),
            "JAX_COMPILATION_CACHE_DIR": str(self.folder.parent / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        }
        return subprocess.Popen(
            [sys.executable, "-c", "from altgrad.cli import main; main()", "train", *options],
            env={**os.environ, **environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, process: subprocess.Popen[str], code: int = 0) -> str:
        """Wait for the end, check how it ended, and return what it said."""
        _, said = process.communicate(timeout=_LIMIT)
        if process.returncode != code:
            raise RuntimeError(f"altgrad train ended with {process.returncode}, not {code}:\n{said[-3000:]}")
        return said

    def kill_at_random(self, out: Path) -> int:
        """Start a run and kill it at a step drawn from the second half, at a random moment in it; the steps it did."""
        process = self.start(out)
        wait_for_step(process, out, self.draw.randrange(_STEPS // 2, _STEPS - 10))
        time.sleep(self.draw.random() * 0.01)
        process.send_signal(signal.SIGKILL)
        self.finish(process, -signal.SIGKILL)
        return logged(out)


def logged(out: Path) -> int:
    """Steps in the log of a run."""
    log = out / "metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def wait_for_step(process: subprocess.Popen[str], out: Path, step: int) -> None:
    """Wait until a run has logged a step.

    Raises:
        RuntimeError: if it ends before, or takes too long.
    """
    deadline = time.monotonic() + _LIMIT
    while logged(out) <= step:
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"altgrad train did not get to step {step}: {process.communicate()[1][-3000:]}")
        time.sleep(0.002)


def _checkpoints(out: Path) -> list[int]:
    return sorted(int(path.name) for path in (out / "checkpoints").iterdir() if path.name.isdecimal())


def _killed(runs: _Runs, out: Path) -> tuple[str, str]:
    done = runs.kill_at_random(out)
    kept = _checkpoints(out)[-1]
    runs.finish(runs.start(out, "--resume"))
    return f"all {done} steps so far", f"resumed at step {kept}: {done - kept} steps again"


def _torn(runs: _Runs, out: Path) -> tuple[str, str]:
    done = runs.kill_at_random(out)
    before, newest = _checkpoints(out)[-2:]
    for path in (out / "checkpoints" / str(newest)).rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    said = runs.finish(runs.start(out, "--resume"), 2)
    if "is damaged" not in said:
        raise RuntimeError(f"a torn checkpoint was not told:\n{said[-3000:]}")
    shutil.rmtree(out / "checkpoints" / str(newest))
    runs.finish(runs.start(out, "--resume"))
    return f"all {done} steps so far", f"told, removed, resumed at step {before}: {done - before} steps again"


def _full(runs: _Runs, out: Path) -> tuple[str, str]:
    """No file may grow while the disk is full, which needs no disk of its own and no rights."""
    process = runs.start(out)
    full = runs.draw.randrange(_STEPS // 4, _STEPS // 2)
    wait_for_step(process, out, full)
    before = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, before[1]))
    time.sleep(_FULL_FOR)
    at = logged(out)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, before)
    said = runs.finish(process)
    told = "told" if "training goes on" in said else "the run ended too soon to notice"
    return f"dies there: all {at} steps so far", f"full for {_FULL_FOR} s from step {at} on: {told}; no step again"


_BEFALLS: dict[str, Callable[[_Runs, Path], tuple[str, str]]] = {
    "SIGKILL at a random moment": _killed,
    "torn checkpoint": _torn,
    "full disk while logging": _full,
}

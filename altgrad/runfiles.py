"""What a run writes into its folder. A full disk does not stop it: what cannot be written waits and is tried again."""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO, TypedDict, cast

from rich.console import Console

from altgrad_core.events import Event, jsonable
from altgrad_jax.checkpoint import Checkpoints, UnsavedError
from altgrad_jax.job import Job, StepReport


class UnwrittenError(OSError):
    """What a run could not write into its folder."""


class LineFileState(TypedDict):
    """Where a :class:`LineFile` stands, JSON-ready.

    Attributes:
        written: whole lines in the file.
        unwritten: lines that wait.
    """

    written: int
    unwritten: list[str]


class LineFile:
    """A file of lines that only grows. What cannot be written waits, and is tried again at every :meth:`flush`.

    Args:
        path: the file; made if it does not exist.
        state: where to go on, as :attr:`state` told it; lines after that are dropped. None for a file to start anew.

    Attributes:
        trouble: why the last flush left lines that wait; None if it left none.

    Raises:
        OSError: if the file cannot be opened.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "log.jsonl"
    >>> file = LineFile(path)
    >>> file.add(["{}"])
    >>> file.flush(), file.state, path.read_text().splitlines()
    (True, {'written': 1, 'unwritten': []}, ['{}'])
    >>> file.close()
    """

    def __init__(self, path: Path, state: LineFileState | None = None) -> None:
        self.path = path
        self.trouble: OSError | None = None
        # Without a buffer: it would try what failed once more by itself, and nobody could tell what is on the disk.
        self._file = path.open("ab", buffering=0)
        self._written = _cut(path, 0 if state is None else state["written"])
        self._waiting = deque(line.encode() + b"\n" for line in ([] if state is None else state["unwritten"]))
        self._begun = 0

    @property
    def state(self) -> LineFileState:
        """What a checkpoint has to hold so that the file goes on from here, whatever is written to it meanwhile."""
        return {"written": self._written, "unwritten": [line[:-1].decode() for line in self._waiting]}

    @property
    def waiting(self) -> int:
        """How many lines wait."""
        return len(self._waiting)

    def add(self, lines: Sequence[str]) -> None:
        """Have lines wait behind those that do."""
        self._waiting.extend(line.encode() + b"\n" for line in lines)

    def flush(self) -> bool:
        """Write what waits, as far as that can be done; whether nothing waits any more."""
        self.trouble = None
        while self._waiting and self.trouble is None:
            try:
                # A disk that fills up takes a part of a line: go on behind it.
                self._begun += self._file.write(self._waiting[0][self._begun :]) or 0
            except OSError as error:
                self.trouble = error
            if self._begun == len(self._waiting[0]):
                self._waiting.popleft()
                self._written, self._begun = self._written + 1, 0
        return self.trouble is None

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


class RunFiles:
    """``metrics.jsonl``, ``events.jsonl``, ``result.json`` and the checkpoints of a run.

    A checkpoint holds the lines that were still waiting when it was made, so that a run goes on from it with whole
    logs. What goes wrong is told on the console once, and so is that it is well again.

    Args:
        folder: of the run.
        checkpoints: where to save; if one was restored, the logs are cut back to where it stands, else they start anew.
        console: where to tell.

    Raises:
        OSError: if a log cannot be opened.
    """

    def __init__(self, folder: Path, checkpoints: Checkpoints, console: Console) -> None:
        self._folder, self._checkpoints = folder, checkpoints
        notes = checkpoints.notes
        self._events = LineFile(folder / "events.jsonl", notes.get("events"))
        self._metrics = LineFile(folder / "metrics.jsonl", notes.get("metrics"))
        self._unsaved: UnsavedError | None = None
        self._log_notice = _Notice(console, "the logs can be written again; no line is missing")
        self._save_notice = _Notice(console, "checkpoints can be written again")
        self._flush()

    def __enter__(self) -> RunFiles:
        """Use in a ``with`` statement."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of the logs."""
        self._events.close()
        self._metrics.close()

    def log(self, report: StepReport) -> tuple[Event, ...]:
        """Log what the one run of a job showed in a step.

        Returns:
            The events of the step.
        """
        formats = {"format": report.formats[0]}
        of_layers = {"layer_formats": dict(report.of_layers[0])} if report.of_layers[0] else {}
        line = {"step": report.step, **formats, **of_layers, **jsonable(report.numbers(0))}
        self._events.add([event.to_json() for event in report.events[0]])
        self._metrics.add([json.dumps(line, allow_nan=False)])
        self._flush()
        return report.events[0]

    def save(self, job: Job) -> None:
        """Save a checkpoint if that can be done; those before it stay where it cannot."""
        self._unsaved = None
        try:
            self._checkpoints.save(job, {"events": self._events.state, "metrics": self._metrics.state})
        except UnsavedError as error:
            self._unsaved = error
        self._save_notice.tell(None if self._unsaved is None else f"{self._unsaved}; training goes on without")

    def finish(self, result: Mapping[str, Any] | None) -> None:
        """Write what still waits, wait for the last checkpoint, and write the result, which vouches for whole logs.

        Args:
            result: what ``result.json`` is to hold; None for a run that has not ended.

        Raises:
            UnwrittenError: naming all that could not be written.
        """
        self._flush()
        missing = [_missing_lines(file) for file in (self._metrics, self._events) if file.waiting]
        try:
            self._checkpoints.wait()
        except UnsavedError as error:
            self._unsaved = error
        if self._unsaved is not None:
            missing.append(str(self._unsaved))
        if result is not None and not missing:
            try:
                _write_whole(self._folder / "result.json", json.dumps(jsonable(result), indent=2) + "\n")
            except OSError as error:
                missing.append(f"{self._folder / 'result.json'} could not be written ({_reason(error)})")
        if missing:
            raise UnwrittenError(f"{'; '.join(missing)}. Make room, then go on with --resume --out {self._folder}")

    def _flush(self) -> None:
        # The events first: whatever stops the run here, a step that is logged has all of its events.
        if self._events.flush():
            self._metrics.flush()
        stuck = next((file for file in (self._events, self._metrics) if file.trouble is not None), None)
        told = f"cannot write {stuck.path} ({_reason(stuck.trouble)}); training goes on" if stuck is not None else None
        self._log_notice.tell(None if told is None else f"{told}, and lines are kept and tried again")


class _Notice:
    """Tells once that something is wrong, and once that it is well again."""

    def __init__(self, console: Console, well: str) -> None:
        self._console, self._well = console, well
        self._is_well = True

    def tell(self, trouble: str | None) -> None:
        """Take what is wrong now, or None."""
        if (trouble is None) != self._is_well:
            self._is_well = trouble is None
            self._console.print(trouble or self._well, highlight=False, soft_wrap=True)


def console_on_stderr() -> Console:
    """A console on standard error that stops nobody if that leads to a file on a full disk: it drops what fails."""
    return Console(file=cast(TextIO, _Unstoppable(sys.stderr)))


class _Unstoppable:
    """A text stream that drops what it cannot write; in all else it is the stream."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _missing_lines(file: LineFile) -> str:
    why = "" if file.trouble is None else f" ({_reason(file.trouble)})"
    return f"{file.waiting} line{'s' * (file.waiting != 1)} of {file.path} could not be written{why}"


def _reason(error: OSError | None) -> str:
    return "" if error is None else error.strerror or str(error)


def _write_whole(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _cut(path: Path, lines: int) -> int:
    """Cut a file back to its first lines; how many there are."""
    kept = [line for line in path.read_bytes().splitlines(keepends=True)[:lines] if line.endswith(b"\n")]
    with path.open("r+b") as file:
        file.truncate(sum(len(line) for line in kept))
    return len(kept)

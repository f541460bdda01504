"""Checkpoints of a job: arrays by Orbax, written while training goes on, and the host's memory as JSON beside them.

A run that was interrupted and resumed is the same, in every bit, as one that never was. Nothing is unpickled. A list
of the SHA-256 of every file, such as ``sha256sum --check`` reads, is a part of each checkpoint, and nothing of one is
used before all its files were found to be those listed: Orbax itself takes some changed bytes for arrays.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from altgrad_core.errors import InputError
from altgrad_jax.job import Job

_VERSION = 6
_KEPT = 2
_ROOM_BESIDE_ARRAYS = 1 << 20
_SUMS = "SHA256SUMS"
_FAILURES = (OSError, ValueError)  # the second is tensorstore's word for the first
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class CheckpointError(InputError):
    """A checkpoint that is missing, damaged or of another run."""


class UnsavedError(OSError):
    """A checkpoint that could not be written, such as for lack of space. Those before it are still there."""


class Checkpoints:
    """The checkpoints in a folder; the last two are kept. Close it, or use it in a ``with`` statement.

    Args:
        folder: where they are; made if it does not exist.
        identity: what a run must agree in to go on from them: format, model, data; JSON-ready.

    Attributes:
        notes: what :meth:`save` was told to keep beside the job, in the checkpoint restored; empty before that.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self._identity = {"version": _VERSION, **identity}
        self.notes: Mapping[str, Any] = {}
        self._folder = folder.resolve()
        self._manager = _manager_of(self._folder)

    def __enter__(self) -> Checkpoints:
        """Use in a ``with`` statement."""
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for what is being written, then let go of the folder."""
        try:
            self.wait()
        finally:
            self._manager.close()

    @property
    def latest_step(self) -> int | None:
        """The step that the newest checkpoint would go on with, or None if there is none."""
        return self._manager.latest_step()

    def save(self, job: Job, notes: Mapping[str, Any] | None = None) -> None:
        """Write a checkpoint of a job as it stands; returns once the arrays are copied, and writes in the background.

        A checkpoint of the same step that exists already is left as it is: it holds the same. It is not begun where
        there is no room for it, so that a full disk costs no more than the checkpoint.

        Args:
            job: what to save.
            notes: what to keep beside it; JSON-ready.

        Raises:
            UnsavedError: if it cannot be written, or if it turns out that the one before was not; this one then is on
                its way.
        """
        if job.step == self._manager.latest_step():
            return
        earlier = self._settled()
        arrays = _leaves(job)
        self._check_room(job.step, sum(each.nbytes for each in arrays.values()) + _ROOM_BESIDE_ARRAYS)
        host = {"identity": self._identity, "job": job.saved(), "notes": dict(notes or {})}
        items = ocp.args.Composite(arrays=ocp.args.StandardSave(arrays), host=ocp.args.JsonSave(host))
        try:
            self._manager.save(job.step, args=items)
        except _FAILURES as error:
            raise self._given_up(error, f"the checkpoint of step {job.step}") from error
        if earlier is not None:
            raise earlier

    def wait(self) -> None:
        """Wait for what is being written.

        Raises:
            UnsavedError: if it could not be written.
        """
        failed = self._settled()
        if failed is not None:
            raise failed

    def restore(self, job: Job) -> int:
        """Bring a freshly made job to where the newest checkpoint stands.

        Args:
            job: made from the same plans as the one that was saved.

        Returns:
            The step that it goes on with.

        Raises:
            CheckpointError: if there is no checkpoint, it is damaged, or it is one of another run; the message names
                what differs. The job then is as it was.
            UnsavedError: if one was being written, and could not be.
        """
        self.wait()
        step = self._manager.latest_step()
        if step is None:
            raise CheckpointError(f"no checkpoint in {self._folder}")
        self._check_files(step)
        host = self._read(step, "host", ocp.args.JsonRestore())
        self._check_identity(host["identity"])
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _leaves(job))
        arrays = self._read(step, "arrays", ocp.args.StandardRestore(abstract))
        structure = jax.tree.structure((job.state, job.snapshots))
        leaves = [arrays[name] for name in _names(len(abstract))]
        job.restore(host["job"], *jax.tree.unflatten(structure, leaves))
        self.notes = host["notes"]
        return step

    def _settled(self) -> UnsavedError | None:
        """Wait for what is being written; why it could not be, if so."""
        try:
            self._manager.wait_until_finished()
        except _FAILURES as error:
            return self._given_up(error, "the last checkpoint")
        return None

    def _given_up(self, error: Exception, which: str) -> UnsavedError:
        """Take away what was begun, which takes room, and start afresh: the manager would fail of it once more."""
        with suppress(*_FAILURES):
            self._manager.close()
        self._manager = _manager_of(self._folder)
        return self._unsaved(error, which)

    def _unsaved(self, error: Exception, which: str) -> UnsavedError:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error).partition(" [")[0]
        return UnsavedError(f"{which} could not be written to {self._folder} ({why})")

    def _check_room(self, step: int, size: int) -> None:
        """Take the room that a checkpoint needs, and give it back: so quotas and limits are heard of, too."""
        if not hasattr(os, "posix_fallocate"):
            return
        probe = self._folder / ".room"
        try:
            with probe.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            # A file system that cannot reserve says nothing about its room.
            if error.errno in _NO_ROOM:
                raise self._unsaved(error, f"the checkpoint of step {step}") from error
        finally:
            probe.unlink(missing_ok=True)

    def _read(self, step: int, item: str, how: Any) -> Any:
        with self._told_as_damage(step, item):
            return self._manager.restore(step, args=ocp.args.Composite(**{item: how}))[item]

    @contextmanager
    def _told_as_damage(self, step: int, item: str) -> Iterator[None]:
        try:
            yield
        except (ValueError, KeyError, OSError) as error:
            raise self._damaged(step, f"its {item} cannot be read") from error

    def _check_files(self, step: int) -> None:
        """Refuse a checkpoint of which a file was changed, taken away or added."""
        folder = self._folder / str(step)
        with self._told_as_damage(step, _SUMS):
            listed = _listed_sums(folder)
        with self._told_as_damage(step, "files"):
            found = _sums(folder)
        for name in (*found, *listed):
            if found.get(name) != listed.get(name):
                what = f"not the one that its {_SUMS} lists" if name in found else "missing"
                raise self._damaged(step, f"its {name} is {what}")

    def _damaged(self, step: int, what: str) -> CheckpointError:
        return CheckpointError(
            f"the checkpoint {self._folder / str(step)} is damaged: {what}; remove that folder to go on from the "
            "checkpoint before it, or from the start"
        )

    def _check_identity(self, found: Mapping[str, Any]) -> None:
        expected = self._identity
        differing = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
        if differing:
            told = "; ".join(f"{name} is {found.get(name)!r} there, {expected.get(name)!r} here" for name in differing)
            raise CheckpointError(f"the checkpoint in {self._folder} is of another run: {told}")


def _manager_of(folder: Path) -> ocp.CheckpointManager:
    """A manager of a folder, from which what was left half written is taken away first.

    Not by the manager, whose own cleanup goes on in the background: of two managers in a row the second would meet that
    of the first, and the next save would fail of it.
    """
    for left in folder.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
        shutil.rmtree(left, ignore_errors=True)
    # Without a look at what is there: Orbax would log what is damaged of it, before it is known to be.
    options = ocp.CheckpointManagerOptions(max_to_keep=_KEPT, temporary_path_class=_Summed, lightweight_initialize=True)
    return ocp.CheckpointManager(folder, options=options)


class _Summed(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """The folder of a checkpoint while it is written: it gets its name last, once the sums of all files are in it.

    Orbax changes files of its own until it renames the folder. So it renames it to another temporary name, under which
    nobody takes it for a checkpoint: whatever stops the process, there is none without its sums. All this is done in
    the background, and by one process for all.
    """

    def __init__(self, temporary_path: Any, final_path: Any, **options: Any) -> None:
        super().__init__(temporary_path, final_path.with_name(f"{temporary_path.name}-without-sums"), **options)
        self._named = final_path

    def get_final(self) -> Any:
        """Where the folder will be."""
        return self._named

    async def finalize(self) -> None:
        """Let Orbax finish, write the sums and give the folder its name."""
        await super().finalize()
        written = super().get_final()
        # Orbax makes the folders of arrays and host the same way, inside: their files are summed with all others.
        if ocp.utils.TMP_DIR_SUFFIX not in self._named.parent.name:
            await asyncio.to_thread(_write_sums, Path(written))
        written.rename(self._named)


def _write_sums(folder: Path) -> None:
    (folder / _SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in _sums(folder).items()))


def _listed_sums(folder: Path) -> dict[str, str]:
    """What :func:`_sums` was when the checkpoint was written; in whatever is damaged of it, something else."""
    text = (folder / _SUMS).read_bytes().decode(errors="backslashreplace")
    lines = [line.partition("  ") for line in text.split("\n") if line]
    return {name: digest for digest, _, name in lines}


def _sums(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file in the folder of a checkpoint, but for the list of them, by the file's name there."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {name: _sha256(folder / name) for name in names if name != _SUMS}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _leaves(job: Job) -> dict[str, jax.Array]:
    """All arrays of a job under names in a fixed order, whatever their containers are called."""
    leaves = jax.tree.leaves((job.state, job.snapshots))
    return dict(zip(_names(len(leaves)), leaves, strict=True))


def _names(count: int) -> list[str]:
    return [f"{index:04d}" for index in range(count)]

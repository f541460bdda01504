"""Checkpoints of a job: arrays by Orbax, written while training goes on, and the host's memory as JSON beside them.

A run that was interrupted and resumed is the same, in every bit, as one that never was. Nothing is unpickled.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from altgrad_core.errors import InputError
from altgrad_jax.job import Job

_VERSION = 3
_KEPT = 2


class CheckpointError(InputError):
    """A checkpoint that is missing or belongs to another run."""


class Checkpoints:
    """The checkpoints in a folder; the last two are kept. Close it, or use it in a ``with`` statement.

    Args:
        folder: where they are; made if it does not exist.
        identity: what a run must agree in to go on from them: format, model, data; JSON-ready.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self._identity = {"version": _VERSION, **identity}
        options = ocp.CheckpointManagerOptions(max_to_keep=_KEPT, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(folder.resolve(), options=options)

    def __enter__(self) -> Checkpoints:
        """Use in a ``with`` statement."""
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for what is being written, then let go of the folder."""
        self._manager.close()

    @property
    def latest_step(self) -> int | None:
        """The step that the newest checkpoint would go on with, or None if there is none."""
        return self._manager.latest_step()

    def save(self, job: Job) -> None:
        """Write a checkpoint of a job as it stands; returns once the arrays are copied, and writes in the background.

        A checkpoint of the same step that exists already is left as it is: it holds the same.
        """
        if job.step == self._manager.latest_step():
            return
        self._manager.save(
            job.step,
            args=ocp.args.Composite(
                arrays=ocp.args.StandardSave(_leaves(job)),
                host=ocp.args.JsonSave({"identity": self._identity, "job": job.saved()}),
            ),
        )

    def restore(self, job: Job) -> int:
        """Bring a freshly made job to where the newest checkpoint stands.

        Args:
            job: made from the same plans as the one that was saved.

        Returns:
            The step that it goes on with.

        Raises:
            CheckpointError: if there is no checkpoint, it is damaged, or it is one of another run; the message names
                what differs.
        """
        step = self._manager.latest_step()
        if step is None:
            raise CheckpointError(f"no checkpoint in {self._manager.directory}")
        host = self._read(step, "host", ocp.args.JsonRestore())
        self._check_identity(host["identity"])
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _leaves(job))
        arrays = self._read(step, "arrays", ocp.args.StandardRestore(abstract))
        structure = jax.tree.structure((job.state, job.snapshots))
        leaves = [arrays[name] for name in _names(len(abstract))]
        job.restore(host["job"], *jax.tree.unflatten(structure, leaves))
        return step

    def _read(self, step: int, item: str, how: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**{item: how}))[item]
        except (ValueError, KeyError, OSError) as error:
            folder = self._manager.directory / str(step)
            raise CheckpointError(
                f"the checkpoint {folder} is damaged: its {item} cannot be read; remove that folder to go on from the "
                "checkpoint before it, or from the start"
            ) from error

    def _check_identity(self, found: Mapping[str, Any]) -> None:
        expected = self._identity
        differing = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
        if differing:
            told = "; ".join(f"{name} is {found.get(name)!r} there, {expected.get(name)!r} here" for name in differing)
            raise CheckpointError(f"the checkpoint in {self._manager.directory} is of another run: {told}")


def _leaves(job: Job) -> dict[str, jax.Array]:
    """All arrays of a job under names in a fixed order, whatever their containers are called."""
    leaves = jax.tree.leaves((job.state, job.snapshots))
    return dict(zip(_names(len(leaves)), leaves, strict=True))


def _names(count: int) -> list[str]:
    return [f"{index:04d}" for index in range(count)]

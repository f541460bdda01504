"""What a study leaves behind: one JSON file with everything said in words and numbers, one npz file with the series.

Neither needs a framework to be read, and nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from altgrad_core.errors import InputError
from altgrad_core.events import Event, jsonable, unjsonable

Scene = Literal["clean", "committed", "stress"]
"""``clean``: float32 master weights, no faults. ``committed``: weights stored on the format's grid. ``stress``: clean,
with faults injected.
"""

Storage = Literal["master", "committed"]
StorageRounding = Literal["nearest_even", "stochastic"]

SERIES: tuple[str, ...] = (
    "loss",
    "norm",
    "overflow_rate",
    "worst_overflow_rate",
    "worst_overflow_site",
    "underflow_rate",
    "operand_overflow_rate",
    "operand_underflow_rate",
    "stall_rate",
    "saturation_rate",
    "applied",
    "clipped",
)
"""What is recorded of every step, as in ``altgrad_jax.training.StepMetrics``; flags as 0 and 1."""

STUDY_FILE = "study.json"
SERIES_FILE = "series.npz"
VERSION = 2


class StudyError(InputError):
    """A study that cannot be read, or that contradicts itself."""


@dataclass(frozen=True)
class RunResult:
    """One run and how it ended.

    Attributes:
        format: name of the format it started in.
        seed: of weights, batches and stochastic rounding; runs of one seed are paired.
        scene: what it went through.
        storage: where the weights were kept.
        storage_rounding: how committed weights were rounded; without meaning for masters.
        interventions: whether they were on; None where the scene has none.
        final_format: name of the format it ended in.
        final_loss: held-out loss in nats per character; may be NaN.
        events: what happened, in the order of steps.

    Raises:
        StudyError: for a scene, storage or rounding that does not exist, or a stress run that does not say whether
            interventions were on.
    """

    format: str
    seed: int
    scene: Scene
    storage: Storage
    storage_rounding: StorageRounding
    interventions: bool | None
    final_format: str
    final_loss: float
    events: tuple[Event, ...] = ()

    def __post_init__(self) -> None:
        """Check what has only a few values."""
        for name, known in (("scene", Scene), ("storage", Storage), ("storage_rounding", StorageRounding)):
            if getattr(self, name) not in get_args(known):
                raise StudyError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(get_args(known))}")
        if (self.scene == "stress") != (self.interventions is not None):
            raise StudyError(
                f"interventions is {self.interventions!r} in scene {self.scene!r}; expected True or False under "
                "stress and None elsewhere"
            )


@dataclass(frozen=True, eq=False)
class Study:
    """All runs of a study.

    Attributes:
        config: sizes and settings, JSON values, shown as they are. Known to the report: ``command``, ``batch``,
            ``context``, ``layers``, ``width``, ``learning_rate``, ``base_clip``, ``overflow_threshold`` and
            ``unigram_loss`` (entropy of the character frequencies in nats: what a model that learnt nothing else
            reaches).
        environment: versions and hardware.
        sites: names of the matrix products, which ``worst_overflow_site`` counts.
        runs: the runs.
        series: float32 arrays of shape ``(runs, steps)`` by the names in :data:`SERIES`.
        wall_seconds: how long the study took.

    Raises:
        StudyError: for no runs, two that are the same, or series of the wrong names or shapes.
    """

    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    sites: tuple[str, ...]
    runs: tuple[RunResult, ...]
    series: Mapping[str, npt.NDArray[np.float32]]
    wall_seconds: float

    def __post_init__(self) -> None:
        """Check that runs and series belong together."""
        if not self.runs:
            raise StudyError("a study without runs")
        self._check_runs()
        self._check_series()

    @property
    def steps(self) -> int:
        """Steps of every run."""
        return self.series["loss"].shape[1]

    def _check_runs(self) -> None:
        seen = set()
        for run in self.runs:
            key = (run.format, run.seed, run.scene, run.storage, run.storage_rounding, run.interventions)
            if key in seen:
                raise StudyError(f"two runs are the same: format {run.format}, seed {run.seed}, scene {run.scene}")
            seen.add(key)

    def _check_series(self) -> None:
        missing, unknown = set(SERIES) - set(self.series), set(self.series) - set(SERIES)
        if missing or unknown:
            raise StudyError(f"series missing: {sorted(missing)}, unknown: {sorted(unknown)}")
        shapes = {values.shape for values in self.series.values()}
        shape = next(iter(shapes))
        if len(shapes) != 1 or len(shape) != 2 or shape[0] != len(self.runs) or shape[1] < 1:
            raise StudyError(
                f"series have shapes {sorted(shapes)}; expected all of them to be ({len(self.runs)} runs, steps)"
            )


def save(study: Study, folder: str | Path) -> None:
    """Write a study into a folder, which is made if needed; a study that is there is replaced.

    The series come first, and the JSON file holds their digest: a save that was cut short is noticed on loading.

    Args:
        study: what to write.
        folder: receives ``study.json`` and ``series.npz``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    series: dict[str, Any] = {name: np.asarray(study.series[name], np.float32) for name in SERIES}
    np.savez_compressed(buffer, **series)
    content = {
        "altgrad_study": VERSION,
        "config": _spelled(study.config),
        "environment": _spelled(study.environment),
        "sites": list(study.sites),
        "wall_seconds": study.wall_seconds,
        "series_sha256": hashlib.sha256(buffer.getvalue()).hexdigest(),
        "runs": [_run_to_json(run) for run in study.runs],
    }
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    _write(folder / SERIES_FILE, buffer.getvalue())
    _write(folder / STUDY_FILE, text.encode())


def load(folder: str | Path) -> Study:
    """Read back what :func:`save` wrote.

    Raises:
        StudyError: naming the file that is missing, damaged or of another version.
    """
    path, series_path = Path(folder) / STUDY_FILE, Path(folder) / SERIES_FILE
    data, series_data = _read(path), _read(series_path)
    try:
        content = json.loads(data)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StudyError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict) or "altgrad_study" not in content:
        raise StudyError(f"{path} is not a study: it has no field 'altgrad_study'")
    if content["altgrad_study"] != VERSION:
        raise StudyError(
            f"{path} is version {content['altgrad_study']!r} of the study format; this AltGrad reads version {VERSION}"
        )
    if content.get("series_sha256") != hashlib.sha256(series_data).hexdigest():
        raise StudyError(f"{series_path} is damaged, or belongs to another study than {path.name} beside it")
    series = _series(series_path, series_data)
    try:
        return Study(
            config=_unspelled(content["config"]),
            environment=_unspelled(content["environment"]),
            sites=tuple(content["sites"]),
            runs=tuple(_run_from_json(fields) for fields in content["runs"]),
            series=series,
            wall_seconds=float(content["wall_seconds"]),
        )
    except KeyError as error:
        raise StudyError(f"{path} has no field {error}") from None
    except (TypeError, ValueError) as error:
        raise StudyError(f"{path}: {error}") from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise StudyError(f"{path} does not exist; `altgrad study` writes it") from None
    except OSError as error:
        raise StudyError(f"{path} cannot be read: {error.strerror}") from None


def _write(path: Path, data: bytes) -> None:
    """Write a file so that it is either the old one or the new one, never half of it."""
    draft = path.with_name(path.name + ".tmp")
    draft.write_bytes(data)
    os.replace(draft, path)


def _series(path: Path, data: bytes) -> dict[str, npt.NDArray[np.float32]]:
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            return {name: archive[name].astype(np.float32, casting="same_kind") for name in archive.files}
    except (ValueError, TypeError, EOFError, OSError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise StudyError(f"{path} does not hold arrays of numbers: {error}") from None


def _run_to_json(run: RunResult) -> dict[str, object]:
    return {
        "format": run.format,
        "seed": run.seed,
        "scene": run.scene,
        "storage": run.storage,
        "storage_rounding": run.storage_rounding,
        "interventions": run.interventions,
        "final_format": run.final_format,
        "final_loss": _spelled(float(run.final_loss)),
        "events": [json.loads(event.to_json()) for event in run.events],
    }


def _run_from_json(fields: Mapping[str, Any]) -> RunResult:
    return RunResult(
        format=str(fields["format"]),
        seed=int(fields["seed"]),
        scene=fields["scene"],
        storage=fields["storage"],
        storage_rounding=fields["storage_rounding"],
        interventions=fields["interventions"],
        final_format=str(fields["final_format"]),
        final_loss=float(_unspelled(fields["final_loss"])),
        events=tuple(Event.from_json(json.dumps(event)) for event in fields["events"]),
    )


def _spelled(value: object) -> Any:
    """A JSON value in which floats that JSON cannot say are the strings ``NaN``, ``Infinity`` and ``-Infinity``."""
    if isinstance(value, Mapping):
        return {str(key): _spelled(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_spelled(item) for item in value]
    return jsonable({"value": value})["value"] if isinstance(value, float) else value


def _unspelled(value: Any) -> Any:
    """Undo :func:`_spelled`."""
    if isinstance(value, Mapping):
        return {key: _unspelled(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_unspelled(item) for item in value]
    return unjsonable(value)

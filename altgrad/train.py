"""``altgrad train``: one run, in a folder of its own, with metrics, events and checkpoints to resume from."""

from __future__ import annotations

import json
import math
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from altgrad.runfiles import RunFiles, console_on_stderr
from altgrad_core.errors import InputError
from altgrad_core.events import Event
from altgrad_core.formats import Overflow, parse
from altgrad_core.settings import Policy, PolicyName, check_count
from altgrad_core.snapshots import Moments
from altgrad_core.stability import check_base_clip, check_rate
from altgrad_jax.checkpoint import CheckpointError, Checkpoints
from altgrad_jax.data import Corpus, load_corpus
from altgrad_jax.faults import check_faults
from altgrad_jax.job import Job, RunPlan, StepReport
from altgrad_jax.models import GPTConfig, site_names
from altgrad_jax.schedules import Schedule
from altgrad_jax.state import RunSpec, Scaling, Storage, StorageRounding
from altgrad_jax.training import JobClipRule, OptimizerConfig, Program

_VALIDATION_BATCHES = 8


class RunError(InputError):
    """A run that cannot start as asked."""


@dataclass(frozen=True)
class TrainConfig:
    """Train a character GPT in a format and keep the run alive."""

    format: str = "E5M2"
    """Format of all matmul operands and of the gradients that flow back into them: E0M7 to E7M0, bf16, float32, ..."""
    out: Path = Path("runs/train")
    """Folder of the run; must not exist yet, unless with --resume."""
    resume: bool = False
    """Go on with the run in --out, which must have been started with the same options."""
    data: Path | None = None
    """Text file to train on, plain or .gz, UTF-8; by default the Shakespeare that ships."""

    clip: bool = False
    """Partition-relative clipping: clip when the overflow rate of the gradient casts reaches --overflow-threshold."""
    shift: bool = False
    """Emergency mantissa shift: move to a format that can carry the run after NaN batches, and as --policy says."""
    recover: bool = True
    """Skip steps that are not finite, keep spikes out of the amax history, go back to a snapshot when poisoned."""
    inject: tuple[str, ...] = ()
    """Faults to inject: nan@120:5 (five NaN batches), spike@200:1e4 (one loss spike), weight@150:nan, gradient@150:inf,
    zeros@120:5 (batches of nothing but token 0), noise@120:5 (batches of shuffled tokens)."""

    storage: Storage = "master"
    """float32 master weights cast at use, or weights committed to the format's grid after every step."""
    storage_rounding: StorageRounding | None = None
    """How committed weights are rounded (nearest_even by default); only with --storage committed."""
    operand_overflow: Overflow = "saturate_finite"
    """What overflow becomes in operands: inf or NaN as the format has it, or the format's maximum."""
    gradient_overflow: Overflow = "saturate_finite"
    """What overflow becomes in gradients."""
    scaling: Scaling = "delayed"
    """Scales of operands and gradients: delayed, from the largest magnitudes of the last steps, or static, all 1."""
    calibrate: bool = True
    """Measure delayed scales on the first batch before step 0."""
    refuse_spikes: bool = True
    """Keep the magnitudes of a step whose gradient norm is a spike out of delayed scales."""
    repair_scales: bool = False
    """Double the scale of a cast that saturates."""

    clip_rule: JobClipRule = "max"
    """What the clip threshold follows. max: base-clip times max/57344. binades: base-clip times binades/32.
    scaled_max: base-clip times max under the largest scale. quantile: base-clip times the median norm.
    ungated: plain clipping to base-clip, at every step."""
    base_clip: float = 1.0
    """Clip threshold that E5M2 would have; for other rules than max, what they multiply."""
    overflow_threshold: float = 0.01
    """Overflow rate at and above which gradients are clipped."""
    nan_patience: int = 3
    """NaN batches in a row before a shift."""
    stall_threshold: float = 0.5
    """Windowed stall rate above which --policy answers it."""
    policy: PolicyName = "by_cause"
    """What --shift answers beside NaN batches. by_cause: overflow, underflow and stalls of committed weights, each
    with what is missing: scales that follow, exponent bits, stochastic rounding, mantissa bits. relative_stall: stalls
    of committed weights, by stochastic rounding at once, then by a shift where they grew on a plateau.
    fallback_chain: any stall above the threshold. off: nothing, NaN batches alone shift."""
    per_layer: bool = False
    """Judge each matrix product by its own rates, and shift it alone."""
    recover_after: int | None = None
    """Quiet steps after which --format is tried again; twice as many after each return that failed."""

    steps: int = 300
    """Optimizer steps."""
    batch: int = 16
    """Sequences in a batch."""
    context: int = 64
    """Characters in a sequence."""
    layers: int = 2
    """Transformer blocks."""
    width: int = 64
    """Size of the residual stream."""
    heads: int = 4
    """Attention heads."""
    learning_rate: float = 3e-3
    """Peak of the cosine schedule."""
    seed: int = 0
    """Seed of weights, batches and stochastic rounding."""
    snapshot_every: int = 20
    """Steps between the snapshots that a poisoned run goes back to."""
    snapshots_kept: int = 2
    """How many of them are kept; a poisoned run goes back to the oldest."""
    rollback_moments: Moments = "kept"
    """Whether the optimizer's moments come back with the weights, or start anew."""
    checkpoint_every: int = 100
    """Steps between checkpoints on disk."""

    def __post_init__(self) -> None:
        """Refuse what would have no effect or could not work."""
        parse(self.format)
        for name in ("steps", "batch", "context", "snapshot_every", "snapshots_kept", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise RunError(f"--{name.replace('_', '-')} is {getattr(self, name)}; expected at least 1")
        if not 0 <= self.seed < 2**32:
            raise RunError(f"--seed is {self.seed}; expected 0 to {2**32 - 1}")
        if not 0 < self.learning_rate < math.inf:
            raise RunError(f"--learning-rate is {self.learning_rate}; expected a positive number")
        if self.storage_rounding is not None and self.storage == "master":
            raise RunError("--storage-rounding has no effect on float32 masters; expected it with --storage committed")
        check_base_clip(self.base_clip)
        check_rate("overflow_threshold", self.overflow_threshold)
        self._refuse_without(self.clip, "--clip", ("clip_rule", "base_clip", "overflow_threshold"))
        self._refuse_without(self.clip_rule != "ungated", "a gated --clip-rule", ("overflow_threshold",))
        self._refuse_without(self.scaling == "delayed", "--scaling delayed", ("calibrate",))
        follows = self.scaling == "delayed" or (self.shift and self.policy == "by_cause")
        self._refuse_without(follows, "--scaling delayed (or --shift and --policy by_cause)", ("refuse_spikes",))
        self._refuse_without(self.shift, "--shift", ("nan_patience", "stall_threshold", "policy", "recover_after"))
        self._refuse_without(
            self.recover, "--recover", ("refuse_spikes", "snapshot_every", "snapshots_kept", "rollback_moments")
        )
        stalls_count = self.policy == "fallback_chain" or (self.policy != "off" and self.storage == "committed")
        told = "--storage committed (and a --policy) or --policy fallback_chain"
        self._refuse_without(stalls_count, told, ("stall_threshold",))
        judges = self.policy == "by_cause" or stalls_count
        self._refuse_without(self.shift and judges, "--shift and a --policy that judges rates", ("per_layer",))
        if self.recover_after is not None and check_count("--recover-after", self.recover_after, 1) >= self.steps:
            raise RunError(f"--recover-after {self.recover_after} would never happen: the run has {self.steps} steps")
        if parse(self.format).is_float32:
            of_casts = (
                "operand_overflow",
                "gradient_overflow",
                "scaling",
                "calibrate",
                "refuse_spikes",
                "repair_scales",
            )
            self._refuse_without(False, "a format other than float32", of_casts)
            opens = self.clip_rule == "ungated" or self.overflow_threshold == 0  # without an overflow
            self._refuse_without(opens, "a format other than float32 (or --clip-rule ungated)", ("clip",))
            if self.storage == "committed":
                raise RunError("--storage committed has no effect in float32: its weights are on the grid already")

    def _refuse_without(self, switch: bool, name: str, options: tuple[str, ...]) -> None:
        defaults = {field.name: field.default for field in fields(self)}
        changed = [option for option in options if getattr(self, option) != defaults[option]]
        if changed and not switch:
            negation = "no-" if getattr(self, changed[0]) is False else ""
            raise RunError(f"--{negation}{changed[0].replace('_', '-')} has no effect without {name}")

    def plan(self) -> RunPlan:
        """The run as the job sees it."""
        return RunPlan(
            RunSpec(
                self.format,
                self.seed,
                self.storage,
                self.storage_rounding or "nearest_even",
                self.operand_overflow,
                self.gradient_overflow,
                clip=self.clip,
                recover=self.recover,
                scaling=self.scaling,
                refuse_spikes=self.refuse_spikes,
                calibrate=self.calibrate,
                repair_scales=self.repair_scales,
                schedule=Schedule(self.steps, self.learning_rate),
            ),
            check_faults(self.inject, self.steps),
            shift=self.shift,
            policy=Policy(self.policy, recover_after=self.recover_after),
            nan_patience=self.nan_patience,
            stall_threshold=self.stall_threshold,
            layers=tuple(site_names(self.layers)) if self.per_layer else (),
        )

    def program(self, vocabulary: int) -> Program:
        """The static half of the run."""
        return Program.for_format(
            self.format,
            GPTConfig(vocabulary, self.context, self.layers, self.width, self.heads),
            OptimizerConfig(
                clip_rule=self.clip_rule, base_clip=self.base_clip, overflow_threshold=self.overflow_threshold
            ),
        )

    def identity(self, corpus: Corpus) -> dict[str, Any]:
        """What a resumed run must agree in, JSON-ready: all but where it lives and how it is kept."""
        kept = {name: value for name, value in asdict(self).items() if name not in ("out", "resume", "data")}
        return {**kept, "inject": list(self.inject), "data_sha256": corpus.digest()}

    @classmethod
    def of_identity(cls, identity: Mapping[str, Any]) -> TrainConfig:
        """The config of a run with an identity, with ``out`` and ``data`` at their defaults.

        Raises:
            RunError: for what :meth:`identity` of this version did not return.
        """
        options: dict[str, Any] = {name: value for name, value in identity.items() if name != "data_sha256"}
        try:
            options["inject"] = tuple(options["inject"])
            return cls(**options)
        except (TypeError, KeyError) as error:
            raise RunError(f"these are not the options of this version's altgrad train: {error}") from None


def train(config: TrainConfig, console: Console | None = None) -> float | None:
    """Run ``altgrad train``.

    Writes ``config.json``, ``metrics.jsonl`` (a line for each step), ``events.jsonl`` (a line for each event),
    ``result.json`` and ``checkpoints/`` into ``config.out``. Interrupted by Ctrl-C or SIGTERM it writes a checkpoint;
    killed, it goes on from the last one. A full disk does not stop it: what cannot be written is kept and tried again.

    Args:
        config: the run.
        console: where progress and events are shown; standard error by default.

    Returns:
        Held-out loss at the end, in nats per character; None for a run that was interrupted.

    Raises:
        RunError: if the folder does not fit what was asked.
        CheckpointError: if the folder's checkpoint is of another run.
        DataError: for a data file that cannot be used.
        UnwrittenError: at the end, if something could not be written; once there is room, ``resume`` writes it.
    """
    console = console or console_on_stderr()
    corpus = load_corpus(config.data, config.context)
    program, plan = config.program(len(corpus.vocabulary)), config.plan()
    plan.controller()  # refuses what cannot work before anything is written or compiled
    identity = config.identity(corpus)
    _prepare_folder(config, identity)
    with Checkpoints(config.out / "checkpoints", identity) as checkpoints:
        if config.resume:
            _require_same_run(config.out, identity)
        job = Job(
            program,
            [plan],
            corpus,
            batch=config.batch,
            snapshot_every=config.snapshot_every,
            snapshots_kept=config.snapshots_kept,
            rollback_moments=config.rollback_moments,
        )
        if checkpoints.latest_step is not None:
            console.print(f"resuming at step {checkpoints.restore(job)}")
        with RunFiles(config.out, checkpoints, console) as files:
            if not _train_to_the_end(config, job, files, console):
                console.print(f"interrupted at step {job.step}; go on with --resume --out {config.out}")
                files.finish(None)
                return None
            batches = corpus.validation_batches(_VALIDATION_BATCHES, config.batch, config.context)
            loss, controller = float(job.evaluate(batches)[0]), job.controllers[0]
            told = _told(controller.format, controller.formats)
            console.print(f"held-out loss {loss:.4f} nats/character in {told}; run folder {config.out}")
            ended_in = {"final_format": controller.format}
            of_layers = {"final_layer_formats": controller.formats} if controller.formats else {}
            files.finish({"validation_loss": loss, "steps": job.step, **ended_in, **of_layers})
    return loss


def _told(format: str, of_layers: Mapping[str, str]) -> str:
    """The format of a run; of one in layers how many of them are in which.

    >>> _told("E0M7", {"mlp": "E0M7", "logits": "E2M5"})
    'E0M7 (1 of 2 layers), E2M5 (1 of 2 layers)'
    """
    counted = Counter(of_layers.values())
    return ", ".join(f"{each} ({count} of {len(of_layers)} layers)" for each, count in counted.items()) or format


def _train_to_the_end(config: TrainConfig, job: Job, files: RunFiles, console: Console) -> bool:
    """Train until the last step or the first signal; whether the last step was reached."""
    with _signals() as stop, _progress(console) as progress:
        task = progress.add_task("", total=config.steps, completed=job.step, note="")
        while job.step < config.steps and not stop:
            report = job.advance()
            if report is not None:
                _show(files.log(report), report, progress, task)
            if job.step % config.checkpoint_every == 0 and job.step < config.steps:
                files.save(job)
        files.save(job)
        if stop:
            return False
        report = job.drain()
        if report is not None:
            _show(files.log(report), report, progress, task)
    return True


def _prepare_folder(config: TrainConfig, identity: Mapping[str, Any]) -> None:
    if config.resume:
        if not (config.out / "config.json").is_file():
            raise RunError(f"{config.out} holds no run to resume (config.json is missing)")
        return
    if config.out.exists():
        raise RunError(f"{config.out} exists; name another folder with --out, or go on with that run with --resume")
    config.out.mkdir(parents=True)
    (config.out / "config.json").write_text(json.dumps(identity, indent=2) + "\n")


def _require_same_run(folder: Path, identity: Mapping[str, Any]) -> None:
    try:
        found = json.loads((folder / "config.json").read_text())
    except ValueError:
        raise RunError(f"{folder / 'config.json'} is damaged: it is not JSON; start the run anew with --out") from None
    differing = [name for name in {**identity, **found} if identity.get(name) != found.get(name)]
    if differing:
        told = "; ".join(f"{name} is {found.get(name)!r} there, {identity.get(name)!r} here" for name in differing)
        raise CheckpointError(f"{folder} holds another run: {told}")


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying of them; a second one of a kind kills. Only in the main thread."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def note(number: int, _: object) -> None:
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
        console=console,
    )


def _show(events: tuple[Event, ...], report: StepReport, progress: Progress, task: Any) -> None:
    for event in events:
        numbers = ", ".join(f"{name} {_brief(value)}" for name, value in event.numbers.items())
        progress.console.print(f"step {event.step}: {event.kind} ({event.cause}) {numbers}", highlight=False)
    seen = {name: np.asarray(values)[0] for name, values in report.metrics.items()}
    note = (
        f"{report.formats[0]} loss {seen['loss']:.3f} norm {seen['norm']:.3f} overflow {seen['overflow_rate']:.2%} "
        f"underflow {seen['underflow_rate']:.1%} stall {seen['stall_rate']:.0%}"
    )
    progress.update(task, completed=report.step + 1, note=note)


def _brief(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"

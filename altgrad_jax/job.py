"""The host's side of training: batches in, metrics read a step late, controllers asked, decisions written.

One loop serves a single run and a fleet. It hands out what each step showed and keeps no files: those are the caller's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from altgrad_core.errors import InputError
from altgrad_core.events import Event
from altgrad_core.snapshots import Moments
from altgrad_core.stability import EmergencyMantissaShift
from altgrad_jax.control import Decision, FormatController, Observation, Policy
from altgrad_jax.data import Corpus
from altgrad_jax.faults import Injection, fault_at, spoiled
from altgrad_jax.fleet import Fleet
from altgrad_jax.recovery import Snapshots
from altgrad_jax.shown import Shown
from altgrad_jax.state import Recoverable, RunSpec, StepMetrics, TrainState
from altgrad_jax.training import Program


@dataclass(frozen=True)
class RunPlan:
    """One run of a job.

    Attributes:
        spec: what it computes.
        injections: the faults it suffers.
        shift: whether its format may change, and with it the learning rate and where scales come from.
        layers: the names of all sites, if each is to be judged and shifted alone.
        policy: when its controller acts.
        nan_patience: NaN batches in a row before a shift.
        stall_threshold: stall rate above which a shift is considered.
    """

    spec: RunSpec
    injections: tuple[Injection, ...] = ()
    shift: bool = False
    policy: Policy = field(default_factory=Policy)
    nan_patience: int = 3
    stall_threshold: float = 0.5
    layers: tuple[str, ...] = ()

    def controller(self) -> FormatController:
        """The controller of the run.

        Raises:
            ValueError: for a shift that the format cannot make, or one in a run that does not recover; for layers in a
                run that does not shift.
        """
        if self.shift and not self.spec.recover:
            raise InputError("a shift needs recovery: without skipping, the first NaN poisons the parameters for good")
        return FormatController(
            dict.fromkeys(self.layers, self.spec.format) if self.layers else self.spec.format,
            policy=self.policy,
            shifter=EmergencyMantissaShift(self.nan_patience, self.stall_threshold) if self.shift else None,
            rounding=self.spec.storage_rounding if self.shift and self.spec.storage == "committed" else None,
            can_roll_back=self.spec.recover,
            learning_rate=1.0 if self.shift else None,
            scales=self.spec.scales if self.shift else None,
        )


@dataclass(frozen=True)
class StepReport:
    """What one step showed, for every run of a job.

    Attributes:
        step: which step.
        shown: its metrics.
        formats: the format each run computed the step in.
        of_layers: for each run the formats of its sites, by their names; empty where they have none of their own.
        events: what happened to each run.
    """

    step: int
    shown: Shown
    formats: tuple[str, ...]
    of_layers: tuple[Mapping[str, str], ...]
    events: tuple[tuple[Event, ...], ...]

    @property
    def metrics(self) -> Mapping[str, npt.NDArray]:
        """Arrays of shape ``(runs,)``; see :class:`~altgrad_jax.shown.Shown`."""
        return self.shown.metrics

    def numbers(self, run: int) -> dict[str, float | str]:
        """The metrics of one run, sites by their names, and the rates of its layers if it is in layers."""
        return self.shown.numbers(run, self.of_layers[run])


@dataclass
class _InFlight:
    """A step whose metrics were not read yet."""

    step: int
    metrics: StepMetrics | Mapping[str, npt.NDArray]
    formats: tuple[str, ...]
    of_layers: tuple[Mapping[str, str], ...]

    def read(self, runs: int) -> dict[str, npt.NDArray]:
        values = self.metrics._asdict() if isinstance(self.metrics, StepMetrics) else self.metrics
        return {name: np.asarray(value)[:runs] for name, value in values.items()}


class Job:
    """Drives the runs of one program from step to step.

    Args:
        program: what is static.
        plans: the runs.
        corpus: what they train on.
        batch: sequences in a batch.
        snapshot_every: steps between snapshots.
        snapshots_kept: how many are kept; a poisoned run goes back to the oldest.
        rollback_moments: whether the optimizer's moments then come back too, or start anew.
    """

    def __init__(
        self,
        program: Program,
        plans: Sequence[RunPlan],
        corpus: Corpus,
        *,
        batch: int,
        snapshot_every: int = 20,
        snapshots_kept: int = 2,
        rollback_moments: Moments = "kept",
    ) -> None:
        self.sites = tuple(program.model.site_names())
        _check_layers(plans, self.sites)
        self.plans = tuple(plans)
        self.controllers = [plan.controller() for plan in plans]
        self.step = 0
        self._program = program
        self._corpus = corpus
        self._batch = batch
        self._context = program.model.context
        self._snapshot_every = snapshot_every
        self._fleet = Fleet(
            program,
            [plan.spec for plan in plans],
            snapshots_kept=snapshots_kept,
            rollback_moments=rollback_moments,
        )
        self._pending: _InFlight | None = None
        self.state, self.snapshots = self._fleet.start(self._tokens(0))

    def run(self, until: int) -> Iterator[StepReport]:
        """Train up to (not including) step ``until``; reports come one step late, the last ones at the end."""
        while self.step < until:
            report = self.advance()
            if report is not None:
                yield report
        last = self.drain()
        if last is not None:
            yield last

    def advance(self) -> StepReport | None:
        """Dispatch one step, then report on the one before it, which has ended meanwhile or is about to."""
        faults = [fault_at(plan.injections, self.step) for plan in self.plans]
        formats = tuple(controller.format for controller in self.controllers)
        of_layers = tuple(controller.formats for controller in self.controllers)
        self.state, metrics = self._fleet.step(self.state, self._tokens(self.step), faults)
        for value in metrics:
            value.copy_to_host_async()
        earlier, self._pending = self._pending, _InFlight(self.step, metrics, formats, of_layers)
        report = None if earlier is None else self._settle(earlier, in_flight=self.step)
        self.step += 1
        if self.step % self._snapshot_every == 0:
            wanted = [controller.calm for controller in self.controllers]
            self.snapshots = self._fleet.keep_snapshot(self.snapshots, self.state, wanted)
        return report

    def drain(self) -> StepReport | None:
        """Report on the last step; its decisions still count for what comes after."""
        earlier, self._pending = self._pending, None
        return None if earlier is None else self._settle(earlier, in_flight=earlier.step)

    @property
    def reported_through(self) -> int:
        """The last step that was reported on; -1 before the first."""
        return self.step - (2 if self._pending is not None else 1)

    def evaluate(self, batches: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """Held-out loss of every run as it is now."""
        return self._fleet.evaluate(self.state, batches)

    def saved(self) -> dict[str, Any]:
        """The host's memory, JSON-ready, the metrics in flight included: what a checkpoint holds beside the arrays."""
        pending = None
        if self._pending is not None:
            values = {name: value.tolist() for name, value in self._pending.read(len(self.plans)).items()}
            formats, of_layers = list(self._pending.formats), list(self._pending.of_layers)
            pending = {"step": self._pending.step, "metrics": values, "formats": formats, "of_layers": of_layers}
        return {
            "step": self.step,
            "controllers": [controller.saved() for controller in self.controllers],
            "pending": pending,
        }

    def restore(self, saved: Mapping[str, Any], state: TrainState, snapshots: Snapshots[Recoverable]) -> None:
        """Take up what :meth:`saved` returned, with the arrays that belong to it."""
        self.step, self.state, self.snapshots = saved["step"], state, snapshots
        for controller, memory in zip(self.controllers, saved["controllers"], strict=True):
            controller.restore(memory)
        self._pending = None
        if saved["pending"] is not None:
            self._pending = _InFlight(
                saved["pending"]["step"],
                {name: np.array(values) for name, values in saved["pending"]["metrics"].items()},
                tuple(saved["pending"]["formats"]),
                tuple(saved["pending"]["of_layers"]),
            )

    def _settle(self, earlier: _InFlight, in_flight: int) -> StepReport:
        shown = Shown.of(earlier.read(len(self.plans)), self.sites, self._program.sites_of_weights)
        events, decisions = [], []
        for index, (plan, controller) in enumerate(zip(self.plans, self.controllers, strict=True)):
            seen = shown.numbers(index, earlier.of_layers[index])
            decision = controller.observe(Observation.of(earlier.step, seen), in_flight=in_flight)
            decisions.append(decision)
            events.append((*_noted(earlier.step, seen, plan), *decision.events))
        self._carry_out(decisions)
        return StepReport(earlier.step, shown, earlier.formats, earlier.of_layers, tuple(events))

    def _carry_out(self, decisions: Sequence[Decision]) -> None:
        formats = [controller.format for controller in self.controllers]
        of_layers = [controller.formats for controller in self.controllers]
        back = [decision.rollback for decision in decisions]
        if any(back):
            self.state, self.snapshots = self._fleet.roll_back(self.snapshots, self.state, back, formats, of_layers)
        elif any(decision.format or decision.formats for decision in decisions):
            self.state = self._fleet.set_formats(self.state, formats, of_layers)
        if any(decision.rounding for decision in decisions):
            roundings = [
                controller.rounding or plan.spec.storage_rounding
                for controller, plan in zip(self.controllers, self.plans, strict=True)
            ]
            self.state = self._fleet.set_roundings(self.state, roundings)
        if any(decision.learning_rate for decision in decisions):
            factors = [controller.learning_rate or 1.0 for controller in self.controllers]
            self.state = self._fleet.set_learning_rates(self.state, factors)
        if any(decision.scales for decision in decisions):
            self.state = self._fleet.set_scales(self.state, [controller.scales for controller in self.controllers])

    def _tokens(self, step: int) -> npt.NDArray[np.int32]:
        """The batch of each run: one for each seed, the same for all runs that share it."""
        drawn = {
            seed: self._corpus.batch(seed, step, self._batch, self._context)
            for seed in {plan.spec.seed for plan in self.plans}
        }
        return np.stack([spoiled(drawn[plan.spec.seed], plan.injections, step) for plan in self.plans])


def _check_layers(plans: Sequence[RunPlan], sites: Sequence[str]) -> None:
    for plan in plans:
        if plan.layers and set(plan.layers) != set(sites):
            raise InputError(f"layers are {', '.join(plan.layers)}; expected none, or all sites: {', '.join(sites)}")


def _noted(step: int, seen: Mapping[str, Any], plan: RunPlan) -> list[Event]:
    """The events that the step itself shows: what was injected, skipped or clipped."""
    events = [
        Event(step, "fault", injection.kind, {"value": injection.value})
        for injection in plan.injections
        if injection.hits(step)
    ]
    if not seen["applied"]:
        events.append(Event(step, "skip", "nan", {"loss": seen["loss"], "norm": seen["norm"]}))
    if seen["clipped"]:
        numbers = {
            "overflow_rate": seen["overflow_rate"],
            "worst_overflow_rate": seen["worst_overflow_rate"],
            "worst_overflow_site": seen["worst_overflow_site"],
            "norm": seen["norm"],
        }
        events.append(Event(step, "gate", "overflow", numbers))
    return events

"""Many runs of one program at once, on all devices: states stacked along a first axis and mapped over.

A fleet of one is a single run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import jax
import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from altgrad_core.formats import ROUNDINGS, Rounding
from altgrad_core.scaling import ScaleRule
from altgrad_core.snapshots import Moments, check_moments
from altgrad_jax.control import replace_data, set_format
from altgrad_jax.mapped import RUNS, ring_of, steps_of
from altgrad_jax.recovery import Snapshots
from altgrad_jax.state import Fault, Recoverable, RunSpec, StepMetrics, TrainState
from altgrad_jax.training import Program

Tree = TypeVar("Tree")
Value = TypeVar("Value")


class Fleet:
    """Runs that share a program.

    Args:
        program: what is static.
        runs: what distinguishes the runs; their order is the order of all results.
        devices: where to run; all devices by default, but not more than there are runs.
        snapshots_kept: snapshots of each run.
        rollback_moments: whether a rollback brings back the optimizer's moments or has them start anew.

    Raises:
        ValueError: for a fleet without runs.
        InputError: for snapshots or moments that cannot be.
    """

    def __init__(
        self,
        program: Program,
        runs: Sequence[RunSpec],
        devices: Sequence[jax.Device] | None = None,
        *,
        snapshots_kept: int = 2,
        rollback_moments: Moments = "kept",
    ) -> None:
        if not runs:
            raise ValueError("a fleet needs at least one run")
        check_moments(rollback_moments)
        self.program = program
        self.runs = tuple(runs)
        chosen = list(jax.devices() if devices is None else devices)[: len(runs)]
        self._mesh = Mesh(np.array(chosen), (RUNS,))
        # shard_map wants equal shares: the last run is repeated to fill them up, and its copies are never shown.
        self._padded = -(-len(runs) // len(chosen)) * len(chosen)
        self._steps = steps_of(program, self._mesh)
        self._ring = ring_of(program, self._mesh, snapshots_kept, rollback_moments)

    def start(self, calibration: npt.NDArray[np.int32]) -> tuple[TrainState, Snapshots[Recoverable]]:
        """States before the first step, their scales calibrated, and snapshots of them.

        Args:
            calibration: int32 ``(runs, batch, context + 1)``, the batch of each run's first step.
        """
        seeds = sorted({run.seed for run in self.runs})
        drawn = {seed: self.program.fresh_params(seed) for seed in seeds}
        params = self._stacked([drawn[run.seed] for run in self.runs])
        data = self._stacked([self.program.run_data(run) for run in self.runs])
        state = self._steps.start(params, data, self._spread(calibration))
        return state, self._ring.first(state)

    def step(
        self, state: TrainState, tokens: npt.NDArray[np.int32], faults: Sequence[Fault]
    ) -> tuple[TrainState, StepMetrics]:
        """One step of every run. ``state`` is donated; the metrics, with a first axis of padded runs, are outputs.

        Args:
            state: as returned by the step before.
            tokens: int32 ``(runs, batch, context + 1)``.
            faults: one for each run.
        """
        kinds = (np.float32, bool, np.float32, bool, np.float32)
        columns = zip(zip(*faults, strict=True), kinds, strict=True)
        fault = Fault(*(np.array(list(values)).astype(kind) for values, kind in columns))
        return self._steps.train(state, self._spread(tokens), jax.tree.map(self._spread, fault))

    def evaluate(self, state: TrainState, batches: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """Loss of every run on the same int32 ``(count, batch, context + 1)`` held-out batches."""
        everyone = np.broadcast_to(batches, (len(self.runs), *batches.shape))
        return np.asarray(self._steps.evaluate(state, self._spread(everyone)))[: len(self.runs)]

    def keep_snapshot(
        self, snapshots: Snapshots[Recoverable], state: TrainState, wanted: Sequence[bool]
    ) -> Snapshots[Recoverable]:
        """Keep the states of the runs that are wanted and sound. ``snapshots`` are donated."""
        return self._ring.keep(snapshots, state, self._spread(np.array(wanted)))

    def roll_back(
        self,
        snapshots: Snapshots[Recoverable],
        state: TrainState,
        chosen: Sequence[bool],
        formats: Sequence[str],
        of_layers: Sequence[Mapping[str, str]] | None = None,
    ) -> tuple[TrainState, Snapshots[Recoverable]]:
        """Send the chosen runs back to their oldest snapshots, in the formats given. Both arguments are donated."""
        state, snapshots = self._ring.roll_back(snapshots, state, self._spread(np.array(chosen)))
        return self.set_formats(state, formats, of_layers), snapshots

    def set_formats(
        self, state: TrainState, formats: Sequence[str], of_layers: Sequence[Mapping[str, str]] | None = None
    ) -> TrainState:
        """Write the format of every run into the state: a few numbers, and nothing compiles.

        Args:
            state: of the fleet.
            formats: one for each run.
            of_layers: for each run the formats of sites that have one of their own, by their names.
        """
        state = set_format(state, self._repeated(formats))
        if of_layers is None or not any(of_layers):
            return state
        names = self.program.model.site_names()
        at_sites = [[own.get(name, all_) for name in names] for all_, own in zip(formats, of_layers, strict=True)]
        return self.program.with_formats(state, self._repeated(at_sites))

    def set_roundings(self, state: TrainState, roundings: Sequence[Rounding]) -> TrainState:
        """Write how every run rounds its committed weights."""
        codes = np.array([ROUNDINGS.index(each) for each in roundings])
        storage = state.run.storage
        rounded = replace(storage, rounding=replace_data(storage.rounding, self._fill(codes)))
        return replace(state, run=replace(state.run, storage=rounded))

    def set_learning_rates(self, state: TrainState, factors: Sequence[float]) -> TrainState:
        """Write the factor on every run's learning rate into the state."""
        filled = self._fill(np.array(factors, np.float32))
        return replace(state, run=replace(state.run, learning_rate=replace_data(state.run.learning_rate, filled)))

    def set_scales(self, state: TrainState, rules: Sequence[ScaleRule | None]) -> TrainState:
        """Write where the scales of every run come from; None for where they came from at the start."""
        now = [rule or run.scales for rule, run in zip(rules, self.runs, strict=True)]
        static = np.array([rule == "static" for rule in now])
        repair = np.array([rule == "repaired" or run.repair_scales for rule, run in zip(now, self.runs, strict=True)])
        switches = state.run.switches
        switched = replace(
            switches,
            static_scales=replace_data(switches.static_scales, self._fill(static)),
            repair_scales=replace_data(switches.repair_scales, self._fill(repair)),
        )
        return replace(state, run=replace(state.run, switches=switched))

    def _repeated(self, values: Sequence[Value]) -> list[Value]:
        return [*values, *[values[-1]] * (self._padded - len(values))]

    def _fill(self, values: npt.NDArray) -> npt.NDArray:
        missing = self._padded - len(values)
        return np.concatenate([values, np.repeat(values[-1:], missing, axis=0)]) if missing else values

    def _spread(self, values: npt.NDArray) -> jax.Array:
        return jax.device_put(self._fill(np.asarray(values)), NamedSharding(self._mesh, PartitionSpec(RUNS)))

    def _stacked(self, trees: Sequence[Tree]) -> Tree:
        return jax.tree.map(lambda *leaves: self._spread(np.stack([np.asarray(leaf) for leaf in leaves])), *trees)

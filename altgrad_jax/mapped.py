"""What fleets compile: functions of one run, mapped over all of them and shared by all fleets of a program.

``shard_map`` gives each device its share of the runs and ``lax.map`` takes them one after another, which on a CPU beats
``vmap``: a run's arrays stay in the cache, and a branch not taken is not computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from altgrad_core.snapshots import Moments
from altgrad_jax.recovery import Snapshots, rollback, select_if_finite, snapshot
from altgrad_jax.state import Params, Recoverable, RunData, StepMetrics, TrainState
from altgrad_jax.training import Program

Result = TypeVar("Result")

RUNS = "runs"
"""The mesh axis over which runs are spread."""

_KEPT = 8


@dataclass(frozen=True)
class Steps:
    """Training, each function compiled when it is first called with new shapes.

    Attributes:
        start: parameters, run data and a batch to a state before its first step; see :meth:`Program.start`.
        train: a state, donated, a batch and faults to the next state and metrics; see :meth:`Program.step`.
        evaluate: a state and batches to the mean loss; see :meth:`Program.evaluate`.
    """

    start: Callable[..., TrainState]
    train: Callable[..., tuple[TrainState, StepMetrics]]
    evaluate: Callable[..., jax.Array]


@dataclass(frozen=True)
class Ring:
    """Snapshots, likewise.

    Attributes:
        first: a state to its first snapshots.
        keep: snapshots, donated, a state and whether it is wanted to the next snapshots.
        roll_back: snapshots and a state, both donated, and whether to go back to both as they then are.
    """

    first: Callable[[TrainState], Snapshots[Recoverable]]
    keep: Callable[..., Snapshots[Recoverable]]
    roll_back: Callable[..., tuple[TrainState, Snapshots[Recoverable]]]


@lru_cache(_KEPT)
def steps_of(program: Program, mesh: Mesh) -> Steps:
    """How a program trains on the devices of a mesh."""

    def start(params: Params, data: RunData, tokens: jax.Array) -> TrainState:
        return program.calibrate(program.start(params, data), tokens)

    return Steps(_mapped(start, mesh), _mapped(program.step, mesh, donate=(0,)), _mapped(program.evaluate, mesh))


@lru_cache(_KEPT)
def ring_of(program: Program, mesh: Mesh, kept: int, moments: Moments) -> Ring:
    """How a program's snapshots are kept, ``kept`` of them, and gone back to."""

    def keep(snapshots: Snapshots[Recoverable], state: TrainState, wanted: jax.Array) -> Snapshots[Recoverable]:
        return snapshot(snapshots, state.recoverable, wanted & state.sound)

    def roll_back(
        snapshots: Snapshots[Recoverable], state: TrainState, chosen: jax.Array
    ) -> tuple[TrainState, Snapshots[Recoverable]]:
        recovered, left = rollback(snapshots, state.recoverable, chosen)
        if moments == "reset":
            anew = program.reset_moments(state, recovered.params)
            recovered = recovered._replace(opt_state=select_if_finite(chosen, anew, state.opt_state))
        return state.recovered(recovered), left

    return Ring(
        _mapped(lambda state: Snapshots.of(state.recoverable, kept), mesh),
        _mapped(keep, mesh, donate=(0,)),
        _mapped(roll_back, mesh, donate=(0, 1)),
    )


def _mapped(function: Callable[..., Result], mesh: Mesh, donate: tuple[int, ...] = ()) -> Callable[..., Result]:
    """A function of one run, for all of them: each device takes its share in turn."""

    def share(*stacked: object) -> Result:
        return jax.lax.map(lambda each: function(*each), stacked)

    spec = PartitionSpec(RUNS)
    mapped = jax.shard_map(share, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    # Named, since on one device XLA knows of no share, and a result that lost its sharding compiles its taker anew.
    return jax.jit(mapped, donate_argnums=donate, out_shardings=NamedSharding(mesh, spec))

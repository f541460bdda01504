"""What a training run is made of: what distinguishes it, what it carries from step to step, what a step shows."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import jax
import optax

from altgrad_core.formats import Overflow
from altgrad_core.scaling import ScaleRule
from altgrad_jax.params import FormatParams
from altgrad_jax.schedules import Schedule

Params = dict[str, Any]
"""The parameters of a model: nested dicts of float32 arrays, as ``nnx.to_pure_dict`` gives them."""

Storage = Literal["master", "committed"]
StorageRounding = Literal["nearest_even", "stochastic"]
Scaling = Literal["delayed", "static"]


@dataclass(frozen=True)
class RunSpec:
    """What distinguishes one run from another of the same program; all of it becomes data.

    Attributes:
        format: name of the format.
        seed: of weights, batches and stochastic rounding.
        storage: float32 ``master`` weights, cast at use, or weights ``committed`` to the grid after every step.
        storage_rounding: how committed weights are rounded; without effect on masters.
        operand_overflow: what overflow becomes in operands.
        gradient_overflow: what overflow becomes in gradients.
        clip: whether the partition-relative clipper may act.
        recover: whether non-finite steps are skipped.
        scaling: ``delayed`` power-of-two scales from amax histories, or ``static`` ones of 1.
        refuse_spikes: whether a run that recovers keeps steps with a spike of the norm out of its amax history.
        calibrate: whether the amax history is filled from one batch before step 0, which otherwise runs at scale 1.
        repair_scales: whether the scale of a cast that saturates is doubled for the next step.
        schedule: of the learning rate.
        learning_rate: a factor on the scheduled learning rate.
    """

    format: str
    seed: int = 0
    storage: Storage = "master"
    storage_rounding: StorageRounding = "nearest_even"
    operand_overflow: Overflow = "saturate_finite"
    gradient_overflow: Overflow = "saturate_finite"
    clip: bool = True
    recover: bool = True
    scaling: Scaling = "delayed"
    refuse_spikes: bool = True
    calibrate: bool = True
    repair_scales: bool = False
    schedule: Schedule = field(default_factory=Schedule)
    learning_rate: float = 1.0

    @property
    def scales(self) -> ScaleRule:
        """Where scales come from. Static ones may be repaired, too: that goes on whatever they become."""
        if self.scaling == "static":
            return "static"
        return "repaired" if self.repair_scales else "delayed"


class Fault(NamedTuple):
    """A fault to inject into one step. Neutral by default.

    Attributes:
        loss_factor: float32, multiplies the loss: NaN for a NaN batch, 1e4 for a spike.
        poison: bool, whether to overwrite a weight before the step.
        weight: float32, with what.
        corrupt: bool, whether to overwrite one element of the gradient.
        gradient: float32, with what.
    """

    loss_factor: jax.typing.ArrayLike = 1.0
    poison: jax.typing.ArrayLike = False
    weight: jax.typing.ArrayLike = 0.0
    corrupt: jax.typing.ArrayLike = False
    gradient: jax.typing.ArrayLike = 0.0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Switches:
    """What a run does, as bool scalars; see :class:`RunSpec`."""

    clip: jax.Array
    recover: jax.Array
    committed: jax.Array
    static_scales: jax.Array
    refuse_spikes: jax.Array
    calibrate: jax.Array
    repair_scales: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RunData:
    """What distinguishes one run from another, as data.

    Attributes:
        operand: formats of operands, ``(sites,)``.
        gradient: formats of gradients, ``(sites,)``.
        storage: formats ``(weights,)`` and rounding of committed weights, in the order of the parameters' leaves.
        switches: what the run does.
        seed: uint32, of stochastic rounding.
        schedule: of the learning rate.
        learning_rate: float32, the factor on the scheduled learning rate; 1 is the schedule itself.
    """

    operand: FormatParams
    gradient: FormatParams
    storage: FormatParams
    switches: Switches
    seed: jax.Array
    schedule: Schedule
    learning_rate: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that a run carries from step to step.

    Attributes:
        params: pytree of float32 parameters.
        opt_state: optax state; the clipper's and the stall monitor's formats are in it.
        amax_history: float32 ``(window, sites, 3)``.
        norm_history: float32 ``(32,)``, raw gradient norms of applied steps, newest last, 0 where empty.
        widening: float32 ``(sites, 3)``, powers of two by which scales are larger than their histories say; all 1
            unless scales are repaired.
        run: formats and switches.
        step: int32, steps taken, skipped ones included.
        sound: bool, whether the last step was finite and left finite parameters: fit for a snapshot.
    """

    params: Params
    opt_state: optax.OptState
    amax_history: jax.Array
    norm_history: jax.Array
    widening: jax.Array
    run: RunData
    step: jax.Array
    sound: jax.Array

    @property
    def recoverable(self) -> Recoverable:
        """The part that snapshots keep and a rollback brings back."""
        return Recoverable(self.params, self.opt_state, self.amax_history, self.norm_history, self.widening)

    def recovered(self, kept: Recoverable) -> TrainState:
        """This state with that part replaced; the step, the formats of the casts and the switches go on."""
        return replace(self, **kept._asdict())


class Recoverable(NamedTuple):
    """What a rollback brings back; see :class:`TrainState`."""

    params: Params
    opt_state: optax.OptState
    amax_history: jax.Array
    norm_history: jax.Array
    widening: jax.Array


class StepMetrics(NamedTuple):
    """What one step saw: float32 scalars unless said otherwise.

    Attributes:
        loss: training loss, with injected faults.
        finite: bool, loss and all gradients.
        params_finite: bool, the parameters after the step.
        applied: bool, whether the step was taken rather than skipped.
        norm: raw global norm of the gradients.
        clipped: bool, whether the clipper's gate was open.
        overflow_rate: of all gradient casts pooled: what feeds the gate.
        underflow_rate: of all gradient casts pooled.
        operand_overflow_rate: of all operand casts pooled.
        operand_underflow_rate: of all operand casts pooled.
        stall_rate: of the real update on the weights' grid.
        saturation_rate: the part of it that stalled at ±max.
        amax_refused: bool, whether the step's amax was kept out of the history.
        overflow_rates: ``(sites, 3)``, of each cast.
        underflow_rates: ``(sites, 3)``, of each cast.
        stall_rates: ``(weights,)``, of each weight that is an operand; see :attr:`Program.sites_of_weights`.
        saturation_rates: ``(weights,)``, likewise.
    """

    loss: jax.Array
    finite: jax.Array
    params_finite: jax.Array
    applied: jax.Array
    norm: jax.Array
    clipped: jax.Array
    overflow_rate: jax.Array
    underflow_rate: jax.Array
    operand_overflow_rate: jax.Array
    operand_underflow_rate: jax.Array
    stall_rate: jax.Array
    saturation_rate: jax.Array
    amax_refused: jax.Array
    overflow_rates: jax.Array
    underflow_rates: jax.Array
    stall_rates: jax.Array
    saturation_rates: jax.Array

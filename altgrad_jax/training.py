"""The training job as pure functions: one step of a GPT in a format, everything that may change being data.

The order of a step is: cast, count, finite?, gate and clip, optimizer, stall of the real update, commit, metrics. A
:class:`Program` holds what is static (shapes, optimizer, cast path); a :class:`TrainState` holds the rest, formats and
switches included, so that one compiled step serves every run of a study.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from altgrad_core.clip_rules import NORMS_NEEDED, ClipRule
from altgrad_core.formats import CastPath, Overflow, parse
from altgrad_core.health import NORM_WINDOW
from altgrad_core.settings import SPIKE_FACTOR
from altgrad_jax.clipping import clip_by_global_norm, partition_relative_clip
from altgrad_jax.control import set_format
from altgrad_jax.models import GPT, Casts, GPTConfig, next_token_loss
from altgrad_jax.nn.products import GRADIENT, RHS, Grid, Record, empty_record, read_record
from altgrad_jax.norms import global_norm
from altgrad_jax.params import FormatParams
from altgrad_jax.recovery import all_finite, commit, reset_moments, select_if_finite
from altgrad_jax.scaling import amax, empty_history, power_of_two_scale, push_amax
from altgrad_jax.state import Fault, Params, RunData, RunSpec, StepMetrics, Switches, TrainState
from altgrad_jax.statistics import CastCounts, amax_of_tallies, stall_monitor

_CALIBRATION_PASSES = 4
_SATURATES_FROM = 0.01
_WIDEST = 2.0**40

JobClipRule = ClipRule | Literal["ungated"]
"""The rules of the partition-relative clipper, or plain clipping by the global norm at every step."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW behind the clipper; its learning rate follows the schedule of the run.

    Attributes:
        weight_decay: on matrices only.
        beta2: decay of the second moment.
        clip_rule: what the clipper's threshold follows, or ``ungated`` for plain clipping to ``base_clip``.
        base_clip: threshold on the global norm that E5M2 would have; for other rules what they multiply.
        overflow_threshold: pooled overflow rate of the gradient casts that opens the clipper's gate.
    """

    weight_decay: float = 0.01
    beta2: float = 0.99
    clip_rule: JobClipRule = "max"
    base_clip: float = 1.0
    overflow_threshold: float = 0.01


@dataclass(frozen=True)
class Program:
    """The static half of a training job.

    Attributes:
        model: shape of the GPT.
        optimizer: the optimizer.
        path: cast path of the runs' formats: ``fast`` for the 8-bit ones, ``identity`` for float32.
        bf16_operands: hand operands to the products as bfloat16: the bf16 control.
        amax_window: steps of amax history.
    """

    model: GPTConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    path: CastPath = "fast"
    bf16_operands: bool = False
    amax_window: int = 16

    @classmethod
    def for_format(
        cls, format: str, model: GPTConfig, optimizer: OptimizerConfig | None = None, amax_window: int = 16
    ) -> Program:
        """The program that can train in a format, and in all others of its cast path."""
        resolved = parse(format)
        return cls(model, optimizer or OptimizerConfig(), resolved.cast_path, resolved == parse("bf16"), amax_window)

    def fresh_params(self, seed: int) -> Params:
        """Newly drawn parameters, as a nested dict of float32 arrays (not under jit)."""
        return nnx.to_pure_dict(nnx.state(GPT(self.model, nnx.Rngs(seed)), nnx.Param))

    def run_data(self, run: RunSpec) -> RunData:
        """What a run brings as data.

        Raises:
            ValueError: for a format that this program's cast path does not serve.
        """
        storage_path: CastPath = "identity" if self.path == "identity" else "integer"
        return RunData(
            operand=self._at_sites(run.format, run.operand_overflow),
            gradient=self._at_sites(run.format, run.gradient_overflow),
            storage=FormatParams.from_format(
                run.format, rounding=run.storage_rounding, overflow="saturate_finite", path=storage_path
            ).for_each(len(self.sites_of_weights)),
            switches=Switches(
                clip=jnp.asarray(run.clip),
                recover=jnp.asarray(run.recover),
                committed=jnp.asarray(run.storage == "committed"),
                static_scales=jnp.asarray(run.scaling == "static"),
                refuse_spikes=jnp.asarray(run.recover and run.refuse_spikes),
                calibrate=jnp.asarray(run.calibrate),
                repair_scales=jnp.asarray(run.repair_scales),
            ),
            seed=jnp.uint32(run.seed),
            schedule=run.schedule.on_device(),
            learning_rate=jnp.float32(run.learning_rate),
        )

    def _at_sites(self, format: str, overflow: Overflow) -> FormatParams:
        return FormatParams.from_format(format, overflow=overflow, path=self.path).for_each(self.model.sites)

    def start(self, params: Params, run: RunData) -> TrainState:
        """The state of a run before its first step: pure. Its scales are not calibrated yet, see :meth:`calibrate`."""
        state = TrainState(
            params=params,
            opt_state=self._optimizer(run).init(params),
            amax_history=empty_history(self.amax_window, (self.model.sites, 3)),
            norm_history=empty_history(NORM_WINDOW),
            widening=jnp.ones((self.model.sites, 3), jnp.float32),
            run=run,
            step=jnp.int32(0),
            sound=jnp.asarray(True),
        )
        return replace(state, params=self._store(state, params))

    def step(self, state: TrainState, tokens: jax.Array, fault: Fault) -> tuple[TrainState, StepMetrics]:
        """One training step: pure, to be jitted (with ``state`` donated), mapped over runs or sharded.

        Args:
            state: the run so far.
            tokens: int32 ``(batch, context + 1)``.
            fault: what to break; ``Fault()`` for nothing.

        Returns:
            The new state, and the metrics, which do not alias it.
        """
        state = replace(state, params=_with_one_weight(state.params, fault.poison, fault.weight))
        record = empty_record(self.model.sites)
        casts = self.casts(state, record)

        def loss_of(params: Params) -> jax.Array:
            return self.loss(params, tokens, casts) * fault.loss_factor

        loss, gradients = jax.value_and_grad(loss_of)(state.params)
        gradients = _with_one_weight(gradients, fault.corrupt, fault.gradient)
        seen = _Seen.of(record)
        norm = global_norm(gradients)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, opt_state = self._optimizer(state.run).update(
            gradients,
            state.opt_state,
            state.params,
            # A rate below every threshold keeps the gate shut, where the run does not clip.
            overflow_rate=jnp.where(state.run.switches.clip, seen.gradient_overflow_rate, -1),
            total_norm=norm,
        )
        refused = state.run.switches.refuse_spikes & _is_spike(norm, state.norm_history)
        moved = replace(
            state,
            params=self._store(state, cast(Params, optax.apply_updates(state.params, updates))),
            opt_state=opt_state,
            amax_history=jnp.where(refused, state.amax_history, push_amax(state.amax_history, seen.amax)),
            norm_history=push_amax(state.norm_history, norm),
            widening=_repaired(state, seen.overflow_rates),
        )
        applied = finite | ~state.run.switches.recover
        new = select_if_finite(applied, moved, state)
        params_finite = all_finite(new.params)
        new = replace(new, step=state.step + 1, sound=finite & params_finite)
        return new, self._metrics(loss, finite, params_finite, applied, norm, refused, seen, moved)

    def with_formats(self, state: TrainState, formats: Sequence[Sequence[str]]) -> TrainState:
        """The states of several runs with a format for each site; the clipper's is left as it is. Nothing compiles.

        Args:
            state: with a leading axis of runs.
            formats: for each run one for each site.
        """
        of_weights = [[of_run[site] for site in self.sites_of_weights] for of_run in formats]
        *others, monitor = cast(tuple[optax.OptState, ...], state.opt_state)
        run = replace(
            state.run,
            operand=set_format(state.run.operand, formats),
            gradient=set_format(state.run.gradient, formats),
            storage=set_format(state.run.storage, of_weights),
        )
        return replace(state, run=run, opt_state=(*others, set_format(monitor, of_weights)))

    def reset_moments(self, state: TrainState, params: Params) -> optax.OptState:
        """The optimizer state with new moments for ``params``; see :func:`altgrad_jax.recovery.reset_moments`."""
        return reset_moments(self._optimizer(state.run), state.opt_state, params)

    def calibrate(self, state: TrainState, tokens: jax.Array) -> TrainState:
        """Fill the amax history from one batch, so that step 0 does not run at scale 1. Changes nothing else.

        A few passes over the same batch, each under the scales of the one before: what a wrong scale upstream has
        distorted is measured right in the next.
        """

        def measure(history: jax.Array, _: None) -> tuple[jax.Array, None]:
            record = empty_record(self.model.sites)
            casts = self.casts(replace(state, amax_history=history), record)
            jax.grad(lambda params: self.loss(params, tokens, casts))(state.params)
            amax = _Seen.of(record).amax
            kept = jnp.where(jnp.isfinite(amax), amax, history[-1])
            return jnp.broadcast_to(kept, history.shape), None

        history, _ = jax.lax.scan(measure, state.amax_history, length=_CALIBRATION_PASSES)
        return replace(state, amax_history=jnp.where(state.run.switches.calibrate, history, state.amax_history))

    def evaluate(self, state: TrainState, batches: jax.Array) -> jax.Array:
        """Mean loss over int32 ``(count, batch, context + 1)`` batches, cast as in training: float32 scalar."""
        casts = self.casts(state, None)
        return jnp.mean(jax.lax.map(lambda tokens: self.loss(state.params, tokens, casts), batches))

    @cached_property
    def _graph(self) -> tuple[nnx.GraphDef[GPT], nnx.State]:
        return nnx.split(nnx.eval_shape(lambda: GPT(self.model, nnx.Rngs(0))))

    @cached_property
    def _matmul_weights(self) -> Params:
        """Which parameters are operands of products: those may be committed, and their updates may stall."""
        return jax.tree.map_with_path(
            lambda path, _: str(getattr(path[-1], "key", "")) == "weight", nnx.to_pure_dict(self._graph[1])
        )

    @cached_property
    def sites_of_weights(self) -> tuple[int, ...]:
        """The site of each parameter that is an operand of a product, in the order of the parameters' leaves."""
        site_of = {path: site for site, path in self.model.weight_sites.items()}
        leaves = jax.tree.leaves_with_path(nnx.to_pure_dict(self._graph[1]))
        modules = [tuple(getattr(key, "key", None) for key in path[:-1]) for path, _ in leaves]
        return tuple(site_of[module] for module in modules if module in site_of)

    def loss(self, params: Params, tokens: jax.Array, casts: Casts) -> jax.Array:
        """Loss on one batch of int32 ``(batch, context + 1)`` tokens, under the casts given."""
        graph, template = self._graph
        filled = jax.tree.map(lambda leaf: leaf, template)
        nnx.replace_by_pure_dict(filled, params)
        return next_token_loss(nnx.merge(graph, filled)(tokens[:, :-1], casts), tokens[:, 1:])

    def casts(self, state: TrainState, record: Record | None) -> Casts:
        """By what a step casts: delayed scales for activations and gradients; weights have that of their own amax.

        Args:
            state: the run so far.
            record: where the casts write what they see; None for nowhere.
        """
        amaxes = jnp.max(state.amax_history, axis=0)
        sites = jnp.array(list(self.model.weight_sites))
        of_weights = [amax(_module(state.params, path)["weight"]) for path in self.model.weight_sites.values()]
        scales = power_of_two_scale(
            amaxes.at[sites, RHS].set(jnp.stack(of_weights)), state.run.operand.max_value[:, None]
        )
        scales = jnp.where(state.run.switches.static_scales, 1, scales) * state.widening
        return Casts(
            operands=Grid.of(state.run.operand, scales[:, :GRADIENT]),
            gradients=Grid.of(state.run.gradient, scales[:, GRADIENT]),
            record=record,
            operand_dtype=jnp.dtype(jnp.bfloat16) if self.bf16_operands else None,
        )

    def _optimizer(self, run: RunData) -> optax.GradientTransformationExtraArgs:
        """Clipper, AdamW, stall monitor; the format matters to ``init`` alone, which puts it into the state.

        The factor on the learning rate scales the step size and not the updates: a product with these would be rounded
        before it is added to the parameters, also by a factor of 1, where otherwise both happen in one operation.
        """
        config = self.optimizer
        return optax.chain(
            self._clipper(run),
            optax.adamw(
                lambda count: run.schedule(count) * run.learning_rate,
                b2=config.beta2,
                weight_decay=config.weight_decay,
                mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim >= 2, params),
            ),
            stall_monitor(run.operand.at(self.sites_of_weights), self._matmul_weights),
        )

    def _clipper(self, run: RunData) -> optax.GradientTransformationExtraArgs:
        config = self.optimizer
        if config.clip_rule == "ungated":
            return clip_by_global_norm(jnp.where(run.switches.clip, config.base_clip, jnp.inf))
        window = self.amax_window if config.clip_rule == "scaled_max" else 1
        return partition_relative_clip(
            run.operand.at(0), config.base_clip, config.overflow_threshold, rule=config.clip_rule, window=window
        )

    def _store(self, state: TrainState, params: Params) -> Params:
        if self.path == "identity":
            return params
        seed, step = state.run.seed, state.step
        return jax.lax.cond(
            state.run.switches.committed,
            lambda: commit(params, state.run.storage, self._matmul_weights, seed=seed, step=step),
            lambda: params,
        )

    def _metrics(
        self,
        loss: jax.Array,
        finite: jax.Array,
        params_finite: jax.Array,
        applied: jax.Array,
        norm: jax.Array,
        refused: jax.Array,
        seen: _Seen,
        moved: TrainState,
    ) -> StepMetrics:
        opt_state, clip = moved.opt_state, moved.run.switches.clip
        return StepMetrics(
            loss=loss,
            finite=finite,
            params_finite=params_finite,
            applied=applied,
            norm=norm,
            clipped=optax.tree.get(opt_state, "clipped", clip & (norm > self.optimizer.base_clip)),
            overflow_rate=seen.gradient_overflow_rate,
            underflow_rate=seen.gradient_underflow_rate,
            operand_overflow_rate=seen.operand_overflow_rate,
            operand_underflow_rate=seen.operand_underflow_rate,
            stall_rate=optax.tree.get(opt_state, "stall_rate"),
            saturation_rate=optax.tree.get(opt_state, "saturation_rate"),
            amax_refused=refused,
            overflow_rates=seen.overflow_rates,
            underflow_rates=seen.underflow_rates,
            stall_rates=optax.tree.get(opt_state, "stall_rates"),
            saturation_rates=optax.tree.get(opt_state, "saturation_rates"),
        )


class _Seen(NamedTuple):
    """What a record held at the end of a step."""

    amax: jax.Array
    overflow_rates: jax.Array
    underflow_rates: jax.Array
    gradient_overflow_rate: jax.Array
    gradient_underflow_rate: jax.Array
    operand_overflow_rate: jax.Array
    operand_underflow_rate: jax.Array

    @classmethod
    def of(cls, record: Record) -> _Seen:
        tallies = read_record(record)
        limbs = CastCounts.of_tallies(tallies).limbs
        pooled = [CastCounts(some).pooled().limbs[None] for some in (limbs[:, GRADIENT], limbs[:, :GRADIENT])]
        # All rates at once, since each quotient by itself would be compiled by itself.
        counts = CastCounts(jnp.concatenate([limbs.reshape(-1, *limbs.shape[2:]), *pooled]))
        overflow, underflow = counts.overflow_rate, counts.underflow_rate
        return cls(
            amax_of_tallies(tallies),
            overflow_rates=overflow[:-2].reshape(limbs.shape[:2]),
            underflow_rates=underflow[:-2].reshape(limbs.shape[:2]),
            gradient_overflow_rate=overflow[-2],
            gradient_underflow_rate=underflow[-2],
            operand_overflow_rate=overflow[-1],
            operand_underflow_rate=underflow[-1],
        )


def _module(params: Params, path: tuple[str | int, ...]) -> Params:
    found: Any = params
    for key in path:  # an NNX list has integer keys
        found = found[key]
    return found


def _with_one_weight(params: Params, hit: jax.typing.ArrayLike, value: jax.typing.ArrayLike) -> Params:
    """Overwrite one weight of the first block's perceptron, or its gradient, if it is hit."""
    weight = params["blocks"][0]["up"]["weight"]
    weight = weight.at[0, 0].set(jnp.where(hit, value, weight[0, 0]))
    first = {**params["blocks"][0], "up": {**params["blocks"][0]["up"], "weight": weight}}
    return {**params, "blocks": {**params["blocks"], 0: first}}


def _repaired(state: TrainState, overflow_rates: jax.Array) -> jax.Array:
    """Twice the scale where a cast saturates. Delayed scales follow what they saw, once nothing saturates any more."""
    saturates = state.run.switches.repair_scales & (overflow_rates >= _SATURATES_FROM)
    kept = jnp.where(state.run.switches.static_scales, state.widening, jnp.where(overflow_rates > 0, state.widening, 1))
    return jnp.where(saturates, jnp.minimum(2 * state.widening, _WIDEST), kept)


def _is_spike(norm: jax.Array, history: jax.Array) -> jax.Array:
    """Whether a norm is more than ten times the median of those in the history, once that holds eight."""
    count = jnp.sum(history > 0)
    ordered = jnp.sort(jnp.where(history > 0, history, jnp.inf))
    median = ordered[jnp.maximum(count - 1, 0) // 2]
    return (count >= NORMS_NEEDED) & (norm > SPIKE_FACTOR * median)

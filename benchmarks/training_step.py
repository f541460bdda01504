"""A training step with every operand and gradient cast and every count on, against the plain float32 step.

The plain step is the same GPT and AdamW with ``lax.dot_general`` in the place of the quantised products, and no
clipper, no monitor, no skipping: what one would write without AltGrad. The goal for it holds for casts and counts; what
the interventions cost beside them is measured against a step that casts and does nothing else, and snapshots against
blocks of steps without one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import jax
import jax.numpy as jnp
import optax

from altgrad_jax import SnapshotKeeper
from altgrad_jax.data import load_corpus
from altgrad_jax.models import GPTConfig
from altgrad_jax.nn.products import GRADIENT, empty_record, read_record
from altgrad_jax.scaling import push_amax
from altgrad_jax.schedules import Schedule
from altgrad_jax.state import Fault, Params, RunSpec, StepMetrics, TrainState
from altgrad_jax.statistics import CastCounts, amax_of_tallies
from altgrad_jax.training import Program
from benchmarks.page import write_page
from benchmarks.timing import Comparison, side_by_side

_SHAPES = {
    "the demo's GPT: 2 layers of 64, 8 x 32 characters": (8, 32, 2, 64),
    "altgrad train's: 2 layers of 64, 16 x 64 characters": (16, 64, 2, 64),
    "2 layers of 256, 16 x 64 characters": (16, 64, 2, 256),
}
_STEPS = 300
_BLOCK = 50


class _PlainProducts:
    """Stands in for :class:`~altgrad_jax.models.Casts`."""

    def dot_general(self, site: int) -> Callable[..., jax.Array]:
        return jax.lax.dot_general


def main() -> None:
    for comparison in comparisons():
        comparison.show()


def comparisons() -> Iterator[Comparison]:
    """One after the other, measured when asked for."""
    for label, (batch, context, layers, width) in _SHAPES.items():
        corpus = load_corpus(None, context)
        tokens = jnp.asarray(corpus.batch(0, 0, batch, context))
        shape = GPTConfig(len(corpus.vocabulary), context, layers, width, 4)
        contestants, goals = {"plain float32": _plain(shape, tokens)}, {}
        for name in ("E0M7", "E5M2", "E7M0"):
            counted = f"{name}: casts and counts"
            contestants |= {counted: _casting(name, shape, tokens, count=True), name: _ours(name, shape, tokens)}
            goals[counted] = 1 / 1.15
        contestants |= {name: _ours(name, shape, tokens) for name in ("float32", "bf16")}
        yield Comparison(label, "plain float32", side_by_side(contestants, rounds=60), goals)
        casts, everything = "casts alone", "with skip, counts, clip and stall"
        contestants = {casts: _casting("E5M2", shape, tokens, count=False), everything: _ours("E5M2", shape, tokens)}
        timings = side_by_side(contestants, rounds=60)
        yield Comparison(f"E5M2, {label}: the interventions", casts, timings, {everything: 1 / 1.10})
    without, kept = f"{_BLOCK} steps", f"{_BLOCK} steps and a snapshot"
    contestants = {without: _block(shape, tokens, snapshots=False), kept: _block(shape, tokens, snapshots=True)}
    timings = side_by_side(contestants, rounds=8, warmup=1)
    yield Comparison(f"E5M2, {label}: snapshots", without, timings, {kept: 1 / 1.02})


def _block(shape: GPTConfig, tokens: jax.Array, *, snapshots: bool) -> Callable[[], object]:
    once = _ours("E5M2", shape, tokens)
    keeper: SnapshotKeeper | None = None
    step = 0

    def block() -> object:
        nonlocal keeper, step
        for _ in range(_BLOCK):
            state, metrics = once()
            if snapshots:
                keeper = keeper or SnapshotKeeper(state, every=_BLOCK, keep=2)
                keeper.offer(step, state, metrics.finite & metrics.params_finite)
            step += 1
        return state

    return block


def _casting(name: str, shape: GPTConfig, tokens: jax.Array, *, count: bool) -> Callable[[], object]:
    """The step of a job without what guards it: casts and AdamW; if it counts, rates and delayed scales that follow."""
    program = Program.for_format(name, shape)
    state = program.start(program.fresh_params(0), program.run_data(RunSpec(name, schedule=Schedule(_STEPS))))
    optimizer = _adamw(state.params)
    params, opt_state = state.params, optimizer.init(state.params)

    def casting_step(
        params: Params, opt_state: optax.OptState, history: jax.Array, state: TrainState
    ) -> tuple[optax.Params, optax.OptState, jax.Array, object]:
        record = empty_record(shape.sites) if count else None
        casts = program.casts(replace(state, params=params, amax_history=history), record)
        loss, gradients = jax.value_and_grad(lambda params: program.loss(params, tokens, casts))(params)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        shown = loss
        if record is not None:
            tallies = read_record(record)
            history, shown = push_amax(history, amax_of_tallies(tallies)), (loss, _rates(tallies))
        return optax.apply_updates(params, updates), opt_state, history, shown

    history = jnp.copy(state.amax_history)
    state = replace(state, params={}, opt_state=())
    step = jax.jit(casting_step, donate_argnums=(0, 1, 2))

    def once() -> object:
        nonlocal params, opt_state, history
        params, opt_state, history, shown = step(params, opt_state, history, state)
        return params, opt_state, history, shown

    return once


def _rates(tallies: jax.Array) -> tuple[jax.Array, ...]:
    """All that was counted: both rates of every site, and of all gradients and all operands pooled."""
    counts = CastCounts.of_tallies(tallies)
    pooled = [CastCounts(part).pooled() for part in (counts.limbs[:, GRADIENT], counts.limbs[:, :GRADIENT])]
    return tuple(rate for each in (counts, *pooled) for rate in (each.overflow_rate, each.underflow_rate))


def _ours(name: str, shape: GPTConfig, tokens: jax.Array) -> Callable[[], tuple[TrainState, StepMetrics]]:
    program = Program.for_format(name, shape)
    state = program.start(program.fresh_params(0), program.run_data(RunSpec(name, schedule=Schedule(_STEPS))))
    step = jax.jit(program.step, donate_argnums=0)
    fault = jax.tree.map(jnp.asarray, Fault())

    def once() -> tuple[TrainState, StepMetrics]:
        nonlocal state
        state, metrics = step(state, tokens, fault)
        return state, metrics

    return once


def _plain(shape: GPTConfig, tokens: jax.Array) -> Callable[[], object]:
    program = Program.for_format("float32", shape)
    params = program.fresh_params(0)
    optimizer = _adamw(params)
    opt_state = optimizer.init(params)

    def plain_step(params: optax.Params, opt_state: optax.OptState) -> tuple[optax.Params, optax.OptState, jax.Array]:
        loss, gradients = jax.value_and_grad(lambda params: program.loss(params, tokens, _PlainProducts()))(params)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    step = jax.jit(plain_step, donate_argnums=(0, 1))

    def once() -> object:
        nonlocal params, opt_state
        params, opt_state, loss = step(params, opt_state)
        return params, opt_state, loss

    return once


def _adamw(params: Params) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(1.5e-4, 3e-3, 20, _STEPS, 3e-4)
    matrices = jax.tree.map(lambda leaf: leaf.ndim >= 2, params)
    return optax.adamw(schedule, b2=0.99, weight_decay=0.01, mask=matrices)


if __name__ == "__main__":
    measured = list(comparisons())
    for measurement in measured:
        measurement.show()
    if "--write" in sys.argv[1:]:
        print(write_page("training_step", "What a training step costs", measured, ["jax", "optax", "flax"]))

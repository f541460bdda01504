"""A training step with every operand and gradient cast and every count on, against the plain float32 step.

The plain step is the same GPT and AdamW with ``lax.dot_general`` in the place of the quantised products, and no
clipper, no monitor, no skipping: what one would write without AltGrad.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from altgrad_jax.data import load_corpus
from altgrad_jax.models import GPTConfig
from altgrad_jax.state import Fault, RunSpec
from altgrad_jax.training import OptimizerConfig, Program
from benchmarks.timing import show, side_by_side

_SHAPES = {
    "the demo's GPT: 2 layers of 64, 8 x 32 characters": (8, 32, 2, 64),
    "altgrad train's: 2 layers of 64, 16 x 64 characters": (16, 64, 2, 64),
    "2 layers of 256, 16 x 64 characters": (16, 64, 2, 256),
}
_STEPS = 300


class _PlainProducts:
    """Stands in for :class:`~altgrad_jax.models.Casts`."""

    def dot_general(self, site: int) -> Callable[..., jax.Array]:
        return jax.lax.dot_general


def main() -> None:
    for label, (batch, context, layers, width) in _SHAPES.items():
        corpus = load_corpus(None, context)
        tokens = jnp.asarray(corpus.batch(0, 0, batch, context))
        shape = GPTConfig(len(corpus.vocabulary), context, layers, width, 4)
        contestants = {"plain float32": _plain(shape, tokens)}
        contestants |= {name: _ours(name, shape, tokens) for name in ("float32", "bf16", "E0M7", "E5M2", "E7M0")}
        show(label, side_by_side(contestants, rounds=30), "plain float32")


def _ours(name: str, shape: GPTConfig, tokens: jax.Array) -> Callable[[], object]:
    program = Program.for_format(name, shape, OptimizerConfig(_STEPS))
    state = program.start(program.fresh_params(0), program.run_data(RunSpec(name)))
    step = jax.jit(program.step, donate_argnums=0)
    fault = jax.tree.map(jnp.asarray, Fault())

    def once() -> object:
        nonlocal state
        state, metrics = step(state, tokens, fault)
        return state, metrics

    return once


def _plain(shape: GPTConfig, tokens: jax.Array) -> Callable[[], object]:
    program = Program.for_format("float32", shape, OptimizerConfig(_STEPS))
    params = program.fresh_params(0)
    schedule = optax.warmup_cosine_decay_schedule(1.5e-4, 3e-3, 20, _STEPS, 3e-4)
    matrices = jax.tree.map(lambda leaf: leaf.ndim >= 2, params)
    optimizer = optax.adamw(schedule, b2=0.99, weight_decay=0.01, mask=matrices)
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

"""The exact norm and the gated clip against optax's, in one run."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax

from altgrad_jax.clipping import partition_relative_clip
from altgrad_jax.norms import global_norm
from benchmarks.timing import show, side_by_side


def main() -> None:
    rng = np.random.default_rng(0)
    grads = [jnp.asarray(rng.standard_normal(shape).astype(np.float32)) for shape in ((2048, 1024), (1 << 20,), (513,))]
    clip = partition_relative_clip("E5M2")
    state = clip.init(grads)
    given = jax.jit(lambda g, s, rate: clip.update(g, s, overflow_rate=rate))
    measured = jax.jit(lambda g, s: clip.update(g, s))
    theirs, ours = jax.jit(optax.tree.norm), jax.jit(global_norm)
    contestants = {
        "optax.tree.norm (float32)": lambda: theirs(grads),
        "global_norm (float64 inside)": lambda: ours(grads),
        "gate shut, rate given": lambda: given(grads, state, jnp.float32(0)),
        "gate open, rate given": lambda: given(grads, state, jnp.float32(0.02)),
        "gate shut, rate measured": lambda: measured(grads, state),
    }
    show("3.1 million gradients", side_by_side(contestants, rounds=20), "optax.tree.norm (float32)")

"""The decoder of :mod:`benchmarks.layers` in Flax Linen, where Flax's own fp8 operations can cast it, too.

Those take a float8 of 4 and 3 bits forward and one of 5 and 2 bits backward, as the rules do, and keep an amax history
of the same length; they count nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.linen import fp8_ops
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT

from altgrad_jax.nn import Rule, quantize_model, record_casts
from benchmarks.shapes import Shape
from benchmarks.timing import Comparison, side_by_side

_HISTORY = 16
"""Steps of amax history, as the rules have by default; Flax's own default is 1024."""

_Collections = dict[str, Any]


class Block(nn.Module):
    shape: Shape
    product: Callable[[], nn.Module] | None = None
    einsum: Callable[[], nn.Module] | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        attention = nn.MultiHeadDotProductAttention(
            self.shape.heads,
            use_bias=False,
            qkv_dot_general_cls=self.product,
            out_dot_general_cls=self.product,
            qk_attn_weights_einsum_cls=self.einsum,
            attn_weights_value_einsum_cls=self.einsum,
        )
        dense = partial(nn.Dense, use_bias=False, dot_general_cls=self.product)
        x = x + attention(nn.RMSNorm()(x), mask=nn.make_causal_mask(x[..., 0]))
        return x + dense(self.shape.width)(nn.relu(dense(4 * self.shape.width)(nn.RMSNorm()(x))))


class Decoder(nn.Module):
    shape: Shape
    product: Callable[[], nn.Module] | None = None
    einsum: Callable[[], nn.Module] | None = None

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        shape = self.shape
        x = nn.Embed(shape.vocabulary, shape.width)(tokens)
        x = x + nn.Embed(shape.length, shape.width)(jnp.arange(tokens.shape[1]))
        for _ in range(shape.layers):
            x = Block(shape, self.product, self.einsum)(x)
        return nn.Dense(shape.vocabulary, use_bias=False, dot_general_cls=self.product)(x)


class Training:
    """A model and its jitted step, everything donated."""

    def __init__(self, model: nn.Module, tokens: jax.Array, *, recorded: bool = False) -> None:
        tx = optax.adamw(3e-4)
        collections = dict(jax.jit(model.init)(jax.random.key(0), tokens[:, :-1]))
        params = collections.pop("params")

        def loss_of(params: _Collections, given: _Collections, kept: _Collections) -> jax.Array:
            logits = model.apply({"params": params, **given, **kept}, tokens[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        def step(
            carried: tuple[_Collections, _Collections, optax.OptState],
        ) -> tuple[tuple[_Collections, _Collections, optax.OptState], object]:
            params, rest, opt_state = carried
            given = {name: rest[name] for name in rest if name == OVERWRITE_WITH_GRADIENT}
            kept = {name: rest[name] for name in rest if name not in given}
            differentiated = jax.value_and_grad(loss_of, argnums=(0, 1))
            if recorded:
                with record_casts(kept["casts"]) as seen:
                    loss, (gradients, given) = differentiated(params, given, kept)
                kept = {"casts": seen.updated(kept["casts"])}
                shown: object = loss, seen.gradients.overflow_rate, seen.all.overflow_rate
            else:
                # The gradients of this collection are its next values.
                shown, (gradients, given) = differentiated(params, given, kept)
            updates, opt_state = tx.update(gradients, opt_state, params)
            return (optax.apply_updates(params, updates), {**given, **kept}, opt_state), shown

        self._carried = params, collections, tx.init(params)
        self._step = jax.jit(step, donate_argnums=0)

    def __call__(self) -> object:
        self._carried, shown = self._step(self._carried)
        return self._carried, shown


def comparison(shape: Shape) -> Comparison:
    tokens = shape.tokens()
    cast = quantize_model(Decoder(shape), [Rule(".*", "E4M3", gradients="E5M2")])
    by_flax = Decoder(
        shape,
        partial(fp8_ops.Fp8DirectDotGeneralOp, amax_history_length=_HISTORY),
        partial(fp8_ops.Fp8Einsum, amax_history_length=_HISTORY),
    )
    trainings = {
        "plain float32": Training(Decoder(shape), tokens),
        "cast and recorded": Training(cast, tokens, recorded=True),
        "Flax, fp8_ops": Training(by_flax, tokens),
    }
    return Comparison(f"In Linen: {shape}", "plain float32", side_by_side(trainings, rounds=60))

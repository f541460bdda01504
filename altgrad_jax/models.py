"""A small GPT in Flax NNX whose every matrix product goes through :func:`altgrad_jax.nn.quantized_dot_general`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from flax import nnx

from altgrad_core.errors import InputError
from altgrad_jax.nn.products import LHS, RHS, Grid, Record, dot_general_on

SITES_PER_BLOCK = 6
_NORM_EPSILON = 1e-5


def site_names(layers: int) -> list[str]:
    """What the matrix products of a GPT with so many blocks are called, in their order.

    >>> site_names(1)
    ['block0.qkv', 'block0.scores', 'block0.values', 'block0.proj', 'block0.up', 'block0.down', 'logits']
    """
    names = ("qkv", "scores", "values", "proj", "up", "down")
    return [f"block{layer}.{name}" for layer in range(layers) for name in names] + ["logits"]


@dataclass(frozen=True)
class GPTConfig:
    """Shape of a :class:`GPT`.

    Attributes:
        vocabulary: number of distinct tokens.
        context: longest sequence, in tokens.
        layers: transformer blocks.
        width: size of the residual stream.
        heads: attention heads; divides ``width``.
    """

    vocabulary: int
    context: int
    layers: int
    width: int
    heads: int

    def __post_init__(self) -> None:
        """Check the shape."""
        for name in ("vocabulary", "context", "layers", "width", "heads"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.width % self.heads:
            divisors = [d for d in range(1, self.width + 1) if self.width % d == 0]
            nearest = min(divisors, key=lambda d: abs(d - self.heads))
            raise InputError(f"heads is {self.heads}, which does not divide width {self.width}; nearest is {nearest}")

    @property
    def sites(self) -> int:
        """Number of matrix products, each with three casts: six in a block and the one to the logits."""
        return SITES_PER_BLOCK * self.layers + 1

    @property
    def weight_sites(self) -> dict[int, tuple[str | int, ...]]:
        """The sites whose rhs is a weight, with the path of the module that holds it."""
        inside = {"qkv": 0, "proj": 3, "up": 4, "down": 5}
        paths: dict[int, tuple[str | int, ...]] = {
            SITES_PER_BLOCK * layer + offset: ("blocks", layer, name)
            for layer in range(self.layers)
            for name, offset in inside.items()
        }
        return paths | {self.sites - 1: ("logits",)}

    def site_names(self) -> list[str]:
        """What the sites are called, in their order."""
        return site_names(self.layers)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Casts:
    """How the products of one forward pass are cast.

    Attributes:
        operands: grids of shape ``(sites, 2)``, of lhs and rhs.
        gradients: grids of shape ``(sites,)``, of the gradients that flow back.
        record: where to write what was seen, or None.
        operand_dtype: dtype in which operands enter the products (static); None for their own.
    """

    operands: Grid
    gradients: Grid
    record: Record | None
    operand_dtype: jnp.dtype | None = field(default=None, metadata={"static": True})

    def dot_general(self, site: int) -> Callable[..., jax.Array]:
        """The product of a site."""
        grids = (self.operands.at(site, LHS), self.operands.at(site, RHS), self.gradients.at(site))
        refs = (None, None, None) if self.record is None else self.record[site]
        return dot_general_on(grids, refs, self.operand_dtype)


class Linear(nnx.Module):
    """A product with a weight, without bias."""

    def __init__(self, site: int, inputs: int, outputs: int, gain: float, rngs: nnx.Rngs) -> None:
        """Draw a weight of standard deviation ``gain / sqrt(inputs)``."""
        self.site = site
        self.weight = nnx.Param(jax.random.normal(rngs.params(), (inputs, outputs)) * (gain * inputs**-0.5))

    def __call__(self, x: jax.Array, casts: Casts) -> jax.Array:
        """Multiply ``x`` of shape ``(..., inputs)``."""
        return casts.dot_general(self.site)(x, self.weight[...], (((x.ndim - 1,), (0,)), ((), ())))


class Block(nnx.Module):
    """Attention and a two-layer perceptron, each behind a norm and added to the residual stream."""

    def __init__(self, first_site: int, config: GPTConfig, rngs: nnx.Rngs) -> None:
        """Make the block whose products are the sites from ``first_site``."""
        width, residual_gain = config.width, (2 * config.layers) ** -0.5
        self.heads = config.heads
        self.first_site = first_site
        self.attention_gain = nnx.Param(jnp.ones(width))
        self.qkv = Linear(first_site, width, 3 * width, 1.0, rngs)
        self.proj = Linear(first_site + 3, width, width, residual_gain, rngs)
        self.mlp_gain = nnx.Param(jnp.ones(width))
        self.up = Linear(first_site + 4, width, 4 * width, 1.0, rngs)
        self.down = Linear(first_site + 5, 4 * width, width, residual_gain, rngs)

    def __call__(self, x: jax.Array, casts: Casts) -> jax.Array:
        """Map ``(batch, time, width)`` to the same shape."""
        x = x + self.proj(self._attend(self.qkv(_normed(x, self.attention_gain[...]), casts), casts), casts)
        return x + self.down(jax.nn.relu(self.up(_normed(x, self.mlp_gain[...]), casts)), casts)

    def _attend(self, qkv: jax.Array, casts: Casts) -> jax.Array:
        batch, time, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
        size = width // self.heads
        query, key, value = jnp.moveaxis(qkv.reshape(batch, time, 3, self.heads, size), (2, 3), (0, 2))
        batched = ((0, 1), (0, 1))
        scores = casts.dot_general(self.first_site + 1)(query * size**-0.5, key, (((3,), (3,)), batched))
        causal = jnp.tril(jnp.ones((time, time), bool))
        weights = jax.nn.softmax(jnp.where(causal, scores, -1e9))
        mixed = casts.dot_general(self.first_site + 2)(weights, value, (((3,), (2,)), batched))
        return jnp.moveaxis(mixed, 1, 2).reshape(batch, time, width)


class GPT(nnx.Module):
    """A decoder-only transformer: learned positions, pre-norm blocks, logits through a matrix of their own."""

    def __init__(self, config: GPTConfig, rngs: nnx.Rngs) -> None:
        """Draw all weights from ``rngs``."""
        self.tokens = nnx.Param(jax.random.normal(rngs.params(), (config.vocabulary, config.width)) * 0.5)
        self.positions = nnx.Param(jax.random.normal(rngs.params(), (config.context, config.width)) * 0.1)
        self.blocks = nnx.List([Block(SITES_PER_BLOCK * layer, config, rngs) for layer in range(config.layers)])
        self.gain = nnx.Param(jnp.ones(config.width))
        self.logits = Linear(SITES_PER_BLOCK * config.layers, config.width, config.vocabulary, 0.5, rngs)

    def __call__(self, tokens: jax.Array, casts: Casts) -> jax.Array:
        """Logits, float32 of shape ``(batch, time, vocabulary)``, for int32 tokens of shape ``(batch, time)``."""
        x = self.tokens[...][tokens] + self.positions[...][: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, casts)
        return self.logits(_normed(x, self.gain[...]), casts)


def next_token_loss(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean cross-entropy, in nats, of ``(batch, time)`` targets under ``(batch, time, vocabulary)`` logits."""
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)
    return -jnp.mean(chosen)


def _normed(x: jax.Array, gain: jax.Array) -> jax.Array:
    """Root-mean-square normalisation over the last axis."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + _NORM_EPSILON) * gain

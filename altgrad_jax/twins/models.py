"""The networks of the twins, as functions of their weights. ``altgrad_torch/twins/models.py`` has the same."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from altgrad_core.twins import GPTShape, MLPShape, Shape
from altgrad_jax.nn.functions import (
    add_bias,
    cross_entropy,
    embed,
    gained,
    gelu,
    plus,
    relu,
    rms_norm,
    scaled,
    softmax,
)
from altgrad_jax.twins.products import Products


def loss(
    shape: Shape, products: Products, weights: Mapping[str, jax.Array], inputs: jax.Array, targets: jax.Array
) -> jax.Array:
    """The mean cross-entropy of a batch, in nats: float32 scalar. What is made on the way is left in ``products.seen``.

    Args:
        shape: of the network.
        products: how it multiplies.
        weights: by name, as ``shape.initial_weights`` names them.
        inputs: of an MLP float32 of shape ``(batch, inputs)``, of a GPT integers of shape ``(batch, context)``.
        targets: integers of shape ``(batch,)`` or ``(batch, context)``.
    """
    logits = (
        _mlp(shape, products, weights, inputs)
        if isinstance(shape, MLPShape)
        else _gpt(shape, products, weights, inputs)
    )
    products.seen["logits"] = logits
    products.seen["loss"] = cross_entropy(logits, targets)
    return products.seen["loss"]


def _mlp(shape: MLPShape, products: Products, weights: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
    for layer in range(shape.layers):
        name = f"layer{layer}"
        x = add_bias(products.matmul(name, x, weights[f"{name}.weight"]), weights[f"{name}.bias"])
        if layer < shape.layers - 1:
            x = products.seen[f"{name}.activation"] = relu(x)
    return x


def _gpt(shape: GPTShape, products: Products, weights: Mapping[str, jax.Array], tokens: jax.Array) -> jax.Array:
    places = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    x = plus(embed(weights["tokens"], tokens), embed(weights["positions"], places))
    products.seen["embedded"] = x
    for layer in range(shape.layers):
        x = _block(shape, products, f"block{layer}", weights, x)
    return products.matmul("output", _normed(products, "output", x, weights["gain"]), weights["logits"])


def _block(shape: GPTShape, products: Products, name: str, weights: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
    def matmul(part: str, x: jax.Array) -> jax.Array:
        return products.matmul(f"{name}.{part}", x, weights[f"{name}.{part}"])

    normed = _normed(products, f"{name}.attention", x, weights[f"{name}.attention_gain"])
    attended = _attended(shape, products, name, matmul("qkv", normed))
    x = products.seen[f"{name}.attention.sum"] = plus(x, matmul("proj", attended))
    activation = gelu if shape.activation == "gelu" else relu
    normed = _normed(products, f"{name}.mlp", x, weights[f"{name}.mlp_gain"])
    x = products.seen[f"{name}.mlp.sum"] = plus(x, matmul("down", activation(matmul("up", normed))))
    return x


def _attended(shape: GPTShape, products: Products, name: str, qkv: jax.Array) -> jax.Array:
    batch, time, _ = qkv.shape
    size = shape.width // shape.heads
    apart = jnp.moveaxis(qkv.reshape(batch, time, 3, shape.heads, size), (2, 3), (0, 2))
    # A split's gradient is a concatenation; that of indexing adds zeros, which makes +0 of -0.
    query, key, value = (part[0] for part in jnp.split(apart, 3))
    scores = products.matmul(f"{name}.scores", scaled(query, size**-0.5), key.mT)
    shares = products.seen[f"{name}.shares"] = softmax(scores, jnp.tril(jnp.ones((time, time), bool)))
    mixed = products.matmul(f"{name}.mixed", shares, value)
    return jnp.moveaxis(mixed, 1, 2).reshape(batch, time, shape.width)


def _normed(products: Products, name: str, x: jax.Array, gain: jax.Array) -> jax.Array:
    products.seen[f"{name}.normed"] = rms_norm(x)
    return gained(products.seen[f"{name}.normed"], gain)

"""The networks of the twins, as functions of their weights. ``altgrad_jax/twins/models.py`` has the same."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from altgrad_core.twins import GPTShape, MLPShape, Shape
from altgrad_torch.nn.functions import (
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
from altgrad_torch.twins.products import Products


def loss(shape: Shape, products: Products, weights: Mapping[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
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


def _mlp(shape: MLPShape, products: Products, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    for layer in range(shape.layers):
        name = f"layer{layer}"
        x = add_bias(products.matmul(name, x, weights[f"{name}.weight"]), weights[f"{name}.bias"])
        if layer < shape.layers - 1:
            x = products.seen[f"{name}.activation"] = relu(x)
    return x


def _gpt(shape: GPTShape, products: Products, weights: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
    places = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
    x = plus(embed(weights["tokens"], tokens), embed(weights["positions"], places))
    products.seen["embedded"] = x
    for layer in range(shape.layers):
        x = _block(shape, products, f"block{layer}", weights, x)
    return products.matmul("output", _normed(products, "output", x, weights["gain"]), weights["logits"])


def _block(shape: GPTShape, products: Products, name: str, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    def matmul(part: str, x: Tensor) -> Tensor:
        return products.matmul(f"{name}.{part}", x, weights[f"{name}.{part}"])

    normed = _normed(products, f"{name}.attention", x, weights[f"{name}.attention_gain"])
    attended = _attended(shape, products, name, matmul("qkv", normed))
    x = products.seen[f"{name}.attention.sum"] = plus(x, matmul("proj", attended))
    activation = gelu if shape.activation == "gelu" else relu
    normed = _normed(products, f"{name}.mlp", x, weights[f"{name}.mlp_gain"])
    x = products.seen[f"{name}.mlp.sum"] = plus(x, matmul("down", activation(matmul("up", normed))))
    return x


def _attended(shape: GPTShape, products: Products, name: str, qkv: Tensor) -> Tensor:
    batch, time, _ = qkv.shape
    size = shape.width // shape.heads
    query, key, value = qkv.reshape(batch, time, 3, shape.heads, size).movedim((2, 3), (0, 2)).unbind()
    scores = products.matmul(f"{name}.scores", scaled(query, size**-0.5), key.mT)
    causal = torch.ones(time, time, dtype=torch.bool, device=qkv.device).tril()
    shares = products.seen[f"{name}.shares"] = softmax(scores, causal)
    mixed = products.matmul(f"{name}.mixed", shares, value)
    return mixed.movedim(1, 2).reshape(batch, time, shape.width)


def _normed(products: Products, name: str, x: Tensor, gain: Tensor) -> Tensor:
    products.seen[f"{name}.normed"] = rms_norm(x)
    return gained(products.seen[f"{name}.normed"], gain)

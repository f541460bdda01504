"""What a network does beside products, forward and backward, with the same bits in both frameworks.

Each is made of the steps of :mod:`altgrad_jax.rounded`, which says what is proved of them: of all functions here, but
for the exponentials of :func:`softmax` and :func:`gelu` and the logarithm of :func:`cross_entropy`. Sums over a batch
are exact, so that they depend on no order; sums within a row, over the last axis, are made in one that is written down.
``altgrad_torch/nn/functions.py`` does the same. In reverse mode, once.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from altgrad_core.gelu import CUBIC, CUBIC_SLOPE, SLOPE
from altgrad_jax.nn.accumulate import exact_product
from altgrad_jax.rounded import (
    add,
    divide,
    exact_sum,
    exact_sum_of_products,
    exponential,
    logarithm,
    multiply,
    multiply_add,
    square_root,
    subtract,
    sum_of_last,
)


@jax.custom_vjp
def plus(x: jax.Array, y: jax.Array) -> jax.Array:
    """``x + y`` of float32 of one shape, as of a residual connection.

    >>> plus(jnp.ones(1), jnp.ones(1)).tolist()
    [2.0]
    """
    return add(x, y)


plus.defvjp(lambda x, y: (add(x, y), None), lambda _, gradient: (gradient, gradient))


@jax.custom_vjp
def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """``x`` of shape ``(..., n)`` plus a bias of shape ``(n,)``, whose gradient is an exact sum, rounded once.

    >>> jax.grad(lambda b: add_bias(jnp.ones((3, 1)), b).sum())(jnp.zeros(1)).tolist()
    [3.0]
    """
    return add(x, bias)


add_bias.defvjp(lambda x, bias: (add(x, bias), None), lambda _, gradient: (gradient, exact_sum(gradient)))


@jax.custom_vjp
def gained(x: jax.Array, gain: jax.Array) -> jax.Array:
    """``x`` of shape ``(..., n)`` times a gain of shape ``(n,)``, whose gradient is an exact sum, rounded once.

    >>> jax.grad(lambda gain: gained(jnp.full((3, 1), 2.0), gain).sum())(jnp.ones(1)).tolist()
    [6.0]
    """
    return multiply(x, gain)


gained.defvjp(
    lambda x, gain: (multiply(x, gain), (x, gain)),
    lambda kept, gradient: (multiply(gradient, kept[1]), exact_sum_of_products(gradient, kept[0])),
)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def scaled(x: jax.Array, factor: float) -> jax.Array:
    """``x`` times a constant, rounded to float32.

    >>> scaled(jnp.ones(1), 0.5).tolist()
    [0.5]
    """
    return multiply(x, jnp.float32(factor))


scaled.defvjp(
    lambda x, factor: (multiply(x, jnp.float32(factor)), None),
    lambda factor, _, gradient: (multiply(gradient, jnp.float32(factor)),),
)


@jax.custom_vjp
def relu(x: jax.Array) -> jax.Array:
    """The larger of ``x`` and +0; the gradient at zero is zero.

    >>> jax.grad(lambda x: relu(x).sum())(jnp.array([-1.0, 0.0, 1.0])).tolist()
    [0.0, 0.0, 1.0]
    """
    return jnp.where(x > 0, x, jnp.zeros_like(x))


relu.defvjp(lambda x: (relu(x), x > 0), lambda is_on, gradient: (jnp.where(is_on, gradient, jnp.zeros_like(gradient)),))


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """``x`` times its gate, in the tanh form (:mod:`altgrad_core.gelu`), each step rounded to float32.

    The gate is the logistic function of some ``v``. Of four roundings on the way to ``v``, and four after it, the
    relative error is at most ``(4 |v| (1 - gate) + 5) 2^-24``, beside ``(1 + |x|) 2^-126`` for what vanishes: measured,
    3 ulps where ``x`` is above -1, 13 above -3 and 31 above -5. Of minus infinity it is NaN.

    >>> gelu(jnp.array([-1.0, 0.0, 1.0])).tolist()
    [-0.15880799293518066, 0.0, 0.8411920070648193]
    """
    return multiply(x, _gate(x)[0])


def _gate(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The gate, and the derivative of its product with ``x``."""
    one, square = jnp.float32(1), multiply(x, x)
    inner = multiply(x, multiply_add(square, jnp.float32(CUBIC), one, jnp.float32(SLOPE)))
    fallen = exponential(-jnp.abs(inner))
    total = add(one, fallen)
    larger, smaller = divide(one, total), divide(fallen, total)
    gate, rest = jnp.where(inner > 0, larger, smaller), jnp.where(inner > 0, smaller, larger)
    slope = multiply_add(square, jnp.float32(CUBIC_SLOPE), one, jnp.float32(SLOPE))
    both = multiply(gate, rest)
    # Where the gate is shut or wide open the slope may be infinite.
    rise = jnp.where(both == 0, jnp.zeros_like(x), multiply(multiply(x, slope), both))
    return gate, add(gate, rise)


def _gelu_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    gate, derivative = _gate(x)
    return multiply(x, gate), derivative


gelu.defvjp(_gelu_forward, lambda derivative, gradient: (multiply(gradient, derivative),))


@jax.custom_vjp
def embed(table: jax.Array, indices: jax.Array) -> jax.Array:
    """Rows of a table, whose gradients are exact sums, rounded once: no scatter, whose order is nobody's.

    Args:
        table: float32 of shape ``(rows, n)``.
        indices: integers of shape ``(...)``.

    Returns:
        float32 of shape ``(..., n)``.

    >>> jax.grad(lambda table: embed(table, jnp.array([1, 1])).sum())(jnp.zeros((3, 1))).tolist()
    [[0.0], [2.0], [0.0]]
    """
    return table[indices]


def _embed_backward(kept: tuple[jax.Array, int], gradient: jax.Array) -> tuple[jax.Array, None]:
    indices, rows = kept
    is_of_row = (indices.reshape(-1, 1) == jnp.arange(rows)).astype(jnp.float32)
    each = gradient.reshape(-1, gradient.shape[-1])
    return exact_product(is_of_row, each, (((0,), (0,)), ((), ()))), None


embed.defvjp(lambda table, indices: (table[indices], (indices, len(table))), _embed_backward)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def rms_norm(x: jax.Array, epsilon: float = 1e-5) -> jax.Array:
    """``x / sqrt(mean(x^2) + epsilon)`` over the last axis; mean, sum and root are rounded to float32 on the way.

    >>> rms_norm(jnp.array([[3.0, 4.0, 0.0, 0.0]]), 0.0).tolist()
    [[1.2000000476837158, 1.600000023841858, 0.0, 0.0]]
    """
    return _normed(x, epsilon)[0]


def _normed(x: jax.Array, epsilon: float) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    root = square_root(add(_mean_of_last(x, x), jnp.float32(epsilon)))
    normed = divide(x, root)
    return normed, (normed, root)


def _rms_norm_backward(epsilon: float, kept: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array]:
    normed, root = kept
    along = multiply(normed, _mean_of_last(gradient, normed))
    return (divide(subtract(gradient, along), root),)


def _mean_of_last(x: jax.Array, y: jax.Array) -> jax.Array:
    return divide(sum_of_last(x, y), jnp.float32(x.shape[-1]))


rms_norm.defvjp(_normed, _rms_norm_backward)


@jax.custom_vjp
def softmax(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax over the last axis; exponentials and their sum are rounded to float32 on the way.

    Args:
        x: float32 of shape ``(..., n)``.
        mask: bool, broadcast against ``x``: which elements take part, at least one in a row; the others are +0.

    Returns:
        float32 of shape ``(..., n)``.

    >>> softmax(jnp.array([1.0, 1.0, 9.0]), jnp.array([True, True, False])).tolist()
    [0.5, 0.5, 0.0]
    """
    exponentials = exponential(_below_largest(jnp.where(mask, x, -jnp.inf)))
    return divide(exponentials, sum_of_last(exponentials))


def _softmax_backward(weights: jax.Array, gradient: jax.Array) -> tuple[jax.Array, None]:
    return multiply(weights, subtract(gradient, sum_of_last(gradient, weights))), None


softmax.defvjp(lambda x, mask: ((weights := softmax(x, mask)), weights), _softmax_backward)


@jax.custom_vjp
def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """The mean over all rows of the negative log-softmax at their targets, in nats.

    Args:
        logits: float32 of shape ``(..., n)``.
        targets: integers of shape ``(...)``.

    Returns:
        float32 scalar.

    >>> cross_entropy(jnp.zeros((1, 2)), jnp.array([0])).item()
    0.6931471824645996
    """
    return _cross_entropy(logits, targets)[0]


def _cross_entropy(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    rows, chosen = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1, 1)
    below = _below_largest(rows)
    exponentials = exponential(below)
    total = sum_of_last(exponentials)
    losses = subtract(logarithm(total), jnp.take_along_axis(below, chosen, axis=-1))
    mean = divide(exact_sum(losses)[0], jnp.float32(len(rows)))
    return mean, (divide(exponentials, total).reshape(logits.shape), targets)


def _cross_entropy_backward(kept: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, None]:
    weights, targets = kept
    is_target = (targets[..., None] == jnp.arange(weights.shape[-1])).astype(jnp.float32)
    each = divide(gradient, jnp.float32(targets.size))
    return multiply(subtract(weights, is_target), each), None


cross_entropy.defvjp(_cross_entropy, _cross_entropy_backward)


def _below_largest(x: jax.Array) -> jax.Array:
    return subtract(x, x.max(axis=-1, keepdims=True))

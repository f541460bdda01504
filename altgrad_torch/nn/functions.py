"""What a network does beside products, forward and backward, with the same bits in both frameworks.

Each is made of the steps of :mod:`altgrad_torch.rounded`, which says what is proved of them: of all functions here, but
for the exponentials of :func:`softmax` and :func:`gelu` and the logarithm of :func:`cross_entropy`. Sums over a batch
are exact, so that they depend on no order; sums within a row, over the last axis, are made in one that is written down.
``altgrad_jax/nn/functions.py`` does the same. In reverse mode, once.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from altgrad_core.gelu import CUBIC, CUBIC_SLOPE, SLOPE
from altgrad_torch.exact import exact_matmul
from altgrad_torch.rounded import (
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


def plus(x: Tensor, y: Tensor) -> Tensor:
    """``x + y`` of float32 of one shape, as of a residual connection.

    >>> plus(torch.ones(1), torch.ones(1)).tolist()
    [2.0]
    """
    return _Plus.apply(x, y)


class _Plus(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, y: Tensor) -> Tensor:
        return add(x, y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Nothing is kept: the derivatives are one."""

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        return grad_outputs[0], grad_outputs[0]


def add_bias(x: Tensor, bias: Tensor) -> Tensor:
    """``x`` of shape ``(..., n)`` plus a bias of shape ``(n,)``, whose gradient is an exact sum, rounded once.

    >>> bias = torch.zeros(1, requires_grad=True)
    >>> add_bias(torch.ones(3, 1), bias).sum().backward()
    >>> bias.grad.tolist()
    [3.0]
    """
    return _AddBias.apply(x, bias)


class _AddBias(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, bias: Tensor) -> Tensor:
        return add(x, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Nothing is kept: the derivatives are one."""

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        return grad_outputs[0], exact_sum(grad_outputs[0])


def gained(x: Tensor, gain: Tensor) -> Tensor:
    """``x`` of shape ``(..., n)`` times a gain of shape ``(n,)``, whose gradient is an exact sum, rounded once.

    >>> gain = torch.ones(1, requires_grad=True)
    >>> gained(torch.full((3, 1), 2.0), gain).sum().backward()
    >>> gain.grad.tolist()
    [6.0]
    """
    return _Gained.apply(x, gain)


class _Gained(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, gain: Tensor) -> Tensor:
        return multiply(x, gain)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        x, gain = ctx.saved_tensors
        return multiply(grad_outputs[0], gain), exact_sum_of_products(grad_outputs[0], x)


def scaled(x: Tensor, factor: float) -> Tensor:
    """``x`` times a constant, rounded to float32.

    >>> scaled(torch.ones(1), 0.5).tolist()
    [0.5]
    """
    return _Scaled.apply(x, x.new_tensor(factor))


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, factor: Tensor) -> Tensor:
        return multiply(x, factor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return multiply(grad_outputs[0], ctx.saved_tensors[0]), None


def relu(x: Tensor) -> Tensor:
    """The larger of ``x`` and +0; the gradient at zero is zero.

    >>> x = torch.tensor([-1.0, 0.0, 1.0], requires_grad=True)
    >>> relu(x).sum().backward()
    >>> x.grad.tolist()
    [0.0, 0.0, 1.0]
    """
    return torch.where(x > 0, x, torch.zeros_like(x))


def gelu(x: Tensor) -> Tensor:
    """``x`` times its gate, in the tanh form (:mod:`altgrad_core.gelu`), each step rounded to float32.

    The gate is the logistic function of some ``v``. Of four roundings on the way to ``v``, and four after it, the
    relative error is at most ``(4 |v| (1 - gate) + 5) 2^-24``, beside ``(1 + |x|) 2^-126`` for what vanishes: measured,
    3 ulps where ``x`` is above -1, 13 above -3 and 31 above -5. Of minus infinity it is NaN.

    >>> gelu(torch.tensor([-1.0, 0.0, 1.0])).tolist()
    [-0.15880799293518066, 0.0, 0.8411920070648193]
    """
    return _Gelu.apply(x)[0]


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        gate, derivative = _gate(x)
        return multiply(x, gate), derivative

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return multiply(grad_outputs[0], ctx.saved_tensors[0])


def _gate(x: Tensor) -> tuple[Tensor, Tensor]:
    """The gate, and the derivative of its product with ``x``."""
    one, steep, cubic, cubic_slope = (x.new_tensor(float(each)) for each in (1, SLOPE, CUBIC, CUBIC_SLOPE))
    square = multiply(x, x)
    inner = multiply(x, multiply_add(square, cubic, one, steep))
    fallen = exponential(-inner.abs())
    total = add(one, fallen)
    larger, smaller = divide(one, total), divide(fallen, total)
    gate, rest = torch.where(inner > 0, larger, smaller), torch.where(inner > 0, smaller, larger)
    slope = multiply_add(square, cubic_slope, one, steep)
    both = multiply(gate, rest)
    # Where the gate is shut or wide open the slope may be infinite.
    rise = torch.where(both == 0, torch.zeros_like(x), multiply(multiply(x, slope), both))
    return gate, add(gate, rise)


def embed(table: Tensor, indices: Tensor) -> Tensor:
    """Rows of a table, whose gradients are exact sums, rounded once: no scatter, whose order is nobody's.

    Args:
        table: float32 of shape ``(rows, n)``.
        indices: integers of shape ``(...)``.

    Returns:
        float32 of shape ``(..., n)``.

    >>> table = torch.zeros(3, 1, requires_grad=True)
    >>> embed(table, torch.tensor([1, 1])).sum().backward()
    >>> table.grad.tolist()
    [[0.0], [2.0], [0.0]]
    """
    return _Embed.apply(table, indices)


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(table: Tensor, indices: Tensor) -> Tensor:
        return table[indices]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.rows = len(inputs[0])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (indices,) = ctx.saved_tensors
        rows = torch.arange(ctx.rows, device=indices.device)
        is_of_row = (indices.reshape(-1, 1) == rows).float()
        return exact_matmul(is_of_row.T, grad_outputs[0].reshape(-1, grad_outputs[0].shape[-1])), None


def rms_norm(x: Tensor, epsilon: float = 1e-5) -> Tensor:
    """``x / sqrt(mean(x^2) + epsilon)`` over the last axis; mean, sum and root are rounded to float32 on the way.

    >>> rms_norm(torch.tensor([[3.0, 4.0, 0.0, 0.0]]), 0.0).tolist()
    [[1.2000000476837158, 1.600000023841858, 0.0, 0.0]]
    """
    return _RmsNorm.apply(x, x.new_tensor(epsilon))[0]


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor]:
        root = square_root(add(_mean_of_last(x, x), epsilon))
        return divide(x, root), root

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        normed, root = ctx.saved_tensors
        along = multiply(normed, _mean_of_last(grad_outputs[0], normed))
        return divide(subtract(grad_outputs[0], along), root), None


def _mean_of_last(x: Tensor, y: Tensor) -> Tensor:
    return divide(sum_of_last(x, y), x.new_tensor(x.shape[-1]))


def softmax(x: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the last axis; exponentials and their sum are rounded to float32 on the way.

    Args:
        x: float32 of shape ``(..., n)``.
        mask: bool, broadcast against ``x``: which elements take part, at least one in a row; the others are +0.

    Returns:
        float32 of shape ``(..., n)``.

    >>> softmax(torch.tensor([1.0, 1.0, 9.0]), torch.tensor([True, True, False])).tolist()
    [0.5, 0.5, 0.0]
    """
    return _Softmax.apply(x, mask)


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, mask: Tensor) -> Tensor:
        exponentials = exponential(_below_largest(x.masked_fill(~mask, -math.inf)))
        return divide(exponentials, sum_of_last(exponentials))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (weights,), gradient = ctx.saved_tensors, grad_outputs[0]
        return multiply(weights, subtract(gradient, sum_of_last(gradient, weights))), None


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean over all rows of the negative log-softmax at their targets, in nats.

    Args:
        logits: float32 of shape ``(..., n)``.
        targets: integers of shape ``(...)``.

    Returns:
        float32 scalar.

    >>> cross_entropy(torch.zeros(1, 2), torch.tensor([0])).item()
    0.6931471824645996
    """
    return _CrossEntropy.apply(logits, targets)[0]


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        rows, chosen = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1, 1)
        below = _below_largest(rows)
        exponentials = exponential(below)
        total = sum_of_last(exponentials)
        losses = subtract(logarithm(total), below.gather(-1, chosen))
        mean = divide(exact_sum(losses)[0], losses.new_tensor(len(rows)))
        return mean, divide(exponentials, total).reshape(logits.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(output[1], inputs[1])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        weights, targets = ctx.saved_tensors
        is_target = (targets[..., None] == torch.arange(weights.shape[-1], device=targets.device)).float()
        each = divide(grad_outputs[0], weights.new_tensor(targets.numel()))
        return multiply(subtract(weights, is_target), each), None


def _below_largest(x: Tensor) -> Tensor:
    return subtract(x, x.amax(-1, keepdim=True))

"""Exact products that can be differentiated: forward and backward, each element the exact sum rounded once to float32.

``altgrad_jax/nn/accumulate.py`` does the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from altgrad_core.errors import InputError
from altgrad_torch.exact import exact_matmul


def exact_product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` whose elements, and those of both gradients, are exact sums rounded once to float32.

    See :func:`altgrad_torch.exact_matmul`. In reverse mode, of any order. Of bfloat16 and float16 the float32 is
    rounded again to their dtype, and a gradient to that of its operand.

    Args:
        a: float32, bfloat16 or float16 of shape ``(..., n, k)``, of any values.
        b: likewise, of shape ``(k, m)``, or ``(..., k, m)`` with the batch axes of ``a``.

    Returns:
        Of shape ``(..., n, m)`` and the dtype that the operands promote to; under autocast of that of autocast.

    Raises:
        TypeError: for operands of other dtypes, float64 among them.
        ValueError: for shapes that do not match, and sums of more than 2^30 terms, in the backward pass as well.

    >>> a = torch.tensor([[2.0**64, 1.0, -(2.0**64)]], requires_grad=True)
    >>> product = exact_product(a, torch.ones(3, 1))
    >>> product.backward(torch.ones(1, 1))
    >>> product.tolist(), a.grad.tolist()
    ([[1.0]], [[1.0, 1.0, 1.0]])
    """
    if a.ndim < 2 or b.ndim < 2 or (b.ndim > 2 and a.shape[:-2] != b.shape[:-2]):
        shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
        raise InputError(f"the operands have shapes {shapes}; expected (..., n, k) and (k, m) or (..., k, m)")
    return _Product.apply(a, b).to(dtype_of_product(a, b))


def dtype_of_product(a: Tensor, b: Tensor) -> torch.dtype:
    """The dtype that torch gives a product: that of autocast, or what the operands promote to.

    >>> dtype_of_product(torch.ones(1).half(), torch.ones(1).half())
    torch.float16
    """
    kind = a.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.promote_types(a.dtype, b.dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        return exact_matmul(a, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (a, b), (gradient,) = ctx.saved_tensors, grad_outputs
        of_a = _Product.apply(gradient, b.mT).to(a.dtype) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return of_a, None
        if b.ndim == 2:
            a, gradient = a.reshape(-1, a.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        return of_a, _Product.apply(a.mT, gradient).to(b.dtype)

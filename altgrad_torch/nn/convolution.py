"""Exact convolutions that can be differentiated: products of patches and kernels, forward and backward.

``altgrad_jax/nn/convolution.py`` does the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from altgrad_core.convolution import Sweep, spread
from altgrad_core.errors import InputError
from altgrad_torch.exact import exact_matmul
from altgrad_torch.nn.accumulate import dtype_of_product

_Sweeps = tuple[Sweep, ...]


def exact_convolution(x: Tensor, kernel: Tensor, sweeps: Sequence[Sweep], groups: int = 1) -> Tensor:
    """A convolution whose result and both gradients are exact sums, rounded once to float32.

    They are products of patches and kernels, see :func:`altgrad_torch.exact_matmul`; patches take as much memory as
    the result for each element of a kernel. The gradient of the input is the convolution of the gradient with the
    flipped kernel, that of the kernel the one of input and gradient: no sum is left in float32. Zeros that pad or
    dilate take part, so that infinities in a kernel make NaN of them. In reverse mode, of any order. Of bfloat16 and
    float16 the float32 is rounded again to their dtype, and a gradient to that of its operand.

    Args:
        x: float32, bfloat16 or float16 of shape ``(batch, inputs, *sizes)``, of any values.
        kernel: likewise, of shape ``(outputs, inputs / groups, *sizes)``.
        sweeps: one for each axis of sizes.
        groups: of features.

    Returns:
        Of shape ``(batch, outputs, *sizes)`` and the dtype that the operands promote to; under autocast of that of
        autocast.

    Raises:
        TypeError: for operands of other dtypes, float64 among them.
        InputError: for shapes that do not match, and a kernel that does not fit into what it goes over.

    >>> x = torch.tensor([[[2.0**64, 1.0, -(2.0**64), 3.0]]])
    >>> exact_convolution(x, torch.ones(1, 1, 3), [Sweep(before=1, after=1)]).tolist()
    [[[1.8446744073709552e+19, 1.0, -1.8446744073709552e+19, -1.8446744073709552e+19]]]
    """
    rank = len(sweeps)
    if x.ndim != rank + 2 or kernel.ndim != rank + 2 or x.shape[1] != kernel.shape[1] * groups or len(kernel) % groups:
        shapes = f"{tuple(x.shape)} and {tuple(kernel.shape)} in {groups} groups"
        raise InputError(f"the operands have shapes {shapes}; expected (n, c, ...) and (m, c / groups, ...)")
    grouped = x.reshape(len(x), groups, -1, *x.shape[2:]).transpose(0, 1)
    result = _Convolution.apply(tuple(sweeps), grouped, kernel.reshape(groups, -1, *kernel.shape[1:]))
    return result.transpose(0, 1).flatten(1, 2).to(dtype_of_product(x, kernel))


def exact_transposed_convolution(x: Tensor, kernel: Tensor, sweeps: Sequence[Sweep], groups: int = 1) -> Tensor:
    """What is the gradient of a convolution, forward, with the kernel as :class:`torch.nn.ConvTranspose1d` has it.

    Args:
        x: as of :func:`exact_convolution`.
        kernel: float32, bfloat16 or float16 of shape ``(inputs, outputs / groups, *sizes)``.
        sweeps: of the flipped kernel over ``x``.
        groups: of features.

    >>> x = torch.tensor([[[1.0, 2.0]]])
    >>> exact_transposed_convolution(x, torch.tensor([[[1.0, 10.0]]]), [Sweep(before=1, after=1, dilation=2)]).tolist()
    [[[1.0, 10.0, 2.0, 20.0]]]
    """
    flipped = kernel.flip(tuple(range(2, kernel.ndim)))
    grouped = flipped.reshape(groups, -1, *kernel.shape[1:]).transpose(1, 2)
    return exact_convolution(x, grouped.flatten(0, 1), sweeps, groups)


class _Convolution(torch.autograd.Function):
    """Of ``(groups, batch, inputs, *sizes)`` and ``(groups, outputs, inputs, *sizes)``: float32 as the first."""

    @staticmethod
    def forward(sweeps: _Sweeps, x: Tensor, kernel: Tensor) -> Tensor:
        lengths = kernel.shape[3:]
        patches = _patches(sweeps, x, tuple(lengths)).movedim(2, -len(lengths) - 1)
        product = exact_matmul(patches.flatten(-len(lengths) - 1).flatten(1, -2), kernel.flatten(2).mT)
        return product.unflatten(1, patches.shape[1 : 2 + len(lengths)]).movedim(-1, 2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[_Sweeps, Tensor, Tensor], output: Tensor) -> None:
        ctx.sweeps = inputs[0]
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, Tensor | None, Tensor | None]:
        (x, kernel), (gradient,) = ctx.saved_tensors, grad_outputs
        sizes = list(zip(ctx.sweeps, x.shape[3:], kernel.shape[3:], strict=True))
        of_x = of_kernel = None
        if ctx.needs_input_grad[1]:
            to_input = tuple(sweep.to_input(size, length) for sweep, size, length in sizes)
            flipped = kernel.flip(tuple(range(3, kernel.ndim))).transpose(1, 2)
            of_x = _Convolution.apply(to_input, gradient, flipped).to(x.dtype)
        if ctx.needs_input_grad[2]:
            to_kernel = tuple(sweep.to_kernel(size, length) for sweep, size, length in sizes)
            swapped = _Convolution.apply(to_kernel, x.transpose(1, 2), gradient.transpose(1, 2))
            of_kernel = swapped.transpose(1, 2).to(kernel.dtype)
        return None, of_x, of_kernel


def _patches(sweeps: _Sweeps, x: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """What the kernel meets, all axes of places before those of the kernel: ``(groups, batch, inputs, *p, *k)``."""
    for sweep, *sizes in zip(sweeps, x.shape[3:], kernel, strict=True):
        sweep.length(*sizes)  # refuses what does not fit
    x = F.pad(_dilated(sweeps, x), [edge for sweep in reversed(sweeps) for edge in (sweep.before, sweep.after)])
    for axis, (sweep, size) in enumerate(zip(sweeps, kernel, strict=True)):
        x = x.unfold(3 + axis, spread(size, sweep.spacing), sweep.stride)[..., :: sweep.spacing]
    return x


def _dilated(sweeps: _Sweeps, x: Tensor) -> Tensor:
    if all(sweep.dilation == 1 for sweep in sweeps):
        return x
    sizes = [spread(size, sweep.dilation) for sweep, size in zip(sweeps, x.shape[3:], strict=True)]
    dilated = x.new_zeros(*x.shape[:3], *sizes)
    dilated[(..., *(slice(None, None, sweep.dilation) for sweep in sweeps))] = x
    return dilated

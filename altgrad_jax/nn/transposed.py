"""Exact transposed convolutions of Flax's layers, whose classes have no hook for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax.linen.linear import canonicalize_padding

from altgrad_core.convolution import spread
from altgrad_jax.nn.convolution import exact_convolution


class ConvTranspose(Protocol):
    """What NNX and Linen call alike in their layers."""

    @property
    def strides(self) -> int | Sequence[int] | None:
        """Of the result, for each element of the input."""

    @property
    def padding(self) -> str | int | Sequence[int | tuple[int, int]]:
        """Of the input, or its name."""

    @property
    def kernel_dilation(self) -> int | Sequence[int] | None:
        """From one element of the kernel to the next."""

    @property
    def transpose_kernel(self) -> bool:
        """Whether the kernel is that of the convolution whose gradient this is."""

    @property
    def preferred_element_type(self) -> Any:
        """The dtype of the result, if it is not that of the operands."""


def exact_transposed(layer: ConvTranspose, x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
    """What the layer computes, its product and both gradients as exact sums, rounded once.

    Args:
        layer: with a padding that does not wrap.
        x: of shape ``(batch, *sizes, inputs)``.
        kernel: of shape ``(*sizes, inputs, outputs)``, or the other way round if it is transposed.
        bias: of shape ``(outputs,)``.
    """
    rank = kernel.ndim - 2
    strides, spacings = _each(layer.strides, rank), _each(layer.kernel_dilation, rank)
    padding = canonicalize_padding(layer.padding, rank)
    if padding in ("SAME", "VALID"):
        sizes = zip(kernel.shape[:rank], spacings, strides, strict=True)
        padding = [_edges(padding == "VALID", spread(size, spacing), stride) for size, spacing, stride in sizes]
    if layer.transpose_kernel:
        kernel = jnp.flip(kernel, range(rank)).swapaxes(rank, rank + 1)
    spatial = "XYZ"[:rank]
    axes = f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"
    product = exact_convolution(
        x, kernel, (1,) * rank, padding, strides, spacings, axes, preferred_element_type=layer.preferred_element_type
    )
    return product if bias is None else product + bias


def _each(option: int | Sequence[int] | None, rank: int) -> tuple[int, ...]:
    return (option or 1,) * rank if option is None or isinstance(option, int) else tuple(option)


def _edges(is_valid: bool, kernel: int, stride: int) -> tuple[int, int]:
    """Zeros before and after, as ``lax.conv_transpose`` has them for ``VALID`` and ``SAME``."""
    total = kernel + stride - 2 + (max(kernel - stride, 0) if is_valid else 0)
    before = kernel - 1 if is_valid or stride > kernel - 1 else -(-total // 2)
    return before, total - before

"""A twin's products: operands, and the gradients that flow back, on the grid of a format.

``altgrad_jax/twins/products.py`` does the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from altgrad_core.formats import Format
from altgrad_core.twins import Accumulation
from altgrad_torch.casting import quantize
from altgrad_torch.nn.accumulate import exact_product
from altgrad_torch.scaling import amax, power_of_two_scale


@dataclass(frozen=True)
class Products:
    """How a twin multiplies.

    Attributes:
        format: of operands and gradients.
        accumulate: see :data:`altgrad_core.twins.Accumulation`.
        seen: receives operands and products by name, in the order they are made.
    """

    format: Format
    accumulate: Accumulation
    seen: dict[str, Tensor] = field(default_factory=dict)

    def matmul(self, site: str, lhs: Tensor, rhs: Tensor) -> Tensor:
        """``lhs @ rhs`` of cast operands, whose gradient is cast."""
        lhs, rhs = (own_scale_cast(x, self.format) for x in (lhs, rhs))
        multiply = exact_product if self.accumulate == "exact" else torch.matmul
        product = _CastGradient.apply(multiply(lhs, rhs), self.format)
        self.seen.update({f"{site}.lhs": lhs, f"{site}.rhs": rhs, f"{site}.product": product})
        return product


def own_scale_cast(x: Tensor, format: Format) -> Tensor:
    """Cast under the power-of-two scale of the tensor's own amax. The gradient passes straight through.

    >>> from altgrad_core.formats import parse
    >>> own_scale_cast(torch.tensor([1.1, 900.0]), parse("E4M3")).tolist()
    [1.125, 896.0]
    """
    return quantize(x, format, scale=power_of_two_scale(amax(x.detach()), format.max_representable_value))


class _CastGradient(torch.autograd.Function):
    """The identity, whose gradient is cast on its way back."""

    @staticmethod
    def forward(x: Tensor, format: Format) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.format = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return own_scale_cast(grad_outputs[0], ctx.format), None

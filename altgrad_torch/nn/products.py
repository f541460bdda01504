"""Products whose operands, and the gradients that flow back into them, are on the grids of formats.

``product = cast_gradient(multiply(cast(a), cast(b)))``: the gradient that comes back is cast before it meets the cast
operands, and what they make of it passes straight through their casts. ``altgrad_jax/nn/products.py`` says the same
thing in JAX.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from altgrad_torch.cpu import under_transforms
from altgrad_torch.nn.sites import Site

Multiply = Callable[[Tensor, Tensor], Tensor]
"""A product of two operands, linear in each, that autograd differentiates."""

Sites = tuple[Site | None, Site | None, Site | None]
"""Where the operands of a product, and the gradient that comes back, are cast; None for what is not."""


def cast_operand(x: Tensor, site: Site | None) -> Tensor:
    """The values of ``x`` at a site; gradients pass straight through. Without a site ``x`` itself."""
    return x if site is None else site.cast(x)


def cast_gradient(x: Tensor, site: Site | None) -> Tensor:
    """``x`` itself, whose gradient is cast at a site on its way back."""
    if site is None or not (x.requires_grad or under_transforms()):
        return x
    if torch.compiler.is_compiling() or under_transforms():
        return _CastGradient.apply(x, site)
    # The same for less, which compilers and transforms do not take.
    x.register_hook(site.cast if site.tally is None else site.cast_recorded)
    return x


def quantized_product(multiply: Multiply, a: Tensor, b: Tensor, sites: Sites) -> Tensor:
    """A product of cast operands, into which cast gradients flow back.

    Args:
        multiply: the product.
        a: its first operand.
        b: its second.
        sites: where they and the gradient are cast.

    Returns:
        What ``multiply`` returns.

    >>> from altgrad_core.rules import Rule
    >>> from altgrad_torch.nn.sites import Placement
    >>> site = Site(Rule("", "E5M2").spec.activations, Placement("activations"))
    >>> quantized_product(torch.matmul, torch.tensor([[1.1]]), torch.tensor([[2.0]]), (site, None, None)).item()
    2.0
    """
    site_of_a, site_of_b, site_of_gradient = sites
    return cast_gradient(multiply(cast_operand(a, site_of_a), cast_operand(b, site_of_b)), site_of_gradient)


class _CastGradient(torch.autograd.Function):
    """The identity in value; in derivative the cast."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, site: Site) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Site], output: Tensor) -> None:
        ctx.site = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return ctx.site.cast(grad_outputs[0]), None

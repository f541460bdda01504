"""SGD and AdamW of which each step is rounded as in JAX: nothing is fused, and powers are taken on the host.

``altgrad_jax/twins/optimizers.py`` does the same.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from altgrad_core.twins import OptimizerName
from altgrad_torch.rounded import divide, multiply, multiply_add, square_root

Rates = Mapping[str, Tensor]
"""Float32 scalars by name: see :meth:`altgrad_core.twins.Recipe.rates`."""


def updated(
    optimizer: OptimizerName, rates: Rates, weight: Tensor, gradient: Tensor, moments: tuple[Tensor, ...]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A weight and its moments after a step: float32 of the shape of the weight, all of them.

    >>> rates = {"momentum": torch.tensor(0.5), "falling": torch.tensor(-0.25)}
    >>> updated("sgd", rates, torch.ones(1), torch.ones(1), (torch.ones(1),))
    (tensor([0.6250]), (tensor([1.5000]),))
    """
    return (_sgd if optimizer == "sgd" else _adamw)(rates, weight, gradient, *moments)


def _sgd(rates: Rates, weight: Tensor, gradient: Tensor, velocity: Tensor) -> tuple[Tensor, tuple[Tensor]]:
    one = torch.ones_like(rates["falling"])
    velocity = multiply_add(velocity, rates["momentum"], gradient, one)
    return multiply_add(weight, one, velocity, rates["falling"]), (velocity,)


def _adamw(
    rates: Rates, weight: Tensor, gradient: Tensor, first: Tensor, second: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    one = torch.ones_like(rates["falling"])
    first = multiply_add(first, rates["first"], gradient, rates["first_rest"])
    second = multiply_add(second, rates["second"], multiply(gradient, gradient), rates["second_rest"])
    root = multiply_add(square_root(second), rates["root_correction"], rates["epsilon"], one)
    update = divide(multiply(first, rates["first_correction"]), root)
    update = multiply_add(update, one, weight, rates["decay"])
    return multiply_add(weight, one, update, rates["falling"]), (first, second)

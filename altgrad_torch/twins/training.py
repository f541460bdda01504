"""A training as a state and a step, for a lockstep with its twin, ``altgrad_jax/twins/training.py``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from altgrad_core.twins import Batches, Recipe, Shape, Single
from altgrad_torch.recovery import commit_
from altgrad_torch.twins.models import loss
from altgrad_torch.twins.optimizers import updated
from altgrad_torch.twins.products import Products


class State(NamedTuple):
    """A twin between two steps.

    Attributes:
        weights: by name.
        moments: the optimizer's, by the names of the weights.
    """

    weights: dict[str, Tensor]
    moments: dict[str, tuple[Tensor, ...]]


Step = Callable[[State, int], tuple[State, dict[str, Tensor]]]


def make(
    shape: Shape,
    recipe: Recipe,
    weights: Mapping[str, Single],
    batches: Batches,
    *,
    device: torch.device | str | None = None,
) -> tuple[State, Step]:
    """The training before its first step.

    Args:
        shape: of the network.
        recipe: how to train it.
        weights: the initial ones, as ``shape.initial_weights`` gives them.
        batches: what to train it on.
        device: where to train it.

    Returns:
        The state, and a step: from a state and the step's number the next state and all tensors of the step by name,
        in the order they are made. They are: of each product both cast operands and the result; activations, logits and
        loss; a gradient for each weight, the last first; then of each its moments and the weight itself.

    >>> from altgrad_core.twins import MLPShape
    >>> shape, recipe = MLPShape((24, 16, 10), batch=8), Recipe("E4M3")
    >>> state, step = make(shape, recipe, shape.initial_weights(0), shape.batches(0))
    >>> state, seen = step(state, 0)
    >>> [name for name in seen if name.startswith("layer1")]
    ['layer1.lhs', 'layer1.rhs', 'layer1.product']
    """

    def step(state: State, number: int) -> tuple[State, dict[str, Tensor]]:
        inputs, targets = (torch.as_tensor(each, device=device) for each in batches(number))
        seen, gradients = _gradients(shape, recipe, state.weights, inputs, targets.long())
        state = _updated(recipe, state, gradients, number)
        seen |= {f"gradient.{name}": gradients[name] for name in reversed(gradients)}
        for name in weights:
            seen |= zip((f"{m}.{name}" for m in recipe.moments), state.moments[name], strict=True)
            seen[f"weight.{name}"] = state.weights[name]
        return state, seen

    start = {name: torch.tensor(weight, device=device) for name, weight in weights.items()}
    zeros = {name: (torch.zeros_like(weight),) * len(recipe.moments) for name, weight in start.items()}
    return State(start, zeros), step


def _gradients(
    shape: Shape, recipe: Recipe, weights: Mapping[str, Tensor], inputs: Tensor, targets: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
    products = Products(recipe.grid, recipe.accumulate)
    with torch.enable_grad():
        gradients = torch.autograd.grad(loss(shape, products, leaves, inputs, targets), list(leaves.values()))
    seen = {name: tensor.detach() for name, tensor in products.seen.items()}
    return seen, dict(zip(leaves, gradients, strict=True))


def _updated(recipe: Recipe, state: State, gradients: Mapping[str, Tensor], step: int) -> State:
    names = sorted(state.weights)  # a weight's random bits go by its place
    device = state.weights[names[0]].device
    rates = {name: torch.tensor(rate, device=device) for name, rate in recipe.rates(step).items()}
    new = {
        name: updated(recipe.optimizer, rates, state.weights[name], gradients[name], state.moments[name])
        for name in names
    }
    weights = {name: weight for name, (weight, _) in new.items()}
    if recipe.storage == "committed":
        seed = recipe.seed if recipe.commit_rounding == "stochastic" else None
        commit_(weights.values(), recipe.grid, rounding=recipe.commit_rounding, seed=seed, step=step)
    return State(weights, {name: moments for name, (_, moments) in new.items()})

"""A training as a state and a step, for a lockstep with its twin, ``altgrad_torch/twins/training.py``.

Two compiled programs, gradients and update, in which format, storage and rates are data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from altgrad_core.twins import Accumulation, Batches, OptimizerName, Recipe, Shape, Single
from altgrad_jax.params import FormatParams
from altgrad_jax.recovery import commit
from altgrad_jax.twins.models import loss
from altgrad_jax.twins.optimizers import Rates, updated
from altgrad_jax.twins.products import Products, Seen


class State(NamedTuple):
    """A twin between two steps.

    Attributes:
        weights: by name.
        moments: the optimizer's, by the names of the weights.
    """

    weights: dict[str, jax.Array]
    moments: dict[str, tuple[jax.Array, ...]]


Step = Callable[[State, int], tuple[State, Seen]]


def make(shape: Shape, recipe: Recipe, weights: Mapping[str, Single], batches: Batches) -> tuple[State, Step]:
    """The training before its first step.

    Args:
        shape: of the network.
        recipe: how to train it.
        weights: the initial ones, as ``shape.initial_weights`` gives them.
        batches: what to train it on.

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
    params = FormatParams.from_format(recipe.grid)
    commits = recipe.storage == "committed"
    grid = (
        FormatParams.from_format(
            recipe.grid, rounding=recipe.commit_rounding, overflow="saturate_finite", path="integer"
        )
        if commits
        else FormatParams.from_format("E5M2", path="integer")
    )

    def step(state: State, number: int) -> tuple[State, Seen]:
        inputs, targets = batches(number)
        seen, gradients = _gradients(shape, recipe.accumulate, params, state.weights, inputs, targets)
        state = _updated(
            recipe.optimizer, recipe.rates(number), state, gradients, grid, commits, jnp.uint32(recipe.seed), number
        )
        seen.update({f"gradient.{name}": gradients[name] for name in reversed(list(weights))})
        for name in weights:
            seen.update(zip((f"{m}.{name}" for m in recipe.moments), state.moments[name], strict=True))
            seen[f"weight.{name}"] = state.weights[name]
        return state, seen

    zeros = {name: (jnp.zeros(weight.shape),) * len(recipe.moments) for name, weight in weights.items()}
    return State({name: jnp.asarray(weight) for name, weight in weights.items()}, zeros), step


@partial(jax.jit, static_argnums=(0, 1))
def _gradients(
    shape: Shape,
    accumulate: Accumulation,
    params: FormatParams,
    weights: Mapping[str, jax.Array],
    inputs: jax.Array,
    targets: jax.Array,
) -> tuple[Seen, Mapping[str, jax.Array]]:
    def with_seen(weights: Mapping[str, jax.Array]) -> tuple[jax.Array, Seen]:
        products = Products(params, accumulate)
        return loss(shape, products, weights, inputs, targets), products.seen

    gradients, seen = jax.grad(with_seen, has_aux=True)(weights)
    return seen, gradients


@partial(jax.jit, static_argnums=0)
def _updated(
    optimizer: OptimizerName,
    rates: Rates,
    state: State,
    gradients: Mapping[str, jax.Array],
    grid: FormatParams,
    commits: jax.Array,
    seed: jax.Array,
    step: jax.Array,
) -> State:
    names = sorted(
        state.weights
    )  # a dict's order is lost on its way into jit, and a weight's random bits go by its place
    new = [updated(optimizer, rates, state.weights[name], gradients[name], state.moments[name]) for name in names]
    weights = [weight for weight, _ in new]
    on_grid = jax.tree.leaves(commit(weights, grid, [True] * len(weights), seed=seed, step=step))
    chosen = [jnp.where(commits, rounded, weight) for rounded, weight in zip(on_grid, weights, strict=True)]
    moments = [moments for _, moments in new]
    return State(dict(zip(names, chosen, strict=True)), dict(zip(names, moments, strict=True)))

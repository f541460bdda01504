"""The built-in pair: one training in JAX and its twin in torch, for a lockstep."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from altgrad.parity.lockstep import Make, Step
from altgrad.parity.operation import made_by
from altgrad_core.errors import InputError
from altgrad_core.twins import Batch, Batches, GPTShape, MLPShape, Recipe, Shape, Single

if TYPE_CHECKING:
    import torch

    from altgrad_jax.data import Corpus
    from altgrad_jax.twins.training import State as JaxState
    from altgrad_torch.twins.training import State as TorchState

State = TypeVar("State")

_PRODUCT = ".product"


def sides_of(
    shape: Shape,
    recipe: Recipe,
    *,
    weights: Mapping[str, Single] | None = None,
    device: torch.device | str | None = None,
) -> tuple[Make[JaxState], Make[TorchState]]:
    """Both sides of a training, from the same weights, on the same batches: of a GPT those of the text that ships.

    Args:
        shape: of the network; a GPT's vocabulary has to hold that of the text, 68 characters.
        recipe: how to train it.
        weights: the initial ones by name, as :func:`altgrad.parity.weights.load_weights` reads them from a file; those
            of the recipe's seed unless given.
        device: of torch's side. JAX's is its default.

    Raises:
        InputError: on the first step, if a GPT's vocabulary is too small for the text.

    Returns:
        JAX's side and torch's, as :func:`altgrad.parity.lockstep` takes them.

    >>> from altgrad.parity import lockstep
    >>> jax_side, torch_side = sides_of(MLPShape((24, 16, 10), batch=8), Recipe("E7M0"))
    >>> lockstep(jax_side, torch_side, steps=2).identical_steps
    2
    """
    import altgrad_jax.twins
    import altgrad_torch.twins

    start = shape.initial_weights(recipe.seed) if weights is None else weights
    batches = _batches(shape, recipe.seed)
    return (
        _telling(lambda: altgrad_jax.twins.make(shape, recipe, start, batches)),
        _telling(lambda: altgrad_torch.twins.make(shape, recipe, start, batches, device=device)),
    )


def _batches(shape: Shape, seed: int) -> Batches:
    return shape.batches(seed) if isinstance(shape, MLPShape) else partial(_windows, shape, seed)


def _windows(shape: GPTShape, seed: int, step: int) -> Batch:
    corpus = _corpus(shape.context)
    if len(corpus.vocabulary) > shape.vocabulary:
        raise InputError(f"the vocabulary is {shape.vocabulary}; expected {len(corpus.vocabulary)}, as the text has")
    windows = corpus.batch(seed, step, shape.batch, shape.context)
    return np.ascontiguousarray(windows[:, :-1]), np.ascontiguousarray(windows[:, 1:])


@cache
def _corpus(context: int) -> Corpus:
    from altgrad_jax.data import load_corpus

    return load_corpus(None, context)


def _telling(make: Callable[[], tuple[State, Step[State]]]) -> Make[State]:
    """The same, but its products say what they are made of, so that a difference can be traced to them."""

    def made() -> tuple[State, Step[State]]:
        state, step = make()

        def telling_step(state: State, number: int) -> tuple[State, Mapping[str, object]]:
            state, seen = step(state, number)
            return state, {name: _told(name, tensor, seen) for name, tensor in seen.items()}

        return state, telling_step

    return made


def _told(name: str, tensor: object, seen: Mapping[str, object]) -> object:
    site = name.removesuffix(_PRODUCT)
    if site == name or len(getattr(seen[f"{site}.rhs"], "shape", ())) != 2:
        return tensor
    return made_by(tensor, "dot", x=seen[f"{site}.lhs"], y=seen[f"{site}.rhs"])

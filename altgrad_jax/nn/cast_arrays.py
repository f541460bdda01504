"""The states of a model's casts as plain arrays, as they are stored beside its parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import nnx

from altgrad_jax.nn.cast_state import CastState
from altgrad_jax.nn.nnx_models import variables_of
from altgrad_jax.nn.nnx_products import CastVariable
from altgrad_jax.params import WORDS
from altgrad_jax.scaling import Static

_PARTS = ("grid", "history", "scale", "step")


def casts_of(model: nnx.Module) -> list[tuple[str, CastVariable]]:
    """The states of casts, named like ``up/casts/weights``."""
    named = ((name.rpartition("/"), variable) for name, variable in variables_of(model).items())
    return [(f"{where}{slash}casts/{operand}", variable) for (where, slash, operand), variable in named]


def is_of_a_cast(name: str) -> bool:
    """Whether a name is that of an array of a cast."""
    parts = name.split("/")
    return len(parts) >= 3 and parts[-3] == "casts" and parts[-1] in _PARTS


def arrays_of(name: str, variable: CastVariable) -> Iterator[tuple[str, jax.Array]]:
    """What a cast carries from step to step, and its format."""
    state = variable.get_value()
    yield f"{name}/grid", jnp.asarray(grid_of(state))
    if state.history is not None:
        yield f"{name}/history", state.history
    if isinstance(state.scaling, Static):
        yield f"{name}/scale", jnp.asarray(state.scaling.value)
    yield f"{name}/step", state.step


def grid_of(state: CastState) -> npt.NDArray[np.int32]:
    """The params as :func:`~altgrad_jax.params.to_words` writes them: int32 of shape ``(*stack, 8)``."""
    return np.asarray(state.words)[..., :WORDS]


def load_casts(casts: Sequence[tuple[str, CastVariable]], arrays: Mapping[str, jax.Array]) -> None:
    """Write arrays that were stored into casts of the same formats."""
    for name, variable in casts:
        state = variable.get_value()
        scaling = state.scaling
        if isinstance(scaling, Static):
            scaling = replace(scaling, value=arrays[f"{name}/scale"])
        history, step = arrays.get(f"{name}/history"), arrays[f"{name}/step"]
        variable.set_value(replace(state.with_history(history, step), scaling=scaling))

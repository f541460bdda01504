"""The states of a model's casts as plain arrays, as they are stored beside its parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from altgrad_core.cast_options import granularity_options, scaling_options, write_options
from altgrad_jax.nn.cast_state import CastState
from altgrad_jax.params import WORDS
from altgrad_jax.scaling import Static

_PARTS = ("grid", "history", "options", "scale", "step")


def stored_name(name: str) -> str:
    """What a cast is called among stored arrays: ``up/weights`` is ``up/casts/weights``."""
    where, slash, operand = name.rpartition("/")
    return f"{where}{slash}casts/{operand}"


def is_of_a_cast(name: str) -> bool:
    """Whether a name is that of an array of a cast."""
    parts = name.split("/")
    return len(parts) >= 3 and parts[-3] == "casts" and parts[-1] in _PARTS


def arrays_of(name: str, state: CastState) -> Iterator[tuple[str, jax.Array]]:
    """What a cast carries from step to step, its format, and what it scales by."""
    yield f"{name}/grid", jnp.asarray(grid_of(state))
    if state.history is not None:
        yield f"{name}/history", state.history
    yield f"{name}/options", jnp.asarray(np.frombuffer(write_options(options_of(state)), np.uint8))
    if isinstance(state.scaling, Static):
        yield f"{name}/scale", jnp.asarray(state.scaling.value)
    yield f"{name}/step", state.step


def grid_of(state: CastState) -> npt.NDArray[np.int32]:
    """The params as :func:`~altgrad_jax.params.to_words` writes them: int32 of shape ``(*stack, 8)``."""
    return np.asarray(state.words)[..., :WORDS]


def options_of(state: CastState) -> dict[str, object]:
    """What is stored of a cast in words.

    Without rounding and overflow policy, which are data and lie in the grid, and without the axes of channels and
    blocks: the layers of Linen count theirs from the first, those of NNX from the last, and one file is for both.
    """
    share = granularity_options(state.granularity)
    axes = {"axis", "axes"}
    return {**scaling_options(state.scaling), **{name: share[name] for name in share if name not in axes}}


def loaded(state: CastState, name: str, arrays: Mapping[str, jax.Array]) -> CastState:
    """A cast with what was stored of one of the same format."""
    scaling = state.scaling
    if isinstance(scaling, Static):
        scaling = replace(scaling, value=arrays[f"{name}/scale"])
    after = state.with_history(arrays.get(f"{name}/history"), arrays[f"{name}/step"])
    return replace(after, scaling=scaling)

"""The built-in pair's weights in a safetensors file: where both frameworks begin, and what they end with."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np

from altgrad.parity.lockstep import Make, Step
from altgrad_core.errors import InputError
from altgrad_core.packed_files import check_is_file, replacing
from altgrad_core.twins import Shape, Single

State = TypeVar("State")

_FLOAT32 = "F32"
_WEIGHT = "weight."


def load_weights(path: Path, shape: Shape) -> dict[str, Single]:
    """The weights of a network from a safetensors file, every bit as it lies there.

    Args:
        path: a file with a float32 tensor for each weight, and no other, as :func:`save_weights` or ``save_file`` of
            safetensors writes it.
        shape: of the network.

    Returns:
        Weights by name, in the order of ``shape.initial_weights``: linear ones of shape ``(inputs, outputs)``.

    Raises:
        InputError: for a file that is no safetensors file, a weight that is missing or that the network does not have,
            and another shape or dtype.
        OSError: if the file cannot be read.

    >>> import tempfile
    >>> from altgrad_core.twins import MLPShape
    >>> shape, path = MLPShape((4, 3, 2)), Path(tempfile.mkdtemp()) / "weights.safetensors"
    >>> save_weights(path, shape.initial_weights(7))
    >>> bool(np.all(load_weights(path, shape)["layer1.weight"] == shape.initial_weights(7)["layer1.weight"]))
    True
    """
    from safetensors import SafetensorError, safe_open

    check_is_file(path)
    wanted = {name: (_FLOAT32, weight.shape) for name, weight in shape.initial_weights(0).items()}
    try:
        with safe_open(path, framework="numpy") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
            found = {name: (each.get_dtype(), tuple(each.get_shape())) for name, each in slices.items()}
            _check(path, found, wanted)
            return {name: opened.get_tensor(name) for name in wanted}
    except SafetensorError as error:
        raise InputError(f"{path} is no whole safetensors file ({error}); expected one with the weights") from None


def save_weights(path: Path, weights: Mapping[str, object]) -> None:
    """Write weights to a safetensors file, which replaces another when it is whole.

    Args:
        path: the file.
        weights: float32 by name; NumPy's, or what NumPy makes arrays of.

    Raises:
        OSError: if the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    with replacing(path) as draft:
        try:
            save_file({name: np.asarray(weight, order="C") for name, weight in weights.items()}, draft)
        except SafetensorError as error:
            raise OSError(f"{path} could not be written: {error}") from error


def keeping_weights(make: Make[State], kept: dict[str, object]) -> Make[State]:
    """The same side of the built-in pair, which leaves its weights by name in ``kept`` after each step.

    Args:
        make: whose step names each weight ``weight.`` and its name.
        kept: receives them, arrays of the side's framework, in place of those of the step before.
    """

    def made() -> tuple[State, Step[State]]:
        state, step = make()

        def keeping_step(state: State, number: int) -> tuple[State, Mapping[str, object]]:
            state, seen = step(state, number)
            kept.update({name.removeprefix(_WEIGHT): x for name, x in seen.items() if name.startswith(_WEIGHT)})
            return state, seen

        return state, keeping_step

    return made


_Kinds = Mapping[str, tuple[str, tuple[int, ...]]]
"""Of each tensor by name what safetensors calls its dtype, and its shape."""


def _check(path: Path, found: _Kinds, wanted: _Kinds) -> None:
    for name in found:
        if name not in wanted:
            near = difflib.get_close_matches(name, wanted, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise InputError(f"{path}: the network has no weight {name!r}; {hint}Expected {', '.join(wanted)}")
    for name, (dtype, shape) in wanted.items():
        if name not in found:
            raise InputError(f"{path} has no weight {name!r}; expected {dtype} of shape {shape}")
        if found[name] != (dtype, shape):
            raise InputError(
                f"{path}: {name!r} is {found[name][0]} of shape {found[name][1]}; expected {dtype} of shape {shape}"
            )

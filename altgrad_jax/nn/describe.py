"""Casts in words: what a summary says of them."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from altgrad_core.formats import FORMAT_REGISTRY
from altgrad_core.scaling import PerBlock, PerChannel
from altgrad_jax.nn.casts import CastState
from altgrad_jax.params import FormatParams
from altgrad_jax.scaling import Delayed, Static

_GRID = ("mantissa_bits", "min_exponent", "max_value", "native_overflow", "negative_zero")


def format_names(states: Sequence[CastState]) -> str | None:
    """The formats of casts as they stand, read from the device; None without casts.

    A format that is in no registry is called by its mantissa and its largest value.
    """
    rows = [row for state in states for row in _rows(state.params)]
    return ", ".join(dict.fromkeys(_name(row) for row in rows)) or None


def scaling_names(states: Sequence[CastState]) -> str:
    """Where the scales of casts come from, and how they round where that is not to nearest even."""
    return ", ".join(dict.fromkeys(_scaling_name(state) for state in states))


def _scaling_name(state: CastState) -> str:
    scaling = state.scaling
    words = [type(scaling).__name__.lower()]
    if isinstance(scaling, Delayed):
        words.append(str(scaling.window))
    if isinstance(scaling, Static) and np.size(scaling.value) == 1:
        words.append(f"{np.asarray(scaling.value).item():g}")
    match state.granularity:
        case PerChannel():
            words.append("per channel")
        case PerBlock(size):
            words.append(f"per {size}")
    if not scaling.power_of_two:
        words.append("by ratio")
    return " ".join(words)


def _rows(params: FormatParams) -> list[tuple[object, ...]]:
    """The fields that make a format, of each layer of a stack."""
    fields = np.broadcast_arrays(*(np.asarray(jax.device_get(getattr(params, name))) for name in _GRID))
    return list(zip(*(field.reshape(-1).tolist() for field in fields), strict=True))


def _name(row: tuple[object, ...]) -> str:
    for each in FORMAT_REGISTRY.values():
        if repr(row) == repr(_rows(FormatParams.from_format(each))[0]):  # by repr, in which NaN is itself
            return each.name
    mantissa_bits, _, max_value, *_ = row
    return f"M{mantissa_bits} up to {max_value:g}"

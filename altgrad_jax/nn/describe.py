"""Casts in words: what a summary says of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

import jax
import numpy as np

from altgrad_core.errors import InputError
from altgrad_core.formats import FORMAT_REGISTRY, Format
from altgrad_core.scaling import PerBlock, PerChannel
from altgrad_jax.nn.cast_state import CastState
from altgrad_jax.params import FormatParams, float_bits
from altgrad_jax.scaling import Delayed, Static

_Row = tuple[int, int, float, int, bool]
_GRID = ("mantissa_bits", "min_exponent", "max_value", "native_overflow", "negative_zero")


def format_names(states: Sequence[CastState]) -> str | None:
    """The formats of casts as they stand, read from the device; None without casts.

    What is no format of at most 16 bits is called by its mantissa and its largest value.
    """
    if any(isinstance(state.words, jax.core.Tracer) for state in states):
        raise InputError(
            "formats are data, so those of a model are not known while a function is traced; expected a model outside "
            "of jit"
        )
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


def formats_of(params: FormatParams) -> list[Format | None]:
    """The formats of params, of each layer of a stack; None for what is no format of at most 16 bits."""
    return [_format(row) for row in dict.fromkeys(_rows(params))]


def _rows(params: FormatParams) -> list[_Row]:
    """The fields that make a format, of each layer of a stack."""
    fields = np.broadcast_arrays(*(np.asarray(jax.device_get(getattr(params, name))) for name in _GRID))
    return list(zip(*(field.reshape(-1).tolist() for field in fields), strict=True))


def _name(row: _Row) -> str:
    known = _format(row)
    mantissa_bits, _, max_value, *_ = row
    return f"M{mantissa_bits} up to {max_value:g}" if known is None else str(known)


def _format(row: _Row) -> Format | None:
    return next((each for each in (*FORMAT_REGISTRY.values(), *_unregistered(row)) if _is(each, row)), None)


def _is(format: Format, row: _Row) -> bool:
    numbers = (
        format.mantissa_bits,
        format.min_exponent,
        format.max_representable_value,
        float_bits(format.overflow_value),
        format.has_negative_zero,
    )
    return numbers == row


def _unregistered(row: _Row) -> Iterator[Format]:
    """Formats with the mantissa bits and the smallest exponent of a row, as few bits as may be."""
    mantissa_bits, min_exponent, _, overflow, negative_zero = row
    inf = float_bits(math.inf)
    for exponent_bits in range(min(9, 16 - mantissa_bits)):
        bias = 1 - min_exponent if exponent_bits else 0
        with suppress(InputError):
            nameless = Format("", exponent_bits, mantissa_bits, bias, overflow == inf, overflow >= inf, negative_zero)
            yield replace(nameless, name=nameless.spelling)

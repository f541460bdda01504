"""Where the casts of a model write what they see, and which recording is going on."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from altgrad_core.errors import InputError
from altgrad_jax.axes import axes_of

COUNTS = 5
_LIMB_BITS = 30
COLUMNS = 2 * COUNTS + 1
"""High limbs of the counts, low limbs, and the bits of amax."""


class Sight(NamedTuple):
    """What a cast saw.

    Attributes:
        tally: int32 ``(6,)``, see :func:`~altgrad_jax.statistics.tally`.
        amaxes: float32, of what has scales of its own; None where that is all of the tensor.
    """

    tally: jax.Array
    amaxes: jax.Array | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Record:
    """Where casts write what they see, inside a jitted function or out.

    Attributes:
        seen: int32 ``(rows, 11)``: high and low limbs of five counts, and the bits of amax.
        amaxes: bits of float32, as int32 ``(rows, *amax)``, for each shape of amaxes that casts of channels have.
        axis_name: mapped axes over which tensors are parts (static); what is whole in every place counts once.
    """

    seen: jax.Ref
    amaxes: dict[tuple[int, ...], jax.Ref]
    axis_name: tuple[str, ...] = field(metadata={"static": True})

    def write(self, row: jax.Array, sight: Sight) -> None:
        """Add what a cast saw to what it saw before.

        Args:
            row: int32, of the cast.
            sight: what it saw.
        """
        seen, amax = sight
        bits = None if amax is None else lax.bitcast_convert_type(amax, jnp.int32)  # of which a maximum loses no NaN
        added = jnp.concatenate([seen[:COUNTS] >> _LIMB_BITS, seen[:COUNTS] & ((1 << _LIMB_BITS) - 1), seen[-1:]])
        axes = axes_of(added, self.axis_name)
        if axes:
            added = jnp.append(lax.psum(added[:-1], axes), lax.pmax(added[-1], axes))
            bits = None if bits is None else lax.pmax(bits, axes)
        self.seen[row] = _both(self.seen[row], added)
        if bits is not None:
            of_shape = self.amaxes.get(bits.shape)
            if of_shape is None:
                raise InputError(
                    f"a layer with amaxes of shape {bits.shape} computes while a model is recorded that has none such; "
                    "expected it to be part of the model"
                )
            of_shape[row] = jnp.maximum(of_shape[row], bits)


def _both(before: jax.Array, added: jax.Array) -> jax.Array:
    low = before[COUNTS:-1] + added[COUNTS:-1]
    high = before[:COUNTS] + added[:COUNTS] + (low >> _LIMB_BITS)
    return jnp.concatenate([high, low & ((1 << _LIMB_BITS) - 1), jnp.maximum(before[-1:], added[-1:])])


@dataclass(eq=False)
class Recording:
    """A recording that is going on: one object each, which JAX tells apart.

    Attributes:
        record: where the casts write; None when it is over, since JAX keeps this object, with which it would keep a
            trace.
        total: how many casts the model has.
        key: of those that may use its references after it; None inside a trace, with which they end.
    """

    record: Record | None
    total: int
    key: Hashable


OPEN = jax.make_user_context(None)
"""The :class:`Recording` that is going on, or None. JAX keeps what it traces apart by it, so that no trace writes into
the record of another."""


_IDLE: dict[Hashable, list[Recording]] = {}
"""Recordings outside of any trace that are over, by the size of their records and where these lie. What JAX compiles
has the references in it, so they are used again: else every recording would compile all that computes in it."""


def begin_recording(
    total: int, shapes: frozenset[tuple[int, ...]], axis_name: tuple[str, ...], nothing: jax.Array
) -> Recording:
    """A recording of which nothing is seen yet.

    Args:
        total: how many casts the model has.
        shapes: those of the amaxes that are many.
        axis_name: mapped axes over which tensors are parts.
        nothing: int32 zero, mapped over axes of which each has a record of its own.
    """
    empty = {shape: jnp.zeros((total, *shape), jnp.int32) + nothing for shape in shapes}
    seen = jnp.zeros((total, COLUMNS), jnp.int32) + nothing
    key = None if isinstance(seen, jax.core.Tracer) else (total, shapes, axis_name, seen.sharding)
    try:
        again = _IDLE.get(key, []).pop()  # not looked at first: another thread may take it meanwhile
    except IndexError:
        refs = {shape: jax.new_ref(each) for shape, each in empty.items()}
        return Recording(Record(jax.new_ref(seen), refs, axis_name), total, key)
    if again.record is not None:
        again.record.seen[...] = seen
        for shape, each in empty.items():
            again.record.amaxes[shape][...] = each
    return again


def end_recording(recording: Recording) -> None:
    """Let the next recording outside of any trace have the references; drop those of a trace."""
    if recording.key is None:
        recording.record = None
    else:
        _IDLE.setdefault(recording.key, []).append(recording)


def current_record(rows: int) -> Record | None:
    """The record of the recording that goes on, for a model of so many casts; None if none does.

    Raises:
        InputError: if the recording is of another model.
    """
    recording: Recording | None = OPEN.value
    if recording is None:
        return None
    if recording.total != rows:
        raise InputError(
            f"a layer of a model with {rows} casts computes while a model with {recording.total} is recorded; expected "
            "them to be one, quantized together"
        )
    return recording.record


def check_recording(record: Record | None) -> None:
    """Refuse a backward pass whose recording is over: what it saw would be lost.

    Raises:
        InputError: saying where the recording belongs.
    """
    if record is not None and OPEN.value is None:
        raise InputError(
            "a backward pass comes after its recording is over, so that nothing of it would be recorded; expected the "
            "recording around grad or value_and_grad, not inside the function that they differentiate"
        )

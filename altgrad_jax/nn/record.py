"""Where the casts of a model write what they see, and which recording is going on."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from altgrad_core.errors import InputError
from altgrad_jax.axes import axes_of
from altgrad_jax.statistics import TallyParts

COUNTS = 5
_LIMB_BITS = 30
_LOW_BITS = 15
_LOW = (1 << _LOW_BITS) - 1
_SHIFTS = np.array([[_LOW_BITS] * COUNTS + [0], [0] * COUNTS + [0]], np.int32)
_MASKS = np.array([[-1] * COUNTS + [-1], [_LOW] * COUNTS + [0]], np.int32)
_IS_AMAX = np.array([False] * COUNTS + [True])
"""How a tally becomes two rows: what is above the low bits, and these; of amax all bits, and nothing."""


class Sight(NamedTuple):
    """What a cast saw.

    Attributes:
        tally: its counts and its amax.
        amaxes: float32, of what has scales of its own; None where that is all of the tensor.
    """

    tally: TallyParts
    amaxes: jax.Array | None


class Shape(NamedTuple):
    """What a cast, or a stack of them, needs to write to.

    Attributes:
        stack: how many casts are stacked; None for one alone.
        amaxes: shape of what has a scale of its own; None where all of the tensor has one.
    """

    stack: int | None
    amaxes: tuple[int, ...] | None

    @property
    def lead(self) -> tuple[int, ...]:
        """The leading axes."""
        return () if self.stack is None else (self.stack,)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Record:
    """Where one cast, or a stack of them, writes what it sees, inside a jitted function or out.

    Attributes:
        seen: int32 ``(2, 6)``: of five counts what is above their low 15 bits, summed up, and these, so that 65,535
            passes of 2^30 elements have room; last the bits of amax. Of a stack with its axis before.
        amaxes: bits of float32, as int32, of what has scales of its own; likewise.
        axis_name: mapped axes over which tensors are parts (static); what is whole in every place counts once.
    """

    seen: jax.Ref
    amaxes: jax.Ref | None
    axis_name: tuple[str, ...] = field(metadata={"static": True})

    def write(self, place: jax.Array | None, size: int, sight: Sight) -> None:
        """Add what a cast saw to what it saw before.

        Args:
            place: int32, which of a stack it is; None for one alone.
            size: how many elements it cast.
            sight: what it saw.
        """
        added = (sight.tally.together(size) >> _SHIFTS) & _MASKS
        axes = axes_of(added, self.axis_name)
        if axes:
            added = jnp.where(_IS_AMAX, lax.pmax(added, axes), lax.psum(added, axes))
        where = ... if place is None else place
        before = self.seen[where]
        self.seen[where] = jnp.where(_IS_AMAX, jnp.maximum(before, added), before + added)
        if self.amaxes is not None and sight.amaxes is not None:
            bits = lax.bitcast_convert_type(sight.amaxes, jnp.int32)  # of which a maximum loses no NaN
            bits = lax.pmax(bits, axes) if axes else bits
            self.amaxes[where] = jnp.maximum(self.amaxes[where], bits)


class Settled(NamedTuple):
    """What was in the records of a model, casts of stacks one after the other.

    Attributes:
        limbs: int32 ``(casts, 5, 2)``, see :class:`~altgrad_jax.statistics.CastCounts`.
        amaxes: float32 ``(casts,)``.
        took_place: bool ``(casts,)``.
    """

    limbs: jax.Array
    amaxes: jax.Array
    took_place: jax.Array


def settled(seen: jax.Array) -> Settled:
    """What is in records, as counts and amaxes.

    Args:
        seen: int32 ``(casts, 2, 6)``.
    """
    above, low = seen[:, 0, :COUNTS], seen[:, 1, :COUNTS]
    above, low = above + (low >> _LOW_BITS), low & _LOW
    of_low_limb = (1 << (_LIMB_BITS - _LOW_BITS)) - 1
    limbs = jnp.stack([above >> (_LIMB_BITS - _LOW_BITS), (above & of_low_limb) << _LOW_BITS | low], axis=-1)
    took_place = (above[:, 0] | low[:, 0]) != 0
    return Settled(limbs, lax.bitcast_convert_type(seen[:, 0, COUNTS], jnp.float32), took_place)


@dataclass(eq=False)
class Recording:
    """A recording that is going on: one object each, which JAX tells apart.

    Attributes:
        records: where casts write, by their numbers; none when it is over, since JAX keeps this object, with which
            it would keep a trace.
        shapes: of what they write to, by their numbers: of all casts of a model, or of those of a part.
        total: how many casts the whole model has.
        key: of those that may use its references after it; None inside a trace, with which they end.
    """

    records: dict[int, Record]
    shapes: dict[int, Shape]
    total: int
    key: Hashable


OPEN = jax.make_user_context(None)
"""The :class:`Recording` that is going on, or None. JAX keeps what it traces apart by it, so that no trace writes into
the record of another."""


_IDLE: dict[Hashable, list[Recording]] = {}
"""Recordings outside of any trace that are over, by what they record. What JAX compiles has the references in it, so
they are used again: else every recording would compile all that computes in it."""


def begin_recording(shapes: dict[int, Shape], total: int, axis_name: tuple[str, ...], nothing: jax.Array) -> Recording:
    """A recording of which nothing is seen yet.

    Args:
        shapes: of what casts write to, by their numbers.
        total: how many casts the whole model has.
        axis_name: mapped axes over which tensors are parts.
        nothing: int32 zero, mapped over axes of which each has a record of its own.
    """
    empty = {number: _empty(shape, nothing) for number, shape in shapes.items()}
    key = None if isinstance(nothing, jax.core.Tracer) else (tuple(shapes.items()), total, axis_name, nothing.sharding)
    try:
        again = _IDLE.get(key, []).pop()  # not looked at first: another thread may take it meanwhile
    except IndexError:
        records = {
            number: Record(jax.new_ref(seen), None if amaxes is None else jax.new_ref(amaxes), axis_name)
            for number, (seen, amaxes) in empty.items()
        }
        return Recording(records, shapes, total, key)
    for number, (seen, amaxes) in empty.items():
        record = again.records[number]
        record.seen[...] = seen
        if record.amaxes is not None:
            record.amaxes[...] = amaxes
    return again


def _empty(shape: Shape, nothing: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    seen = jnp.broadcast_to(nothing, (*shape.lead, 2, COUNTS + 1))
    return seen, None if shape.amaxes is None else jnp.broadcast_to(nothing, (*shape.lead, *shape.amaxes))


def end_recording(recording: Recording) -> None:
    """Let the next recording outside of any trace have the references; drop those of a trace."""
    if recording.key is None:
        recording.records = {}
    else:
        _IDLE.setdefault(recording.key, []).append(recording)


def current_record(number: int, total: int, shape: Shape) -> Record | None:
    """Where a cast of the recording that goes on writes; None if none does, or one of another part of the model.

    Args:
        number: of the cast.
        total: how many its model has.
        shape: of what it writes to.

    Raises:
        InputError: if the recording is of another model.
    """
    recording: Recording | None = OPEN.value
    if recording is None:
        return None
    if recording.total != total:
        raise InputError(
            f"a layer of a model with {total} casts computes while a model with {recording.total} is recorded; "
            "expected them to be one, quantized together"
        )
    if number not in recording.shapes:
        return None
    if recording.shapes[number] != shape:
        raise InputError(
            f"a layer whose cast {number} records {shape} computes while a model is recorded of which that one is "
            f"{recording.shapes[number]}; expected it to be part of the model"
        )
    return recording.records[number]


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

"""Where the casts of a model write what they see, and which recording is going on."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import get_opaque_trace_state

from altgrad_core.errors import InputError
from altgrad_jax.axes import axes_of
from altgrad_jax.statistics import limbs_beside, tallied

_LIMB_BITS = 30
_LOW_BITS = 15
_LOW = np.int32((1 << _LOW_BITS) - 1)
_UNSEEN = np.int32(-(2**31))
"""Of amax: less than the bits of any magnitude."""
_AMAX, _SEEN = 4, 6
"""Where amax is in what is seen, which are so many words."""
WORDS = 2 * _SEEN
_EMPTY = np.array([0] * _AMAX + [_UNSEEN] + [0] * (WORDS - _AMAX - 1), np.int32)
_OF_COUNTS = np.array([-1] * _AMAX + [0, -1], np.int32)
_ORDER = np.array([5, 0, 1, 2, 3])
"""Where what :func:`~altgrad_jax.statistics.tallied` takes is in what is seen."""


class Sight(NamedTuple):
    """What a cast saw.

    Attributes:
        tally: int32 ``(5,)``, its :class:`~altgrad_jax.statistics.TallyParts`.
        amaxes: float32, of what has scales of its own; None where that is all of the tensor.
    """

    tally: jax.Array
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

    Counts are carried when the next ones come, and told apart at the end, so that a recording of one pass compiles
    nothing here: adding to the zeros of a new record is no operation.

    Attributes:
        words: int32 ``(12,)``: the four counts of :class:`~altgrad_jax.statistics.TallyParts`, the bits of amax, and
            elements; of counts those of the last pass, up to 2^30, and the low 15 bits of all before, and in the other
            six words what is above these, so that 65,535 passes have room. Of a stack with its axis before.
        amaxes: int32, bits of float32, of what has scales of its own; likewise.
        number: of the cast (static).
        axis_name: mapped axes over which tensors are parts (static); what is whole in every place counts once.
    """

    words: jax.Ref
    amaxes: jax.Ref | None
    number: int = field(metadata={"static": True})
    axis_name: tuple[str, ...] = field(metadata={"static": True})

    @classmethod
    def new(cls, number: int, shape: Shape, axis_name: tuple[str, ...], nothing: jax.Array) -> Record:
        """One in which nothing is seen.

        Args:
            number: see the class.
            shape: of what writes to it.
            axis_name: see the class.
            nothing: int32 zero, mapped over axes of which each has a record of its own.
        """
        words, amaxes = _empty(shape, nothing)
        return cls(jax.new_ref(words), None if amaxes is None else jax.new_ref(amaxes), number, axis_name)

    def clear(self, shape: Shape, nothing: jax.Array) -> None:
        """Forget what was seen; the arguments as to :meth:`new`."""
        self.words[...], amaxes = _empty(shape, nothing)
        if self.amaxes is not None:
            self.amaxes[...] = amaxes

    def write(self, place: jax.Array | None, size: int, sight: Sight) -> None:
        """Add what a cast saw to what it saw before.

        Args:
            place: int32, which of a stack it is; None for one alone.
            size: how many elements it cast.
            sight: what it saw.
        """
        where = ... if place is None else place
        recording: Recording | None = OPEN.value
        if place is None and not self.axis_name and recording is not None and recording.is_first_of(self.number):
            self.words[...] = _first_words(size, sight.tally)
        else:
            self.words[where] = _words_after(self.words[where], np.int32(size), sight.tally, self.axis_name)
        if self.amaxes is not None and sight.amaxes is not None:
            bits = lax.bitcast_convert_type(sight.amaxes, jnp.int32)  # of which a maximum loses no NaN
            axes = axes_of(bits, self.axis_name)
            bits = lax.pmax(bits, axes) if axes else bits
            self.amaxes[where] = jnp.maximum(self.amaxes[where], bits)

    def read(self) -> jax.Array:
        """int32 ``(casts * 12,)``: the words; flat, as XLA puts them together with those of other casts at once."""
        return self.words[...].reshape(-1)


def _first_words(size: int, tally: jax.Array) -> jax.Array:
    """As :func:`_words_after` on those of a new record."""
    return lax.concatenate([tally, np.array([size] + [0] * _SEEN, np.int32)], 0)


@partial(jax.jit, static_argnums=3)  # traced once for all casts
def _words_after(before: jax.Array, size: jax.Array, tally: jax.Array, axis_name: tuple[str, ...]) -> jax.Array:
    seen = jnp.append(tally, size)
    last, above = jnp.split(before, 2)
    above = above + (last >> _LOW_BITS & _OF_COUNTS)
    largest = jnp.maximum(last, seen)
    axes = axes_of(seen, axis_name)
    if axes:
        above, seen = above + lax.psum(seen >> _LOW_BITS & _OF_COUNTS, axes), lax.psum(seen & _LOW, axes)
        largest = lax.pmax(largest, axes)
    return jnp.concatenate([jnp.where(_OF_COUNTS, (last & _LOW) + seen, largest), above])


def limbs_of(words: jax.Array) -> jax.Array:
    """The limbs of :class:`~altgrad_jax.statistics.CastCounts`, casts of stacks one after the other.

    Args:
        words: int32 ``(casts, 12)``, see :class:`Record`.

    Returns:
        int32 ``(casts, 5, 2)``.
    """
    last, above = jnp.split(words, 2, axis=1)
    seen = jnp.stack([above + (last >> _LOW_BITS), last & _LOW])
    above, low = tallied(seen, _ORDER)
    above, low = above + (low >> _LOW_BITS), low & _LOW
    of_low_limb = (1 << (_LIMB_BITS - _LOW_BITS)) - 1
    return limbs_beside(above >> (_LIMB_BITS - _LOW_BITS), (above & of_low_limb) << _LOW_BITS | low)


def took_place(words: jax.Array) -> jax.Array:
    """Whether casts did, of whose records words are given: bool ``(casts,)``."""
    return (words[:, _SEEN - 1] | words[:, -1]) != 0


def amaxes_of(words: jax.Array) -> jax.Array:
    """The largest magnitudes that casts saw, 0 where they saw nothing: float32 ``(casts,)``."""
    return lax.bitcast_convert_type(jnp.maximum(words[:, _AMAX], 0), jnp.float32)


@dataclass(eq=False)
class Recording:
    """A recording that is going on: one object each, which JAX tells apart.

    Attributes:
        records: where casts write, by their numbers; none when it is over, since JAX keeps this object, with which
            it would keep a trace.
        shapes: of what they write to, by their numbers: of all casts of a model, or of those of a part.
        total: how many casts the whole model has.
        trace: which it began in.
        written: the numbers of casts that have written, or that a trace was made of in which they do.
        key: of those that may use its references after it; None inside a trace, with which they end.
    """

    records: dict[int, Record]
    shapes: dict[int, Shape]
    total: int
    key: Hashable
    trace: object = field(default_factory=get_opaque_trace_state)
    written: set[int] = field(default_factory=set)

    def is_first_of(self, number: int) -> bool:
        """Whether a cast that writes now is the first to write to its record, and does it once.

        It does where it is traced in the trace that the recording began in, and in no loop, branch or function within.
        Outside of any trace that cannot be seen: there what was compiled earlier writes, too.
        """
        is_first = self.key is None and number not in self.written and get_opaque_trace_state() == self.trace
        self.written.add(number)
        return is_first


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
    key = None if isinstance(nothing, jax.core.Tracer) else (tuple(shapes.items()), total, axis_name, nothing.sharding)
    try:
        again = _IDLE.get(key, []).pop()  # not looked at first: another thread may take it meanwhile
    except IndexError:
        records = {number: Record.new(number, shape, axis_name, nothing) for number, shape in shapes.items()}
        return Recording(records, shapes, total, key)
    for number, shape in shapes.items():
        again.records[number].clear(shape, nothing)
    return again


def _empty(shape: Shape, nothing: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """What is in a record of which nothing is seen: words and amaxes."""
    words = jnp.broadcast_to(nothing + _EMPTY, (*shape.lead, WORDS))
    amaxes = None if shape.amaxes is None else jnp.broadcast_to(nothing, (*shape.lead, *shape.amaxes))
    return words, amaxes


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

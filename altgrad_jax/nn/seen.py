"""Recordings: what the casts of a model see while it computes, forward and backward, and the states that come of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from altgrad_core.errors import InputError
from altgrad_core.rules import Operand
from altgrad_jax.nn.casts import CastState
from altgrad_jax.nn.record import COUNTS, OPEN, begin_recording, end_recording
from altgrad_jax.statistics import CastCounts

Tree = TypeVar("Tree")
"""A pytree that holds :class:`~altgrad_jax.nn.casts.CastState`, among other things or alone."""


class Seen:
    """What the casts of a model saw during a recording; to be read once it is over, under the same trace.

    Attributes:
        rows: of each cast by name, such as ``blocks/0/up/weights``, its rows in the record: int32, scalar or, of
            stacked layers, with their axes.
    """

    def __init__(self, states: Mapping[str, CastState], axis_name: tuple[str, ...]) -> None:
        """Begin with nothing seen."""
        self.rows = {name: state.row for name, state in states.items()}
        self._operands = {name: state.operand for name, state in states.items()}
        self.total = _total(states)
        nothing = 0 * next(iter(states.values())).row.reshape(-1)[0]  # mapped, where the states are
        shapes = frozenset(state.amax_shape for state in states.values() if state.writes_amaxes)
        self.recording = begin_recording(self.total, shapes, axis_name, nothing)
        self._read: tuple[jax.Array, dict[tuple[int, ...], jax.Array]] | None = None

    def read(self) -> None:
        """Take what was seen out of the record."""
        record = self.recording.record
        if record is not None:
            self._read = record.seen[...], {shape: ref[...] for shape, ref in record.amaxes.items()}

    @property
    def counts(self) -> dict[str, CastCounts]:
        """The counts of each cast by name, of the shape of its rows."""
        return {name: self._counts(rows) for name, rows in self.rows.items()}

    @property
    def activations(self) -> CastCounts:
        """The counts of all casts of activations together."""
        return self._pooled("activations")

    @property
    def weights(self) -> CastCounts:
        """The counts of all casts of weights together."""
        return self._pooled("weights")

    @property
    def gradients(self) -> CastCounts:
        """The counts of all casts of gradients together: what the clipper's ``overflow_rate`` is the rate of."""
        return self._pooled("gradients")

    def updated(self, states: Tree) -> Tree:
        """The states after this step: those of the casts that took place have its amaxes in their histories.

        Args:
            states: a pytree with the states that the recording began with.
        """
        return jax.tree.map(lambda node: self._after(node) if _is_state(node) else node, states, is_leaf=_is_state)

    def _after(self, state: CastState) -> CastState:
        seen, amaxes = self._finished()
        bits = amaxes[state.amax_shape][state.row] if state.writes_amaxes else seen[state.row, -1]
        took_place = jnp.any(seen[state.row, : 2 * COUNTS] != 0, axis=-1)

        def one(state: CastState, took_place: jax.Array, bits: jax.Array) -> CastState:
            return state.updated(took_place, lax.bitcast_convert_type(bits, jnp.float32))

        for _ in range(state.row.ndim):
            one = jax.vmap(one)
        return one(state, took_place, bits)

    def _pooled(self, operand: Operand) -> CastCounts:
        rows = [rows.reshape(-1) for name, rows in self.rows.items() if self._operands[name] == operand]
        if not rows:
            raise InputError(f"no {operand} are cast in this model, so there are no counts of them")
        return self._counts(jnp.concatenate(rows)).pooled()

    def _counts(self, rows: jax.Array) -> CastCounts:
        seen = self._finished()[0][rows]
        return CastCounts(jnp.stack([seen[..., :COUNTS], seen[..., COUNTS:-1]], axis=-1))

    def _finished(self) -> tuple[jax.Array, dict[tuple[int, ...], jax.Array]]:
        if self._read is None:
            raise InputError("the recording is still going on; expected this after the with statement")
        return self._read


@contextmanager
def record_casts(states: Tree, *, axis_name: str | tuple[str, ...] = ()) -> Iterator[Seen]:
    """Record what the casts of a model see, forward and backward, while the context lasts.

    Open it inside the jitted step, around the forward and the backward pass, any number of them: counts add up, and of
    amaxes the largest stays. Without it scales stand still and nothing is measured: that is how a model is evaluated.

    Args:
        states: a pytree with the model's :class:`~altgrad_jax.nn.casts.CastState`.
        axis_name: inside ``shard_map``, axes over which the tensors are parts: what is seen is of all.

    Yields:
        What was seen, to be read afterwards; its ``updated`` gives the next states.

    Raises:
        InputError: if there is nothing to record, or a recording goes on already.
    """
    if OPEN.value is not None:
        raise InputError("a recording goes on already; expected one at a time, around all passes of a step")
    seen = Seen(named_states(states), (axis_name,) if isinstance(axis_name, str) else tuple(axis_name))
    try:
        with OPEN(seen.recording):
            yield seen
        seen.read()
    finally:
        end_recording(seen.recording)


def named_states(tree: object) -> dict[str, CastState]:
    """The states in a pytree by name: the keys on the way to each."""
    leaves = jax.tree.leaves_with_path(tree, is_leaf=_is_state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): node for path, node in leaves if _is_state(node)}


def _total(states: Mapping[str, CastState]) -> int:
    totals = {state.rows for state in states.values()}
    if not totals:
        raise InputError("there is nothing to record: expected a model with casts, see quantize_model")
    if len(totals) > 1:
        raise InputError(f"the casts belong to models of {sorted(totals)} casts; expected one, quantized together")
    total, found = totals.pop(), sum(state.row.size for state in states.values())
    if found > total:
        raise InputError(
            f"{found} casts would write into {total} rows: models that were quantized apart; expected them to be one "
            "model, quantized together, or, if each is to have a record, the recording under the vmap over them"
        )
    return total


def _is_state(node: object) -> bool:
    return isinstance(node, CastState)

"""Recordings: what the casts of a model see while it computes, forward and backward, and the states that come of it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from altgrad_core.errors import InputError
from altgrad_core.rules import Operand
from altgrad_jax.nn.border import as_one_value
from altgrad_jax.nn.cast_state import CastState
from altgrad_jax.nn.record import OPEN, WORDS, amaxes_of, begin_recording, end_recording, limbs_of, took_place
from altgrad_jax.statistics import CastCounts

Tree = TypeVar("Tree")
"""A pytree that holds :class:`~altgrad_jax.nn.cast_state.CastState`, among other things or alone."""


class Seen:
    """What the casts of a model saw during a recording; to be read once it is over, under the same trace.

    What is said of casts by name, such as ``blocks/0/up/weights``, has the axes of a stack where layers are stacked.
    """

    def __init__(self, states: Mapping[str, CastState], axis_name: tuple[str, ...]) -> None:
        """Begin with nothing seen."""
        self._states = states
        ordered = _by_number(states)
        # What each saw will be found among that of all casts, those of a stack one after the other.
        ends = list(itertools.accumulate(math.prod(state.stack) for state in ordered))
        rows = [np.arange(a, b) for a, b in itertools.pairwise([0, *ends])]
        self._places = {state.number: places for state, places in zip(ordered, rows, strict=True)}
        nothing = 0 * jnp.asarray(ordered[0].words).reshape(-1)[0]  # mapped, where the states are
        shapes = {state.number: state.shape for state in ordered}
        self.recording = begin_recording(shapes, ordered[0].total, axis_name, nothing)
        self._read: _Read | None = None

    def read(self) -> None:
        """Take what was seen out of the records."""
        records = self.recording.records
        if records:
            words = jnp.concatenate([record.read() for record in records.values()]).reshape(-1, WORDS)
            amaxes = {k: record.amaxes[...] for k, record in records.items() if record.amaxes is not None}
            self._read = _Read(as_one_value(limbs_of, words), words, amaxes)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all casts, in the order of :attr:`all`; of a stack with its indices, as ``up/weights[0]``."""
        in_order = sorted(self._states.items(), key=lambda item: item[1].number)
        return tuple(
            name + "".join(f"[{k}]" for k in index)
            for name, state in in_order
            for index in itertools.product(*map(range, state.stack))
        )

    @property
    def all(self) -> CastCounts:
        """The counts of all casts in one array, of shape ``(casts,)``: less to compile and to hand out than many."""
        return CastCounts(self._finished().limbs)

    @property
    def counts(self) -> dict[str, CastCounts]:
        """The counts of each cast by name."""
        limbs = self._finished().limbs
        return {name: CastCounts(each) for name, each in self._by_name(limbs).items()}

    @property
    def overflow_rates(self) -> dict[str, jax.Array]:
        """float32: the overflow rate of each cast by name, worked out together."""
        return self._by_name(as_one_value(_overflow_rate, self._finished().limbs))

    @property
    def underflow_rates(self) -> dict[str, jax.Array]:
        """float32: the underflow rate of each cast by name, as :attr:`overflow_rates`."""
        return self._by_name(as_one_value(_underflow_rate, self._finished().limbs))

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
        words: dict[int, jax.Array] = {}
        for group in _alike(named_states(states).values()):
            words |= self._words_after(group)
        return jax.tree.map(
            lambda node: replace(node, words=words[node.number]) if _is_state(node) else node, states, is_leaf=_is_state
        )

    def _words_after(self, states: Sequence[CastState]) -> dict[int, jax.Array]:
        """The words after this step of casts that differ in data alone, by number: worked out together."""
        read, places = self._finished(), [self._places[state.number] for state in states]
        seen, amaxes = _at(read.words, np.concatenate(places)), None
        if states[0].writes_amaxes:
            bits = [read.amaxes[state.number].reshape(-1, *state.amax_shape) for state in states]
            amaxes = lax.bitcast_convert_type(jnp.concatenate(bits), jnp.float32)
        before = jnp.concatenate([state.words.reshape(-1, state.words.shape[-1]) for state in states])
        one = replace(states[0].anonymous(), words=before[0])
        after = as_one_value(_updated, one, before, seen, amaxes)
        apart = _rows(after) if len(after) == len(states) else _pieces(after, [len(each) for each in places])
        return {state.number: each.reshape(state.words.shape) for state, each in zip(states, apart, strict=True)}

    def _by_name(self, of_all: jax.Array) -> dict[str, jax.Array]:
        found = {name: (state, _at(of_all, self._places[state.number])) for name, state in self._states.items()}
        return {name: each.reshape(*state.stack, *each.shape[1:]) for name, (state, each) in found.items()}

    def _pooled(self, operand: Operand) -> CastCounts:
        places = [self._places[state.number] for state in self._states.values() if state.operand == operand]
        if not places:
            raise InputError(f"no {operand} are cast in this model, so there are no counts of them")
        return CastCounts(_at(self._finished().limbs, np.concatenate(places))).pooled()

    def _finished(self) -> _Read:
        if self._read is None:
            raise InputError("the recording is still going on; expected this after the with statement")
        return self._read


class _Read(NamedTuple):
    """What was in the records.

    Attributes:
        limbs: the counts of all casts, see :class:`~altgrad_jax.statistics.CastCounts`.
        words: the words of all, a row each, see :class:`~altgrad_jax.nn.record.Record`.
        amaxes: bits of float32, by the numbers of the casts that have many.
    """

    limbs: jax.Array
    words: jax.Array
    amaxes: Mapping[int, jax.Array]


def _at(of_all: jax.Array, places: np.ndarray) -> jax.Array:
    """What is said of some of all casts, a slice where they follow upon each other."""
    first, last = int(places[0]), int(places[-1])
    return of_all[first : last + 1] if np.array_equal(places, np.arange(first, last + 1)) else of_all[places]


def _pieces(x: jax.Array, lengths: Sequence[int]) -> list[jax.Array]:
    return jnp.split(x, np.cumsum(lengths)[:-1])


@partial(jax.jit, inline=True)  # one program also outside of jit
def _rows(x: jax.Array) -> list[jax.Array]:
    """Each row of an array as one of its own.

    By numbers that XLA does not know: one kernel is compiled for all, which by numbers that it knows would be one for
    each. They and the rows come from across a border, since what makes numbers alone of numbers XLA works out.
    """
    x, numbers = as_one_value(lax.optimization_barrier, (x, tuple(np.arange(len(x), dtype=np.int32))))
    return [lax.dynamic_index_in_dim(x, number, keepdims=False) for number in numbers]


def _overflow_rate(limbs: jax.Array) -> jax.Array:
    return CastCounts(limbs).overflow_rate


def _underflow_rate(limbs: jax.Array) -> jax.Array:
    return CastCounts(limbs).underflow_rate


def _updated(one: CastState, words: jax.Array, seen: jax.Array, amaxes: jax.Array | None) -> jax.Array:
    def update(words: jax.Array, took_place: jax.Array, largest: jax.Array) -> jax.Array:
        return replace(one, words=words).updated(took_place, largest).words

    return jax.vmap(update)(words, took_place(seen), amaxes_of(seen) if amaxes is None else amaxes)


@contextmanager
def record_casts(states: Tree, *, axis_name: str | tuple[str, ...] = ()) -> Iterator[Seen]:
    """Record what the casts of a model see, forward and backward, while the context lasts.

    Open it inside the jitted step, around the forward and the backward pass, any number of them: counts add up, and of
    amaxes the largest stays. Without it scales stand still and nothing is measured: that is how a model is evaluated.

    Args:
        states: a pytree with the model's :class:`~altgrad_jax.nn.cast_state.CastState`.
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


@contextmanager
def not_recording() -> Iterator[None]:
    """Within a recording, compute what is none of its business, such as a teacher of a student that is recorded.

    What computes in here, and what is differentiated of it, enters no record. Elsewhere a model of as many casts as the
    one that is recorded would be taken for it. Where nothing records this changes nothing.

    >>> from flax import nnx
    >>> from altgrad_jax.nn import Rule, quantize_model, recording
    >>> model = quantize_model(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), [Rule(".*", "E4M3")])
    >>> with recording(model) as seen:
    ...     student = model(jnp.ones((2, 4)))
    ...     with not_recording():
    ...         teacher = model(jnp.ones((9, 4)))
    >>> seen.activations.as_integers()["elements"]
    8
    """
    with OPEN(None):
        yield


def named_states(tree: object) -> dict[str, CastState]:
    """The states in a pytree by name: the keys on the way to each."""
    leaves = jax.tree.leaves_with_path(tree, is_leaf=_is_state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): node for path, node in leaves if _is_state(node)}


def _by_number(states: Mapping[str, CastState]) -> list[CastState]:
    """The states of a model, or of a part of one, in the order of their numbers."""
    totals = {state.total for state in states.values()}
    if not totals:
        raise InputError("there is nothing to record: expected a model with casts, see quantize_model")
    if len(totals) > 1:
        raise InputError(f"the casts belong to models of {sorted(totals)} casts; expected one, quantized together")
    ordered = sorted(states.values(), key=lambda state: state.number)
    for before, after in itertools.pairwise(ordered):
        if before.number == after.number:
            raise InputError(
                f"two of the {len(ordered)} casts have the number {after.number}, of models with {after.total}: "
                "quantized apart; expected them to be one model, quantized together"
            )
    for state in ordered:
        _check_stack(state)
    return ordered


def _check_stack(state: CastState) -> None:
    """Refuse a state that was stacked since it was made, or that is of one layer of a stack."""
    found = state.words.shape[:-1]
    if len(found) < len(state.stack):
        raise InputError(
            f"a cast was quantized in a stack of {state.stack} and has leading axes {found}, so the stack is mapped or "
            "scanned over around the recording; expected the recording around a scan over its layers or, if models are "
            "mapped and each is to have a record, quantize_model of each before they are stacked, as inside of the "
            "vmap that makes them"
        )
    if found != state.stack:
        raise InputError(
            f"a cast has leading axes {found}, and was quantized with {state.stack}, before it was stacked; expected, "
            "if models are mapped and each is to have a record, the recording under the vmap over them or, if layers "
            "are scanned over, dequantize_model and then quantize_model of the stack"
        )


def _alike(states: Iterable[CastState]) -> list[list[CastState]]:
    """The states that differ in data alone, group by group."""
    groups: dict[jax.tree_util.PyTreeDef, list[CastState]] = {}
    for state in states:
        groups.setdefault(jax.tree.structure(state.anonymous()), []).append(state)
    return list(groups.values())


def _is_state(node: object) -> bool:
    return isinstance(node, CastState)

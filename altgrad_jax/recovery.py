"""What keeps a run alive: steps that a NaN cannot poison, weights stored on the grid, snapshots to go back to.

:func:`skip_nonfinite` is an optax element. An optax element can only add to parameters, so what replaces them is a pure
function of the whole train state: :func:`select_if_finite`, :func:`commit`, :func:`snapshot`, :func:`rollback`,
:func:`reset_moments`. All of them may be jitted, mapped and sharded. ``altgrad_torch/recovery.py`` says the same thing
in place.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax import lax

from altgrad_core.formats import Format, parse
from altgrad_core.settings import check_count
from altgrad_core.snapshots import check_back
from altgrad_jax.axes import AxisName
from altgrad_jax.casting import quantize
from altgrad_jax.hashing import hash_bits
from altgrad_jax.params import FormatParams, check_one_for_each, paths_of
from altgrad_jax.scaling import amax, power_of_two_scale
from altgrad_jax.sums import joined, together

State = TypeVar("State")
"""Any pytree of arrays."""

_Path = tuple[Any, ...]


def all_finite(tree: optax.Params, *, axis_name: AxisName | None = None) -> jax.Array:
    """Whether no floating-point or complex leaf holds an infinity or NaN: bool scalar, True for a tree without any.

    Args:
        tree: pytree of arrays.
        axis_name: inside ``shard_map`` or ``vmap``, the axes over whose places the answer has to be the same.

    >>> bool(all_finite({"w": jnp.array([1.0, jnp.nan])}))
    False
    """
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    leaves = [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    # x * 0 is 0, or NaN where x is not finite: a sum, where reducing with "and" takes three passes.
    sums = [jnp.sum(joined([leaves[k] for k in group]) * 0) for group in together(leaves)]
    finite = jnp.all(jnp.stack([jnp.isfinite(each) for each in sums])) if sums else jnp.asarray(True)
    return finite if axis_name is None else lax.pmin(finite.astype(jnp.int32), axis_name) == 1


class SkipNonfiniteState(NamedTuple):
    """State of :func:`skip_nonfinite`.

    Attributes:
        inner_state: state of the wrapped transformation, as the last finite update left it.
        finite: bool, whether the last update was finite.
        consecutive: int32, non-finite updates in a row up to the last one.
        skipped: int32, all non-finite updates so far.
    """

    inner_state: optax.OptState
    finite: jax.Array
    consecutive: jax.Array
    skipped: jax.Array


def skip_nonfinite(
    inner: optax.GradientTransformation, *, axis_name: AxisName | None = None
) -> optax.GradientTransformationExtraArgs:
    """Skip steps whose gradients hold an infinity or NaN: zero updates, inner state as it was.

    Unlike ``optax.apply_if_finite`` it never gives in and applies one after all; how many were skipped is in the state.
    Updates and inner state have the dtypes that ``inner`` returns.

    Args:
        inner: what to wrap, usually the whole chain.
        axis_name: inside ``shard_map``, the axes over which gradients are parts: if one place skips, all do.

    >>> tx = skip_nonfinite(optax.sgd(1.0))
    >>> grads = {"w": jnp.array([jnp.inf, 1.0])}
    >>> updates, state = tx.update(grads, tx.init(grads))
    >>> updates["w"].tolist(), int(state.skipped)
    ([0.0, 0.0], 1)
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> SkipNonfiniteState:
        # Two zeros: a state that held one array twice could not be donated.
        return SkipNonfiniteState(inner.init(params), jnp.asarray(True), jnp.int32(0), jnp.int32(0))

    def update(
        updates: optax.Updates, state: SkipNonfiniteState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, SkipNonfiniteState]:
        def step() -> tuple[optax.Updates, optax.OptState]:
            return inner.update(updates, state.inner_state, params, **extra_args)

        finite = all_finite(updates, axis_name=axis_name)
        # An optimizer may return other dtypes than it is given, as from bfloat16 gradients of float32 parameters.
        stepped, stepped_state = jax.eval_shape(step)
        new_updates, inner_state = lax.cond(
            finite,
            step,
            lambda: (
                jax.tree.map(jnp.zeros_like, stepped),
                jax.tree.map(_as_dtype_of, stepped_state, state.inner_state),
            ),
        )
        missed = 1 - finite.astype(jnp.int32)
        return new_updates, SkipNonfiniteState(
            inner_state, finite, (state.consecutive + 1) * missed, state.skipped + missed
        )

    # optax types every state as any pytree, its own states included.
    return optax.GradientTransformationExtraArgs(init, update)  # pyrefly: ignore[bad-argument-type]


def _as_dtype_of(wanted: jax.ShapeDtypeStruct, leaf: jax.typing.ArrayLike) -> jax.Array:
    array = jnp.asarray(leaf)
    return array if array.dtype == wanted.dtype else array.astype(wanted.dtype)


def select_if_finite(ok: jax.Array, new: State, old: State) -> State:
    """Take the whole new train state if ``ok``, else keep the old one: parameters, moments, counts, amax histories.

    Args:
        ok: bool scalar.
        new: the state after the step.
        old: the state before it, of the same structure.

    >>> select_if_finite(jnp.asarray(False), {"w": jnp.float32(jnp.nan)}, {"w": jnp.float32(2)})["w"].item()
    2.0
    """
    return jax.tree.map(lambda after, before: jnp.where(ok, after, before), new, old)


def commit(
    params: optax.Params,
    format: str | Format | FormatParams,
    mask: optax.Params,
    *,
    seed: int | jax.Array | None = None,
    step: int | jax.Array = 0,
) -> optax.Params:
    """Store weights on the grid of a format: each leaf under the power-of-two scale of its own amax.

    A cast to the same format under the same rule leaves committed weights as they are. Scales end at 2^100; finite
    weights that are too large for that saturate, and infinities stay (in params as they say).

    Args:
        params: pytree of float32 arrays.
        format: the grid; rounding and overflow are those of :class:`~altgrad_jax.params.FormatParams`, else to nearest
            even and ``saturate_finite``. Params may be of one format for each leaf under the mask, in the tree's order.
        mask: pytree of Python bools like ``params``: which leaves to store on the grid.
        seed: of stochastic rounding, uint32 or an integer from 0 to 2^32 - 1: params on the integer path need it.
            Random bits come from :func:`~altgrad_jax.hashing.hash_bits`, with a seed of its own for each leaf: word k
            of ``hash_bits((leaves,), seed, step)`` for leaf k.
        step: likewise, of the training; another step draws other bits.

    Returns:
        The parameters, those under the mask rounded.

    Raises:
        ValueError: if the mask has another structure than ``params``.
        InputError: for another number of formats than of leaves under the mask.

    >>> commit({"w": jnp.array([1.0, 1.1])}, "E5M2", {"w": True})["w"].tolist()
    [1.0, 1.0]
    """
    grid = format if isinstance(format, FormatParams) else _grid_of(parse(format))
    leaves, structure = jax.tree.flatten(params)
    keep, mask_structure = jax.tree.flatten(mask)
    if mask_structure != structure:
        raise ValueError(f"the mask has the structure {mask_structure}; expected that of the params, {structure}")

    check_one_for_each(grid, sum(keep))
    places = list(itertools.accumulate(keep, initial=0))
    seeds = None if seed is None or grid.path != "integer" else hash_bits((len(leaves),), seed, step)

    def on_grid(index: int, leaf: jax.Array) -> jax.Array:
        own = grid.at(places[index])
        scaled = own.scaled(power_of_two_scale(amax(leaf), own.max_value))
        bits = None if seeds is None else hash_bits(leaf.shape, seeds[index], step)
        return quantize(leaf, scaled, random_bits=bits)

    rounded = [on_grid(k, leaf) if chosen else leaf for k, (leaf, chosen) in enumerate(zip(leaves, keep, strict=True))]
    return jax.tree.unflatten(structure, rounded)


def _grid_of(format: Format) -> FormatParams:
    """On a path that reaches as far as float32 does, whatever the scale: the fast one does not."""
    path = next(path for path in paths_of(format) if path != "fast")
    return FormatParams.from_format(format, overflow="saturate_finite", path=path)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Snapshots(Generic[State]):
    """The last good states of a run, on its devices.

    A ring: a new snapshot is written over one that is not referred to any more, and nothing else moves. Under jit with
    the snapshots donated it costs one copy of the state, however many are kept.

    Attributes:
        slots: the states, each leaf with a leading axis of as many as are kept.
        order: int32 ``(keep,)``, the slot of each snapshot, oldest first. After a rollback several may name one slot.
    """

    slots: State
    order: jax.Array

    @classmethod
    def of(cls, state: State, keep: int = 2) -> Snapshots[State]:
        """Copies of a state to start from, which stand for all snapshots until better ones are taken.

        Args:
            state: any pytree of arrays, PRNG keys among them.
            keep: how many snapshots to keep, at least 1. With two or more, one that was taken between a fault and its
                first sign is not the one that a run goes back to.

        Raises:
            InputError: if ``keep`` is not a positive integer.

        >>> Snapshots.of({"w": jnp.ones(3)}, keep=2).slots["w"].shape
        (2, 3)
        """
        check_count("keep", keep, 1)
        slots = jax.tree.map(lambda leaf: jnp.stack([leaf] * keep), state)
        return cls(slots, jnp.arange(keep, dtype=jnp.int32))

    @property
    def keep(self) -> int:
        """How many are kept."""
        return self.order.shape[-1]

    def state(self, back: int | jax.Array | None = None) -> State:
        """The state of a snapshot.

        Args:
            back: how many snapshots to go back: 1 for the newest; the oldest by default. An array, int32 scalar, may
                be traced and is clipped to what is kept.

        Raises:
            InputError: for an integer beyond what is kept.
        """
        slot = self.order[self._place(back)]
        return jax.tree.map(lambda each: lax.dynamic_index_in_dim(each, slot, keepdims=False), self.slots)

    def _place(self, back: int | jax.Array | None) -> jax.Array:
        if back is None:
            return jnp.int32(0)
        if isinstance(back, jax.Array):
            return jnp.clip(self.keep - back, 0, self.keep - 1).astype(jnp.int32)
        check_back(back, self.keep)
        return jnp.int32(self.keep - back)


def snapshot(snapshots: Snapshots[State], state: State, good: jax.Array) -> Snapshots[State]:
    """Keep a copy of ``state`` as the newest snapshot, if it is good; the oldest is dropped.

    Args:
        snapshots: what was kept so far; donate it under jit, and only one slot is written.
        state: the train state now.
        good: bool scalar: whether its last loss was finite and is not running away, and its parameters are finite.

    >>> snapshots = Snapshots.of(jnp.float32(0), keep=3)
    >>> for value in (1, 2, 3):
    ...     snapshots = snapshot(snapshots, jnp.float32(value), jnp.asarray(value != 2))
    >>> [float(snapshots.state(back)) for back in (1, 2, 3)]
    [3.0, 1.0, 0.0]
    """
    later = snapshots.order[1:]
    is_used = jnp.any(later[:, None] == jnp.arange(snapshots.keep, dtype=jnp.int32)[None], axis=0)
    free = jnp.argmin(is_used).astype(jnp.int32)
    # What goes to a slot that does not exist is dropped: so nothing is read to be written back.
    slot = jnp.where(good, free, snapshots.keep)
    return Snapshots(
        slots=jax.tree.map(lambda each, leaf: each.at[slot].set(leaf, mode="drop"), snapshots.slots, state),
        order=jnp.where(good, jnp.concatenate([later, free[None]]), snapshots.order),
    )


def rollback(
    snapshots: Snapshots[State], state: State, do: jax.Array, back: int | jax.Array | None = None
) -> tuple[State, Snapshots[State]]:
    """Go back to a snapshot, the oldest by default, if ``do``. It then stands for all newer ones as well.

    The newer may hold what the run fails of, and so they are not gone back to again. Leave out of ``state`` what has to
    go on: the step number, and with it the batches, so that the run does not meet the same batch again.

    Args:
        snapshots: what was kept.
        state: the state now, of the same structure.
        do: bool scalar.
        back: how many snapshots to go back: 1 for the newest; see :meth:`Snapshots.state`.

    Returns:
        The state to go on from, moments and amax history as they were then (see :func:`reset_moments`), and the
        snapshots to keep.

    Raises:
        InputError: for an integer beyond what is kept.
    """
    place = snapshots._place(back)
    up_to = jnp.minimum(jnp.arange(snapshots.keep, dtype=jnp.int32), place)
    order = jnp.where(do, snapshots.order[up_to], snapshots.order)
    return select_if_finite(do, snapshots.state(back), state), replace(snapshots, order=order)


def reset_moments(tx: optax.GradientTransformation, opt_state: optax.OptState, params: optax.Params) -> optax.OptState:
    """An optimizer state whose moments start anew, as ``tx.init`` makes them, while all else goes on.

    Moments are what the state holds for each parameter, told by paths that end as the parameter's does; if the
    parameters are one array, which has no path, by shapes that hang on its shape. A number right beside them, such as
    Adam's count, which corrects their bias, starts anew with them: beside a count that went on, new moments would make
    steps several times too large. So does what ``optax.MultiSteps`` has accumulated. Schedules, the steps that
    ``MultiSteps`` and ``optax.contrib.schedule_free`` have one hang on, formats in force and what monitors saw go on.

    Args:
        tx: what made the state.
        opt_state: the state in force.
        params: the parameters to go on from, as ``tx.init`` takes them.

    >>> tx = optax.adam(lambda count: 0.1 / (1 + count))
    >>> params = {"w": jnp.ones(2)}
    >>> _, state = tx.update(params, tx.init(params))
    >>> moments, schedule = reset_moments(tx, state, params)
    >>> moments.mu["w"].tolist(), int(moments.count), int(schedule.count)
    ([0.0, 0.0], 0, 1)
    """
    tails = {path for path, _ in jax.tree.leaves_with_path(params)}
    for_whole = _sized_by(tx, params) if () in tails else frozenset()

    def holder_of(path: _Path) -> _Path | None:
        """The node of the state that has a leaf as one of its moments; None if it is none."""
        for depth in range(len(path) + 1):
            if path[depth:] in tails and (path[depth:] or path in for_whole):
                return path[: max(depth - 1, 0)]
        return None

    leaves = jax.tree.leaves_with_path(opt_state, is_leaf=_is_format)
    holders = {holder_of(path) for path, leaf in leaves if not _is_format(leaf)}

    def chosen(path: _Path, now: Any, fresh: Any) -> Any:
        if _is_format(now):
            return now
        return fresh if path[:-1] in holders or holder_of(path) is not None else now

    fresh = _at_the_step_of(opt_state, tx.init(params))
    return jax.tree.map_with_path(chosen, opt_state, fresh, is_leaf=_is_format)


def _sized_by(tx: optax.GradientTransformation, params: optax.Params) -> frozenset[_Path]:
    """The paths of what a state holds in shapes that hang on that of the parameters, which are one array.

    Its own shape does not tell: a count has that of a scalar, and a history may have any.
    """
    (array,) = jax.tree.leaves(params)

    def shapes(shape: tuple[int, ...]) -> dict[_Path, tuple[int, ...]]:
        state = jax.eval_shape(tx.init, jax.ShapeDtypeStruct(shape, jnp.result_type(array)))
        return {path: jnp.shape(leaf) for path, leaf in jax.tree.leaves_with_path(state)}

    shape = jnp.shape(array)
    of_other = shapes(tuple(2 * length for length in shape) or (2,))
    return frozenset(path for path, own in shapes(shape).items() if of_other.get(path) != own)


_STEPS: dict[type, str] = {optax.MultiStepsState: "gradient_step", optax.contrib.ScheduleFreeState: "step_count"}
"""Numbers right beside moments that are not of their age: schedules hang on them."""


def _at_the_step_of(now: optax.OptState, fresh: optax.OptState) -> optax.OptState:
    """The fresh state with the numbers that schedules hang on as they are now."""

    def has_step(node: object) -> bool:
        return type(node) in _STEPS

    def carried(new: Any, old: Any) -> Any:
        if not has_step(new):
            return new
        inside = (jax.tree.map(carried, *pair, is_leaf=has_step) for pair in zip(new, old, strict=True))
        name = _STEPS[type(new)]
        return type(new)(*inside)._replace(**{name: getattr(old, name)})

    return jax.tree.map(carried, fresh, now, is_leaf=has_step)


def _is_format(node: object) -> bool:
    return isinstance(node, FormatParams)

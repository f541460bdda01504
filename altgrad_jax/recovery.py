"""What keeps a run alive: steps that a NaN cannot poison, weights stored on the grid, snapshots to go back to.

:func:`skip_nonfinite` is an optax element. An optax element can only add to parameters, so what replaces them is a pure
function of the whole train state: :func:`select_if_finite`, :func:`commit`, :func:`snapshot`, :func:`rollback`. All of
them may be jitted, mapped and sharded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax import lax

from altgrad_core.formats import Format
from altgrad_jax.axes import AxisName
from altgrad_jax.casting import quantize
from altgrad_jax.params import FormatParams, as_params
from altgrad_jax.scaling import amax, power_of_two_scale

State = TypeVar("State")
"""Any pytree of arrays."""


def all_finite(tree: optax.Params, *, axis_name: AxisName | None = None) -> jax.Array:
    """Whether no floating-point or complex leaf holds an infinity or NaN: bool scalar, True for a tree without any.

    Args:
        tree: pytree of arrays.
        axis_name: inside ``shard_map`` or ``vmap``, the axes over whose places the answer has to be the same.

    >>> bool(all_finite({"w": jnp.array([1.0, jnp.nan])}))
    False
    """
    # x * 0 is 0, or NaN where x is not finite: one sum for each leaf, where reducing with "and" takes three passes.
    sums = [jnp.sum(leaf * 0) for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
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
        zero = jnp.int32(0)
        return SkipNonfiniteState(inner.init(params), finite=jnp.asarray(True), consecutive=zero, skipped=zero)

    def update(
        updates: optax.Updates, state: SkipNonfiniteState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, SkipNonfiniteState]:
        finite = all_finite(updates, axis_name=axis_name)
        new_updates, inner_state = lax.cond(
            finite,
            lambda: inner.update(updates, state.inner_state, params, **extra_args),
            lambda: (optax.tree.zeros_like(updates), state.inner_state),
        )
        missed = 1 - finite.astype(jnp.int32)
        return new_updates, SkipNonfiniteState(
            inner_state, finite, (state.consecutive + 1) * missed, state.skipped + missed
        )

    # optax types every state as any pytree, its own states included.
    return optax.GradientTransformationExtraArgs(init, update)  # pyrefly: ignore[bad-argument-type]


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
    params: optax.Params, format: str | Format | FormatParams, mask: optax.Params, key: jax.Array | None = None
) -> optax.Params:
    """Store weights on the grid of a format: each leaf under the power-of-two scale of its own amax.

    A cast to the same format under the same rule leaves committed weights as they are. What would overflow saturates.

    Args:
        params: pytree of float32 arrays.
        format: the grid; the rounding is that of :class:`~altgrad_jax.casting.FormatParams`, else nearest even.
        mask: pytree of Python bools like ``params``: which leaves to store on the grid.
        key: PRNG key for stochastic rounding; params on the integer path need it.

    Returns:
        The parameters, those under the mask rounded.

    Raises:
        ValueError: if the mask has another structure than ``params``.

    >>> commit({"w": jnp.array([1.0, 1.1])}, "E5M2", {"w": True})["w"].tolist()
    [1.0, 1.0]
    """
    grid = as_params(format)
    leaves, structure = jax.tree.flatten(params)
    keep, mask_structure = jax.tree.flatten(mask)
    if mask_structure != structure:
        raise ValueError(f"the mask has the structure {mask_structure}; expected that of the params, {structure}")

    def on_grid(index: int, leaf: jax.Array) -> jax.Array:
        scaled = grid.scaled(power_of_two_scale(amax(leaf), grid.max_value))
        if key is None or grid.path != "integer":
            return quantize(leaf, scaled)
        return quantize(leaf, scaled, random_bits=jax.random.bits(jax.random.fold_in(key, index), leaf.shape))

    rounded = [on_grid(k, leaf) if chosen else leaf for k, (leaf, chosen) in enumerate(zip(leaves, keep, strict=True))]
    return jax.tree.unflatten(structure, rounded)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Snapshots(Generic[State]):
    """The last two good states of a run, on its device. One goes back to the older: the newer may hide a poison.

    Attributes:
        older: state of the snapshot before the last.
        newer: state of the last snapshot.
    """

    older: State
    newer: State

    @classmethod
    def of(cls, state: State) -> Snapshots[State]:
        """Two copies of a state to start from."""
        return cls(jax.tree.map(jnp.copy, state), jax.tree.map(jnp.copy, state))


def snapshot(snapshots: Snapshots[State], state: State, good: jax.Array) -> Snapshots[State]:
    """Keep a copy of ``state`` as the newest snapshot, if it is good; the oldest is dropped.

    Args:
        snapshots: what was kept so far.
        state: the train state now.
        good: bool scalar: whether its last loss was finite and sound and its parameters are finite.
    """
    return Snapshots(
        older=select_if_finite(good, snapshots.newer, snapshots.older),
        newer=select_if_finite(good, state, snapshots.newer),
    )


def rollback(snapshots: Snapshots[State], state: State, do: jax.Array) -> tuple[State, Snapshots[State]]:
    """Go back to the older snapshot, if ``do``. It then stands for both: the newer may hold what the run fails of.

    Args:
        snapshots: what was kept.
        state: the state now, of the same structure.
        do: bool scalar.

    Returns:
        The state to go on from, moments and amax history as they were then, and the snapshots to keep.
    """
    return select_if_finite(~do, state, snapshots.older), Snapshots(
        snapshots.older, select_if_finite(~do, snapshots.newer, snapshots.older)
    )

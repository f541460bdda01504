"""Gradients that hold an infinity or NaN: who is the culprit, and what becomes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from altgrad_core.errors import InputError
from altgrad_core.nonfinite import NO_CULPRIT, culprit_message
from altgrad_jax.axes import AxisName, by_axes, sum_over

_MOST = 2**31 - 1


class Culprit(NamedTuple):
    """The first leaf that is not finite.

    Attributes:
        index: int32, its place in ``jax.tree.leaves``; -1 for none. :func:`leaf_path` tells its path.
        count: int32, how many elements of all leaves are not finite; 2^31 - 1 for that many or more.
    """

    index: jax.Array
    count: jax.Array

    @classmethod
    def none(cls) -> Culprit:
        """Nobody, or not looked."""
        return cls(jnp.int32(NO_CULPRIT), jnp.int32(0))


def find_culprit(leaves: Sequence[jax.Array], axis_name: AxisName | None = None) -> Culprit:
    """Look through leaves for what is not finite: one pass.

    Args:
        leaves: floating-point arrays.
        axis_name: inside ``shard_map`` or ``vmap``, the axes over which they are parts of larger ones; see
            :func:`altgrad_jax.axes.axes_of`.

    >>> culprit = find_culprit([jnp.ones(2), jnp.array([jnp.nan, 1.0, jnp.inf])])
    >>> int(culprit.index), int(culprit.count)
    (1, 2)
    """
    with jax.enable_x64(True):
        counts = jnp.zeros(len(leaves), jnp.int64)
        for axes, group in by_axes(leaves, axis_name).items():
            seen = jnp.stack([jnp.sum(~jnp.isfinite(leaves[k]), dtype=jnp.int64) for k in group])
            counts = counts.at[np.array(group)].set(sum_over(seen, axes))
        total = jnp.minimum(jnp.sum(counts), _MOST).astype(jnp.int32)
        first = lax.argmax((counts > 0).astype(jnp.int32), 0, jnp.int32)
        return Culprit(jnp.where(total > 0, first, NO_CULPRIT).astype(jnp.int32), total)


def leaf_path(tree: optax.Updates, index: int | jax.Array) -> str | None:
    """The path of a leaf by its place among the leaves of a tree; None for -1 (not under jit).

    >>> leaf_path({"attn": {"kernel": jnp.ones(2)}}, 0)
    'attn/kernel'
    """
    return None if int(index) == NO_CULPRIT else leaf_paths(tree)[int(index)]


def leaf_paths(tree: optax.Updates) -> list[str]:
    """The paths of all leaves, in their order: keys and indices, joined by slashes.

    >>> leaf_paths({"blocks": [{"w": jnp.ones(1)}]})
    ['blocks/0/w']
    """
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(tree)]


def without_nonfinite(leaf: jax.Array) -> jax.Array:
    """The leaf with zero where it is not finite."""
    return jnp.where(jnp.isfinite(leaf), leaf, jnp.zeros_like(leaf))


def raise_if_nonfinite(tree: optax.Updates) -> None:
    """Raise for the first leaf that is not finite.

    Raises:
        FloatingPointError: naming the leaf.
        InputError: under a transformation, where nothing can be raised.
    """
    leaves = jax.tree.leaves(tree)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        raise InputError("nonfinite='raise' works outside of jit and other transformations; expected 'skip' or 'zero'")
    counts = [int(jnp.sum(~jnp.isfinite(leaf))) for leaf in leaves]
    bad = [index for index, count in enumerate(counts) if count]
    if bad:
        path = leaf_paths(tree)[bad[0]]
        raise FloatingPointError(culprit_message(path, counts[bad[0]], leaves[bad[0]].size, len(bad) - 1))

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
from altgrad_jax.sums import joined, together

_MOST = _NOBODY = 2**31 - 1


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
        total, first = jnp.int64(0), jnp.int32(_NOBODY)
        for axes, places in by_axes(leaves, axis_name).items():
            for group in together([leaves[k] for k in places]):
                count, culprit = _of_group([places[k] for k in group], leaves)
                total = total + sum_over(count, axes)
                first = jnp.minimum(first, lax.pmin(culprit, axes) if axes else culprit)
        total = jnp.minimum(total, _MOST).astype(jnp.int32)
        return Culprit(jnp.where(total > 0, first, NO_CULPRIT).astype(jnp.int32), total)


def _of_group(places: Sequence[int], leaves: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """How many elements of some leaves are not finite, and the place of the first leaf that has one."""
    bad = ~jnp.isfinite(joined([leaves[k] for k in places]))
    count = jnp.sum(bad, dtype=jnp.int64)
    if len(places) == 1:
        return count, jnp.where(count > 0, np.int32(places[0]), np.int32(_NOBODY))
    owners = np.repeat(np.array(places, np.int32), [leaves[k].size for k in places])
    return count, jnp.min(jnp.where(bad, owners, np.int32(_NOBODY)))


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

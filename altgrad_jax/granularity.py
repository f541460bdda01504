"""Which elements share a scale: all, those of a channel, or those of a block.

Three steps, between which :mod:`altgrad_jax.scaling` says what the scale is::

    history, largest = scaling.init(...), amaxes(x, "block32")
    scale = scaling.scale(largest, params.max_value, history)
    quantize(x, params, scale=spread(scale, x.shape, "block32"))

``altgrad_torch/granularity.py`` says the same thing in torch.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from altgrad_core.errors import InputError
from altgrad_core.scaling import Granularity, PerBlock, checked_axis, parse_granularity, reduced_axes
from altgrad_jax.axes import places_along, whole_along
from altgrad_jax.scaling import amax


def amaxes(x: jax.Array, granularity: str | Granularity = "tensor") -> jax.Array:
    """The largest magnitude of everything that shares a scale. See :func:`altgrad_jax.scaling.amax`.

    Args:
        x: float32, bfloat16 or float16, of any shape.
        granularity: ``"tensor"``, ``"channel"``, ``"block32"``, or a :data:`~altgrad_core.scaling.Granularity`.

    Returns:
        float32 with the axes of ``x``. A shared axis has length 1; one that is cut into blocks has one entry a block.

    Raises:
        InputError: for an unknown granularity or an axis that ``x`` does not have.

    >>> amaxes(jnp.array([[1.0, -3.0, 2.0]]), PerBlock(2)).tolist()
    [[3.0, 2.0]]
    """
    x, resolved = jnp.asarray(x), parse_granularity(granularity)
    if isinstance(resolved, PerBlock):
        axis = checked_axis(resolved.axis, x.ndim)
        return jnp.squeeze(amax(to_blocks(x, resolved), axis + 1), axis + 1)
    return amax(x, reduced_axes(resolved, x.ndim))


def spread(scales: jax.Array, shape: tuple[int, ...], granularity: str | Granularity = "tensor") -> jax.Array:
    """Scales as they broadcast against the array that they belong to.

    Args:
        scales: as many as :func:`amaxes` gives for the shape; or one for all.
        shape: that of the array.
        granularity: as it was given to :func:`amaxes`.

    Returns:
        The scales as they are, but for blocks: those are repeated for every element along their axis.

    Raises:
        InputError: for an unknown granularity, an axis out of range, or scales that do not fit the shape.

    >>> spread(jnp.array([3.0, 2.0]), (3,), PerBlock(2)).tolist()
    [3.0, 3.0, 2.0]
    """
    resolved = parse_granularity(granularity)
    if not isinstance(resolved, PerBlock) or scales.ndim == 0:
        return scales
    axis = checked_axis(resolved.axis, len(shape))
    expected = (*shape[:axis], resolved.count(shape[axis]), *shape[axis + 1 :])
    if scales.shape != expected:
        raise InputError(
            f"the scales have shape {scales.shape}; expected {expected}, one for each block of {resolved.size} along "
            f"axis {axis} of {shape}"
        )
    whole = (*expected[: axis + 1], resolved.size, *expected[axis + 1 :])
    return from_blocks(jnp.broadcast_to(jnp.expand_dims(scales, axis + 1), whole), shape, resolved)


def to_blocks(x: jax.Array, granularity: PerBlock) -> jax.Array:
    """An axis of length n cut into two, ``(blocks, size)``; zeros fill the last block.

    >>> to_blocks(jnp.array([1.0, -3.0, 2.0]), PerBlock(2)).tolist()
    [[1.0, -3.0], [2.0, 0.0]]
    """
    axis = checked_axis(granularity.axis, x.ndim)
    count = granularity.count(x.shape[axis])
    missing = count * granularity.size - x.shape[axis]
    if missing or count % places_along(x, axis):
        x = whole_along(x, axis)
    if missing:
        x = jnp.pad(x, [(0, missing if each == axis else 0) for each in range(x.ndim)])
    return x.reshape(*x.shape[:axis], count, granularity.size, *x.shape[axis + 1 :])


def from_blocks(blocks: jax.Array, shape: tuple[int, ...], granularity: PerBlock) -> jax.Array:
    """What :func:`to_blocks` cut, as it was."""
    axis = checked_axis(granularity.axis, len(shape))
    count, size = blocks.shape[axis : axis + 2]
    joined = blocks.reshape(*shape[:axis], count * size, *shape[axis + 1 :])
    return joined if joined.shape == tuple(shape) else jax.lax.slice_in_dim(joined, 0, shape[axis], axis=axis)

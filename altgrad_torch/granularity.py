"""Which elements share a scale: all, those of a channel, or those of a block.

Three steps, between which :mod:`altgrad_torch.scaling` says what the scale is::

    history, largest = scaling.init(...), amaxes(x, "block32")
    scale = scaling.scale(largest, parse(format).max_representable_value, history)
    quantize(x, format, scale=spread(scale, x.shape, "block32"))

``altgrad_jax/granularity.py`` says the same thing in JAX.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad

from altgrad_core.errors import InputError
from altgrad_core.scaling import Granularity, PerBlock, checked_axis, parse_granularity, reduced_axes
from altgrad_torch.scaling import amax


def amaxes(x: Tensor, granularity: str | Granularity = "tensor") -> Tensor:
    """The largest magnitude of everything that shares a scale. See :func:`altgrad_torch.scaling.amax`.

    Args:
        x: float32, bfloat16 or float16, of any shape.
        granularity: ``"tensor"``, ``"channel"``, ``"block32"``, or a :data:`~altgrad_core.scaling.Granularity`.

    Returns:
        float32 with the axes of ``x``. A shared axis has length 1; one that is cut into blocks has one entry a block.

    Raises:
        InputError: for an unknown granularity or an axis that ``x`` does not have.

    >>> import torch
    >>> amaxes(torch.tensor([[1.0, -3.0, 2.0]]), PerBlock(2)).tolist()
    [[3.0, 2.0]]
    """
    resolved = parse_granularity(granularity)
    if isinstance(resolved, PerBlock):
        axis = checked_axis(resolved.axis, x.ndim)
        return amax(to_blocks(x, resolved), axis + 1).squeeze(axis + 1)
    return amax(x, reduced_axes(resolved, x.ndim))


def spread(scales: Tensor, shape: tuple[int, ...], granularity: str | Granularity = "tensor") -> Tensor:
    """Scales as they broadcast against the tensor that they belong to.

    Args:
        scales: as many as :func:`amaxes` gives for the shape; or one for all.
        shape: that of the tensor.
        granularity: as it was given to :func:`amaxes`.

    Returns:
        The scales as they are, but for blocks: those are repeated for every element along their axis.

    Raises:
        InputError: for an unknown granularity, an axis out of range, or scales that do not fit the shape.

    >>> import torch
    >>> spread(torch.tensor([3.0, 2.0]), (3,), PerBlock(2)).tolist()
    [3.0, 3.0, 2.0]
    """
    resolved = parse_granularity(granularity)
    if not isinstance(resolved, PerBlock) or scales.ndim == 0:
        return scales
    axis = checked_axis(resolved.axis, len(shape))
    expected = (*shape[:axis], resolved.count(shape[axis]), *shape[axis + 1 :])
    if scales.shape != expected:
        raise InputError(
            f"the scales have shape {tuple(scales.shape)}; expected {expected}, one for each block of {resolved.size} "
            f"along axis {axis} of {tuple(shape)}"
        )
    whole = (*expected[: axis + 1], resolved.size, *expected[axis + 1 :])
    return from_blocks(scales.unsqueeze(axis + 1).expand(whole), shape, resolved)


def to_blocks(x: Tensor, granularity: PerBlock) -> Tensor:
    """An axis of length n cut into two, ``(blocks, size)``; zeros fill the last block.

    >>> import torch
    >>> to_blocks(torch.tensor([1.0, -3.0, 2.0]), PerBlock(2)).tolist()
    [[1.0, -3.0], [2.0, 0.0]]
    """
    axis = checked_axis(granularity.axis, x.ndim)
    count = granularity.count(x.shape[axis])
    missing = count * granularity.size - x.shape[axis]
    if missing:
        # pad counts axes from the last.
        x = pad(x, [0, 0] * (x.ndim - 1 - axis) + [0, missing])
    return x.reshape(*x.shape[:axis], count, granularity.size, *x.shape[axis + 1 :])


def from_blocks(blocks: Tensor, shape: tuple[int, ...], granularity: PerBlock) -> Tensor:
    """What :func:`to_blocks` cut, as it was."""
    axis = checked_axis(granularity.axis, len(shape))
    count, size = blocks.shape[axis : axis + 2]
    joined = blocks.reshape(*shape[:axis], count * size, *shape[axis + 1 :])
    return joined.narrow(axis, 0, shape[axis])

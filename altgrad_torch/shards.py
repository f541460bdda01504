"""Tensors that lie on several processes, as DTensors: what each process holds of them, and what they make together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from altgrad_core.errors import InputError


def is_sharded(tensor: Tensor | None) -> bool:
    """Whether this is a DTensor; asked this way because importing the class takes most of a second."""
    return hasattr(tensor, "full_tensor")


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    tensor = tensor.detach()
    if not is_sharded(tensor):
        return tensor
    sharded: Any = tensor
    return sharded.to_local()


def summed(tensor: Tensor) -> Tensor:
    """A DTensor whose value is yet to be added up over processes (``Partial``), added up; any other as it is."""
    if not is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import Replicate

    sharded: Any = tensor
    if not any(each.is_partial() for each in sharded.placements):
        return tensor
    whole = [Replicate() if each.is_partial() else each for each in sharded.placements]
    return sharded.redistribute(placements=whole)


def whole_on_each(x: Tensor) -> Tensor:
    """A DTensor gathered, as a plain tensor; any other as it is."""
    sharded: Any = x
    return sharded.full_tensor() if is_sharded(x) else x


def refuse_sharded(x: object, taker: str) -> None:
    """Refuse DTensors where neighbours belong together that may lie on different processes.

    Raises:
        InputError: naming the taker.
    """
    if isinstance(x, Tensor) and is_sharded(x):
        raise InputError(
            f"{taker} takes tensors that are whole; got a DTensor of shape {tuple(x.shape)}, expected x.full_tensor()"
        )


def on_shards(function: Callable[..., Tensor], x: Tensor, *beside: Tensor | None) -> Tensor:
    """An elementwise function of a DTensor: each process does its own part. Gradients pass.

    Not left to DTensor, whose shifts of bits shift nothing (torch 2.13).

    Args:
        function: of ``x`` and of what is beside it, elementwise; its result has the shape of ``x``.
        x: a DTensor.
        beside: broadcasts against ``x``; a plain tensor is the same on all processes.

    Returns:
        A DTensor, placed as ``x``.
    """
    from torch.distributed.tensor import DTensor

    whole: Any = summed(x)
    mesh, placements = whole.device_mesh, whole.placements
    parts = [local_beside(each, whole) for each in beside]
    result = function(whole.to_local(), *parts)
    return DTensor.from_local(result, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride())


def local_beside(other: Tensor | None, whole: Any) -> Tensor | None:
    """This process's part of what broadcasts against a DTensor, however that is placed itself."""
    if other is None or (other.numel() == 1 and not is_sharded(other)):
        return other
    from torch.distributed.tensor import distribute_tensor

    placed: Any = other
    if is_sharded(other) and placed.shape == whole.shape:
        return placed.redistribute(whole.device_mesh, whole.placements).to_local()
    other = whole_on_each(other)
    if other.numel() == 1:
        return other
    # Each process cuts its part out of what it has: nothing is sent.
    spread = other.expand(whole.shape)
    return distribute_tensor(spread, whole.device_mesh, whole.placements, src_data_rank=None).to_local()


def over_shards(values: Sequence[Tensor], tensors: Sequence[Tensor], reduction: Literal["sum", "max"]) -> Tensor:
    """Values of tensors, stacked on the first one's device; those of DTensors reduced over the processes.

    Sums are of integers and maxima of magnitudes, so that it does not matter in which order.
    """
    if reduction == "max":
        # As integers: a float maximum over processes may lose a NaN.
        dtype = values[0].dtype
        values = [value.abs().view(torch.int64 if dtype == torch.float64 else torch.int32) for value in values]
        return _reduced(values, tensors, reduction).view(dtype)
    return _reduced(values, tensors, reduction)


def sum_over_shards(values: Sequence[Tensor], tensors: Sequence[Tensor]) -> Tensor:
    """The sum of float64 values of tensors, and of all shards of those that are DTensors: on the first one's device.

    Shards' values are gathered, and added up here. Where processes added them up in different orders, they could go
    different ways next to a tie, and wait for each other for ever.
    """
    device = values[0].device
    sums = [value.to(device) for value, tensor in zip(values, tensors, strict=True) if not is_sharded(tensor)]
    for (mesh, split), group in _by_layout(tensors).items():
        part = torch.stack([values[k].to(values[group[0]].device) for k in group]).sum()[None]
        for axis in split:
            gathered = [torch.empty_like(part) for _ in range(mesh.size(axis))]
            torch.distributed.all_gather(gathered, part, mesh.get_group(axis))
            part = torch.cat(gathered)
        sums.append(part.sum().to(device))
    return torch.stack(sums).sum()


def _reduced(values: Sequence[Tensor], tensors: Sequence[Tensor], reduction: Literal["sum", "max"]) -> Tensor:
    device, whole = values[0].device, list(values)
    for (mesh, split), group in _by_layout(tensors).items():
        # Together, because each reduction is a message to every process.
        parts = torch.stack([values[k].to(values[group[0]].device) for k in group])
        operation = torch.distributed.ReduceOp.SUM if reduction == "sum" else torch.distributed.ReduceOp.MAX
        for axis in split:
            torch.distributed.all_reduce(parts, operation, mesh.get_group(axis))
        for k, value in zip(group, parts, strict=True):
            whole[k] = value
    return torch.stack([value.to(device) for value in whole])


def _by_layout(tensors: Sequence[Tensor]) -> dict[tuple[Any, tuple[int, ...]], list[int]]:
    """The places of DTensors among tensors, by their mesh and those of its axes over which they are split."""
    groups: dict[tuple[Any, tuple[int, ...]], list[int]] = {}
    for k, tensor in enumerate(tensors):
        if is_sharded(tensor):
            sharded: Any = tensor
            # Not is_shard(), which is False of the strided shards that FSDP2 makes of tensor-parallel parameters.
            split = tuple(axis for axis, each in enumerate(sharded.placements) if not each.is_replicate())
            groups.setdefault((sharded.device_mesh, split), []).append(k)
    return groups

"""Norms of gradients, taken in float64. The Euclidean one is correctly rounded, whatever the order of the sum.

A float64 sum of squares has a known worst error. Almost always both ends of that interval round to the same float32,
which then is the norm; where they do not, the sum is taken again in integers. ``altgrad_jax/norms.py`` does the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from altgrad_core.errors import InputError
from altgrad_core.norms import EXPONENTS, FLOAT64_ROUNDOFF, LIMB_BITS, norm_of_exponent_sums
from altgrad_torch.cpu import CHUNK, is_plain, sums_of_squares
from altgrad_torch.shards import is_sharded, local, over_shards, sum_over_shards, summed

_FLOAT32_MAX = float(np.finfo(np.float32).max)
_MAGNITUDE = 0x7FFFFFFF
_CHUNK_ON_GPU = 1 << 18
"""Elements that are summed up in one go where each go is a launch. More would leave more roundings to be certain of."""
_SUBNORMALS_COUNT_BELOW = 2.0**-160
"""Squares of subnormals add less than 2^-252 each, where the processor does not flush them."""


def global_norm(tensors: Iterable[Tensor] | Tensor) -> Tensor:
    """The Euclidean norm of all tensors together: the float32 nearest to the true one, ties to even.

    It does not depend on the order of the sum, and so neither on devices nor on the framework. Nothing overflows or
    vanishes on the way, float32 subnormals included. A norm beyond float32's maximum, of tensors that are all finite,
    is that maximum: not inf, which would clip them all to zero. Reads one number back from the device.

    float64 tensors are the exception: with one of them the result may be off by one step next to a tie, and a norm
    beyond 2^511 overflows.

    Args:
        tensors: floating-point tensors of any shapes, dtypes and devices; of DTensors it is the norm over all shards.

    Returns:
        float32 scalar on the first tensor's device; inf or NaN if a tensor holds one.

    Raises:
        ValueError: if there are no tensors, and for a sparse one.
        TypeError: if a tensor is not real floating point.

    >>> norm = global_norm([torch.tensor([3.0, 4.0]) * 2.0**-120, torch.zeros(2)])
    >>> float(norm) == 5 * 2.0**-120
    True
    """
    checked = float_tensors(tensors)
    return torch.tensor(norm_of(checked), dtype=torch.float32, device=checked[0].device)


def float_tensors(tensors: Iterable[Tensor] | Tensor) -> list[Tensor]:
    """Tensors as a list, those whose parts were yet to be added up added up.

    Raises:
        ValueError: if there are none, and for a sparse one.
        TypeError: if one is not real floating point.
    """
    listed = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    if not listed:
        raise ValueError("there are no tensors to take a norm of; expected at least one")
    for tensor in listed:
        if not tensor.is_floating_point():
            raise TypeError(f"gradients are real floating-point tensors; got one of {tensor.dtype}")
        if tensor.layout != torch.strided:
            raise InputError(
                f"gradients are dense tensors; got one of {tensor.layout} and shape {tuple(tensor.shape)}, expected "
                "its to_dense(), or a layer with sparse=False"
            )
    return [summed(tensor) for tensor in listed]


@torch.no_grad()
def norm_of(tensors: Sequence[Tensor], norm_type: float = 2.0) -> float:
    """The norm of order p of all tensors together, ``(sum |x|^p)^(1/p)``; the largest magnitude for inf.

    That of order 2 is :func:`euclidean_norm`, and that of order inf is exact. The others are float64 sums, rounded
    once: right but next to a tie.

    Returns:
        A float that float32 holds.
    """
    if norm_type == 2:
        return euclidean_norm(tensors)
    largest = over_shards([_largest_magnitude(part) for part in map(local, tensors)], tensors, "max").max()
    if math.isinf(norm_type) or not largest.isfinite() or largest == 0:
        return _rounded(float(largest))
    powers = [
        ((part.to(torch.float64).abs() / largest.to(part.device)) ** norm_type).sum() for part in map(local, tensors)
    ]
    return _rounded(float(largest * sum_over_shards(powers, tensors) ** (1 / norm_type)))


@torch.no_grad()
def euclidean_norm(tensors: Sequence[Tensor]) -> float:
    """:func:`global_norm` as a float that float32 holds."""
    parts = [local(tensor) for tensor in tensors]
    total = _sum_of_all_squares(tensors, parts)
    root = math.sqrt(total) if total >= 0 else total
    if not math.isfinite(root) or any(tensor.dtype == torch.float64 for tensor in tensors):
        return _rounded(root)
    # Of positive numbers n are added with at most n - 1 roundings in a row, in any order whatever. Twice what is added
    # up over tensors and devices; one for each square; the root halves it all, and adds two of its own.
    # From whole sizes: if those of shards made processes disagree on what is certain, some would wait for ever.
    # On a GPU of all pieces together, and three more: for the root that torch takes of a sum, and the square of that.
    chunk = CHUNK if all(each.device.type == "cpu" for each in parts) else _CHUNK_ON_GPU
    pieces = sum(-(-each.numel() // chunk) for each in tensors)
    in_a_row = chunk + pieces + 2 * len(parts) + 2 * _world_size(tensors) + 7
    slack = in_a_row * FLOAT64_ROUNDOFF
    is_certain = _rounded(root * (1 - slack)) == _rounded(root * (1 + slack))
    if is_certain and total >= _SUBNORMALS_COUNT_BELOW:
        return _rounded(root)
    # In integers, which no processor flushes: subnormals count even under ``torch.set_flush_denormal``.
    sums = over_shards([_exponent_sums(part) for part in parts], tensors, "sum").sum(0)
    return norm_of_exponent_sums(*sums.tolist())


def _world_size(tensors: Sequence[Tensor]) -> int:
    meshes: list[Any] = [tensor for tensor in tensors if is_sharded(tensor)]
    return max((tensor.device_mesh.size() for tensor in meshes), default=1)


def _sum_of_all_squares(tensors: Sequence[Tensor], parts: Sequence[Tensor]) -> float:
    together = [k for k, part in enumerate(parts) if is_plain(part, "cuda") and not is_sharded(tensors[k])]
    others = sorted(set(range(len(parts))) - set(together))
    sums = _sums_of_squares_on_gpu([parts[k] for k in together])
    if others:
        sums.append(sum_over_shards(_sums_of_squares([parts[k] for k in others]), [tensors[k] for k in others]))
    return float(torch.stack([each.to(sums[-1].device) for each in sums]).sum())


def _sums_of_squares_on_gpu(parts: Sequence[Tensor]) -> list[Tensor]:
    """One sum for all tensors of a device and dtype, in few launches: each costs as much as some 100,000 elements."""
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for part in parts:
        alike.setdefault((part.device, part.dtype), []).extend(part.reshape(-1).split(_CHUNK_ON_GPU))
    norms = [torch.stack(torch._foreach_norm(pieces, 2, dtype=torch.float64)) for pieces in alike.values()]
    return [each.square_().sum() for each in norms]


def _sums_of_squares(parts: Sequence[Tensor]) -> list[Tensor]:
    plain = [part for part in parts if is_plain(part)]
    on_cpu = iter(sums_of_squares(plain))
    return [
        torch.tensor(next(on_cpu), dtype=torch.float64, device="cpu") if is_plain(part) else _sum_of_squares(part)
        for part in parts
    ]


def _sum_of_squares(part: Tensor) -> Tensor:
    # One chunk at a time: a float64 copy of the whole would take twice a gradient's memory.
    wide = (chunk.to(torch.float64) for chunk in part.reshape(-1).split(CHUNK))
    return torch.stack([torch.dot(chunk, chunk) for chunk in wide]).sum()


def _largest_magnitude(part: Tensor) -> Tensor:
    return part.to(torch.float64).abs().max() if part.numel() else part.new_zeros((), dtype=torch.float64)


def _exponent_sums(part: Tensor) -> Tensor:
    """Sums of squares of significands for each exponent field: int64 of shape ``(2, 255)``, two limbs."""
    sums = torch.zeros((2, EXPONENTS), dtype=torch.int64, device=part.device)
    for chunk in part.reshape(-1).split(CHUNK if part.device.type == "cpu" else _CHUNK_ON_GPU):
        magnitude = chunk.to(torch.float32).view(torch.int32) & _MAGNITUDE
        field = (magnitude >> 23).clamp_min_(1)
        significand = (magnitude - ((field - 1) << 23)).to(torch.int64)
        square = significand * significand
        sums[0].index_add_(0, field, square & ((1 << LIMB_BITS) - 1))
        sums[1].index_add_(0, field, square >> LIMB_BITS)
    return sums


def _rounded(value: float) -> float:
    """Rounded to float32, finite values to its maximum at most."""
    return float(np.float32(min(value, _FLOAT32_MAX) if math.isfinite(value) else value))

"""torch's own conversions to narrow dtypes, where they are the cast that is asked for: one pass instead of ten.

They are that for elements that are numbers within the format's range; what becomes of others is each library's own
convention, and differs between versions of torch. Whether they are it on this processor, in this version, is tried out
on the format's boundaries before the first use. For eager torch on a CPU: compilers fuse the passes, and to look at
the range would make a GPU's host wait. ``altgrad_jax`` needs nothing of the kind.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from altgrad_core.formats import Format
from altgrad_torch.cpu import is_plain, while_flushing

_CHUNK = 1 << 19
"""Elements converted at a time: fewer are not worth sharing out among threads, more would need larger scratch."""

_MIN_NORMAL = 2.0**-126
_SIGN = -(2**15)
_LARGEST_SUBNORMAL = (1 << 7) - 1
"""In the bits of bfloat16, as the sign."""

_WORTH_A_ROUND_TRIP = ("float8_e5m2", "bfloat16", "float16")
"""To the others and back torch takes as long as our kernels."""

_WORTH_ENCODING = ("float8_e5m2", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2fnuz", "float16")
"""Those whose every code is one of ours: of bfloat16 we count what is below 2^-126 as zero."""


def values_by_torch(x: Tensor, format: Format) -> Tensor | None:
    """Values rounded to nearest even, by torch, or None where torch is of no use.

    Args:
        x: float32, any shape and strides.
        format: the grid.

    Returns:
        A new float32 tensor of the shape of ``x``, or None.

    >>> from altgrad_core.formats import parse
    >>> values_by_torch(torch.tensor([1.1, -3.9]), parse("E5M2"))
    tensor([ 1., -4.])
    >>> values_by_torch(torch.tensor([1e9]), parse("E5M2")) is None
    True
    """
    dtype = _dtype_of(format, _WORTH_A_ROUND_TRIP)
    if dtype is None or not _may_be_read(x) or not _is_right(format):
        return None
    return _round_trip(x.detach(), dtype, format.max_representable_value)


def codes_by_torch(x: Tensor, format: Format) -> Tensor | None:
    """Codes of the values rounded to nearest even, by torch, or None where torch is of no use.

    Args:
        x: float32, any shape and strides.
        format: the format.

    Returns:
        A new uint8 or uint16 tensor of the shape of ``x``, or None.

    >>> from altgrad_core.formats import parse
    >>> codes_by_torch(torch.tensor([1.0, -1.0]), parse("E4M3"))
    tensor([ 56, 184], dtype=torch.uint8)
    """
    dtype = _dtype_of(format, _WORTH_ENCODING)
    if dtype is None or not is_read_within(x, format.max_representable_value) or not _is_right(format):
        return None
    return _codes(x.detach(), dtype)


def is_read_within(x: Tensor, limit: float) -> bool:
    """Whether all elements are numbers up to a limit, there are some, and they may be read now to tell.

    >>> is_read_within(torch.tensor([1.0, -2.0]), 2.0), is_read_within(torch.tensor([torch.nan]), torch.inf)
    (True, False)
    """
    return _may_be_read(x) and _is_within(x.detach(), limit)


def _may_be_read(x: Tensor) -> bool:
    return is_plain(x) and not x.is_neg()


def _is_within(x: Tensor, limit: float) -> bool:
    """Whether there are elements, all of them numbers up to a limit."""
    if not x.numel():
        return False
    least, most = (each.item() for each in torch.aminmax(x))
    return -limit <= least and most <= limit


def _round_trip(x: Tensor, dtype: torch.dtype, limit: float) -> Tensor | None:
    """To a dtype and back, if all elements are within a limit and they fit the cache or lie side by side."""
    if not _is_within(x, limit):
        return None
    out = torch.empty_like(x)
    if out.stride() == x.stride():
        parts = list(zip(_in_memory(out), _in_memory(x), strict=True))
    elif x.numel() <= _CHUNK:
        parts = [(out, x)]
    else:
        return None
    largest = parts[0][0].numel()
    narrow, halves = (torch.empty(largest, dtype=each, device="cpu") for each in (dtype, torch.int16))
    for into, part in parts:
        scratch = (each[: part.numel()].view(part.shape) for each in (narrow, halves))
        _round_trip_into(into, part, *scratch)
    return out


def _in_memory(x: Tensor) -> Sequence[Tensor]:
    """The elements as they lie side by side, in parts that fit the cache."""
    return x.as_strided((x.numel(),), (1,)).split(_CHUNK)


def _round_trip_into(out: Tensor, x: Tensor, narrow: Tensor, halves: Tensor) -> None:
    narrow.copy_(x)
    if narrow.dtype == torch.float8_e5m2:
        # The upper half of a float16, which processors widen at once.
        halves.copy_(narrow.view(torch.uint8))
        narrow = halves.bitwise_left_shift_(8).view(torch.float16)
    elif narrow.dtype == torch.bfloat16:
        # Below 2^-126 is zero, told in integers, since threads may differ in what they flush.
        bits = narrow.view(torch.int16)
        torch.bitwise_and(bits, _SIGN, out=halves)
        torch.threshold_(bits.bitwise_and_(~_SIGN), _LARGEST_SUBNORMAL, 0)
        bits.bitwise_or_(halves)
    out.copy_(narrow)


def _codes(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).view(torch.uint8 if dtype.itemsize == 1 else torch.uint16)


@cache
def _dtype_of(format: Format, names: tuple[str, ...]) -> torch.dtype | None:
    """The dtype of a format, if it is among these and torch has it."""
    if format.dtype is None or format.dtype.name not in names:
        return None
    return getattr(torch, format.dtype.name, None)


@cache
def _is_right(format: Format) -> bool:
    """Whether torch rounds to the dtype of a format as NumPy does: by vectors and one by one, flushing or not."""
    dtype, values = _dtype_of(format, _WORTH_A_ROUND_TRIP + _WORTH_ENCODING), _boundaries(format)
    if format.dtype is None or dtype is None:
        return False
    name = format.dtype.name
    with np.errstate(all="ignore"):
        narrow = values.astype(format.dtype)
    wide = narrow.astype(np.float32)
    wide = np.where(np.abs(wide) < _MIN_NORMAL, np.copysign(np.float32(0), wide), wide)
    by_vectors = torch.from_numpy(values)
    one_by_one = by_vectors.repeat_interleave(2)[::2]
    found = []
    for flushing in (False, True):
        with while_flushing(flushing):
            for x in (by_vectors, one_by_one):
                if name in _WORTH_A_ROUND_TRIP:
                    back = _round_trip(x, dtype, math.inf)
                    found.append(back is not None and np.array_equal(_bits(back.numpy()), _bits(wide)))
                if name in _WORTH_ENCODING:
                    found.append(np.array_equal(_codes(x, dtype).numpy(), _bits(narrow)))
    return all(found)


def _boundaries(format: Format) -> npt.NDArray[np.float32]:
    """In every binade of float32 up to max significands of one or two bits, or of all above one, and their neighbours.

    Among them are, for every length that is cut off, ties that go down, up, and up into the next binade.
    """
    powers = 1 << np.arange(23)
    near = [each + away for each in (powers, 3 * powers, (1 << 23) - powers) for away in (-1, 0, 1)]
    significands = np.unique(np.concatenate(near) & ((1 << 23) - 1)).astype(np.uint32)
    magnitudes = (np.arange(255, dtype=np.uint32)[:, None] << 23 | significands).reshape(-1)
    values = np.concatenate([magnitudes, magnitudes | np.uint32(1 << 31)]).view(np.float32)
    return values[np.abs(values) <= format.max_representable_value]


def _bits(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return values.view(f"u{values.itemsize}")

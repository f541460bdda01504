"""Random bits from a counter: cheap, reproducible, the same in both frameworks.

The definition is :func:`altgrad_core.hashing.hash_bits_reference`. For stochastic rounding, not for cryptography.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from altgrad_core.hashing import MULTIPLIERS, SEED_OFFSET, STREAM_OFFSET, check_one_word, check_shape, check_word

_CHUNK = 1 << 17


def hash_bits(
    shape: tuple[int, ...], seed: int | Tensor, step: int | Tensor = 0, *, device: torch.device | str | None = None
) -> Tensor:
    """32 random bits for every element, a function of its index in row-major order, a seed and a step.

    Args:
        shape: of the result; up to 2^32 elements.
        seed: an integer from 0 to 2^32 - 1, or a tensor of shape ``()`` of any integer dtype, of which the lowest 32
            bits count (of a narrower one that is negative, those of the same number): under ``torch.compile`` that is
            what may change without compiling anything.
        step: likewise; another step gives other bits.
        device: where to make them.

    Returns:
        int32 of the given shape: the 32 bits, as torch shifts and adds them best.

    Raises:
        TypeError: for a shape that is no tuple, and a tensor that does not hold integers.
        ValueError: for a seed or step that is outside uint32 or a tensor of another shape than ``()``, and for a shape
            of more than 2^32 elements.

    >>> [hex(bits & 0xFFFFFFFF) for bits in hash_bits((2,), seed=0).tolist()]
    ['0x37c0670d', '0x28681f9a']
    """
    check_shape(shape)
    count = math.prod(shape)
    key = _mix(_mix(_word("seed", seed, device) + _signed(SEED_OFFSET)) ^ _word("step", step, device))
    second_key = _mix(key + _signed(STREAM_OFFSET))
    if count <= _CHUNK or torch.compiler.is_compiling():
        return _hashed(torch.arange(count, device=device), key, second_key).reshape(shape)
    out = torch.empty(count, dtype=torch.int32, device=device)
    for start in range(0, count, _CHUNK):
        part = out[start : start + _CHUNK]
        part.copy_(_hashed(torch.arange(start, start + part.numel(), device=device), key, second_key))
    return out.reshape(shape)


def _hashed(indices: Tensor, key: Tensor, second_key: Tensor) -> Tensor:
    return _second_half(_first_half(indices.to(torch.int32) ^ key) + second_key)


def _mix(x: Tensor) -> Tensor:
    """Every bit of the result depends on every bit of ``x``; a bijection of 32 bits."""
    return _second_half(_first_half(x))


def _first_half(x: Tensor) -> Tensor:
    x = _shifted_in(x, 16) * _signed(MULTIPLIERS[0])
    return _shifted_in(x, 15)


def _second_half(x: Tensor) -> Tensor:
    return _shifted_in(x * _signed(MULTIPLIERS[1]), 15)


def _shifted_in(x: Tensor, count: int) -> Tensor:
    """``x ^ (x >> count)`` with a logical shift, which int32 does not have."""
    return x ^ ((x >> count) & ((1 << (32 - count)) - 1))


def _word(name: str, value: int | Tensor, device: torch.device | str | None) -> Tensor:
    if isinstance(value, Tensor):
        if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            raise TypeError(f"{name} is an integer; got {value.dtype}")
        check_one_word(name, value.shape)
        return value.to(torch.int32)
    check_word(name, value)
    return torch.tensor(_signed(int(value)), dtype=torch.int32, device=device)


def _signed(word: int) -> int:
    """The int32 of the same 32 bits."""
    return word - 2**32 if word >= 2**31 else word

"""Random bits by counting: the bits of an element are a hash of its index, a seed and a step.

No state is kept, so the same numbers come back in any order, in pieces, in either framework and after a restart. The
definition is :func:`hash_bits_reference`; ``altgrad_jax`` and ``altgrad_torch`` each have their own ``hash_bits``.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from altgrad_core.errors import InputError
from altgrad_core.scalars import is_integer

MULTIPLIERS = (0x21F0AAAD, 0xD35A2D97)
"""Of the mixing steps, with shifts by 16, 15 and 15: found by search for little bias (C. Wellons, hash-prospector)."""

SEED_OFFSET = 0x9E3779B9
"""Added to the seed, so that seed 0 is not the fixed point of the mixing; 2^32 over the golden ratio."""

STREAM_OFFSET = 0x85EBCA6B
"""Added to the key of a stream for a second one that looks unrelated to it."""

MOST_ELEMENTS = 2**32
"""Indices are 32 bits wide."""

_WORD = 2**32 - 1


def hash_bits_reference(count: int, seed: int, step: int = 0, start: int = 0) -> npt.NDArray[np.uint32]:
    """The random bits of ``count`` elements from index ``start`` on, written to be read: one element at a time.

    Args:
        count: how many elements.
        seed: 0 to 2^32 - 1.
        step: 0 to 2^32 - 1; each step of each seed has bits of its own.
        start: the first index.

    Returns:
        uint32 of shape ``(count,)``.

    Raises:
        ValueError: for a seed or step out of range, or an index beyond 2^32.

    >>> [hex(bits) for bits in hash_bits_reference(2, seed=0)]
    ['0x37c0670d', '0x28681f9a']
    """
    check_word("seed", seed)
    check_word("step", step)
    check_count(start + count)
    # Python's integers: those of NumPy may be too narrow for the sum.
    key = _mix(_mix(int(seed) + SEED_OFFSET) ^ int(step))
    second_key = _mix(key + STREAM_OFFSET)
    bits = [_second_half((_first_half(index ^ key) + second_key) & _WORD) for index in range(start, start + count)]
    return np.array(bits, np.uint32)


def _mix(x: int) -> int:
    return _second_half(_first_half(x & _WORD))


def _first_half(x: int) -> int:
    x ^= x >> 16
    x = (x * MULTIPLIERS[0]) & _WORD
    return x ^ (x >> 15)


def _second_half(x: int) -> int:
    x = (x * MULTIPLIERS[1]) & _WORD
    return x ^ (x >> 15)


def check_word(name: str, value: object) -> None:
    """Check a seed or a step.

    Raises:
        ValueError: if it is not an integer from 0 to 2^32 - 1.
    """
    if not is_integer(value) or not 0 <= int(value) <= _WORD:
        raise InputError(f"{name} is {value!r}; expected an integer from 0 to 2^32 - 1")


def check_one_word(name: str, shape: Sequence[int]) -> None:
    """Check the shape of a seed or a step that is an array: it is one for all elements.

    Args:
        name: which of them it is, for the message.
        shape: of one example, where a function is mapped.

    Raises:
        InputError: if it is not ``()``.
    """
    if len(shape):
        raise InputError(
            f"{name} has shape {tuple(shape)}; expected (), one for all elements: vmap takes one for each example"
        )


def check_shape(shape: object) -> None:
    """Check a shape.

    Raises:
        TypeError: if it is not a tuple or list.
        ValueError: if it has more elements than the indices can count.
    """
    if not isinstance(shape, (tuple, list)):
        nearest = f"({shape},)" if isinstance(shape, numbers.Integral) else "(2, 3)"
        raise TypeError(f"shape is {shape!r}; expected a tuple of sizes, such as {nearest}")
    check_count(math.prod(shape))


def check_count(count: int) -> None:
    """Check a number of elements.

    Raises:
        ValueError: if there are more than the indices can count.
    """
    if count > MOST_ELEMENTS:
        raise InputError(f"{count} elements are more than the 2^32 that have random bits of their own in one step")

"""Random bits from a counter: cheap, reproducible, the same in both frameworks.

The definition is :func:`altgrad_core.hashing.hash_bits_reference`. For stochastic rounding, not for cryptography.
"""

from __future__ import annotations

import math
from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.export import is_symbolic_dim

from altgrad_core.hashing import MULTIPLIERS, SEED_OFFSET, STREAM_OFFSET, check_one_word, check_shape, check_word


def hash_bits(shape: tuple[int, ...], seed: int | jax.Array, step: int | jax.Array = 0) -> jax.Array:
    """32 random bits for every element, a function of its index, a seed and a step.

    Fused into the cast that uses them they cost a few operations for each element, and no memory.

    Args:
        shape: of the result; up to 2^32 elements. Sizes may be symbolic, in what is exported: indices beyond then begin
            anew at 0.
        seed: an integer from 0 to 2^32 - 1, or an array of shape ``()`` of any integer dtype, which may be traced, of
            which the lowest 32 bits count (of a narrower one that is negative, those of the same number).
        step: likewise; another step gives other bits.

    Returns:
        uint32 of the given shape.

    Raises:
        TypeError: for a shape that is no tuple, and an array that does not hold integers.
        ValueError: for a seed or step that is outside uint32 or an array of another shape than ``()``, and for a shape
            of more than 2^32 elements.

    >>> hash_bits((2,), seed=1).tolist() == hash_bits((2,), seed=1, step=0).tolist()
    True
    """
    if not isinstance(shape, tuple) or not _is_symbolic(shape):
        check_shape(shape)
    return _hashed(tuple(shape), _word("seed", seed), _word("step", step))


@partial(jax.jit, static_argnums=0, inline=True)  # one program also outside of jit
def _hashed(shape: tuple[int, ...], seed: jax.Array, step: jax.Array) -> jax.Array:
    key = _mix(_mix(seed + np.uint32(SEED_OFFSET)) ^ step)
    x = _indices(shape) ^ key
    x = (x ^ (x >> 16)) * np.uint32(MULTIPLIERS[0])
    x = (x ^ (x >> 15)) + _mix(key + np.uint32(STREAM_OFFSET))
    x = x * np.uint32(MULTIPLIERS[1])
    return x ^ (x >> 15)


def _indices(shape: tuple[int, ...]) -> jax.Array:
    """Each element's place in the order of memory, from the counters of the loops that a fused program runs anyway."""
    if len(shape) < 2 and not _is_symbolic(shape):
        return _indices_in_two_parts(math.prod(shape)).reshape(shape)
    strides = [_stride(shape[axis + 1 :]) for axis in range(len(shape))]
    longer = [axis for axis, size in enumerate(shape) if is_symbolic_dim(size) or size > 1] or [0]
    counters = [lax.broadcasted_iota(jnp.uint32, shape, axis) * strides[axis] for axis in longer]
    return reduce(lax.add, counters)


def _is_symbolic(shape: tuple[int, ...]) -> bool:
    """Whether a size is known only when what is exported is called."""
    return any(map(is_symbolic_dim, shape))


def _stride(inner: tuple[int, ...]) -> np.uint32 | jax.Array:
    """How far apart the elements of an axis are; a traced number where sizes within it are symbolic."""
    stride = math.prod(inner)
    return jnp.asarray(stride).astype(jnp.uint32) if is_symbolic_dim(stride) else np.uint32(stride)


def _indices_in_two_parts(count: int) -> jax.Array:
    """``iota``: of a plain one in a fused loop XLA's CPU backend makes every element by itself."""
    block = max(min(count & -count, 1024), 1)
    starts = lax.broadcasted_iota(jnp.uint32, (count // block, block), 0) * np.uint32(block)
    return starts.reshape(count) | (lax.iota(jnp.uint32, count) & np.uint32(block - 1))


def _mix(x: jax.Array) -> jax.Array:
    """Every bit of the result depends on every bit of ``x``; a bijection of uint32."""
    x = (x ^ (x >> 16)) * np.uint32(MULTIPLIERS[0])
    x = (x ^ (x >> 15)) * np.uint32(MULTIPLIERS[1])
    return x ^ (x >> 15)


def _word(name: str, value: int | jax.Array) -> jax.Array:
    if not isinstance(value, jax.Array):
        check_word(name, value)
        return jnp.asarray(int(value), jnp.uint32)
    if not jnp.issubdtype(value.dtype, jnp.integer):
        raise TypeError(f"{name} is an integer; got {value.dtype}")
    check_one_word(name, value.shape)
    return value.astype(jnp.uint32)

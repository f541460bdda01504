"""Power-of-two scales from the amax of earlier steps ("delayed" scaling) or of the tensor itself.

A scale is the worth of one: ``Q(x / scale) * scale``. A power of two makes scaling exact.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_MAGNITUDE = np.int32(0x7FFFFFFF)
_FRACTION = np.int32(0x007FFFFF)
_MOST = 100
"""Scales stay within 2^-100 to 2^100, so that neither they nor their reciprocals are subnormal."""


def amax(x: jax.Array) -> jax.Array:
    """The largest magnitude of an array: float32 scalar, NaN if it holds a NaN, inf if it holds an infinity.

    Taken on the bits: XLA's CPU backend may lose the NaN in a maximum of floats.

    Args:
        x: float32, bfloat16 or float16, of any shape; 0 if it is empty.

    >>> float(amax(jnp.array([1.0, -3.0]))), float(amax(jnp.array([1.0, jnp.nan, 2.0])))
    (3.0, nan)
    """
    magnitudes = _bits(x.astype(jnp.float32)) & _MAGNITUDE
    return lax.bitcast_convert_type(jnp.max(magnitudes, initial=0), jnp.float32)


def power_of_two_scale(amax: jax.typing.ArrayLike, max_value: jax.typing.ArrayLike) -> jax.Array:
    """The smallest power of two that brings ``amax`` to at most ``max_value``, within 2^-100 to 2^100.

    Args:
        amax: float32, largest magnitude of a tensor; where it is zero, subnormal or not finite the scale is 1.
        max_value: float32, largest value of the format; broadcast against ``amax``. Where it is float32's own
            maximum or close to it (2^100 and above) nothing needs scaling, and the scale is 1.

    Returns:
        float32 of the broadcast shape.

    >>> power_of_two_scale(jnp.array([448.0, 449.0, 0.0]), 448.0).tolist()
    [1.0, 2.0, 1.0]
    """
    amax_bits = _bits(jnp.asarray(amax, jnp.float32))
    max_bits = _bits(jnp.asarray(max_value, jnp.float32))
    above = (amax_bits & _FRACTION) > (max_bits & _FRACTION)
    exponent = (amax_bits >> 23) - (max_bits >> 23) + above.astype(jnp.int32)
    scale = _power_of_two(jnp.clip(exponent, -_MOST, _MOST))
    usable = (amax_bits >= 1 << 23) & (amax_bits < 0x7F800000) & (max_bits < _bits(jnp.float32(2.0**100)))
    return jnp.where(usable, scale, jnp.float32(1))


def empty_history(window: int, shape: tuple[int, ...] = ()) -> jax.Array:
    """A history of ``window`` steps in which nothing was seen yet: float32 zeros of shape ``(window, *shape)``.

    Raises:
        ValueError: if the window is not positive.
    """
    if window < 1:
        raise ValueError(f"the amax window is {window}; expected at least 1 step")
    return jnp.zeros((window, *shape), jnp.float32)


def push_amax(history: jax.Array, amax: jax.Array) -> jax.Array:
    """Enter the amax of a step as the newest row. An amax that is not finite is refused: the last one stands again.

    Args:
        history: float32 of shape ``(window, *shape)``, oldest first.
        amax: float32 of shape ``shape``.

    >>> push_amax(jnp.array([1.0, 2.0]), jnp.float32(jnp.inf)).tolist()
    [2.0, 2.0]
    """
    newest = jnp.where(jnp.isfinite(amax), amax, history[-1])
    return jnp.concatenate([history[1:], newest[None]])


def delayed_scale(history: jax.Array, max_value: jax.typing.ArrayLike) -> jax.Array:
    """The scale for the next step: that of the largest amax in the history; 1 where the history is empty.

    >>> float(delayed_scale(jnp.array([1.0, 248.0, 3.0]), 124.0))
    2.0
    """
    return power_of_two_scale(jnp.max(history, axis=0), max_value)


def _power_of_two(exponent: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.int32)

"""float32 quotients and products that have the same bits on every backend: rounded once, and zero below 2^-126.

XLA's CPU backend does that by itself. On a GPU it divides to within two ulp, and keeps subnormals: there both go
through float64, in which a product of two float32 is exact, and a quotient right after a second rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from altgrad_core.norms import ROUNDS_TO_NORMAL

_SIGN = np.int32(-(2**31))
_MAGNITUDE = np.int32(0x7FFFFFFF)
_IMPLICIT_ONE = np.int32(1 << 23)


def quotient(x: jax.Array, divisor: jax.Array) -> jax.Array:
    """``x / divisor`` of float32 that broadcast against each other. What becomes of NaN is the backend's.

    >>> quotient(jnp.array([1.0, 2.0**-126]), jnp.float32(3.0)).tolist()
    [0.3333333432674408, 0.0]
    """
    x, divisor = jnp.broadcast_arrays(x, divisor)
    return lax.platform_dependent(x, divisor, cpu=_divided, default=_through_float64(lax.div))


def product(x: jax.Array, factor: jax.Array) -> jax.Array:
    """``x * factor`` of float32 that broadcast against each other. What becomes of NaN is the backend's.

    >>> product(jnp.array([3.0, -(2.0**-126)]), jnp.float32(0.5)).tolist()
    [1.5, -0.0]
    """
    x, factor = jnp.broadcast_arrays(x, factor)
    return lax.platform_dependent(x, factor, cpu=_multiplied, default=_through_float64(lax.mul))


def flush_subnormals(x: jax.Array) -> jax.Array:
    """Zero, with the sign kept, where float32 ``x`` is below 2^-126: what XLA's CPU backend does by itself."""
    bits = _bits(x)
    return _float(jnp.where((bits & _MAGNITUDE) < _IMPLICIT_ONE, bits & _SIGN, bits))


def _divided(x: jax.Array, divisor: jax.Array) -> jax.Array:
    # A divisor of its own for each element: XLA turns division by one scalar into a product with its reciprocal.
    return flush_subnormals(x / jnp.where((_bits(x) & _MAGNITUDE) >= 0, divisor, jnp.float32(1)))


def _multiplied(x: jax.Array, factor: jax.Array) -> jax.Array:
    return flush_subnormals(x * factor)


def _through_float64(
    operation: Callable[[jax.Array, jax.Array], jax.Array],
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    def rounded(left: jax.Array, right: jax.Array) -> jax.Array:
        with jax.enable_x64(True):
            wide = operation(lax.convert_element_type(left, jnp.float64), lax.convert_element_type(right, jnp.float64))
            vanishes = jnp.abs(wide) < ROUNDS_TO_NORMAL
            single = lax.convert_element_type(wide, jnp.float32)
        return jnp.where(vanishes, _float((_bits(left) ^ _bits(right)) & _SIGN), single)

    return rounded


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.int32)


def _float(bits: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(bits, jnp.float32)

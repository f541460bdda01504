"""float32 arithmetic with the same bits in both frameworks: each step through float64, rounded once, zero below 2^-126.

Left to itself a compiler fuses ``x * y + z``, divides by multiplying with a reciprocal, and has approximations of its
own for roots. What is proved here, whatever it does:

- ``add``, ``subtract``, ``multiply``, ``divide``, ``square_root``: no result of 24-bit operands lies within 2^-49 of a
  place where float32 rounds, unless it is there (Figueroa, "When is double rounding innocuous?", 1995), so a float64
  result that is off by an ulp or two is rounded to the same float32, the nearest one.
- ``sum_of_last``: its float64 additions are made in an order that is written down, two halves at a time, of terms that
  float64 holds. No framework's reduction has a part in it.
- ``exact_sum``: the exact sum, rounded once, in any order.

``exponential`` and ``logarithm`` are not: two float64 libraries that differ in the last bit round to two float32 once
in some 2^28 inputs. There are but 2^32 of them, and a test goes through all that can occur.

``altgrad_torch/rounded.py`` does the same.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from altgrad_core.norms import ROUNDS_TO_NORMAL
from altgrad_jax.exact import exact_dot_general


def add(x: jax.Array, y: jax.Array) -> jax.Array:
    """``x + y`` of float32 that broadcast against each other.

    >>> add(jnp.float32(1), jnp.float32(2.0**-25)).item()
    1.0
    """
    return _through_float64(jnp.add, x, y)


def subtract(x: jax.Array, y: jax.Array) -> jax.Array:
    """``x - y`` of float32 that broadcast against each other.

    >>> subtract(jnp.float32(3), jnp.float32(2)).item()
    1.0
    """
    return _through_float64(jnp.subtract, x, y)


def multiply(x: jax.Array, y: jax.Array) -> jax.Array:
    """``x * y`` of float32 that broadcast against each other.

    >>> multiply(jnp.float32(2.0**-100), jnp.float32(2.0**-27)).item()
    0.0
    """
    return _through_float64(jnp.multiply, x, y)


def divide(x: jax.Array, y: jax.Array) -> jax.Array:
    """``x / y`` of float32 that broadcast against each other.

    >>> divide(jnp.float32(1), jnp.float32(3)).item()
    0.3333333432674408
    """
    return _through_float64(jnp.divide, x, y)


def square_root(x: jax.Array) -> jax.Array:
    """The root of float32.

    >>> square_root(jnp.float32(2)).item()
    1.4142135381698608
    """
    return _through_float64(jnp.sqrt, x)


def exponential(x: jax.Array) -> jax.Array:
    """``e^x`` of float32.

    >>> exponential(jnp.float32(1)).item()
    2.7182817459106445
    """
    return _through_float64(jnp.exp, x)


def logarithm(x: jax.Array) -> jax.Array:
    """The natural logarithm of float32.

    >>> logarithm(jnp.float32(10)).item()
    2.3025851249694824
    """
    return _through_float64(jnp.log, x)


def multiply_add(x: jax.Array, y: jax.Array, z: jax.Array, w: jax.Array) -> jax.Array:
    """``x * y + z * w`` of float32 that broadcast against each other, the same whether or not it is fused.

    Both products are exact in float64. Their sum is rounded there and again to float32, in both frameworks alike.

    >>> multiply_add(jnp.float32(3), jnp.float32(0.5), jnp.float32(2), jnp.float32(2)).item()
    5.5
    """
    return _through_float64(lambda x, y, z, w: x * y + z * w, x, y, z, w)


def sum_of_last(x: jax.Array, y: jax.Array | None = None) -> jax.Array:
    """The sum over the last axis, of ``x`` or of ``x * y``, in float64 by halves, rounded once.

    Args:
        x: float32 of shape ``(..., n)``.
        y: likewise, or nothing.

    Returns:
        float32 of shape ``(..., 1)``.

    >>> sum_of_last(jnp.array([[1.0, 2.0, 3.0]])).tolist()
    [[6.0]]
    """
    operands = (x,) if y is None else (x, y)
    return _through_float64(lambda *wide: _by_halves(wide[0] if y is None else wide[0] * wide[1]), *operands)


def exact_sum(x: jax.Array) -> jax.Array:
    """The exact sum over all axes but the last, rounded once.

    Args:
        x: float32 of shape ``(..., n)``.

    Returns:
        float32 of shape ``(n,)``.

    >>> exact_sum(jnp.array([[2.0**64], [1.0], [-(2.0**64)]])).tolist()
    [1.0]
    """
    rows = x.reshape(-1, x.shape[-1])
    return exact_dot_general(jnp.ones(len(rows), jnp.float32), rows, (((0,), (0,)), ((), ())))


def exact_sum_of_products(x: jax.Array, y: jax.Array) -> jax.Array:
    """The exact sum of ``x * y`` over all axes but the last, rounded once.

    Args:
        x: float32 of shape ``(..., n)``.
        y: likewise.

    Returns:
        float32 of shape ``(n,)``.

    >>> exact_sum_of_products(jnp.array([[2.0], [3.0]]), jnp.array([[5.0], [7.0]])).tolist()
    [31.0]
    """
    x, y = (each.reshape(-1, each.shape[-1]) for each in (x, y))
    return exact_dot_general(x, y, (((0,), (0,)), ((1,), (1,))))


def _through_float64(function: Callable[..., jax.Array], *operands: jax.Array) -> jax.Array:
    with jax.enable_x64(True):
        wide = function(*(lax.convert_element_type(x, jnp.float64) for x in operands))
        vanished = jnp.copysign(jnp.zeros_like(wide), wide).astype(jnp.float32)
        # Between two conversions, the selection also keeps XLA from leaving out the rounding as excess precision.
        return jnp.where(jnp.abs(wide) < ROUNDS_TO_NORMAL, vanished, lax.convert_element_type(wide, jnp.float32))


def _by_halves(x: jax.Array) -> jax.Array:
    while x.shape[-1] > 1:
        half = -(-x.shape[-1] // 2)
        second = jnp.pad(x[..., half:], [(0, 0)] * (x.ndim - 1) + [(0, 2 * half - x.shape[-1])])
        x = x[..., :half] + second
    return x

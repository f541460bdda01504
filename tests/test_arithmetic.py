"""Quotients and products have the same bits on every backend: a GPU's way, taken on a CPU, gives those of the CPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from altgrad_core.norms import ROUNDS_TO_NORMAL
from altgrad_jax.arithmetic import _through_float64, product, quotient

OPERATIONS = {"quotient": (quotient, lax.div, np.divide), "product": (product, lax.mul, np.multiply)}
MIN_NORMAL = np.float32(2.0**-126)


def normal_numbers(count: int, seed: int) -> np.ndarray:
    """Of any normal magnitude and sign."""
    draw = np.random.default_rng(seed)
    bits = draw.integers(0x0080_0000, 0x7F80_0000, count, dtype=np.uint32) | draw.integers(0, 2, count, np.uint32) << 31
    return bits.astype(np.uint32).view(np.float32)


def around_the_smallest(name: str, factor: np.float32) -> np.ndarray:
    """Numbers that the operation brings to next to 2^-126."""
    edge = float(MIN_NORMAL) * float(factor) if name == "quotient" else float(MIN_NORMAL) / float(factor)
    return (np.float32(edge).view(np.uint32) + np.arange(-50, 50)).astype(np.uint32).view(np.float32)


def expected(exact: np.ndarray, sign: np.ndarray) -> np.ndarray:
    """Rounded once from float64, in which products are exact and quotients right after a second rounding."""
    with np.errstate(over="ignore"):
        rounded = np.abs(exact).astype(np.float32)
    return np.copysign(np.where(np.abs(exact) < ROUNDS_TO_NORMAL, np.float32(0), rounded), sign)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("factor", [3.0, 0.3, 1.0, 2.0**-20, 3.7e5, 1.1754945e-38 * 3])
def test_rounded_once_on_any_backend(name: str, factor: float) -> None:
    operation, primitive, exact = OPERATIONS[name]
    other = np.float32(factor)
    x = np.concatenate([normal_numbers(2**16, 1), around_the_smallest(name, other)])
    x = x[np.abs(x) >= MIN_NORMAL]
    wanted = expected(exact(x.astype(np.float64), np.float64(other)), x).view(np.uint32)
    for way in (operation, _through_float64(primitive)):
        got = jax.jit(way)(jnp.asarray(x), jnp.full(x.shape, other))
        np.testing.assert_array_equal(np.asarray(got).view(np.uint32), wanted)


@pytest.mark.parametrize("name", OPERATIONS)
def test_in_transforms(name: str) -> None:
    operation = OPERATIONS[name][0]
    x, factors = jnp.asarray(normal_numbers(6, 2).reshape(2, 3)), jnp.asarray([[3.0], [0.5]], jnp.float32)
    at_once = operation(x, factors)
    np.testing.assert_array_equal(jax.vmap(operation)(x, factors[:, 0]), at_once)
    np.testing.assert_array_equal(lax.map(lambda both: operation(*both), (x, factors)), at_once)

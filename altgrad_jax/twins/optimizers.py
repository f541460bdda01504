"""SGD and AdamW of which each step is rounded as in torch: nothing is fused, and powers are taken on the host.

``altgrad_torch/twins/optimizers.py`` does the same.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from altgrad_core.twins import OptimizerName
from altgrad_jax.rounded import divide, multiply, multiply_add, square_root

Rates = Mapping[str, jax.Array]
"""Float32 scalars by name: see :meth:`altgrad_core.twins.Recipe.rates`."""


def updated(
    optimizer: OptimizerName,
    rates: Rates,
    weight: jax.Array,
    gradient: jax.Array,
    moments: tuple[jax.Array, ...],
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """A weight and its moments after a step: float32 of the shape of the weight, all of them.

    >>> rates = {"momentum": jnp.float32(0.5), "falling": jnp.float32(-0.25)}
    >>> updated("sgd", rates, jnp.ones(1), jnp.ones(1), (jnp.ones(1),))
    (Array([0.625], dtype=float32), (Array([1.5], dtype=float32),))
    """
    return (_sgd if optimizer == "sgd" else _adamw)(rates, weight, gradient, *moments)


def _sgd(
    rates: Rates, weight: jax.Array, gradient: jax.Array, velocity: jax.Array
) -> tuple[jax.Array, tuple[jax.Array]]:
    one = jnp.float32(1)
    velocity = multiply_add(velocity, rates["momentum"], gradient, one)
    return multiply_add(weight, one, velocity, rates["falling"]), (velocity,)


def _adamw(
    rates: Rates, weight: jax.Array, gradient: jax.Array, first: jax.Array, second: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    one = jnp.float32(1)
    first = multiply_add(first, rates["first"], gradient, rates["first_rest"])
    second = multiply_add(second, rates["second"], multiply(gradient, gradient), rates["second_rest"])
    root = multiply_add(square_root(second), rates["root_correction"], rates["epsilon"], one)
    update = divide(multiply(first, rates["first_correction"]), root)
    update = multiply_add(update, one, weight, rates["decay"])
    return multiply_add(weight, one, update, rates["falling"]), (first, second)

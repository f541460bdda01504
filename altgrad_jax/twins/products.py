"""A twin's products: operands, and the gradients that flow back, on the grid of a format.

``altgrad_torch/twins/products.py`` does the same.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from altgrad_core.twins import Accumulation
from altgrad_jax.casting import quantize
from altgrad_jax.exact import DotDimensionNumbers
from altgrad_jax.nn.accumulate import exact_product
from altgrad_jax.params import FormatParams
from altgrad_jax.scaling import amax, power_of_two_scale

Seen: TypeAlias = OrderedDict[str, jax.Array]
"""Tensors by name, in the order they are made; as a pytree, too."""


@dataclass(frozen=True)
class Products:
    """How a twin multiplies.

    Attributes:
        params: the format, data.
        accumulate: see :data:`altgrad_core.twins.Accumulation`.
        seen: receives operands and products by name.
    """

    params: FormatParams
    accumulate: Accumulation
    seen: Seen = field(default_factory=OrderedDict)

    def matmul(self, site: str, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        """``lhs @ rhs`` of cast operands, whose gradient is cast; ``rhs`` is a matrix, or has the batch axes of lhs."""
        batch = tuple(range(rhs.ndim - 2))
        dimensions = (((lhs.ndim - 1,), (rhs.ndim - 2,)), (batch, batch))
        lhs, rhs = (own_scale_cast(x, self.params) for x in (lhs, rhs))
        multiply = exact_product if self.accumulate == "exact" else _native
        product = _cast_gradient(multiply(lhs, rhs, dimensions), self.params)
        self.seen.update({f"{site}.lhs": lhs, f"{site}.rhs": rhs, f"{site}.product": product})
        return product


def own_scale_cast(x: jax.Array, params: FormatParams) -> jax.Array:
    """Cast under the power-of-two scale of the tensor's own amax. The gradient passes straight through.

    >>> own_scale_cast(jnp.array([1.1, 900.0]), FormatParams.from_format("E4M3")).tolist()
    [1.125, 896.0]
    """
    return quantize(x, params, scale=power_of_two_scale(amax(lax.stop_gradient(x)), params.max_value))


def _native(lhs: jax.Array, rhs: jax.Array, dimensions: DotDimensionNumbers) -> jax.Array:
    return lax.dot_general(lhs, rhs, dimensions, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _cast_gradient(x: jax.Array, params: FormatParams) -> jax.Array:
    """The identity, whose gradient is cast on its way back."""
    return x


_cast_gradient.defvjp(lambda x, params: (x, params), lambda params, gradient: (own_scale_cast(gradient, params), None))

"""Exact products that can be differentiated: forward and backward, each element the exact sum rounded once to float32.

``altgrad_torch/nn/accumulate.py`` does the same.
"""

from __future__ import annotations

from functools import partial
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from altgrad_jax.axes import is_split
from altgrad_jax.exact import DotDimensionNumbers, exact_dot_general

_Axes: TypeAlias = tuple[int, ...]
_Dimensions: TypeAlias = tuple[tuple[_Axes, _Axes], tuple[_Axes, _Axes]]
_OutSharding: TypeAlias = jax.sharding.NamedSharding | jax.sharding.PartitionSpec | None


def exact_product(
    lhs: jax.Array,
    rhs: jax.Array,
    dimension_numbers: DotDimensionNumbers,
    precision: lax.PrecisionLike = None,
    preferred_element_type: jax.typing.DTypeLike | None = None,
    out_sharding: _OutSharding = None,
) -> jax.Array:
    """A stand-in for ``lax.dot_general`` whose product and both gradients are exact sums, rounded once to float32.

    See :func:`altgrad_jax.exact_dot_general`. In reverse mode, of any order. Of bfloat16 and float16 the float32 is
    rounded again to the dtype that is asked for, and a gradient to that of its operand.

    Args:
        lhs: float32, bfloat16 or float16, of any values.
        rhs: likewise.
        dimension_numbers: as of ``lax.dot_general``.
        precision: as of ``lax.dot_general``; whatever is asked for, this is no less.
        preferred_element_type: dtype of the result; that of the operands by default.
        out_sharding: how the result is to be sharded, under a mesh of explicit axes.

    Returns:
        Batch axes, then the other ones of ``lhs``, then of ``rhs``.

    Raises:
        TypeError: for operands of other dtypes, float64 among them; and in forward mode.
        ValueError: for shapes that do not match, and sums of more than 2^30 terms, in the backward pass as well.

    >>> row, column = jnp.array([[2.0**64, 1.0, -(2.0**64)]]), jnp.ones((3, 1))
    >>> jax.value_and_grad(lambda x: exact_product(x, column, (((1,), (0,)), ((), ()))).sum())(row)[0].item()
    1.0
    """
    (lhs_contracted, rhs_contracted), (lhs_batch, rhs_batch) = dimension_numbers
    axes = (tuple(lhs_contracted), tuple(rhs_contracted)), (tuple(lhs_batch), tuple(rhs_batch))
    product = _product(axes, out_sharding, lhs, rhs)
    return product.astype(preferred_element_type or jnp.result_type(lhs, rhs))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(axes: _Dimensions, out_sharding: _OutSharding, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    return exact_dot_general(lhs, rhs, axes, out_sharding=out_sharding)


def _forward(
    axes: _Dimensions, out_sharding: _OutSharding, lhs: jax.Array, rhs: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _product(axes, out_sharding, lhs, rhs), (lhs, rhs)


def _backward(
    axes: _Dimensions, _: _OutSharding, operands: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    lhs, rhs = operands
    (lhs_contracted, rhs_contracted), (lhs_batch, rhs_batch) = axes
    swapped = (rhs_contracted, lhs_contracted), (rhs_batch, lhs_batch)
    batches, lhs_free = len(lhs_batch), lhs.ndim - len(lhs_batch) - len(lhs_contracted)
    of_lhs = tuple(range(batches, batches + lhs_free))
    of_rhs = tuple(range(batches + lhs_free, gradient.ndim))
    return _gradient_of(lhs, rhs, axes, gradient, of_rhs), _gradient_of(rhs, lhs, swapped, gradient, of_lhs)


_product.defvjp(_forward, _backward)


def _gradient_of(
    operand: jax.Array, other: jax.Array, axes: _Dimensions, gradient: jax.Array, of_other: _Axes
) -> jax.Array:
    """The gradient of one operand: that of the product, summed over the axes that the other gave to it."""
    (contracted, other_contracted), (batch, other_batch) = axes
    other_free = _rest(other, (*other_contracted, *other_batch))
    along = (of_other, other_free), (tuple(range(len(batch))), other_batch)
    # It has batch axes, those that the operand gave, and the contracted ones in the order in which the other has them.
    pairs = sorted(zip(other_contracted, contracted, strict=True))
    found = (*batch, *_rest(operand, (*contracted, *batch)), *(mine for _, mine in pairs))
    # Split as the operand is, of which it is the gradient.
    spec = jax.typeof(operand).sharding.spec
    is_explicit = any(map(is_split, (operand, other, gradient)))
    sharding = jax.sharding.PartitionSpec(*(spec[axis] for axis in found)) if is_explicit else None
    product = _product(along, sharding, gradient, other)
    return jnp.transpose(product, sorted(range(operand.ndim), key=found.__getitem__)).astype(operand.dtype)


def _rest(operand: jax.Array, axes: _Axes) -> _Axes:
    return tuple(axis for axis in range(operand.ndim) if axis not in axes)

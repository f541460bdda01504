"""Matrix products that are the exact sum, rounded once to float32: the same bits in any order, anywhere.

One float64 dot where its bits suffice, else dots of slices of the operands; :mod:`altgrad_core.exact` says how many.
``altgrad_torch/exact.py`` does the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from altgrad_core.errors import InputError
from altgrad_core.exact import (
    LOWEST_EXPONENT,
    SIGNIFICAND_BITS,
    bits_of_spans,
    cut_of,
)
from altgrad_core.norms import ROUNDS_TO_NORMAL
from altgrad_jax.axes import AxisName, places, with_split_result
from altgrad_jax.casting import widened
from altgrad_jax.slices import Dot, quotient, sum_of_many, sum_of_two

DotDimensionNumbers: TypeAlias = tuple[
    tuple[Sequence[int], Sequence[int]],
    tuple[Sequence[int], Sequence[int]],
]
"""As of ``lax.dot_general``: contracted axes of both operands, and batch axes of both."""

_Axes: TypeAlias = tuple[tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]]]

_MAGNITUDE = np.int32(0x7FFFFFFF)
_IMPLICIT_ONE = np.int32(1 << 23)
_NO_PLACE = np.int32(1 << 10)
_PLACES = np.int32(254 + SIGNIFICAND_BITS)
"""Of bits, the lowest one of a subnormal float32 being the first, up to those of infinities and NaN."""


def exact_matmul(a: jax.Array, b: jax.Array, *, axis_name: AxisName | None = None) -> jax.Array:
    """The matrix product, each element the exact sum rounded once to float32, to nearest, ties to even.

    It depends neither on the order of the sum nor on devices, and has the bits of :func:`altgrad_torch.exact_matmul`.
    It takes one float64 dot where the operands' bits allow, as found at run time: always for operands on the grids of
    E0M7 to E4M3 and sums of up to 2^17 terms. Under ``vmap`` the slices that are needed elsewhere are taken every
    time. A sum beyond float32 is inf; one below 2^-126 is zero and keeps its sign; one that is exactly zero is +0,
    whatever the signs of its terms. Infinities and NaN give what they would give in any matrix product, as the one
    canonical NaN.

    There is no gradient rule: what an operand's gradient is rounded to is up to the caller's ``custom_vjp``.

    Args:
        a: float32, bfloat16 or float16, of any values, subnormals included; of a shape that ``jnp.matmul`` takes.
        b: likewise.
        axis_name: inside ``shard_map`` or ``vmap``, axes over which both operands are parts along the contracted one.
            The sum is over all parts, and rounded once; under ``jit`` it is without this, however operands are split.

    Returns:
        float32, of the shape of ``a @ b``.

    Raises:
        TypeError: for operands of other dtypes, float64 among them; and under differentiation.
        ValueError: for shapes that do not match, and sums of more than 2^30 terms.

    >>> a = jnp.array([[2.0**64, 1.0, -(2.0**64)]])
    >>> exact_matmul(a, jnp.ones((3, 1))).tolist()
    [[1.0]]
    """
    a, b = _operand(a, "exact_matmul"), _operand(b, "exact_matmul")
    if a.ndim == 0 or b.ndim == 0 or a.shape[-1] != b.shape[0 if b.ndim == 1 else -2]:
        raise InputError(f"the operands have shapes {a.shape} and {b.shape}; expected (..., n, k) and (..., k, m)")
    if b.ndim <= 2:
        return exact_dot_general(a, b, (((a.ndim - 1,), (0,)), ((), ())), axis_name=axis_name)
    rows = a[None] if a.ndim == 1 else a
    batch = jnp.broadcast_shapes(rows.shape[:-2], b.shape[:-2])
    rows, b = (jnp.broadcast_to(x, (*batch, *x.shape[-2:])) for x in (rows, b))
    axes = tuple(range(len(batch)))
    product = exact_dot_general(rows, b, (((len(batch) + 1,), (len(batch),)), (axes, axes)), axis_name=axis_name)
    return product[..., 0, :] if a.ndim == 1 else product


def exact_dot_general(
    lhs: jax.Array,
    rhs: jax.Array,
    dimension_numbers: DotDimensionNumbers,
    *,
    axis_name: AxisName | None = None,
    out_sharding: jax.sharding.NamedSharding | jax.sharding.PartitionSpec | None = None,
) -> jax.Array:
    """:func:`exact_matmul` of any axes: ``lax.dot_general`` that rounds once.

    Args:
        lhs: float32, bfloat16 or float16, of any values.
        rhs: likewise.
        dimension_numbers: as of ``lax.dot_general``.
        axis_name: as of :func:`exact_matmul`.
        out_sharding: as of ``lax.dot_general``: how the result is to be sharded, under a mesh of explicit axes.

    Returns:
        float32: batch axes, then the other ones of ``lhs``, then of ``rhs``.

    Raises:
        TypeError: for operands of other dtypes, float64 among them; and under differentiation.
        ValueError: for shapes that do not match, and sums of more than 2^30 terms.

    >>> x = jnp.arange(6.0).reshape(2, 3)
    >>> exact_dot_general(x, x, (((1,), (1,)), ((), ()))).tolist()
    [[5.0, 14.0], [14.0, 50.0]]
    """
    lhs, rhs = _operand(lhs, "exact_dot_general"), _operand(rhs, "exact_dot_general")
    (lhs_contracted, rhs_contracted), (lhs_batch, rhs_batch) = dimension_numbers
    axes = (tuple(lhs_contracted), tuple(rhs_contracted)), (tuple(lhs_batch), tuple(rhs_batch))
    for left, right in axes:
        if [lhs.shape[axis] for axis in left] != [rhs.shape[axis] for axis in right]:
            raise InputError(
                f"the operands have shapes {lhs.shape} and {rhs.shape}; expected axes {left} of one to be as long as"
                f" axes {right} of the other"
            )
    length = math.prod(lhs.shape[axis] for axis in lhs_contracted) * places(axis_name)
    product = partial(_in_one_program, axes, length, axis_name)
    plain = partial(lax.dot_general, dimension_numbers=axes)
    return with_split_result(product, plain, out_sharding, lhs, rhs)


def _operand(x: jax.Array, taker: str) -> jax.Array:
    x = jnp.asarray(x)
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise TypeError(f"{taker} takes float32, bfloat16 and float16, whose products float64 holds; got {x.dtype}")
    return widened(x)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _product(axes: _Axes, length: int, axis_name: AxisName | None, a: jax.Array, b: jax.Array) -> jax.Array:
    def dot(a: jax.Array, b: jax.Array) -> jax.Array:
        # Without a dtype asked for: vmap, which happens later, where x64 is off, would make float32 of float64.
        part = lax.dot_general(a, b, axes)
        return part if axis_name is None else lax.psum(part, axis_name)

    # Of transposed constants XLA reads the bits in another order than the values, where it computes while compiling.
    a, b = lax.optimization_barrier((a, b))
    with jax.enable_x64(True):
        spans = _span(a, axis_name), _span(b, axis_name)
        return lax.cond(
            spans[0].bits + spans[1].bits <= bits_of_spans(length),
            lambda operands, spans: _rounded(dot(*map(_wide, operands))),
            partial(_by_slices, dot, length),
            (a, b),
            spans,
        )


@_product.defjvp
def _no_gradient(
    axes: _Axes, length: int, axis_name: AxisName | None, primals: object, tangents: object
) -> tuple[jax.Array, jax.Array]:
    raise TypeError("exact products have no gradient rule; expected to be called in a jax.custom_vjp, which is one")


_in_one_program = jax.jit(_product, static_argnums=(0, 1, 2), inline=True)  # outside of jit, too


class _Span(NamedTuple):
    """Where the bits of an operand lie.

    Attributes:
        ends: int32 ``(2,)``: how far the lowest bit set in any element lies below the lowest of all, which is not
            positive, and how far the highest lies above. What is not finite counts as the binade beyond float32.
    """

    ends: jax.Array

    @property
    def exponent(self) -> jax.Array:
        """Int32 scalar: the lowest bit is worth two to this."""
        return LOWEST_EXPONENT - self.ends[0]

    @property
    def bits(self) -> jax.Array:
        """Int32 scalar: how many there are from the lowest to the highest; none if all elements are zero."""
        return jnp.maximum(self.ends[1] + self.ends[0], 0)

    @property
    def is_finite(self) -> jax.Array:
        """Bool scalar: whether all elements are."""
        return self.ends[1] < _PLACES


def _span(x: jax.Array, axis_name: AxisName | None = None) -> _Span:
    magnitude = lax.bitcast_convert_type(x, jnp.int32) & _MAGNITUDE
    is_zero = magnitude == 0
    place = jnp.maximum(magnitude >> 23, 1) - 1
    # The bit above a fraction is always set, so that an integer conversion finds the lowest.
    significand = magnitude | _IMPLICIT_ONE
    lowest_bit = (significand & -significand).astype(jnp.float32)
    trailing = (lax.bitcast_convert_type(lowest_bit, jnp.int32) >> 23) - 127
    above_lowest = jnp.where(is_zero, -_NO_PLACE, -place - trailing)
    highest = jnp.where(is_zero, 0, place + SIGNIFICAND_BITS)
    # One reduction with two results: ten times as fast as two in XLA's CPU backend, which makes vector code of it.
    start = (-_NO_PLACE, np.int32(0))
    ends = jnp.stack(lax.reduce((above_lowest, highest), start, _larger_of_each, tuple(range(x.ndim))))
    return _Span(ends if axis_name is None else lax.pmax(ends, axis_name))


def _larger_of_each(left: tuple[jax.Array, ...], right: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    return tuple(lax.max(a, b) for a, b in zip(left, right, strict=True))


def _wide(x: jax.Array) -> jax.Array:
    """float32 as float64, subnormals at their value, which XLA's CPU backend would read as zero."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    magnitude = bits & _MAGNITUDE
    steps = jnp.where(bits < 0, -magnitude, magnitude)
    subnormal = lax.convert_element_type(steps, jnp.float64) * 2.0**LOWEST_EXPONENT
    return jnp.where(magnitude < _IMPLICIT_ONE, subnormal, lax.convert_element_type(x, jnp.float64))


def _rounded(total: jax.Array) -> jax.Array:
    """float64 rounded to float32 by the library's rules: no subnormals, one NaN, no negative zero but from those."""
    vanished = jnp.where(total < 0, jnp.float32(-0.0), jnp.float32(0))
    single = lax.convert_element_type(total, jnp.float32)
    single = jnp.where(jnp.abs(total) < ROUNDS_TO_NORMAL, vanished, single)
    return jnp.where(jnp.isnan(total), jnp.float32(jnp.nan), single)


def _by_slices(dot: Dot, length: int, operands: tuple[jax.Array, jax.Array], spans: tuple[_Span, _Span]) -> jax.Array:
    """As many dots as it takes, each an integer that float64 holds, added up until the rounding is certain."""
    cut = cut_of(spans[0].bits, spans[1].bits, length, jnp.where, quotient)
    # In one array, since each number by itself is compiled by itself.
    numbers = jnp.stack([spans[0].exponent, spans[1].exponent, cut.left, cut.right, cut.bits])
    values = tuple(jnp.where(jnp.isfinite(x), _wide(x), 0.0) for x in operands)
    are_two = cut.left * cut.right == 2
    total = lax.cond(are_two, partial(sum_of_two, dot), partial(sum_of_many, dot), values, numbers)
    are_finite = spans[0].is_finite & spans[1].is_finite
    return _rounded(lax.cond(are_finite, lambda total, *_: total, partial(_with_specials, dot), total, *operands))


def _with_specials(dot: Dot, total: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """Sums of finite elements, and what infinities and NaN make of the others: signs tell as much as values do."""
    special = dot(*(jnp.where(jnp.isfinite(x), jnp.sign(_wide(x)), _wide(x)) for x in (a, b)))
    return jnp.where(jnp.isfinite(special), total, special)

"""Matrix products whose operands, and the gradients that flow back into them, are cast to a format.

The casts' formats and scales are data. What the casts did is written to a :class:`Record` of array references while the
step runs, the backward pass included, so no gradient is bent to carry statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from altgrad_core.formats import Format
from altgrad_jax.casting import FormatParams, as_params, cast
from altgrad_jax.scaling import power_of_two_scale
from altgrad_jax.statistics import observe

DotDimensionNumbers = tuple[tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]]]
"""``((lhs_contracting, rhs_contracting), (lhs_batch, rhs_batch))``, as ``lax.dot_general`` takes it."""

Result = TypeVar("Result")

LHS, RHS, GRADIENT = range(3)
"""The three casts of a product: its operands and the gradient that comes back. Columns of amax, scales and counts."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Record:
    """Where the casts of one or many products write what they saw: references made by ``jax.new_ref``.

    Attributes:
        amax: float32 of shape ``(sites, 3)``: largest magnitudes, in the order lhs, rhs, gradient.
        counts: int32 of shape ``(sites, 3, 5, 2)``: limbs of :class:`~altgrad_jax.statistics.CastCounts`.
    """

    amax: jax.Ref
    counts: jax.Ref

    @classmethod
    def empty(cls, sites: int) -> Record:
        """Fresh references, all zero. Make them inside the jitted function and read them there with ``ref[...]``."""
        return cls(jax.new_ref(jnp.zeros((sites, 3))), jax.new_ref(jnp.zeros((sites, 3, 5, 2), jnp.int32)))


def quantized_dot_general(
    forward: str | Format | FormatParams,
    backward: str | Format | FormatParams | None = None,
    *,
    scales: jax.Array | None = None,
    rhs_is_weight: bool = False,
    record: Record | None = None,
    site: int = 0,
    operand_dtype: jnp.dtype | None = None,
) -> Callable[..., jax.Array]:
    """A stand-in for ``lax.dot_general`` that casts both operands, and the incoming gradient, before it multiplies.

    Each of the two products of the backward pass multiplies the cast gradient by a cast operand.

    Args:
        forward: format of the operands.
        backward: format of the gradient; that of the operands by default.
        scales: float32 of shape ``(3,)``, powers of two for lhs, rhs and gradient; 1 by default.
        rhs_is_weight: scale rhs by its own amax, which is known before the product, instead of ``scales[1]``.
        record: where to write amax and counts; nothing is measured without it.
        site: row of the record that is this product's.
        operand_dtype: dtype in which the cast operands are handed to the product, which accumulates in float32; to
            be one that holds the format exactly, such as bfloat16 for bf16.

    Returns:
        A function ``(lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None)``. It fits Flax's
        ``dot_general=`` hooks.

    Raises:
        UnknownFormatError: for an unknown format.

    >>> dot = quantized_dot_general("E5M2")
    >>> dot(jnp.array([[1.1]]), jnp.array([[2.0]]), (((1,), (0,)), ((), ()))).item()
    2.0
    """
    forward_params = as_params(forward)
    backward_params = forward_params if backward is None else as_params(backward)

    def dot_general(
        lhs: jax.Array,
        rhs: jax.Array,
        dimension_numbers: DotDimensionNumbers,
        precision: lax.PrecisionLike = None,
        preferred_element_type: jnp.dtype | None = None,
    ) -> jax.Array:
        unit = jnp.ones(3) if scales is None else scales
        if rhs_is_weight:
            amax = jnp.max(jnp.abs(lax.stop_gradient(rhs)))
            unit = unit.at[RHS].set(power_of_two_scale(amax, forward_params.max_value))
        lhs, rhs = (
            _cast_operand(operand, forward_params, unit[column], record, site, column)
            for operand, column in ((lhs, LHS), (rhs, RHS))
        )
        dtype = operand_dtype or lhs.dtype
        product = lax.dot_general(
            lhs.astype(dtype),
            rhs.astype(dtype),
            dimension_numbers,
            precision=precision,
            preferred_element_type=preferred_element_type or jnp.float32,
        )
        return _cast_gradient(product, backward_params, unit[GRADIENT], record, site)

    return dot_general


def _cast_operand(
    x: jax.Array, params: FormatParams, scale: jax.Array, record: Record | None, site: int, column: int
) -> jax.Array:
    """Cast and record; the gradient passes straight through."""

    @jax.custom_vjp
    def straight_through(x: jax.Array, params: FormatParams, scale: jax.Array, record: Record | None) -> jax.Array:
        return _cast_and_record(x, params, scale, record, site, column)

    def forward(x: jax.Array, params: FormatParams, scale: jax.Array, record: Record | None) -> tuple[jax.Array, None]:
        return _cast_and_record(x, params, scale, record, site, column), None

    def backward(_: None, gradient: jax.Array) -> tuple[jax.Array, None, None, None]:
        return gradient, None, None, None

    straight_through.defvjp(forward, backward)
    return straight_through(x, params, scale, record)


def _cast_gradient(x: jax.Array, params: FormatParams, scale: jax.Array, record: Record | None, site: int) -> jax.Array:
    """The identity, whose gradient is cast on its way back."""

    @jax.custom_vjp
    def identity(x: jax.Array, params: FormatParams, scale: jax.Array, record: Record | None) -> jax.Array:
        return x

    def forward(
        x: jax.Array, params: FormatParams, scale: jax.Array, record: Record | None
    ) -> tuple[jax.Array, tuple[FormatParams, jax.Array, Record | None]]:
        return x, (params, scale, record)

    def backward(
        residuals: tuple[FormatParams, jax.Array, Record | None], gradient: jax.Array
    ) -> tuple[jax.Array, None, None, None]:
        params, scale, record = residuals
        return _cast_and_record(gradient, params, scale, record, site, GRADIENT), None, None, None

    identity.defvjp(forward, backward)
    return identity(x, params, scale, record)


def _cast_and_record(
    x: jax.Array, params: FormatParams, scale: jax.Array, record: Record | None, site: int, column: int
) -> jax.Array:
    grid = params.scaled(scale)

    def measured(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        counts, amax = observe(x, grid)
        return cast(x, grid), counts.limbs, amax

    if record is None:
        return _as_one_value(lambda x: cast(x, grid), x, params)
    quantized, limbs, amax = _as_one_value(measured, x, params)
    record.counts[site, column] = limbs
    record.amax[site, column] = amax
    return quantized


def _as_one_value(function: Callable[[jax.Array], Result], x: jax.Array, params: FormatParams) -> Result:
    """Call a function so that XLA's CPU backend computes its argument and its result once each.

    Left alone it fuses the cast into every consumer and what makes ``x`` into every cast, and so computes both up to
    three times, behind transposes; optimization barriers are gone before it fuses. A conditional is a border that it
    respects. This one always takes the first branch, which XLA cannot know.
    """
    shapes = jax.eval_shape(function, x)
    never = jax.tree.map(lambda result: jnp.zeros(result.shape, result.dtype), shapes)
    return lax.cond(params.mantissa_bits >= 0, function, lambda _: never, x)

"""Matrix products whose operands, and the gradients that flow back into them, are cast to a format.

The casts' formats and scales are data. What the casts did is written to array references while the step runs, the
backward pass included, so no gradient is bent to carry statistics.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata

from altgrad_core.formats import Format
from altgrad_jax.casting import cast, refuse_missing_random_bits
from altgrad_jax.params import Edges, FormatParams, as_params, edges
from altgrad_jax.statistics import tally

DotDimensionNumbers = tuple[tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]]]
"""``((lhs_contracting, rhs_contracting), (lhs_batch, rhs_batch))``, as ``lax.dot_general`` takes it."""

Result = TypeVar("Result")

LHS, RHS, GRADIENT = range(3)
"""The three casts of a product: its operands and the gradient that comes back. Columns of amax, scales and counts."""


Refs = tuple[jax.Ref | None, jax.Ref | None, jax.Ref | None]
"""Where the three casts of a product write what they saw; see :func:`empty_record`."""

Record = tuple[Refs, ...]
"""The references of all products of a model."""


def empty_record(sites: int) -> Record:
    """Fresh references for the casts of ``sites`` products, to be made and read inside the jitted function."""
    return tuple(
        (jax.new_ref(_nothing_seen()), jax.new_ref(_nothing_seen()), jax.new_ref(_nothing_seen())) for _ in range(sites)
    )


def read_record(record: Record) -> jax.Array:
    """int32 of shape ``(sites, 3, 6)``: the :func:`~altgrad_jax.statistics.tally` of every cast."""
    return jnp.stack([jnp.stack([ref[...] for ref in refs if ref is not None]) for refs in record])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Grid:
    """A format under a scale, and where its grid ends: one, or one out of many that were worked out together.

    Attributes:
        params: the format, scaled; batched if there are many.
        limits: from which magnitude it overflows, and up to which it has only zero; batched likewise.
        index: which of many this is (static). It is looked up where the grid is used, within the loop over elements,
            since some two hundred scalar slices would cost as much as all casts of a small model.
    """

    params: FormatParams
    limits: Edges
    index: tuple[int, ...] = field(default=(), metadata={"static": True})

    @classmethod
    def of(cls, params: FormatParams, scales: jax.Array) -> Grid:
        """The grids of a format under many scales at once, of the shape of ``scales``.

        Args:
            params: the format, or one for each row of scales.
            scales: float32, powers of two.
        """

        def in_rows(leaf: jax.Array) -> jax.Array:
            return leaf.reshape(leaf.shape + (1,) * (scales.ndim - leaf.ndim)) if leaf.ndim else leaf

        scaled = jax.tree.map(in_rows, params).scaled(scales)
        return cls(scaled, edges(scaled))

    def at(self, *index: int) -> Grid:
        """One of many."""
        return replace(self, index=index)

    def looked_up(self, index: jax.Array) -> tuple[FormatParams, Edges]:
        """Params and limits of one grid alone, as scalars.

        Args:
            index: int32 of shape ``(k,)``, which of many: data, so that casts of one shape share what JAX traces.
        """

        def scalar(leaf: jax.Array) -> jax.Array:
            at = [index[k] if size > 1 else 0 for k, size in enumerate(leaf.shape)]  # a row may share its format
            return lax.dynamic_slice(leaf, at, (1,) * leaf.ndim).reshape(()) if leaf.ndim else leaf

        return jax.tree.map(scalar, self.params), jax.tree.map(scalar, self.limits)


def quantized_dot_general(
    forward: str | Format | FormatParams,
    backward: str | Format | FormatParams | None = None,
    *,
    scales: jax.Array | None = None,
    record: Refs = (None, None, None),
    operand_dtype: jnp.dtype | None = None,
) -> Callable[..., jax.Array]:
    """A stand-in for ``lax.dot_general`` that casts both operands, and the incoming gradient, before it multiplies.

    Each of the two products of the backward pass multiplies the cast gradient by a cast operand.

    Args:
        forward: format of the operands.
        backward: format of the gradient; that of the operands by default.
        scales: float32 of shape ``(3,)``, powers of two for lhs, rhs and gradient; 1 by default.
        record: where to write what the casts saw; nothing is measured without it.
        operand_dtype: dtype in which the cast operands are handed to the product, which accumulates in float32; to
            be one that holds the format exactly, such as bfloat16 for bf16.

    Returns:
        A function ``(lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None, out_sharding=None)``,
        as Flax's ``dot_general=`` hooks take it. It accumulates in float32 and keeps the dtype of its operands.

    Raises:
        UnknownFormatError: for an unknown format.
        ValueError: for params that round stochastically: no random bits reach a product.

    >>> dot = quantized_dot_general("E5M2")
    >>> dot(jnp.array([[1.1]]), jnp.array([[2.0]]), (((1,), (0,)), ((), ()))).item()
    2.0
    """
    forward_params = as_params(forward)
    backward_params = forward_params if backward is None else as_params(backward)
    for params in (forward_params, backward_params):
        refuse_missing_random_bits(params)
    unit = jnp.ones(3) if scales is None else scales
    operands, gradients = Grid.of(forward_params, unit), Grid.of(backward_params, unit)
    return dot_general_on((operands.at(LHS), operands.at(RHS), gradients.at(GRADIENT)), record, operand_dtype)


def dot_general_on(
    grids: tuple[Grid, Grid, Grid], record: Refs, operand_dtype: jnp.dtype | None = None
) -> Callable[..., jax.Array]:
    """:func:`quantized_dot_general` on grids that were worked out before, for many products at once."""

    def dot_general(
        lhs: jax.Array,
        rhs: jax.Array,
        dimension_numbers: DotDimensionNumbers,
        precision: lax.PrecisionLike = None,
        preferred_element_type: jnp.dtype | None = None,
        out_sharding: jax.sharding.Sharding | None = None,
    ) -> jax.Array:
        result_dtype = preferred_element_type or jnp.result_type(lhs, rhs)
        lhs, rhs = (
            _cast_operand(operand.astype(jnp.float32), grids[column], record[column])
            for operand, column in ((lhs, LHS), (rhs, RHS))
        )
        dtype = operand_dtype or lhs.dtype
        product = lax.dot_general(
            lhs.astype(dtype),
            rhs.astype(dtype),
            dimension_numbers,
            precision=precision,
            preferred_element_type=jnp.float32,
            out_sharding=out_sharding,
        )
        return _cast_gradient(product, grids[GRADIENT], record[GRADIENT]).astype(result_dtype)

    return dot_general


@jax.custom_vjp
def _cast_operand(x: jax.Array, grid: Grid, ref: jax.Ref | None) -> jax.Array:
    """Cast and record; the gradient passes straight through."""
    return _cast_and_record(x, grid, ref)


def _cast_operand_forward(x: jax.Array, grid: Grid, ref: jax.Ref | None) -> tuple[jax.Array, None]:
    return _cast_and_record(x, grid, ref), None


def _cast_operand_backward(_: None, gradient: jax.Array) -> tuple[jax.Array, None, None]:
    return gradient, None, None


_cast_operand.defvjp(_cast_operand_forward, _cast_operand_backward)


@jax.custom_vjp
def _cast_gradient(x: jax.Array, grid: Grid, ref: jax.Ref | None) -> jax.Array:
    """The identity, whose gradient is cast, and recorded, on its way back."""
    return x


def _cast_gradient_forward(
    x: jax.Array, grid: Grid, ref: jax.Ref | None
) -> tuple[jax.Array, tuple[Grid, jax.Ref | None]]:
    return x, (grid, ref)


def _cast_gradient_backward(
    residuals: tuple[Grid, jax.Ref | None], gradient: jax.Array
) -> tuple[jax.Array, None, None]:
    return _cast_and_record(gradient, *residuals), None, None


_cast_gradient.defvjp(_cast_gradient_forward, _cast_gradient_backward)


def _cast_and_record(x: jax.Array, grid: Grid, ref: jax.Ref | None) -> jax.Array:
    if ref is None:
        return _as_one_value(_cast_on, x, grid)
    quantized, ref[...] = _as_one_value(_cast_and_tally, x, grid)
    return quantized


def _cast_on(x: jax.Array, grids: Grid, index: jax.Array) -> jax.Array:
    return cast(x, grids.looked_up(index)[0])


def _cast_and_tally(x: jax.Array, grids: Grid, index: jax.Array) -> tuple[jax.Array, jax.Array]:
    params, limits = grids.looked_up(index)
    return cast(x, params), tally(x, limits)


def _as_one_value(function: Callable[[jax.Array, Grid, jax.Array], Result], x: jax.Array, grid: Grid) -> Result:
    """Call a function so that XLA's CPU backend computes its argument and its result once each.

    Left alone it fuses the cast into every consumer and what makes ``x`` into every cast, and so computes both up to
    three times, behind transposes; optimization barriers are gone before it fuses. A call that must not be inlined is
    a border that it respects. Other backends get the function as it is.
    """
    inside = _traced_once(function)

    def apart(x: jax.Array, grids: Grid, index: jax.Array) -> Result:
        with set_xla_metadata(inlineable="false"):
            return inside(x, grids, index)

    grids, index = replace(grid, index=()), jnp.array(grid.index, jnp.int32)
    return lax.platform_dependent(x, grids, index, cpu=apart, default=inside)


@functools.cache
def _traced_once(function: Callable[[jax.Array, Grid, jax.Array], Result]) -> Callable[..., Result]:
    def inside(x: jax.Array, grids: Grid, index: jax.Array) -> Result:
        # Without this every jitted helper of jax.numpy in here would become a border as well.
        with set_xla_metadata(inlineable=None):
            return function(x, grids, index)

    return jax.jit(inside)


def _nothing_seen() -> jax.Array:
    return jnp.zeros(6, jnp.int32)

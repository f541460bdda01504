"""Matrix products whose operands, and the gradients that flow back into them, are cast to a format.

The casts' formats and scales are data. What the casts did is written to array references while the step runs, the
backward pass included, so no gradient is bent to carry statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from jax import lax

from altgrad_jax.addition import BY_ADDITION, Addition
from altgrad_jax.casting import cast
from altgrad_jax.nn.border import as_one_value
from altgrad_jax.params import Edges, FormatParams, edges
from altgrad_jax.statistics import TallyParts, tallied, tally_parts

DotDimensionNumbers = tuple[tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]]]
"""``((lhs_contracting, rhs_contracting), (lhs_batch, rhs_batch))``, as ``lax.dot_general`` takes it."""

LHS, RHS, GRADIENT = range(3)
"""The three casts of a product: its operands and the gradient that comes back. Columns of amax, scales and counts."""


Refs = tuple[jax.Ref | None, jax.Ref | None, jax.Ref | None]
"""Where the three casts of a product write what they saw, int32 ``(6,)``: elements and their tally in parts, which are
put together for all casts at once, since each would be a kernel of its own. See :func:`empty_record`."""

Record = tuple[Refs, ...]
"""The references of all products of a model."""


def empty_record(sites: int) -> Record:
    """Fresh references for the casts of ``sites`` products, to be made and read inside the jitted function."""
    return tuple(
        (jax.new_ref(_nothing_seen()), jax.new_ref(_nothing_seen()), jax.new_ref(_nothing_seen())) for _ in range(sites)
    )


def read_record(record: Record) -> jax.Array:
    """int32 of shape ``(sites, 3, 6)``: the :func:`~altgrad_jax.statistics.tally` of every cast."""
    flat = jnp.concatenate([ref[...] for refs in record for ref in refs if ref is not None])  # one kernel, if flat
    seen = flat.reshape(len(record), len(record[0]), -1)
    return jnp.concatenate([tallied(seen[..., :5]), seen[..., 5:]], axis=-1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Grid:
    """A format under a scale, and where its grid ends: one, or one out of many that were worked out together.

    Attributes:
        rounding: the format, scaled, or what a cast by addition needs of it; batched if there are many.
        limits: from which magnitude it overflows, and up to which it has only zero; batched likewise.
        index: which of many this is (static). It is looked up where the grid is used, within the loop over elements,
            since some two hundred scalar slices would cost as much as all casts of a small model.
    """

    rounding: FormatParams | Addition
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
        limits = edges(scaled)
        return cls(Addition.of(scaled, limits) if scaled.path in BY_ADDITION else scaled, limits)

    def at(self, *index: int) -> Grid:
        """One of many."""
        return replace(self, index=index)

    def looked_up(self, index: jax.Array) -> tuple[FormatParams | Addition, Edges]:
        """Rounding and limits of one grid alone, as scalars.

        Args:
            index: int32 of shape ``(k,)``, which of many: data, so that casts of one shape share what JAX traces.
        """

        def scalar(leaf: jax.Array) -> jax.Array:
            at = [index[k] if size > 1 else 0 for k, size in enumerate(leaf.shape)]  # a row may share its format
            return lax.dynamic_slice(leaf, at, (1,) * leaf.ndim).reshape(()) if leaf.ndim else leaf

        return jax.tree.map(scalar, self.rounding), jax.tree.map(scalar, self.limits)


def dot_general_on(
    grids: tuple[Grid, Grid, Grid], record: Refs, operand_dtype: jnp.dtype | None = None
) -> Callable[..., jax.Array]:
    """A stand-in for ``lax.dot_general`` that casts on grids that were worked out before, for many products at once.

    Args:
        grids: of lhs, rhs and gradient.
        record: where to write what the casts saw; nothing is measured without it.
        operand_dtype: dtype in which the cast operands are handed to the product, which accumulates in float32; to
            be one that holds the format exactly, such as bfloat16 for bf16.

    Returns:
        A function of the arguments of ``lax.dot_general``, that keeps the dtype of its operands.
    """

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
    grids, index = replace(grid, index=()), jnp.array(grid.index, jnp.int32)
    if ref is None:
        return as_one_value(_cast_on, x, grids, index)
    quantized, seen = as_one_value(_cast_and_see, x, grids, index)
    ref[...] = jnp.stack([jnp.full_like(seen.nan, x.size), *seen])
    return quantized


def _cast_on(x: jax.Array, grids: Grid, index: jax.Array) -> jax.Array:
    return cast(x, grids.looked_up(index)[0])


def _cast_and_see(x: jax.Array, grids: Grid, index: jax.Array) -> tuple[jax.Array, TallyParts]:
    rounding, limits = grids.looked_up(index)
    return cast(x, rounding), tally_parts(x, limits)


def _nothing_seen() -> jax.Array:
    return jnp.zeros(6, jnp.int32)

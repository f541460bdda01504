"""Products for the hooks of Flax layers: they cast their operands, and the gradient that comes back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax

from altgrad_core.errors import InputError, check_choice
from altgrad_core.formats import Format, Overflow, Rounding
from altgrad_core.rules import ACCUMULATES, Accumulate, Each, Operand, option
from altgrad_core.scaling import Granularity, PerBlock, parse_granularity
from altgrad_jax.nn.accumulate import exact_product
from altgrad_jax.nn.cast_state import CastState
from altgrad_jax.nn.casts import cast_gradient, cast_operand
from altgrad_jax.nn.convolution import exact_convolution
from altgrad_jax.nn.products import DotDimensionNumbers
from altgrad_jax.params import FormatParams, as_params
from altgrad_jax.scaling import Current, Static

_CURRENT = Current()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ProductCasts:
    """The casts of one product of activations and weights; None for an operand that is left as it is.

    Attributes:
        activations: the cast of the left operand.
        weights: the cast of the right one.
        gradients: the cast of the gradient that flows back into the product.
        accumulate: how it is summed (static).
    """

    activations: CastState | None
    weights: CastState | None
    gradients: CastState | None
    accumulate: Accumulate = field(default="native", metadata={"static": True})

    def dot_general(
        self,
        lhs: jax.Array,
        rhs: jax.Array,
        dimension_numbers: DotDimensionNumbers,
        precision: lax.PrecisionLike = None,
        preferred_element_type: jnp.dtype | None = None,
        out_sharding: jax.sharding.Sharding | None = None,
    ) -> jax.Array:
        """``lax.dot_general`` of cast operands: the hook of Linen Dense and DenseGeneral, NNX Linear and LinearGeneral.

        It sums in float32 and gives the dtype that ``lax.dot_general`` gives.
        """
        dtype = preferred_element_type or jnp.result_type(lhs, rhs)
        multiply: Callable[..., jax.Array] = exact_product if self.accumulate == "exact" else lax.dot_general
        product = multiply(
            cast_operand(lhs, self.activations),
            cast_operand(rhs, self.weights),
            dimension_numbers,
            precision=precision,
            preferred_element_type=jnp.promote_types(dtype, jnp.float32),
            out_sharding=out_sharding,
        )
        return cast_gradient(product.astype(dtype), self.gradients)

    def einsum(
        self,
        equation: str,
        lhs: jax.Array,
        rhs: jax.Array,
        *,
        precision: lax.PrecisionLike = None,
        preferred_element_type: jnp.dtype | None = None,
        out_sharding: jax.sharding.Sharding | None = None,
    ) -> jax.Array:
        """``jnp.einsum`` of two cast operands: the hook of NNX Einsum.

        Raises:
            InputError: if it is to accumulate exactly, and the equation sums over an axis of one operand alone.
        """
        dtype = preferred_element_type or jnp.result_type(lhs, rhs)
        exactly = {"_dot_general": _WholeProduct(equation, (lhs.size, rhs.size))} if self.accumulate == "exact" else {}
        product = cast(Callable[..., jax.Array], jnp.einsum)(
            equation,
            cast_operand(lhs, self.activations),
            cast_operand(rhs, self.weights),
            precision=precision,
            preferred_element_type=jnp.promote_types(dtype, jnp.float32),
            out_sharding=out_sharding,
            **exactly,
        )
        return cast_gradient(product.astype(dtype), self.gradients)

    def conv_general_dilated(
        self,
        lhs: jax.Array,
        rhs: jax.Array,
        *args: Any,  # of lax.conv_general_dilated
        preferred_element_type: jnp.dtype | None = None,
        out_sharding: jax.sharding.Sharding | None = None,
        **kwargs: Any,
    ) -> jax.Array:
        """``lax.conv_general_dilated`` of cast operands: the hook of NNX and Linen Conv."""
        if out_sharding is not None:
            kwargs["out_sharding"] = out_sharding
        convolve: Callable[..., jax.Array] = (
            exact_convolution if self.accumulate == "exact" else lax.conv_general_dilated
        )
        product = convolve(
            cast_operand(lhs, self.activations),
            cast_operand(rhs, self.weights),
            *args,
            preferred_element_type=preferred_element_type,
            **kwargs,
        )
        return cast_gradient(product, self.gradients)


@dataclass(frozen=True)
class _WholeProduct:
    """An exact product that ``jnp.einsum`` has summed nothing before, equal by value so that JAX keeps its traces.

    Attributes:
        equation: of the einsum.
        sizes: of its operands.
    """

    equation: str
    sizes: tuple[int, int]

    def __call__(
        self, lhs: jax.Array, rhs: jax.Array, dimension_numbers: DotDimensionNumbers, *args: Any, **options: Any
    ) -> jax.Array:
        if sorted((lhs.size, rhs.size)) != sorted(self.sizes):
            raise InputError(
                f"{self.equation!r} sums over axes of one operand alone, which is no exact product; expected "
                "accumulate='native', or every summed axis in both operands"
            )
        return exact_product(lhs, rhs, dimension_numbers, *args, **options)


def quantized_product(
    forward: str | Format | FormatParams,
    backward: str | Format | FormatParams | None = None,
    *,
    scaling: Static | Current | Each[Static | Current] = _CURRENT,
    granularity: str | Granularity | Each[str | Granularity] = "tensor",
    rounding: Rounding | Each[Rounding] = "nearest_even",
    overflow: Overflow | Each[Overflow] = "native",
    accumulate: Accumulate = "native",
) -> ProductCasts:
    """Products that cast both operands, and the gradient that comes back, for the hooks that Flax's layers take.

    Each of the two products of the backward pass multiplies the cast gradient by a cast operand. It has no state: for
    delayed scales, stochastic rounding and counts there is :func:`altgrad_jax.nn.quantize_model`.

    Args:
        forward: format of the operands.
        backward: format of the gradient; that of the operands by default.
        scaling: where scales come from: the tensor's own amax by default.
        granularity: which elements share a scale; ``channel`` and blocks are along the last axis of a left operand and
            of the gradient. Of a right operand, whose last axis is that of outputs as in a Flax kernel, blocks are
            along the axis before.
        rounding: see :data:`altgrad_core.formats.Rounding`; not ``stochastic``.
        overflow: see :data:`altgrad_core.formats.Overflow`.
        accumulate: see :data:`altgrad_core.rules.Accumulate`.

    These four take an :class:`~altgrad_core.rules.Each`, too, but for the last; ``weights`` is the right operand.

    Returns:
        What has three methods: ``dot_general`` for the hook of that name (of Linen Dense and DenseGeneral, NNX Linear
        and LinearGeneral), ``einsum`` for ``einsum_op`` of NNX Einsum, and ``conv_general_dilated`` for that of Conv.
        They accumulate in float32 and keep the dtype of their operands.

    Raises:
        UnknownFormatError: for an unknown format.
        InputError: for an option that is none, or that needs a state.

    >>> product = quantized_product("E5M2", scaling=Static(1.0))
    >>> product.einsum("ij,jk->ik", jnp.array([[1.1]]), jnp.array([[2.0]])).item()
    2.0
    """
    check_choice("way to accumulate", accumulate, ACCUMULATES)
    formats = {"activations": forward, "weights": forward, "gradients": forward if backward is None else backward}

    def cast_of(operand: Operand) -> CastState:
        params = as_params(formats[operand], option(rounding, operand), option(overflow, operand))
        resolved = parse_granularity(option(granularity, operand))
        if operand == "weights" and isinstance(resolved, PerBlock) and resolved.axis == -1:
            resolved = replace(resolved, axis=-2)
        return CastState.without_history(params, option(scaling, operand), operand, resolved)

    return ProductCasts(cast_of("activations"), cast_of("weights"), cast_of("gradients"), accumulate)


def quantized_dot_general(
    forward: str | Format | FormatParams,
    backward: str | Format | FormatParams | None = None,
    *,
    scaling: Static | Current | Each[Static | Current] = _CURRENT,
    granularity: str | Granularity | Each[str | Granularity] = "tensor",
    rounding: Rounding | Each[Rounding] = "nearest_even",
    overflow: Overflow | Each[Overflow] = "native",
    accumulate: Accumulate = "native",
) -> Callable[..., jax.Array]:
    """A stand-in for ``lax.dot_general``: that of :func:`quantized_product`, which has the arguments and errors.

    Returns:
        A function ``(lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None, out_sharding=None)``,
        as Flax's ``dot_general=`` hooks take it.

    >>> dot = quantized_dot_general("E5M2", scaling=Static(1.0))
    >>> dot(jnp.array([[1.1]]), jnp.array([[2.0]]), (((1,), (0,)), ((), ()))).item()
    2.0
    """
    return quantized_product(
        forward,
        backward,
        scaling=scaling,
        granularity=granularity,
        rounding=rounding,
        overflow=overflow,
        accumulate=accumulate,
    ).dot_general

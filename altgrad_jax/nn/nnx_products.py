"""What stands in the layers of Flax NNX in the place of their products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast

import jax
from flax import nnx

from altgrad_core.rules import Accumulate
from altgrad_jax.nn.attention import AttentionCasts
from altgrad_jax.nn.cast_state import CastState
from altgrad_jax.nn.casts import cast_gradient, cast_operand
from altgrad_jax.nn.hooks import ProductCasts
from altgrad_jax.nn.transposed import exact_transposed

Operation = Literal["dot_general", "einsum", "conv_general_dilated"]


class CastVariable(nnx.Variable[CastState]):
    """The state of a cast, apart from parameters: what :func:`recording` brings up to date.

    A filter like ``nnx.Param``: ``nnx.state(model, CastVariable)``, ``nnx.split(model, nnx.Param, CastVariable, ...)``.
    """


class QuantizedProduct(nnx.Module):
    """A product that casts, in the place of a layer's hook.

    Args:
        casts: of its operands.
        operation: which hook it is.
        rule: the pattern of the rule that asked for it.
    """

    def __init__(self, casts: ProductCasts, operation: Operation, rule: str) -> None:
        self.activations = _variable(casts.activations)
        self.weights = _variable(casts.weights)
        self.gradients = _variable(casts.gradients)
        self.accumulate: Accumulate = casts.accumulate
        self.operation: Operation = operation
        self.rule = rule

    @property
    def variables(self) -> tuple[CastVariable, ...]:
        """The states of its casts."""
        return tuple(each for each in (self.activations, self.weights, self.gradients) if each is not None)

    @property
    def casts(self) -> ProductCasts:
        """The casts as they stand."""
        return ProductCasts(
            activations=_state(self.activations),
            weights=_state(self.weights),
            gradients=_state(self.gradients),
            accumulate=self.accumulate,
        )

    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        """The product, called as the hook is."""
        return getattr(self.casts, self.operation)(*args, **kwargs)


class QuantizedAttention(nnx.Module):
    """Attention whose products cast, in the place of a layer's ``attention_fn``.

    Args:
        scores: casts of queries and keys.
        mix: casts of attention weights and values.
        rule: the pattern of the rule that asked for it.
    """

    def __init__(self, scores: ProductCasts, mix: ProductCasts, rule: str) -> None:
        self.scores = QuantizedProduct(scores, "einsum", rule)
        self.mix = QuantizedProduct(mix, "einsum", rule)

    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        """Attention; see :class:`~altgrad_jax.nn.attention.AttentionCasts`."""
        return AttentionCasts(self.scores.casts, self.mix.casts).dot_product_attention(*args, **kwargs)


class QuantizedPromotion(nnx.Module):
    """Casts what a layer without a hook for its product promotes to one dtype, in the place of ``promote_dtype``.

    Args:
        casts: of its operands.
        original: the layer's own.
        rule: the pattern of the rule that asked for it.
    """

    def __init__(self, casts: ProductCasts, original: Callable[..., tuple[Any, ...]], rule: str) -> None:
        self.product = QuantizedProduct(casts, "dot_general", rule)
        self.original = original

    def __call__(self, arrays: tuple[Any, ...], **kwargs: Any) -> tuple[Any, ...]:
        """Promote, and cast: a table alone, or activations and weights, of which a bias may follow."""
        casts, promoted = self.product.casts, self.original(arrays, **kwargs)
        if len(promoted) == 1:
            return (cast_operand(promoted[0], casts.weights),)
        activations, weights, *bias = promoted
        return (cast_operand(activations, casts.activations), cast_operand(weights, casts.weights), *bias)

    def cast_gradient(self, result: jax.Array) -> jax.Array:
        """The result of the layer, whose gradient is cast on its way back."""
        return cast_gradient(result, self.product.casts.gradients)


class QuantizedEmbed(nnx.Embed):
    """An ``nnx.Embed`` whose table is cast, and the gradient of what is looked up."""

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Look up rows of the cast table."""
        return cast(QuantizedPromotion, self.promote_dtype).cast_gradient(super().__call__(inputs, out_sharding))

    def attend(self, query: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Multiply the cast query by the cast table."""
        return cast(QuantizedPromotion, self.promote_dtype).cast_gradient(super().attend(query, out_sharding))


class QuantizedConvTranspose(nnx.ConvTranspose):
    """An ``nnx.ConvTranspose`` whose input and kernel are cast, and the gradient of its result.

    That is the gradient behind the bias, which so, unlike that of other layers, sums a cast gradient.
    """

    def __call__(self, inputs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """Convolve the cast input with the cast kernel."""
        promotion = cast(QuantizedPromotion, self.promote_dtype)
        is_exact = promotion.product.accumulate == "exact"
        result = self._exactly(inputs) if is_exact else super().__call__(inputs, *args, **kwargs)
        return promotion.cast_gradient(result)

    def _exactly(self, inputs: jax.Array) -> jax.Array:
        own = len(self.kernel_size) + 1
        kernel = self.kernel[...] if self.mask is None else self.kernel[...] * self.mask
        bias = None if self.bias is None else self.bias[...]
        flat = inputs.reshape(-1, *inputs.shape[inputs.ndim - own :])
        result = exact_transposed(self, *self.promote_dtype((flat, kernel, bias), dtype=self.dtype))
        return result.reshape(*inputs.shape[: inputs.ndim - own], *result.shape[1:])


def _variable(state: CastState | None) -> CastVariable | None:
    return nnx.data(None if state is None else CastVariable(state))


def _state(variable: CastVariable | None) -> CastState | None:
    return None if variable is None else variable.get_value()

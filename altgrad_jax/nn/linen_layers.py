"""The layers of Flax Linen that can be cast: what their products are like, and how casts come into them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen
from flax.linen.recurrent import DenseParams

from altgrad_core.errors import InputError
from altgrad_core.rules import LayerSpec
from altgrad_jax.nn.attention import AttentionCasts
from altgrad_jax.nn.casts import cast_gradient, cast_operand
from altgrad_jax.nn.convolution import PADDINGS_OF_INPUT
from altgrad_jax.nn.hooks import ProductCasts
from altgrad_jax.nn.products import DotDimensionNumbers
from altgrad_jax.nn.sites import Site
from altgrad_jax.nn.transposed import exact_transposed

CastsOf = Callable[[Site, str], ProductCasts]
"""The casts of a layer's product, of which there are several in attention alone; elsewhere its name is empty."""


@dataclass(frozen=True)
class Call:
    """A call of a layer.

    Attributes:
        path: of the layer in the model.
        module: the layer.
        kind: what it is.
        args: of the call.
        kwargs: likewise.
    """

    path: str
    module: linen.Module
    kind: Kind
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def check(self, spec: LayerSpec) -> None:
        """Refuse what the layer cannot honour.

        Raises:
            InputError: for a layer whose product has no hook, or is the user's own, and one that cannot accumulate
                exactly and should.
        """
        kind, layer = self.kind, f"{self.path}, a {type(self.module).__name__},"
        otherwise = f"Rule({self.path!r}, None)"
        if kind.hook is None or not (kind.has_subclasses or type(self.module) is kind.layer):
            raise InputError(f"{layer} has no hook for its product, so it cannot be cast; expected {otherwise}")
        for name, plain in kind.plain.items():
            if getattr(self.module, name) is not plain:
                raise InputError(
                    f"{layer} has a {name} of its own, in whose place casts would be; expected Flax's, or {otherwise}"
                )
        is_padded_by_itself = getattr(self.module, "padding", None) in PADDINGS_OF_INPUT
        if spec.accumulate == "exact" and (is_padded_by_itself or not kind.accumulates_exactly):
            raise InputError(
                f"{layer} cannot accumulate exactly; expected a rule of its own for it, with accumulate='native'"
            )

    def compute(self, function: Callable[..., Any], casts_of: CastsOf) -> Any:
        """The result of the layer with casts.

        Args:
            function: the layer's own method.
            casts_of: the casts of its products.

        Raises:
            InputError: for a subclass that does not compute as its base does.
        """
        assert self.kind.hook is not None
        hook = self.kind.hook(self, casts_of)
        with _in_place(self.module, self.kind.attribute, hook):
            result = function(*self.args, **self.kwargs)
        if not hook.called:
            raise InputError(
                f"{self.path}, a {type(self.module).__name__}, did not use its {self.kind.attribute}, so it cannot be "
                f"cast; expected Rule({self.path!r}, None)"
            )
        return hook.finished(result)

    @property
    def is_inside_itself(self) -> bool:
        """Whether a subclass has called the method of its base: the hook is in place."""
        return isinstance(getattr(self.module, self.kind.attribute, None), Hook)


class Hook:
    """Stands in the place of an attribute of a layer while that computes.

    Args:
        call: of the layer.
        casts_of: the casts of its products.
    """

    def __init__(self, call: Call, casts_of: CastsOf) -> None:
        self.call = call
        self.original: Any = getattr(call.module, call.kind.attribute)
        self.called = False
        self._casts_of = casts_of

    def casts(self, site: Site, product: str = "") -> ProductCasts:
        """The casts of a product."""
        self.called = True
        return self._casts_of(site, product)

    def finished(self, result: Any) -> Any:
        """The result of the layer, from what its method returned."""
        return result


class _DotGeneral(Hook):
    def __call__(
        self, lhs: jax.Array, rhs: jax.Array, dimension_numbers: DotDimensionNumbers, **options: Any
    ) -> jax.Array:
        (lhs_contracted, rhs_contracted), (_, rhs_batch) = dimension_numbers
        outputs = tuple(axis for axis in range(rhs.ndim) if axis not in (*rhs_contracted, *rhs_batch))
        site = Site(
            self.call.path,
            self.call.kind.name,
            rhs,
            outputs=outputs,
            summed=rhs_contracted[-1],
            features=(lhs.shape[-1] if lhs.ndim - 1 in lhs_contracted else None, rhs.shape[outputs[-1]]),
        )
        return self.casts(site).dot_general(lhs, rhs, dimension_numbers, **options)


class _Convolution(Hook):
    def __call__(self, lhs: jax.Array, rhs: jax.Array, *args: Any, **options: Any) -> jax.Array:
        site = Site(self.call.path, self.call.kind.name, rhs, features=(lhs.shape[-1], rhs.shape[-1]))
        return self.casts(site).conv_general_dilated(lhs, rhs, *args, **options)


class _Attention(Hook):
    def __init__(self, call: Call, casts_of: CastsOf) -> None:
        super().__init__(call, casts_of)
        # By which Flax tells what to hand on.
        signature = inspect.signature(linen.dot_product_attention)
        kept = [each for each in signature.parameters.values() if "einsum" not in each.name]
        self.__signature__ = signature.replace(parameters=kept)

    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array, **options: Any) -> jax.Array:
        path, kind = self.call.path, self.call.kind.name
        scores = self.casts(Site(path, kind, None, features=(query.shape[-1], None)), "scores")
        mix = self.casts(Site(path, kind, None, features=(None, value.shape[-1])), "mix")
        return AttentionCasts(scores, mix).linen_attention(query, key, value, **options)


class _Promotion(Hook):
    """Of a layer without a hook for its product, in the place of ``promote_dtype``."""

    promoted: ProductCasts

    def __call__(self, *arrays: Any, **options: Any) -> tuple[Any, ...]:
        promoted = self.original(*arrays, **options)
        *activations, weights = promoted[:2]
        self.promoted = self.casts(self._site(weights))
        operands = (*(cast_operand(each, self.promoted.activations) for each in activations),)
        return (*operands, cast_operand(weights, self.promoted.weights), *promoted[2:])

    def finished(self, result: jax.Array) -> jax.Array:
        return cast_gradient(result, self.promoted.gradients)

    def _site(self, weights: jax.Array) -> Site:
        raise NotImplementedError


class _Embed(_Promotion):
    def _site(self, weights: jax.Array) -> Site:
        return Site(self.call.path, "Embed", weights, summed=-1, features=(weights.shape[-1], None))


class _ConvTranspose(_Promotion):
    """Exact, the product is its own."""

    kept: tuple[Any, ...]

    def __call__(self, *arrays: Any, **options: Any) -> tuple[Any, ...]:
        self.kept = super().__call__(*arrays, **options)
        if self.promoted.accumulate == "exact":  # what the layer makes of it is thrown away
            return tuple(None if each is None else jnp.zeros_like(each) for each in self.kept)
        return self.kept

    def finished(self, result: jax.Array) -> jax.Array:
        if self.promoted.accumulate == "exact":
            layer = cast(linen.ConvTranspose, self.call.module)
            result = exact_transposed(layer, *self.kept).reshape(result.shape)
        return super().finished(result)

    def _site(self, weights: jax.Array) -> Site:
        inputs, outputs = weights.ndim - 2, weights.ndim - 1
        if cast(linen.ConvTranspose, self.call.module).transpose_kernel:
            inputs, outputs = outputs, inputs
        features = (weights.shape[inputs], weights.shape[outputs])
        return Site(self.call.path, "ConvTranspose", weights, outputs=(outputs,), summed=inputs, features=features)


class _Einsum(_Promotion):
    """Keeps the bias back, so that the gradient is cast where the product ends; exact, the product is its own."""

    kept: tuple[jax.Array, jax.Array, jax.Array | None]

    def __call__(self, *arrays: Any, **options: Any) -> tuple[Any, ...]:
        self.kept = inputs, kernel, _ = self.original(*arrays, **options)
        self.promoted = self.casts(self._site(kernel))
        if self.promoted.accumulate == "exact":  # what the layer makes of it is thrown away
            return jnp.zeros_like(inputs), jnp.zeros_like(kernel), None
        return cast_operand(inputs, self.promoted.activations), cast_operand(kernel, self.promoted.weights), None

    def finished(self, result: jax.Array) -> jax.Array:
        inputs, kernel, bias = self.kept
        if self.promoted.accumulate == "exact":
            how = {name: getattr(self._module, name) for name in ("precision", "preferred_element_type")}
            result = self.promoted.einsum(self._equation, inputs, kernel, **how)
        else:
            result = super().finished(result)
        if bias is None:
            return result
        _, shape = self._module._get_bias_shape(self._equation, inputs, kernel)
        return result + jnp.reshape(bias, shape)

    def _site(self, weights: jax.Array) -> Site:
        # An equation that each call has for itself says nothing of the others.
        return Site.of_einsum(self.call.path, self._module.einsum_str, weights, weights.ndim)

    @property
    def _module(self) -> linen.Einsum:
        return cast(linen.Einsum, self.call.module)

    @property
    def _equation(self) -> str:
        given = self.call.kwargs.get("einsum_str", self.call.args[1] if len(self.call.args) > 1 else None)
        return (given or self._module.einsum_str or "").replace(" ", "")


@dataclass(frozen=True)
class Kind:
    """A kind of layer.

    Attributes:
        layer: its class.
        hook: what casts; None if nothing can.
        attribute: in whose place the hook is put.
        plain: what Flax has in the attributes by which a user brings a product of their own.
        methods: those that compute the product.
        has_subclasses: whether a subclass can be cast: the hook is the product, whatever is done with its result.
        accumulates_exactly: whether it can.
    """

    layer: type[linen.Module]
    hook: type[Hook] | None = None
    attribute: str = ""
    plain: Mapping[str, object] = field(default_factory=dict)
    methods: tuple[str, ...] = ("__call__",)
    has_subclasses: bool = False
    accumulates_exactly: bool = False

    @property
    def name(self) -> str:
        """What it is called."""
        return self.layer.__name__

    @property
    def weights(self) -> str:
        """The parameter that it multiplies by."""
        return "embedding" if self.layer is linen.Embed else "kernel"


_DOT_GENERAL: dict[str, object] = {"dot_general": None, "dot_general_cls": None}
_CONVOLUTION: dict[str, object] = {"conv_general_dilated": None, "conv_general_dilated_cls": None}
_ATTENTION: dict[str, object] = {
    "attention_fn": linen.dot_product_attention,
    "qk_attn_weights_einsum_cls": None,
    "attn_weights_value_einsum_cls": None,
}

_KINDS = (
    Kind(linen.Dense, _DotGeneral, "dot_general", _DOT_GENERAL, has_subclasses=True, accumulates_exactly=True),
    Kind(linen.DenseGeneral, _DotGeneral, "dot_general", _DOT_GENERAL, has_subclasses=True, accumulates_exactly=True),
    Kind(linen.Einsum, _Einsum, "promote_dtype", accumulates_exactly=True),
    Kind(linen.Conv, _Convolution, "conv_general_dilated", _CONVOLUTION, has_subclasses=True, accumulates_exactly=True),
    Kind(linen.ConvTranspose, _ConvTranspose, "promote_dtype", accumulates_exactly=True),
    Kind(linen.Embed, _Embed, "promote_dtype", methods=("__call__", "attend")),
    Kind(
        linen.MultiHeadDotProductAttention,
        _Attention,
        "attention_fn",
        _ATTENTION,
        has_subclasses=True,
        accumulates_exactly=True,
    ),
    Kind(linen.ConvLocal),
    Kind(DenseParams),  # of an OptimizedLSTMCell, which multiplies by several at once
)


def kind_of(module: linen.Module) -> Kind | None:
    """What kind of layer a module is; None if it has no product of its own."""
    return next((kind for kind in _KINDS if isinstance(module, kind.layer)), None)


@contextmanager
def _in_place(module: linen.Module, attribute: str, hook: Hook) -> Iterator[None]:
    # A bound module is frozen, and belongs to this call of the model alone.
    object.__setattr__(module, attribute, hook)
    try:
        yield
    finally:
        object.__setattr__(module, attribute, hook.original)

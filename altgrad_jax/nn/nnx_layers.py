"""The layers of Flax NNX that can be cast: what their products are like, and how casts come into them and out again."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from altgrad_core.errors import InputError
from altgrad_jax.nn.convolution import PADDINGS_OF_INPUT
from altgrad_jax.nn.hooks import ProductCasts
from altgrad_jax.nn.nnx_products import (
    Operation,
    QuantizedAttention,
    QuantizedConvTranspose,
    QuantizedEmbed,
    QuantizedProduct,
    QuantizedPromotion,
)
from altgrad_jax.nn.sites import Site

_SWAPPED: dict[type[nnx.Module], type[nnx.Module]] = {
    nnx.Embed: QuantizedEmbed,
    nnx.ConvTranspose: QuantizedConvTranspose,
}
"""Layers without a hook for their product, and what they become."""

_HOOKS: dict[type[nnx.Module], tuple[str, Callable[..., Any] | None]] = {
    nnx.Linear: ("dot_general", jax.lax.dot_general),
    nnx.LinearGeneral: ("dot_general", None),
    nnx.Einsum: ("einsum_op", jnp.einsum),
    nnx.Conv: ("conv_general_dilated", jax.lax.conv_general_dilated),
    nnx.MultiHeadAttention: ("attention_fn", nnx.dot_product_attention),
}
"""The hook of each layer that has one, and what Flax puts there."""

_OPERATIONS: dict[str, Operation] = {
    "dot_general": "dot_general",
    "einsum_op": "einsum",
    "conv_general_dilated": "conv_general_dilated",
}


@dataclass(frozen=True)
class Layer:
    """A layer that can be cast.

    Attributes:
        path: where it is in the model.
        module: the layer.
        kind: what it is.
        sites: its products.
    """

    path: str
    module: nnx.Module
    kind: str
    sites: tuple[Site, ...]

    @property
    def products(self) -> tuple[QuantizedProduct, ...]:
        """The products that cast; none in a plain layer."""
        hook = getattr(self.module, _hook(self.module)[0])
        if isinstance(hook, QuantizedAttention):
            return hook.scores, hook.mix
        if isinstance(hook, QuantizedPromotion):
            return (hook.product,)
        return (hook,) if isinstance(hook, QuantizedProduct) else ()

    def install(self, casts: Sequence[ProductCasts], rule: str) -> None:
        """Put casts into a plain layer.

        Raises:
            InputError: if the layer has a product of its own, or cannot accumulate exactly and should.
        """
        name, original = _hook(self.module)
        held: Any = getattr(self.module, name)
        self._refuse_uncast(name)
        own = held is not original and name != "promote_dtype"
        if own or getattr(self.module, "dot_general_cls", None) is not None:
            raise InputError(
                f"{self.path}, a {self.kind}, has a {name} of its own, in whose place casts would be; expected Flax's, "
                f"or Rule({self.path!r}, None)"
            )
        is_exact = any(each.accumulate == "exact" for each in casts)
        if is_exact and (
            isinstance(self.module, nnx.Embed) or getattr(self.module, "padding", None) in PADDINGS_OF_INPUT
        ):
            raise InputError(
                f"{self.path}, a {self.kind}, cannot accumulate exactly; expected a rule of its own for it, with "
                "accumulate='native'"
            )
        setattr(self.module, name, nnx.data(_product(name, casts, held, rule)))
        swapped = _SWAPPED.get(type(self.module))
        if swapped is not None:
            _become(self.module, swapped)

    def _refuse_uncast(self, hook: str) -> None:
        """Refuse a layer of a class of the user's own that would compute without the casts put into it."""
        kind = type(self.module)
        plain = next(each for each in (nnx.MultiHeadAttention, *_SITES) if isinstance(self.module, each))
        swapped = plain in _SWAPPED and kind is not plain
        if not swapped and _leads_to(kind, plain, {"super", "__call__", hook}):
            return
        why = (
            f"{plain.__name__}, which casts would make a class of their own of"
            if swapped
            else f"{plain.__name__} whose __call__ uses neither super() nor {hook}, so that nothing would be cast"
        )
        raise InputError(
            f"{self.path} is of the class {kind.__name__}, a subclass of {why}; expected {plain.__name__} itself, or "
            f"Rule({self.path!r}, None)"
        )

    def remove(self) -> None:
        """Make a plain layer of a cast one."""
        name, original = _hook(self.module)
        held = getattr(self.module, name)
        for plain, swapped in _SWAPPED.items():
            if type(self.module) is swapped:
                _become(self.module, plain)
                original = held.original
        setattr(self.module, name, nnx.static(original))


def layer_at(path: str, module: nnx.Module) -> Layer | None:
    """A layer of a model; None for a module that has no product of its own."""
    if isinstance(module, nnx.MultiHeadAttention):
        return Layer(path, module, "MultiHeadAttention", _attention_sites(path, module))
    for kind, site in _SITES.items():
        if isinstance(module, kind):
            return Layer(path, module, kind.__name__, (site(path, module),))
    return None


def cast_name(path: tuple[object, ...]) -> str:
    """The name of a cast: the layer's path and the operand, between them which product, if it has several.

    Args:
        path: of its state in the model, with the hook behind the layer's.
    """
    *before, product, operand = map(str, path)
    match product:
        case "scores" | "mix":
            parts = [*before[:-1], product, operand]  # without attention_fn
        case "product":
            parts = [*before[:-1], operand]  # without promote_dtype
        case _:
            parts = [*before, operand]
    return "/".join(parts)


def _leads_to(kind: type[nnx.Module], plain: type[nnx.Module], names: set[str]) -> bool:
    """Whether a layer's call is Flax's own, or may come there: by a name, a method of its class, or what it wraps."""
    own = inspect.unwrap(kind.__call__)
    if own is inspect.unwrap(plain.__call__) or not isinstance(own, FunctionType):
        return True
    if set(own.__code__.co_freevars) - {"__class__"}:
        return True  # of what a decorator without ``functools.wraps`` calls nothing is known
    codes = [own.__code__]
    while codes:
        code = codes.pop()
        used = {*code.co_names, *code.co_freevars}
        if names & used or any(callable(getattr(kind, name, None)) for name in used):
            return True
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return False


def _become(module: nnx.Module, kind: type[nnx.Module]) -> None:
    object.__setattr__(module, "__class__", kind)  # past NNX, which would take it for an attribute of the layer


def _hook(module: nnx.Module) -> tuple[str, Callable[..., Any] | None]:
    return next((hook for kind, hook in _HOOKS.items() if isinstance(module, kind)), ("promote_dtype", None))


def _product(name: str, casts: Sequence[ProductCasts], original: Any, rule: str) -> nnx.Module:
    if name == "attention_fn":
        scores, mix = casts
        return QuantizedAttention(scores, mix, rule)
    if name == "promote_dtype":
        return QuantizedPromotion(casts[0], original, rule)
    return QuantizedProduct(casts[0], _OPERATIONS[name], rule)


def _linear(path: str, module: nnx.Linear) -> Site:
    kernel = module.kernel[...]
    return Site(path, "Linear", kernel, kernel.shape[:-2], features=(module.in_features, module.out_features))


def _linear_general(path: str, module: nnx.LinearGeneral) -> Site:
    kernel, inputs, outputs = module.kernel[...], len(module.in_features), len(module.out_features)
    own = len(module.batch_axis) + inputs + outputs
    return Site(
        path,
        "LinearGeneral",
        kernel,
        kernel.shape[: kernel.ndim - own],
        outputs=tuple(range(own - outputs, own)),
        summed=own - outputs - 1,
        features=(module.in_features[-1], module.out_features[-1]),
    )


def _einsum(path: str, module: nnx.Einsum) -> Site:
    return Site.of_einsum(path, module.einsum_str, module.kernel[...], len(module.kernel_shape))


def _conv(path: str, module: nnx.Conv | nnx.ConvTranspose) -> Site:
    kernel, own = module.kernel[...], len(module.kernel_shape)
    transposed = isinstance(module, nnx.ConvTranspose) and module.transpose_kernel
    return Site(
        path,
        "ConvTranspose" if isinstance(module, nnx.ConvTranspose) else "Conv",
        kernel,
        kernel.shape[: kernel.ndim - own],
        outputs=(own - 2 if transposed else own - 1,),
        summed=own - 1 if transposed else own - 2,
        features=(module.in_features, module.out_features),
    )


def _embed(path: str, module: nnx.Embed) -> Site:
    table = module.embedding[...]
    return Site(path, "Embed", table, table.shape[:-2], summed=-1, features=(module.features, None))


def _attention_sites(path: str, module: nnx.MultiHeadAttention) -> tuple[Site, Site]:
    query = module.query.kernel[...]
    stack = query.shape[: query.ndim - 3]
    return (
        Site(path, "MultiHeadAttention", None, stack, features=(module.head_dim, None)),
        Site(path, "MultiHeadAttention", None, stack, features=(None, module.head_dim)),
    )


_SITES: dict[type[nnx.Module], Callable[[str, Any], Site]] = {
    nnx.Linear: _linear,
    nnx.LinearGeneral: _linear_general,
    nnx.Einsum: _einsum,
    nnx.Conv: _conv,
    nnx.ConvTranspose: _conv,
    nnx.Embed: _embed,
}

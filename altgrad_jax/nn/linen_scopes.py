"""Interceptors of the methods of Flax Linen: they find a model's layers, give them casts, and have them cast."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import jax
from flax import linen
from flax.core import Scope

from altgrad_core.errors import InputError
from altgrad_core.rules import OPERANDS, LayerSpec, Operand, Rule, match_rules
from altgrad_jax.nn.hooks import ProductCasts
from altgrad_jax.nn.linen_layers import Call, kind_of
from altgrad_jax.nn.sites import Numbers, Site, castable

CASTS = "casts"
"""The collection that holds the states of casts."""

PRODUCTS = ("scores", "mix")
"""The products of attention, whose states have one name more on the way to them."""

RULES = jax.make_user_context(None)
"""By what rules a model computes, as far as states do not tell: JAX keeps what it traces apart by it, so that an
``nn.jit`` inside of a model takes no trace of the plain model for one of the quantized."""

_NOTHING = ProductCasts(None, None, None)


class Interceptor:
    """What is done with each layer that a model calls, for ``linen.intercept_methods``.

    Attributes:
        layers: the kind of each layer that could be cast, by path, in the order of their first calls.
        others: what other modules are, by path.
    """

    def __init__(self) -> None:
        self.layers: dict[str, str] = {}
        self.others: dict[str, str] = {}

    def __call__(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: linen.module.InterceptorContext,
    ) -> Any:
        """The result of a method of a module."""
        module = context.module
        if module.scope is None:
            return function(*args, **kwargs)
        path, kind = "/".join(module.path), kind_of(module)
        if kind is None or context.method_name not in kind.methods:
            self.others[path] = type(module).__name__
            return function(*args, **kwargs)
        self.layers[path] = kind.name
        return self.computed(Call(path, module, kind, args, kwargs), function)

    def computed(self, call: Call, function: Callable[..., Any]) -> Any:
        """The result of a layer: its own."""
        return function(*call.args, **call.kwargs)


class Ruled(Interceptor):
    """Has something done with the layers that rules pick.

    Args:
        rules: the first whose pattern matches the whole path of a layer decides.
    """

    def __init__(self, rules: Sequence[Rule]) -> None:
        super().__init__()
        self.rules = rules

    def computed(self, call: Call, function: Callable[..., Any]) -> Any:
        """The result of a layer, with casts if a rule says so."""
        spec = match_rules([call.path], self.rules).spec(call.path)
        if spec is None or call.is_inside_itself:
            return super().computed(call, function)
        call.check(spec)
        return call.compute(function, partial(self.casts, call, spec))

    @abstractmethod
    def casts(self, call: Call, spec: LayerSpec, site: Site, product: str) -> ProductCasts:
        """The casts of a product."""


class Making(Ruled):
    """Makes the states of casts, which are in no record yet. What is computed meanwhile is not cast.

    Attributes:
        castable: of each layer that a rule picks what it is, and what it can cast, by path.
    """

    def __init__(self, rules: Sequence[Rule]) -> None:
        super().__init__(rules)
        self.castable: dict[str, tuple[str, set[Operand]]] = {}
        self._made: dict[tuple[str, str], tuple[str, tuple[int, ...] | None]] = {}

    def casts(self, call: Call, spec: LayerSpec, site: Site, product: str) -> ProductCasts:
        """Make the states in the layer's scope, at its first call."""
        scope = _scope(call)
        if not scope.is_mutable_collection(CASTS):
            raise InputError(
                f"no collection {CASTS!r} reaches {call.path}, a {site.kind}; expected it to be lifted as 'params' is, "
                "such as nn.scan(..., variable_axes={'params': 0, 'casts': 0}), and to be mutable"
            )
        what = (site.kind, None if site.weights is None else site.weights.shape)
        if self._made.setdefault((call.path, product), what) != what:
            raise InputError(
                f"{call.path} is the path of two layers, which cannot have casts of one name; expected Rule("
                f"{call.path!r}, None)"
            )
        self.castable.setdefault(call.path, (site.kind, set()))[1].update(castable([site]))
        made = site.casts(spec, Numbers(total=0, seed=0))
        values = {product: made} if product else _states(made)
        for name, value in values.items():
            if not scope.has_variable(CASTS, name):
                scope.put_variable(CASTS, name, value)
        return _NOTHING


class Casting(Ruled):
    """Casts by the states that are in the collection."""

    def casts(self, call: Call, spec: LayerSpec, site: Site, product: str) -> ProductCasts:
        """The states of the layer's scope."""
        scope = _scope(call)
        held = ProductCasts(None, None, None, spec.accumulate)
        if product:
            held = scope.get_variable(CASTS, product, held)
        else:
            states = {operand: scope.get_variable(CASTS, operand) for operand in OPERANDS}
            held = ProductCasts(**states, accumulate=spec.accumulate)
        expected = {place for place in site.takes if site.spec_at(place, spec) is not None}
        if set(_states(held)) != expected or held.accumulate != spec.accumulate:
            raise InputError(
                f"the variables hold casts of {_listed(_states(held))} for {call.path}, a {site.kind}; expected "
                f"{_listed(expected)}, as the rules say: variables from this model's init or with_casts, and a "
                f"collection {CASTS!r} lifted as 'params' is, as in nn.scan(..., variable_axes={{'params': 0, "
                "'casts': 0})"
            )
        return held


def _scope(call: Call) -> Scope:
    assert call.module.scope is not None
    return call.module.scope


def _states(casts: ProductCasts) -> dict[str, Any]:
    found = {operand: getattr(casts, operand) for operand in OPERANDS}
    return {operand: state for operand, state in found.items() if state is not None}


def _listed(operands: Collection[str]) -> str:
    return ", ".join(operand for operand in OPERANDS if operand in operands) or "nothing"

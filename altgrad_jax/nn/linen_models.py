"""Models of Flax Linen whose layers compute in the formats that rules name."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, cast

import jax
from flax import linen
from flax.core import DenyList
from flax.core.scope import CollectionFilter
from flax.serialization import register_serialization_state
from flax.typing import PRNGKey, RNGSequences
from jax.tree_util import DictKey, GetAttrKey, KeyPath

from altgrad_core.errors import InputError
from altgrad_core.rules import (
    OPERANDS,
    Formats,
    Rule,
    UnusedRuleWarning,
    check_honoured,
    choose_formats,
    describe_unused,
    match_rules,
)
from altgrad_core.summary import LayerRow, Summary
from altgrad_jax.control import set_format
from altgrad_jax.nn.cast_state import CastState
from altgrad_jax.nn.describe import format_names, scaling_names
from altgrad_jax.nn.hooks import ProductCasts
from altgrad_jax.nn.linen_scopes import CASTS, PRODUCTS, RULES, Casting, Interceptor, Making, Ruled
from altgrad_jax.nn.sites import Numbers, check_seed

Variables = Mapping[str, Any]
"""Collections by name, as ``init`` makes and ``apply`` takes them."""


class Quantized(linen.Module):
    """A Linen model whose layers cast, from :func:`altgrad_jax.nn.quantize_model`: to ``init`` and to ``apply``.

    Its parameters have the names and values of the plain model's. The states of casts are a collection of their own,
    ``variables["casts"]``, that computing reads and :func:`~altgrad_jax.nn.record_casts` brings up to date.

    Attributes:
        module: the plain model.
        rules: what computes in which format.
        seed: of stochastic rounding.
    """

    module: linen.Module
    rules: tuple[Rule, ...]
    seed: int | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse to be bound.

        Raises:
            InputError: always.
        """
        raise InputError(
            "a quantized model is no part of another and is not bound; expected its init and apply, and quantize_model "
            "of the whole"
        )

    def init_with_output(
        self,
        rngs: PRNGKey | RNGSequences,
        *args: Any,
        method: Callable[..., Any] | str | None = None,
        mutable: CollectionFilter = DenyList("intermediates"),  # noqa: B008
        capture_intermediates: bool | Callable[[linen.Module, str], bool] = False,
        **kwargs: Any,
    ) -> tuple[Any, dict[str, Any]]:
        """As of the plain model, whose output it is: nothing is cast yet. ``init`` gives the variables alone.

        Raises:
            InputError: for an option that a layer cannot honour.

        Warns:
            UnusedRuleWarning: for a rule that decides about no layer.
        """
        making = Making(self.rules)
        with intercepted(making):
            output, variables = self.module.init_with_output(
                rngs, *args, method=method, mutable=mutable, capture_intermediates=capture_intermediates, **kwargs
            )
        return output, self._with(variables, variables, making)

    def with_casts(
        self,
        variables: Variables,
        *args: Any,
        rngs: PRNGKey | RNGSequences | None = None,
        method: Callable[..., Any] | str | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Variables of the plain model, such as from a checkpoint, with casts as ``init`` makes them.

        Args:
            variables: whatever casts they hold are replaced.
            *args: of a call of the model that reaches its layers.
            rngs: of that call.
            method: that is called.
            **kwargs: of that call.

        Raises:
            InputError: for an option that a layer cannot honour.

        Warns:
            UnusedRuleWarning: for a rule that decides about no layer.
        """
        plain = {name: collection for name, collection in variables.items() if name != CASTS}
        making = Making(self.rules)
        with intercepted(making):
            _, changed = self.module.apply(plain, *args, rngs=rngs, method=method, mutable=True, **kwargs)
        return self._with(plain, changed, making)

    def apply(
        self,
        variables: Variables,
        *args: Any,
        rngs: PRNGKey | RNGSequences | None = None,
        method: Callable[..., Any] | str | None = None,
        mutable: CollectionFilter = False,
        capture_intermediates: bool | Callable[[linen.Module, str], bool] = False,
        **kwargs: Any,
    ) -> Any:
        """As of the plain model, of which ``method`` is one, too.

        Raises:
            InputError: if a layer that rules pick has no states in the variables.
        """
        with intercepted(Casting(self.rules)):
            return self.module.apply(
                variables,
                *args,
                rngs=rngs,
                method=method,
                mutable=mutable,
                capture_intermediates=capture_intermediates,
                **kwargs,
            )

    def bind(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse to be bound: a bound model would compute without casts.

        Raises:
            InputError: always.
        """
        self()

    def tabulate(self, *args: Any, **kwargs: Any) -> str:
        """Flax's table of the plain model; that of formats is :func:`altgrad_jax.nn.summary`."""
        return self.module.tabulate(*args, **kwargs)

    def _with(self, variables: Variables, made: Mapping[str, Any], making: Making) -> dict[str, Any]:
        casts = made.get(CASTS, {})
        paths = {**making.layers, **_states_by_layer(casts)}  # the latter for an nn.jit that had been traced before
        matches = match_rules(list(paths), self.rules)
        if making.castable.keys() >= _states_by_layer(casts).keys():  # else of some layers it is not known
            check_honoured(matches, making.castable)
        for reason in describe_unused(matches, making.others):
            warnings.warn(reason, UnusedRuleWarning, stacklevel=3)
        return {**variables, CASTS: _numbered(casts, self.seed or 0)} if casts else {**variables}


def quantize_linen(module: linen.Module, rules: Sequence[Rule], *, seed: int | None = None) -> Quantized:
    """See :func:`altgrad_jax.nn.quantize_model`."""
    if isinstance(module, Quantized):
        raise InputError("the model is quantized already; expected a plain one, see dequantize_model")
    match_rules([], rules)  # refuses what is no rule
    if seed is not None:
        specs = [spec for rule in rules if (spec := rule.spec) is not None]
        casts = [getattr(spec, operand) for spec in specs for operand in OPERANDS]
        check_seed(seed, [cast for cast in casts if cast is not None])
    return Quantized(module, tuple(rules), seed)


def dequantize_linen(model: linen.Module) -> linen.Module:
    """See :func:`altgrad_jax.nn.dequantize_model`."""
    return model.module if isinstance(model, Quantized) else model


def set_linen_formats(variables: Variables, formats: Formats) -> dict[str, Any]:
    """See :func:`altgrad_jax.nn.set_formats`."""
    casts = variables.get(CASTS, {})
    by_layer = _states_by_layer(casts)
    chosen = choose_formats({path: {state.operand for state in held} for path, held in by_layer.items()}, formats)

    def rewritten(path: KeyPath, state: CastState) -> CastState:
        place = _layer(path), state.operand
        return set_format(state, chosen[place]) if place in chosen else state

    return {**variables, CASTS: jax.tree.map_with_path(rewritten, casts, is_leaf=_is_state)}


def summarize_linen(
    model: linen.Module,
    variables: Variables,
    *args: Any,
    rngs: PRNGKey | RNGSequences | None = None,
    method: Callable[..., Any] | str | None = None,
    **kwargs: Any,
) -> Summary:
    """See :func:`altgrad_jax.nn.summary`."""
    module, rules = (model.module, model.rules) if isinstance(model, Quantized) else (model, ())
    looking = Interceptor()

    def look() -> object:
        with intercepted(looking):
            return module.apply(variables, *args, rngs=rngs, method=method, mutable=True, **kwargs)

    jax.eval_shape(look)
    matches, states = match_rules(list(looking.layers), rules), _states_by_layer(variables.get(CASTS, {}))
    return Summary(
        tuple(
            _row(path, kind, _parameters(variables, path), matches.rules[path], states.get(path, []))
            for path, kind in looking.layers.items()
        )
    )


@contextmanager
def intercepted(interceptor: Interceptor) -> Iterator[None]:
    """Have what is done with each layer that a model calls done by an interceptor."""
    rules = interceptor.rules if isinstance(interceptor, Ruled) else ()
    told = tuple((rule.layers, rule.accumulate, rule.spec is None) for rule in rules)
    with RULES(told), linen.intercept_methods(interceptor):
        yield


def _numbered(casts: Variables, seed: int) -> Variables:
    """The casts with numbers: by layer, in the order of their names, and by product and operand."""
    states = dict(_states(casts))
    numbers = Numbers(len(states), seed)
    numbered = {path: numbers.number(state) for path, state in sorted(states.items(), key=_order)}
    return jax.tree.map_with_path(lambda path, _: numbered[path], casts, is_leaf=_is_state)


def _order(item: tuple[KeyPath, CastState]) -> tuple[str, int, int]:
    path, _ = item
    last = path[-1]
    if isinstance(last, DictKey):
        return _layer(path), 0, OPERANDS.index(last.key)
    return _layer(path), PRODUCTS.index(_names(path)[-1]), OPERANDS.index(cast(GetAttrKey, last).name)


def _states(casts: Variables) -> list[tuple[KeyPath, CastState]]:
    leaves = jax.tree.leaves_with_path(casts, is_leaf=_is_state)
    return [(path, state) for path, state in leaves if isinstance(state, CastState)]


def _states_by_layer(casts: Variables) -> dict[str, list[CastState]]:
    found: dict[str, list[CastState]] = {}
    for path, state in _states(casts):
        found.setdefault(_layer(path), []).append(state)
    return found


def _layer(path: KeyPath) -> str:
    """The path of a layer: of the names on the way to a state, the last is that of its operand or product."""
    return "/".join(_names(path)[:-1])


def _names(path: KeyPath) -> list[str]:
    return [key.key for key in path if isinstance(key, DictKey)]


def _parameters(variables: Variables, path: str) -> int:
    """How many numbers a layer multiplies by, in all layers of a stack."""
    node: Any = variables.get("params", {})
    for name in path.split("/") if path else ():
        node = node.get(name, {})
    held = jax.tree.leaves([node[name] for name in ("kernel", "embedding") if name in node])
    return sum(math.prod(each.shape) for each in held)


def _row(path: str, kind: str, parameters: int, rule: Rule | None, states: Sequence[CastState]) -> LayerRow:
    of = {operand: [state for state in states if state.operand == operand] for operand in OPERANDS}
    return LayerRow(
        path=path,
        kind=kind,
        parameters=parameters,
        formats=(format_names(of["activations"]), format_names(of["weights"]), format_names(of["gradients"])),
        scaling=scaling_names([state for operand in OPERANDS for state in of[operand]]),
        accumulate=rule.spec.accumulate if states and rule is not None and rule.spec is not None else "",
        rule=None if rule is None or rule.spec is None else rule.layers,
    )


def _is_state(node: object) -> bool:
    return isinstance(node, CastState)


def _to_state_dict(node: CastState | ProductCasts) -> dict[str, Any]:
    return {str(place): leaf for place, leaf in enumerate(jax.tree.leaves(node))}


def _from_state_dict(target: CastState | ProductCasts, state: Mapping[str, Any]) -> CastState | ProductCasts:
    return jax.tree.unflatten(jax.tree.structure(target), [state[str(place)] for place in range(len(state))])


# So that flax.serialization knows them; what is static is the target's.
register_serialization_state(CastState, _to_state_dict, _from_state_dict)
register_serialization_state(ProductCasts, _to_state_dict, _from_state_dict)

"""Models of Flax Linen in packed storage."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import jax
from flax import linen
from flax.core import meta
from flax.core.tracers import current_trace
from jax.tree_util import KeyPath

from altgrad_core.errors import InputError
from altgrad_core.rules import LayerSpec, Rule
from altgrad_jax.nn.cast_arrays import stored_name
from altgrad_jax.nn.cast_state import CastState
from altgrad_jax.nn.hooks import ProductCasts
from altgrad_jax.nn.linen_layers import Call
from altgrad_jax.nn.linen_models import Quantized, Variables, intercepted
from altgrad_jax.nn.linen_scopes import CASTS, Casting
from altgrad_jax.nn.seen import named_states
from altgrad_jax.nn.sites import Site
from altgrad_jax.nn.stored import CastWeights, Stored, Tensors
from altgrad_jax.packing import PackedTensor

_KEPT = ("params", "batch_stats")
"""The collections that are stored."""


def pack_linen(
    model: linen.Module, variables: Variables, *args: Any, **options: Any
) -> dict[str, PackedTensor | jax.Array]:
    """See :func:`altgrad_jax.nn.pack`."""
    stored = _stored(variables)
    if not isinstance(model, Quantized):
        if stored.casts:
            raise InputError("the variables hold casts of a quantized model; expected that model, not the plain one")
        return stored.packed({})
    looking = _Looking(model.rules, stored.arrays)

    def look() -> object:
        looking.outside = current_trace()
        with intercepted(looking):
            return model.module.apply(variables, *args, mutable=True, **options)

    jax.eval_shape(look)
    missed = sorted({each.cast for each in stored.weights} - looking.reached)
    if missed:
        raise InputError(f"the call does not reach {missed[0]}; expected inputs with which all layers compute")
    return stored.packed(
        {each.name: each.packed(dtype) for each in stored.weights if (dtype := looking.dtype_of(each)) is not None}
    )


def unpack_linen(variables: Variables, tensors: Tensors) -> dict[str, Any]:
    """See :func:`altgrad_jax.nn.unpack`."""
    arrays, casts = _stored(variables).unpacked(tensors)
    kept = {collection: variables[collection] for collection in _KEPT if collection in variables}
    written = {name: _with(collection, arrays) for name, collection in kept.items()}
    if CASTS not in variables:
        return {**variables, **written}

    def of_cast(path: KeyPath, _: CastState) -> CastState:
        return casts[stored_name(_name(path))]

    of_casts = jax.tree.map_with_path(of_cast, variables[CASTS], is_leaf=lambda node: isinstance(node, CastState))
    return {**variables, **written, CASTS: of_casts}


class _Looking(Casting):
    """Looks at what the layers that cast weights multiply by.

    Attributes:
        outside: the trace in which the model is called.
        reached: the casts of weights, by name.
    """

    def __init__(self, rules: tuple[Rule, ...], arrays: Mapping[str, jax.Array]) -> None:
        super().__init__(rules)
        self.outside: object = None
        self.reached: set[str] = set()
        self._arrays = arrays
        self._seen: defaultdict[str, set[tuple[tuple[int, ...], Any]]] = defaultdict(set)
        self._others: set[str] = set()

    def casts(self, call: Call, spec: LayerSpec, site: Site, product: str) -> ProductCasts:
        """The states of the layer's scope."""
        held = super().casts(call, spec, site, product)
        if site.weights is not None and held.weights is not None:
            cast = stored_name(_joined(call.path, "weights"))
            self.reached.add(cast)
            self._seen[cast].add((site.weights.shape, site.weights.dtype))
            if not self._multiplies_by_its_parameter(call):
                self._others.add(cast)
        return held

    def dtype_of(self, weights: CastWeights) -> Any:
        """The dtype in which a layer computes; None if it is not the parameter itself that it casts, and once."""
        (shape, dtype), *others = self._seen[weights.cast]
        is_whole = weights.values.shape == (*weights.state.stack, *shape)
        return dtype if is_whole and not others and weights.cast not in self._others else None

    def _multiplies_by_its_parameter(self, call: Call) -> bool:
        """Whether nothing is known to come between, such as a subclass, a mask or ``nn.map_variables``."""
        module, scope = call.module, call.module.scope
        assert scope is not None
        if type(module) is not call.kind.layer or getattr(module, "mask", None) is not None:
            return False
        # Where layers are scanned over or computed anew the parameter is another tracer in any case.
        given = meta.unbox(scope.get_variable("params", call.kind.weights))
        return current_trace() != self.outside or given is self._arrays.get(_joined(call.path, call.kind.weights))


def _stored(variables: Variables) -> Stored:
    arrays, states = _arrays(variables), named_states(variables.get(CASTS, {}))
    weights = []
    for name, state in states.items():
        layer = name.rpartition("/")[0]
        held = next((each for each in (_joined(layer, "kernel"), _joined(layer, "embedding")) if each in arrays), None)
        if state.operand == "weights" and held is not None:
            weights.append(CastWeights(held, stored_name(name), arrays[held], state))
    return Stored(arrays, {stored_name(name): state for name, state in states.items()}, tuple(weights))


def _arrays(variables: Variables) -> dict[str, jax.Array]:
    """Parameters and running statistics by name, which is without that of their collection.

    Raises:
        InputError: if there are two of one name.
    """
    found: dict[str, jax.Array] = {}
    for collection in _KEPT:
        for path, array in jax.tree.leaves_with_path(meta.unbox(variables.get(collection, {}))):
            name = _name(path)
            if name in found:
                raise InputError(f"{name} is both a parameter and a running statistic; expected names of their own")
            found[name] = array
    return found


def _with(collection: Variables, arrays: Mapping[str, jax.Array]) -> Any:
    """A collection with other arrays, in the boxes that say how they are sharded."""
    plain = jax.tree.map_with_path(lambda path, _: arrays[_name(path)], meta.unbox(collection))
    return meta.replace_boxed(collection, plain)


def _name(path: KeyPath) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _joined(layer: str, name: str) -> str:
    return f"{layer}/{name}" if layer else name

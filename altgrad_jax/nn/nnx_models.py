"""Models of Flax NNX whose layers compute in the formats that rules name."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import jax
from flax import nnx

from altgrad_core.errors import InputError
from altgrad_core.rules import (
    OPERANDS,
    Formats,
    Rule,
    UnusedRuleWarning,
    check_alike,
    check_honoured,
    choose_formats,
    describe_unused,
    match_rules,
)
from altgrad_core.summary import LayerRow, Summary
from altgrad_jax.control import set_format
from altgrad_jax.nn.describe import format_names, scaling_names
from altgrad_jax.nn.nnx_layers import Layer, cast_name, layer_at
from altgrad_jax.nn.nnx_products import CastVariable
from altgrad_jax.nn.seen import Seen, record_casts
from altgrad_jax.nn.sites import Numbers, castable

Model = TypeVar("Model", bound=nnx.Module)


def quantize_nnx(model: Model, rules: Sequence[Rule], *, seed: int | None = None) -> Model:
    """See :func:`altgrad_jax.nn.quantize_model`."""
    model = nnx.clone(model)
    layers = layers_of(model)
    for layer in layers.values():
        if layer.products:
            raise InputError(
                f"{layer.path}, a {layer.kind}, is cast already; expected a plain model, see dequantize_model"
            )
    matches = match_rules(list(layers), rules)
    for places in _places_of_layers(model):
        check_alike(places, rules)
    check_honoured(matches, {path: (layer.kind, castable(layer.sites)) for path, layer in layers.items()})
    for reason in describe_unused(matches, _others(model, layers)):
        warnings.warn(reason, UnusedRuleWarning, stacklevel=3)
    chosen = [
        (layers[path], rule.spec, rule.layers)
        for path, rule in matches.rules.items()
        if rule is not None and rule.spec is not None
    ]
    numbers = Numbers.of([(site, spec) for layer, spec, _ in chosen for site in layer.sites], seed)
    for layer, spec, pattern in chosen:
        layer.install([site.casts(spec, numbers) for site in layer.sites], pattern)
    return model


def dequantize_nnx(model: Model) -> Model:
    """See :func:`altgrad_jax.nn.dequantize_model`."""
    model = nnx.clone(model)
    for layer in layers_of(model).values():
        if layer.products:
            layer.remove()
    return model


@contextmanager
def record_nnx(model: nnx.Module, *, axis_name: str | tuple[str, ...] = ()) -> Iterator[Seen]:
    """See :func:`altgrad_jax.nn.recording`."""
    variables = variables_of(model)
    states = {name: variable.get_value() for name, variable in variables.items()}
    with record_casts(states, axis_name=axis_name) as seen:
        yield seen
    for name, state in seen.updated(states).items():
        variables[name].set_value(state)


def set_nnx_formats(model: nnx.Module, formats: Formats) -> None:
    """See :func:`altgrad_jax.nn.set_formats`."""
    variables = {
        path: [(variable, variable.get_value()) for product in layer.products for variable in product.variables]
        for path, layer in layers_of(model).items()
        if layer.products
    }
    chosen = choose_formats({path: {state.operand for _, state in held} for path, held in variables.items()}, formats)
    written = [
        (variable, set_format(state, chosen[path, state.operand]))
        for path, held in variables.items()
        for variable, state in held
        if (path, state.operand) in chosen
    ]
    for variable, state in written:  # all or none: an unknown format above leaves the model as it was
        variable.set_value(state)


def summarize_nnx(model: nnx.Module) -> Summary:
    """See :func:`altgrad_jax.nn.summary`."""
    return Summary(tuple(_row(layer) for layer in layers_of(model).values()))


def layers_of(model: nnx.Module) -> dict[str, Layer]:
    """The layers that can be cast by path, a shared one once."""
    found = [layer_at(_path(path), module) for path, module in nnx.iter_graph(model) if isinstance(module, nnx.Module)]
    return {layer.path: layer for layer in found if layer is not None}


def _places_of_layers(model: nnx.Module) -> list[list[str]]:
    """All paths of each layer that can be cast: of a shared one several, of which ``iter_graph`` tells the first."""
    places: dict[int, list[str]] = {}

    def walk(node: object, path: tuple[str, ...], above: frozenset[int]) -> None:
        if isinstance(node, nnx.Module) and layer_at("/".join(path), node) is not None:
            places.setdefault(id(node), []).append("/".join(path))
        children, _ = jax.tree.flatten_with_path(node, is_leaf=lambda each: each is not node)
        for keys, child in children:
            # Arrays are their own and only child; a cycle ends where it began.
            if keys and not isinstance(child, nnx.Variable) and id(child) not in above:
                walk(child, (*path, *map(_name_of, keys)), above | {id(node)})

    walk(model, (), frozenset())
    return list(places.values())


def _name_of(key: jax.tree_util.KeyEntry) -> str:
    return jax.tree_util.keystr((key,), simple=True)


def variables_of(model: nnx.Module) -> dict[str, CastVariable]:
    """The states of casts by name: the layer's path and the operand, between them which product, if it has several."""
    found: dict[str, CastVariable] = {}
    for path, node in nnx.iter_graph(model):
        if isinstance(node, CastVariable):
            found[cast_name(path)] = node
    return found


def _others(model: nnx.Module, layers: Mapping[str, Layer]) -> dict[str, str]:
    modules = {_path(path): node for path, node in nnx.iter_graph(model) if isinstance(node, nnx.Module)}
    return {path: type(module).__name__ for path, module in modules.items() if path not in layers}


def _path(path: tuple[object, ...]) -> str:
    return "/".join(map(str, path))


def _row(layer: Layer) -> LayerRow:
    products = layer.products
    states = [variable.get_value() for product in products for variable in product.variables]
    activations, weights, gradients = ([state for state in states if state.operand == each] for each in OPERANDS)
    return LayerRow(
        path=layer.path,
        kind=layer.kind,
        parameters=sum(math.prod(site.weights.shape) for site in layer.sites if site.weights is not None),
        formats=(format_names(activations), format_names(weights), format_names(gradients)),
        scaling=scaling_names(activations + weights + gradients),
        accumulate=products[0].accumulate if products else "",
        rule=products[0].rule if products else None,
    )

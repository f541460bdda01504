"""Models of Flax NNX in packed storage."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import TypeVar

import jax
import numpy as np
from flax import nnx

from altgrad_jax.nn.cast_arrays import stored_name
from altgrad_jax.nn.cast_state import CastState
from altgrad_jax.nn.nnx_layers import Layer
from altgrad_jax.nn.nnx_models import layers_of, variables_of
from altgrad_jax.nn.nnx_products import CastVariable
from altgrad_jax.nn.stored import CastWeights, Stored, Tensors
from altgrad_jax.packing import PackedTensor

Model = TypeVar("Model", bound=nnx.Module)

_Kept = nnx.Variable[jax.Array]
"""A parameter or a running statistic."""


def pack_nnx(model: nnx.Module) -> dict[str, PackedTensor | jax.Array]:
    """See :func:`altgrad_jax.nn.pack`."""
    return _stored(model).packed(_packed_weights(model))


def unpack_nnx(model: Model, tensors: Tensors) -> Model:
    """See :func:`altgrad_jax.nn.unpack`."""
    model = nnx.clone(model)
    arrays, casts = _stored(model).unpacked(tensors)
    for name, variable in _kept(model).items():
        variable.set_value(arrays[name])
    for name, variable in _casts(model).items():
        variable.set_value(replace(casts[name], stack=variable.get_value().stack))
    return model


def _stored(model: nnx.Module) -> Stored:
    return Stored(
        {name: variable.get_value() for name, variable in _kept(model).items()},
        {name: variable.get_value() for name, variable in _casts(model).items()},
        tuple(weights for _, weights in _cast_weights(model)),
    )


def _kept(model: nnx.Module) -> dict[str, _Kept]:
    kept = (nnx.Param, nnx.BatchStat)
    return {"/".join(map(str, path)): node for path, node in nnx.iter_graph(model) if isinstance(node, kept)}


def _casts(model: nnx.Module) -> dict[str, CastVariable]:
    return {stored_name(name): variable for name, variable in variables_of(model).items()}


def _packed_weights(model: nnx.Module) -> dict[str, PackedTensor]:
    """The parameters that every module that holds them casts, all to the same values, without a mask before."""
    found: defaultdict[str, list[PackedTensor]] = defaultdict(list)
    for layer, weights in _cast_weights(model):
        if getattr(layer.module, "mask", None) is not None:
            continue
        found[weights.name].append(weights.packed(getattr(layer.module, "dtype", None) or weights.values.dtype))
    modules = (node for _, node in nnx.iter_graph(model) if isinstance(node, nnx.Module))
    holders = Counter(id(each) for module in modules for each in vars(module).values() if isinstance(each, nnx.Param))
    held = {name: holders[id(variable)] for name, variable in _kept(model).items()}
    return {
        name: packed[0]
        for name, packed in found.items()
        if len(packed) == held[name] and all(_same(each, packed[0]) for each in packed)
    }


def _cast_weights(model: nnx.Module) -> Iterator[tuple[Layer, CastWeights]]:
    names = {id(variable): name for name, variable in _kept(model).items()}
    casts = {id(variable): name for name, variable in _casts(model).items()}
    for layer in layers_of(model).values():
        variables = [product.weights for product in layer.products]
        if layer.sites[0].weights is not None and variables and variables[0] is not None:
            held, cast = _weights(layer), variables[0]
            yield layer, CastWeights(names[id(held)], casts[id(cast)], held.get_value(), _as_it_lies(cast.get_value()))


def _as_it_lies(state: CastState) -> CastState:
    """A state with the stack that its array has: models may be stacked, or taken out of a stack, once quantized."""
    return replace(state, stack=state.words.shape[:-1])


def _weights(layer: Layer) -> _Kept:
    return getattr(layer.module, "embedding" if isinstance(layer.module, nnx.Embed) else "kernel")


def _same(one: PackedTensor, other: PackedTensor) -> bool:
    return one.layout == other.layout and all(map(np.array_equal, (one.codes, one.scales), (other.codes, other.scales)))

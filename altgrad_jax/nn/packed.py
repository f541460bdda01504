"""Models in packed storage: the weights that layers cast, as codes and scales."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import jax
from flax import nnx

from altgrad_core.errors import InputError
from altgrad_core.formats import Format, parse
from altgrad_core.scaling import Granularity, PerBlock, PerChannel, PerTensor, checked_axes
from altgrad_jax.granularity import amaxes
from altgrad_jax.nn.casts import CastState, cast_operand, scale_of
from altgrad_jax.nn.describe import format_names
from altgrad_jax.nn.nnx_layers import Layer
from altgrad_jax.nn.nnx_models import layers_of
from altgrad_jax.packing import PackedTensor, pack_tensor, unpack_tensor

Model = TypeVar("Model", bound=nnx.Module)


def pack(model: nnx.Module) -> dict[str, PackedTensor | jax.Array]:
    """All parameters of a model by path, those that a layer casts as the codes and scales that it computes with.

    They are for :func:`altgrad_jax.packed_files.save_packed`, which ``altgrad_torch`` reads as well.

    Args:
        model: from :func:`altgrad_jax.nn.quantize_model`; not traced.

    Returns:
        By paths such as ``blocks/0/up/kernel``; packed, or, of what no layer casts, as it is.

    Raises:
        InputError: if layers that are stacked in one parameter have different formats.

    >>> from altgrad_jax.nn import Rule, quantize_model
    >>> packed = pack(quantize_model(nnx.Linear(8, 4, rngs=nnx.Rngs(0)), [Rule(".*", "E4M3")]))
    >>> {name: str(tensor.dtype if name == "bias" else tensor.codes.dtype) for name, tensor in sorted(packed.items())}
    {'bias': 'float32', 'kernel': 'uint8'}
    """
    tensors = {name: variable.get_value() for name, variable in _parameters(model).items()}
    return {**tensors, **{_weights(layer): _packed(layer, state) for layer, state in _cast_weights(model)}}


def unpack(model: Model, tensors: Mapping[str, PackedTensor | jax.Array]) -> Model:
    """A model with the parameters that were packed: it computes what the packed one did.

    Args:
        model: plain, or from :func:`altgrad_jax.nn.quantize_model`; it stays as it is.
        tensors: from :func:`pack` or a file.

    Returns:
        A copy of the model, its parameters those of ``tensors``, unpacked.

    Raises:
        InputError: for names that are missing or that the model does not have, for another shape, and for weights in
            another format than that of the layer that casts them.
    """
    model = nnx.clone(model)
    parameters = _parameters(model)
    _check_names(parameters, tensors)
    expected = {_weights(layer): parse(_format(layer, state).name) for layer, state in _cast_weights(model)}
    for name, variable in parameters.items():
        tensor = tensors[name]
        if isinstance(tensor, PackedTensor) and name in expected and tensor.layout.format != expected[name]:
            raise InputError(
                f"{name} is packed as {tensor.layout.format}; expected {expected[name]}, as its layer casts"
            )
        if tensor.shape != variable.get_value().shape:
            raise InputError(f"{name} has shape {tensor.shape}; expected {variable.get_value().shape}")
        variable.set_value(unpack_tensor(tensor) if isinstance(tensor, PackedTensor) else tensor)
    return model


def _parameters(model: nnx.Module) -> dict[str, nnx.Param[jax.Array]]:
    return {"/".join(map(str, path)): node for path, node in nnx.iter_graph(model) if isinstance(node, nnx.Param)}


def _cast_weights(model: nnx.Module) -> list[tuple[Layer, CastState]]:
    found: list[tuple[Layer, CastState]] = []
    for layer in layers_of(model).values():
        states = [product.casts.weights for product in layer.products]
        if layer.sites[0].weights is not None and states and states[0] is not None:
            found.append((layer, states[0]))
    return found


def _weights(layer: Layer) -> str:
    name = "embedding" if isinstance(layer.module, nnx.Embed) else "kernel"
    return f"{layer.path}/{name}" if layer.path else name


def _format(layer: Layer, state: CastState) -> Format:
    names = format_names([state])
    if names is None or "," in names:
        raise InputError(f"the layers stacked in {_weights(layer)} have the formats {names}; expected one for all")
    return parse(names)


def _packed(layer: Layer, state: CastState) -> PackedTensor:
    site = layer.sites[0]
    weights = site.weights
    assert weights is not None
    cast, scale = cast_operand, _scales
    for _ in site.stack:
        cast, scale = jax.vmap(cast), jax.vmap(scale)
    return pack_tensor(
        cast(weights, state),  # on its grid, however it is rounded
        _format(layer, state),
        scale=scale(weights, state),
        granularity=_over_stack(state.granularity, len(site.stack), weights.ndim),
    )


def _scales(weights: jax.Array, state: CastState) -> jax.Array:
    """The scales of one layer's weights, with the axes of these."""
    scale = scale_of(state, amaxes(weights, state.granularity))
    return scale.reshape((1,) * weights.ndim) if scale.ndim == 0 else scale


def _over_stack(granularity: Granularity, stack: int, ndim: int) -> Granularity:
    """The granularity of stacked weights, from that of one layer's."""
    if not stack:
        return granularity
    match granularity:
        case PerTensor():
            return PerChannel(tuple(range(stack)))
        case PerChannel(axes):
            return PerChannel((*range(stack), *(stack + axis for axis in checked_axes(axes, ndim - stack))))
        case PerBlock(size, axis):
            return PerBlock(size, axis if axis < 0 else axis + stack)


def _check_names(parameters: Mapping[str, object], tensors: Mapping[str, object]) -> None:
    for what, names in (
        ("tensors lack", parameters.keys() - tensors.keys()),
        ("model has no parameters", tensors.keys() - parameters.keys()),
    ):
        if names:
            raise InputError(f"the {what} {', '.join(sorted(names)[:6])}; expected the same names on both sides")

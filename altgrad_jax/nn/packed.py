"""Models in packed storage: the weights that layers cast, as codes and scales.

``altgrad_torch/nn/packed.py`` says the same thing in torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TypeVar

import jax
import numpy as np
from flax import nnx

from altgrad_core.errors import InputError, naming
from altgrad_core.formats import Format
from altgrad_core.scaling import Granularity, PerBlock, PerChannel, PerTensor, checked_axes
from altgrad_jax.granularity import amaxes
from altgrad_jax.nn.cast_arrays import arrays_of, casts_of, grid_of, is_of_a_cast, load_casts
from altgrad_jax.nn.cast_state import CastState, begun_anew, scale_of
from altgrad_jax.nn.casts import cast_operand
from altgrad_jax.nn.describe import format_names, formats_of
from altgrad_jax.nn.nnx_layers import Layer
from altgrad_jax.nn.nnx_models import layers_of
from altgrad_jax.nn.nnx_products import CastVariable
from altgrad_jax.packing import PackedTensor, pack_tensor, unpack_tensor

Model = TypeVar("Model", bound=nnx.Module)

_Stored = nnx.Variable[jax.Array]
"""A parameter or a running statistic."""


def pack(model: nnx.Module) -> dict[str, PackedTensor | jax.Array]:
    """A model by path, its parameters that layers cast as the codes and scales that they compute with.

    They are for :func:`altgrad_jax.packed_files.save_packed`, which ``altgrad_torch`` reads as well. Parameters,
    ``nnx.BatchStat`` and the state of the casts are all that is needed to compute the same again.

    Args:
        model: from :func:`altgrad_jax.nn.quantize_model`; not traced.

    Returns:
        By paths such as ``blocks/0/up/kernel``: packed, or, of what no layer casts, as it is. A parameter that several
        layers share stands under its first path, packed if all of them cast it to the same values. Of each cast
        ``blocks/0/up/casts/weights/grid``: its :class:`~altgrad_jax.params.FormatParams`, as their bits in int32, its
        ``step`` and, where it has one, its ``history`` or static ``scale``.

    Raises:
        InputError: if layers that are stacked in one parameter have different formats, and for weights with NaN or
            infinities that their format has no code for.

    >>> from altgrad_jax.nn import Rule, quantize_model
    >>> packed = pack(quantize_model(nnx.Linear(8, 4, rngs=nnx.Rngs(0)), [Rule(".*", "E4M3", activations=None)]))
    >>> str(packed["kernel"].codes.dtype), str(packed["bias"].dtype), sorted(packed)[1:4]
    ('uint8', 'float32', ['casts/weights/grid', 'casts/weights/history', 'casts/weights/step'])
    """
    packed = _packed_weights(model)
    stored = {name: packed.get(id(each), each.get_value()) for name, each in _stored(model).items()}
    return {
        **stored,
        **{name: array for cast, variable in casts_of(model) for name, array in arrays_of(cast, variable)},
    }


def unpack(model: Model, tensors: Mapping[str, PackedTensor | jax.Array]) -> Model:
    """A model with what was packed: it computes what the packed one did, every bit.

    But where weights have scales that are no powers of two and are not rounded to nearest: there what is on the grid
    may be rounded once more.

    Without the state of casts, as after packing a plain model or in another framework, the casts stay as they are, and
    the histories of weights begin anew with the weights loaded. Weights are then cast to the same values under static,
    current or power-of-two scales; delayed scales of activations have to be calibrated.

    Args:
        model: quantized by the same rules and seed; or plain, which takes the values of the weights and no state of
            casts. It stays as it is.
        tensors: from :func:`pack` or a file.

    Returns:
        A copy of the model, its parameters those of ``tensors``, unpacked.

    Raises:
        InputError: for names that are missing or that the model does not have, another shape or dtype, and formats that
            are not those that the model's layers cast to.
    """
    model = nnx.clone(model)
    stored, casts, given = _stored(model), casts_of(model), dict(tensors)
    arrays = {name: array for cast, variable in casts for name, array in arrays_of(cast, variable)}
    if not casts:
        given = {name: tensor for name, tensor in given.items() if not is_of_a_cast(name)}
    elif not any(is_of_a_cast(name) for name in given):
        arrays = {}
    held = {**{name: variable.get_value() for name, variable in stored.items()}, **arrays}
    _check_names(held, given)
    _check_kinds(held, given)
    _check_formats(model, given)
    for name, variable in stored.items():
        tensor = given[name]
        variable.set_value(unpack_tensor(tensor) if isinstance(tensor, PackedTensor) else tensor)
    if arrays:
        load_casts(casts, {name: tensor for name, tensor in given.items() if not isinstance(tensor, PackedTensor)})
    else:
        _begin_weight_histories_anew(model)
    return model


def _stored(model: nnx.Module) -> dict[str, _Stored]:
    kept = (nnx.Param, nnx.BatchStat)
    return {"/".join(map(str, path)): node for path, node in nnx.iter_graph(model) if isinstance(node, kept)}


def _packed_weights(model: nnx.Module) -> dict[int, PackedTensor]:
    """The parameters, by identity, that every module that holds them casts, all to the same values."""
    found: dict[int, list[PackedTensor]] = {}
    for layer, variable in _cast_weights(model):
        with naming(_weights_name(layer)):
            found.setdefault(id(_weights(layer)), []).append(_packed(layer, variable.get_value()))
    modules = (node for _, node in nnx.iter_graph(model) if isinstance(node, nnx.Module))
    holders = Counter(id(each) for module in modules for each in vars(module).values() if isinstance(each, nnx.Param))
    return {
        weight: packed[0]
        for weight, packed in found.items()
        if len(packed) == holders[weight] and all(_same(each, packed[0]) for each in packed)
    }


def _cast_weights(model: nnx.Module) -> Iterator[tuple[Layer, CastVariable]]:
    for layer in layers_of(model).values():
        variables = [product.weights for product in layer.products]
        if layer.sites[0].weights is not None and variables and variables[0] is not None:
            yield layer, variables[0]


def _weights_name(layer: Layer) -> str:
    name = "embedding" if isinstance(layer.module, nnx.Embed) else "kernel"
    return f"{layer.path}/{name}" if layer.path else name


def _weights(layer: Layer) -> _Stored:
    return getattr(layer.module, _weights_name(layer).rpartition("/")[2])


def _format(layer: Layer, state: CastState) -> Format:
    formats = formats_of(state.params)
    if formats[1:] or formats[0] is None:
        names = format_names([state])
        raise InputError(f"{_weights_name(layer)} is cast to {names}; expected one format of at most 16 bits")
    return formats[0]


def _packed(layer: Layer, state: CastState) -> PackedTensor:
    site = layer.sites[0]
    weights = site.weights
    assert weights is not None
    cast, scale = cast_operand, _scales
    for _ in site.stack:
        cast, scale = jax.vmap(cast), jax.vmap(scale)
    computed = weights.astype(_dtype(layer) or weights.dtype)
    # The values are on the grid, however they were rounded; the policy is there to refuse what has no code.
    return pack_tensor(
        cast(computed, state).astype(weights.dtype),
        _format(layer, state),
        scale=scale(computed, state),
        granularity=_over_stack(state.granularity, len(site.stack), weights.ndim),
        overflow="saturate_finite",
    )


def _dtype(layer: Layer) -> jax.typing.DTypeLike | None:
    """The dtype that a layer computes in, to which it takes its weights before they are cast; None for their own."""
    return getattr(layer.module, "dtype", None)


def _scales(weights: jax.Array, state: CastState) -> jax.Array:
    """The scales of one layer's weights, with the axes of these."""
    scale = scale_of(state, amaxes(weights, state.granularity))
    return scale.reshape((1,) * (weights.ndim - scale.ndim) + scale.shape)


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


def _begin_weight_histories_anew(model: nnx.Module) -> None:
    for layer, variable in _cast_weights(model):
        begin = begun_anew
        for _ in layer.sites[0].stack:
            begin = jax.vmap(begin)
        variable.set_value(begin(variable.get_value(), _weights(layer).get_value()))


def _same(one: PackedTensor, other: PackedTensor) -> bool:
    return one.layout == other.layout and all(map(np.array_equal, (one.codes, one.scales), (other.codes, other.scales)))


def _check_names(held: Mapping[str, object], tensors: Mapping[str, object]) -> None:
    for what, names in (
        ("tensors lack", held.keys() - tensors.keys()),
        ("model has no", tensors.keys() - held.keys()),
    ):
        if names:
            raise InputError(f"the {what} {', '.join(sorted(names)[:6])}; expected the same names on both sides")


def _check_kinds(held: Mapping[str, jax.Array], tensors: Mapping[str, PackedTensor | jax.Array]) -> None:
    """Refuse another shape or dtype."""
    for name, array in held.items():
        tensor = tensors[name]
        dtype = tensor.layout.dtype if isinstance(tensor, PackedTensor) else tensor.dtype.name
        found, expected = (tensor.shape, dtype), (array.shape, array.dtype.name)
        if found != expected:
            raise InputError(f"{name} has shape {found[0]} in {found[1]}; expected {expected[0]} in {expected[1]}")


def _check_formats(model: nnx.Module, tensors: Mapping[str, PackedTensor | jax.Array]) -> None:
    """Refuse weights and casts in other formats than the model's."""
    names = {id(variable): name for name, variable in _stored(model).items()}
    for layer, variable in _cast_weights(model):
        name, expected = names[id(_weights(layer))], _format(layer, variable.get_value())
        tensor = tensors[name]
        if isinstance(tensor, PackedTensor) and tensor.layout.format != expected:
            raise InputError(f"{name} is packed as {tensor.layout.format}; expected {expected}, as its layer casts")
    for name, variable in casts_of(model):
        state, grid = variable.get_value(), tensors.get(f"{name}/grid")
        if isinstance(grid, jax.Array) and not np.array_equal(grid, grid_of(state)):
            raise InputError(
                f"{name}/grid is packed in another format, rounding or overflow policy; expected "
                f"{format_names([state])}, as its layer casts"
            )

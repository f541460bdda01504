"""Models in packed storage: the weights that layers cast, as codes and scales.

``altgrad_jax/nn/packed.py`` says the same thing in JAX.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from altgrad_core.errors import InputError, naming
from altgrad_core.packing import check_cast_alike, check_same_names
from altgrad_torch.nn.layers import QuantizedLayer
from altgrad_torch.nn.model import quantized_layers
from altgrad_torch.nn.sites import OPTIONS_KEY, Site, format_of
from altgrad_torch.packing import PackedTensor, unpack_tensors

Model = TypeVar("Model", bound=nn.Module)

_OF_A_CAST = re.compile(r"(?:.*\.)?casts\.\w+\.(grid|scale|history|step|_extra_state)")
"""The names of a cast's state."""


def pack(model: nn.Module) -> dict[str, PackedTensor | Tensor]:
    """A model's ``state_dict()``, its parameters that layers cast as the codes and scales that they compute with.

    They are for :func:`altgrad_torch.packed_files.save_packed`, which ``altgrad_jax`` reads as well. Buffers come
    along, such as running means and the state of the casts: all that is needed to compute the same again.

    Args:
        model: from :func:`altgrad_torch.nn.quantize_model`.

    Returns:
        By the names of ``state_dict()``: packed, or, of what no layer casts, as it is, in memory that is the model's. A
        parameter that several layers share is packed if all of them cast it to the same values, else it is as it is.

    Raises:
        InputError: for weights with NaN or infinities that their format has no code for; the message names them.

    >>> from altgrad_core.rules import Rule
    >>> from altgrad_torch.nn.model import quantize_model
    >>> packed = pack(quantize_model(nn.Linear(8, 4), [Rule(".*", "E4M3", activations=None)]))
    >>> packed["weight"].codes.dtype, packed["bias"].dtype, list(packed)[2:4]
    (torch.uint8, torch.float32, ['casts.weights.grid', 'casts.weights.history'])
    """
    packed = _packed_weights(model)
    return {name: packed.get(x, x.detach()) for name, x in model.state_dict(keep_vars=True).items()}


def unpack(model: Model, tensors: Mapping[str, PackedTensor | Tensor]) -> Model:
    """Load what was packed into a model, in place: it then computes what the packed one did, every bit.

    But where weights have scales that are no powers of two and are not rounded to nearest: there what is on the grid
    may be rounded once more.

    Without the state of casts, as after packing a plain model or in another framework, the casts stay as they are, and
    the histories of weights begin anew with the weights loaded. Weights are then cast to the same values by the same
    rules under static, current or power-of-two scales; delayed scales of activations have to be calibrated.

    Args:
        model: quantised by the same rules; or plain, which takes the values of the weights and no state of casts.
        tensors: from :func:`pack` or a file.

    Returns:
        The model itself, its parameters the same objects.

    Raises:
        InputError: for names that are missing or that the model does not have, another shape or dtype, and formats and
            ways to scale, round or overflow that are not those of the model's layers. The model is then as it was.

    >>> from altgrad_core.rules import Rule
    >>> from altgrad_torch.nn.model import quantize_model
    >>> import torch
    >>> one, other = (quantize_model(nn.Linear(8, 4), [Rule(".*", "E4M3")]) for _ in range(2))
    >>> torch.equal(one(torch.eye(8)), unpack(other, pack(one))(torch.eye(8)))
    True
    """
    state = model.state_dict(keep_vars=True)
    given = dict(tensors)
    layers = dict(quantized_layers(model))
    if not layers:
        given = {name: tensor for name, tensor in given.items() if not _OF_A_CAST.fullmatch(name)}
    elif not any(_OF_A_CAST.fullmatch(name) for name in given):
        state = {name: tensor for name, tensor in state.items() if not _OF_A_CAST.fullmatch(name)}
    _check_options(model, given)  # before the names, which it explains: no history, since scales are current
    check_same_names(state, given)
    _check_kinds(state, given)
    _check_formats(layers.values(), state, given)
    model.load_state_dict(unpack_tensors(given))
    return model


def _packed_weights(model: nn.Module) -> dict[Tensor, PackedTensor]:
    """The parameters that every module that holds them casts, all to the same values."""
    found: dict[Tensor, list[PackedTensor]] = {}
    for path, layer in quantized_layers(model):
        for name, weight, site in _weights(layer):
            with naming(f"{path}.{name}" if path else name):
                found.setdefault(weight, []).append(site.pack(weight))
    held = (each for module in model.modules() for each in module._parameters.values())
    holders = Counter[Tensor | None](held)
    return {
        weight: packed[0]
        for weight, packed in found.items()
        if len(packed) == holders[weight] and all(_same(each, packed[0]) for each in packed)
    }


def _weights(layer: QuantizedLayer) -> Iterator[tuple[str, Tensor, Site]]:
    """The parameters that a layer casts, with their names and where."""
    site = layer.site("weights")
    for name in layer.weight_names if site is not None else ():
        weight = getattr(layer, name)
        if weight is not None and site is not None:
            yield name, weight, site


def _same(one: PackedTensor | Tensor, other: PackedTensor | Tensor) -> bool:
    if isinstance(one, PackedTensor) and isinstance(other, PackedTensor):
        return one.layout == other.layout and one.codes.equal(other.codes) and one.scales.equal(other.scales)
    return isinstance(one, Tensor) and isinstance(other, Tensor) and one.equal(other)


def _check_kinds(state: Mapping[str, Tensor], tensors: Mapping[str, PackedTensor | Tensor]) -> None:
    """Refuse another shape or dtype, and different values for one parameter under several names."""
    first: dict[Tensor, str] = {}
    for name, held in state.items():
        tensor = tensors[name]
        dtype = tensor.layout.dtype if isinstance(tensor, PackedTensor) else _name(tensor.dtype)
        found, expected = (tuple(tensor.shape), dtype), (tuple(held.shape), _name(held.dtype))
        if found != expected:
            raise InputError(f"{name} has shape {found[0]} in {found[1]}; expected {expected[0]} in {expected[1]}")
        other = first.setdefault(held, name)
        if other != name and tensors[other] is not tensor and not _same(tensors[other], tensor):
            raise InputError(f"{other} and {name} differ, and are one in the model; expected them to be the same")


def _check_options(model: nn.Module, tensors: Mapping[str, PackedTensor | Tensor]) -> None:
    """Refuse casts that scale, round or overflow in another way than the model's."""
    for path, module in model.named_modules(remove_duplicate=False):
        name = f"{path}.{OPTIONS_KEY}"
        options = tensors.get(name) if isinstance(module, Site) else None
        if isinstance(module, Site) and isinstance(options, Tensor):
            with naming(name):
                module.set_extra_state(options)


def _check_formats(
    layers: Iterable[QuantizedLayer], state: Mapping[str, Tensor], tensors: Mapping[str, PackedTensor | Tensor]
) -> None:
    """Refuse weights and casts in other formats, or weights under other scales, than the model's."""
    sites: dict[Tensor, list[Site]] = {}
    for layer in layers:
        for _, weight, site in _weights(layer):
            sites.setdefault(weight, []).append(site)
    for name, held in state.items():
        tensor = tensors[name]
        if isinstance(tensor, PackedTensor):
            for site in sites.get(held, []):
                share, is_even = site.placement.granularity, site.scaling.power_of_two
                with naming(name):
                    check_cast_alike(tensor.layout, held.ndim, site.format, share, power_of_two=is_even)
        elif _OF_A_CAST.fullmatch(name) and name.endswith(".grid") and not held.equal(tensor.to(held.device)):
            found, wanted = format_of(tensor), format_of(held)
            raise InputError(f"{name} is packed as {found}; expected {wanted}, as its layer casts")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

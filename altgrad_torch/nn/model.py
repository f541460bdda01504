"""Whole models: which of their layers are cast, by rules, in place and back."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import TypeVar

from torch import nn

from altgrad_core.errors import InputError, naming
from altgrad_core.hashing import check_word
from altgrad_core.rules import (
    OPERANDS,
    Formats,
    Operand,
    Rule,
    UnusedRuleWarning,
    check_alike,
    check_honoured,
    choose_formats,
    describe_unused,
    match_rules,
)
from altgrad_core.summary import LayerRow, Summary
from altgrad_torch.nn.attention import QuantizedMultiheadAttention
from altgrad_torch.nn.layers import (
    QuantizedBilinear,
    QuantizedConv1d,
    QuantizedConv2d,
    QuantizedConv3d,
    QuantizedConvTranspose1d,
    QuantizedConvTranspose2d,
    QuantizedConvTranspose3d,
    QuantizedEmbedding,
    QuantizedLayer,
    QuantizedLinear,
    QuantizedOutProjection,
    make_sites,
)
from altgrad_torch.nn.sites import Site

_KINDS: tuple[type[QuantizedLayer], ...] = (
    QuantizedLinear,
    QuantizedOutProjection,
    QuantizedBilinear,
    QuantizedEmbedding,
    QuantizedConv1d,
    QuantizedConv2d,
    QuantizedConv3d,
    QuantizedConvTranspose1d,
    QuantizedConvTranspose2d,
    QuantizedConvTranspose3d,
    QuantizedMultiheadAttention,
)
_QUANTIZED = {kind.plain: kind for kind in _KINDS}

_CANNOT = (nn.RNNBase, nn.RNNCellBase, nn.EmbeddingBag)
"""What multiplies within one function of torch's."""

_WHEN_PLAIN = "_used_nested_tensors_when_plain"
"""The attribute of an encoder that keeps whether it made nested tensors, which cannot be cast."""

Model = TypeVar("Model", bound=nn.Module)


def quantize_model(model: Model, rules: Sequence[Rule], *, seed: int | None = None) -> Model:
    """Let the layers of a model compute in formats, by rules; the model is changed in place.

    In place, with the same parameter objects under the same names, because optimizers, wrappers and averages hold on to
    those. The cast state is in buffers beside them, under ``<layer>.casts``. Each layer becomes an instance of a
    subclass of its class, so that hooks, copies, pickles and ``functional_call`` work as before. An average of weights
    takes ``use_buffers=False``: a state that was averaged is refused where it computes, but for compiled code and, on a
    device, training mode, which do not wait to look.

    Weights start under the scales that they need. Activations and gradients start under scale 1, until
    :func:`~altgrad_torch.nn.calibrate` or a step within :func:`~altgrad_torch.nn.recording` has seen some.

    The checkpoint of the plain model loads, with ``strict=True`` too: casts stay as they are, but those of the weights
    begin anew with the weights loaded. A quantised model's checkpoint has casts as well, and a plain model refuses it
    unless ``strict=False``. It names formats and ways to scale, round and overflow; ``load_state_dict`` refuses other
    ways than the model's, and takes formats and the numbers of static scales as it finds them.

    A model on the meta device is quantised there. ``to_empty`` then lets its casts begin as the rules say, and
    ``load_state_dict`` brings the weights, which their scales follow; ``assign=True`` does without ``to_empty``. Of
    weights that are initialised in their place the scales are 1 until a recording, as by
    :func:`~altgrad_torch.nn.calibrate`.

    Args:
        model: with layers in float32, bfloat16 or float16: Linear, Bilinear, Embedding, Conv1d to 3d, ConvTranspose1d
            to 3d and MultiheadAttention. A layer that stands in several places is one layer, at the first of them.
        rules: in their order; see :class:`altgrad_core.rules.Rule`. Paths are those of ``named_modules``.
        seed: of the random bits of stochastic rounding, 0 by default. They further depend on the site and on the steps
            recorded: they are the same for all micro-batches of a step, and where nothing records for all steps.

    Returns:
        The model itself.

    Raises:
        InputError: for an option that a layer cannot honour, or that none does (activations of an Embedding have
            nothing to cast), a layer that cannot be cast (a subclass with products of its own, an LSTM, one that
            fully_shard was given before), a seed that is no uint32, or any if nothing rounds stochastically, and for
            what is no module or is quantised already. The model is then as it was.

    Warns:
        UnusedRuleWarning: for a rule that decides about no layer.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> weight = model[0].weight
    >>> model = quantize_model(model, [Rule("2", None), Rule(".*", weights="E4M3", gradients="E5M2")])
    >>> model[0].weight is weight, [row.formats for row in summary(model).rows]
    (True, [('E4M3', 'E4M3', 'E5M2'), (None, None, None)])
    """
    _check_module(model)
    if seed is not None:
        check_word("seed", seed)
    if any(isinstance(module, QuantizedLayer) for module in model.modules()):
        raise InputError("the model is quantised already; expected a plain one, as dequantize_model gives back")
    layers, others = _parts_of(model)
    matches = match_rules(list(layers), rules)
    _check_shared(model, rules)
    try:
        for path, layer in layers.items():
            rule = matches.rules[path]
            if rule is not None and rule.spec is not None:
                _quantize_layer(layer, path, rule, int(seed or 0))
        check_honoured(matches, {path: _castable(layer) for path, layer in quantized_layers(model)})
        for layer in layers.values():
            # Its forward pass would not call the output projection, which may be cast by another rule.
            if type(layer) is nn.MultiheadAttention and isinstance(layer.out_proj, QuantizedLayer):
                _convert(layer, None)
        if seed is not None and not _rounds_stochastically(model):
            raise InputError(f"seed={seed} would have no effect: no rule says rounding='stochastic'")
    except InputError:
        dequantize_model(model)
        raise
    for encoder in _encoders_with_casts(model):
        setattr(encoder, _WHEN_PLAIN, encoder.use_nested_tensor)
        encoder.use_nested_tensor = False
    for line in describe_unused(matches, others):
        warnings.warn(line, UnusedRuleWarning, stacklevel=2)
    return model


def dequantize_model(model: Model) -> Model:
    """Give the plain model back, in place: the same parameters, no casts and no state of them.

    Args:
        model: one that :func:`quantize_model` changed; a plain one is left as it is.

    Returns:
        The model itself.

    Raises:
        InputError: if the model is being recorded, if a layer's class was changed since (parametrizations and FSDP2 do
            so), and for what is no module.

    >>> model = quantize_model(nn.Linear(4, 8), [Rule(".*", "E4M3")])
    >>> type(dequantize_model(model)), list(model.state_dict())
    (<class 'torch.nn.modules.linear.Linear'>, ['weight', 'bias'])
    """
    _check_module(model)
    for path, layer in model.named_modules():
        if isinstance(layer, QuantizedLayer) and type(layer) not in _KINDS:
            is_sharded = any(each.__name__ == "FSDPModule" for each in type(layer).__mro__)
            way = (
                "the state of the sharded model in one that was never quantised, since fully_shard is not undone"
                if is_sharded
                else "that undone first, as by torch.nn.utils.parametrize.remove_parametrizations"
            )
            raise InputError(
                f"{path or 'the model'} became a {type(layer).__name__} after it was quantised; expected {way}"
            )
    if any(isinstance(module, Site) and module.tally is not None for module in model.modules()):
        raise InputError("the model is being recorded; expected dequantize_model after the recording")
    for encoder in _encoders_with_casts(model):
        if hasattr(encoder, _WHEN_PLAIN):
            encoder.use_nested_tensor = bool(getattr(encoder, _WHEN_PLAIN))
            delattr(encoder, _WHEN_PLAIN)
    for layer in list(model.modules()):
        if isinstance(layer, QuantizedLayer):
            del layer.casts, layer.rule
            object.__setattr__(layer, "__class__", layer.plain)
    return model


def set_formats(model: nn.Module, formats: Formats) -> None:
    """Write other formats into the casts of some layers, in place; nothing is compiled again.

    Args:
        model: quantised.
        formats: for each pattern, which the whole path of a layer has to match as in a rule, the format of all that
            the layer casts, or an :class:`~altgrad_core.rules.Each` of formats, None for what keeps its own. Of
            several patterns the first that matches counts.

    Raises:
        UnknownFormatError: for an unknown name.
        InputError: for a pattern that decides about no quantised layer, an operand that is not cast, a format that
            compiled code cannot go over to, such as bf16 after E4M3, float32, which casts nothing, and for what is no
            module.

    >>> from altgrad_core.rules import Each
    >>> model = quantize_model(nn.Sequential(nn.Linear(4, 8)), [Rule(".*", "E4M3")])
    >>> set_formats(model, {"0": Each(None, None, "E5M2")})
    >>> summary(model).rows[0].formats
    ('E4M3', 'E4M3', 'E5M2')
    """
    _check_module(model)
    sites = {
        path: [site for site in layer.casts.values() if isinstance(site, Site)]
        for path, layer in quantized_layers(model)
        if layer.rule is not None
    }
    chosen = choose_formats({path: {site.placement.operand for site in held} for path, held in sites.items()}, formats)
    writes = [
        (path, site, chosen[path, site.placement.operand])
        for path, held in sites.items()
        for site in held
        if (path, site.placement.operand) in chosen
    ]
    for path, site, wanted in writes:
        with naming(f"the {site.placement.operand} of {path!r}"):
            site.check_format(wanted)
    for _, site, wanted in writes:
        site.set_format(wanted)


def summary(model: nn.Module) -> Summary:
    """Every layer that can be cast, with its formats as they are now; of a plain model, too.

    >>> print(summary(nn.Sequential(nn.Linear(4, 8))))
    layer         kind    activ.  weights  grad.  scales      rule
    ──────────────────────────────────────────────────────────────
    0             Linear  -       -        -                  -
    """
    _check_module(model)
    return Summary(tuple(_row(path, layer) for path, layer in _parts_of(model)[0].items()))


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLayer]]:
    """The layers that are cast, or call one that is, with their paths."""
    for path, module in model.named_modules():
        if isinstance(module, QuantizedLayer):
            yield path, module


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise InputError(f"the model is a {type(model).__name__}; expected an nn.Module")


def _rounds_stochastically(model: nn.Module) -> bool:
    return any(isinstance(module, Site) and module.rounding == "stochastic" for module in model.modules())


def _parts_of(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The layers that rules decide about, and what the other parts are."""
    layers: dict[str, nn.Module] = {}
    others: dict[str, str] = {}
    for path, module in model.named_modules():
        if isinstance(module, (QuantizedLayer, *_QUANTIZED, *_CANNOT)):
            layers[path] = module
        elif path and not isinstance(module, Site):
            others[path] = type(module).__name__
    return layers, others


def _check_shared(model: nn.Module, rules: Sequence[Rule]) -> None:
    """Refuse a layer in several places about which different rules decide."""
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (*_QUANTIZED, *_CANNOT)):
            paths.setdefault(module, []).append(path)
    for places in paths.values():
        check_alike(places, rules)


def _quantize_layer(layer: nn.Module, path: str, rule: Rule, seed: int) -> None:
    where = f"the layer {path!r}, a {type(layer).__name__}"
    if _is_sharded(layer):
        raise InputError(
            f"{where}, was given to fully_shard, which made another class of it; expected quantize_model of the plain "
            "model first, and fully_shard of what that returns"
        )
    if type(layer) not in _QUANTIZED:
        raise InputError(
            f"{where}, cannot be cast: its products are out of reach; expected Rule({path!r}, None) before the rule "
            f"{rule.layers!r}, or a plain {', '.join(sorted(kind.__name__ for kind in _QUANTIZED))}"
        )
    wrong = {str(p.dtype) for p in layer.parameters(recurse=False)} - _DTYPES
    if wrong:
        raise InputError(f"{where}, holds {wrong.pop()}; expected {', '.join(sorted(_DTYPES))}")
    try:
        quantized = _convert(layer, rule)
        for name, site in make_sites(quantized, path, seed):
            quantized.casts[name] = site
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    quantized.refill_weight_history()


def _is_sharded(layer: nn.Module) -> bool:
    """Whether FSDP2 changed its class, which it can only have done where it was imported."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(layer, fsdp.FSDPModule)


def _castable(layer: QuantizedLayer) -> tuple[str, set[Operand]]:
    """What a layer is, and what it can cast."""
    return layer.plain.__name__, {geometry.operand for geometry in layer.geometries().values()}


_DTYPES = {"torch.float32", "torch.bfloat16", "torch.float16"}


def _convert(layer: nn.Module, rule: Rule | None) -> QuantizedLayer:
    layer.__class__ = _QUANTIZED[type(layer)]
    assert isinstance(layer, QuantizedLayer)
    layer.rule, layer.casts = rule, nn.ModuleDict()
    return layer


def _encoders_with_casts(model: nn.Module) -> list[nn.TransformerEncoder]:
    """Encoders that would hand nested tensors to layers with casts."""
    encoders = [module for module in model.modules() if isinstance(module, nn.TransformerEncoder)]
    return [each for each in encoders if any(isinstance(module, QuantizedLayer) for module in each.modules())]


def _row(path: str, layer: nn.Module) -> LayerRow:
    parameters = sum(each.numel() for each in layer.parameters(recurse=False))
    if not isinstance(layer, QuantizedLayer):
        return LayerRow(path, type(layer).__name__, parameters, (None, None, None), "", "", None)
    sites = [site for site in layer.casts.values() if isinstance(site, Site)]
    formats = {site.placement.operand: str(site.format) for site in sites}
    activations, weights, gradients = (formats.get(operand) for operand in OPERANDS)
    rule, kind = layer.rule, layer.plain.__name__
    scaling = " ".join(dict.fromkeys(site.describe_scaling() for site in sites))
    products = "" if rule is None else rule.accumulate
    by = None if rule is None else rule.layers
    return LayerRow(path, kind, parameters, (activations, weights, gradients), scaling, products, by)

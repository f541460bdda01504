"""Which layers of a model compute in which formats: rules by path, in both frameworks; the first full match counts."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from typing import Final, Generic, Literal, TypeVar

from altgrad_core.errors import InputError, check_choice, naming
from altgrad_core.formats import OVERFLOWS, ROUNDINGS, Format, Overflow, Rounding, parse
from altgrad_core.patterns import compiled_pattern
from altgrad_core.scaling import Granularity, PerBlock, PerChannel, PerTensor, parse_granularity

Operand = Literal["activations", "weights", "gradients"]
"""What a layer casts: what comes in, what it holds, and what flows back into its output."""

OPERANDS: tuple[Operand, ...] = ("activations", "weights", "gradients")

Accumulate = Literal["native", "exact"]
"""How products are summed: as the framework does it, or exactly and rounded once, see :mod:`altgrad_core.exact`."""

ACCUMULATES: tuple[Accumulate, ...] = ("native", "exact")

DEFAULT_WINDOW = 16
"""Steps of amax history by which a layer scales unless asked otherwise."""

Option = TypeVar("Option")


class UnusedRuleWarning(UserWarning):
    """A rule decides about no layer of the model."""


class _Same(Enum):
    SAME = "same"

    def __repr__(self) -> str:
        return self.name


SAME: Final = _Same.SAME
"""In the place of a format: that of the operand before."""


@dataclass(frozen=True)
class Each(Generic[Option]):
    """An option with a value for each operand, where a plain value would stand for all three.

    >>> Rule(".*", "E4M3", rounding=Each("nearest_even", "nearest_even", "stochastic")).spec.gradients.rounding
    'stochastic'
    """

    activations: Option
    weights: Option
    gradients: Option


@dataclass(frozen=True)
class CastSpec:
    """How one operand of a layer is cast.

    Attributes:
        format: the format.
        scaling: where its scales come from, an object of the framework's ``scaling`` module; None for delayed scales,
            or, of blocks, the current ones.
        granularity: which elements share a scale; ``channel`` is still a name here, since which axis that is depends
            on operand and layer.
        rounding: how it rounds.
        overflow: what overflow becomes.
    """

    format: Format
    scaling: object | None
    granularity: Granularity | Literal["channel"]
    rounding: Rounding
    overflow: Overflow


@dataclass(frozen=True)
class LayerSpec:
    """How a layer computes: a cast for each operand, None for those that are left as they are.

    Attributes:
        activations: the cast of what comes in.
        weights: the cast of what the layer holds.
        gradients: the cast of what flows back into the layer's output, before it meets the other two.
        accumulate: how products are summed.
    """

    activations: CastSpec | None
    weights: CastSpec | None
    gradients: CastSpec | None
    accumulate: Accumulate


@dataclass(frozen=True)
class Rule:
    """How the layers compute whose whole path matches a pattern.

    ``Rule("lm_head", None)`` leaves a layer as it is. What no rule matches is left as it is, too.

    Args:
        layers: a regular expression for the path of a layer, such as ``blocks/.*/attn``. Paths of torch, which have
            dots, are also tried with slashes instead, so that one list of rules serves both frameworks.
        weights: format of the weights; None leaves them as they are.
        activations: format of what comes in; that of the weights unless given.
        gradients: format of what flows back; that of the activations unless given.
        scaling: where scales come from: ``Static``, ``Current`` or ``Delayed`` of the framework; by default delayed by
            an amax history of 16 steps, for blocks current.
        granularity: which elements share a scale: ``tensor``, ``channel`` (outputs of weights, features of the
            others), ``block32`` and the like (along the axis that is summed over).
        rounding: see :data:`altgrad_core.formats.Rounding`.
        overflow: see :data:`altgrad_core.formats.Overflow`; by default finite values saturate and infinities stay.
        accumulate: see :data:`Accumulate`.

    The four options before the last take an :class:`Each`, too, with a value for each operand.

    Raises:
        InputError: for a pattern that is none, an unknown format, granularity or mode, for float32, which casts
            nothing, for a format without a sign, and for an option for an operand that is not cast.

    >>> rule = Rule("attn/.*", weights="E4M3", gradients="E5M2")
    >>> [str(getattr(rule.spec, operand).format) for operand in OPERANDS]
    ['E4M3', 'E4M3', 'E5M2']
    >>> Rule("lm_head", None).spec is None
    True
    """

    layers: str
    weights: str | Format | None
    activations: str | Format | Literal[_Same.SAME] | None = SAME
    gradients: str | Format | Literal[_Same.SAME] | None = SAME
    scaling: object | Each[object] | None = None
    granularity: str | Granularity | Each[str | Granularity] = "tensor"
    rounding: Rounding | Each[Rounding] = "nearest_even"
    overflow: Overflow | Each[Overflow] = "saturate_finite"
    accumulate: Accumulate = "native"

    def __post_init__(self) -> None:
        """Check what can be checked without a model."""
        compiled_pattern(self.layers)
        check_choice("way to accumulate", self.accumulate, ACCUMULATES)
        if self.spec is None:
            changed = [each.name for each in fields(self)[4:] if getattr(self, each.name) != each.default]
            if changed:
                raise InputError(
                    f"the rule {self.layers!r} casts nothing, so {changed[0]}={getattr(self, changed[0])!r} would have "
                    "no effect; expected a format, or none of the options"
                )
        else:
            self._check_each(self.spec)

    @property
    def spec(self) -> LayerSpec | None:
        """How the layers of this rule compute; None if as they did."""
        weights = None if self.weights is None else parse(self.weights)
        activations = weights if self.activations is SAME else _parsed(self.activations)
        gradients = activations if self.gradients is SAME else _parsed(self.gradients)
        if weights is None and activations is None and gradients is None:
            return None
        return LayerSpec(
            activations=self._cast("activations", activations),
            weights=self._cast("weights", weights),
            gradients=self._cast("gradients", gradients),
            accumulate=self.accumulate,
        )

    def _check_each(self, spec: LayerSpec) -> None:
        """Refuse an option for an operand that is not cast."""
        for name, operand in itertools.product(_DEFAULTS, OPERANDS):
            given, default = getattr(self, name), _DEFAULTS[name]
            value = option(given, operand)
            if isinstance(given, Each) and getattr(spec, operand) is None and not _is_nothing(value, default):
                raise InputError(
                    f"the rule {self.layers!r} does not cast {operand}, so {name}={value!r} for them would have no "
                    f"effect; expected {default!r} in its place, or a format of {operand}"
                )

    def _cast(self, operand: Operand, format: Format | None) -> CastSpec | None:
        if format is None:
            return None
        if format.cast_path == "identity":
            raise InputError(f"the rule {self.layers!r}: {format} casts nothing; expected None in its place")
        with naming(f"the rule {self.layers!r}"):
            _check_signed(format)
        rounding, overflow = option(self.rounding, operand), option(self.overflow, operand)
        check_choice("rounding", rounding, ROUNDINGS)
        check_choice("overflow policy", overflow, OVERFLOWS)
        granularity = option(self.granularity, operand)
        resolved = "channel" if granularity == "channel" else parse_granularity(granularity)
        return CastSpec(format, option(self.scaling, operand), resolved, rounding, overflow)


_DEFAULTS: dict[str, object] = {
    each.name: each.default for each in fields(Rule) if each.name in ("scaling", "granularity", "rounding", "overflow")
}
"""The options that an :class:`Each` may stand for."""


@dataclass(frozen=True)
class Matches:
    """What a list of rules means for the layers of a model.

    Attributes:
        rules: the rule of each layer's path; None where none matched.
        unused: rules that decide about no layer.
    """

    rules: Mapping[str, Rule | None]
    unused: tuple[Rule, ...]

    def spec(self, path: str) -> LayerSpec | None:
        """How the layer at a path computes; None if as it did."""
        rule = self.rules[path]
        return None if rule is None else rule.spec


def match_rules(paths: Sequence[str], rules: Sequence[Rule]) -> Matches:
    """The rule of each layer: the first whose pattern matches its whole path.

    Args:
        paths: of the layers that can be cast, such as ``blocks/0/attn`` or ``blocks.0.attn``.
        rules: in their order.

    Raises:
        InputError: for something that is no list, or no rule.

    >>> found = match_rules(["attn/q", "lm_head"], [Rule("lm_head", None), Rule(".*", "E4M3"), Rule("mlp", "E5M2")])
    >>> found.spec("lm_head"), str(found.spec("attn/q").weights.format), [rule.layers for rule in found.unused]
    (None, 'E4M3', ['mlp'])
    """
    if not isinstance(rules, Sequence):  # an iterator would be at its end after the first layer
        raise InputError(f"the rules are {rules!r}; expected a list, such as [Rule('.*', weights='E4M3')]")
    for rule in rules:
        if not isinstance(rule, Rule):
            raise InputError(f"{rule!r} is no rule; expected a Rule, such as Rule('.*', weights='E4M3')")
    chosen = {path: next((rule for rule in rules if _decides(rule, path)), None) for path in paths}
    used = {id(rule) for rule in chosen.values()}
    return Matches(chosen, tuple(rule for rule in rules if id(rule) not in used))


def check_alike(places: Sequence[str], rules: Sequence[Rule]) -> None:
    """Refuse a layer in several places about which different rules decide.

    Args:
        places: the paths of one layer.
        rules: of the model.

    Raises:
        InputError: naming two of the places.

    >>> check_alike(["enc/emb", "dec/emb"], [Rule("enc/.*", None), Rule(".*", "E4M3")])
    Traceback (most recent call last):
    altgrad_core.errors.InputError: enc/emb and dec/emb are one layer, but by the rules they would compute differently
    """
    found = match_rules(places, rules)
    other = next((path for path in places if found.spec(path) != found.spec(places[0])), None)
    if other is not None:
        raise InputError(f"{places[0]} and {other} are one layer, but by the rules they would compute differently")


def check_honoured(matches: Matches, layers: Mapping[str, tuple[str, Collection[Operand]]]) -> None:
    """Refuse a rule that gives a format to an operand that none of its layers has to cast.

    Of a rule for many layers, such as ``.*``, each does what it can.

    Args:
        matches: from :func:`match_rules`.
        layers: of the layers that rules decide about, by path, what they are and what they can cast.

    Raises:
        InputError: naming the rule, the layers, and what they can cast.

    >>> found = match_rules(["emb"], [Rule("emb", "E4M3", activations="E5M2")])
    >>> check_honoured(found, {"emb": ("Embedding", ("weights", "gradients"))})
    Traceback (most recent call last):
    altgrad_core.errors.InputError: the rule 'emb' says activations='E5M2', which would have no effect: it decides about
    emb (Embedding), with weights and gradients to cast; expected None, or no format, in its place
    """
    decided: dict[int, tuple[Rule, list[str]]] = {}
    for path, rule in matches.rules.items():
        if rule is not None and rule.spec is not None and path in layers:
            decided.setdefault(id(rule), (rule, []))[1].append(path)
    for rule, paths in decided.values():
        able = [each for each in OPERANDS if any(each in layers[path][1] for path in paths)]
        operand = _asked_in_vain(rule, able)
        if operand is not None:
            told = [f"{path or 'the model'} ({layers[path][0]})" for path in paths]
            raise InputError(
                f"the rule {rule.layers!r} says {operand}={str(getattr(rule.spec, operand).format)!r}, which would "
                f"have no effect: it decides about {_listed(told)}, with {' and '.join(able)} to cast; expected "
                "None, or no format, in its place"
            )


def _asked_in_vain(rule: Rule, able: Collection[Operand]) -> Operand | None:
    """An operand to which a rule gives a format, and which its layers do not have; None if there is none such.

    A format that is another operand's as well does not count, unless nothing is cast; nor does that of weights, which
    has to be given.
    """
    casts = [each for each in OPERANDS if getattr(rule.spec, each) is not None]
    missing = [each for each in casts if each not in able]
    given = [each for each in missing if each != "weights" and getattr(rule, each) is not SAME]
    return next(iter(given or (missing if missing == casts else ())), None)


def describe_unused(matches: Matches, others: Mapping[str, str]) -> list[str]:
    """For each rule that decides about no layer, why: what a report or a warning says of it.

    Args:
        matches: from :func:`match_rules`.
        others: paths of parts of the model that cannot be cast, with what they are.

    >>> found = match_rules(["attn"], [Rule("norm", "E4M3"), Rule("atn", "E4M3"), Rule(".*", None), Rule("attn", None)])
    >>> for line in describe_unused(found, {"norm": "LayerNorm"}):
    ...     print(line)
    the rule 'norm' matches norm, a LayerNorm, which has nothing to cast
    the rule 'atn' matches no layer; the layers are attn
    the rule 'attn' matches only layers that earlier rules decide about: attn
    """
    return [_why_unused(rule, matches, others) for rule in matches.unused]


Formats = Mapping[str, "str | Format | Each[str | Format | None]"]
"""Formats by pattern of the layer's path: the same for all that a layer casts, or for each operand its own, None for
what keeps its format."""


def choose_formats(
    layers: Mapping[str, Collection[Operand]], formats: Formats
) -> dict[tuple[str, Operand], str | Format]:
    """The formats that a mapping writes, each layer's under the first pattern that matches all of its path.

    Args:
        layers: by path, what each of them casts.
        formats: what to write.

    Returns:
        By path and operand, for those that are to have another format: what was given, still to be parsed.

    Raises:
        UnknownFormatError: for an unknown name.
        InputError: for what is no mapping, a pattern that matches no layer, or only such as an earlier one matches, for
            a format of an operand that its layer does not cast, and one of no operand: float32, or without a sign.

    >>> casts = {"blocks/0/up": ("weights", "gradients"), "logits": ("weights",)}
    >>> choose_formats(casts, {"blocks/.*": Each(None, None, "E5M2"), "logits": "E3M4"})
    {('blocks/0/up', 'gradients'): 'E5M2', ('logits', 'weights'): 'E3M4'}
    """
    if not isinstance(formats, Mapping):
        raise InputError(f"the formats are {formats!r}; expected a mapping from layers, such as {{'.*': 'E5M2'}}")
    patterns = {pattern: compiled_pattern(pattern) for pattern in formats}
    firsts = {path: next((name for name, each in patterns.items() if _matches(each, path)), None) for path in layers}
    for pattern in patterns:
        if pattern not in firsts.values():
            raise InputError(
                f"{pattern!r} matches no layer that is cast and that no earlier pattern matches; the layers are "
                f"{_listed(list(layers)) or 'none'}"
            )
    chosen: dict[tuple[str, Operand], str | Format] = {}
    for path, pattern in firsts.items():
        if pattern is None:
            continue
        wanted = formats[pattern]
        if not isinstance(wanted, Each):
            chosen.update({(path, operand): wanted for operand in layers[path]})
            continue
        for operand in OPERANDS:
            given = option(wanted, operand)
            if given is not None and operand not in layers[path]:
                raise InputError(f"the layer {path!r} does not cast its {operand}; expected None for them")
            if given is not None:
                chosen[path, operand] = given
    for (path, _), given in chosen.items():
        if isinstance(given, (str, Format)):
            with naming(f"the layer {path!r}"):
                check_written(parse(given))
    return chosen


def check_written(format: Format) -> None:
    """Refuse to write a format into a layer that casts, if it is no format of an operand.

    Raises:
        InputError: for float32, which casts nothing, and for formats without a sign.

    >>> check_written(parse("float32"))
    Traceback (most recent call last):
    altgrad_core.errors.InputError: float32 casts nothing, so it is no format of a layer; expected dequantize_model, and
    quantize_model by rules with None in its place
    """
    if format.cast_path == "identity":
        raise InputError(
            f"{format} casts nothing, so it is no format of a layer; expected dequantize_model, and quantize_model by "
            "rules with None in its place"
        )
    _check_signed(format)


def _check_signed(format: Format) -> None:
    if not format.is_signed:
        raise InputError(f"{format} has no sign and no zero; expected a signed format for the operands of a layer")


def _why_unused(rule: Rule, matches: Matches, others: Mapping[str, str]) -> str:
    taken = [path for path in matches.rules if _decides(rule, path)]
    if taken:
        return f"the rule {rule.layers!r} matches only layers that earlier rules decide about: {_listed(taken)}"
    other = next((path for path in others if _decides(rule, path)), None)
    if other is not None:
        return f"the rule {rule.layers!r} matches {other}, a {others[other]}, which has nothing to cast"
    return f"the rule {rule.layers!r} matches no layer; the layers are {_listed(list(matches.rules)) or 'none'}"


def _decides(rule: Rule, path: str) -> bool:
    return _matches(compiled_pattern(rule.layers), path)


def _matches(pattern: re.Pattern[str], path: str) -> bool:
    return any(pattern.fullmatch(each) for each in (path, path.replace(".", "/")))


def _is_nothing(value: object, default: object) -> bool:
    """Whether an option for one operand asks for nothing; a scaling may hold an array, which has no truth value."""
    return value is None or (isinstance(value, (str, PerTensor)) and value in (default, PerTensor()))


def _listed(paths: Sequence[str]) -> str:
    return ", ".join(paths[:6]) + (f" and {len(paths) - 6} more" if len(paths) > 6 else "")


def _parsed(format: str | Format | None) -> Format | None:
    return None if format is None else parse(format)


def option(value: Option | Each[Option], operand: Operand) -> Option:
    """The value of an option for an operand."""
    return getattr(value, operand) if isinstance(value, Each) else value


def check_serves(scaling: object, granularity: object, is_current: bool, static: tuple[int, ...] | None) -> None:
    """Refuse scales that do not suit what shares one.

    Those of blocks come from the tensor itself: a history would have one for each. A static scale that is one number
    leaves nothing to channels.

    Args:
        scaling: for the message.
        granularity: a :data:`~altgrad_core.scaling.Granularity`, or ``"channel"``.
        is_current: whether the scales come from the tensor itself.
        static: the shape of a static scale; None of any other.

    Raises:
        InputError: naming the granularity.
    """
    if isinstance(granularity, PerBlock) and not is_current:
        raise InputError(
            f"scaling={scaling!r} cannot serve blocks of {granularity.size}: there would be one to keep for each; "
            "expected Current(), or none"
        )
    by_channel = granularity == "channel" or isinstance(granularity, PerChannel)
    if by_channel and static == ():
        raise InputError(
            f"granularity={granularity!r} would have no effect: {scaling!r} is one scale for all channels; expected "
            "'tensor', or Current() or Delayed()"
        )
    if isinstance(granularity, PerTensor) and static:
        raise InputError(f"the static scale has shape {static}; expected a number for granularity='tensor'")

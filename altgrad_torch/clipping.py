"""Gradient clipping by norm, with torch's rule, gated by the measured overflow rate.

It runs on torch's own ``clip_grads_with_norm_``, with a norm that neither overflows nor vanishes.
``altgrad_jax/clipping.py`` says the same thing as optax elements; norms, coefficients and clipped gradients have the
same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from altgrad_core.clip_rules import ClipRule, check_quantile, check_rule
from altgrad_core.errors import InputError
from altgrad_core.format_trees import FormatTree, formats_of_groups
from altgrad_core.formats import Format, parse
from altgrad_core.nonfinite import Nonfinite, check_nonfinite
from altgrad_core.norms import check_norm_type
from altgrad_core.scaling import check_window
from altgrad_core.stability import check_base_clip, check_max_norm, check_rate
from altgrad_torch.clip_groups import ClipGroup, scale_to_, sum_parts_, zero_
from altgrad_torch.nonfinite import Culprit, find_culprit, raise_for, zero_nonfinite_
from altgrad_torch.norms import float_tensors, norm_of

Parameters = torch.nn.Module | Iterable[Tensor] | Tensor


def clip_grad_norm_(
    parameters: Iterable[Tensor] | Tensor,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    *,
    format: str | Format | None = None,
    overflow_rate: float | Tensor | None = None,
    overflow_threshold: float = 0.01,
    nonfinite: Nonfinite = "propagate",
    foreach: bool | None = None,
) -> Tensor:
    """Scale gradients in place by ``min(1, max_norm / (norm + 1e-6))``.

    That is the rule of ``torch.nn.utils.clip_grad_norm_``, but the norm is that of :func:`altgrad_torch.global_norm`,
    so that the coefficient is right where a float32 norm would be off or overflow. Results below 2^-126 are zero.

    With a format it is the partition-relative rule in one call: ``max_norm`` is then the threshold that E5M2 would
    have, 1 by default, and nothing is done below ``overflow_threshold``.

    Args:
        parameters: parameters of which those with a gradient are clipped together.
        max_norm: largest norm to let through; 0 makes all gradients zero, inf leaves them as they are.
        norm_type: order of the norm: 2, 1, inf or any other positive number.
        format: a name or a :class:`~altgrad_core.formats.Format` whose range sets the threshold.
        overflow_rate: with a format: the fraction of gradient elements that overflow, 0 to 1.
        overflow_threshold: with a format: the rate at and above which gradients are clipped.
        nonfinite: what becomes of gradients that are not finite; see :data:`altgrad_core.nonfinite.Nonfinite`.
        foreach: whether to multiply many gradients in one call, as in torch; None where torch would. Same bits. It
            is nothing to float32 gradients on the CPU, which are multiplied piece by piece on torch's threads.

    Returns:
        The norm before clipping, float32 scalar on the first gradient's device; -1 where a gate was shut and none was
        taken.

    Raises:
        ValueError: if no parameter has a gradient, or an argument is out of range or without effect.
        TypeError: if a gradient is not real floating point.
        FloatingPointError: with ``nonfinite="raise"``.

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> weight.grad = torch.tensor([3.0, 4.0])
    >>> float(clip_grad_norm_([weight], 1.0)), [round(g, 4) for g in weight.grad.tolist()]
    (5.0, [0.6, 0.8])
    """
    listed = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    order = check_norm_type(norm_type)
    check_nonfinite(nonfinite)
    if format is None:
        if overflow_rate is not None:
            raise InputError(
                "overflow_rate would have no effect: it goes with a format, whose range sets the threshold"
            )
        if max_norm is None:
            raise InputError("max_norm is missing; expected the largest norm to let through, or a format")
        return _clip_together_(listed, check_max_norm(max_norm), order, nonfinite, foreach)
    if overflow_rate is None:
        raise InputError("overflow_rate is missing: with a format the gate needs the rate of gradients that overflow")
    if order != 2:
        raise InputError(f"norm_type={norm_type} would have no effect: with a format the norm is the Euclidean one")
    clipper = PartitionRelativeClipper(
        format, 1.0 if max_norm is None else max_norm, overflow_threshold, nonfinite=nonfinite, foreach=foreach
    )
    clipper.clip_if_needed(listed, overflow_rate)
    device = next((parameter.grad.device for parameter in listed if parameter.grad is not None), None)
    return torch.tensor(clipper.total_norm, dtype=torch.float32, device=device)


@torch.no_grad()
def _clip_together_(
    listed: list[Tensor], max_norm: float, norm_type: float, nonfinite: Nonfinite, foreach: bool | None
) -> Tensor:
    with_gradient = _with_gradient(listed)
    sum_parts_(with_gradient)
    gradients = float_tensors(parameter.grad for parameter in with_gradient if parameter.grad is not None)
    norm = norm_of(gradients, norm_type)
    # A norm of finite numbers is finite, unless float64 overflows.
    looked_for = nonfinite != "propagate" and not math.isfinite(norm)
    culprit = find_culprit(gradients) if looked_for else Culprit.none()
    if culprit.count and nonfinite == "raise":
        raise_for(gradients, [f"of parameter {index}" for index in range(len(gradients))])
    if culprit.count and nonfinite == "zero":
        zero_nonfinite_(gradients)
        norm = norm_of(gradients, norm_type)
    if culprit.count and nonfinite == "skip":
        zero_(gradients)
    else:
        scale_to_(with_gradient, max_norm, norm, foreach)
    return torch.tensor(norm, dtype=torch.float32, device=gradients[0].device)


class PartitionRelativeClipper:
    r"""Clips to a threshold that follows the format's range, and only when the overflow rate reaches a limit.

    The threshold is ``base_clip * max / 57344`` (AltGrad rule; see :func:`altgrad_core.stability.clip_threshold`), or
    that of another ``rule``, and the rule of scaling is that of :func:`clip_grad_norm_`.

    Args:
        format: a name or a :class:`~altgrad_core.formats.Format`; or formats for groups of parameters, each with its
            own rate, norm and gate. A flat mapping is of rules: regular expressions on names such as ``attn\..*``, of
            which the first full match counts. A nested one is a tree: ``{"attn": {"q": "E3M4"}, "mlp": "E5M2"}``, where
            each format makes a group of all parameters at or below its place, named by it: ``attn.q``. It has to have
            one for every parameter.
        base_clip: the threshold that E5M2 would have; positive.
        overflow_threshold: the rate, 0 to 1, at and above which gradients are clipped.
        rule: what the threshold follows; see :data:`altgrad_core.clip_rules.ClipRule`. ``scaled_max`` reads the
            gradients at every call, ``quantile`` takes their norm.
        window: for the rule ``scaled_max``, calls of amax history: 16 by default.
        quantile: for the rule ``quantile``, which one: 0.5, the median, by default.
        norm_window: for the rule ``quantile``, of how many of the last norms: 128 by default.
        nonfinite: what becomes of gradients that are not finite; see :data:`altgrad_core.nonfinite.Nonfinite`. All but
            ``propagate`` read the gradients at every call. ``skip`` makes all of them zero, whatever their group.
        foreach: see :func:`clip_grad_norm_`.

    Attributes:
        groups: by pattern or place, what each group clips by and saw at the last call: its ``clip_threshold``,
            ``total_norm``, ``clipped`` and ``culprit``. One format makes one group, ``.*``.

    Raises:
        ValueError: for values out of range or without effect.
        UnknownFormatError: for an unknown format.

    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> model.weight.grad = torch.tensor([[3.0, 4.0]])
    >>> clipper = PartitionRelativeClipper("E3M4")
    >>> clipper.clip_if_needed(model, overflow_rate=0.02), clipper.total_norm
    (True, 5.0)
    """

    def __init__(
        self,
        format: FormatTree[str | Format],
        base_clip: float = 1.0,
        overflow_threshold: float = 0.01,
        *,
        rule: ClipRule = "max",
        window: int | None = None,
        quantile: float | None = None,
        norm_window: int | None = None,
        nonfinite: Nonfinite = "propagate",
        foreach: bool | None = None,
    ) -> None:
        check_rule(rule)
        check_nonfinite(nonfinite)
        norms = check_quantile(quantile, norm_window, rule)
        if window is not None and rule != "scaled_max":
            raise InputError(f"window={window!r} would have no effect: the rule is {rule!r}, not 'scaled_max'")
        history = 16 if window is None else window
        check_window(history)
        groups = format if isinstance(format, (Mapping, list, tuple)) else {".*": format}
        formats, self._positions = formats_of_groups(groups, ".")
        base, threshold = check_base_clip(base_clip), check_rate("overflow_threshold", overflow_threshold)
        self.overflow_threshold = threshold
        self.groups = {
            name: ClipGroup(parse(each), base, threshold, rule, int(history), *norms, nonfinite, foreach)
            for name, each in formats.items()
        }
        self._nonfinite = nonfinite
        self._culprit = Culprit.none()

    @property
    def format(self) -> Format:
        """The format, if there is one for all."""
        return self._only.format

    @property
    def clip_threshold(self) -> float:
        """The norm that gradients are clipped to, if there is one for all; inf where nothing would be."""
        return self._only.clip_threshold

    @property
    def total_norm(self) -> float:
        """The norm before clipping at the last call, if there is one for all; -1 where none was taken."""
        return self._only.total_norm

    @property
    def culprit(self) -> Culprit:
        """The first parameter whose gradient was not finite at the last call, by its name, and how many elements were.

        The first in the module's order, whatever the groups. Without a module, the name is the parameter's number.
        """
        return self._culprit

    @property
    def _only(self) -> ClipGroup:
        if len(self.groups) != 1:
            raise InputError(f"there are {len(self.groups)} groups, each with its own numbers: see groups")
        return next(iter(self.groups.values()))

    @torch.no_grad()
    def clip_if_needed(self, model: Parameters, overflow_rate: float | Tensor | Mapping[str, float | Tensor]) -> bool:
        """Clip the model's gradients in place if the rate is at or above the threshold. Call it before the optimizer.

        With ``torch.amp.GradScaler``, call ``scaler.unscale_(optimizer)`` first. Where parameters are DTensors, call
        it on all processes with the same rate: :func:`altgrad_torch.cast_counts` counts over all shards.

        Args:
            model: a module, or its parameters; with groups, a module.
            overflow_rate: fraction of gradient elements that overflow, 0 to 1, compared in float32; with groups also a
                mapping of their names to one each.

        Returns:
            Whether the gate was open, so that the rule was applied: of one group at least.

        Raises:
            ValueError: if the rate is outside [0, 1] or NaN, or if the gate is open and nothing has a gradient.
            FloatingPointError: with ``nonfinite="raise"``, before any gradient is clipped.
        """
        named = _named(model, grouped=list(self.groups) != [".*"])
        sum_parts_(named.values())
        self._culprit = Culprit.none()
        for group in self.groups.values():
            group.forget()
        rates = self._rates(overflow_rate)
        positions = self._positions(list(named)) if named else dict.fromkeys(self.groups, ())
        parts = {name: {key: named[key] for key in (list(named)[k] for k in at)} for name, at in positions.items()}
        with_gradient = {
            name: {key: parameter for key, parameter in part.items() if parameter.grad is not None}
            for name, part in parts.items()
        }
        # All are looked at before any is clipped: an error leaves everything as it was.
        seen = {name: group.look(with_gradient[name], rates[name], len(named)) for name, group in self.groups.items()}
        self._culprit = self._first_of(list(named))
        if self._nonfinite == "raise" and self.culprit.count:
            bad = {key: parameter.grad for key, parameter in named.items() if parameter.grad is not None}
            raise_for(list(bad.values()), list(bad))
        opened = [group.clip_(with_gradient[name], seen[name]) for name, group in self.groups.items()]
        if self._nonfinite == "skip" and self.culprit.count:
            zero_(p.grad for part in with_gradient.values() for p in part.values() if p.grad is not None)
        return any(opened)

    def set_format(self, format: str | Format) -> None:
        """Clip by another format from the next call on, in every group; what the rules remember stays.

        Raises:
            UnknownFormatError: for an unknown name.
        """
        for group in self.groups.values():
            group.set_format(parse(format))

    def state_dict(self) -> dict[str, Any]:
        """What the rules remember from call to call, as plain numbers: for a checkpoint."""
        return {name: group.remembered() for name, group in self.groups.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` returned.

        Raises:
            InputError: if it is of other groups, or of another rule.
        """
        if set(state) != set(self.groups):
            raise InputError(f"the state is of the groups {', '.join(state)}; expected {', '.join(self.groups)}")
        for name, group in self.groups.items():
            group.remember(state[name])

    def _first_of(self, names: Sequence[str]) -> Culprit:
        """Of what the groups found, the first by the order of names, with the count of all."""
        found = [group.culprit for group in self.groups.values() if group.culprit.name is not None]
        first = min((names.index(each.name) for each in found), default=None)
        return Culprit.none() if first is None else Culprit(names[first], sum(each.count for each in found))

    def _rates(self, overflow_rate: float | Tensor | Mapping[str, float | Tensor]) -> dict[str, float]:
        if not isinstance(overflow_rate, Mapping):
            return dict.fromkeys(self.groups, _checked_rate(overflow_rate))
        if set(overflow_rate) != set(self.groups):
            raise InputError(
                f"overflow_rate is given for {', '.join(overflow_rate)}; expected {', '.join(self.groups)}"
            )
        return {name: _checked_rate(rate) for name, rate in overflow_rate.items()}


def _checked_rate(overflow_rate: float | Tensor | np.ndarray) -> float:
    if isinstance(overflow_rate, (Tensor, np.ndarray)):
        if overflow_rate.ndim:
            raise InputError(f"overflow_rate has the shape {tuple(overflow_rate.shape)}; expected one number")
        overflow_rate = float(overflow_rate)
    return check_rate("overflow_rate", overflow_rate)


def _named(model: Parameters, grouped: bool) -> dict[str, Tensor]:
    if isinstance(model, torch.nn.Module):
        return dict(model.named_parameters())
    if grouped:
        raise InputError("groups are found by the names of parameters: give the module, not its parameters")
    listed = [model] if isinstance(model, Tensor) else list(model)
    return {str(index): parameter for index, parameter in enumerate(listed)}


def _with_gradient(listed: list[Tensor]) -> list[Tensor]:
    found = [parameter for parameter in listed if parameter.grad is not None]
    if not found:
        raise ValueError(f"none of the {len(listed)} parameters has a gradient; call loss.backward() before clipping")
    return found

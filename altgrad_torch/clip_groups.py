"""One group of gradients that are clipped together: its rate, its threshold, its gate. See ``clipping.py``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_

from altgrad_core.clip_rules import NORMS_NEEDED, ClipRule, format_threshold, quantile_index
from altgrad_core.errors import InputError
from altgrad_core.formats import Format
from altgrad_core.nonfinite import Nonfinite
from altgrad_core.norms import NOT_MEASURED, ROUNDS_TO_NORMAL
from altgrad_core.stability import CLIP_EPSILON
from altgrad_torch.cpu import can_multiply, is_plain, multiply_
from altgrad_torch.nonfinite import Culprit, find_culprit, zero_nonfinite_
from altgrad_torch.norms import euclidean_norm, float_tensors
from altgrad_torch.scaling import amax, delayed_scale, push_amax
from altgrad_torch.shards import is_sharded, local, over_shards, summed

_MIN_NORMAL = 2.0**-126
_TOGETHER = 1 << 25
"""Elements of gradients that a GPU is given at once, or a tensor more: that bounds the memory of temporaries."""


class Look(NamedTuple):
    """What a group sees of gradients before any of them is clipped.

    Attributes:
        is_open: whether the gate is.
        norm: of the gradients as they are; None where nobody needs it.
    """

    is_open: bool
    norm: float | None


class ClipGroup:
    """What :class:`~altgrad_torch.clipping.PartitionRelativeClipper` was told, of parameters clipped together.

    Attributes:
        format: whose range sets the threshold.
        clip_threshold: the norm that gradients are clipped to; inf where nothing would be.
        total_norm: the norm before clipping at the last call; -1 where none was taken.
        clipped: whether the gate was open at the last call.
        culprit: the first gradient that was not finite at the last call.
    """

    def __init__(
        self,
        format: Format,
        base_clip: float,
        overflow_threshold: float,
        rule: ClipRule,
        window: int,
        quantile: float,
        norm_window: int,
        nonfinite: Nonfinite,
        foreach: bool | None,
    ) -> None:
        self._base_clip, self._base = base_clip, float(np.float32(base_clip))
        self._overflow_threshold = np.float32(overflow_threshold)
        self._rule, self._window, self._quantile, self._norm_window = rule, window, quantile, norm_window
        self._nonfinite, self._foreach = nonfinite, foreach
        self._norms: list[float] = []
        self._amaxes: dict[str, list[float]] = {}
        self.set_format(format)
        self.forget()

    def set_format(self, format: Format) -> None:
        """Clip by another format from the next call on."""
        self.format = format
        is_fixed = self._rule in ("max", "binades")
        self.clip_threshold = format_threshold(format, self._base_clip, self._rule) if is_fixed else math.inf

    def forget(self) -> None:
        """Let go of what was seen at the last call, so that nothing of it can be taken for this one's."""
        self.total_norm, self.clipped, self.culprit = NOT_MEASURED, False, Culprit.none()

    def look(self, parameters: Mapping[str, Tensor], overflow_rate: float, of: int) -> Look:
        """See whether the gate opens and what is not finite. Changes no gradient, and remembers none.

        Args:
            parameters: by name, each with a gradient.
            overflow_rate: 0 to 1.
            of: how many parameters there are, with or without a gradient, for the error.

        Raises:
            ValueError: if the gate is open and there is no parameter.
            TypeError: if a gradient is not real floating point.
        """
        is_open = bool(np.float32(overflow_rate) >= self._overflow_threshold)
        gradients = _gradients(parameters)
        if not gradients:
            if is_open:
                raise ValueError(f"none of the {of} parameters has a gradient; call loss.backward() before clipping")
            return Look(is_open, None)
        float_tensors(gradients)
        if not is_open and self._rule != "quantile" and self._nonfinite == "propagate":
            return Look(is_open, None)
        # Only where the norm is not finite, what is not is looked for.
        norm = euclidean_norm(gradients)
        if not math.isfinite(norm):
            self.culprit = find_culprit(gradients, list(parameters))
        return Look(is_open, norm)

    def clip_(self, parameters: Mapping[str, Tensor], seen: Look) -> bool:
        """Clip the gradients of parameters if the gate opens.

        Args:
            parameters: by name, each with a gradient.
            seen: what :meth:`look` saw of them.
        """
        if not parameters:
            return False
        self.clipped, norm = seen
        threshold = self._threshold(parameters)
        if self.culprit.count and self._nonfinite == "zero":
            gradients = _gradients(parameters)
            zero_nonfinite_(gradients)
            norm = euclidean_norm(gradients)
        if norm is None or not (self.clipped or self._rule == "quantile"):
            return self.clipped
        self.total_norm = norm
        if self._rule == "quantile" and math.isfinite(norm) and norm > 0:
            self._norms = [*self._norms, norm][-self._norm_window :]
        if self.clipped:
            scale_to_(list(parameters.values()), threshold, norm, self._foreach)
        return self.clipped

    def remembered(self) -> dict[str, Any]:
        """The rule, and norms and amaxes of past gradients: as plain numbers."""
        amaxes = {name: list(each) for name, each in self._amaxes.items()}
        return {"rule": self._rule, "norms": list(self._norms), "amaxes": amaxes}

    def remember(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`remembered` returned.

        Raises:
            InputError: if that is of another rule, or of something else.
        """
        expected = self.remembered()
        if set(state) != set(expected):
            raise InputError(f"a group's state has {', '.join(state) or 'nothing'}; expected {', '.join(expected)}")
        if state["rule"] != self._rule:
            raise InputError(f"the state is of rule={state['rule']!r}; expected that of a clipper with {self._rule!r}")
        self._norms = list(state["norms"])
        self._amaxes = {name: list(each) for name, each in state["amaxes"].items()}

    def _threshold(self, parameters: Mapping[str, Tensor]) -> float:
        """By the gradients before this call, which are then remembered."""
        if self._rule == "scaled_max":
            self.clip_threshold = self._rounded(self.format.max_representable_value * self._largest_scale())
            self._push_amaxes(parameters)
        elif self._rule == "quantile":
            self.clip_threshold = self._rounded(self._quantile_of_norms())
        return self.clip_threshold

    def _rounded(self, measure: float) -> float:
        with np.errstate(over="ignore"):
            return float(np.float32(self._base * measure))

    def _largest_scale(self) -> float:
        # Subnormals are none: XLA's CPU backend reads them as zero.
        seen = [each for each in self._amaxes.values() if max(each) >= _MIN_NORMAL]
        if not seen:
            return math.inf
        return float(delayed_scale(_history(seen, self._window), self.format.max_representable_value).max())

    def _push_amaxes(self, parameters: Mapping[str, Tensor]) -> None:
        gradients = _gradients(parameters)
        seen = over_shards([amax(local(gradient)) for gradient in gradients], gradients, "max").cpu()
        history = _history([self._amaxes.get(name, []) for name in parameters], self._window)
        for name, pushed in zip(parameters, push_amax(history, seen).T.tolist(), strict=True):
            self._amaxes[name] = pushed

    def _quantile_of_norms(self) -> float:
        if len(self._norms) < NORMS_NEEDED:
            return math.inf
        return sorted(self._norms)[quantile_index(len(self._norms), self._quantile)]


def _gradients(parameters: Mapping[str, Tensor]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters.values() if parameter.grad is not None]


def _history(amaxes: Sequence[Sequence[float]], window: int) -> Tensor:
    """Histories of tensors side by side: float32 of shape ``(window, tensors)``, oldest first, 0 where empty."""
    filled = [[*[0.0] * window, *each][-window:] for each in amaxes]
    return torch.tensor(filled, dtype=torch.float32, device="cpu").T


@torch.no_grad()
def scale_to_(parameters: Sequence[Tensor], max_norm: float, norm: float, foreach: bool | None = None) -> None:
    """Scale gradients in place by ``min(1, max_norm / (norm + 1e-6))``; below 2^-126 they become zero.

    Args:
        parameters: each with a gradient.
        max_norm: at least 0.
        norm: the norm of all gradients, a float that float32 holds.
        foreach: whether to multiply many tensors in one call; None where torch does.
    """
    if math.isinf(max_norm):
        return
    coefficient = min(max_norm / (norm + CLIP_EPSILON), 1.0)
    single = np.float32(0 if coefficient < ROUNDS_TO_NORMAL else coefficient)
    others = _multiply_on_cpu_(parameters, single)
    _zero_what_will_vanish([parameter.grad for parameter in others if parameter.grad is not None], float(single))
    # torch does not multiply sharded and plain gradients in one call. Handed a float64 norm, it forms the coefficient
    # in float64 and rounds it once.
    alike = _multiply_half_precision_on_gpu_(others, float(single))
    for kind in (False, True):
        group = [_with_dimension(p) for p in alike if is_sharded(p.grad) == kind]
        if group:
            clip_grads_with_norm_(group, max_norm, torch.tensor(norm, dtype=torch.float64, device="cpu"), foreach)


def sum_parts_(parameters: Iterable[Tensor]) -> None:
    """Add up, over the processes, gradients of which each holds a summand (``Partial``), as the norm of a sum needs."""
    for parameter in parameters:
        if parameter.grad is not None and (whole := summed(parameter.grad)) is not parameter.grad:
            parameter.grad = whole


def zero_(gradients: Iterable[Tensor]) -> None:
    """Make gradients zero in place, whatever they hold."""
    for gradient in gradients:
        gradient.zero_()


def _multiply_on_cpu_(parameters: Sequence[Tensor], factor: np.float32) -> list[Tensor]:
    """Multiply the gradients for which that is quick, and return the parameters of all others."""
    quick, others = [], []
    for parameter in parameters:
        if parameter.grad is not None and can_multiply(local(parameter.grad)):
            quick.append(parameter.grad)
        else:
            others.append(parameter)
    multiply_([local(gradient) for gradient in quick], factor)
    # Of the whole, autograd does not see what is written to a shard of it.
    torch.autograd.graph.increment_version([gradient for gradient in quick if is_sharded(gradient)])
    return others


def _multiply_half_precision_on_gpu_(parameters: Sequence[Tensor], factor: float) -> list[Tensor]:
    """Multiply half-precision gradients on a GPU in float32, and return the parameters of all others.

    torch would round the coefficient to their precision before it multiplies, which it does not on a CPU.
    """
    others = []
    for parameter in parameters:
        gradient = None if parameter.grad is None else local(parameter.grad)
        if gradient is None or gradient.dtype.itemsize != 2 or gradient.device.type == "cpu":
            others.append(parameter)
        else:
            gradient.copy_(gradient.to(torch.float32) * factor)
    return others


def _with_dimension(parameter: Tensor) -> Tensor:
    """A stand-in for a parameter without dimensions whose gradient is a view of the parameter's, of one element.

    torch would multiply a gradient without dimensions in the coefficient's float64, unlike all others.
    """
    if parameter.grad is None or parameter.grad.ndim > 0:
        return parameter
    stand_in = torch.empty_like(parameter.grad.reshape(1))
    stand_in.grad = parameter.grad.detach().view(1)
    return stand_in


def _zero_what_will_vanish(gradients: Sequence[Tensor], coefficient: float) -> None:
    """Make zero, with the sign kept, what the coefficient brings below 2^-126, as XLA's CPU backend does.

    Before the multiplication, because torch rounds what is just below 2^-126 up to it.
    """
    if math.isnan(coefficient):
        return
    survives_from = _float32_at_least(ROUNDS_TO_NORMAL / coefficient) if coefficient else math.inf
    on_gpu = [each for each in gradients if is_plain(each, "cuda") and each.dtype == torch.float32]
    _zero_below_on_gpu(on_gpu, survives_from)
    done = set(map(id, on_gpu))
    for gradient in gradients:
        if gradient.dtype != torch.float64 and id(gradient) not in done:
            gradient.mul_(gradient.to(torch.float32).abs() >= survives_from)


def _zero_below_on_gpu(gradients: Sequence[Tensor], limit: float) -> None:
    """Make zero, with the sign kept, what is smaller than a positive float32 limit: of many tensors in few launches."""
    just_below = float(np.nextafter(np.float32(limit), np.float32(0)))
    for batch in _batches(gradients):
        # The sign of the difference: one from the limit up, and zero or less below it.
        kept = torch._foreach_abs(batch)
        torch._foreach_sub_(kept, just_below)
        torch._foreach_sign_(kept)
        torch._foreach_clamp_min_(kept, 0.0)
        torch._foreach_mul_(batch, kept)


def _batches(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    batch, size = [], 0
    for tensor in tensors:
        batch.append(tensor)
        size += tensor.numel()
        if size >= _TOGETHER:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _float32_at_least(value: float) -> float:
    """The smallest float32 that is not below a float64 value."""
    nearest = np.float32(value)
    return float(nearest if float(nearest) >= value else np.nextafter(nearest, np.float32(np.inf)))

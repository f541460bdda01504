"""Gradient clipping by global norm, with torch's rule, gated by the measured overflow rate.

It runs on torch's own ``clip_grads_with_norm_``, with a norm that neither overflows nor vanishes.
``altgrad_jax/clipping.py`` says the same thing as optax elements; norms, coefficients and clipped gradients have the
same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_

from altgrad_core.formats import Format, parse
from altgrad_core.stability import CLIP_EPSILON, check_base_clip, check_rate, clip_threshold

NOT_MEASURED = -1.0
"""What ``total_norm`` reads where no norm was taken, since no norm is negative."""

_FLOAT32_MAX = float(np.finfo(np.float32).max)
_CHUNK = 1 << 15
_ROUNDS_TO_NORMAL = 2.0**-126 * (1 - 2.0**-25)
"""The smallest real number that 24 significant bits round to 2^-126, and not to something below."""


def global_norm(tensors: Iterable[Tensor] | Tensor) -> Tensor:
    """The Euclidean norm of all tensors together, as float32.

    Squares and sum are float64, so nothing overflows or vanishes on the way, float32 subnormals included. A norm beyond
    float32's maximum, of tensors that are all finite, is float32's maximum: not inf, which would clip them all to zero.

    Args:
        tensors: floating-point tensors of any shapes; of DTensors it is the norm over all shards.

    Returns:
        float32 scalar; inf or NaN if a tensor holds one.

    Raises:
        ValueError: if there are no tensors.
        TypeError: if a tensor is not real floating point.

    >>> norm = global_norm([torch.tensor([3.0, 4.0]) * 2.0**-120, torch.zeros(2)])
    >>> float(norm) == 5 * 2.0**-120
    True
    """
    checked = _float_tensors(tensors)
    sharded = [t for t in checked if _is_sharded(t)]
    squares = [_sum_of_squares(t.detach()) for t in checked if not _is_sharded(t)]
    if sharded:
        norms = torch.stack([torch.linalg.vector_norm(t.detach(), dtype=torch.float64) for t in sharded])
        squares.append(torch.linalg.vector_norm(norms).full_tensor().square())
    norm = torch.stack([square.to(squares[0].device) for square in squares]).sum().sqrt()
    return torch.where(norm.isinf(), norm, norm.clamp_max(_FLOAT32_MAX)).to(torch.float32)


def clip_grad_norm_(parameters: Iterable[Tensor] | Tensor, max_norm: float) -> Tensor:
    """Scale gradients in place by ``min(1, max_norm / (norm + 1e-6))``.

    That is the rule of ``torch.nn.utils.clip_grad_norm_``, but the norm is :func:`global_norm`, so that the
    coefficient is right where a float32 norm would be off or overflow. Results below 2^-126 are zero.

    Args:
        parameters: parameters of which those with a gradient are clipped together.
        max_norm: largest norm to let through; 0 makes all gradients zero, inf leaves them as they are.

    Returns:
        The norm before clipping, float32 scalar.

    Raises:
        ValueError: if no parameter has a gradient, or ``max_norm`` is negative or NaN.
        TypeError: if a gradient is not real floating point.

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> weight.grad = torch.tensor([3.0, 4.0])
    >>> float(clip_grad_norm_([weight], 1.0)), [round(g, 4) for g in weight.grad.tolist()]
    (5.0, [0.6, 0.8])
    """
    if not max_norm >= 0:
        raise ValueError(f"max_norm is {max_norm!r}; expected a number of at least 0")
    with_gradient = _with_gradient(parameters)
    gradients = [parameter.grad for parameter in with_gradient if parameter.grad is not None]
    norm = global_norm(gradients)
    _zero_what_will_vanish(gradients, float(max_norm), float(norm))
    # torch does not multiply sharded and plain gradients in one call. Handed a float64 norm, it forms the coefficient
    # in float64 and rounds it once.
    for kind in (False, True):
        group = [_with_dimension(p) for p in with_gradient if _is_sharded(p.grad) == kind]
        clip_grads_with_norm_(group, max_norm, norm.to(torch.float64))
    return norm


class PartitionRelativeClipper:
    """Clips to a threshold that follows the format's range, and only when the overflow rate reaches a limit.

    The threshold is ``base_clip * max / 57344`` (AltGrad rule; see :func:`altgrad_core.stability.clip_threshold`) and
    the rule is that of :func:`clip_grad_norm_`.

    Args:
        format: a name or a :class:`~altgrad_core.formats.Format`.
        base_clip: the threshold that E5M2 would have; positive.
        overflow_threshold: the rate, 0 to 1, at and above which gradients are clipped.

    Attributes:
        clip_threshold: the norm that gradients are clipped to.
        overflow_threshold: as given.
        total_norm: the norm before clipping at the last call; -1 where the gate was shut and none was taken, so that
            it is never that of an earlier call.

    Raises:
        ValueError: for values out of range.
        UnknownFormatError: for an unknown format.

    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> model.weight.grad = torch.tensor([[3.0, 4.0]])
    >>> clipper = PartitionRelativeClipper("E3M4")
    >>> clipper.clip_if_needed(model, overflow_rate=0.02), clipper.total_norm
    (True, 5.0)
    """

    def __init__(self, format: str | Format, base_clip: float = 1.0, overflow_threshold: float = 0.01) -> None:
        self.format = parse(format)
        self.clip_threshold = clip_threshold(self.format, check_base_clip(base_clip))
        self.overflow_threshold = check_rate("overflow_threshold", overflow_threshold)
        self.total_norm = NOT_MEASURED

    def clip_if_needed(self, model: torch.nn.Module | Iterable[Tensor] | Tensor, overflow_rate: float | Tensor) -> bool:
        """Clip the model's gradients in place if the rate is at or above the threshold. Call it before the optimizer.

        Args:
            model: a module, or its parameters.
            overflow_rate: fraction of gradient elements that overflow, 0 to 1, compared in float32.

        Returns:
            Whether the gate was open, so that the rule was applied.

        Raises:
            ValueError: if the rate is outside [0, 1] or NaN, or if the gate is open and nothing has a gradient.
        """
        self.total_norm = NOT_MEASURED
        rate = check_rate("overflow_rate", float(overflow_rate))
        if np.float32(rate) < np.float32(self.overflow_threshold):
            return False
        parameters = model.parameters() if isinstance(model, torch.nn.Module) else model
        self.total_norm = float(clip_grad_norm_(parameters, self.clip_threshold))
        return True


def _float_tensors(tensors: Iterable[Tensor] | Tensor) -> list[Tensor]:
    listed = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    if not listed:
        raise ValueError("there are no tensors to take a norm of; expected at least one")
    for tensor in listed:
        if not tensor.is_floating_point():
            raise TypeError(f"gradients are real floating-point tensors; got one of {tensor.dtype}")
    return listed


def _with_gradient(parameters: Iterable[Tensor] | Tensor) -> list[Tensor]:
    listed = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    found = [parameter for parameter in listed if parameter.grad is not None]
    if not found:
        raise ValueError(f"none of the {len(listed)} parameters has a gradient; call loss.backward() before clipping")
    return found


def _with_dimension(parameter: Tensor) -> Tensor:
    """A stand-in for a parameter without dimensions whose gradient is a view of the parameter's, of one element.

    torch would multiply a gradient without dimensions in the coefficient's float64, unlike all others.
    """
    if parameter.grad is None or parameter.grad.ndim > 0:
        return parameter
    stand_in = torch.empty_like(parameter.grad.reshape(1))
    stand_in.grad = parameter.grad.detach().view(1)
    return stand_in


def _is_sharded(tensor: Tensor | None) -> bool:
    """Whether this is a DTensor; asked this way because importing the class takes most of a second."""
    return hasattr(tensor, "full_tensor")


def _sum_of_squares(tensor: Tensor) -> Tensor:
    if tensor.device.type != "cpu":
        return torch.linalg.vector_norm(tensor, dtype=torch.float64).square()
    # In chunks that fit the cache: a float64 copy of the whole would cost ten times as much.
    chunks = [chunk.to(torch.float64) for chunk in tensor.reshape(-1).split(_CHUNK)]
    return torch.stack([torch.dot(chunk, chunk) for chunk in chunks]).sum()


@torch.no_grad()
def _zero_what_will_vanish(gradients: list[Tensor], max_norm: float, norm: float) -> None:
    """Make zero, with the sign kept, what the coefficient brings below 2^-126, as XLA's CPU backend does.

    Before the multiplication, because torch rounds what is just below 2^-126 up to it.
    """
    coefficient = max_norm / (norm + CLIP_EPSILON)
    if math.isnan(coefficient):
        return
    coefficient = min(coefficient, 1.0)
    single = float(np.float32(coefficient)) if coefficient >= _ROUNDS_TO_NORMAL else 0.0
    survives_from = _float32_at_least(_ROUNDS_TO_NORMAL / single) if single else math.inf
    for gradient in gradients:
        if gradient.dtype != torch.float64:
            gradient.mul_(gradient.to(torch.float32).abs() >= survives_from)


def _float32_at_least(value: float) -> float:
    """The smallest float32 that is not below a float64 value."""
    nearest = np.float32(value)
    return float(nearest if float(nearest) >= value else np.nextafter(nearest, np.float32(np.inf)))

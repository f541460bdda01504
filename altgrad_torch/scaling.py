"""Power-of-two scales from the amax of earlier steps ("delayed" scaling) or of the tensor itself.

A scale is the worth of one: ``Q(x / scale) * scale``. A power of two makes scaling exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

_FRACTION = 0x007FFFFF
_MIN_NORMAL = 0x00800000
_INF = 0x7F800000
_BITS_OF_2_100 = (100 + 127) << 23
_MOST = 100
"""Scales stay within 2^-100 to 2^100, so that neither they nor their reciprocals are subnormal."""


def power_of_two_scale(amax: Tensor | float, max_value: Tensor | float) -> Tensor:
    """The smallest power of two that brings ``amax`` to at most ``max_value``, within 2^-100 to 2^100.

    Args:
        amax: float32, largest magnitude of a tensor; where it is zero, subnormal or not finite the scale is 1.
        max_value: float32, largest value of the format; broadcast against ``amax``. Where it is float32's own
            maximum or close to it (2^100 and above) nothing needs scaling, and the scale is 1.

    Returns:
        float32 of the broadcast shape.

    >>> power_of_two_scale(torch.tensor([448.0, 449.0, 0.0]), 448.0).tolist()
    [1.0, 2.0, 1.0]
    """
    amax_bits = torch.as_tensor(amax, dtype=torch.float32).view(torch.int32)
    max_bits = torch.as_tensor(max_value, dtype=torch.float32).view(torch.int32)
    exponent = (amax_bits >> 23) - (max_bits >> 23) + ((amax_bits & _FRACTION) > (max_bits & _FRACTION))
    scale = _power_of_two(exponent.clamp(-_MOST, _MOST))
    usable = (amax_bits >= _MIN_NORMAL) & (amax_bits < _INF) & (max_bits < _BITS_OF_2_100)
    return scale.masked_fill(~usable, 1.0)


def empty_history(window: int, shape: tuple[int, ...] = ()) -> Tensor:
    """A history of ``window`` steps in which nothing was seen yet: float32 zeros of shape ``(window, *shape)``.

    Raises:
        ValueError: if the window is not positive.
    """
    if window < 1:
        raise ValueError(f"the amax window is {window}; expected at least 1 step")
    return torch.zeros((window, *shape), dtype=torch.float32)


def push_amax(history: Tensor, amax: Tensor) -> Tensor:
    """Enter the amax of a step as the newest row. An amax that is not finite is refused: the last one stands again.

    Args:
        history: float32 of shape ``(window, *shape)``, oldest first.
        amax: float32 of shape ``shape``.

    >>> push_amax(torch.tensor([1.0, 2.0]), torch.tensor(torch.inf)).tolist()
    [2.0, 2.0]
    """
    newest = torch.where(amax.isfinite(), amax, history[-1])
    return torch.cat([history[1:], newest[None]])


def delayed_scale(history: Tensor, max_value: Tensor | float) -> Tensor:
    """The scale for the next step: that of the largest amax in the history; 1 where the history is empty.

    >>> float(delayed_scale(torch.tensor([1.0, 248.0, 3.0]), 124.0))
    2.0
    """
    return power_of_two_scale(history.amax(dim=0), max_value)


def _power_of_two(exponent: Tensor) -> Tensor:
    return ((exponent + 127) << 23).view(torch.float32)

"""Scales: from a tensor's own amax, from that of earlier steps, or fixed; powers of two, or the exact ratio.

A scale is the worth of one: ``Q(x / scale) * scale``. A power of two makes scaling exact. Which elements share one is
said in ``granularity.py``; ``altgrad_jax/scaling.py`` says the same thing in JAX, and when quantising twice changes
nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from altgrad_core.errors import InputError
from altgrad_core.scaling import (
    MOST_EXPONENT,
    HistoryReduction,
    check_entered,
    check_reduction,
    check_static_scale,
    check_window,
    checked_axes,
)
from altgrad_torch.casting import check_floating
from altgrad_torch.shards import is_sharded, summed, whole_on_each

_FRACTION = 0x007FFFFF
_MIN_NORMAL = 0x00800000
_INF = 0x7F800000
_MOST = 2.0**MOST_EXPONENT
_BITS_OF_MOST = (MOST_EXPONENT + 127) << 23


def amax(x: Tensor, axes: int | tuple[int, ...] | None = None) -> Tensor:
    """The largest magnitude: NaN if there is a NaN, else inf if there is an infinity, 0 if there is nothing.

    Args:
        x: float32, bfloat16 or float16, of any shape. (float64 is rounded to float32, zero below 2^-126.) Of a DTensor
            it is that of all processes, and the result a plain tensor on each.
        axes: those to reduce; all of them by default. They stay, with length 1, if they are named.

    Returns:
        float32, without a gradient: a scalar by default, else of the shape that broadcasts against ``x``.

    Raises:
        TypeError: if ``x`` is not floating point.
        InputError: for axes that ``x`` does not have.

    >>> float(amax(torch.tensor([1.0, -3.0]))), float(amax(torch.tensor([1.0, torch.nan, 2.0])))
    (3.0, nan)
    >>> amax(torch.tensor([[1.0, -3.0], [2.0, 0.5]]), axes=0).tolist()
    [[2.0, 3.0]]
    """
    check_floating(x, "amax")
    reduced = tuple(range(x.ndim)) if axes is None else checked_axes(axes, x.ndim)
    if is_sharded(x):
        largest = _amax_of_shards(x, reduced)
        return largest.reshape(()) if axes is None else largest
    magnitudes = x.detach().abs()
    if any(x.shape[axis] == 0 for axis in reduced):
        shape = [1 if axis in reduced else length for axis, length in enumerate(x.shape)]
        largest = torch.zeros(shape, dtype=torch.float32, device=x.device)
    else:
        # To torch no axes means all of them.
        largest = magnitudes.amax(dim=reduced, keepdim=True) if reduced else magnitudes
    if x.dtype == torch.float64:
        # Whether a conversion rounds to a subnormal or to zero depends on the framework.
        largest = largest.masked_fill(largest < 2.0**-126, 0.0)
    largest = largest.to(torch.float32)
    largest = largest.masked_fill(largest.isnan(), torch.nan)
    return largest.reshape(()) if axes is None else largest


def _amax_of_shards(x: Tensor, reduced: tuple[int, ...]) -> Tensor:
    """That of a DTensor, the same on each process; nothing but largest magnitudes is sent."""
    from torch.distributed.tensor import DTensor, Replicate

    whole: Any = summed(x.detach())
    # As integers: a float maximum over processes may lose a NaN.
    bits = amax(whole.to_local(), reduced).view(torch.int32)
    kept = list(whole.placements)
    for axis, placement in enumerate(whole.placements):
        if not placement.is_replicate() and placement.dim in reduced:
            torch.distributed.all_reduce(bits, torch.distributed.ReduceOp.MAX, whole.device_mesh.get_group(axis))
            kept[axis] = Replicate()
    shape = torch.Size(1 if axis in reduced else length for axis, length in enumerate(x.shape))
    stride = torch.empty(shape, device="meta").stride()
    placed = DTensor.from_local(bits, whole.device_mesh, kept, run_check=False, shape=shape, stride=stride)
    return whole_on_each(placed).view(torch.float32)


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
    amax, max_value = _both(amax, max_value)
    exponent = fitting_exponent(amax, max_value).clamp(-MOST_EXPONENT, MOST_EXPONENT)
    return two_to_the(exponent).masked_fill(~_usable(amax, max_value), 1.0)


def ratio_scale(amax: Tensor | float, max_value: Tensor | float) -> Tensor:
    """The ratio ``amax / max_value``, correctly rounded to float32, within 2^-100 to 2^100.

    Where the ratio is rounded down, ``amax / scale`` exceeds ``max_value`` by less than an ulp of float32, which every
    format of at most 22 mantissa bits rounds to ``max_value``: nothing overflows.

    Args:
        amax: float32, largest magnitude of a tensor; where it is zero, subnormal or not finite the scale is 1.
        max_value: float32, largest value of the format; broadcast against ``amax``. From 2^100 on the scale is 1.

    Returns:
        float32 of the broadcast shape.

    >>> ratio_scale(torch.tensor([448.0, 224.0, 0.0]), 448.0).tolist()
    [1.0, 0.5, 1.0]
    """
    amax, max_value = _both(amax, max_value)
    # The divisor is a tensor: where it is a number some backends multiply by its reciprocal.
    ratio = (amax / max_value).clamp(1 / _MOST, _MOST)
    return ratio.masked_fill(~_usable(amax, max_value), 1.0)


def empty_history(window: int, shape: tuple[int, ...] = ()) -> Tensor:
    """A history of ``window`` steps in which nothing was seen yet: float32 zeros of shape ``(window, *shape)``.

    Raises:
        InputError: if the window is not positive.
    """
    check_window(window)
    return torch.zeros((window, *shape), dtype=torch.float32)


def push_amax(history: Tensor, amax: Tensor) -> Tensor:
    """Enter the amax of a step as the newest row. An amax that is not finite is refused: the last one stands again.

    Args:
        history: float32 of shape ``(window, *shape)``, oldest first.
        amax: float32 of shape ``shape``.

    Raises:
        InputError: for an amax of another shape.

    >>> push_amax(torch.tensor([1.0, 2.0]), torch.tensor(torch.inf)).tolist()
    [2.0, 2.0]
    """
    check_entered(tuple(amax.shape), tuple(history.shape))
    newest = torch.where(amax.isfinite(), amax, history[-1])
    return torch.cat([history[1:], newest[None]])


def delayed_scale(
    history: Tensor, max_value: Tensor | float, *, reduce: HistoryReduction = "max", power_of_two: bool = True
) -> Tensor:
    """The scale for the next step: by the largest or the newest amax in the history; 1 where the history is empty.

    Args:
        history: float32 of shape ``(window, *shape)``, oldest first.
        max_value: float32, largest value of the format; broadcast against ``shape``.
        reduce: which amax counts, see :data:`altgrad_core.scaling.HistoryReduction`.
        power_of_two: whether the scale is a power of two; else it is the ratio.

    Returns:
        float32 of the broadcast shape.

    Raises:
        InputError: for an unknown reduction.

    >>> history = torch.tensor([1.0, 248.0, 3.0])
    >>> float(delayed_scale(history, 124.0)), float(delayed_scale(history, 124.0, reduce="most_recent"))
    (2.0, 0.03125)
    """
    check_reduction(reduce)
    largest = history.amax(dim=0) if reduce == "max" else history[-1]
    return _scale_of(largest, max_value, power_of_two)


@dataclass(frozen=True)
class Current:
    """Scale a tensor by its own amax. Nothing overflows, and there is no state.

    Args:
        power_of_two: whether scales are powers of two; else they are the ratio ``amax / max``.

    >>> float(Current().scale(torch.tensor(449.0), 448.0))
    2.0
    """

    power_of_two: bool = True

    def init(self, shape: tuple[int, ...] = ()) -> None:
        """No state."""

    def scale(self, amax: Tensor | float, max_value: Tensor | float, state: None = None) -> Tensor:
        """The scale that goes with ``amax``: float32 of the broadcast shape."""
        return _scale_of(amax, max_value, self.power_of_two)

    def update(self, state: None, amax: Tensor | float) -> None:
        """No state."""


@dataclass(frozen=True)
class Delayed:
    """Scale a tensor by the amax of earlier steps, so that no pass over it comes before the cast.

    The state, a history of amaxes, is a tensor that the caller carries.

    Args:
        window: steps of history.
        reduce: which amax of them counts, see :data:`altgrad_core.scaling.HistoryReduction`.
        power_of_two: whether scales are powers of two; else they are the ratio ``amax / max``.

    Raises:
        InputError: for a window of less than 1 or an unknown reduction.

    >>> scaling = Delayed(16)
    >>> history = scaling.update(scaling.init(), torch.tensor(449.0))
    >>> float(scaling.scale(torch.tensor(1.0), 448.0, history))
    2.0
    """

    window: int = 16
    reduce: HistoryReduction = "max"
    power_of_two: bool = True

    def __post_init__(self) -> None:
        """Check the window and the reduction."""
        check_window(self.window)
        check_reduction(self.reduce)

    def init(self, shape: tuple[int, ...] = ()) -> Tensor:
        """The state before the first step, for amaxes of a shape. See :func:`empty_history`."""
        return empty_history(self.window, shape)

    def scale(self, amax: Tensor | float, max_value: Tensor | float, state: Tensor) -> Tensor:
        """The scale that the history gives, which ``amax`` has no part in. See :func:`delayed_scale`."""
        return delayed_scale(state, max_value, reduce=self.reduce, power_of_two=self.power_of_two)

    def update(self, state: Tensor, amax: Tensor | float) -> Tensor:
        """The history with the amax of this step. See :func:`push_amax`."""
        return push_amax(state, torch.as_tensor(amax, dtype=torch.float32, device=state.device))


@dataclass(frozen=True)
class Static:
    """Scale a tensor by a number that does not depend on it.

    Args:
        value: float32, positive, within 2^-100 to 2^100, of a shape that broadcasts against the amax.
        power_of_two: whether the scale is a power of two; said, so that what relies on it need not look.

    Raises:
        InputError: for a scale that is not.

    >>> float(Static(0.25).scale(torch.tensor(449.0), 448.0))
    0.25
    """

    value: Tensor | float
    power_of_two: bool = True

    def __post_init__(self) -> None:
        """Check the scale."""
        value: object = self.value
        if isinstance(value, Tensor):
            if value.is_meta:
                raise InputError("the static scale is on the meta device, where it has no value; expected a number")
            value = value.detach().cpu()
            value = (value.double() if value.is_floating_point() else value).numpy()  # which knows no bfloat16
        check_static_scale(value, power_of_two=self.power_of_two)

    def init(self, shape: tuple[int, ...] = ()) -> None:
        """No state."""

    def scale(self, amax: Tensor | float, max_value: Tensor | float, state: None = None) -> Tensor:
        """The scale, whatever the tensor holds."""
        return torch.as_tensor(self.value, dtype=torch.float32)

    def update(self, state: None, amax: Tensor | float) -> None:
        """No state."""


Scaling = Static | Current | Delayed
"""Where scales come from. All have ``init(shape)``, ``scale(amax, max_value, state)`` and ``update(state, amax)``."""


def fitting_exponent(amax: Tensor, max_value: Tensor) -> Tensor:
    """The smallest k with ``amax <= max_value * 2^k``, of normal float32: int32."""
    amax_bits, max_bits = amax.view(torch.int32), max_value.view(torch.int32)
    return (amax_bits >> 23) - (max_bits >> 23) + ((amax_bits & _FRACTION) > (max_bits & _FRACTION))


def two_to_the(exponent: Tensor) -> Tensor:
    """``2^exponent`` as float32, for int32 of -126 to 127."""
    return ((exponent + 127) << 23).view(torch.float32)


def _scale_of(amax: Tensor | float, max_value: Tensor | float, power_of_two: bool) -> Tensor:
    return power_of_two_scale(amax, max_value) if power_of_two else ratio_scale(amax, max_value)


def _both(amax: Tensor | float, max_value: Tensor | float) -> tuple[Tensor, Tensor]:
    amax = whole_on_each(torch.as_tensor(amax, dtype=torch.float32))
    return amax, torch.as_tensor(max_value, dtype=torch.float32, device=amax.device)


def _usable(amax: Tensor, max_value: Tensor) -> Tensor:
    amax_bits = amax.view(torch.int32)
    return (amax_bits >= _MIN_NORMAL) & (amax_bits < _INF) & (max_value.view(torch.int32) < _BITS_OF_MOST)

"""What scaling means in both frameworks: which elements share a scale, where it comes from, and its limits.

A scale is the worth of one: ``Q(x / scale) * scale``.
"""

from __future__ import annotations

import difflib
import math
import numbers
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from altgrad_core.errors import InputError, check_choice
from altgrad_core.formats import Format
from altgrad_core.scalars import as_real, is_integer

MOST_EXPONENT = 100
"""Scales of tensors and channels stay within 2^-100 to 2^100: neither they nor their reciprocals are subnormal."""

E8M0_BIAS = 127
"""An E8M0 code is the exponent of a power of two plus this (OCP Microscaling Formats (MX) v1.0, section 5.4.1)."""

E8M0_NAN = 255
"""The E8M0 code of NaN, its only special."""

SMALLEST_STEP_EXPONENT = -125
"""Steps between the values of a scaled block are at least two to this; see :func:`block_exponents`."""

_SMALLEST_FLOAT32, _LARGEST_FLOAT32 = 2.0**-149, 2.0**128 - 2.0**104

MX_BLOCK = 32
"""Elements that share a scale in the concrete formats of OCP MX v1.0 (section 5.2)."""

BlockRule = Literal["mx", "fit"]
"""Which power of two scales a block of largest magnitude amax.

``mx``: ``2^(floor(log2(amax)) - floor(log2(max)))``, the conversion of OCP MX v1.0, section 6.3. What lies above max
then saturates: in E4M3 the eighth of each binade above 448. ``fit``: the smallest power of two that brings amax to at
most max, so that nothing saturates; up to twice that of ``mx``. (torchao calls them FLOOR and RCEIL.)
"""

BLOCK_RULES: tuple[BlockRule, ...] = ("mx", "fit")

ScaleRule = Literal["static", "delayed", "repaired"]
"""Where a training job's scales come from.

``static``: all are 1. ``delayed``: powers of two from the largest magnitudes of the last steps. ``repaired``: likewise,
but where a cast saturates the scale is twice as large in the next step.
"""

HistoryReduction = Literal["max", "most_recent"]
"""Which amax of a history a delayed scale goes by: the largest, or the newest (the two of Transformer Engine)."""

HISTORY_REDUCTIONS: tuple[HistoryReduction, ...] = ("max", "most_recent")


@dataclass(frozen=True)
class PerTensor:
    """One scale for all elements."""


@dataclass(frozen=True)
class PerChannel:
    """One scale for each index of ``axes``, shared along all other axes.

    Args:
        axes: the axes that keep scales of their own, *not* those that are reduced: the last by default, which are the
            outputs of a Flax kernel; ``PerChannel(0)`` for the outputs of a ``torch.nn.Linear``; ``(0, 2)`` for two.

    Raises:
        InputError: if the axes are no integers.
    """

    axes: int | tuple[int, ...] = -1

    def __post_init__(self) -> None:
        """Keep the axes as Python's integers."""
        object.__setattr__(self, "axes", _plain_axes(self.axes))


@dataclass(frozen=True)
class PerBlock:
    """One scale for each ``size`` neighbours along an axis; where ``size`` does not divide it, the last block is short.

    Args:
        size: elements of a block, at least 1.
        axis: along which blocks are cut.

    Raises:
        InputError: if the size is not a positive integer, or the axis none.
    """

    size: int = MX_BLOCK
    axis: int = -1

    def __post_init__(self) -> None:
        """Check the size, and keep it and the axis as Python's integers."""
        if not is_integer(self.size) or self.size < 1:
            raise InputError(f"the block size is {self.size!r}; expected an integer of at least 1, such as {MX_BLOCK}")
        object.__setattr__(self, "size", int(self.size))
        object.__setattr__(self, "axis", _plain_axis(self.axis))

    def count(self, length: int) -> int:
        """How many blocks an axis of this length has."""
        return -(-length // self.size)


Granularity = PerTensor | PerChannel | PerBlock
"""Which elements of a tensor share a scale."""

_BLOCK_NAME = re.compile(r"block(?P<size>\d+)")


def parse_granularity(name: str | Granularity) -> Granularity:
    """The granularity of a name: ``tensor``, ``channel`` (the last axis) or ``block<size>`` (along the last axis).

    Args:
        name: the name; a granularity is returned as it is, which is how other axes are asked for.

    Raises:
        InputError: for anything else; the message suggests the nearest name.

    >>> parse_granularity("block32"), parse_granularity(PerChannel(0))
    (PerBlock(size=32, axis=-1), PerChannel(axes=0))
    """
    if isinstance(name, Granularity):
        return name
    if name == "tensor":
        return PerTensor()
    if name == "channel":
        return PerChannel()
    match = _BLOCK_NAME.fullmatch(name) if isinstance(name, str) else None
    if match:
        return PerBlock(int(match["size"]))
    near = difflib.get_close_matches(str(name).casefold(), ("tensor", "channel", "block32"), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise InputError(
        f"unknown granularity {name!r}; {hint}Expected 'tensor', 'channel', 'block<size>' such as 'block32', or a "
        "PerTensor, PerChannel or PerBlock"
    )


def _plain_axis(axis: object) -> int:
    if not is_integer(axis):
        raise InputError(f"the axis is {axis!r}; expected an integer, such as -1, the last")
    return int(axis)


def _plain_axes(axes: object) -> int | tuple[int, ...]:
    if isinstance(axes, (tuple, list, range)):
        return tuple(_plain_axis(axis) for axis in axes)
    if not is_integer(axes):
        raise InputError(f"the axes are {axes!r}; expected an integer, such as -1, the last, or a tuple of integers")
    return int(axes)


def checked_axis(axis: int, ndim: int) -> int:
    """An axis counted from the front.

    Raises:
        InputError: if it is no integer, or an array of so many axes does not have it.

    >>> checked_axis(-1, 3)
    2
    """
    axis = _plain_axis(axis)
    if not -ndim <= axis < ndim:
        expected = f"expected {-ndim} to {ndim - 1}" if ndim else "a scalar has none"
        raise InputError(f"axis {axis} is out of range for an array of {ndim} axes; {expected}")
    return axis % ndim


def checked_axes(axes: int | tuple[int, ...], ndim: int) -> tuple[int, ...]:
    """Axes counted from the front, in ascending order.

    Raises:
        InputError: if one is no integer, out of range or named twice.
    """
    plain = _plain_axes(axes)
    named = (plain,) if isinstance(plain, int) else plain
    positive = sorted(checked_axis(axis, ndim) for axis in named)
    if len(set(positive)) != len(positive):
        raise InputError(f"axes {named} name an axis twice; an array of {ndim} axes has each once")
    return tuple(positive)


def reduced_axes(granularity: PerTensor | PerChannel, ndim: int) -> tuple[int, ...]:
    """The axes along which a scale is shared.

    >>> reduced_axes(PerChannel(-1), 3)
    (0, 1)
    """
    kept = () if isinstance(granularity, PerTensor) else checked_axes(granularity.axes, ndim)
    return tuple(axis for axis in range(ndim) if axis not in kept)


def block_exponents(format: Format) -> tuple[int, int]:
    """The smallest and the largest exponent of a block's scale.

    Within them every value of the format, times the scale, is zero or a float32 that is finite and normal, and half of
    the smallest step is 2^-126 or more, so that subnormal float32, which some processors read as zero, rounds to it. A
    format that has finer steps by itself is not scaled down; and a scale and its reciprocal are normal.

    >>> from altgrad_core.formats import parse
    >>> block_exponents(parse("E4M3")), block_exponents(parse("bf16"))
    ((-116, 119), (0, 0))
    """
    lowest = SMALLEST_STEP_EXPONENT + format.mantissa_bits - format.min_exponent
    return min(max(lowest, -126), 0), min(126, 127 - format.max_exponent)


def check_element_format(format: Format) -> None:
    """Refuse formats without a sign, which have no zero: their place is that of scales."""
    if not format.is_signed:
        raise InputError(f"{format} has no sign and no zero; expected a signed format for the elements of blocks")


def check_rule(rule: str) -> None:
    """Refuse what is not one of :data:`BLOCK_RULES`."""
    check_choice("block rule", rule, BLOCK_RULES)


def check_reduction(reduce: str) -> None:
    """Refuse what is not one of :data:`HISTORY_REDUCTIONS`."""
    check_choice("reduction of the amax history", reduce, HISTORY_REDUCTIONS)


def check_window(window: int) -> None:
    """Refuse a history of less than one step."""
    if not is_integer(window) or window < 1:
        raise InputError(f"the amax window is {window!r}; expected at least 1 step")


def check_entered(amax: tuple[int, ...], history: tuple[int, ...]) -> None:
    """Refuse an amax that is not of the shape of a history's rows.

    Args:
        amax: its shape.
        history: that of the history.

    Raises:
        InputError: naming both.
    """
    if amax != history[1:]:
        raise InputError(f"the amax has shape {amax}; expected {history[1:]}, that of a row of the history")


def check_given_scale(scale: object, *, power_of_two: bool = False) -> None:
    """Refuse numbers and NumPy arrays that are no scales as float32; other arrays may lie on a device, and are left.

    Args:
        scale: what a user gave as the worth of one.
        power_of_two: whether nothing else will do.

    Raises:
        InputError: naming the first that is not positive, beyond what float32 holds, or no power of two.

    >>> check_given_scale(1e-300)
    Traceback (most recent call last):
    altgrad_core.errors.InputError: the scale is 1e-300; expected a positive number within 2^-149 to 3.4028235e+38
    """
    if isinstance(scale, np.ndarray):
        values = scale.astype(np.float64).ravel()
        bad = values[~((values >= _SMALLEST_FLOAT32) & (values <= _LARGEST_FLOAT32))].tolist()
    elif isinstance(scale, numbers.Real):  # without NumPy, of which torch.compile would make tensors
        values = [as_real(scale)]
        bad = [] if _SMALLEST_FLOAT32 <= values[0] <= _LARGEST_FLOAT32 else [scale]
    else:
        return
    if bad:
        raise InputError(f"the scale is {bad[0]}; expected a positive number within 2^-149 to {_LARGEST_FLOAT32:.8g}")
    if power_of_two:
        _check_powers_of_two("scale", values)


def _check_powers_of_two(what: str, values: Iterable[float], otherwise: str = "") -> None:
    uneven = next((value for value in values if math.frexp(value)[0] != 0.5), None)
    if uneven is not None:
        nearest = 2.0 ** round(math.log2(uneven))
        raise InputError(
            f"the {what} is {uneven}, which is no power of two; expected one (the nearest is {nearest}){otherwise}"
        )


def check_static_scale(scale: object, *, power_of_two: bool) -> None:
    """Refuse scales that are not positive and within 2^-100 to 2^100, or not powers of two where that was promised.

    Args:
        scale: what a user gave: a number, or an array of real numbers that NumPy can read.
        power_of_two: whether nothing else will do.

    Raises:
        InputError: naming the first bad value and, where there is one, the nearest good one; or what is no number.

    >>> check_static_scale("x", power_of_two=True)
    Traceback (most recent call last):
    altgrad_core.errors.InputError: the static scale is 'x', a str; expected a positive number within 2^-100 to 2^100
    """
    found = _real_numbers(scale)
    if found is None:
        raise InputError(
            f"the static scale is {scale!r:.80}, a {type(scale).__name__}; expected a positive number within "
            f"2^-{MOST_EXPONENT} to 2^{MOST_EXPONENT}"
        )
    values = found.ravel()
    most = 2.0**MOST_EXPONENT
    outside = values[~((values >= 1 / most) & (values <= most))]
    if outside.size:
        raise InputError(
            f"the static scale is {outside[0]}; expected a positive number within 2^-{MOST_EXPONENT} to "
            f"2^{MOST_EXPONENT}"
        )
    if power_of_two:
        _check_powers_of_two("static scale", values.tolist(), ", or power_of_two=False")


def _real_numbers(given: object) -> npt.NDArray[np.float64] | None:
    """A number, or an array of integers or floats, those of ml_dtypes among them, as float64; None of anything else."""
    if isinstance(given, numbers.Real):  # of any size, which an array of integers has not
        value = np.asarray(as_real(given))
        return None if np.isnan(value) else value
    try:
        array = np.asarray(given)
        if array.dtype.kind not in "iuf":
            import ml_dtypes  # late: reading other numbers needs no more than NumPy

            ml_dtypes.finfo(array.dtype)
    except (TypeError, ValueError):  # of a ragged list, and of what is no float
        return None
    return None if array.dtype.kind == "c" else array.astype(np.float64)

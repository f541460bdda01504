"""Scales: from a tensor's own amax, from that of earlier steps, or fixed; powers of two, or the exact ratio.

A scale is the worth of one: ``Q(x / scale) * scale``. A power of two makes scaling exact. Which elements share one is
said in ``granularity.py``; ``altgrad_torch/scaling.py`` says the same thing in torch.

Quantising twice to nearest changes nothing, in float32 and bfloat16 (and in float16 while results stay in its range);
under powers of two that holds for every rounding. With a given scale because ``Q(x / scale) * scale`` is within half an
ulp of the grid times the scale; with one from the tensor's own amax because what was quantised has either the same
scale again or, of powers of two, a smaller one under which its values are on the grid as well. That holds while max
times the scale is float32, and for formats of at most 20 mantissa bits (6, for bfloat16 under ratio scales).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from altgrad_core.scaling import (
    MOST_EXPONENT,
    HistoryReduction,
    check_entered,
    check_reduction,
    check_static_scale,
    check_window,
    checked_axes,
)
from altgrad_jax.arithmetic import quotient
from altgrad_jax.axes import split_as
from altgrad_jax.casting import floating

_MAGNITUDE = np.int32(0x7FFFFFFF)
_FRACTION = np.int32(0x007FFFFF)
_MIN_NORMAL = np.int32(0x00800000)
_INF = np.int32(0x7F800000)
_NAN = np.int32(0x7FC00000)
_MOST = np.float32(2.0**MOST_EXPONENT)
_ROW, _FOLDS = 32, 8
"""Elements of a row, and into how many parts it is folded, one upon the other."""
_WORTH_FOLDING = 2**15
"""Elements of an array that is reduced in parts: for a smaller one that is more to compile, and no faster."""


def amax(x: jax.Array, axes: int | tuple[int, ...] | None = None) -> jax.Array:
    """The largest magnitude: NaN if there is a NaN, else inf if there is an infinity, 0 if there is nothing.

    Taken on the bits: XLA's CPU backend may lose the NaN in a maximum of floats.

    Args:
        x: float32, bfloat16 or float16, of any shape. (float64 is rounded to float32, zero below 2^-126.)
        axes: those to reduce; all of them by default. They stay, with length 1, if they are named.

    Returns:
        float32: a scalar by default, else of the shape that broadcasts against ``x``.

    Raises:
        TypeError: if ``x`` is not floating point.
        InputError: for axes that ``x`` does not have.

    >>> float(amax(jnp.array([1.0, -3.0]))), float(amax(jnp.array([1.0, jnp.nan, 2.0])))
    (3.0, nan)
    >>> amax(jnp.array([[1.0, -3.0], [2.0, 0.5]]), axes=0).tolist()
    [[2.0, 3.0]]
    """
    x = floating(x, "amax")
    return _amax(x, None if axes is None else checked_axes(axes, x.ndim))


@partial(jax.jit, static_argnums=1, inline=True)  # one program also outside of jit
def _amax(x: jax.Array, axes: tuple[int, ...] | None) -> jax.Array:
    if x.dtype == jnp.float64:
        # Whether a conversion rounds to a subnormal or to zero depends on the backend.
        x = jnp.where(jnp.abs(x) < 2.0**-126, jnp.zeros_like(x), x)
    magnitudes = _bits(x.astype(jnp.float32)) & _MAGNITUDE
    reduced = tuple(range(x.ndim)) if axes is None else axes
    largest = largest_of(magnitudes, reduced)
    largest = jnp.where(largest > _INF, _NAN, largest)
    return _float(largest if axes is None else jnp.expand_dims(largest, reduced))


def largest_of(magnitudes: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The maximum of non-negative int32 along axes; 0 where there is nothing.

    In a large array one of the axes is cut into short rows, if it can be, and these are folded first: that XLA's CPU
    backend turns into vector code, which of its reduction to a maximum it does not. Axes are split, never merged, so
    what is sharded stays so; and what crosses devices is a plain maximum, the only one that collectives know.
    """
    size = magnitudes.size
    # Of exported functions sizes may be symbols, which cannot be compared.
    for axis in reversed(axes if isinstance(size, int) and size > _WORTH_FOLDING else ()):
        length = magnitudes.shape[axis]
        row = _largest_divisor(length, _ROW)
        folds = _largest_divisor(row, _FOLDS)
        if folds > 1:
            cut = (*magnitudes.shape[:axis], length // row, folds, row // folds, *magnitudes.shape[axis + 1 :])
            parts = [lax.index_in_dim(magnitudes.reshape(cut), k, axis + 1, keepdims=False) for k in range(folds)]
            magnitudes = functools.reduce(_larger, parts)
            axes = (*(each for each in axes if each <= axis), axis + 1, *(each + 1 for each in axes if each > axis))
            break
    return lax.reduce(magnitudes, np.int32(0), lax.max, axes)


def _larger(left: jax.Array, right: jax.Array) -> jax.Array:
    """``max(left, right)`` of non-negative int32 by arithmetic, twice as fast as XLA's maximum of integers."""
    step = right - left
    return left + (step & ~(step >> 31))


def _largest_divisor(number: int, most: int) -> int:
    return max((divisor for divisor in range(1, most + 1) if number and number % divisor == 0), default=1)


def power_of_two_scale(amax: jax.typing.ArrayLike, max_value: jax.typing.ArrayLike) -> jax.Array:
    """The smallest power of two that brings ``amax`` to at most ``max_value``, within 2^-100 to 2^100.

    Args:
        amax: float32, largest magnitude of a tensor; where it is zero, subnormal or not finite the scale is 1.
        max_value: float32, largest value of the format; broadcast against ``amax``. Where it is float32's own
            maximum or close to it (2^100 and above) nothing needs scaling, and the scale is 1.

    Returns:
        float32 of the broadcast shape.

    >>> power_of_two_scale(jnp.array([448.0, 449.0, 0.0]), 448.0).tolist()
    [1.0, 2.0, 1.0]
    """
    amax, max_value = jnp.asarray(amax, jnp.float32), jnp.asarray(max_value, jnp.float32)
    exponent = jnp.clip(fitting_exponent(amax, max_value), -MOST_EXPONENT, MOST_EXPONENT)
    return jnp.where(_usable(amax, max_value), two_to_the(exponent), jnp.float32(1))


def ratio_scale(amax: jax.typing.ArrayLike, max_value: jax.typing.ArrayLike) -> jax.Array:
    """The ratio ``amax / max_value``, correctly rounded to float32, within 2^-100 to 2^100.

    Where the ratio is rounded down, ``amax / scale`` exceeds ``max_value`` by less than an ulp of float32, which every
    format of at most 22 mantissa bits rounds to ``max_value``: nothing overflows.

    Args:
        amax: float32, largest magnitude of a tensor; where it is zero, subnormal or not finite the scale is 1.
        max_value: float32, largest value of the format; broadcast against ``amax``. From 2^100 on the scale is 1.

    Returns:
        float32 of the broadcast shape.

    >>> ratio_scale(jnp.array([448.0, 224.0, 0.0]), 448.0).tolist()
    [1.0, 0.5, 1.0]
    """
    amax, max_value = jnp.asarray(amax, jnp.float32), jnp.asarray(max_value, jnp.float32)
    ratio = quotient(amax, max_value)
    return jnp.where(_usable(amax, max_value), jnp.clip(ratio, 1 / _MOST, _MOST), jnp.float32(1))


def empty_history(window: int, shape: tuple[int, ...] = ()) -> jax.Array:
    """A history of ``window`` steps in which nothing was seen yet: float32 zeros of shape ``(window, *shape)``.

    Raises:
        InputError: if the window is not positive.
    """
    check_window(window)
    return jnp.zeros((window, *shape), jnp.float32)


def push_amax(history: jax.Array, amax: jax.Array) -> jax.Array:
    """Enter the amax of a step as the newest row. An amax that is not finite is refused: the last one stands again.

    Args:
        history: float32 of shape ``(window, *shape)``, oldest first.
        amax: float32 of shape ``shape``.

    Raises:
        InputError: for an amax of another shape.

    >>> push_amax(jnp.array([1.0, 2.0]), jnp.float32(jnp.inf)).tolist()
    [2.0, 2.0]
    """
    check_entered(jnp.shape(amax), history.shape)
    last = history[-1]
    amax = split_as(jnp.asarray(amax), last)  # amaxes of a tensor that is split over a mesh, its history is not
    newest = jnp.where(jnp.isfinite(amax), amax, last)
    return jnp.concatenate([history[1:], newest[None]])


def delayed_scale(
    history: jax.Array,
    max_value: jax.typing.ArrayLike,
    *,
    reduce: HistoryReduction = "max",
    power_of_two: bool = True,
) -> jax.Array:
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

    >>> history = jnp.array([1.0, 248.0, 3.0])
    >>> float(delayed_scale(history, 124.0)), float(delayed_scale(history, 124.0, reduce="most_recent"))
    (2.0, 0.03125)
    """
    check_reduction(reduce)
    largest = jnp.max(history, axis=0) if reduce == "max" else history[-1]
    return _scale_of(largest, max_value, power_of_two)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Current:
    """Scale a tensor by its own amax. Nothing overflows, and there is no state.

    A pytree without leaves: part of the structure where it is passed to a jitted function.

    Args:
        power_of_two: whether scales are powers of two; else they are the ratio ``amax / max``.

    >>> float(Current().scale(jnp.float32(449.0), 448.0))
    2.0
    """

    power_of_two: bool = field(default=True, metadata={"static": True})

    def init(self, shape: tuple[int, ...] = ()) -> None:
        """No state."""

    def scale(self, amax: jax.typing.ArrayLike, max_value: jax.typing.ArrayLike, state: None = None) -> jax.Array:
        """The scale that goes with ``amax``: float32 of the broadcast shape."""
        return _scale_of(amax, max_value, self.power_of_two)

    def update(self, state: None, amax: jax.typing.ArrayLike) -> None:
        """No state."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Delayed:
    """Scale a tensor by the amax of earlier steps, so that no pass over it comes before the cast.

    A pytree without leaves; the state, a history of amaxes, is an array that the caller carries.

    Args:
        window: steps of history.
        reduce: which amax of them counts, see :data:`altgrad_core.scaling.HistoryReduction`.
        power_of_two: whether scales are powers of two; else they are the ratio ``amax / max``.

    Raises:
        InputError: for a window of less than 1 or an unknown reduction.

    >>> scaling = Delayed(16)
    >>> history = scaling.update(scaling.init(), jnp.float32(449.0))
    >>> float(scaling.scale(jnp.float32(1.0), 448.0, history))
    2.0
    """

    window: int = field(default=16, metadata={"static": True})
    reduce: HistoryReduction = field(default="max", metadata={"static": True})
    power_of_two: bool = field(default=True, metadata={"static": True})

    def __post_init__(self) -> None:
        """Check the window and the reduction."""
        check_window(self.window)
        check_reduction(self.reduce)

    def init(self, shape: tuple[int, ...] = ()) -> jax.Array:
        """The state before the first step, for amaxes of a shape. See :func:`empty_history`."""
        return empty_history(self.window, shape)

    def scale(self, amax: jax.typing.ArrayLike, max_value: jax.typing.ArrayLike, state: jax.Array) -> jax.Array:
        """The scale that the history gives, which ``amax`` has no part in. See :func:`delayed_scale`."""
        return delayed_scale(state, max_value, reduce=self.reduce, power_of_two=self.power_of_two)

    def update(self, state: jax.Array, amax: jax.typing.ArrayLike) -> jax.Array:
        """The history with the amax of this step. See :func:`push_amax`."""
        return push_amax(state, jnp.asarray(amax, jnp.float32))


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True)
class Static:
    """Scale a tensor by a number that does not depend on it. A pytree whose leaf is the scale.

    Args:
        value: float32, positive, within 2^-100 to 2^100, of a shape that broadcasts against the amax.
        power_of_two: whether the scale is a power of two; said, so that what relies on it need not look.

    Raises:
        InputError: for a scale that is not, as far as it can be seen: not of a traced one.

    >>> float(Static(0.25).scale(jnp.float32(449.0), 448.0))
    0.25
    """

    value: jax.typing.ArrayLike
    power_of_two: bool = True

    def __post_init__(self) -> None:
        """Check a scale that is no tracer."""
        if not isinstance(self.value, jax.core.Tracer):
            check_static_scale(self.value, power_of_two=self.power_of_two)

    def init(self, shape: tuple[int, ...] = ()) -> None:
        """No state."""

    def scale(self, amax: jax.typing.ArrayLike, max_value: jax.typing.ArrayLike, state: None = None) -> jax.Array:
        """The scale, whatever the tensor holds."""
        return jnp.asarray(self.value, jnp.float32)

    def update(self, state: None, amax: jax.typing.ArrayLike) -> None:
        """No state."""

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[jax.tree_util.GetAttrKey, object]], bool]:
        """The scale is the leaf."""
        return ((jax.tree_util.GetAttrKey("value"), self.value),), self.power_of_two

    @classmethod
    def tree_unflatten(cls, power_of_two: bool, leaves: tuple[jax.Array]) -> Static:
        """Without the check: leaves may be anything, such as a batch axis or a gradient."""
        made = object.__new__(cls)
        object.__setattr__(made, "value", leaves[0])
        object.__setattr__(made, "power_of_two", power_of_two)
        return made


Scaling = Static | Current | Delayed
"""Where scales come from. All have ``init(shape)``, ``scale(amax, max_value, state)`` and ``update(state, amax)``."""


def fitting_exponent(amax: jax.Array, max_value: jax.Array) -> jax.Array:
    """The smallest k with ``amax <= max_value * 2^k``, of normal float32: int32."""
    amax_bits, max_bits = _bits(amax), _bits(max_value)
    above = (amax_bits & _FRACTION) > (max_bits & _FRACTION)
    return (amax_bits >> 23) - (max_bits >> 23) + above.astype(jnp.int32)


def two_to_the(exponent: jax.Array) -> jax.Array:
    """``2^exponent`` as float32, for int32 of -126 to 127."""
    return _float((exponent + 127) << 23)


def _scale_of(amax: jax.typing.ArrayLike, max_value: jax.typing.ArrayLike, power_of_two: bool) -> jax.Array:
    return power_of_two_scale(amax, max_value) if power_of_two else ratio_scale(amax, max_value)


def _usable(amax: jax.Array, max_value: jax.Array) -> jax.Array:
    amax_bits = _bits(amax)
    return (amax_bits >= _MIN_NORMAL) & (amax_bits < _INF) & (_bits(max_value) < _bits(_MOST))


def _bits(x: jax.typing.ArrayLike) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.int32)


def _float(bits: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(bits, jnp.float32)

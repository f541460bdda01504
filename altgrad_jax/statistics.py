"""What a cast or an update does to a tensor, counted on the device: overflow, underflow, NaN, stall.

Counts are exact: each is held in two int32 limbs, ``high * 2^30 + low``, so that sums over many steps and tensors do
not wrap at 2^31. Rates are quotients of counts, formed in float64 and rounded once to float32.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax
from jax import lax
from jax.export import is_symbolic_dim

from altgrad_core.formats import STOCHASTIC_BITS, Format, Overflow, Rounding
from altgrad_core.scaling import check_given_scale
from altgrad_jax.arithmetic import flush_subnormals
from altgrad_jax.axes import AxisName, by_axes, is_whole, largest_over, sum_over
from altgrad_jax.casting import (
    cast,
    checked_random_bits,
    checked_scale,
    divide_by_scale,
    float64_to_odd,
    floating,
    quantize,
    scaled_down,
    to_float32_grid,
)
from altgrad_jax.params import Edges, FormatParams, as_params, check_one_for_each, edges
from altgrad_jax.scaling import amax, power_of_two_scale

_LIMB_BITS = 30
_LIMB_MASK = (1 << _LIMB_BITS) - 1
_MAGNITUDE = np.int32(0x7FFFFFFF)
_INF = np.int32(0x7F800000)
_MOST_AT_ONCE = 2**30
_STREAMS, _ROWS = 4, 16
"""A large array is read in so many places at once, which a processor's memory serves faster than one after the other,
and in each of them in so many rows, which XLA's CPU backend spreads over its threads."""
_WORTH_SPREADING = 2**19


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CastCounts:
    """What a cast did to the elements of one tensor or, added up, of many.

    Attributes:
        limbs: int32 of shape ``(..., 5, 2)``: for each of elements, overflow, nonzero, underflow and nan its high and
            low limb. NaN is in elements and in nan only. Leading axes are tensors counted apart; :meth:`pooled` adds
            them up.
    """

    limbs: jax.Array

    @classmethod
    def zeros(cls, shape: tuple[int, ...] = ()) -> Self:
        """Counts of nothing, for ``shape`` tensors apart."""
        return cls(jnp.zeros((*shape, 5, 2), jnp.int32))

    @classmethod
    def of_tallies(cls, tallies: jax.Array) -> Self:
        """Counts of shape ``(...)`` from int32 tallies of shape ``(..., 6)``; see :func:`tally`."""
        return cls(_limbs(tallies[..., :5]))

    def __add__(self, other: Self) -> Self:
        """Add counts of the same shape."""
        return type(self)(_carry(self.limbs + other.limbs))

    def pooled(self) -> Self:
        """Counts of all tensors together, of shape ``()``; up to 2^15 of them."""
        return type(self)(_pooled(self.limbs.reshape(-1, 5, 2)))

    @property
    def overflow_rate(self) -> jax.Array:
        """float32: elements that overflow, infinities included, over elements."""
        return _ratio(self.limbs[..., 1, :], self.limbs[..., 0, :])

    @property
    def underflow_rate(self) -> jax.Array:
        """float32: non-zero elements that become zero over non-zero elements."""
        return _ratio(self.limbs[..., 3, :], self.limbs[..., 2, :])

    @property
    def nan_rate(self) -> jax.Array:
        """float32: NaN elements over elements."""
        return _ratio(self.limbs[..., 4, :], self.limbs[..., 0, :])

    def as_integers(self) -> dict[str, list[int] | int]:
        """The exact counts as Python integers, read from the device (not under jit)."""
        limbs = np.asarray(self.limbs).astype(object)
        totals = limbs[..., 0] * (_LIMB_MASK + 1) + limbs[..., 1]
        names = ("elements", "overflow", "nonzero", "underflow", "nan")
        return {name: np.asarray(totals[..., k]).tolist() for k, name in enumerate(names)}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StallCounts:
    """What became of the updates of one tensor or, added up, of many.

    Attributes:
        limbs: int32 of shape ``(..., 4, 2)``: for each of nonzero updates, stalled by precision, stalled by
            saturation, and vanished (update zero where the gradient was not) its high and low limb.
    """

    limbs: jax.Array

    @classmethod
    def zeros(cls) -> Self:
        """Counts of nothing."""
        return cls(jnp.zeros((4, 2), jnp.int32))

    def __add__(self, other: Self) -> Self:
        """Add counts of the same shape."""
        return type(self)(_carry(self.limbs + other.limbs))

    def pooled(self) -> Self:
        """Counts of all tensors together, of shape ``()``; up to 2^15 of them."""
        return type(self)(_pooled(self.limbs.reshape(-1, 4, 2)))

    @property
    def stall_rate(self) -> jax.Array:
        """float32: non-zero updates that leave the quantised weight as it was over non-zero updates; 0 without any."""
        return _ratio(_carry(self.limbs[..., 1, :] + self.limbs[..., 2, :]), self.limbs[..., 0, :])

    @property
    def saturation_rate(self) -> jax.Array:
        """float32: updates stalled because the weight sits at ±max over non-zero updates."""
        return _ratio(self.limbs[..., 2, :], self.limbs[..., 0, :])

    def as_integers(self) -> dict[str, list[int] | int]:
        """The exact counts as Python integers, read from the device (not under jit)."""
        limbs = np.asarray(self.limbs).astype(object)
        totals = limbs[..., 0] * (_LIMB_MASK + 1) + limbs[..., 1]
        names = ("nonzero", "precision", "saturation", "vanished")
        return {name: np.asarray(totals[..., k]).tolist() for k, name in enumerate(names)}


def overflow_rate_of(limbs: Mapping[tuple[Hashable, ...], jax.Array]) -> jax.Array:
    """The overflow rate of the counts of several tensors, and of their other parts over mapped axes, together.

    Args:
        limbs: int32 of shape ``(tensors, 5, 2)``, see :class:`CastCounts`, by the axes over which they are parts.

    Returns:
        float32 scalar; 0 without elements.
    """
    with jax.enable_x64(True):
        totals = jnp.zeros(5, jnp.int64)
        for axes, counts in limbs.items():
            wide = counts.astype(jnp.int64)
            totals = totals + sum_over(jnp.sum(wide[..., 0] * (1 << _LIMB_BITS) + wide[..., 1], 0), axes)
        elements, overflow = lax.convert_element_type(totals[0], jnp.float64), totals[1].astype(jnp.float64)
        return lax.convert_element_type(overflow / jnp.maximum(elements, 1.0), jnp.float32)


def cast_counts(
    x: jax.Array, format: str | Format | FormatParams, *, scale: jax.typing.ArrayLike | None = None
) -> CastCounts:
    """Count what a cast of ``x`` does, without casting: one pass that reads ``x`` and writes nothing.

    Counted is the cast to nearest even. Measure against a delayed or static scale: under a tensor's own current amax
    nothing ever overflows.

    Args:
        x: floating-point array of any shape; bfloat16, float16 and float64 count at their own values.
        format: a name, a :class:`~altgrad_core.formats.Format` or :class:`~altgrad_jax.params.FormatParams`.
        scale: the worth of one, positive, a power of two; counted is ``x / scale``.

    Returns:
        Counts of shape ``()``.

    Raises:
        TypeError: if ``x`` is not floating point.
        UnknownFormatError: for an unknown name.

    >>> cast_counts(jnp.array([1e6, 1.0, 1e-9, 0.0]), "E5M2").as_integers()
    {'elements': 4, 'overflow': 1, 'nonzero': 3, 'underflow': 1, 'nan': 0}
    """
    return observe(x, format, scale=scale)[0]


def observe(
    x: jax.Array, format: str | Format | FormatParams, *, scale: jax.typing.ArrayLike | None = None
) -> tuple[CastCounts, jax.Array]:
    """The counts of a cast and the largest magnitude of ``x``, in the same single pass; see :func:`cast_counts`.

    Returns:
        The counts, and amax = max(|x|) as a float32 scalar: inf if ``x`` holds an infinity, NaN if it holds a NaN, 0
        if it is empty.

    >>> float(observe(jnp.array([1.0, -3.0]), "E5M2")[1])
    3.0
    """
    x = floating(x, "cast_counts")
    return _observed(x, as_params(format), None if scale is None else checked_scale(scale, x))


@partial(jax.jit, inline=True)  # one program also outside of jit
def _observed(x: jax.Array, params: FormatParams, scale: jax.Array | None) -> tuple[CastCounts, jax.Array]:
    limits = edges(params)
    if scale is not None and scale.size == 1:
        scale = scale.reshape(())
        if x.dtype != jnp.float64:
            limits, scale = _limits_under(limits, scale), None
    counts, amax_bits = CastCounts.zeros(), jnp.int32(0)
    for part, scale_of_part in _parts(x, scale):
        counted, largest = _counted(*_magnitudes(part, scale_of_part, params), limits)
        counts, amax_bits = counts + counted, jnp.maximum(amax_bits, largest)
    return counts, amax(x) if x.dtype == jnp.float64 else _float(amax_bits)


def _parts(x: jax.Array, scale: jax.Array | None) -> Iterator[tuple[jax.Array, jax.Array | None]]:
    """Flat parts of up to 2^30 elements, with their scales; all as it is where it may be sharded, or of any size."""
    if not is_whole(x) or _is_of_any_size(x):
        yield x, scale
        return
    flat = x.reshape(-1)
    if scale is not None and scale.ndim:
        scale = jnp.broadcast_to(scale, x.shape).reshape(-1)
    for start in range(0, flat.size, _MOST_AT_ONCE):
        yield _part(flat, start), scale if scale is None or scale.ndim == 0 else _part(scale, start)


def _is_of_any_size(x: jax.Array) -> bool:
    """Whether a size is symbolic: in what is exported, and then called with arrays of any."""
    return any(map(is_symbolic_dim, x.shape))


def _size_in_int64(x: jax.Array) -> jax.Array:
    """How many elements there are, where sizes are symbolic: XLA would multiply those in int32."""
    return functools.reduce(lax.mul, [lax.convert_element_type(jnp.asarray(size), jnp.int64) for size in x.shape])


def _magnitudes(x: jax.Array, scale: jax.Array | None, params: FormatParams) -> tuple[jax.Array, jax.Array]:
    """Of elements, and of what is rounded to the grid: as bits of float32.

    float64 is rounded to odd, which is on the side of each edge on which it was; but those of float32 are no float32.
    """
    if x.dtype != jnp.float64:
        single = x.astype(jnp.float32)
        quotient = single if scale is None else divide_by_scale(single, scale)
        return _bits(single) & _MAGNITUDE, _bits(quotient) & _MAGNITUDE
    if params.path == "identity":
        quotient = to_float32_grid(x, params)
    else:
        quotient = float64_to_odd(x if scale is None else scaled_down(x, scale))
    return _bits(float64_to_odd(x)) & _MAGNITUDE, _bits(quotient) & _MAGNITUDE


def _counted(magnitude: jax.Array, scaled: jax.Array, limits: Edges) -> tuple[CastCounts, jax.Array]:
    """Counts of magnitudes, and the largest."""
    is_of_any_size = _is_of_any_size(magnitude)
    if not is_of_any_size and magnitude.size <= _MOST_AT_ONCE:
        seen = _tally(magnitude, scaled, limits).together(magnitude.size)
        return CastCounts.of_tallies(seen), seen[-1]
    # More than int32 counts, but rows of which it does: of what may be sharded, and is not cut for that.
    shape = [is_symbolic_dim(size) for size in magnitude.shape] if is_of_any_size else magnitude.shape
    longest = int(np.argmax(shape))
    others = tuple(axis for axis in range(magnitude.ndim) if axis != longest)
    *rows, largest = _counts_and_max(_marked(magnitude, scaled, limits), others)
    with jax.enable_x64(True):
        sums = [jnp.sum(lax.convert_element_type(row, jnp.int64)) for row in rows]
        parts = TallyParts._make([*sums, jnp.zeros_like(sums[0])])
        size = _size_in_int64(magnitude) if is_of_any_size else magnitude.size
        counts = CastCounts(_limbs(parts.together(size)[:-1]).astype(jnp.int32))
    return counts, lax.reduce(largest, np.int32(0), lax.max, (0,))


def _limits_under(limits: Edges, scale: jax.Array) -> Edges:
    """Limits for the magnitudes of ``x`` itself, so that to count ``x / scale`` takes no more than to count ``x``."""
    return Edges(_first_to_reach(limits.overflows_from, scale), _first_to_reach(limits.vanishes_to + 1, scale) - 1)


def _first_to_reach(limit: jax.Array, scale: jax.Array) -> jax.Array:
    """The smallest magnitude whose quotient is at a limit of at least 1, as bits; quotients do not fall as it grows."""
    last_below = jnp.zeros_like(limit)
    for shift, count in ((20, 1 << 11), (10, 1 << 10), (0, 1 << 10)):
        candidates = last_below + (jnp.arange(count, dtype=jnp.int32) << shift)
        is_below = (_bits(divide_by_scale(_float(candidates), scale)) & _MAGNITUDE) < limit
        last_below = last_below + ((jnp.sum(is_below, dtype=jnp.int32) - 1) << shift)
    return last_below + 1


def _part(flat: jax.Array, start: int) -> jax.Array:
    return flat if flat.size <= _MOST_AT_ONCE else flat[start : start + _MOST_AT_ONCE]


def quantize_with_counts(
    x: jax.Array,
    format: str | Format | FormatParams,
    *,
    scale: jax.typing.ArrayLike | None = None,
    rounding: Rounding = "nearest_even",
    overflow: Overflow = "native",
    random_bits: jax.Array | None = None,
    stochastic_bits: int = STOCHASTIC_BITS,
    saturation_mask: bool = False,
) -> tuple[jax.Array, CastCounts]:
    """:func:`~altgrad_jax.casting.quantize`, and what it did: the two in one call.

    Counted is the cast to nearest even whatever the rounding; arguments are those of the two functions.

    Returns:
        The quantized array, and counts of shape ``()``.

    Raises:
        As :func:`~altgrad_jax.casting.quantize` and :func:`cast_counts`.

    >>> quantized, counts = quantize_with_counts(jnp.array([1.1, 1e6]), "E5M2")
    >>> quantized.tolist(), float(counts.overflow_rate)
    ([1.0, inf], 0.5)
    """
    params = as_params(format, rounding, overflow, stochastic_bits)
    random_bits = checked_random_bits(
        random_bits,
        floating(x, "quantize_with_counts"),
        params,
        None if isinstance(format, FormatParams) else rounding,
    )
    counts, amax = observe(x, params, scale=scale)
    # The cast waits for the counts: else XLA copies a donated x, which the cast would overwrite.
    after = replace(params, max_value=jnp.where(amax < 0, 0, params.max_value))
    quantized = quantize(x, after, scale=scale, random_bits=random_bits, saturation_mask=saturation_mask)
    return quantized, counts


def tally(x: jax.Array, limits: Edges) -> jax.Array:
    """What :func:`observe` sees of up to 2^30 float32 elements, as it comes out of its one pass.

    Args:
        x: float32, any shape.
        limits: where the grid ends, from :func:`edges`.

    Returns:
        int32 of shape ``(6,)``: elements, overflow, nonzero, underflow, nan, and the bits of amax. Many of them,
        stacked, become counts by :meth:`CastCounts.of_tallies` and amaxes by :func:`amax_of_tallies`.

    >>> tally(jnp.array([1e6, 0.5]), edges(FormatParams.from_format("E5M2")))[:-1].tolist()
    [2, 1, 2, 0, 0]
    """
    return tally_parts(x, limits).together(x.size)


class TallyParts(NamedTuple):
    """A tally before it is put together, which costs a kernel: int32 scalars.

    Attributes:
        nan: elements that are NaN.
        overflow_or_nan: those that are, or overflow.
        zero: those that are zero.
        vanishing: those that are, or become zero.
        amax: bits of the largest magnitude.
    """

    nan: jax.Array
    overflow_or_nan: jax.Array
    zero: jax.Array
    vanishing: jax.Array
    amax: jax.Array

    def together(self, size: int | jax.Array) -> jax.Array:
        """The tally of so many elements; see :func:`tally`."""
        overflow, nonzero = self.overflow_or_nan - self.nan, size - self.zero - self.nan
        underflow = self.vanishing - self.zero
        return jnp.stack([jnp.full_like(self.nan, size), overflow, nonzero, underflow, self.nan, self.amax])


_TALLIED = np.array(
    [[1, 0, 0, 0, 0], [0, -1, 1, 0, 0], [1, -1, 0, -1, 0], [0, 0, 0, -1, 1], [0, 1, 0, 0, 0]], dtype=np.int32
)
"""Row by row, how often each count taken in passing is in one that is told: as in :meth:`TallyParts.together`."""


def tallied(counts: jax.Array, order: npt.NDArray[np.intp] | None = None) -> jax.Array:
    """Elements, NaN, overflow or NaN, zero and what vanishes, as elements, overflow, nonzero, underflow and NaN.

    As sums of products: column by column it would take two to three times as long to compile.

    Args:
        counts: int32 of shape ``(..., 5)``, or of more where ``order`` says where these are.
        order: five indices; by default the first five.

    Returns:
        int32 of shape ``(..., 5)``.
    """
    told = np.zeros((5, counts.shape[-1]), np.int32)
    told[:, np.arange(5) if order is None else order] = _TALLIED
    told = told.reshape((1,) * (counts.ndim - 1) + told.shape)
    return jnp.sum(counts[..., None, :] * told, axis=-1, dtype=jnp.int32)


def tally_parts(x: jax.Array, limits: Edges) -> TallyParts:
    """:func:`tally` in parts."""
    magnitude = _bits(x.reshape(-1) if is_whole(x) else x) & _MAGNITUDE
    return _tally(magnitude, magnitude, limits)


def amax_of_tallies(tallies: jax.Array) -> jax.Array:
    """float32 of shape ``(...)``: the largest magnitudes in tallies of shape ``(..., 6)``."""
    return _float(tallies[..., -1])


def _tally(magnitude: jax.Array, scaled: jax.Array, limits: Edges) -> TallyParts:
    """Counts of magnitudes, flat ones or such as may be sharded."""
    if magnitude.ndim != 1 or magnitude.size < _WORTH_SPREADING or not is_whole(magnitude):
        seen = _counts_and_max(_marked(magnitude, scaled, limits))
    else:
        whole = magnitude.size // (_STREAMS * _ROWS) * (_STREAMS * _ROWS)
        apart, scaled_apart = (each[:whole].reshape(_STREAMS, _ROWS, -1) for each in (magnitude, scaled))
        marked = [_marked(apart[k], scaled_apart[k], limits) for k in range(_STREAMS)]
        rows = _counts_and_max(functools.reduce(_both, marked), (1,))
        rest = _counts_and_max(_marked(magnitude[whole:], scaled[whole:], limits))
        seen = _counts_and_max(tuple(jnp.append(*parts) for parts in zip(rows, rest, strict=True)))
    return TallyParts(*seen)


def _marked(magnitude: jax.Array, scaled: jax.Array, limits: Edges) -> tuple[jax.Array, ...]:
    """1 for NaN, overflow or NaN, zero, and what becomes zero, each by a single comparison; and the magnitude."""
    flags = (magnitude > _INF, scaled >= limits.overflows_from, magnitude == 0, scaled <= limits.vanishes_to)
    return (*(flag.astype(jnp.int32) for flag in flags), magnitude)


def _both(left: tuple[jax.Array, ...], right: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Counts and largest magnitude of two parts together."""
    return (*_add_each(left[:-1], right[:-1]), lax.max(left[-1], right[-1]))


def _counts_and_max(parts: tuple[jax.Array, ...], axes: tuple[int, ...] | None = None) -> tuple[jax.Array, ...]:
    """One variadic reduction, which XLA fuses into one loop; separate sums are ten times slower.

    Args:
        parts: what :func:`_marked` gives.
        axes: over which; all by default.
    """
    reduced = tuple(range(parts[0].ndim)) if axes is None else axes
    return lax.reduce(parts, (jnp.int32(0),) * len(parts), _both, reduced)


def stall_counts(
    weight: jax.Array,
    update: jax.Array,
    format: str | Format | FormatParams,
    *,
    scale: jax.typing.ArrayLike | None = None,
    gradient: jax.Array | None = None,
) -> StallCounts:
    """Count the non-zero updates that leave the quantised weight as it was, by cause.

    An update stalls by saturation if the weight is at ±max and the update points outward, else by precision. float32
    subnormals count as zero, as in the arithmetic of XLA's CPU backend.

    Args:
        weight: float32 weights as stored, any shape.
        update: what is added to them: the optimizer's update, not the gradient; same shape.
        format: the grid on which the weights are used.
        scale: the weights' worth of one, a power of two; see :meth:`~altgrad_jax.params.FormatParams.scaled`.
        gradient: if given, updates that are zero where it is not are counted as vanished.

    Returns:
        Counts of shape ``()``.

    Raises:
        ValueError: if the shapes differ, and for a scale that is a number but no power of two.

    >>> w, u = jnp.array([1.0, 1.0, 1.0]), jnp.array([0.5, 1e-3, 0.0])
    >>> stall_counts(w, u, "E5M2").as_integers()
    {'nonzero': 2, 'precision': 1, 'saturation': 0, 'vanished': 0}
    """
    if weight.shape != update.shape:
        raise ValueError(f"weight has shape {weight.shape} but update {update.shape}; expected the same")
    params = as_params(format)
    check_given_scale(scale, power_of_two=True)
    grid = params if scale is None else params.scaled(jnp.asarray(scale, jnp.float32))
    return StallCounts(_limbs(_stall_tally(weight, update, grid, gradient)))


def _stall_tally(weight: jax.Array, update: jax.Array, grid: FormatParams, gradient: jax.Array | None) -> jax.Array:
    """int32 of shape ``(4,)``: nonzero, stalled by precision, stalled by saturation, vanished."""
    weight, update = flush_subnormals(weight.astype(jnp.float32)), flush_subnormals(update.astype(jnp.float32))
    before, after = _nearest(weight, grid), _nearest(weight + update, grid)
    nonzero = _is_normal(update)
    stalled = nonzero & (before == after)
    at_max = stalled & (jnp.abs(before) >= grid.max_value) & ((_bits(before) ^ _bits(update)) >= 0)
    vanished = jnp.zeros_like(nonzero) if gradient is None else ~nonzero & _is_normal(gradient)
    flags = tuple(flag.astype(jnp.int32) for flag in (nonzero, stalled & ~at_max, at_max, vanished))
    if is_whole(weight):
        flags = tuple(flag.reshape(-1) for flag in flags)
    return jnp.stack(lax.reduce(flags, (jnp.int32(0),) * 4, _add_each, tuple(range(flags[0].ndim))))


class StallMonitorState(NamedTuple):
    """State of :func:`stall_monitor`.

    Attributes:
        format: the grid; replace it with :func:`altgrad_jax.control.set_format`.
        stall_rate: float32, of the last update.
        saturation_rate: float32, the part of it that stalled at ±max.
        stall_rates: float32 ``(leaves,)``, of each leaf that counts, in the order of the tree.
        saturation_rates: float32 ``(leaves,)``, likewise.
    """

    format: FormatParams
    stall_rate: jax.Array
    saturation_rate: jax.Array
    stall_rates: jax.Array
    saturation_rates: jax.Array


def stall_monitor(
    format: str | Format | FormatParams,
    mask: optax.Params | None = None,
    *,
    axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Measure, at the end of a chain, how many of the real updates leave the quantised weights as they were.

    Each leaf is judged on the grid of the format under the power-of-two scale of its own amax; counts are pooled over
    leaves. Updates pass untouched. Read the rate with ``optax.tree.get(state, "stall_rate")``.

    Args:
        format: the grid on which the weights are used or stored; for one of its own for each leaf that counts,
            :meth:`FormatParams.for_each`, in the order of the tree.
        mask: pytree of Python bools like the parameters: which leaves count; all by default.
        axis_name: inside ``shard_map``, the axes over which leaves are parts of larger ones; see
            :func:`altgrad_jax.global_norm`. The rate is then that of whole leaves, each under the scale of its whole.

    Returns:
        A transformation whose ``update`` needs the parameters.

    Raises:
        ValueError: from ``update`` if it is not given the parameters.
        InputError: from ``init`` for another number of formats than of leaves.

    >>> tx = optax.chain(optax.sgd(1e-4), stall_monitor("E5M2"))
    >>> params = {"w": jnp.ones(4)}
    >>> _, state = tx.update(params, tx.init(params), params)
    >>> float(optax.tree.get(state, "stall_rate"))
    1.0
    """
    initial = as_params(format)

    def chosen_in(params: optax.Params) -> list[bool]:
        return [True] * len(jax.tree.leaves(params)) if mask is None else jax.tree.leaves(mask)

    def init(params: optax.Params) -> StallMonitorState:
        count = sum(chosen_in(params))
        check_one_for_each(initial, count)
        nothing = jnp.zeros(count, jnp.float32)
        zeros = (jnp.float32(0), jnp.float32(0), nothing, jnp.copy(nothing))
        return StallMonitorState(jax.tree.map(jnp.copy, initial), *zeros)

    def update(
        updates: optax.Updates, state: StallMonitorState, params: optax.Params | None = None, **extra_args: object
    ) -> tuple[optax.Updates, StallMonitorState]:
        del extra_args
        if params is None:
            raise ValueError("stall_monitor needs the parameters: call update(updates, state, params)")
        leaves = zip(jax.tree.leaves(params), jax.tree.leaves(updates), chosen_in(params), strict=True)
        pairs = [(weight, change) for weight, change, counted in leaves if counted]
        if not pairs:  # ``optax.partition`` may have nothing for a label
            return updates, state
        # All scales at once: one by one, these few scalars would cost more than the passes over small weights.
        weights = [weight for weight, _ in pairs]
        amaxes = largest_over(jnp.stack([amax(weight) for weight in weights]), axis_name)
        grids = state.format.scaled(power_of_two_scale(amaxes, state.format.max_value))
        tallies = [_stall_tally(weight, change, grids.at(k), None) for k, (weight, change) in enumerate(pairs)]
        each = StallCounts(_limbs_over(tallies, weights, axis_name))
        total = each.pooled()
        rates = (total.stall_rate, total.saturation_rate, each.stall_rate, each.saturation_rate)
        return updates, StallMonitorState(state.format, *rates)

    # optax types every state as any pytree, its own states included.
    return optax.GradientTransformationExtraArgs(init, update)  # pyrefly: ignore[bad-argument-type]


def _limbs_over(tallies: Sequence[jax.Array], leaves: Sequence[jax.Array], axis_name: AxisName | None) -> jax.Array:
    """int32 of shape ``(leaves, 4, 2)``, counts of whole leaves, from tallies of the parts that one place holds."""
    if axis_name is None:
        return _limbs(jnp.stack(tallies))
    groups = by_axes(leaves, axis_name)
    with jax.enable_x64(True):
        totals = [
            sum_over(jnp.stack([tallies[k] for k in group]).astype(jnp.int64), axes) for axes, group in groups.items()
        ]
        in_order = jnp.concatenate(totals)[np.argsort(np.concatenate(list(groups.values())))]
        return _limbs(in_order).astype(jnp.int32)


def _nearest(x: jax.Array, params: FormatParams) -> jax.Array:
    """Cast to nearest even and saturate, whatever rounding and overflow the params carry."""
    if params.path == "identity":
        return x
    steady = replace(params, overflow=jnp.full_like(params.overflow, 1), rounding=jnp.zeros_like(params.rounding))
    return cast(x, steady)


def _is_normal(x: jax.Array) -> jax.Array:
    """Whether ``x`` is neither zero nor subnormal. Not ``!= 0``, which LLVM may turn into a float comparison."""
    return (_bits(x.astype(jnp.float32)) & _MAGNITUDE) >= 1 << 23


def _add_each(left: Sequence[jax.Array], right: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    return tuple(a + b for a, b in zip(left, right, strict=True))


def _pooled(limbs: jax.Array) -> jax.Array:
    """Sum over the first axis of up to 2^15, in halves of limbs, whose sums cannot wrap."""
    shift, mask = (np.array(each, np.int32).reshape((1,) * limbs.ndim + (2,)) for each in ((0, 15), (0x7FFF, -1)))
    halves = (limbs[..., None] >> shift) & mask
    sums = jnp.sum(halves, 0, dtype=jnp.int32)  # where x64 is on it would be int64
    low, middle = sums[..., 1, 0], sums[..., 1, 1]
    high = sums[..., 0, 0] + (sums[..., 0, 1] << 15) + (middle >> 15)
    return _carried(high, low + ((middle & 0x7FFF) << 15))


def _limbs(counts: jax.Array) -> jax.Array:
    return limbs_beside(counts >> _LIMB_BITS, counts & _LIMB_MASK)


def _carry(limbs: jax.Array) -> jax.Array:
    return _carried(limbs[..., 0], limbs[..., 1])


def _carried(high: jax.Array, low: jax.Array) -> jax.Array:
    return limbs_beside(high + (low >> _LIMB_BITS), low & _LIMB_MASK)


def limbs_beside(high: jax.Array, low: jax.Array) -> jax.Array:
    """High and low limbs of shape ``(...)`` in one array of shape ``(..., 2)``.

    By a choice, which is one kernel with what makes them; put side by side they would be one more each to compile.
    """
    which = lax.broadcasted_iota(jnp.int32, (*high.shape, 2), high.ndim)
    return jnp.where(which == 0, high[..., None], low[..., None])


def _ratio(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """Quotient of two counts in limbs, through float64 so that the rounding to float32 is the only one that shows."""
    with jax.enable_x64(True):
        above, below = _as_float64(numerator), _as_float64(denominator)
        quotient = above / jnp.where(below == 0, 1, below)
        return lax.convert_element_type(jnp.where(below == 0, 0, quotient), jnp.float32)


def _as_float64(limbs: jax.Array) -> jax.Array:
    wide = lax.convert_element_type(limbs, jnp.float64)
    return wide[..., 0] * float(1 << _LIMB_BITS) + wide[..., 1]


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.int32)


def _float(bits: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(bits, jnp.float32)

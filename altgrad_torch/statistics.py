"""What a cast or an update does to a tensor, counted on its device: overflow, underflow, NaN, stall.

Counts are int64 and exact. Rates are quotients of counts, formed in float64 and rounded once to float32.
``altgrad_jax/statistics.py`` says the same thing in JAX, where a count takes two int32.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, reduce
from itertools import repeat
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from altgrad_core.errors import InputError
from altgrad_core.formats import STOCHASTIC_BITS, Format, Overflow, Rounding, parse
from altgrad_core.reference import round_to_format
from altgrad_torch.casting import (
    as_grid,
    cast,
    check_floating,
    checked_scale,
    divide_by_scale,
    float64_to_odd,
    flush_subnormals,
    is_float32,
    quantize,
    scaled_down,
    without_negative_bit,
)
from altgrad_torch.conversions import is_read_within
from altgrad_torch.cpu import CHUNK_OF_ONE_THREAD, count_magnitudes, is_plain
from altgrad_torch.params import Edges, FormatParams, edges
from altgrad_torch.scaling import amax, power_of_two_scale
from altgrad_torch.shards import is_sharded, local, local_beside, over_shards, summed

_MAGNITUDE = 0x7FFFFFFF
_INF = 0x7F800000
_READ_AS_THEY_LIE = (torch.float32, torch.bfloat16, torch.float16)
_IMPLICIT_ONE = 1 << 23
_CHUNK = 1 << 20
"""Elements counted at a time, which bounds the memory of temporaries, where several threads count them."""
_CHUNK_ON_GPU = 1 << 25
"""The same on a GPU, where to launch a chunk's operations costs more than to do them: 0.5 GB of temporaries."""


@dataclass(frozen=True, eq=False)
class CastCounts:
    """What a cast did to the elements of one tensor or, added up, of many.

    Attributes:
        totals: int64 of shape ``(..., 5)``: elements, overflow, nonzero, underflow and nan. NaN is in elements and in
            nan only. Leading axes are tensors counted apart; :meth:`pooled` adds them up.
    """

    totals: Tensor

    @classmethod
    def zeros(cls, shape: tuple[int, ...] = ()) -> Self:
        """Counts of nothing, for ``shape`` tensors apart."""
        return cls(torch.zeros((*shape, 5), dtype=torch.int64))

    def __add__(self, other: Self) -> Self:
        """Add counts of the same shape."""
        return type(self)(self.totals + other.totals)

    def pooled(self) -> Self:
        """Counts of all tensors together, of shape ``()``."""
        return type(self)(self.totals.reshape(-1, 5).sum(0))

    @property
    def overflow_rate(self) -> Tensor:
        """float32: elements that overflow, infinities included, over elements."""
        return _ratio(self.totals[..., 1], self.totals[..., 0])

    @property
    def underflow_rate(self) -> Tensor:
        """float32: non-zero elements that become zero over non-zero elements."""
        return _ratio(self.totals[..., 3], self.totals[..., 2])

    @property
    def nan_rate(self) -> Tensor:
        """float32: NaN elements over elements."""
        return _ratio(self.totals[..., 4], self.totals[..., 0])

    def as_integers(self) -> dict[str, list[int] | int]:
        """The exact counts as Python integers, read from the device."""
        names = ("elements", "overflow", "nonzero", "underflow", "nan")
        return {name: self.totals[..., k].tolist() for k, name in enumerate(names)}


@dataclass(frozen=True, eq=False)
class StallCounts:
    """What became of the updates of one tensor or, added up, of many.

    Attributes:
        totals: int64 of shape ``(..., 4)``: nonzero updates, stalled by precision, stalled by saturation, and vanished
            (update zero where the gradient was not).
    """

    totals: Tensor

    @classmethod
    def zeros(cls) -> Self:
        """Counts of nothing."""
        return cls(torch.zeros(4, dtype=torch.int64))

    def __add__(self, other: Self) -> Self:
        """Add counts of the same shape."""
        return type(self)(self.totals + other.totals)

    def pooled(self) -> Self:
        """Counts of all tensors together, of shape ``()``."""
        return type(self)(self.totals.reshape(-1, 4).sum(0))

    @property
    def stall_rate(self) -> Tensor:
        """float32: non-zero updates that leave the quantised weight as it was over non-zero updates; 0 without any."""
        return _ratio(self.totals[..., 1] + self.totals[..., 2], self.totals[..., 0])

    @property
    def saturation_rate(self) -> Tensor:
        """float32: updates stalled because the weight sits at ±max over non-zero updates."""
        return _ratio(self.totals[..., 2], self.totals[..., 0])

    def as_integers(self) -> dict[str, list[int] | int]:
        """The exact counts as Python integers, read from the device."""
        names = ("nonzero", "precision", "saturation", "vanished")
        return {name: self.totals[..., k].tolist() for k, name in enumerate(names)}


def cast_counts(x: Tensor, format: str | Format | FormatParams, *, scale: Tensor | float | None = None) -> CastCounts:
    """Count what a cast of ``x`` does, without casting.

    Counted is the cast to nearest even. Measure against a delayed or static scale: under a tensor's own current amax
    nothing ever overflows. For a format without a sign magnitudes are counted, and none becomes zero.

    Args:
        x: floating-point tensor of any shape; bfloat16, float16 and float64 count at their own values. Of a DTensor all
            shards count, on every process.
        format: a name, a :class:`~altgrad_core.formats.Format` or :class:`~altgrad_torch.params.FormatParams`.
        scale: the worth of one, positive, a power of two; counted is ``x / scale``. One for all of a DTensor.

    Returns:
        Counts of shape ``()``.

    Raises:
        TypeError: if ``x`` is not floating point.
        InputError: for several scales with a DTensor.
        UnknownFormatError: for an unknown name.

    >>> cast_counts(torch.tensor([1e6, 1.0, 1e-9, 0.0]), "E5M2").as_integers()
    {'elements': 4, 'overflow': 1, 'nonzero': 3, 'underflow': 1, 'nan': 0}
    """
    return observe(x, format, scale=scale)[0]


def quantize_with_counts(
    x: Tensor,
    format: str | Format | FormatParams,
    *,
    scale: Tensor | float | None = None,
    rounding: Rounding = "nearest_even",
    overflow: Overflow = "native",
    random_bits: Tensor | None = None,
    stochastic_bits: int = STOCHASTIC_BITS,
    saturation_mask: bool = False,
) -> tuple[Tensor, CastCounts]:
    """The cast of ``x`` and the counts of its cast to nearest even, in one call.

    Args:
        x: floating-point tensor of any shape.
        format: as all arguments, see :func:`altgrad_torch.casting.quantize`.
        scale: a power of two, for the counts to be exact.
        rounding: of the cast; the counts are those of ``nearest_even``, whatever it is.
        overflow: see there.
        random_bits: see there.
        stochastic_bits: see there.
        saturation_mask: see there.

    Returns:
        What :func:`altgrad_torch.casting.quantize` and what :func:`cast_counts` return.

    Raises:
        TypeError: as either of them.
        ValueError: likewise.

    >>> values, counts = quantize_with_counts(torch.tensor([1e6, 1.1]), "E5M2")
    >>> values.tolist(), float(counts.overflow_rate)
    ([inf, 1.0], 0.5)
    """
    counts = cast_counts(x, format, scale=scale)
    quantized = quantize(
        x,
        format,
        scale=scale,
        rounding=rounding,
        overflow=overflow,
        random_bits=random_bits,
        stochastic_bits=stochastic_bits,
        saturation_mask=saturation_mask,
    )
    return quantized, counts


def observe(
    x: Tensor, format: str | Format | FormatParams, *, scale: Tensor | float | None = None
) -> tuple[CastCounts, Tensor]:
    """The counts of a cast and the largest magnitude of ``x``; see :func:`cast_counts`.

    Returns:
        The counts, and amax = max(|x|) as a float32 scalar: inf if ``x`` holds an infinity, NaN if it holds a NaN, 0
        if it is empty.

    >>> float(observe(torch.tensor([1.0, -3.0]), "E5M2")[1])
    3.0
    """
    check_floating(x, "cast_counts")
    if is_sharded(x):
        return _observe_shards(x, format, scale)
    x = without_negative_bit(x)
    grid = as_grid(format)
    unit = None if scale is None else checked_scale(scale, x)
    if torch.compiler.is_compiling():
        params = grid if isinstance(grid, FormatParams) else FormatParams.from_format(grid, device=x.device)
        return _observe_by_chunks(x, params, edges(params), unit)
    limits = _limits(grid)
    if x.dtype in _READ_AS_THEY_LIE:
        plain_limits = _limits_of_magnitudes(x, limits, unit)
        if plain_limits is not None:
            return _observe_on_cpu(x, *plain_limits)
    return _observe_by_chunks(x, grid, limits, unit)


def _limits(grid: Format | FormatParams) -> Edges:
    return edges(grid) if isinstance(grid, FormatParams) else _thresholds(grid)


def overflow_rate(
    tensors: Iterable[Tensor] | Tensor, format: str | Format | FormatParams, *, scale: Tensor | float | None = None
) -> Tensor:
    """The fraction of all elements of all tensors that a cast overflows, infinities included: what clippers take.

    The same as the pooled rate of :func:`cast_counts`; but a CPU's tensor in which nothing overflows is only read, by
    torch, for its largest magnitude.

    Args:
        tensors: floating-point tensors of any shapes, such as gradients; see :func:`cast_counts`.
        format: see there.
        scale: see there; the same for all.

    Returns:
        float32 scalar, on the device of the first tensor.

    Raises:
        ValueError: if there are no tensors.
        TypeError: if one is not floating point.
        UnknownFormatError: for an unknown name.

    >>> float(overflow_rate([torch.tensor([1e6, 1.0]), torch.zeros(2)], "E5M2"))
    0.25
    """
    listed = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    if not listed:
        raise InputError("there are no tensors to take a rate of; expected at least one")
    device = listed[0].device
    seen = torch.stack([_elements_and_overflows(each, format, scale).to(device) for each in listed]).sum(0)
    return _ratio(seen[1], seen[0])


def _elements_and_overflows(x: Tensor, format: str | Format | FormatParams, scale: Tensor | float | None) -> Tensor:
    if x.dtype in _READ_AS_THEY_LIE and not torch.compiler.is_compiling():
        of_magnitudes = _limits_of_magnitudes(
            x, _limits(as_grid(format)), None if scale is None else checked_scale(scale, x)
        )
        if of_magnitudes is not None and is_read_within(x, _float_of(of_magnitudes[0] - 1)):
            return torch.tensor([x.numel(), 0], device=x.device)
    return observe(x, format, scale=scale)[0].totals[:2]


def _observe_on_cpu(x: Tensor, overflows_from: int, vanishes_to: int) -> tuple[CastCounts, Tensor]:
    seen, elements = count_magnitudes(x, overflows_from, vanishes_to), x.numel()
    totals = [elements, seen.large, elements - seen.zero - seen.nan, seen.small - seen.zero, seen.nan]
    amax_bits = torch.tensor(seen.largest, dtype=torch.int32, device=x.device)
    return CastCounts(torch.tensor(totals, dtype=torch.int64, device=x.device)), amax_bits.view(torch.float32)


def _observe_by_chunks(
    x: Tensor, grid: Format | FormatParams, limits: Edges, unit: Tensor | None
) -> tuple[CastCounts, Tensor]:
    flat = x.detach().reshape(-1)
    totals, amax_bits = flat.new_zeros(5, dtype=torch.int64), flat.new_zeros((), dtype=torch.int32)
    if unit is not None and unit.numel() > 1:
        unit = unit.expand(x.shape).reshape(-1)
    size = max(flat.numel(), 1) if torch.compiler.is_compiling() else _chunk_on(x.device)
    for start in range(0, flat.numel(), size):
        part = slice(start, start + size)
        part_unit = unit if unit is None or unit.numel() == 1 else unit[part]
        counted, part_amax = _observe_chunk(*_magnitudes(flat[part], grid, part_unit), limits)
        totals = totals + counted
        amax_bits = torch.maximum(amax_bits, part_amax)
    return CastCounts(totals), amax(x) if x.dtype == torch.float64 else amax_bits.view(torch.float32)


def _magnitudes(x: Tensor, grid: Format | FormatParams, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of elements, and of what is rounded to the grid: as bits of float32.

    float64 is rounded to odd, which is on the side of each edge on which it was; but those of float32 are no float32.
    """
    if x.dtype != torch.float64:
        single = x.to(torch.float32)
        quotient = single if scale is None else divide_by_scale(single, scale)
    else:
        single = float64_to_odd(x)
        if is_float32(grid):
            quotient = cast(x, grid, rounding="nearest_even", overflow="native")
        else:
            quotient = single if scale is None else float64_to_odd(scaled_down(x, scale))
    return single.view(torch.int32) & _MAGNITUDE, quotient.view(torch.int32) & _MAGNITUDE


def _chunk_on(device: torch.device) -> int:
    if device.type != "cpu":
        return _CHUNK_ON_GPU
    return CHUNK_OF_ONE_THREAD if torch.get_num_threads() == 1 else _CHUNK


def _observe_shards(
    x: Tensor, format: str | Format | FormatParams, scale: Tensor | float | None
) -> tuple[CastCounts, Tensor]:
    _check_one_scale(scale)
    whole = summed(x)
    counts, largest = observe(local(whole), format, scale=scale)
    return CastCounts(over_shards([counts.totals], [whole], "sum")[0]), over_shards([largest], [whole], "max")[0]


def _check_one_scale(scale: Tensor | float | None) -> None:
    if isinstance(scale, Tensor) and scale.numel() > 1:
        raise InputError(f"{scale.numel()} scales for a DTensor; expected one for all of it")


def _observe_chunk(magnitude: Tensor, scaled: Tensor, limits: Edges) -> tuple[Tensor, Tensor]:
    nonzero = (magnitude != 0) & (magnitude <= _INF)
    flags = (
        torch.ones_like(nonzero),
        (scaled >= limits.overflows_from) & (magnitude <= _INF),
        nonzero,
        nonzero & (scaled <= limits.vanishes_to),
        magnitude > _INF,
    )
    return torch.stack([torch.count_nonzero(flag) for flag in flags]), magnitude.amax()


def _limits_of_magnitudes(x: Tensor, limits: Edges, unit: Tensor | None) -> tuple[int, int] | None:
    """Limits for the magnitudes of ``x`` itself, whatever its scale; None where they cannot be read, or are several."""
    if not all(is_plain(each) for each in (x, unit, *limits) if isinstance(each, Tensor)):
        return None
    overflows_from, vanishes_to = int(limits.overflows_from), int(limits.vanishes_to)
    if unit is None:
        return overflows_from, vanishes_to
    if unit.numel() != 1:
        return None
    field, rest = divmod(int(unit.reshape(()).view(torch.int32)), _IMPLICIT_ONE)
    if rest or not 0 < field < 255:
        return None
    exponent = field - 127
    return _first_to_reach(overflows_from, exponent), _first_to_reach(vanishes_to + 1, exponent) - 1


def _first_to_reach(limit: int, exponent: int) -> int:
    """The smallest magnitude whose quotient by a power of two, as :func:`divide_by_scale` has it, is at a limit.

    In integers, because a processor may flush the smallest. No quotient lies between a limit and the float32 before it.
    """
    limit = max(limit, _IMPLICIT_ONE)  # quotients below 2^-126 are zero
    field = (limit >> 23) + exponent
    if limit >= _INF or field >= 255:
        return _INF
    if field > 0:
        return limit + (exponent << 23)
    significand = (limit & (_IMPLICIT_ONE - 1)) | _IMPLICIT_ONE
    return -(-significand >> (1 - field))


@lru_cache(maxsize=256)
def _thresholds(format: Format) -> Edges:
    """Bits of the smallest magnitude that overflows and of the largest that becomes zero, from the definition."""
    if format.cast_path == "identity":
        return Edges(_INF, 0)
    half_quantum = math.ldexp(0.5, max(format.max_exponent, format.min_exponent) - format.mantissa_bits)
    tie = format.max_representable_value + half_quantum
    goes_up = bool(format.max_code & 1)

    def overflows(bits: int) -> bool:
        return _float_of(bits) > tie or (goes_up and _float_of(bits) == tie)

    def survives(bits: int) -> bool:
        return round_to_format(_float_of(bits), format, overflow="saturate") >= 2.0**-126

    magnitudes = range(_INF + 1)
    vanishes_to = bisect_left(magnitudes, True, key=survives) - 1 if format.is_signed else 0
    return Edges(bisect_left(magnitudes, True, key=overflows), vanishes_to)


def stall_counts(
    weight: Tensor,
    update: Tensor,
    format: str | Format | FormatParams,
    *,
    scale: Tensor | float | None = None,
    gradient: Tensor | None = None,
) -> StallCounts:
    """Count the non-zero updates that leave the quantised weight as it was, by cause.

    An update stalls by saturation if the weight is at ±max and the update points outward, else by precision. float32
    subnormals count as zero, as in the arithmetic of XLA's CPU backend.

    Args:
        weight: float32 weights as stored, any shape.
        update: what is added to them: the optimizer's update, not the gradient; same shape.
        format: the grid on which the weights are used.
        scale: the weights' worth of one.
        gradient: if given, updates that are zero where it is not are counted as vanished.

    Returns:
        Counts of shape ``()``.

    Raises:
        ValueError: if the shapes differ.

    >>> w, u = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([0.5, 1e-3, 0.0])
    >>> stall_counts(w, u, "E5M2").as_integers()
    {'nonzero': 2, 'precision': 1, 'saturation': 0, 'vanished': 0}
    """
    if weight.shape != update.shape:
        raise ValueError(f"weight has shape {tuple(weight.shape)} but update {tuple(update.shape)}; expected the same")
    if is_sharded(weight):
        _check_one_scale(scale)
        whole = summed(weight)
        moved, slope = local_beside(update, whole), local_beside(gradient, whole)
        assert moved is not None
        counts = stall_counts(local(whole), moved, format, scale=scale, gradient=slope)
        return StallCounts(over_shards([counts.totals], [whole], "sum")[0])
    grid = as_grid(format)
    unit = checked_scale(1.0 if scale is None else scale, weight)
    return StallCounts(_sum(_stalls(grid, *part) for part in _in_cache(weight, update, unit, gradient)))


def _stalls(
    grid: Format | FormatParams, weight: Tensor, update: Tensor, unit: Tensor, gradient: Tensor | None
) -> Tensor:
    maximum = grid.max_value if isinstance(grid, FormatParams) else grid.max_representable_value
    weight, update = _normal(weight), _normal(update)
    before = _nearest(divide_by_scale(weight, unit), grid)
    after = _nearest(divide_by_scale(weight + update, unit), grid)
    nonzero = update != 0
    stalled = nonzero & (before == after)
    outward = torch.signbit(before) == torch.signbit(update)
    at_max = stalled & outward & (before.abs() >= maximum)
    vanished = torch.zeros_like(nonzero) if gradient is None else ~nonzero & (_normal(gradient) != 0)
    flags = (nonzero, stalled & ~at_max, at_max, vanished)
    return torch.stack([torch.count_nonzero(flag) for flag in flags])


def _in_cache(x: Tensor, *beside: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """``x`` and what broadcasts against it, a cache's worth at a time where one thread does it all; else at once."""
    tensors, size = [each for each in (x, *beside) if each is not None], CHUNK_OF_ONE_THREAD
    at_once = torch.compiler.is_compiling() or x.numel() <= size or torch.get_num_threads() > 1
    if at_once or not all(map(is_plain, tensors)):
        yield x, *beside
        return

    def parts(each: Tensor | None) -> Iterable[Tensor | None]:
        if each is None or each.numel() == 1:
            return repeat(each)
        return each.detach().expand(x.shape).reshape(-1).split(size)

    yield from zip(*map(parts, (x, *beside)), strict=False)


class BitStallDetector:
    """Measures what became of the updates that an optimizer made, on the grid of a format.

    Each parameter is looked at under its own power-of-two scale, from its amax before the step. torch optimizers keep
    their update to themselves, so it is read off the parameters: the difference that the step made. An element that did
    not move at all although it had a gradient counts as stalled by precision: its update was lost in the addition
    already. (``altgrad_jax.stall_monitor`` sees the update itself, and tells that from an update of zero.)

    Args:
        format: a name or a :class:`~altgrad_core.formats.Format`.

    Attributes:
        format: the format on whose grid updates are judged; may be replaced between steps.
        counts: :class:`StallCounts` of the last step watched, summed over all parameters; zeros before the first.

    Raises:
        UnknownFormatError: for an unknown name.

    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    >>> model(torch.ones(2)).backward()
    >>> detector = BitStallDetector("E5M2")
    >>> with detector.watch(model):
    ...     optimizer.step()
    >>> detector.stall_rate
    1.0
    """

    def __init__(self, format: str | Format) -> None:
        self.format = parse(format)
        self.counts = StallCounts.zeros()

    @property
    def stall_rate(self) -> float:
        """Non-zero updates of the last step that left the quantised weight as it was over non-zero updates."""
        return float(self.counts.stall_rate)

    @contextmanager
    def watch(self, model: torch.nn.Module | Iterable[Tensor]) -> Iterator[None]:
        """Watch the parameters while the body updates them.

        If the body raises, nothing is measured and the counts are zeros.

        Args:
            model: a module, or its parameters. Gradients there at the start tell which elements should have moved.
        """
        self.counts = StallCounts.zeros()
        parameters = list(model.parameters() if isinstance(model, torch.nn.Module) else model)
        snapshots = [(parameter, parameter.detach().clone(), parameter.grad) for parameter in parameters]
        yield
        counted = [self._count(*snapshot).totals for snapshot in snapshots]
        if counted:
            self.counts = StallCounts(torch.stack([totals.to(counted[0].device) for totals in counted])).pooled()

    def _count(self, parameter: Tensor, before: Tensor, gradient: Tensor | None) -> StallCounts:
        own, slope = local(before), local_beside(gradient, before) if is_sharded(before) else gradient
        largests = (part.abs().amax() for (part,) in _in_cache(own) if part.numel())
        largest = reduce(torch.maximum, largests, own.new_zeros(())).to(torch.float32)
        largest = over_shards([largest], [before], "max")[0]
        scale = power_of_two_scale(largest, self.format.max_representable_value)
        totals = _sum(self._stalls(scale, *part) for part in _in_cache(own, local(parameter), slope))
        return StallCounts(over_shards([totals], [before], "sum")[0])

    def _stalls(self, scale: Tensor, before: Tensor, after: Tensor, gradient: Tensor | None) -> Tensor:
        before, after = before.to(torch.float32), after.to(torch.float32)
        totals = stall_counts(before, after - before, self.format, scale=scale).totals
        if gradient is None:
            return totals
        absorbed = torch.count_nonzero((before == after) & (_normal(gradient) != 0))
        return totals + torch.stack([absorbed, absorbed, absorbed * 0, absorbed * 0])


def _sum(totals: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, totals)


def _normal(x: Tensor) -> Tensor:
    return flush_subnormals(x.detach().to(torch.float32))


def _nearest(x: Tensor, format: Format | FormatParams) -> Tensor:
    return cast(x, format, overflow="saturate")


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Quotient of two counts, through float64 so that the rounding to float32 is the only one that shows."""
    quotient = numerator.to(torch.float64) / denominator.clamp_min(1).to(torch.float64)
    return quotient.masked_fill(denominator == 0, 0.0).to(torch.float32)


def _float_of(bits: int) -> float:
    return float(np.int32(bits).view(np.float32))

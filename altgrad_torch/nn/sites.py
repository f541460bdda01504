"""One place in a layer where a tensor is cast: its format and its scale as data, and what was seen of it in a step.

The state lies in buffers, so that it is saved, moved and copied as a module's state is, and a controller that writes
another format compiles nothing again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from altgrad_core.cast_options import check_options, granularity_options, scaling_options, write_options
from altgrad_core.errors import InputError
from altgrad_core.formats import FORMAT_REGISTRY, Format, parse
from altgrad_core.rules import DEFAULT_WINDOW, CastSpec, Operand, check_serves, check_written
from altgrad_core.scaling import Granularity, PerBlock, PerChannel, PerTensor
from altgrad_torch.casting import cast, quantize
from altgrad_torch.cpu import is_plain, under_transforms
from altgrad_torch.granularity import amaxes, spread
from altgrad_torch.hashing import hash_bits
from altgrad_torch.packing import PackedTensor, pack_tensor
from altgrad_torch.params import FormatParams
from altgrad_torch.scaling import Current, Delayed, Scaling, Static
from altgrad_torch.statistics import CastCounts, observe

OPTIONS_KEY = "_extra_state"
"""What ``state_dict()`` calls the options of a cast, as torch names whatever is no tensor of a module."""


@dataclass(frozen=True)
class Placement:
    """Where a site is, and of what shape its scales are.

    Attributes:
        operand: what is cast there.
        granularity: which elements share a scale, axes counted from the last.
        scales: shape of the scales, which broadcasts against whatever is cast; ``()`` where they are not kept.
        seed: of random bits for stochastic rounding; of no other site.
    """

    operand: Operand
    granularity: Granularity = field(default_factory=PerTensor)
    scales: tuple[int, ...] = ()
    seed: int = 0


class Tally:
    """What was seen at a site since recording began: counts of its casts, and largest magnitudes.

    No buffers, since what processes saw must not be overwritten by what the first of them saw.

    Attributes:
        totals: int64 of shape ``(5,)``, see :class:`~altgrad_torch.statistics.CastCounts`.
        amax: float32 of the shape of the scales.
    """

    def __init__(self, scales: tuple[int, ...], device: torch.device) -> None:
        self.totals = torch.zeros(5, dtype=torch.int64, device=device)
        self.amax = torch.zeros(scales, dtype=torch.float32, device=device)

    def add(self, counts: CastCounts, amax: Tensor) -> None:
        """Enter one more tensor; NaN stays."""
        self.totals.add_(counts.totals)
        self.amax.copy_(torch.maximum(self.amax, amax.reshape(self.amax.shape)))


class Site(nn.Module):
    """A cast with its state. A module for its state's sake: it is never called, :meth:`cast` is.

    Args:
        spec: how it casts.
        placement: where it is.
        device: of the state.

    Attributes:
        grid: int32, the format by all its numbers.
        scale: float32, the scale in use until the next update; of current scaling, which keeps none, an unused 1.
        history: float32, amaxes of the last steps, oldest first; None unless scaling is delayed.
        step: int64, how many steps were recorded, which random bits depend on; None unless rounding is stochastic.
        tally: what was seen in this step; None while nothing records.

    Raises:
        InputError: for a scaling that is none, or that blocks or the shape of scales cannot have.
    """

    grid: Tensor
    scale: Tensor
    history: Tensor
    step: Tensor | None
    _intact: tuple[Tensor, int] | None = None
    """The grid, and which version of it, that is known to be one of a format."""
    _format_on_meta: Format
    """The format while the grid is on the meta device, where it has no numbers."""

    def __init__(self, spec: CastSpec, placement: Placement, device: torch.device | None = None) -> None:
        super().__init__()
        self.scaling = _scaling_of(spec, placement)
        self.placement, self.rounding, self.overflow = placement, spec.rounding, spec.overflow
        params = FormatParams.from_format(spec.format)
        self._params_type, self.path = type(params), params.path
        self._format_on_meta = spec.format
        self.register_buffer("grid", torch.zeros(_NUMBERS, dtype=torch.int32, device=device))
        history = self.scaling.init(placement.scales)
        self.register_buffer("history", None if history is None else history.to(device))
        self.register_buffer("scale", torch.ones(placement.scales, dtype=torch.float32, device=device))
        steps = torch.zeros((), dtype=torch.int64, device=device) if spec.rounding == "stochastic" else None
        self.register_buffer("step", steps)
        self.tally: Tally | None = None
        self._was_recorded = False
        self._begin(spec.format)
        # A hook anywhere in a TransformerEncoderLayer keeps it from calling one fused kernel in place of its layers.
        self.register_forward_pre_hook(_keeps_layers_from_being_bypassed)

    @property
    def format(self) -> Format:
        """The format, read from the device.

        Raises:
            InputError: if the numbers of the grid are those of none.
        """
        return self._format_on_meta if self.grid.is_meta else format_of(self.grid)

    def set_format(self, format: str | Format) -> None:
        """Cast to another format from now on, at the scale that the amaxes seen so far give it.

        Raises:
            UnknownFormatError: for an unknown name.
            InputError: for a format that code compiled for the present one cannot serve, such as bf16 after E4M3, and
                for float32, which casts nothing.
        """
        resolved = self.check_format(format)
        if self.grid.is_meta:
            self._format_on_meta = resolved
        self.grid.copy_(torch.tensor(_numbers_of(resolved), dtype=torch.int32))
        self._rescale()

    def check_format(self, format: str | Format) -> Format:
        """The format, if this site can go over to it.

        Raises:
            UnknownFormatError: for an unknown name.
            InputError: see :meth:`set_format`.
        """
        resolved = parse(format)
        check_written(resolved)
        try:
            FormatParams.from_format(resolved, path=self.path)
        except InputError:
            raise InputError(
                f"a cast to {self.format} cannot go over to {resolved}, which takes other code (path "
                f"{resolved.cast_path!r}, not {self.path!r}); expected dequantize_model, and quantize_model by a rule "
                f"with {resolved}"
            ) from None
        return resolved

    def describe_scaling(self) -> str:
        """Where its scales come from, in words."""
        return (
            f"delayed {self.scaling.window}"
            if isinstance(self.scaling, Delayed)
            else type(self.scaling).__name__.lower()
        )

    def cast(self, x: Tensor) -> Tensor:
        """The values of ``x`` in the format, and their gradients straight through; recorded while something records.

        Raises:
            InputError: where a recording would lose what is seen here, or what is computed would not fit it; and for a
                state that something averaged.
        """
        if x.numel() == 0:
            return x
        if not torch.compiler.is_compiling():
            self._check_intact()
        scale = self._scale_for(x)
        moved = self._moved_grid(x, scale)
        grid, unit = (self._params(), scale) if moved is None else (moved, None)
        tally, overflow = self._tally_of_pass(), self.overflow
        if tally is not None:
            counts, largest = observe(x.detach(), grid, scale=unit)
            if moved is not None and overflow == "saturate_finite" and math.isfinite(float(largest)):
                overflow = "saturate"  # without infinities they are one, and this one costs fewer passes
            tally.add(counts, amaxes(x, self.placement.granularity) if tally.amax.ndim else largest)
        bits = self._random_bits(x)
        if moved is None or x.dtype != torch.float32 or _forward_mode():
            return quantize(x, grid, scale=unit, rounding=self.rounding, overflow=overflow, random_bits=bits)
        values = cast(x, moved, bits, rounding=self.rounding, overflow=overflow)
        return _StraightThrough.apply(x, values) if x.requires_grad and torch.is_grad_enabled() else values

    def cast_recorded(self, gradient: Tensor) -> Tensor:
        """:meth:`cast` of a gradient whose forward pass was recorded.

        Raises:
            InputError: if the recording is over, since the scale of gradients would never follow what they are.
        """
        if self.tally is None:
            raise InputError(
                "a backward pass comes after its recording is over, so that nothing of it would be recorded; expected "
                "the recording around both the forward and the backward pass"
            )
        return self.cast(gradient)

    def pack(self, x: Tensor) -> PackedTensor:
        """What :meth:`cast` makes of a tensor, as codes and scales, recorded nowhere.

        Raises:
            InputError: for NaN and infinities that the format has no code for.
        """
        tally, self.tally = self.tally, None
        try:
            with torch.no_grad():
                values, scales = self.cast(x), self._scales_of(x)
        finally:
            self.tally = tally
        if scales.ndim:
            scales = scales.reshape(*(1 for _ in range(x.ndim - scales.ndim)), *scales.shape)
        # The values are on the grid, however they were rounded; the policy is there to refuse what has no code.
        return pack_tensor(
            values, self.format, scale=scales, granularity=self.placement.granularity, overflow="saturate_finite"
        )

    def begin_anew(self, amax: Tensor) -> None:
        """Begin the history anew with amaxes of the shape of the scales; without a history there is nothing to do."""
        if isinstance(self.scaling, Delayed):
            self.history.zero_()
            self.history.copy_(self.scaling.update(self.history, amax))
            self._rescale()

    def _check_intact(self) -> None:
        """Refuse a state that something averaged; looked at once for each time that it is written to.

        A device is waited for in eval mode alone, since where processes train in parallel each step writes to buffers.
        """
        grid, known = self.grid, self._intact
        version = _version_of(grid)
        if known is not None and known[0] is grid and known[1] == version:
            return
        kind = grid.device.type
        if not (is_plain(grid, kind) and is_plain(self.scale, kind)) or kind == "meta":
            return
        if kind != "cpu" and (self.training or (kind == "cuda" and torch.cuda.is_current_stream_capturing())):
            return
        format_of(grid)
        if self.scaling.power_of_two and bool((torch.frexp(self.scale).mantissa != 0.5).any()):
            raise InputError(f"a cast has a scale that is no power of two{_AS_AVERAGES}")
        self._intact = grid, version

    def _rescale(self) -> None:
        if isinstance(self.scaling, Delayed):
            # The grid's own maximum, since a format is data, maybe on a device that is not to be waited for.
            self.scale.copy_(self.scaling.scale(self.scale, self._params().max_value, self.history))

    def _tally_of_pass(self) -> Tally | None:
        """Where this pass counts: a forward pass that a backward one repeats, for a checkpoint, counted before."""
        tally = self.tally
        if torch.compiler.is_compiling():
            return tally
        if tally is not None and under_transforms():
            raise InputError(
                "a cast under a transform of torch.func (grad, vjp, vmap, ...) cannot be recorded, since what it sees "
                "would have to leave the transform; expected the recording around a backward pass by backward() or "
                "autograd.grad"
            )
        if self.placement.operand == "gradients":
            return tally
        if torch._C._current_graph_task_id() == -1:
            if self._was_recorded != (tally is not None):
                self._was_recorded = tally is not None
            return tally
        if tally is None and self._was_recorded:
            # The scales have moved on since, and so have the random bits: it would not be the same pass.
            raise InputError(
                "a checkpoint computes a forward pass again after its recording is over, under other scales; expected "
                "the recording around both the forward and the backward pass"
            )
        return None

    def _moved_grid(self, x: Tensor, scale: Tensor) -> Format | None:
        """The format times its scale as a format of its own, which spares the scaling; None where there is none.

        Where reading the state means waiting for a device, or where it is to stay data, there is none.
        """
        if torch.compiler.is_compiling() or scale.numel() != 1 or not self.scaling.power_of_two:
            return None
        if not (is_plain(x) and is_plain(self.grid) and is_plain(scale)):
            return None
        return _times(self.format, math.frexp(scale.item())[1] - 1)

    def _params(self) -> FormatParams:
        grid = self.grid
        maximum, native = grid[8].view(torch.float32), grid[9].view(torch.float32)
        return self._params_type(grid[1], grid[7], maximum, native, grid[5] != 0)

    def _scale_for(self, x: Tensor) -> Tensor:
        return spread(self._scales_of(x), tuple(x.shape), self.placement.granularity)

    def _scales_of(self, x: Tensor) -> Tensor:
        if not isinstance(self.scaling, Current):
            return self.scale
        return self.scaling.scale(amaxes(x, self.placement.granularity), self._params().max_value)

    def _random_bits(self, x: Tensor) -> Tensor | None:
        if self.step is None:
            return None
        return hash_bits(tuple(x.shape), self.placement.seed, self.step, device=x.device)

    def __getstate__(self) -> dict[str, object]:
        """All but the recording that goes on, and what is known of the grid: they are of this site and of no copy."""
        return {**self.__dict__, "tally": None, "_was_recorded": False, "_intact": None}

    def _apply(self, fn: Any, recurse: bool = True) -> Site:
        """Move, but keep float32: a model may become bfloat16, its scales and amaxes may not.

        What comes from the meta device, by ``to_empty``, has a state that was never written: it begins anew.
        """
        before, grid = dict(self._buffers), self.grid
        deferred = self.format if grid.is_meta else None
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            old = before[name]
            if buffer is not None and old is not None and buffer.dtype != old.dtype:
                self._buffers[name] = old.to(buffer.device)
        if deferred is not None and not self.grid.is_meta:
            self._begin(deferred)
        elif deferred is None and self.grid.is_meta:
            self._format_on_meta = format_of(grid)
        return self

    @torch.no_grad()
    def _begin(self, format: Format) -> None:
        """The state before the first step, written into buffers that hold anything."""
        for buffer in (self.history, self.step):
            if buffer is not None:
                buffer.zero_()
        self.grid.copy_(torch.tensor(_numbers_of(format), dtype=torch.int32))
        first = self.scaling.value if isinstance(self.scaling, Static) else 1.0
        self.scale.copy_(torch.as_tensor(first, dtype=torch.float32))
        self._rescale()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load what there is; of a site of which there is nothing at all its layer knows what to say."""
        if not any(key.startswith(prefix) for key in state_dict):
            return
        options = state_dict.get(prefix + OPTIONS_KEY)
        if options is not None:
            try:
                self.set_extra_state(options)
            except InputError as error:
                error_msgs.append(f"{prefix}{OPTIONS_KEY}: {error}")
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        try:
            FormatParams.from_format(self.format, path=self.path)
        except InputError as error:
            error_msgs.append(f"{prefix}grid: {error}")

    def get_extra_state(self) -> Tensor:
        """What a checkpoint says of the cast beside its buffers: uint8, text.

        Not a buffer, since nothing of it is read in a step, and processes would send it to each other in each.
        """
        return torch.tensor(list(write_options(self._options())), dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Refuse a checkpoint of a cast that scales, rounds or overflows in another way.

        Raises:
            InputError: naming what differs.
        """
        is_text = isinstance(state, Tensor) and state.dtype == torch.uint8 and state.ndim == 1
        check_options(bytes(state.tolist()) if is_text else b"", self._options())

    def _options(self) -> dict[str, object]:
        how = {"rounding": self.rounding, "overflow": self.overflow}
        return {**scaling_options(self.scaling), **granularity_options(self.placement.granularity), **how}

    def extra_repr(self) -> str:
        """Format, scaling and granularity."""
        return f"{self.format}, {self.scaling}, {self.placement.granularity}"


@torch.no_grad()
def update_all(sites: Iterable[Site]) -> None:
    """Go over to the next step: enter what was seen in the histories, where anything was, and scale by them.

    All sites of a kind at once, since each alone would take some twenty operations on a few numbers.
    """
    kinds: dict[tuple[Delayed, tuple[int, ...], torch.device], list[tuple[Site, Tally]]] = {}
    for site in sites:
        if site.step is not None:
            site.step.add_(1)
        if site.tally is not None and isinstance(site.scaling, Delayed):
            kind = site.scaling, site.placement.scales, site.grid.device
            kinds.setdefault(kind, []).append((site, site.tally))
    for (scaling, shape, _), members in kinds.items():
        column = (-1, *(1 for _ in shape))
        history = torch.stack([site.history for site, _ in members], 1)
        is_seen = torch.stack([tally.totals[0] > 0 for _, tally in members]).view(column)
        updated = scaling.update(history, torch.stack([tally.amax for _, tally in members]))
        history = torch.where(is_seen, updated, history)
        # The grids' own maxima, since formats are data, maybe on a device that is not to be waited for.
        maximum = torch.stack([site.grid[8] for site, _ in members]).view(torch.float32).view(column)
        scale = scaling.scale(maximum, maximum, history)
        torch._foreach_copy_([site.history for site, _ in members], history.unbind(1))
        torch._foreach_copy_([site.scale for site, _ in members], scale.unbind())


class _StraightThrough(torch.autograd.Function):
    """Values in the place of others, whose gradient they take.

    Without ``setup_context``, since torch looks up the signature of what has one in each call.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor) -> Tensor:
        return values

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0], None


def _forward_mode() -> bool:
    """Whether tensors may carry tangents; told in private alone, and taken for granted where it is not."""
    return getattr(torch.autograd.forward_ad, "_current_level", 0) >= 0


def _keeps_layers_from_being_bypassed(module: nn.Module, inputs: Any) -> None:
    raise AssertionError("a site is not called")


def _scaling_of(spec: CastSpec, placement: Placement) -> Scaling:
    is_blocks = isinstance(placement.granularity, PerBlock)
    scaling = spec.scaling if spec.scaling is not None else Current() if is_blocks else Delayed(DEFAULT_WINDOW)
    if not isinstance(scaling, Scaling):
        raise InputError(f"scaling={scaling!r} is none; expected Static, Current or Delayed of altgrad_torch")
    static = tuple(torch.as_tensor(scaling.value).shape) if isinstance(scaling, Static) else None
    check_serves(scaling, spec.granularity, isinstance(scaling, Current), static)
    if isinstance(scaling, Delayed) and isinstance(placement.granularity, PerChannel) and not placement.scales:
        raise InputError(
            f"{scaling!r} needs to know how many channels there are, and along {placement.granularity} it does not; "
            "expected 'channel', or Current()"
        )
    if static and static != placement.scales:
        raise InputError(f"the static scale has shape {static}; expected {placement.scales}")
    return scaling


_AS_AVERAGES = (
    ", as AveragedModel(use_buffers=True) makes of the state of casts; expected use_buffers=False, which copies "
    "buffers, or set_formats on the average after its updates. So does to_empty of what is not on the meta device: "
    "expected load_state_dict after it, or to(device)"
)


def _version_of(tensor: Tensor) -> int:
    """How often it was written to, which is not counted of what inference mode made."""
    return -1 if tensor.is_inference() else tensor._version


def format_of(grid: Tensor) -> Format:
    """The format of :attr:`Site.grid`.

    Raises:
        InputError: if its numbers are those of none.
    """
    return _format_of(tuple(grid.tolist()))


_NUMBERS = 10
"""How many numbers a format has in a grid."""


@lru_cache(maxsize=256)
def _format_of(numbers: tuple[int, ...]) -> Format:
    exponent_bits, mantissa_bits, bias, *flags = numbers[:7]
    try:
        nameless = Format("", exponent_bits, mantissa_bits, bias, *map(bool, flags))
    except InputError:
        nameless = None
    if nameless is None or _numbers_of(nameless) != list(numbers):
        raise InputError(f"the numbers of a cast's format, {list(numbers)}, are those of none{_AS_AVERAGES}")
    known = (each for each in FORMAT_REGISTRY.values() if each == nameless)
    return next(known, replace(nameless, name=nameless.spelling))


def _numbers_of(format: Format) -> list[int]:
    def bits(value: float) -> int:
        return int(np.float32(value).view(np.int32))

    fields = (format.exponent_bits, format.mantissa_bits, format.bias)
    flags = (format.has_inf, format.has_nan, format.has_negative_zero, format.is_signed)
    edges = (format.min_exponent, bits(format.max_representable_value), bits(format.overflow_value))
    return [*fields, *map(int, flags), *edges]


@lru_cache(maxsize=4096)
def _times(format: Format, exponent: int) -> Format | None:
    """A format whose values are those of another times two to a power; None unless both are cast by the fast path.

    There half a quantum is normal float32, so that no quotient by the scale that counted as zero would round up.
    """
    if format.exponent_bits:
        fields = (format.exponent_bits, format.mantissa_bits, format.bias - exponent)
    else:  # fixed point, where one more exponent bit is a bit of the same integers, and has a bias
        fields = (1, format.mantissa_bits - 1, 2 - exponent)
    if format.cast_path != "fast":
        return None
    try:
        moved = replace(format, exponent_bits=fields[0], mantissa_bits=fields[1], bias=fields[2])
    except InputError:
        return None
    return moved if moved.cast_path == "fast" else None

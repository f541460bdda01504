"""Casts to the grid of any format.

The definition of a cast is :func:`altgrad_core.reference.round_to_format`; every function here agrees with it in every
bit. ``altgrad_jax/casting.py`` says the same thing in JAX. Where a compiled program has to serve many formats, give it
:class:`~altgrad_torch.params.FormatParams`; eager torch compiles nothing and casts faster by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from altgrad_core.errors import InputError
from altgrad_core.formats import STOCHASTIC_BITS, Format, Overflow, Rounding, parse
from altgrad_core.reference import check_modes, check_stochastic_bits, check_width
from altgrad_core.scaling import check_given_scale
from altgrad_core.shapes import broadcasts_within
from altgrad_torch.conversions import values_by_torch
from altgrad_torch.cpu import under_transforms
from altgrad_torch.kernels import Beyond, Draw, beyond_max, round_float64_to_grid, round_to_grid
from altgrad_torch.params import FormatParams
from altgrad_torch.shards import is_sharded, on_shards

_MAGNITUDE = 0x7FFFFFFF
_INF = 0x7F800000
_NAN = 0x7FC00000
_IMPLICIT_ONE = 1 << 23
_MIN_NORMAL = 2.0**-126
_FLOAT32_MAX = float(np.finfo(np.float32).max)
_FLOAT64_MAGNITUDE = 2**63 - 1
_FLOAT64_INF = 0x7FF << 52
_FAR = 600
"""No float64 beyond 2^±600, divided by whatever a float32 scale may be, is anywhere near a grid."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_QUIET_NAN = {torch.bfloat16: 0x7FC0, torch.float16: 0x7E00}

_CHUNK = 1 << 17
"""Elements cast at a time on a CPU: input, output and temporaries of this many stay in the second-level cache."""


def quantize(
    x: Tensor,
    format: str | Format | FormatParams,
    *,
    scale: Tensor | float | None = None,
    rounding: Rounding = "nearest_even",
    overflow: Overflow = "native",
    random_bits: Tensor | None = None,
    stochastic_bits: int = STOCHASTIC_BITS,
    saturation_mask: bool = False,
) -> Tensor:
    """Round ``x`` to the values of a format: ``Q(x / scale) * scale``. The gradient passes straight through.

    NaN stays NaN, and -0 stays -0 where the format has it. Subnormal float32 inputs count at their value; a result
    below 2^-126 is zero. With a scale that is a power of two the scaling is exact, but for a quotient below 2^-126,
    which counts as zero even just below it, where without a scale it could round up. (XLA's CPU backend flushes such
    quotients.) A format without a sign has neither zero nor subnormals: zero and negative values are NaN there, what is
    below its smallest value becomes that, 2^-127 included, and of a scale only the exponent counts.

    float64 is scaled in float64, where every quotient counts at its value, and so does what a scale makes of a result.
    To float32 it is rounded as to any format, but keeps subnormals and takes no notice of a scale; all that is no wider
    than float32 is returned as it is, infinities included, whatever the overflow policy.

    Args:
        x: float32, bfloat16, float16 or float64, any shape; its dtype is kept. float64 is rounded once, from its own
            value. A float16 result that float16 cannot hold is inf.
        format: a name, a :class:`~altgrad_core.formats.Format`, or :class:`~altgrad_torch.params.FormatParams`, which
            change under ``torch.compile`` without compiling anything.
        scale: the worth of one, positive, of a shape that broadcasts to that of ``x``; a float32, also of float64.
        rounding: see :data:`altgrad_core.formats.Rounding`.
        overflow: see :data:`altgrad_core.formats.Overflow`.
        random_bits: for stochastic rounding, integers of the shape of ``x``, uniform in the lowest bits; see
            :func:`altgrad_torch.hashing.hash_bits` and ``torch.randint``.
        stochastic_bits: how many of them count, 1 to 24. A magnitude goes up if the fraction of a quantum cut off, in
            so many bits, and the random number add up to one or more. No more than a random integer has.
        saturation_mask: whether the gradient is zero where ``x`` overflows, infinities included.

    Returns:
        Tensor of the shape and dtype of ``x``.

    Raises:
        TypeError: if ``x`` is not a tensor of one of these dtypes, or ``random_bits`` are not a tensor of integers.
        ValueError: for unknown formats or modes, modes without effect, a scale that would enlarge ``x`` or is a number
            but no positive float32, or random bits that are missing, useless or of another shape.

    >>> quantize(torch.tensor([0.75, 1.5, 3.0, 6.0]), "E7M0").tolist()
    [0.5, 2.0, 2.0, 8.0]
    """
    grid = as_grid(format)
    check_floating(x, "quantize")
    if isinstance(grid, FormatParams):
        _refuse_stacked(grid, x)
    x = without_negative_bit(x)
    check_modes(rounding, overflow)
    _check_random_bits(random_bits, x, rounding, stochastic_bits)
    unit = None if scale is None else checked_scale(scale, x)
    if is_float32(grid):
        _refuse_without_effect(rounding, saturation_mask)
        if x.dtype != torch.float64:
            return x
        unit = None
    how = _How(grid, rounding, beyond_max(grid, overflow), stochastic_bits)
    if is_sharded(x):
        return on_shards(partial(_quantized, how=how, saturation_mask=saturation_mask), x, unit, random_bits)
    return _quantized(x, unit, random_bits, how, saturation_mask)


def _quantized(x: Tensor, scale: Tensor | None, random_bits: Tensor | None, how: _How, saturation_mask: bool) -> Tensor:
    """:func:`quantize` of a tensor that is whole, and checked."""
    if torch.compiler.is_compiling():
        on_grid = _StraightThrough.apply(x, scale, random_bits, how)
    elif under_transforms():
        on_grid = _StraightThroughForwards.apply(x, scale, random_bits, how)
    else:
        on_grid = _StraightThroughEagerly.apply(x, scale, random_bits, how)
    if not saturation_mask:
        return on_grid
    return torch.where(_overflows(x.detach(), scale, random_bits, how), on_grid.detach(), on_grid)


def _refuse_stacked(params: FormatParams, x: Tensor) -> None:
    """Refuse params of several formats that are not mapped over, and would enlarge ``x``."""
    shape = tuple(params.max_value.shape)
    if not broadcasts_within(shape, x.shape):
        raise InputError(
            f"params of shape {shape} for x of shape {tuple(x.shape)}; expected those of one format, or torch.vmap "
            "over them"
        )


def as_grid(format: str | Format | FormatParams) -> Format | FormatParams:
    """The format of a name; a format and params are returned as they are.

    Raises:
        UnknownFormatError: for an unknown name.
    """
    return format if isinstance(format, FormatParams) else parse(format)


def is_float32(grid: Format | FormatParams) -> bool:
    """Whether float32 values are on the grid as they are."""
    return (grid.path if isinstance(grid, FormatParams) else grid.cast_path) == "identity"


def without_negative_bit(x: Tensor) -> Tensor:
    """``x``, written out if it is a view that torch negates when it is read, such as ``z.conj().imag``.

    Of its memory as it lies the sign would be wrong, and torch refuses to show that as integers.
    """
    return x.resolve_neg() if torch.compiler.is_compiling() or x.is_neg() else x


def check_floating(x: object, taker: str) -> None:
    """Check that ``x`` is a tensor of a dtype that casts take.

    Raises:
        TypeError: if not; it names the taker.
        InputError: for a sparse one.
    """
    if not isinstance(x, Tensor) or x.dtype not in _DTYPES:
        given = x.dtype if isinstance(x, Tensor) else type(x)
        raise TypeError(f"{taker} takes floating-point tensors (float32, bfloat16, float16, float64); got {given}")
    if not torch.compiler.is_compiling() and x.layout != torch.strided:  # which strict tracing cannot ask
        raise InputError(f"{taker} takes dense tensors; got one of {x.layout}, expected its to_dense()")


def checked_scale(scale: Tensor | float, x: Tensor) -> Tensor:
    """A scale of ``x`` as a float32 tensor beside it, without a gradient.

    Raises:
        InputError: if it would enlarge ``x``, or is a number that is no scale.
    """
    check_given_scale(scale)
    unit = torch.as_tensor(scale, dtype=torch.float32, device=x.device).detach()
    if not broadcasts_within(unit.shape, x.shape):
        raise InputError(
            f"the scale has shape {tuple(unit.shape)}; expected one that broadcasts to that of x, {tuple(x.shape)}"
        )
    return unit


def _check_random_bits(random_bits: Tensor | None, x: Tensor, rounding: Rounding, stochastic_bits: int) -> None:
    check_stochastic_bits(stochastic_bits)
    if rounding != "stochastic":
        if stochastic_bits != STOCHASTIC_BITS:
            raise InputError(f"stochastic_bits={stochastic_bits} would have no effect: rounding is {rounding!r}")
        if random_bits is not None:
            raise InputError("random_bits would have no effect: they need rounding='stochastic'")
        return
    if random_bits is None:
        raise InputError("rounding='stochastic' needs random_bits: integers of the shape of x")
    check_drawn(random_bits, x, stochastic_bits)


def check_drawn(random_bits: object, x: Tensor, stochastic_bits: int = STOCHASTIC_BITS) -> None:
    """Check that random bits are integers of the shape of ``x``, of at least so many bits.

    Raises:
        TypeError: if they are not a tensor of integers.
        InputError: if they have another shape, or fewer bits.
    """
    if not isinstance(random_bits, Tensor):
        raise TypeError(f"random_bits are a tensor of integers; got {type(random_bits)}")
    if random_bits.is_floating_point() or random_bits.is_complex() or random_bits.dtype == torch.bool:
        raise TypeError(f"random_bits are integers; got {random_bits.dtype}")
    if random_bits.shape != x.shape:
        raise InputError(f"random_bits have shape {tuple(random_bits.shape)}; expected that of x, {tuple(x.shape)}")
    check_width(stochastic_bits, str(random_bits.dtype).removeprefix("torch."), torch.iinfo(random_bits.dtype).bits)


def _refuse_without_effect(rounding: Rounding, saturation_mask: bool) -> None:
    if rounding != "nearest_even":
        raise InputError(f"rounding={rounding!r} would have no effect: float32 values are on the grid of float32")
    if saturation_mask:
        raise InputError("saturation_mask=True would have no effect: no finite float32 value overflows float32")


class _How(NamedTuple):
    """All that a cast is told beside tensors of the shape of ``x``."""

    grid: Format | FormatParams
    rounding: Rounding
    beyond: Beyond
    stochastic_bits: int


_MARKING = Beyond(math.inf, math.inf)
"""Makes inf of whatever overflows."""


class _StraightThrough(torch.autograd.Function):
    """The cast in value, the identity in derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, scale: Tensor | None, random_bits: Tensor | None, how: _How) -> Tensor:
        if scale is None and (rounded := _nearest_by_torch(x, how)) is not None:
            return rounded

        def part(x: Tensor, scale: Tensor | None, random_bits: Tensor | None) -> Tensor:
            return _scaled_cast(x, scale, random_bits, how)

        return in_chunks(part, how.grid, x.dtype, x, scale, random_bits)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Nothing is kept: the derivative is one."""

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return grad_outputs[0], None, None, None


class _StraightThroughForwards(_StraightThrough):
    """With forward-mode derivatives too, which torch.compile (2.13) does not trace."""

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> Any:
        # A view, because forward-mode AD refuses a tangent that is the input's own.
        return grad_inputs[0].view_as(grad_inputs[0])


class _StraightThroughEagerly(torch.autograd.Function):
    """The same without ``setup_context``, since torch looks up the signature of what has one in each call."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor | None, random_bits: Tensor | None, how: _How) -> Tensor:
        return _StraightThrough.forward(x, scale, random_bits, how)

    backward = _StraightThrough.backward
    jvp = _StraightThroughForwards.jvp


def cast(
    x: Tensor,
    format: Format | FormatParams,
    random_bits: Tensor | None = None,
    *,
    rounding: Rounding = "nearest_even",
    overflow: Overflow = "native",
    stochastic_bits: int = STOCHASTIC_BITS,
) -> Tensor:
    """The bare cast to float32, of whatever dtype: no scale, no checks, no gradient rule. See :func:`quantize`."""
    if is_float32(format) and x.dtype == torch.float32:
        return x
    if is_sharded(x):

        def of_shard(x: Tensor, random_bits: Tensor | None) -> Tensor:
            return cast(x, format, random_bits, rounding=rounding, overflow=overflow, stochastic_bits=stochastic_bits)

        return on_shards(of_shard, x.detach(), random_bits)
    how = _How(format, rounding, beyond_max(format, overflow), stochastic_bits)
    if (rounded := _nearest_by_torch(x, how)) is not None:
        return rounded

    def part(x: Tensor, random_bits: Tensor | None) -> Tensor:
        return _cast(x, None, random_bits, how)

    return in_chunks(part, format, torch.float32, x.detach(), random_bits)


def _nearest_by_torch(x: Tensor, how: _How) -> Tensor | None:
    """All at once what torch's own conversion can do of a tensor of many chunks; of one alone the kernels know."""
    if how.rounding != "nearest_even" or x.dtype != torch.float32 or isinstance(how.grid, FormatParams):
        return None
    return None if in_one_go(how.grid, x) else values_by_torch(x, how.grid)


def cast_marking_overflow(x: Tensor, params: FormatParams, rounding: Rounding) -> Tensor:
    """The bare cast to float32, but inf, with the sign of ``x``, where ``x`` rounds beyond max."""
    return _cast(x.detach(), None, None, _How(params, rounding, _MARKING, STOCHASTIC_BITS))


def _overflows(x: Tensor, scale: Tensor | None, random_bits: Tensor | None, how: _How) -> Tensor:
    """Whether each element rounds beyond max, by whatever rounding: where a cast that makes inf of that makes one."""
    marking = how._replace(beyond=_MARKING)

    def part(x: Tensor, scale: Tensor | None, random_bits: Tensor | None) -> Tensor:
        scale, how = _scaling_of(x, scale, marking)
        return _cast(x, scale, random_bits, how).isinf()

    return in_chunks(part, how.grid, torch.bool, x, scale, random_bits)


def _scaled_cast(x: Tensor, scale: Tensor | None, random_bits: Tensor | None, how: _How) -> Tensor:
    scale, how = _scaling_of(x, scale, how)
    on_grid = _cast(x, scale, random_bits, how)
    return _to_dtype(on_grid, x.dtype) if scale is None else scaled_up(on_grid, scale, x.dtype)


def _scaling_of(x: Tensor, scale: Tensor | None, how: _How) -> tuple[Tensor | None, _How]:
    """By what ``x`` is divided, and how it is then rounded.

    To unsigned formats the grid is moved instead, for all but float64: float32 may not hold the quotients.
    """
    grid = how.grid
    if scale is None or not _is_unsigned(grid):
        return scale, how
    if x.dtype == torch.float64:
        return _power_of_two_below(scale), how
    params = grid if isinstance(grid, FormatParams) else FormatParams.from_format(grid, device=x.device)
    return None, how._replace(grid=_moved(params, scale))


def _power_of_two_below(scale: Tensor) -> Tensor:
    """The scale, or the next power of two below; in integers, because a processor may flush a subnormal one."""
    magnitude = scale.view(torch.int32) & _MAGNITUDE
    # Of a subnormal the bits are a number that float32 holds, and whose exponent tells the highest of them.
    highest_bit = (magnitude.to(torch.float32).view(torch.int32) & _INF).view(torch.float32).to(torch.int32)
    return torch.where(magnitude < _IMPLICIT_ONE, highest_bit, magnitude & _INF).view(torch.float32)


def scaled_down(x: Tensor, scale: Tensor) -> Tensor:
    """``x / scale`` as it is rounded to a grid: float64 in float64, all else in float32. See :func:`quantize`."""
    is_float64 = x.dtype == torch.float64
    return _divide_float64_by_scale(x, scale) if is_float64 else divide_by_scale(widened(x), scale)


def scaled_up(on_grid: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``on_grid * scale`` of float32 values, computed in float64 for that dtype and in float32 for all others."""
    if dtype == torch.float64:
        return _to_dtype(on_grid, dtype) * scale
    return _to_dtype(_multiply_by_scale(on_grid, scale), dtype)


def _cast(x: Tensor, scale: Tensor | None, random_bits: Tensor | None, how: _How) -> Tensor:
    """``x / scale`` rounded, as float32."""
    is_float64 = x.dtype == torch.float64
    if scale is not None:
        x = scaled_down(x, scale)
    elif not is_float64:
        x = widened(x)
    draw = None if random_bits is None else Draw(random_bits, how.stochastic_bits)
    return (round_float64_to_grid if is_float64 else round_to_grid)(x, how.grid, how.rounding, how.beyond, draw)


def _is_unsigned(grid: Format | FormatParams) -> bool:
    return (grid.path if isinstance(grid, FormatParams) else grid.cast_path) == "unsigned"


def _moved(params: FormatParams, scale: Tensor) -> FormatParams:
    """The grid of an unsigned format, which holds powers of two, times a power of two: cut off where float32 ends."""
    shift = ((scale.view(torch.int32) >> 23) & 0xFF) - 127
    maximum = (params.max_value.view(torch.int32) >> 23) + shift
    return params._replace(
        min_exponent=params.min_exponent + shift,
        max_value=(maximum.clamp(0, 254) << 23).view(torch.float32),
    )


def in_chunks(
    function: Callable[..., Tensor], grid: Format | FormatParams, dtype: torch.dtype, x: Tensor, *beside: Tensor | None
) -> Tensor:
    """An elementwise function of ``x`` and what broadcasts against it, a cache's worth at a time on a CPU.

    So temporaries take up no more than that, whatever the size of ``x``. Where a compiler fuses there are none, and
    params are meant for those.
    """
    if in_one_go(grid, x):
        return function(x, *beside)
    out = torch.empty_like(x, dtype=dtype)
    spread = [t if t is None or t.numel() == 1 else t.expand(x.shape) for t in beside]
    fill_by_chunks(function, out, x, spread)
    return out


def in_one_go(grid: Format | FormatParams, x: Tensor) -> bool:
    """Whether :func:`in_chunks` takes all of ``x`` at once."""
    fused = isinstance(grid, FormatParams) or torch.compiler.is_compiling() or x.device.type != "cpu"
    # Under vmap what is beside x may be of more dimensions than x shows, and would not fit what x has room for.
    return fused or x.numel() <= _CHUNK or under_transforms()


def fill_by_chunks(
    function: Callable[..., Tensor], out: Tensor, x: Tensor, beside: Sequence[Tensor | None], whole: int | None = None
) -> None:
    """Split the outermost dimension in memory, again and again, until a part is small enough; nothing is copied.

    Args:
        function: of parts of ``x`` and of what is beside it.
        out: what its results are written to.
        x: of the shape of ``out``, but along the dimension that stays whole.
        beside: of the shape of ``x``, or of one element.
        whole: a dimension that is never split, because the function reduces along it.
    """
    splittable = [d for d in range(x.ndim) if x.shape[d] > 1 and d != whole]
    if x.numel() <= _CHUNK or not splittable:
        out.copy_(function(x, *beside))
        return
    dimension = max(splittable, key=out.stride)
    length = x.shape[dimension]
    step = max(1, _CHUNK * length // x.numel())
    for start in range(0, length, step):
        size = min(step, length - start)
        parts = [t if t is None or t.numel() == 1 else t.narrow(dimension, start, size) for t in beside]
        fill_by_chunks(function, out.narrow(dimension, start, size), x.narrow(dimension, start, size), parts, whole)


def divide_by_scale(x: Tensor, scale: Tensor) -> Tensor:
    """``x / scale`` in float32, where a subnormal ``x`` counts at its value even if the processor flushes it.

    Exact for powers of two within 2^-100 to 2^100, but for a quotient below 2^-126, which is zero, and one of a finite
    ``x`` beyond float32's maximum, which is that: finite values and infinities are told apart later.
    """
    magnitude = x.view(torch.int32) & _MAGNITUDE
    # Looking at the quotient would be too late: one just below 2^-126 is rounded to it before it can be flushed.
    bounded = (x / scale).clamp(-_FLOAT32_MAX, _FLOAT32_MAX) * (x.abs() >= scale * _MIN_NORMAL)
    # A subnormal is its bits times 2^-149, a factor that is no normal number: half of it before, half after.
    raised = magnitude.to(torch.float32) * 2.0**-75 / scale
    small = (raised * 2.0**-74 * (raised >= 2.0**-52)).copysign(x)
    return torch.where(magnitude < _IMPLICIT_ONE, small, torch.where(magnitude >= _INF, x, bounded))


def _divide_float64_by_scale(x: Tensor, scale: Tensor) -> Tensor:
    """``x / scale`` in float64: infinite only where ``x`` is, zero only where ``x`` is."""
    bits = x.view(torch.int64)
    magnitude = bits & _FLOAT64_MAGNITUDE
    # In integers, because a processor may flush the smallest.
    near = magnitude.clamp((1023 - _FAR) << 52, (1023 + _FAR) << 52)
    magnitude = torch.where((magnitude == 0) | (magnitude >= _FLOAT64_INF), magnitude, near)
    return (magnitude | (bits & ~_FLOAT64_MAGNITUDE)).view(torch.float64) / scale


def float64_to_odd(x: Tensor) -> Tensor:
    """float64 to float32, rounded to odd: rounding the result again, to fewer bits, equals rounding ``x`` once.

    From 2^128 on, beyond whatever float32 could round to, it is an infinity.
    """
    bits = x.view(torch.int64)
    magnitude = bits & _FLOAT64_MAGNITUDE
    field = magnitude >> 52
    normal = magnitude - ((1023 - 127) << 52)
    subnormal = (magnitude & (2**52 - 1)) | (1 << 52)
    # 29 bits go; of what float32 has below 2^-126, in steps of 2^-149, one more for each binade further down.
    dropped = (926 - field).clamp(29, 62)
    source = torch.where(field > 1023 - 127, normal, subnormal)
    kept = source >> dropped
    odd = kept | ((kept << dropped) != source)
    odd = torch.where(magnitude == 0, 0, torch.where(field >= 1023 + 128, _INF, odd))
    odd = torch.where(magnitude > _FLOAT64_INF, _NAN, odd)
    return (odd | (bits >> 63 << 31)).to(torch.int32).view(torch.float32)


def _multiply_by_scale(x: Tensor, scale: Tensor) -> Tensor:
    """``x * scale``, where a product below 2^-126 is zero. NaN, of which a GPU makes another, stays as it is."""
    product = (x * scale).mul_(x.abs() >= _MIN_NORMAL / scale)
    return product if x.device.type == "cpu" else torch.where(x.isnan(), x, product)


def flush_subnormals(x: Tensor) -> Tensor:
    """Zero, with the sign kept, where float32 ``x`` is below 2^-126: what XLA's CPU backend does by itself."""
    return x * (x.abs() >= _MIN_NORMAL)


def widened(x: Tensor) -> Tensor:
    """float32, which holds half precision as it is; NaN keeps its sign, which a GPU takes from that of float16."""
    wide = x.to(torch.float32)
    if x.dtype != torch.float16 or x.device.type == "cpu":
        return wide
    signs = x.view(torch.int16).to(torch.int32) & ~_MAGNITUDE
    return ((wide.view(torch.int32) & _MAGNITUDE) | signs).view(torch.float32)


def to_float32(x: Tensor) -> Tensor:
    """``x`` as float32 that rounds on as ``x`` itself would: float64 is rounded to odd, the others are exact.

    Finite float64 beyond float32 counts as its maximum.
    """
    if x.dtype != torch.float64:
        return widened(x)
    single = float64_to_odd(x)
    is_beyond = single.isinf() & x.isfinite()
    return torch.where(is_beyond, torch.copysign(single.new_full((), _FLOAT32_MAX), single), single)


def _to_dtype(result: Tensor, dtype: torch.dtype) -> Tensor:
    """A float32 result in the dtype it is asked for. NaN, which may take any shape on the way, is canonical again."""
    if dtype == torch.float32:
        return result
    bits = result.view(torch.int32)
    if dtype == torch.float64:
        magnitude = bits & _MAGNITUDE
        # Subnormals, of float32 itself and of formats without a sign, may be flushed on the way.
        subnormal = (magnitude.to(torch.float64) * 2.0**-149).copysign(result)
        return torch.where(magnitude < _IMPLICIT_ONE, subnormal, result.to(torch.float64))
    signs = (bits >> 16).to(torch.int16) & -(2**15)
    magnitude = (result.to(dtype).view(torch.int16) & (2**15 - 1)).clamp_max_(_QUIET_NAN[dtype])
    return (magnitude | signs).view(dtype)

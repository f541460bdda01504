"""Casts to the grid of any format.

The definition of a cast is :func:`altgrad_core.reference.round_to_format`; every function here agrees with it in every
bit. ``altgrad_jax/casting.py`` says the same thing in JAX, where the format is data so that changing it compiles
nothing; eager torch compiles nothing, so here a format is a :class:`~altgrad_core.formats.Format`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from altgrad_core.errors import InputError
from altgrad_core.formats import STOCHASTIC_BITS, Format, Overflow, Rounding, parse
from altgrad_core.reference import check_modes

_SIGN = -(2**31)
_MAGNITUDE = 0x7FFFFFFF
_INF = 0x7F800000
_NAN = 0x7FC00000
_IMPLICIT_ONE = 1 << 23
_SIGN_AND_EXPONENT = -_IMPLICIT_ONE
_MIN_NORMAL = 2.0**-126
_FLOAT32_MAX = float(np.finfo(np.float32).max)

_CHUNK = 1 << 17
"""Elements cast at a time on a CPU: input, output and temporaries of this many stay in the second-level cache."""


def quantize(
    x: Tensor,
    format: str | Format,
    *,
    scale: Tensor | float | None = None,
    rounding: Rounding = "nearest_even",
    overflow: Overflow = "native",
    random_bits: Tensor | None = None,
) -> Tensor:
    """Round ``x`` to the values of a format: ``Q(x / scale) * scale``. The gradient passes straight through.

    NaN stays NaN and -0 stays -0. Subnormal float32 inputs count at their value; a result below 2^-126 is zero. With
    a scale that is a power of two the scaling is exact.

    Args:
        x: floating-point tensor of any shape; its dtype is kept. float64 is rounded once, from its own value. A
            float16 result that float16 cannot hold is inf.
        format: a name or a :class:`~altgrad_core.formats.Format`.
        scale: the worth of one, positive, broadcast against ``x``.
        rounding: see :data:`altgrad_core.formats.Rounding`.
        overflow: see :data:`altgrad_core.formats.Overflow`.
        random_bits: for stochastic rounding, integers of the shape of ``x``, uniform in the lowest 24 bits.

    Returns:
        Tensor of the shape and dtype of ``x``.

    Raises:
        TypeError: if ``x`` is not a floating-point tensor, or ``random_bits`` are not integers.
        ValueError: for unknown formats or modes, or random bits that are missing, useless or of another shape.

    >>> quantize(torch.tensor([0.75, 1.5, 3.0, 6.0]), "E7M0").tolist()
    [0.5, 2.0, 2.0, 8.0]
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"quantize takes floating-point tensors; got {x.dtype if isinstance(x, Tensor) else type(x)}")
    resolved = parse(format)
    check_modes(rounding, overflow)
    _check_random_bits(random_bits, x, rounding)
    if resolved.cast_path == "identity":
        if rounding != "nearest_even":
            raise InputError(
                f"rounding={rounding!r} would have no effect: float32 values are on the grid of {resolved}"
            )
        return x
    return _StraightThrough.apply(x, scale, resolved, rounding, overflow, random_bits)


def _check_random_bits(random_bits: Tensor | None, x: Tensor, rounding: Rounding) -> None:
    if random_bits is None:
        if rounding == "stochastic":
            raise ValueError("rounding='stochastic' needs random_bits: integers of the shape of x")
        return
    if rounding != "stochastic":
        raise ValueError("random_bits would have no effect: they need rounding='stochastic'")
    if random_bits.is_floating_point() or random_bits.is_complex() or random_bits.dtype == torch.bool:
        raise TypeError(f"random_bits are integers; got {random_bits.dtype}")
    if random_bits.shape != x.shape:
        raise ValueError(f"random_bits have shape {tuple(random_bits.shape)}; expected that of x, {tuple(x.shape)}")


class _StraightThrough(torch.autograd.Function):
    """The cast in value, the identity in derivative, forwards and backwards."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        scale: Tensor | float | None,
        format: Format,
        rounding: Rounding,
        overflow: Overflow,
        random_bits: Tensor | None,
    ) -> Tensor:
        unit = None if scale is None else torch.as_tensor(scale, dtype=torch.float32, device=x.device)

        def scaled_cast(x: Tensor, unit: Tensor | None, random_bits: Tensor | None) -> Tensor:
            value = _to_float32_odd(x) if x.dtype == torch.float64 else x.to(torch.float32)
            if unit is None:
                return _to_dtype_of(x, _cast(value, format, rounding, overflow, random_bits))
            on_grid = _cast(divide_by_scale(value, unit), format, rounding, overflow, random_bits)
            return _to_dtype_of(x, _multiply_by_scale(on_grid, unit))

        return _in_chunks(scaled_cast, x, unit, random_bits)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Nothing is kept: the derivative is one."""

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return grad_outputs[0], None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> Any:
        # A view, because forward-mode AD refuses a tangent that is the input's own.
        return grad_inputs[0].view_as(grad_inputs[0])


def cast(
    x: Tensor,
    format: Format,
    random_bits: Tensor | None = None,
    *,
    rounding: Rounding = "nearest_even",
    overflow: Overflow = "native",
) -> Tensor:
    """The bare cast of float32 to float32: no scale, no checks, no gradient rule. See :func:`quantize`."""
    if format.cast_path == "identity":
        return x

    def part(x: Tensor, random_bits: Tensor | None) -> Tensor:
        return _cast(x, format, rounding, overflow, random_bits)

    return _in_chunks(part, x.detach(), random_bits)


def _in_chunks(function: Callable[..., Tensor], x: Tensor, *beside: Tensor | None) -> Tensor:
    """An elementwise function of ``x`` and what broadcasts against it, a cache's worth at a time on a CPU."""
    flat = x.reshape(-1)
    size = _CHUNK if x.device.type == "cpu" else flat.numel()
    if flat.numel() <= size:
        return function(x, *beside)
    spread = [t if t is None or t.numel() == 1 else t.expand(x.shape).reshape(-1) for t in beside]
    out = torch.empty_like(flat)
    for start in range(0, flat.numel(), size):
        part = slice(start, start + size)
        out[part] = function(flat[part], *(t if t is None or t.numel() == 1 else t[part] for t in spread))
    return out.view(x.shape)


def _cast(x: Tensor, format: Format, rounding: Rounding, overflow: Overflow, random_bits: Tensor | None) -> Tensor:
    if format.cast_path == "fast" and rounding == "nearest_even":
        return _cast_fast(x, format, overflow)
    return _cast_integer(x, format, rounding, overflow, random_bits)


def _cast_fast(x: Tensor, format: Format, overflow: Overflow) -> Tensor:
    """Round by adding a power of two and taking it away again: one float32 addition rounds to nearest even.

    The number added is the quantum's exponent raised by 23, for each element its own; it stays above the smallest
    quantum, so that the format's subnormals round in the same way. Every step writes where it reads: ``out`` holds
    ``-|x|``, negative so that one ``threshold_`` can replace what lies beyond max.
    """
    maximum, beyond = format.max_representable_value, beyond_max(format, overflow)
    out = (x.view(torch.int32) | _SIGN).view(torch.float32)
    magic = out.clamp(-maximum, -(2.0**format.min_exponent))
    binade = magic.view(torch.int32).bitwise_and_(_SIGN_AND_EXPONENT)
    if format.mantissa_bits == 0:
        # The parity of a code is that of its exponent. A tie goes up, unless the number added is an odd multiple of
        # the quantum: which it must be where the code below the tie is even.
        parity_of_even_code = _IMPLICIT_ONE * (format.min_exponent & 1)
        binade.add_((binade & _IMPLICIT_ONE).eq_(parity_of_even_code))
    raised = 2.0 ** (23 - format.mantissa_bits)
    out.add_(magic, alpha=raised).sub_(magic, alpha=raised)
    if beyond == maximum:
        out.clamp_min_(-maximum)
    else:
        torch.threshold_(out, -_next_up(maximum), -beyond)
    if overflow == "saturate_finite":
        out.masked_fill_(x.isinf(), math.inf)
    out.nan_to_num_(nan=math.nan, posinf=math.inf, neginf=-math.inf)  # makes the payload of NaN canonical
    return out.copysign_(x)


def _cast_integer(
    x: Tensor, format: Format, rounding: Rounding, overflow: Overflow, random_bits: Tensor | None
) -> Tensor:
    """Round in integer arithmetic: any format, any rounding, subnormal float32 read from its bits."""
    bits = x.view(torch.int32)
    magnitude = bits & _MAGNITUDE
    stored = (magnitude >> 23).clamp_min_(1)
    significand = (magnitude & (_IMPLICIT_ONE - 1)) | ((magnitude >= _IMPLICIT_ONE).to(torch.int32) << 23)
    # Of subnormals only those from 2^-127 on, which is their exponent, can round to a result that is not flushed.
    exponent = (stored - 127 - (magnitude < _IMPLICIT_ONE).to(torch.int32)).clamp_min_(format.min_exponent)
    dropped = (23 - format.mantissa_bits) + exponent - (stored - 127)
    steps = _round_steps(significand, dropped, exponent - format.min_exponent, format, rounding, random_bits)
    # steps has at most 24 bits, so it is exact in float32; its exponent field then takes up the quantum's.
    rounded = steps.to(torch.float32).view(torch.int32) + ((exponent - format.mantissa_bits) << 23)
    rounded.masked_fill_((steps == 0) | (rounded < _IMPLICIT_ONE), 0)
    beyond = beyond_max(format, overflow)
    rounded.masked_fill_(rounded > _bits_of(format.max_representable_value), _bits_of(beyond))
    rounded.masked_fill_(magnitude == _INF, _INF if overflow == "saturate_finite" else _bits_of(beyond))
    rounded.masked_fill_(magnitude > _INF, _NAN)
    return (rounded | (bits & _SIGN)).view(torch.float32)


def _round_steps(
    significand: Tensor, dropped: Tensor, binade: Tensor, format: Format, rounding: Rounding, random_bits: Tensor | None
) -> Tensor:
    """Round ``significand / 2^dropped`` to an integer; ``binade`` counts from the lowest."""
    shift = dropped.clamp_max(25)
    whole = significand >> shift
    rest = significand - (whole << shift)
    if rounding == "toward_zero":
        return whole
    if random_bits is not None:
        left, right = (STOCHASTIC_BITS - dropped).clamp_(0, 31), (dropped - STOCHASTIC_BITS).clamp_(0, 31)
        fraction = (rest << left) >> right
        drawn = random_bits.to(torch.int32) & ((1 << STOCHASTIC_BITS) - 1)
        return whole + (fraction + drawn >= (1 << STOCHASTIC_BITS))
    one = torch.ones_like(shift) << shift
    if rounding == "nearest_away":
        return whole + (2 * rest >= one)
    odd = (whole + binade if format.mantissa_bits == 0 else whole) & 1
    return whole + (2 * rest + odd > one)


def beyond_max(format: Format, overflow: Overflow) -> float:
    """What a finite value beyond max becomes under the overflow policy."""
    return format.overflow_value if overflow == "native" else format.max_representable_value


def encode(
    x: Tensor, format: str | Format, *, rounding: Rounding = "nearest_even", overflow: Overflow = "native"
) -> Tensor:
    """The codes that ``x`` rounds to.

    NaN becomes the format's NaN, or 0 where it has none: count those with
    :func:`altgrad_torch.statistics.cast_counts`. An infinity that the format lacks becomes ±max.

    Args:
        x: floating-point tensor.
        format: a name or a :class:`~altgrad_core.formats.Format` of at most 16 bits.
        rounding: all but ``stochastic``.
        overflow: see :data:`altgrad_core.formats.Overflow`.

    Returns:
        uint8 (uint16 for formats of more than 8 bits) of the shape of ``x``; the code sits in the low bits.

    Raises:
        TypeError: if ``x`` is not floating point.
        ValueError: for unknown formats or modes, and formats of more than 16 bits.

    >>> encode(torch.tensor([1.0, -1.0]), "E5M2").tolist()
    [60, 188]
    """
    resolved = _codable(format)
    on_grid = quantize(x, resolved, rounding=rounding, overflow=overflow).detach().to(torch.float32).view(torch.int32)
    magnitude = on_grid & _MAGNITUDE
    stored = (magnitude >> 23).clamp_min_(1)
    significand = (magnitude & (_IMPLICIT_ONE - 1)) | ((magnitude >= _IMPLICIT_ONE).to(torch.int32) << 23)
    exponent = (stored - 127).clamp_min_(resolved.min_exponent)
    shift = ((23 - resolved.mantissa_bits) + exponent - (stored - 127)).clamp_max_(31)
    code = (significand >> shift) + ((exponent - resolved.min_exponent) << resolved.mantissa_bits)
    code.masked_fill_(magnitude == 0, 0)
    code.masked_fill_(magnitude == _INF, resolved.to_bits(math.inf, overflow="saturate_finite"))
    code = torch.where(on_grid < 0, code | resolved.sign_mask, code)
    code.masked_fill_(magnitude > _INF, resolved.to_bits(math.nan))
    return code.to(torch.uint8 if resolved.bits <= 8 else torch.uint16)


def decode(codes: Tensor, format: str | Format) -> Tensor:
    """The float32 values of codes; those below 2^-126 are zero.

    Args:
        codes: unsigned integers; bits above the format's width are ignored.
        format: a name or a :class:`~altgrad_core.formats.Format` of at most 16 bits.

    Raises:
        TypeError: if the codes are not unsigned integers.
        ValueError: for unknown formats and formats of more than 16 bits.

    >>> decode(torch.tensor([60, 188], dtype=torch.uint8), "E5M2").tolist()
    [1.0, -1.0]
    """
    if codes.dtype not in (torch.uint8, torch.uint16, torch.uint32, torch.uint64):
        raise TypeError(f"codes are unsigned integers; got {codes.dtype}")
    resolved = _codable(format)
    book = resolved.code_book()
    values = np.where(np.abs(book) < _MIN_NORMAL, np.copysign(0.0, book), book).astype(np.float32)
    return torch.from_numpy(values).to(codes.device)[codes.to(torch.int64) & (2 * resolved.sign_mask - 1)]


def _codable(format: str | Format) -> Format:
    resolved = parse(format)
    if resolved.bits > 16:
        raise ValueError(f"{resolved} has {resolved.bits} bits; codes are made for formats of at most 16")
    return resolved


def divide_by_scale(x: Tensor, scale: Tensor) -> Tensor:
    """``x / scale`` in float32, where a subnormal ``x`` counts at its value.

    Exact for powers of two within 2^-100 to 2^100, but for a quotient below 2^-126, which is zero, and one of a finite
    ``x`` beyond float32's maximum, which is that: finite values and infinities are told apart later.
    """
    magnitude = x.abs()
    bounded = (x / scale).clamp_(-_FLOAT32_MAX, _FLOAT32_MAX)
    # Looking at the quotient would be too late: one just below 2^-126 is rounded to it before it can be flushed.
    return torch.where(magnitude == math.inf, x, bounded.mul_(magnitude >= scale * _MIN_NORMAL))


def _multiply_by_scale(x: Tensor, scale: Tensor) -> Tensor:
    """``x * scale``, where a product below 2^-126 is zero."""
    return (x * scale).mul_(x.abs() >= _MIN_NORMAL / scale)


def flush_subnormals(x: Tensor) -> Tensor:
    """Zero, with the sign kept, where float32 ``x`` is below 2^-126: what XLA's CPU backend does by itself."""
    return x * (x.abs() >= _MIN_NORMAL)


def _to_dtype_of(x: Tensor, result: Tensor) -> Tensor:
    """``result`` in the dtype of ``x``, which has its signs; torch's conversion to bfloat16 loses the sign of NaN."""
    if x.dtype == torch.float32:
        return result
    narrow = result.to(x.dtype)
    return narrow.masked_fill_(result.isnan(), math.nan).copysign_(x)


def _to_float32_odd(x: Tensor) -> Tensor:
    """float64 to float32, rounded to odd: rounding the result again, to fewer bits, equals rounding ``x`` once."""
    nearest = x.to(torch.float32)
    bits = nearest.view(torch.int32)
    exact = nearest.to(torch.float64) == x
    too_far = nearest.to(torch.float64).abs() > x.abs()
    odd = (bits - too_far.to(torch.int32)) | 1
    return torch.where(exact | x.isnan(), bits, odd).view(torch.float32)


def _bits_of(value: float) -> int:
    return int(np.float32(value).view(np.int32))


def _next_up(value: float) -> float:
    return float(np.nextafter(np.float32(value), np.float32(np.inf)))

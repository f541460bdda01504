"""The arithmetic of a cast: float32 (or float64) in, float32 on the grid out, elementwise.

Everything here is bit exact whether the processor keeps subnormal numbers or flushes them
(``torch.set_flush_denormal``, which its other threads do not learn of): where one could matter, it is handled as an
integer.

Each grid is served twice. Eager torch pays for every pass over memory and most for branches, so what casts by a
:class:`~altgrad_core.formats.Format` writes where it reads and masks by arithmetic. A compiler fuses the passes, so
what casts by :class:`~altgrad_torch.params.FormatParams` says what it means with ``where``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from altgrad_core.formats import Format, Overflow, Rounding
from altgrad_torch.conversions import is_read_within, values_by_torch
from altgrad_torch.cpu import under_transforms
from altgrad_torch.params import FormatParams

_SIGN = -(2**31)
_MAGNITUDE = 0x7FFFFFFF
_INF = 0x7F800000
_FLOAT64_MAGNITUDE = 2**63 - 1
_FLOAT64_INF = 0x7FF << 52
_NAN = 0x7FC00000
_IMPLICIT_ONE = 1 << 23
_SIGN_AND_EXPONENT = -_IMPLICIT_ONE
_MIN_EXPONENT = -126
_FLOAT32_MAX = float(np.finfo(np.float32).max)

_ADDENDS: dict[Rounding, int] = {"nearest_even": (1 << 29) - 1, "nearest_away": 1 << 29, "toward_zero": 0}
"""What is added before the rest is cut off, in 2^-30 of a quantum; to nearest even one more where the code is odd."""


class Draw(NamedTuple):
    """Random bits for stochastic rounding.

    Attributes:
        bits: int32 of the shape of what is rounded.
        count: how many of the lowest bits are used, 1 to 24.
    """

    bits: Tensor
    count: int


class Beyond(NamedTuple):
    """What becomes of values beyond max.

    Attributes:
        finite: of finite ones: a float, or a float32 tensor. For params every finite float means the maximum of the
            grid that they are cast to, which a scale may have moved.
        infinite: of infinities, likewise.
    """

    finite: float | Tensor
    infinite: float | Tensor


def beyond_max(format: Format | FormatParams, overflow: Overflow) -> Beyond:
    """What values beyond max become under an overflow policy."""
    if isinstance(format, FormatParams):
        native, maximum = format.native_overflow, 0.0
    else:
        native, maximum = format.overflow_value, format.max_representable_value
    finite = native if overflow == "native" else maximum
    return Beyond(finite, math.inf if overflow == "saturate_finite" else finite)


def round_to_grid(
    x: Tensor, format: Format | FormatParams, rounding: Rounding, beyond: Beyond, draw: Draw | None
) -> Tensor:
    """Round float32 values to the grid of a format, which is not float32.

    Args:
        x: float32, any shape and strides.
        format: the grid. While a compiler traces, a :class:`~altgrad_core.formats.Format` serves like its params.
        rounding: how to round.
        beyond: what values beyond max become.
        draw: for stochastic rounding.

    Returns:
        A new float32 tensor of the shape of ``x``.
    """
    if isinstance(format, FormatParams):
        return _round_compiled(x, format, rounding, beyond, draw)
    # Under vmap random bits may be of more dimensions than x shows, and what is made of x would have no room for them.
    if torch.compiler.is_compiling() or not format.is_signed or under_transforms():
        return _round_compiled(x, FormatParams.from_format(format, device=x.device), rounding, beyond, draw)
    if rounding == "nearest_even" and (rounded := values_by_torch(x, format)) is not None:
        return rounded
    if format.cast_path == "fast" and rounding == "nearest_even":
        return _finish_in_place(_nearest_in_place(x, format), x, format, beyond)
    if format.min_exponent == _MIN_EXPONENT:
        out = _significands_in_place(x, format, rounding, draw)
    elif format.min_exponent > _MIN_EXPONENT:
        out = _integers_in_place(x, format, rounding, draw)
    else:
        out = (_integers(x, format, rounding, draw) | _SIGN).view(torch.float32)
    # NaN, which integers have lost, comes back from x: the minimum of anything and NaN is NaN.
    return _finish_in_place(torch.minimum(out, x.clamp_min(0.0)), x, format, beyond)


def round_float64_to_grid(
    x: Tensor, format: Format | FormatParams, rounding: Rounding, beyond: Beyond, draw: Draw | None
) -> Tensor:
    """Round float64 values to the grid of any format, float32 included, once: see :func:`round_to_grid`.

    Returns:
        float32, which holds every grid: rounding to float32 on the way would lose ties, random fractions and overflow.
    """
    params = format if isinstance(format, FormatParams) else FormatParams.from_format(format, device=x.device)
    bits = x.view(torch.int64)
    magnitude = bits & _FLOAT64_MAGNITUDE
    # To all that follows a value is zero, finite, infinite or NaN, and has a sign: said in the bits of a float32.
    kind = torch.where(magnitude < _FLOAT64_INF, (magnitude > 0).to(torch.int64), _INF + (magnitude > _FLOAT64_INF))
    kind = (kind | (bits >> 63 << 31)).to(torch.int32)
    steps, exponent = _float64_steps(magnitude, params, rounding, draw)
    if params.path == "unsigned":
        rounded = powers_of_two((exponent + steps + 126).clamp_max(255).to(torch.int32))
        return _finished_unsigned(rounded, kind, params, beyond)
    # From 2^128 on a value is beyond every max, as infinity is.
    high, steps, exponent = exponent > 127, steps.to(torch.int32), exponent.to(torch.int32)
    own_codes = params.path == "identity"
    rounded = steps + ((exponent + 126) << 23) if own_codes else _bits_of_steps(steps, exponent, params)
    return _finished(torch.where(high, _INF, rounded), kind, params, beyond)


def _float64_steps(
    magnitude: Tensor, params: FormatParams, rounding: Rounding, draw: Draw | None
) -> tuple[Tensor, Tensor]:
    """The whole quanta that magnitudes, as bits of float64, round to, and the exponents of their binades: int64."""
    stored = (magnitude >> 52).clamp_min(1)
    significand = magnitude.sub(stored - 1, alpha=1 << 52)
    unbiased = stored - 1023
    exponent = unbiased.clamp_min(params.min_exponent)
    codes_below = (exponent - params.min_exponent) << params.mantissa_bits
    if params.path == "unsigned":
        # Without a code for zero every code is one less. What is below the smallest value becomes that.
        significand = torch.where(unbiased < exponent, 1 << 52, significand)
        return _round_steps(significand, torch.full_like(exponent, 52), codes_below - 1, rounding, draw), exponent
    dropped = exponent - unbiased + (52 - params.mantissa_bits)
    return _round_steps(significand, dropped, codes_below, rounding, draw), exponent


def _round_compiled(x: Tensor, params: FormatParams, rounding: Rounding, beyond: Beyond, draw: Draw | None) -> Tensor:
    if params.path == "unsigned":
        return _unsigned(x, params, rounding, beyond, draw)
    if params.path == "fast" and rounding == "nearest_even":
        return _finished(_nearest(x, params), x.view(torch.int32), params, beyond)
    return _finished(_integers(x, params, rounding, draw), x.view(torch.int32), params, beyond)


def _nearest_in_place(x: Tensor, format: Format) -> Tensor:
    """``-|x|``, rounded by adding a power of two and taking it away: a float32 addition rounds to nearest even.

    The number added is the quantum's exponent raised by 23, for each element its own; it stays above the smallest
    quantum, so that the format's subnormals round in the same way. Negative, so that one ``threshold_`` can replace
    what lies beyond max.
    """
    out = (x.view(torch.int32) | _SIGN).view(torch.float32)
    magic = out.clamp(-format.max_representable_value, -(2.0**format.min_exponent))
    binade = magic.view(torch.int32).bitwise_and_(_SIGN_AND_EXPONENT)
    if format.mantissa_bits == 0:
        # The parity of a code is that of its exponent. A tie goes up, unless the number added is an odd multiple of
        # the quantum: which it must be where the code below the tie is even.
        parity = binade.bitwise_right_shift(23).bitwise_and_(1)
        binade.add_(parity if format.min_exponent & 1 else parity.bitwise_xor_(1))
    raised = 2.0 ** (23 - format.mantissa_bits)
    return out.add_(magic, alpha=raised).sub_(magic, alpha=raised)


def _finish_in_place(out: Tensor, x: Tensor, format: Format, beyond: Beyond) -> Tensor:
    """From rounded ``-|x|`` to results: what overflows, infinities, the payload of NaN, signs."""
    maximum = format.max_representable_value
    if beyond.finite == maximum:
        out.clamp_min_(-maximum)
    else:
        torch.threshold_(out, -_next_up(maximum), -float(beyond.finite))
    # To look for infinities where there are none takes longer than to see from the extremes that there are none.
    if beyond.infinite != beyond.finite and not math.isnan(beyond.infinite) and not is_read_within(x, _FLOAT32_MAX):
        out.masked_fill_(x.isinf(), math.inf)
    out.nan_to_num_(nan=math.nan, posinf=math.inf, neginf=-math.inf).copysign_(x)
    if format.has_negative_zero:
        return out
    # A GPU's addition would give NaN another payload.
    return out.add_(0.0) if out.device.type == "cpu" else out.masked_fill_(out == 0, 0.0)


def _significands_in_place(x: Tensor, format: Format, rounding: Rounding, draw: Draw | None) -> Tensor:
    """``-|x|`` rounded as by :func:`_integers`, of formats with float32's exponents: only the significand is cut."""
    dropped = 23 - format.mantissa_bits
    magnitude = (x.view(torch.int32) & _MAGNITUDE).clamp_max_(_INF)
    if draw is not None:
        drawn = (draw.bits.to(torch.int32) << (30 - draw.count)).bitwise_and_((1 << 30) - 1)
        magnitude.add_(drawn.bitwise_right_shift_(30 - dropped))
    else:
        if rounding == "nearest_even":
            magnitude.add_(magnitude.bitwise_right_shift(dropped).bitwise_and_(1))
        magnitude.add_(_ADDENDS[rounding] >> (30 - dropped))
    return (
        torch.threshold_(magnitude.bitwise_and_(-(1 << dropped)), _IMPLICIT_ONE - 1, 0)
        .bitwise_or_(_SIGN)
        .view(torch.float32)
    )


def _integers_in_place(x: Tensor, format: Format, rounding: Rounding, draw: Draw | None) -> Tensor:
    """``-|x|`` rounded as by :func:`_integers`, of formats whose smallest binade float32 has as a normal one."""
    lowest = format.min_exponent + 127
    significand = x.view(torch.int32) & _MAGNITUDE
    stored = (significand >> 23).clamp_min_(1)
    significand.sub_(stored, alpha=_IMPLICIT_ONE).add_(_IMPLICIT_ONE)
    shift = torch.rsub(stored, lowest).clamp_min_(0).add_(23 - format.mantissa_bits)
    if draw is not None:
        # 30 bits hold the most that can be drawn, and what lies further down cannot tip the sum.
        significand.bitwise_right_shift_((shift - 30).clamp(0, 31))
        addend = (draw.bits.to(torch.int32) << (30 - draw.count)).bitwise_and_((1 << 30) - 1)
    else:
        addend = torch.full_like(shift, _ADDENDS[rounding])
    shift.clamp_max_(30)
    if rounding == "nearest_even":
        odd = significand >> shift
        if format.mantissa_bits == 0:
            odd.add_(stored.clamp_min(lowest)).sub_(lowest)
        significand.add_(odd.bitwise_and_(1))
    significand.add_(addend.bitwise_right_shift_(30 - shift)).bitwise_right_shift_(shift)
    negative_power = stored.clamp_min_(lowest).add_(256).bitwise_left_shift_(23).view(torch.float32)
    out = significand.to(torch.float32).mul_(2.0**-format.mantissa_bits).mul_(negative_power)
    if format.min_exponent - format.mantissa_bits < _MIN_EXPONENT:
        torch.threshold_(out.view(torch.int32), _SIGN | (_IMPLICIT_ONE - 1), _SIGN)
    return out


def _nearest(x: Tensor, params: FormatParams) -> Tensor:
    """Bits of ``|x|``, rounded as by :func:`_nearest_in_place`."""
    bounded = torch.minimum(x.view(torch.int32) & _MAGNITUDE, (2 * params.max_value).view(torch.int32))
    lowest = (params.min_exponent + 127) << 23
    exponent = torch.maximum(bounded & _INF, lowest)
    odd_magic = ((exponent ^ lowest) >> 23) & (params.mantissa_bits == 0)
    magic = ((exponent + ((23 - params.mantissa_bits) << 23)) | odd_magic).view(torch.float32)
    return ((bounded.view(torch.float32) + magic) - magic).view(torch.int32)


def _finished(rounded: Tensor, bits: Tensor, params: FormatParams, beyond: Beyond) -> Tensor:
    """From the bits of rounded magnitudes and of values to results: what overflows, infinities, NaN, signs."""
    magnitude = bits & _MAGNITUDE
    rounded = torch.where(rounded > params.max_value.view(torch.int32), _bits(beyond.finite, params), rounded)
    rounded = torch.where(magnitude == _INF, _bits(beyond.infinite, params), rounded)
    rounded = torch.where(magnitude > _INF, _NAN, rounded)
    signs = torch.where((rounded == 0) & ~params.negative_zero, 0, bits & _SIGN)
    return (rounded | signs).view(torch.float32)


def _integers(x: Tensor, format: Format | FormatParams, rounding: Rounding, draw: Draw | None) -> Tensor:
    """Bits of ``|x|`` rounded in integer arithmetic: any signed format, any rounding. Those of NaN mean nothing."""
    magnitude = x.view(torch.int32) & _MAGNITUDE
    field = magnitude >> 23
    stored = field.clamp_min(1)
    significand = magnitude.sub_(stored - 1, alpha=_IMPLICIT_ONE)
    # Of subnormals only those from 2^-127 on, which is their exponent, can round to a result that is not flushed.
    exponent = (field - 127).clamp_min(format.min_exponent)
    dropped = exponent - stored + (150 - format.mantissa_bits)
    codes_below = (exponent - format.min_exponent) << format.mantissa_bits
    return _bits_of_steps(_round_steps(significand, dropped, codes_below, rounding, draw), exponent, format)


def _bits_of_steps(steps: Tensor, exponent: Tensor, format: Format | FormatParams) -> Tensor:
    """Bits of so many quanta of the binades of ``exponent``, zero below 2^-126: int32."""
    # steps has at most 24 bits, so it is exact in float32; its exponent field then takes up the quantum's.
    rounded = steps.to(torch.float32).view(torch.int32) + ((exponent - format.mantissa_bits) << 23)
    rounded = rounded * steps.clamp_max(1)
    return torch.threshold(rounded, _IMPLICIT_ONE - 1, 0)


def _round_steps(
    significand: Tensor, dropped: Tensor, codes_below: Tensor, rounding: Rounding, draw: Draw | None
) -> Tensor:
    """Round ``significand / 2^dropped`` to an integer; with ``codes_below`` added it is the code.

    A significand has at most 24 bits if it is int32, 53 if it is int64.
    """
    last_bit, beyond_significand = (31, 29) if significand.dtype == torch.int32 else (63, 58)
    if draw is not None:
        # 30 bits hold the most that can be drawn, and what lies further down cannot tip the sum.
        significand = significand >> (dropped - 30).clamp(0, last_bit)
        shift = dropped.clamp_max(30)
        drawn = draw.bits.to(significand.dtype) & ((1 << draw.count) - 1)
        aligned = (drawn << (shift - draw.count).clamp_min_(0)) >> (draw.count - shift).clamp_min_(0)
        return (significand + aligned) >> shift
    shift = dropped.clamp_max(beyond_significand)
    if rounding == "toward_zero":
        return significand >> shift
    half = torch.ones_like(shift) << shift
    if rounding == "nearest_even":
        half = half + (((significand >> shift) + codes_below) & 1) - 1
    return (half + 2 * significand) >> (shift + 1)


def _unsigned(x: Tensor, params: FormatParams, rounding: Rounding, beyond: Beyond, draw: Draw | None) -> Tensor:
    """Round to powers of two without sign and zero: in the bits of the exponent, those below 2^-126 included."""
    bits = x.view(torch.int32)
    lowest, maximum = (params.min_exponent + 127) << 23, params.max_value.view(torch.int32)
    # A binade beyond max is room enough to overflow, for infinities and NaN as well.
    extended = torch.minimum(torch.maximum(extended_bits(bits), lowest), maximum + _IMPLICIT_ONE)
    if draw is not None:
        drawn = draw.bits.to(torch.int32) & ((1 << draw.count) - 1)
        rest = drawn << (23 - draw.count) if draw.count <= 23 else drawn >> (draw.count - 23)
    elif rounding == "nearest_even":
        rest = (1 << 22) - 1 + (((extended >> 23) - params.min_exponent + 127) & 1)
    else:
        rest = 0 if rounding == "toward_zero" else 1 << 22
    return _finished_unsigned(powers_of_two((extended + rest) >> 23), bits, params, beyond)


def powers_of_two(field: Tensor) -> Tensor:
    """Bits of powers of two by their exponent fields, which go on below those of normal float32: int32."""
    return torch.where(field > 0, field << 23, torch.ones_like(field) << (field + 22).clamp(0, 22))


def _finished_unsigned(rounded: Tensor, bits: Tensor, params: FormatParams, beyond: Beyond) -> Tensor:
    """As :func:`_finished`, where zero and negative values are NaN."""
    rounded = torch.where(rounded > params.max_value.view(torch.int32), _bits(beyond.finite, params), rounded)
    rounded = torch.where(bits == _INF, _bits(beyond.infinite, params), rounded)
    return torch.where((bits <= 0) | (bits > _INF), _NAN, rounded).view(torch.float32)


def extended_bits(bits: Tensor) -> Tensor:
    """The bits that positive float32 values would have if exponents went on below 2^-126: those fields are not > 0."""
    subnormal = bits.to(torch.float32).view(torch.int32) - (149 << 23)
    return torch.where(bits < _IMPLICIT_ONE, subnormal, bits)


def _bits(value: float | Tensor, params: FormatParams) -> int | Tensor:
    """Bits of what a value beyond max becomes: of the finite ones that can only be max."""
    if isinstance(value, Tensor):
        return value.view(torch.int32)
    if math.isinf(value):
        return _INF
    return _NAN if math.isnan(value) else params.max_value.view(torch.int32)


def _next_up(value: float) -> float:
    return float(np.nextafter(np.float32(value), np.float32(np.inf)))

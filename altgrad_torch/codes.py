"""Codes of values: real bytes, for storage and exchange. ``altgrad_jax/codes.py`` says the same thing in JAX."""

from __future__ import annotations

import torch
from torch import Tensor

from altgrad_core.errors import InputError
from altgrad_core.formats import Format, Overflow, Rounding, parse
from altgrad_core.reference import check_modes
from altgrad_torch.casting import cast, check_floating, in_chunks
from altgrad_torch.kernels import extended_bits, powers_of_two
from altgrad_torch.params import FormatParams

_MAGNITUDE = 0x7FFFFFFF
_INF = 0x7F800000
_IMPLICIT_ONE = 1 << 23
_SIGN = -(2**31)
_NAN = 0x7FC00000
_MOST_BITS = 16


def encode(
    x: Tensor, format: str | Format, *, rounding: Rounding = "nearest_even", overflow: Overflow = "native"
) -> Tensor:
    """The codes that ``x`` rounds to.

    NaN becomes the format's NaN, or 0 where it has none: count those with
    :func:`altgrad_torch.statistics.cast_counts`. An infinity that the format lacks becomes ±max.

    Args:
        x: floating-point tensor, each element rounded once, from its own value.
        format: a name or a :class:`~altgrad_core.formats.Format` of at most 16 bits.
        rounding: all but ``stochastic``.
        overflow: see :data:`altgrad_core.formats.Overflow`.

    Returns:
        uint8 (uint16 for formats of more than 8 bits) of the shape of ``x``; the code sits in the low bits.

    Raises:
        TypeError: if ``x`` is not floating point, or for params, from which no dtype follows.
        ValueError: for unknown formats or modes, and formats of more than 16 bits.

    >>> encode(torch.tensor([1.0, -1.0]), "E5M2").tolist()
    [60, 188]
    """
    resolved = _codable(format)
    check_floating(x, "encode")
    check_modes(rounding, overflow)
    if rounding == "stochastic":
        raise InputError("rounding='stochastic' needs random_bits: quantize with them, then encode the result")
    dtype = torch.uint8 if resolved.bits <= 8 else torch.uint16

    def part(x: Tensor) -> Tensor:
        on_grid = cast(x, resolved, rounding=rounding, overflow=overflow).view(torch.int32)
        return _codes_of_grid(on_grid, resolved).to(dtype)

    return in_chunks(part, resolved, dtype, x.detach())


def _codes_of_grid(on_grid: Tensor, format: Format) -> Tensor:
    """Codes of values on the grid, or not finite, from their bits: int32."""
    magnitude = on_grid & _MAGNITUDE
    code = _finite_codes(magnitude, format)
    code.masked_fill_(magnitude == _INF, format.inf_code or format.max_code)
    code.bitwise_or_((on_grid < 0).to(torch.int32).mul_(format.sign_mask))
    return code.masked_fill_(magnitude > _INF, format.nan_code or 0)


def _finite_codes(magnitude: Tensor, format: Format) -> Tensor:
    """Codes of values on the grid, from the bits of their magnitudes: int32."""
    if not format.is_signed:
        return (extended_bits(magnitude) >> 23) - (format.min_exponent + 127)
    field = magnitude >> 23
    stored = field.clamp_min(1)
    significand = magnitude - (stored - 1) * _IMPLICIT_ONE
    exponent = (stored - 127).clamp_min_(format.min_exponent)
    shift = ((150 - format.mantissa_bits) + exponent - stored).clamp_max_(31)
    code = (significand >> shift) + ((exponent - format.min_exponent) << format.mantissa_bits)
    return code.mul_(field.clamp_max_(1))


def decode(codes: Tensor, format: str | Format) -> Tensor:
    """The float32 values of codes; those below 2^-126 are zero, but for the 2^-127 of formats without a sign.

    Args:
        codes: unsigned integers; bits above the format's width are ignored.
        format: a name or a :class:`~altgrad_core.formats.Format` of at most 16 bits.

    Raises:
        TypeError: if the codes are not unsigned integers, or for params.
        ValueError: for unknown formats and formats of more than 16 bits.

    >>> decode(torch.tensor([60, 188], dtype=torch.uint8), "E5M2").tolist()
    [1.0, -1.0]
    """
    if codes.dtype not in (torch.uint8, torch.uint16, torch.uint32, torch.uint64):
        raise TypeError(f"codes are unsigned integers; got {codes.dtype}")
    resolved = _codable(format)
    mask = (1 << resolved.bits) - 1
    if torch.compiler.is_compiling() or codes.numel() <= mask:
        return _values(codes.to(torch.int32) & mask, resolved)
    book = _values(torch.arange(mask + 1, dtype=torch.int32, device=codes.device), resolved)

    def part(codes: Tensor) -> Tensor:
        return book.index_select(0, (codes.to(torch.int32) & mask).reshape(-1)).view(codes.shape)

    return in_chunks(part, resolved, torch.float32, codes)


def _values(codes: Tensor, format: Format) -> Tensor:
    """float32 values of codes, made of their bits, so that no processor flushes them."""
    if not format.is_signed:
        powers = powers_of_two(codes + (format.min_exponent + 127))
        return torch.where(codes > format.max_code, _NAN, powers).view(torch.float32)
    magnitude = codes & format.magnitude_mask
    stored = magnitude >> format.mantissa_bits
    significand = (magnitude & ((1 << format.mantissa_bits) - 1)) + (stored.clamp_max(1) << format.mantissa_bits)
    exponent = stored.clamp_min(1) + (format.min_exponent - 1 - format.mantissa_bits)
    bits = significand.to(torch.float32).view(torch.int32) + (exponent << 23)
    bits = torch.where((significand == 0) | (bits < _IMPLICIT_ONE), 0, bits)
    bits = torch.where(magnitude > format.max_code, _NAN, bits)
    if format.has_inf:
        bits = torch.where(magnitude == format.max_code + 1, _INF, bits)
    negative = codes & format.sign_mask != 0
    if not format.has_negative_zero:
        bits = torch.where(negative & (magnitude == 0), _NAN, bits)
        negative = negative & (bits != 0)
    return torch.where(negative, bits | _SIGN, bits).view(torch.float32)


def _codable(format: str | Format) -> Format:
    if isinstance(format, FormatParams):
        raise TypeError("codes need a static format: a name or a Format; got FormatParams")
    resolved = parse(format)
    if resolved.bits > _MOST_BITS:
        raise InputError(f"{resolved} has {resolved.bits} bits; codes are made for formats of at most {_MOST_BITS}")
    return resolved

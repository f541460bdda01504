"""Codes of values: real bytes, for storage and exchange. ``altgrad_jax/codes.py`` says the same thing in JAX."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from altgrad_core.codes import SpecialCodes, parse_codable
from altgrad_core.errors import InputError
from altgrad_core.formats import OVERFLOWS, CastPath, Format, Overflow, Rounding
from altgrad_core.reference import check_modes
from altgrad_torch.casting import (
    cast,
    cast_marking_overflow,
    check_floating,
    in_chunks,
    widened,
    without_negative_bit,
)
from altgrad_torch.conversions import codes_by_torch
from altgrad_torch.kernels import extended_bits, powers_of_two
from altgrad_torch.params import FormatParams
from altgrad_torch.shards import is_sharded, on_shards

_MAGNITUDE = 0x7FFFFFFF
_INF = 0x7F800000
_IMPLICIT_ONE = 1 << 23
_SIGN = -(2**31)
_NAN = 0x7FC00000
_NATIVE = OVERFLOWS.index("native")
_SATURATE_FINITE = OVERFLOWS.index("saturate_finite")


class CodeParams(NamedTuple):
    """What encoding and decoding need to know of a format, in tensors: params and special codes.

    As :class:`~altgrad_torch.params.FormatParams` they may be arguments of compiled code, which is compiled once for
    each path and dtype, and stacks of them may be mapped over by ``torch.vmap``. They are made by :meth:`from_format`.
    The rounding is an argument of :func:`encode`.

    Attributes:
        params: the format.
        sign_mask: int32, see :attr:`altgrad_core.formats.Format.sign_mask`.
        max_code: int32, code of the largest finite value.
        inf_code: int32, code of infinity; ``max_code`` without one.
        nan_code: int32, code of NaN; 0 without one.
        overflow_code: int32, what a value beyond max becomes under the overflow policy.
        overflow: int32, index into :data:`altgrad_core.formats.OVERFLOWS`.
    """

    params: FormatParams
    sign_mask: Tensor
    max_code: Tensor
    inf_code: Tensor
    nan_code: Tensor
    overflow_code: Tensor
    overflow: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Of the codes: uint8, or uint16 for more than 8 bits. It belongs to the type, as the path of params does."""
        return _DTYPE_OF[type(self)]

    @staticmethod
    def from_format(
        format: str | Format,
        *,
        overflow: Overflow = "native",
        path: CastPath | None = None,
        device: torch.device | str | None = None,
    ) -> CodeParams:
        """The code params of one format.

        Args:
            format: a name or a :class:`~altgrad_core.formats.Format`.
            overflow: what overflow becomes.
            path: see :meth:`altgrad_torch.params.FormatParams.from_format`.
            device: where the tensors live.

        Raises:
            UnknownFormatError: for an unknown name.
            ValueError: for an unknown overflow policy, a format of more than 16 bits, or a path that cannot serve it.

        >>> CodeParams.from_format("float8_e4m3fnuz").nan_code.item()
        128
        """
        resolved = codable(format)
        check_modes("nearest_even", overflow)
        codes = (*SpecialCodes.of(resolved, overflow), OVERFLOWS.index(overflow))
        kind = _CodesOf8Bits if resolved.bits <= 8 else _CodesOf16Bits
        params = FormatParams.from_format(resolved, path=path, device=device)
        return kind(params, *(torch.tensor(code, dtype=torch.int32, device=device) for code in codes))

    def set_(self, format: str | Format) -> None:
        """Make these the params of another format, in place, under the overflow policy that they have.

        Raises:
            UnknownFormatError: for an unknown name.
            InputError: for a format whose codes are of another dtype, or that their path cannot serve.

        >>> params = CodeParams.from_format("E4M3")
        >>> params.set_("E5M2")
        >>> encode(torch.tensor([1.0]), params).tolist()
        [60]
        """
        resolved = codable(format)
        other = CodeParams.from_format(resolved, path=self.params.path, device=self.sign_mask.device)
        if other.dtype != self.dtype:
            expected = "at most 8" if self.dtype == torch.uint8 else "more than 8"
            raise InputError(
                f"{resolved} has {resolved.bits} bits, but these codes are {self.dtype}; expected {expected} bits"
            )
        beyond = torch.where(self.overflow == _NATIVE, other.overflow_code, other.max_code)
        self.params.set_(resolved)
        for mine, theirs in zip(self[1:-1], other._replace(overflow_code=beyond)[1:-1], strict=True):
            mine.copy_(theirs)

    @staticmethod
    def stack(codes: Sequence[CodeParams]) -> CodeParams:
        """Code params of n formats of one path and dtype, with a leading axis of n to map over.

        Raises:
            ValueError: if the sequence is empty or mixes paths or dtypes.
        """
        params = FormatParams.stack([each.params for each in codes])
        dtypes = {str(each.dtype) for each in codes}
        if len(dtypes) != 1:
            raise ValueError(f"cannot stack code params of the dtypes {sorted(dtypes)}; expected one dtype")
        return type(codes[0])(params, *map(torch.stack, zip(*(each[1:] for each in codes), strict=True)))


class _CodesOf8Bits(CodeParams):
    __slots__ = ()


class _CodesOf16Bits(CodeParams):
    __slots__ = ()


_DTYPE_OF = {_CodesOf8Bits: torch.uint8, _CodesOf16Bits: torch.uint16}


def encode(
    x: Tensor,
    format: str | Format | CodeParams,
    *,
    rounding: Rounding = "nearest_even",
    overflow: Overflow = "native",
) -> Tensor:
    """The codes that ``x`` rounds to.

    NaN becomes the format's NaN, or 0 where it has none: count those with
    :func:`altgrad_torch.statistics.cast_counts`. An infinity that the format lacks becomes ±max.

    Args:
        x: floating-point tensor, each element rounded once, from its own value.
        format: a name, a :class:`~altgrad_core.formats.Format` of at most 16 bits, or :class:`CodeParams`, which change
            under ``torch.compile`` without compiling anything.
        rounding: all but ``stochastic``.
        overflow: see :data:`altgrad_core.formats.Overflow`; not beside ``CodeParams``, which carry theirs.

    Returns:
        uint8 (uint16 for formats of more than 8 bits) of the shape of ``x``; the code sits in the low bits.

    Raises:
        TypeError: if ``x`` is not floating point, or for ``FormatParams``, which know no special codes.
        ValueError: for unknown formats or modes, modes without effect, and formats of more than 16 bits.

    >>> encode(torch.tensor([1.0, -1.0]), "E5M2").tolist()
    [60, 188]
    """
    check_floating(x, "encode")
    x = without_negative_bit(x)
    check_modes(rounding, overflow)
    if rounding == "stochastic":
        raise InputError("rounding='stochastic' needs random_bits: quantize with them, then encode the result")
    if is_sharded(x):
        return on_shards(lambda x: encode(x, format, rounding=rounding, overflow=overflow), x.detach())
    if isinstance(format, CodeParams):
        if overflow != "native":
            raise InputError(
                f"overflow={overflow!r} would have no effect: CodeParams carry their own; give it to "
                "CodeParams.from_format"
            )
        return _encoded(x, format, rounding)
    resolved = codable(format)

    def part(x: Tensor) -> Tensor:
        x = x if x.dtype == torch.float64 else widened(x)
        may_convert = rounding == "nearest_even" and x.dtype == torch.float32 and not torch.compiler.is_compiling()
        if may_convert and (codes := codes_by_torch(x, resolved)) is not None:
            return codes
        return codes_of_grid(cast(x, resolved, rounding=rounding, overflow=overflow), resolved)

    return in_chunks(part, resolved, dtype_of_codes(resolved), x.detach())


def codes_of_grid(x: Tensor, format: Format) -> Tensor:
    """Codes of float32 values that are on the grid of a format, or not finite."""
    on_grid = x.view(torch.int32)
    magnitude = on_grid & _MAGNITUDE
    finite = _finite_codes if format.is_signed else _codes_of_powers
    code = finite(magnitude, format)
    code.masked_fill_(magnitude == _INF, format.inf_code or format.max_code)
    code.bitwise_or_((on_grid < 0).to(torch.int32).mul_(format.sign_mask))
    return code.masked_fill_(magnitude > _INF, format.nan_code or 0).to(dtype_of_codes(format))


def _encoded(x: Tensor, code: CodeParams, rounding: Rounding) -> Tensor:
    """:func:`encode` by params, where infinity marks what overflows, and ``x`` tells which of them were infinite."""
    on_grid = cast_marking_overflow(x, code.params, rounding).view(torch.int32)
    magnitude = on_grid & _MAGNITUDE
    finite = _codes_of_powers if code.params.path == "unsigned" else _finite_codes
    kept_inf = x.detach().isinf() & (code.overflow == _SATURATE_FINITE)
    codes = torch.where(
        magnitude == _INF, torch.where(kept_inf, code.inf_code, code.overflow_code), finite(magnitude, code.params)
    )
    # A NaN that stands for what overflows takes no sign.
    signed = (on_grid < 0) & (codes <= code.inf_code)
    codes = torch.where(signed, codes | code.sign_mask, codes)
    return torch.where(magnitude > _INF, code.nan_code, codes).to(code.dtype)


def _finite_codes(magnitude: Tensor, format: Format | FormatParams) -> Tensor:
    """Codes of values on the grid of a signed format, from the bits of their magnitudes: int32."""
    field = magnitude >> 23
    stored = field.clamp_min(1)
    significand = magnitude - (stored - 1) * _IMPLICIT_ONE
    exponent = (stored - 127).clamp_min(format.min_exponent)
    shift = ((150 - format.mantissa_bits) + exponent - stored).clamp_max_(31)
    code = (significand >> shift) + ((exponent - format.min_exponent) << format.mantissa_bits)
    return code.mul_(field.clamp_max_(1))


def _codes_of_powers(magnitude: Tensor, format: Format | FormatParams) -> Tensor:
    """Codes of powers of two, from their bits: int32."""
    return (extended_bits(magnitude) >> 23) - (format.min_exponent + 127)


def decode(codes: Tensor, format: str | Format | CodeParams) -> Tensor:
    """The float32 values of codes; those below 2^-126 are zero, but for the 2^-127 of formats without a sign.

    Args:
        codes: unsigned integers; bits above the format's width are ignored.
        format: a name, a :class:`~altgrad_core.formats.Format` of at most 16 bits, or :class:`CodeParams`, which change
            under ``torch.compile`` without compiling anything.

    Raises:
        TypeError: if the codes are not unsigned integers, or for ``FormatParams``, which know no special codes.
        ValueError: for unknown formats and formats of more than 16 bits.

    >>> decode(torch.tensor([60, 188], dtype=torch.uint8), "E5M2").tolist()
    [1.0, -1.0]
    """
    if codes.dtype not in (torch.uint8, torch.uint16, torch.uint32, torch.uint64):
        raise TypeError(f"codes are unsigned integers; got {codes.dtype}")
    if is_sharded(codes):
        return on_shards(lambda codes: decode(codes, format), codes)
    if isinstance(format, CodeParams):
        return _values(codes.to(torch.int32), format)
    resolved = codable(format)
    code = CodeParams.from_format(resolved, device=codes.device)
    mask = (1 << resolved.bits) - 1
    if torch.compiler.is_compiling() or codes.numel() <= mask:
        return _values(codes.to(torch.int32), code)
    book = _values(torch.arange(mask + 1, dtype=torch.int32, device=codes.device), code)

    def part(codes: Tensor) -> Tensor:
        return book.index_select(0, (codes.to(torch.int32) & mask).reshape(-1)).view(codes.shape)

    return in_chunks(part, resolved, torch.float32, codes)


def _values(codes: Tensor, code: CodeParams) -> Tensor:
    """float32 values of codes, made of their bits, so that no processor flushes them."""
    params = code.params
    if params.path == "unsigned":
        exponents = codes & code.nan_code  # all of whose bits are one
        powers = powers_of_two(exponents + (params.min_exponent + 127))
        return torch.where(exponents > code.max_code, _NAN, powers).view(torch.float32)
    magnitude = codes & (code.sign_mask - 1)
    negative = (codes & code.sign_mask) != 0
    bits = _bits_of_codes(magnitude, params)
    is_finite = (magnitude <= code.max_code) & ~(negative & (magnitude == 0) & ~params.negative_zero)
    bits = torch.where(is_finite, bits, _NAN)
    bits = torch.where((magnitude == code.inf_code) & (magnitude > code.max_code), _INF, bits)
    signed = negative & (bits <= _INF) & ((bits > 0) | params.negative_zero)
    return torch.where(signed, bits | _SIGN, bits).view(torch.float32)


def _bits_of_codes(magnitude: Tensor, params: FormatParams) -> Tensor:
    """Bits of what codes without their sign would be worth if all of them were finite: int32."""
    stored = magnitude >> params.mantissa_bits
    one = torch.ones_like(magnitude)
    significand = (magnitude & ((one << params.mantissa_bits) - 1)) + (stored.clamp_max(1) << params.mantissa_bits)
    exponent = stored.clamp_min(1) + (params.min_exponent - 1 - params.mantissa_bits)
    bits = significand.to(torch.float32).view(torch.int32) + (exponent << 23)
    return torch.where((significand == 0) | (bits < _IMPLICIT_ONE), 0, bits)


def dtype_of_codes(format: Format) -> torch.dtype:
    """uint8, or uint16 for more than 8 bits."""
    return torch.uint8 if format.bits <= 8 else torch.uint16


def codable(format: str | Format) -> Format:
    """The format of a name, if there are codes of it.

    Raises:
        TypeError: for ``FormatParams``, which know no special codes.
        ValueError: for an unknown name, and for a format of more than 16 bits.
    """
    if isinstance(format, FormatParams):
        raise TypeError("codes need to know special codes as well: give a name, a Format or CodeParams")
    return parse_codable(format)

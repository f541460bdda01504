"""Codes of values: real bytes, for storage and exchange. ``altgrad_torch/codes.py`` says the same thing in torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from altgrad_core.codes import SpecialCodes, parse_codable
from altgrad_core.errors import InputError
from altgrad_core.formats import OVERFLOWS, ROUNDINGS, Format, Overflow, Rounding
from altgrad_jax.casting import cast, cast_float64, float64_to_odd, floating, widened, within_float32
from altgrad_jax.params import FormatParams, replaced_from

_SIGN = np.int32(-(2**31))
_MAGNITUDE = np.int32(0x7FFFFFFF)
_INF = np.int32(0x7F800000)
_IMPLICIT_ONE = np.int32(1 << 23)
_APART = np.int32(1 << 30)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CodeParams:
    """What encoding and decoding need to know of a format: params and special codes, all of which may be traced.

    Attributes:
        params: the format; its rounding is not stochastic.
        sign_mask: int32, see :attr:`altgrad_core.formats.Format.sign_mask`.
        max_code: int32, code of the largest finite value.
        inf_code: int32, code of infinity; ``max_code`` without one.
        nan_code: int32, code of NaN; 0 without one.
        overflow_code: int32, what a value beyond max becomes under the overflow policy.
        dtype: of the codes (static): uint8, or uint16 for more than 8 bits.
    """

    params: FormatParams
    sign_mask: jax.Array
    max_code: jax.Array
    inf_code: jax.Array
    nan_code: jax.Array
    overflow_code: jax.Array
    dtype: np.dtype = field(metadata={"static": True})

    @classmethod
    def from_format(
        cls, format: str | Format, *, rounding: Rounding = "nearest_even", overflow: Overflow = "native"
    ) -> CodeParams:
        """The code params of one format.

        Raises:
            UnknownFormatError: for an unknown name.
            ValueError: for an unknown mode, stochastic rounding, or a format of more than 16 bits.

        >>> CodeParams.from_format("float8_e4m3fnuz").nan_code.item()
        128
        """
        resolved = parse_codable(format)
        if rounding == "stochastic":
            raise InputError("rounding='stochastic' needs random bits: quantize with them, then encode the result")
        params = FormatParams.from_format(resolved, rounding=rounding, overflow=overflow)
        codes = SpecialCodes.of(resolved, overflow)
        dtype = np.dtype(np.uint8 if resolved.bits <= 8 else np.uint16)
        return cls(params, *(jnp.asarray(code, jnp.int32) for code in codes), dtype=dtype)

    @classmethod
    def stack(cls, codes: Sequence[CodeParams]) -> CodeParams:
        """Code params of n formats of one path and dtype, with a leading axis of n to ``vmap`` or map over.

        Raises:
            ValueError: if the sequence is empty or mixes paths or dtypes.
        """
        FormatParams.stack([each.params for each in codes])
        dtypes = {str(each.dtype) for each in codes}
        if len(dtypes) != 1:
            raise ValueError(f"cannot stack code params of the dtypes {sorted(dtypes)}; expected one dtype")
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *codes)


def encode(
    x: jax.Array,
    format: str | Format | CodeParams,
    *,
    rounding: Rounding = "nearest_even",
    overflow: Overflow = "native",
) -> jax.Array:
    """The codes that ``x`` rounds to.

    NaN becomes the format's NaN, or 0 where it has none: count those with
    :func:`altgrad_jax.statistics.cast_counts`. An infinity that the format lacks becomes ±max.

    Args:
        x: floating-point array.
        format: a name, a :class:`~altgrad_core.formats.Format` of at most 16 bits, or :class:`CodeParams`, which may be
            traced.
        rounding: all but ``stochastic``; not beside ``CodeParams``, which carry theirs.
        overflow: see :data:`altgrad_core.formats.Overflow`; likewise.

    Returns:
        uint8 (uint16 for formats of more than 8 bits) of the shape of ``x``; the code sits in the low bits.

    Raises:
        TypeError: if ``x`` is not floating point.
        ValueError: for unknown formats or modes, and formats of more than 16 bits.

    >>> encode(jnp.array([1.0, -1.0]), "E5M2").tolist()
    [60, 188]
    """
    return _encoded(floating(x, "encode"), _code_params(format, rounding, overflow))


@partial(jax.jit, inline=True)  # one program also outside of jit
def _encoded(x: jax.Array, code: CodeParams) -> jax.Array:
    value = widened(x) if x.dtype != jnp.float64 else _of_float64(x, code.params)
    params, bits = code.params, _bits(value)
    if params.path == "fast":
        return _encoded_by_addition(bits, code)
    on_grid = _bits(cast(value, params) if x.dtype != jnp.float64 else cast_float64(x, params)) & _MAGNITUDE
    of_grid = _codes_of_powers if params.path == "unsigned" else _codes_of_grid
    codes = _with_specials(of_grid(on_grid, params), on_grid, _INF, code.inf_code, code)
    return codes.astype(code.dtype) if params.path == "unsigned" else _with_signs(codes, bits, code)


def _of_float64(x: jax.Array, params: FormatParams) -> jax.Array:
    """float32 that rounds as ``x`` does; infinite beyond float32, but where only true infinities stay so."""
    odd = float64_to_odd(x)
    return jnp.where(params.overflow == OVERFLOWS.index("saturate_finite"), within_float32(odd, x), odd)


def _encoded_by_addition(bits: jax.Array, code: CodeParams) -> jax.Array:
    """The addition that rounds (see ``altgrad_jax.addition``) leaves the number of quanta in the sum's low bits.

    There it meets how many codes come before the binade, so that their sum is the code, and a tie goes to the even one.
    """
    params, magnitude = code.params, bits & _MAGNITUDE
    bounded = jnp.minimum(magnitude, _bits(params.max_value))
    lowest, dropped = (params.min_exponent + 127) << 23, 23 - params.mantissa_bits
    binade = jnp.maximum(bounded & _INF, lowest)
    before = lax.shift_right_logical(binade - lowest, jnp.broadcast_to(dropped, binade.shape))
    # The product is exact, so it does not matter whether it is fused with the sum.
    total = _float(bounded) + _float(binade + before) * _float((dropped + 127) << 23)
    # Beyond the codes' own bits the exponent's difference is left, which the cut to their dtype takes away.
    left = dropped << 23
    of_overflow = jnp.where(params.overflow == OVERFLOWS.index("saturate_finite"), code.inf_code, code.overflow_code)
    # A NaN that stands for what overflows takes no sign.
    of_overflow = jnp.where(of_overflow > code.inf_code, code.nan_code - _APART, of_overflow + left)
    codes = _with_specials(_bits(total) - binade, magnitude, replaced_from(params), of_overflow, code)
    return _with_signs(codes, bits, code, left)


def _with_specials(
    codes: jax.Array, magnitude: jax.Array, replaced: jax.Array | np.int32, of_overflow: jax.Array, code: CodeParams
) -> jax.Array:
    """Codes without sign, but where magnitudes, in bits, are replaced: by NaN's above infinity's, else by another.

    NaN's is negative until codes are cut to their dtype: that sets it apart from what takes a sign.
    """
    special = jnp.where(magnitude > _INF, code.nan_code - _APART, of_overflow)
    return jnp.where(magnitude >= replaced, special, codes)


def _with_signs(codes: jax.Array, bits: jax.Array, code: CodeParams, left: jax.typing.ArrayLike = 0) -> jax.Array:
    """A sign for all but NaN, and zero where there is no -0: put in at the top, where floats have it, then moved down.

    ``left`` is what codes that take a sign have beyond their bits.

    That what is left fits the dtype XLA sees from the count of the shift, and cuts it by a cheaper instruction.
    """
    first = left + jnp.where(code.params.negative_zero, 0, 1)
    signs = bits & ~(codes - first) & _SIGN
    unused = 32 - 8 * code.dtype.itemsize
    to_the_top = jnp.broadcast_to((lax.clz(code.sign_mask) & (31 - unused)) | unused, codes.shape)
    return lax.shift_right_logical(lax.shift_left(codes, to_the_top) | signs, to_the_top).astype(code.dtype)


def _codes_of_grid(magnitude: jax.Array, params: FormatParams) -> jax.Array:
    """Codes of the bits of finite magnitudes on the grid of a signed format."""
    stored = jnp.maximum(magnitude >> 23, 1)
    significand = magnitude - ((stored - 1) << 23)
    exponent = jnp.maximum(stored - 127, params.min_exponent)
    shift = jnp.minimum((23 - params.mantissa_bits) + exponent - (stored - 127), 31)
    codes = lax.shift_right_logical(significand, shift) + ((exponent - params.min_exponent) << params.mantissa_bits)
    return jnp.where(magnitude < _IMPLICIT_ONE, 0, codes)


def _codes_of_powers(magnitude: jax.Array, params: FormatParams) -> jax.Array:
    """Codes of the bits of powers of two; below 2^-126 each is a single bit."""
    exponent = jnp.where(magnitude < _IMPLICIT_ONE, -118 - lax.clz(magnitude), (magnitude >> 23) - 127)
    return exponent - params.min_exponent


def decode(codes: jax.Array, format: str | Format | CodeParams) -> jax.Array:
    """The float32 values of codes; those below 2^-126 are zero, but for formats without a sign, which have no zero.

    Args:
        codes: unsigned integers; bits above the format's width are ignored.
        format: a name, a :class:`~altgrad_core.formats.Format` of at most 16 bits, or :class:`CodeParams`, which may be
            traced.

    Raises:
        TypeError: if the codes are not unsigned integers.
        ValueError: for unknown formats and formats of more than 16 bits.

    >>> decode(jnp.array([60, 188], jnp.uint8), "E5M2").tolist()
    [1.0, -1.0]
    """
    codes = jnp.asarray(codes)
    if not jnp.issubdtype(codes.dtype, jnp.unsignedinteger):
        raise TypeError(f"codes are unsigned integers; got {codes.dtype}")
    return _decoded(codes, _code_params(format, "nearest_even", "native"))


@partial(jax.jit, inline=True)  # one program also outside of jit
def _decoded(codes: jax.Array, code: CodeParams) -> jax.Array:
    whole = codes.astype(jnp.int32)
    if code.params.path == "unsigned":
        return _float(_bits_of_powers(whole & code.nan_code, code))
    magnitude = whole & (code.sign_mask - 1)
    negative = (whole & code.sign_mask) != 0
    value = _bits_of_codes(magnitude, code.params)
    special = jnp.where(magnitude == code.inf_code, _INF, _bits(jnp.float32(np.nan)))
    value = jnp.where(magnitude > code.max_code, special, value)
    value = jnp.where(negative & ~code.params.negative_zero & (magnitude == 0), _bits(jnp.float32(np.nan)), value)
    signed = negative & (value <= _INF) & ((value > 0) | code.params.negative_zero)
    return _float(jnp.where(signed, value | _SIGN, value))


def _bits_of_codes(magnitude: jax.Array, params: FormatParams) -> jax.Array:
    """Bits of what codes without their sign would be worth if all of them were finite."""
    stored = magnitude >> params.mantissa_bits
    implicit = jnp.minimum(stored, 1) << params.mantissa_bits
    significand = (magnitude & ((1 << params.mantissa_bits) - 1)) + implicit
    exponent = jnp.maximum(stored, 1) + (params.min_exponent - 1 - params.mantissa_bits)
    bits = _bits(significand.astype(jnp.float32)) + (exponent << 23)
    return jnp.where((significand == 0) | (bits < _IMPLICIT_ONE), 0, bits)


def _bits_of_powers(magnitude: jax.Array, code: CodeParams) -> jax.Array:
    exponent = magnitude + code.params.min_exponent
    below = lax.shift_left(jnp.ones_like(exponent), jnp.clip(exponent + 149, 0, 31))
    bits = jnp.where(exponent < -126, below, (exponent + 127) << 23)
    return jnp.where(magnitude > code.max_code, _bits(jnp.float32(np.nan)), bits)


def _code_params(format: str | Format | CodeParams, rounding: Rounding, overflow: Overflow) -> CodeParams:
    if isinstance(format, FormatParams):
        raise TypeError("codes need to know special codes as well: give a name, a Format or CodeParams")
    if not isinstance(format, CodeParams):
        return CodeParams.from_format(format, rounding=rounding, overflow=overflow)
    if rounding not in ROUNDINGS or rounding != "nearest_even" or overflow != "native":
        raise InputError(
            f"rounding={rounding!r}, overflow={overflow!r} would have no effect: CodeParams carry their own; give them "
            "to CodeParams.from_format"
        )
    return format


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.int32)


def _float(bits: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(bits, jnp.float32)

"""Blocks that share a power-of-two scale, as in the MX formats: values, and codes beside E8M0 scales.

The source is the OCP Microscaling Formats (MX) specification, version 1.0: section 5 for what is stored, 6.3 for the
conversion. ``altgrad_torch/blocks.py`` says the same thing in torch.

What the specification leaves open is settled like this:

- A block that holds a NaN or an infinity has the scale NaN, and all of it is NaN, as in Microsoft's microxcaling: E8M0
  has no infinity, and no element format need have a NaN.
- A block of zeros (or of nothing but subnormal float32, which no scale here would save) has the scale 1.
- Scales keep to where every value of the format, times the scale, is zero or a float32 that is finite and normal: see
  :func:`altgrad_core.scaling.block_exponents`. For E4M3 that is 2^-116 to 2^119.
- Elements saturate, under both rules.

Quantising twice changes nothing, under either rule, while the results are numbers of the dtype: a float16 result that
float16 cannot hold is inf, which makes NaN of its block the second time.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata

from altgrad_core.errors import InputError
from altgrad_core.formats import OVERFLOWS, Format, Rounding, parse
from altgrad_core.scaling import (
    E8M0_BIAS,
    E8M0_NAN,
    MX_BLOCK,
    SMALLEST_STEP_EXPONENT,
    BlockRule,
    PerBlock,
    check_element_format,
    check_rule,
    checked_axis,
)
from altgrad_jax.addition import Addition
from altgrad_jax.axes import is_whole, split_as
from altgrad_jax.casting import (
    checked_random_bits,
    floating,
    quantize,
    to_float32,
)
from altgrad_jax.codes import CodeParams, decode, encode
from altgrad_jax.granularity import from_blocks, to_blocks
from altgrad_jax.params import FormatParams, as_params, edges
from altgrad_jax.scaling import fitting_exponent, largest_of, two_to_the

_MAGNITUDE = np.int32(0x7FFFFFFF)
_MIN_NORMAL = np.int32(0x00800000)
_INF = np.int32(0x7F800000)
_BITS_OF_ONE_SQUARED = np.int32(2 * E8M0_BIAS << 23)
_SATURATE = OVERFLOWS.index("saturate")


def block_scales(
    x: jax.Array,
    format: str | Format | FormatParams,
    *,
    block: int = MX_BLOCK,
    axis: int = -1,
    rule: BlockRule = "mx",
) -> jax.Array:
    """The scale of each block: a power of two, by the largest magnitude in it.

    Args:
        x: floating-point array of at least one axis.
        format: of the elements: a name, a :class:`~altgrad_core.formats.Format`, or :class:`FormatParams`, which may
            be traced.
        block: elements of a block; where that does not divide the axis the last block is short.
        axis: along which blocks are cut.
        rule: ``"mx"`` or ``"fit"``, see :data:`altgrad_core.scaling.BlockRule`.

    Returns:
        float32 with the axes of ``x``; the one that is cut has one entry a block. NaN where a block holds a NaN or an
        infinity, 1 where it holds nothing but zeros.

    Raises:
        TypeError: if ``x`` is not floating point.
        InputError: for a block of less than 1, an axis out of range, an unknown rule or format, or one without a sign.

    >>> block_scales(jnp.array([500.0, 1.0, 0.25, 0.0]), "E4M3", block=2).tolist()
    [1.0, 0.0009765625]
    >>> block_scales(jnp.array([500.0, 1.0, 0.25, 0.0]), "E4M3", block=2, rule="fit").tolist()
    [2.0, 0.0009765625]
    """
    check_rule(rule)
    x, granularity = jnp.asarray(x), PerBlock(block, axis)
    position = checked_axis(axis, x.ndim)
    blocks = to_blocks(to_float32(x, "block_scales"), granularity)
    return _scales_of(_largest(blocks, position + 1), _elements(format), rule)


def quantize_blocks(
    x: jax.Array,
    format: str | Format | FormatParams,
    *,
    block: int = MX_BLOCK,
    axis: int = -1,
    rule: BlockRule = "mx",
    rounding: Rounding = "nearest_even",
    random_bits: jax.Array | None = None,
) -> jax.Array:
    """Round ``x`` to what blocks of a format with :func:`block_scales` hold. The gradient passes straight through.

    Args:
        x: floating-point array of at least one axis; its dtype is kept.
        format: of the elements: a name, a :class:`~altgrad_core.formats.Format`, or :class:`FormatParams`, which may
            be traced; overflow saturates whatever they say.
        block: elements of a block; where that does not divide the axis the last block is short.
        axis: along which blocks are cut.
        rule: ``"mx"`` or ``"fit"``, see :data:`altgrad_core.scaling.BlockRule`.
        rounding: of the elements, see :func:`altgrad_jax.quantize`.
        random_bits: for stochastic rounding, likewise.

    Returns:
        Array of the shape and dtype of ``x``; ``decode_blocks(*encode_blocks(x, ...), ...)`` has the same values.

    Raises:
        TypeError: if ``x`` is not floating point, or ``random_bits`` are not integers.
        ValueError: for a block of less than 1, an axis out of range, an unknown rule, format or rounding, a format
            without a sign, or random bits that are missing, useless or of another shape.

    >>> quantize_blocks(jnp.array([500.0, 1.0, 0.3, 0.0]), "E4M3", block=2).tolist()
    [448.0, 1.0, 0.3125, 0.0]
    """
    check_rule(rule)
    x, granularity = jnp.asarray(x), PerBlock(block, axis)
    checked_axis(axis, x.ndim)
    floating(x, "quantize_blocks")
    params = _saturating(format, rounding)
    random_bits = checked_random_bits(random_bits, x, params, None if isinstance(format, FormatParams) else rounding)
    return _in_one_program(granularity, rule, x, params, random_bits)


def encode_blocks(
    x: jax.Array,
    format: str | Format | CodeParams,
    *,
    block: int = MX_BLOCK,
    axis: int = -1,
    rule: BlockRule = "mx",
    rounding: Rounding = "nearest_even",
) -> tuple[jax.Array, jax.Array]:
    """The codes of what ``x`` rounds to and the E8M0 codes of the blocks' scales: what an MX tensor stores.

    Args:
        x: floating-point array of at least one axis.
        format: of the elements: a name or a :class:`~altgrad_core.formats.Format` of at most 16 bits, or
            :class:`CodeParams`, which may be traced.
        block: elements of a block.
        axis: along which blocks are cut.
        rule: ``"mx"`` or ``"fit"``, see :data:`altgrad_core.scaling.BlockRule`.
        rounding: all but ``stochastic``; not beside ``CodeParams``, which carry theirs.

    Returns:
        Codes of the shape of ``x``, uint8 (uint16 for formats of more than 8 bits); and uint8 scales, ``exponent +
        127``, of the shape that :func:`block_scales` gives. In a block of scale 255, NaN, the codes of elements are
        those of NaN, or 0 in a format without.

    Raises:
        TypeError: if ``x`` is not floating point.
        InputError: for a block of less than 1, an axis out of range, an unknown rule, format or rounding, or a format
            without a sign.

    >>> codes, scales = encode_blocks(jnp.array([500.0, 1.0, 0.25, 0.0]), "E4M3", block=2)
    >>> codes.tolist(), scales.tolist()
    ([126, 56, 120, 0], [127, 117])
    """
    check_rule(rule)
    x, granularity = jnp.asarray(x), PerBlock(block, axis)
    checked_axis(axis, x.ndim)
    values, scales = _rounded(granularity, rule, to_float32(x, "encode_blocks"), _saturating(format, rounding), None)
    reciprocal = jnp.expand_dims(_reciprocal(_or_one(scales)), checked_axis(axis, x.ndim) + 1)
    on_grid = split_as(from_blocks(values * reciprocal, x.shape, granularity), x)
    codes = encode(on_grid, format) if isinstance(format, CodeParams) else encode(on_grid, format, overflow="saturate")
    exponents = jnp.where(jnp.isnan(scales), E8M0_NAN, _bits(scales) >> 23)
    return codes, exponents.astype(jnp.uint8)


def decode_blocks(
    codes: jax.Array, scales: jax.Array, format: str | Format | CodeParams, *, block: int = MX_BLOCK, axis: int = -1
) -> jax.Array:
    """The values of codes and E8M0 scales.

    Args:
        codes: unsigned integers, of any shape.
        scales: uint8, ``exponent + 127``; one for each block, 255 for NaN.
        format: of the elements: a name or a :class:`~altgrad_core.formats.Format` of at most 16 bits, or
            :class:`CodeParams`, which may be traced.
        block: elements of a block.
        axis: along which blocks are cut.

    Returns:
        float32 of the shape of ``codes``; NaN where the scale is, and zero below 2^-126.

    Raises:
        TypeError: if the codes or scales are not unsigned integers.
        InputError: for scales that do not fit the codes, a block of less than 1, an axis out of range, an unknown
            format, or one without a sign.

    >>> codes, scales = jnp.array([126, 56, 120, 0], jnp.uint8), jnp.array([127, 117], jnp.uint8)
    >>> decode_blocks(codes, scales, "E4M3", block=2).tolist()
    [448.0, 1.0, 0.25, 0.0]
    """
    granularity = PerBlock(block, axis)
    _check_elements(format)
    codes, scales = jnp.asarray(codes), jnp.asarray(scales)
    if scales.dtype != jnp.uint8:
        raise TypeError(f"E8M0 scales are uint8; got {scales.dtype}")
    position = checked_axis(axis, codes.ndim)
    blocks = to_blocks(codes, granularity)
    if scales.shape != (*blocks.shape[: position + 1], *blocks.shape[position + 2 :]):
        raise InputError(
            f"the scales have shape {scales.shape} but codes of shape {codes.shape} have {blocks.shape[position]} "
            f"blocks of {block} along axis {position}"
        )
    exponents = jnp.expand_dims(scales.astype(jnp.int32), position + 1) - E8M0_BIAS
    # 2^-127 is no normal float32, so a scale comes in two factors that are.
    half = exponents >> 1
    values = decode(blocks, format) * two_to_the(half) * two_to_the(exponents - half)
    values = jnp.where(exponents == E8M0_NAN - E8M0_BIAS, jnp.float32(np.nan), _without_subnormals(values))
    return split_as(from_blocks(values, codes.shape, granularity), codes)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _straight_through(
    granularity: PerBlock, rule: BlockRule, x: jax.Array, params: FormatParams, random_bits: jax.Array | None
) -> jax.Array:
    blocks, _ = _rounded(granularity, rule, x, params, random_bits)
    return split_as(from_blocks(blocks, x.shape, granularity), x)


@_straight_through.defjvp
def _straight_through_jvp(
    granularity: PerBlock,
    rule: BlockRule,
    primals: tuple[jax.Array, FormatParams, jax.Array | None],
    tangents: tuple[jax.Array, ...],
) -> tuple[jax.Array, jax.Array]:
    return _straight_through(granularity, rule, *primals), tangents[0]


# Outside of jit, operation by operation would be as many programs and passes.
_in_one_program = jax.jit(_straight_through, static_argnums=(0, 1), inline=True)


def _rounded(
    granularity: PerBlock, rule: BlockRule, x: jax.Array, params: FormatParams, random_bits: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Blocks of rounded values in the dtype of ``x``, and their scales."""
    if random_bits is not None and random_bits.shape != x.shape:
        raise InputError(f"random_bits have shape {random_bits.shape}; expected that of x, {x.shape}")
    drawn = None if random_bits is None else to_blocks(random_bits, granularity)
    axis = checked_axis(granularity.axis, x.ndim) + 1
    blocks = to_blocks(x, granularity)
    if not is_whole(x):
        return _cast_blocks(axis, rule, blocks, params, drawn)
    return lax.platform_dependent(
        blocks,
        params,
        drawn,
        cpu=partial(_cast_blocks_apart, axis, rule),
        default=partial(_cast_blocks, axis, rule),
    )


def _cast_blocks(
    axis: int, rule: BlockRule, blocks: jax.Array, params: FormatParams, random_bits: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Rounded blocks, whose elements lie along ``axis``, and their scales."""
    x = to_float32(blocks, "quantize_blocks")
    scales = _scales_of(_largest(x, axis), params, rule)
    scale = jnp.expand_dims(_or_one(scales), axis)
    if params.path == "fast" and random_bits is None:
        values = Addition.of(params, edges(params)).cast_finite(x * _reciprocal(scale)) * scale
    else:
        values = quantize(x, params, scale=scale, random_bits=random_bits)
    values = jnp.where(jnp.isnan(jnp.expand_dims(scales, axis)), jnp.float32(np.nan), values)
    return values.astype(blocks.dtype), scales


def _cast_blocks_apart(
    axis: int, rule: BlockRule, blocks: jax.Array, params: FormatParams, random_bits: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """:func:`_cast_blocks` so that XLA's CPU backend loops over blocks, not over the array that they are cut from.

    Left alone it fuses the reshapes around it, and then looks the scale of every single element up: 8 times slower. A
    call that must not be inlined is a border that it respects; axes of length 1 it would copy to get rid of.
    """

    def inside(*args: Any) -> tuple[jax.Array, jax.Array]:
        with set_xla_metadata(inlineable=None):
            return _cast_blocks(1, rule, *args)

    rows = (math.prod(blocks.shape[:axis]), *blocks.shape[axis:])
    drawn = None if random_bits is None else random_bits.reshape(rows)
    with set_xla_metadata(inlineable="false"):
        values, scales = jax.jit(inside)(blocks.reshape(rows), params, drawn)
    return values.reshape(blocks.shape), scales.reshape(*blocks.shape[:axis], *blocks.shape[axis + 1 :])


def _largest(blocks: jax.Array, axis: int) -> jax.Array:
    return largest_of(_bits(blocks) & _MAGNITUDE, (axis,))


def _scales_of(largest: jax.Array, params: FormatParams, rule: BlockRule) -> jax.Array:
    """Scales from the bits of the largest magnitudes."""
    if rule == "mx":
        exponent = (largest >> 23) - (_bits(params.max_value) >> 23)
    else:
        exponent = fitting_exponent(_float(largest), params.max_value)
    # As in altgrad_core.scaling.block_exponents, of a format that may be traced.
    lowest = jnp.clip(SMALLEST_STEP_EXPONENT + params.mantissa_bits - params.min_exponent, -126, 0)
    highest = jnp.minimum(126, 254 - (_bits(params.max_value) >> 23))
    scale = two_to_the(jnp.clip(exponent, lowest, highest))
    scale = jnp.where(largest < _MIN_NORMAL, jnp.float32(1), scale)
    return jnp.where(largest >= _INF, jnp.float32(np.nan), scale)


def _saturating(format: str | Format | FormatParams | CodeParams, rounding: Rounding) -> FormatParams:
    params = _elements(format, rounding)
    return replace(params, overflow=jnp.full_like(params.overflow, _SATURATE))


def _elements(format: str | Format | FormatParams | CodeParams, rounding: Rounding = "nearest_even") -> FormatParams:
    _check_elements(format)
    return as_params(format.params if isinstance(format, CodeParams) else format, rounding)


def _check_elements(format: str | Format | FormatParams | CodeParams) -> None:
    params = format.params if isinstance(format, CodeParams) else format
    if not isinstance(params, FormatParams):
        check_element_format(parse(params))
    elif params.path == "unsigned":
        raise InputError("the params are of a format without a sign; expected a signed one for the elements of blocks")


def _or_one(scales: jax.Array) -> jax.Array:
    return jnp.where(jnp.isnan(scales), jnp.float32(1), scales)


def _reciprocal(scale: jax.Array) -> jax.Array:
    """Of a power of two within 2^-126 to 2^126, which needs no division."""
    return _float(_BITS_OF_ONE_SQUARED - _bits(scale))


def _without_subnormals(x: jax.Array) -> jax.Array:
    bits = _bits(x)
    return _float(jnp.where((bits & _MAGNITUDE) < _MIN_NORMAL, bits & ~_MAGNITUDE, bits))


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.int32)


def _float(bits: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(bits, jnp.float32)

"""Blocks that share a power-of-two scale, as in the MX formats: values, and codes beside E8M0 scales.

The source is the OCP Microscaling Formats (MX) specification, version 1.0: section 5 for what is stored, 6.3 for the
conversion. ``altgrad_jax/blocks.py`` says the same thing in JAX, and there is told how what the specification leaves
open is settled: blocks that hold NaN, infinities or nothing but zeros, and the range of scales.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from altgrad_core.errors import InputError
from altgrad_core.formats import Format, Rounding, parse
from altgrad_core.scaling import (
    E8M0_BIAS,
    E8M0_NAN,
    MX_BLOCK,
    BlockRule,
    PerBlock,
    block_exponents,
    check_element_format,
    check_rule,
    checked_axis,
)
from altgrad_torch.casting import check_drawn, check_floating, flush_subnormals, quantize, to_float32
from altgrad_torch.codes import decode, encode
from altgrad_torch.granularity import from_blocks, to_blocks
from altgrad_torch.scaling import amax, fitting_exponent, two_to_the

_MIN_NORMAL = 2.0**-126


def block_scales(
    x: Tensor, format: str | Format, *, block: int = MX_BLOCK, axis: int = -1, rule: BlockRule = "mx"
) -> Tensor:
    """The scale of each block: a power of two, by the largest magnitude in it.

    Args:
        x: floating-point tensor of at least one axis.
        format: of the elements: a name or a :class:`~altgrad_core.formats.Format`.
        block: elements of a block; where that does not divide the axis the last block is short.
        axis: along which blocks are cut.
        rule: ``"mx"`` or ``"fit"``, see :data:`altgrad_core.scaling.BlockRule`.

    Returns:
        float32 with the axes of ``x``; the one that is cut has one entry a block. NaN where a block holds a NaN or an
        infinity, 1 where it holds nothing but zeros.

    Raises:
        TypeError: if ``x`` is not floating point.
        InputError: for a block of less than 1, an axis out of range, an unknown rule or format, or one without a sign.

    >>> block_scales(torch.tensor([500.0, 1.0, 0.25, 0.0]), "E4M3", block=2).tolist()
    [1.0, 0.0009765625]
    >>> block_scales(torch.tensor([500.0, 1.0, 0.25, 0.0]), "E4M3", block=2, rule="fit").tolist()
    [2.0, 0.0009765625]
    """
    granularity, resolved = _checked(x, format, block, axis, rule, "block_scales")
    return _scales_of(to_blocks(to_float32(x.detach()), granularity), granularity, resolved, rule)


def quantize_blocks(
    x: Tensor,
    format: str | Format,
    *,
    block: int = MX_BLOCK,
    axis: int = -1,
    rule: BlockRule = "mx",
    rounding: Rounding = "nearest_even",
    random_bits: Tensor | None = None,
) -> Tensor:
    """Round ``x`` to what blocks of a format with :func:`block_scales` hold. The gradient passes straight through.

    Args:
        x: floating-point tensor of at least one axis; its dtype is kept.
        format: of the elements: a name or a :class:`~altgrad_core.formats.Format`; overflow saturates.
        block: elements of a block; where that does not divide the axis the last block is short.
        axis: along which blocks are cut.
        rule: ``"mx"`` or ``"fit"``, see :data:`altgrad_core.scaling.BlockRule`.
        rounding: of the elements, see :func:`altgrad_torch.quantize`.
        random_bits: for stochastic rounding, likewise.

    Returns:
        Tensor of the shape and dtype of ``x``; ``decode_blocks(*encode_blocks(x, ...), ...)`` has the same values.

    Raises:
        TypeError: if ``x`` is not floating point.
        InputError: for a block of less than 1, an axis out of range, an unknown rule, format or rounding, or a format
            without a sign.

    >>> quantize_blocks(torch.tensor([500.0, 1.0, 0.3, 0.0]), "E4M3", block=2).tolist()
    [448.0, 1.0, 0.3125, 0.0]
    """
    granularity, resolved = _checked(x, format, block, axis, rule, "quantize_blocks")
    return _StraightThrough.apply(x, random_bits, (granularity, resolved, rule, rounding))


def encode_blocks(
    x: Tensor,
    format: str | Format,
    *,
    block: int = MX_BLOCK,
    axis: int = -1,
    rule: BlockRule = "mx",
    rounding: Rounding = "nearest_even",
) -> tuple[Tensor, Tensor]:
    """The codes of what ``x`` rounds to and the E8M0 codes of the blocks' scales: what an MX tensor stores.

    Args:
        x: floating-point tensor of at least one axis.
        format: of the elements, of at most 16 bits.
        block: elements of a block.
        axis: along which blocks are cut.
        rule: ``"mx"`` or ``"fit"``, see :data:`altgrad_core.scaling.BlockRule`.
        rounding: all but ``stochastic``.

    Returns:
        Codes of the shape of ``x``, uint8 (uint16 for formats of more than 8 bits); and uint8 scales, ``exponent +
        127``, of the shape that :func:`block_scales` gives. In a block of scale 255, NaN, the codes of elements are
        those of NaN, or 0 in a format without.

    Raises:
        TypeError: if ``x`` is not floating point.
        InputError: for a block of less than 1, an axis out of range, an unknown rule, format or rounding, or a format
            without a sign.

    >>> codes, scales = encode_blocks(torch.tensor([500.0, 1.0, 0.25, 0.0]), "E4M3", block=2)
    >>> codes.tolist(), scales.tolist()
    ([126, 56, 120, 0], [127, 117])
    """
    granularity, resolved = _checked(x, format, block, axis, rule, "encode_blocks")
    blocks, scales = _rounded(to_float32(x.detach()), None, (granularity, resolved, rule, rounding))
    on_grid = blocks / scales.nan_to_num(1.0).unsqueeze(checked_axis(axis, x.ndim) + 1)
    codes = encode(from_blocks(on_grid, x.shape, granularity), resolved, overflow="saturate")
    exponents = (scales.view(torch.int32) >> 23).masked_fill_(scales.isnan(), E8M0_NAN)
    return codes, exponents.to(torch.uint8)


def decode_blocks(
    codes: Tensor, scales: Tensor, format: str | Format, *, block: int = MX_BLOCK, axis: int = -1
) -> Tensor:
    """The values of codes and E8M0 scales.

    Args:
        codes: unsigned integers, of any shape.
        scales: uint8, ``exponent + 127``; one for each block, 255 for NaN.
        format: of the elements, of at most 16 bits.
        block: elements of a block.
        axis: along which blocks are cut.

    Returns:
        float32 of the shape of ``codes``; NaN where the scale is, and zero below 2^-126.

    Raises:
        TypeError: if the codes or scales are not unsigned integers.
        InputError: for scales that do not fit the codes, a block of less than 1, an axis out of range, an unknown
            format, or one without a sign.

    >>> codes, scales = torch.tensor([126, 56, 120, 0], dtype=torch.uint8), torch.tensor([127, 117], dtype=torch.uint8)
    >>> decode_blocks(codes, scales, "E4M3", block=2).tolist()
    [448.0, 1.0, 0.25, 0.0]
    """
    granularity = PerBlock(block, axis)
    resolved = parse(format)
    check_element_format(resolved)
    if scales.dtype != torch.uint8:
        raise TypeError(f"E8M0 scales are uint8; got {scales.dtype}")
    position = checked_axis(axis, codes.ndim)
    blocks = to_blocks(decode(codes, resolved), granularity)
    if scales.shape != (*blocks.shape[: position + 1], *blocks.shape[position + 2 :]):
        raise InputError(
            f"the scales have shape {tuple(scales.shape)} but codes of shape {tuple(codes.shape)} have "
            f"{blocks.shape[position]} blocks of {block} along axis {position}"
        )
    exponents = scales.to(torch.int32).unsqueeze(position + 1) - E8M0_BIAS
    # 2^-127 is no normal float32, so a scale comes in two factors that are.
    half = exponents >> 1
    values = flush_subnormals(blocks * two_to_the(half) * two_to_the(exponents - half))
    values = values.masked_fill(exponents == E8M0_NAN - E8M0_BIAS, math.nan)
    return from_blocks(values, codes.shape, granularity)


_How = tuple[PerBlock, Format, BlockRule, Rounding]


class _StraightThrough(torch.autograd.Function):
    """The cast in value, the identity in derivative, forwards and backwards."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, random_bits: Tensor | None, how: _How) -> Tensor:
        blocks, _ = _rounded(to_float32(x), random_bits, how)
        return from_blocks(blocks, x.shape, how[0]).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Nothing is kept: the derivative is one."""

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return grad_outputs[0], None, None

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> Any:
        # A view, because forward-mode AD refuses a tangent that is the input's own.
        return grad_inputs[0].view_as(grad_inputs[0])


def _rounded(x: Tensor, random_bits: Tensor | None, how: _How) -> tuple[Tensor, Tensor]:
    """Blocks of rounded float32 values, and their scales."""
    granularity, resolved, rule, rounding = how
    if random_bits is not None:
        check_drawn(random_bits, x)
    blocks = to_blocks(x, granularity)
    drawn = None if random_bits is None else to_blocks(random_bits, granularity)
    scales = _scales_of(blocks, granularity, resolved, rule)
    scale = scales.unsqueeze(checked_axis(granularity.axis, x.ndim) + 1)
    values = quantize(
        blocks, resolved, scale=scale.nan_to_num(1.0), rounding=rounding, overflow="saturate", random_bits=drawn
    )
    return values.masked_fill(scale.isnan(), math.nan), scales


def _scales_of(blocks: Tensor, granularity: PerBlock, format: Format, rule: BlockRule) -> Tensor:
    axis = checked_axis(granularity.axis, blocks.ndim - 1) + 1
    largest = amax(blocks, axis).squeeze(axis)
    maximum = torch.as_tensor(format.max_representable_value, dtype=torch.float32, device=blocks.device)
    if rule == "mx":
        exponent = (largest.view(torch.int32) >> 23) - (maximum.view(torch.int32) >> 23)
    else:
        exponent = fitting_exponent(largest, maximum)
    scale = two_to_the(exponent.clamp(*block_exponents(format)))
    return scale.masked_fill(largest < _MIN_NORMAL, 1.0).masked_fill(~largest.isfinite(), math.nan)


def _checked(
    x: Tensor, format: str | Format, block: int, axis: int, rule: BlockRule, taker: str
) -> tuple[PerBlock, Format]:
    check_floating(x, taker)
    check_rule(rule)
    granularity, resolved = PerBlock(block, axis), parse(format)
    checked_axis(axis, x.ndim)
    check_element_format(resolved)
    return granularity, resolved

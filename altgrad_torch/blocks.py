"""Blocks that share a power-of-two scale, as in the MX formats: values, and codes beside E8M0 scales.

The source is the OCP Microscaling Formats (MX) specification, version 1.0: section 5 for what is stored, 6.3 for the
conversion. ``altgrad_jax/blocks.py`` says the same thing in JAX, and there is told how what the specification leaves
open is settled: blocks that hold NaN, infinities or nothing but zeros, and the range of scales.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from altgrad_core.errors import InputError
from altgrad_core.formats import Format, Rounding
from altgrad_core.scaling import (
    E8M0_BIAS,
    E8M0_NAN,
    MX_BLOCK,
    SMALLEST_STEP_EXPONENT,
    BlockRule,
    PerBlock,
    block_exponents,
    check_element_format,
    check_rule,
    checked_axis,
)
from altgrad_torch.casting import (
    as_grid,
    cast,
    check_drawn,
    check_floating,
    fill_by_chunks,
    flush_subnormals,
    in_one_go,
    quantize,
    to_float32,
    without_negative_bit,
)
from altgrad_torch.codes import CodeParams, codable, codes_of_grid, decode, dtype_of_codes, encode
from altgrad_torch.granularity import from_blocks, to_blocks
from altgrad_torch.params import FormatParams
from altgrad_torch.scaling import fitting_exponent, two_to_the
from altgrad_torch.shards import refuse_sharded

_MAGNITUDE = 0x7FFFFFFF
_MIN_NORMAL = 0x00800000
_INF = 0x7F800000
_BITS_OF_ONE_SQUARED = 2 * E8M0_BIAS << 23


def block_scales(
    x: Tensor,
    format: str | Format | FormatParams,
    *,
    block: int = MX_BLOCK,
    axis: int = -1,
    rule: BlockRule = "mx",
) -> Tensor:
    """The scale of each block: a power of two, by the largest magnitude in it.

    Args:
        x: floating-point tensor of at least one axis.
        format: of the elements: a name, a :class:`~altgrad_core.formats.Format`, or
            :class:`~altgrad_torch.params.FormatParams`, which compiled code takes as data.
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
    how = _checked(x, as_grid(format), block, axis, rule, "nearest_even", "block_scales")
    return _scales(without_negative_bit(x.detach()), how)


def quantize_blocks(
    x: Tensor,
    format: str | Format | FormatParams,
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
        format: of the elements: a name, a :class:`~altgrad_core.formats.Format`, or
            :class:`~altgrad_torch.params.FormatParams`, which compiled code takes as data; overflow saturates.
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
    how = _checked(x, as_grid(format), block, axis, rule, rounding, "quantize_blocks")
    if random_bits is not None:
        check_drawn(random_bits, x)
    straight_through = _StraightThrough if torch.compiler.is_compiling() else _StraightThroughForwards
    return straight_through.apply(without_negative_bit(x), random_bits, how)


def encode_blocks(
    x: Tensor,
    format: str | Format | CodeParams,
    *,
    block: int = MX_BLOCK,
    axis: int = -1,
    rule: BlockRule = "mx",
    rounding: Rounding = "nearest_even",
) -> tuple[Tensor, Tensor]:
    """The codes of what ``x`` rounds to and the E8M0 codes of the blocks' scales: what an MX tensor stores.

    Args:
        x: floating-point tensor of at least one axis.
        format: of the elements: a name or a :class:`~altgrad_core.formats.Format` of at most 16 bits, or
            :class:`~altgrad_torch.codes.CodeParams`.
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
    code = format if isinstance(format, CodeParams) else codable(format)
    grid = code.params if isinstance(code, CodeParams) else code
    how = _checked(x, grid, block, axis, rule, rounding, "encode_blocks")
    dtype = code.dtype if isinstance(code, CodeParams) else dtype_of_codes(code)

    def part(blocks: Tensor, random_bits: Tensor | None) -> Tensor:
        values, scales = _cast_blocks(blocks, random_bits, how)
        on_grid = values * _reciprocal(_or_one(scales))
        return encode(on_grid, code) if isinstance(code, CodeParams) else codes_of_grid(on_grid, code)

    x = without_negative_bit(x.detach())
    scales = _scales(x, how)
    exponents = (scales.view(torch.int32) >> 23).masked_fill(scales.isnan(), E8M0_NAN)
    return _blockwise(part, x, None, how, dtype), exponents.to(torch.uint8)


def decode_blocks(
    codes: Tensor, scales: Tensor, format: str | Format | CodeParams, *, block: int = MX_BLOCK, axis: int = -1
) -> Tensor:
    """The values of codes and E8M0 scales.

    Args:
        codes: unsigned integers, of any shape.
        scales: uint8, ``exponent + 127``; one for each block, 255 for NaN.
        format: of the elements: a name or a :class:`~altgrad_core.formats.Format` of at most 16 bits, or
            :class:`~altgrad_torch.codes.CodeParams`.
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
    code = format if isinstance(format, CodeParams) else codable(format)
    _check_elements(code.params if isinstance(code, CodeParams) else code)
    if scales.dtype != torch.uint8:
        raise TypeError(f"E8M0 scales are uint8; got {scales.dtype}")
    position = checked_axis(axis, codes.ndim)
    blocks = to_blocks(decode(codes, code), granularity)
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


class _How(NamedTuple):
    """All that is asked of blocks beside tensors."""

    granularity: PerBlock
    axis: int
    grid: Format | FormatParams
    rule: BlockRule
    rounding: Rounding


class _StraightThrough(torch.autograd.Function):
    """The cast in value, the identity in derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, random_bits: Tensor | None, how: _How) -> Tensor:
        def part(blocks: Tensor, random_bits: Tensor | None) -> Tensor:
            return _cast_blocks(blocks, random_bits, how)[0]

        return _blockwise(part, x, random_bits, how, x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Nothing is kept: the derivative is one."""

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return grad_outputs[0], None, None


class _StraightThroughForwards(_StraightThrough):
    """With forward-mode derivatives too, which torch.compile (2.13) does not trace."""

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> Any:
        # A view, because forward-mode AD refuses a tangent that is the input's own.
        return grad_inputs[0].view_as(grad_inputs[0])


def _blockwise(
    function: Callable[[Tensor, Tensor | None], Tensor],
    x: Tensor,
    random_bits: Tensor | None,
    how: _How,
    dtype: torch.dtype,
) -> Tensor:
    """A function of blocks and their random bits, element by element in ``dtype``; in chunks where casts are."""
    if in_one_go(how.grid, x):
        drawn = None if random_bits is None else to_blocks(random_bits, how.granularity)
        return from_blocks(function(to_blocks(x, how.granularity), drawn), x.shape, how.granularity).to(dtype)
    out = torch.empty_like(x, dtype=dtype)
    for cut in _cuts(x, how):
        drawn = None if random_bits is None else cut(random_bits)
        fill_by_chunks(function, cut(out), cut(x), [drawn], whole=how.axis + 1)
    return out


def _scales(x: Tensor, how: _How) -> Tensor:
    """The scale of each block, in chunks where casts are."""

    def part(blocks: Tensor) -> Tensor:
        return _scales_of(to_float32(blocks), how)

    if in_one_go(how.grid, x):
        return part(to_blocks(x, how.granularity)).squeeze(how.axis + 1)
    found = []
    for cut in _cuts(x, how):
        blocks = cut(x)
        out = torch.empty_like(blocks.select(how.axis + 1, 0), dtype=torch.float32)
        fill_by_chunks(part, out.unsqueeze(how.axis + 1), blocks, [], whole=how.axis + 1)
        found.append(out)
    return torch.cat(found, how.axis)


def _cuts(x: Tensor, how: _How) -> Iterator[Callable[[Tensor], Tensor]]:
    """What views a tensor of the shape of ``x`` as its whole blocks, and what as the short one, where they are."""
    length, size = x.shape[how.axis], how.granularity.size
    short = length % size
    for start, taken, block in ((0, length - short, size), (length - short, short, short)):
        if taken:
            yield lambda t, start=start, taken=taken, block=block: t.narrow(how.axis, start, taken).unflatten(
                how.axis, (taken // block, block)
            )


def _cast_blocks(blocks: Tensor, random_bits: Tensor | None, how: _How) -> tuple[Tensor, Tensor]:
    """Blocks of rounded float32 values, and their scales, which have length 1 where the elements of a block lie."""
    x, grid = to_float32(blocks), how.grid
    scales = _scales_of(x, how)
    unit, path = _or_one(scales), grid.path if isinstance(grid, FormatParams) else grid.cast_path
    if path == "fast" and how.rounding == "nearest_even" and random_bits is None:
        # Scales keep to where neither the quotient nor the product needs the care that quantize takes.
        if torch.compiler.is_compiling() or x.device.type != "cpu":
            values = cast(x * _reciprocal(unit), grid, overflow="saturate") * unit
        else:
            return _cast_by_masking(x, scales, grid), scales
    else:
        drawn, overflow = random_bits, "saturate"
        values = quantize(x, grid, scale=unit, rounding=how.rounding, overflow=overflow, random_bits=drawn)
    return values.masked_fill(scales.isnan(), math.nan), scales


def _cast_by_masking(x: Tensor, scales: Tensor, grid: Format | FormatParams) -> Tensor:
    """Rounded blocks, of which those without a scale become 0 first and NaN, its product with their scale, last.

    On a CPU ``masked_fill`` by a mask that is shared along an axis takes as long as four multiplications.
    """
    kept = x.view(torch.int32) & (scales.isnan().to(torch.int32) - 1)
    quotients = kept.view(torch.float32).mul_(_reciprocal(_or_one(scales)))
    return cast(quotients, grid, overflow="saturate").mul_(scales)


def _scales_of(x: Tensor, how: _How) -> Tensor:
    """Scales of float32 blocks, of length 1 where the elements of a block lie."""
    maximum, lowest, highest = _limits(how.grid, x.device)
    # As integers, which put NaN above all, and of which a CPU finds the largest twice as fast.
    largest = (x.view(torch.int32) & _MAGNITUDE).amax(how.axis + 1, keepdim=True)
    if how.rule == "mx":
        exponent = (largest >> 23) - (maximum.view(torch.int32) >> 23)
    else:
        exponent = fitting_exponent(largest.view(torch.float32), maximum)
    scale = two_to_the(exponent.clamp(lowest, highest)).masked_fill(largest < _MIN_NORMAL, 1.0)
    return scale.masked_fill(largest >= _INF, math.nan)


def _limits(grid: Format | FormatParams, device: torch.device) -> tuple[Tensor, Any, Any]:
    """The largest value of a format, and the smallest and largest exponent of scales for it."""
    if isinstance(grid, Format):
        maximum = torch.tensor(grid.max_representable_value, dtype=torch.float32, device=device)
        return maximum, *block_exponents(grid)
    # As in altgrad_core.scaling.block_exponents, of a format that is data.
    lowest = (SMALLEST_STEP_EXPONENT + grid.mantissa_bits - grid.min_exponent).clamp(-126, 0)
    highest = (254 - (grid.max_value.view(torch.int32) >> 23)).clamp_max(126)
    return grid.max_value, lowest, highest


def _checked(
    x: Tensor, grid: Format | FormatParams, block: int, axis: int, rule: BlockRule, rounding: Rounding, taker: str
) -> _How:
    check_floating(x, taker)
    refuse_sharded(x, taker)
    check_rule(rule)
    granularity = PerBlock(block, axis)
    position = checked_axis(axis, x.ndim)
    _check_elements(grid)
    return _How(granularity, position, grid, rule, rounding)


def _check_elements(grid: Format | FormatParams) -> None:
    if isinstance(grid, Format):
        check_element_format(grid)
    elif grid.path == "unsigned":
        raise InputError("the params are of a format without a sign; expected a signed one for the elements of blocks")


def _or_one(scales: Tensor) -> Tensor:
    return scales.nan_to_num(1.0)


def _reciprocal(scale: Tensor) -> Tensor:
    """Of a power of two within 2^-126 to 2^126, which needs no division."""
    return (_BITS_OF_ONE_SQUARED - scale.view(torch.int32)).view(torch.float32)

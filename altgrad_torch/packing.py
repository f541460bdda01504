"""Packed tensors: a format's codes in a byte or two each, and the scales that belong to them.

:mod:`altgrad_core.packing` says what they mean, :mod:`altgrad_torch.packed_files` keeps them in files, and
``altgrad_jax/packing.py`` says the same thing in JAX.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from altgrad_core.errors import InputError, naming
from altgrad_core.formats import Format, Overflow, Rounding
from altgrad_core.packing import (
    E8M0,
    PackedLayout,
    PackRule,
    ScaleKind,
    check_overflow,
    check_representable,
    check_scales,
    kind_of,
)
from altgrad_core.patterns import group_by_pattern
from altgrad_core.scaling import BLOCK_RULES, Granularity, PerBlock
from altgrad_torch.blocks import encode_blocks
from altgrad_torch.casting import check_floating, in_chunks, scaled_down, scaled_up
from altgrad_torch.codes import decode, dtype_of_codes, encode
from altgrad_torch.granularity import amaxes, spread
from altgrad_torch.scaling import power_of_two_scale, ratio_scale
from altgrad_torch.shards import refuse_sharded


@dataclass(frozen=True)
class PackedTensor:
    """Codes and scales of a tensor. Made by :func:`pack_tensor`.

    Attributes:
        codes: uint8 (uint16 for formats of more than 8 bits), of the shape of the tensor.
        scales: of the shape that ``layout.scales_shape`` says: float32, or uint8 E8M0 codes for blocks under powers of
            two.
        layout: what they mean.
    """

    codes: Tensor
    scales: Tensor
    layout: PackedLayout

    @property
    def shape(self) -> torch.Size:
        """That of the tensor."""
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    def to(self, device: torch.device | str) -> PackedTensor:
        """The same on a device."""
        return replace(self, codes=self.codes.to(device), scales=self.scales.to(device))


def pack_tensor(
    x: Tensor,
    format: str | Format,
    *,
    scale: ScaleKind | Tensor | float = "power_of_two",
    granularity: str | Granularity = "tensor",
    rounding: Rounding = "nearest_even",
    overflow: Overflow = "native",
) -> PackedTensor:
    """The codes that ``x / scale`` rounds to, and the scales: contiguous, without a gradient, where ``x`` is.

    Unpacked they are ``quantize(x, format, scale=..., rounding=..., overflow=...)``, or ``quantize_blocks`` for ``mx``
    and ``fit``: the same bits but for the sign of NaN, which codes do not hold. For stochastic rounding quantize first:
    what is on the grid already is packed as it is, under the same scale.

    Args:
        x: float32, bfloat16, float16 or float64, any shape.
        format: a name or a :class:`~altgrad_core.formats.Format`, signed and of at most 16 bits.
        scale: a :data:`~altgrad_core.packing.ScaleKind`; or the scales themselves: positive, normal float32, one for
            all or of the shape of :func:`altgrad_torch.amaxes`.
        granularity: which elements share a scale: ``"tensor"``, ``"channel"`` (the last axis; ``PerChannel(0)`` for
            the outputs of a ``torch.nn.Linear``), ``"block32"``, or a :data:`~altgrad_core.scaling.Granularity`.
        rounding: all but ``stochastic``.
        overflow: see :data:`altgrad_core.formats.Overflow`; not with ``mx`` and ``fit``, under which blocks saturate.

    Raises:
        TypeError: if ``x`` is not a floating-point tensor.
        InputError: for unknown names, options that do not go together, scales of another shape or that are not positive
            and normal; and for NaN in ``x``, or infinities that are to be kept, if the format has no code for them.

    >>> packed = pack_tensor(torch.tensor([[0.1, 0.2], [-0.3, 449.0]]), "E4M3")
    >>> packed.codes.dtype, float(packed.scales), packed.nbytes
    (torch.uint8, 2.0, 8)
    >>> unpack_tensor(packed).tolist()
    [[0.1015625, 0.203125], [-0.3125, 448.0]]
    """
    check_floating(x, "pack_tensor")
    refuse_sharded(x, "pack_tensor")
    x = x.detach().contiguous()
    if isinstance(scale, str):
        given, kind = None, scale
    else:
        given = torch.as_tensor(scale, dtype=torch.float32, device=x.device).detach()
        kind = kind_of(given.cpu().numpy())
    check_overflow(kind, overflow)
    layout = PackedLayout.of(format, granularity, kind, str(x.dtype).removeprefix("torch."))
    share = layout.granularity
    if isinstance(share, PerBlock) and kind in BLOCK_RULES:
        # A NaN or an infinity makes the scale of its block NaN, so none is lost.
        codes, scales = encode_blocks(x, layout.format, block=share.size, axis=share.axis, rule=kind, rounding=rounding)
        return PackedTensor(codes, scales, layout)
    shape = tuple(x.shape)
    scales = _scales_by_amax(x, layout) if given is None else _checked_scales(given, layout, shape)
    infs = int(x.isinf().sum()) if overflow == "saturate_finite" else 0
    check_representable(layout.format, int(x.isnan().sum()), infs, x.numel())

    def part(x: Tensor, scale: Tensor) -> Tensor:
        return encode(scaled_down(x, scale), layout.format, rounding=rounding, overflow=overflow)

    codes = in_chunks(part, layout.format, dtype_of_codes(layout.format), x, spread(scales, shape, share))
    if layout.has_e8m0_scales:
        scales = (scales.view(torch.int32) >> 23).to(torch.uint8)
    return PackedTensor(codes, scales, layout)


def unpack_tensor(packed: PackedTensor) -> Tensor:
    """The values of a packed tensor, in the dtype that was packed.

    >>> unpack_tensor(pack_tensor(torch.tensor([1.0, -2.3], dtype=torch.bfloat16), "E0M7", scale="ratio")).dtype
    torch.bfloat16
    """
    layout = packed.layout
    scales = decode(packed.scales, E8M0) if layout.has_e8m0_scales else packed.scales
    scale = spread(scales, tuple(packed.shape), layout.granularity)
    dtype = getattr(torch, layout.dtype)

    def part(codes: Tensor, scale: Tensor) -> Tensor:
        # Not left to the product: a GPU makes NaN of another kind.
        on_grid = torch.where(scale.isnan(), torch.nan, decode(codes, layout.format))
        return scaled_up(on_grid, scale, dtype)

    return in_chunks(part, layout.format, dtype, packed.codes, scale)


def pack_tensors(
    tensors: Mapping[str, Tensor], rules: Mapping[str, PackRule | None]
) -> dict[str, PackedTensor | Tensor]:
    """Tensors by name, packed by the first rule whose pattern matches all of the name.

    Args:
        tensors: by any names, such as those of ``module.state_dict()``.
        rules: by regular expression; None for what stays as it is.

    Raises:
        InputError: for a name that no pattern matches, a pattern that matches nothing, and what :func:`pack_tensor`
            refuses; the message names the tensor.

    >>> weights = torch.nn.Linear(4, 8).state_dict()
    >>> packed = pack_tensors(weights, {"weight": PackRule("E3M4", granularity="channel"), ".*": None})
    >>> packed["weight"].scales.shape, packed["bias"].dtype
    (torch.Size([1, 4]), torch.float32)
    """
    names, packed = tuple(tensors), dict[str, PackedTensor | Tensor](tensors)
    for pattern, places in group_by_pattern(names, tuple(rules)).items():
        rule = rules[pattern]
        if rule is None:
            continue
        for name in (names[place] for place in places):
            with naming(f"tensor {name!r}"):
                packed[name] = pack_tensor(tensors[name], rule.format, scale=rule.scale, granularity=rule.granularity)
    return packed


def unpack_tensors(tensors: Mapping[str, PackedTensor | Tensor]) -> dict[str, Tensor]:
    """Tensors by name, those unpacked that are packed.

    >>> unpack_tensors({"w": pack_tensor(torch.ones(2), "E5M2"), "b": torch.zeros(1)})["w"].tolist()
    [1.0, 1.0]
    """
    return {name: unpack_tensor(x) if isinstance(x, PackedTensor) else x for name, x in tensors.items()}


def _scales_by_amax(x: Tensor, layout: PackedLayout) -> Tensor:
    by_amax = power_of_two_scale if layout.scale_kind == "power_of_two" else ratio_scale
    scales = by_amax(amaxes(x, layout.granularity), layout.format.max_representable_value)
    return scales.reshape(layout.scales_shape(tuple(x.shape)))


def _checked_scales(scales: Tensor, layout: PackedLayout, shape: tuple[int, ...]) -> Tensor:
    """Scales that were given, in the shape that they are kept in."""
    expected = layout.scales_shape(shape)
    if scales.numel() != 1 and tuple(scales.shape) != expected:
        raise InputError(
            f"the scales have shape {tuple(scales.shape)}; expected {expected} for {layout.granularity}, or one"
        )
    check_scales(scales.cpu().numpy())
    return (scales.reshape(()) if scales.numel() == 1 else scales).expand(expected).clone()

"""Packed tensors: a format's codes in a byte or two each, and the scales that belong to them.

:mod:`altgrad_core.packing` says what they mean, :mod:`altgrad_jax.packed_files` keeps them in files, and
``altgrad_torch/packing.py`` says the same thing in torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from altgrad_core.errors import InputError, naming
from altgrad_core.formats import OVERFLOWS, Format, Overflow, Rounding
from altgrad_core.packing import (
    E8M0,
    PackedLayout,
    PackRule,
    ScaleKind,
    check_overflow,
    check_representable,
    check_scales,
    kind_of,
    numpy_dtype,
)
from altgrad_core.patterns import group_by_pattern
from altgrad_core.scaling import BLOCK_RULES, Granularity, PerBlock, PerTensor
from altgrad_jax.blocks import encode_blocks
from altgrad_jax.casting import floating, scaled_down, scaled_up
from altgrad_jax.codes import CodeParams, decode, encode
from altgrad_jax.granularity import amaxes, spread
from altgrad_jax.scaling import power_of_two_scale, ratio_scale


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PackedTensor:
    """Codes and scales of a tensor. A pytree whose leaves they are, so it goes through jit, onto devices and so on.

    Made by :func:`pack_tensor`.

    Attributes:
        codes: uint8 (uint16 for formats of more than 8 bits), of the shape of the tensor.
        scales: of the shape that ``layout.scales_shape`` says: float32, or uint8 E8M0 codes for blocks under powers of
            two.
        layout: what they mean (static).
    """

    codes: jax.Array
    scales: jax.Array
    layout: PackedLayout = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the tensor."""
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes


def pack_tensor(
    x: jax.Array,
    format: str | Format,
    *,
    scale: ScaleKind | jax.typing.ArrayLike = "power_of_two",
    granularity: str | Granularity = "tensor",
    rounding: Rounding = "nearest_even",
    overflow: Overflow = "native",
) -> PackedTensor:
    """The codes that ``x / scale`` rounds to, and the scales.

    Unpacked they are ``quantize(x, format, scale=..., rounding=..., overflow=...)``, or ``quantize_blocks`` for ``mx``
    and ``fit``: the same bits but for the sign of NaN, which codes do not hold. For stochastic rounding quantize first:
    what is on the grid already is packed as it is, under the same scale. Codes lie on devices as ``x`` does.

    Args:
        x: float32, bfloat16, float16 or float64, any shape; not traced, because its values decide what is refused.
        format: a name or a :class:`~altgrad_core.formats.Format`, signed and of at most 16 bits.
        scale: a :data:`~altgrad_core.packing.ScaleKind`; or the scales themselves: positive, normal float32, one for
            all or of the shape of :func:`altgrad_jax.amaxes`.
        granularity: which elements share a scale: ``"tensor"``, ``"channel"``, ``"block32"``, or a
            :data:`~altgrad_core.scaling.Granularity`.
        rounding: all but ``stochastic``.
        overflow: see :data:`altgrad_core.formats.Overflow`; not with ``mx`` and ``fit``, under which blocks saturate.

    Raises:
        TypeError: if ``x`` is not floating point.
        InputError: for unknown names, options that do not go together, scales of another shape or that are not positive
            and normal; and for NaN in ``x``, or infinities that are to be kept, if the format has no code for them.

    >>> packed = pack_tensor(jnp.array([[0.1, 0.2], [-0.3, 449.0]]), "E4M3")
    >>> packed.codes.dtype, float(packed.scales), packed.nbytes
    (dtype('uint8'), 2.0, 8)
    >>> unpack_tensor(packed).tolist()
    [[0.1015625, 0.203125], [-0.3125, 448.0]]
    """
    if isinstance(x, jax.core.Tracer) or isinstance(scale, jax.core.Tracer):
        raise InputError(
            "pack_tensor looks at values, which are traced here; expected it outside of jit, or encode inside"
        )
    x = floating(x, "pack_tensor")
    if isinstance(scale, str):
        given, kind = None, scale
    else:
        given = jnp.asarray(scale, jnp.float32)
        kind = kind_of(np.asarray(given))
    check_overflow(kind, overflow)
    layout = PackedLayout.of(format, granularity, kind, str(x.dtype))
    scales = None if given is None else _checked_scales(given, layout, x.shape)
    of_codes = "saturate" if kind in BLOCK_RULES else overflow
    params = CodeParams.from_format(layout.format, rounding=rounding, overflow=of_codes)
    packed = _packed(x, scales, params, layout.granularity, layout.scale_kind)
    if bool(packed.lost):
        nans, infs = jnp.isnan(x), jnp.isinf(x) & (overflow == "saturate_finite")
        check_representable(layout.format, _count(nans), _count(infs), x.size)
    return PackedTensor(packed.codes, packed.scales, layout)


def unpack_tensor(packed: PackedTensor) -> jax.Array:
    """The values of a packed tensor, in the dtype that was packed. May be traced.

    Raises:
        InputError: for what was float64 where JAX has none; see ``jax.enable_x64``.

    >>> unpack_tensor(pack_tensor(jnp.array([1.0, -2.3], jnp.bfloat16), "E0M7", scale="ratio")).dtype
    dtype(bfloat16)
    """
    layout = packed.layout
    check_x64(layout.dtype, "what was packed")
    params = CodeParams.from_format(layout.format)
    return _unpacked(packed.codes, packed.scales, params, layout.granularity, numpy_dtype(layout.dtype))


def pack_tensors(
    tensors: Mapping[str, jax.Array], rules: Mapping[str, PackRule | None]
) -> dict[str, PackedTensor | jax.Array]:
    """Tensors by name, packed by the first rule whose pattern matches all of the name.

    Args:
        tensors: by any names, such as ``blocks/0/attn/kernel``.
        rules: by regular expression; None for what stays as it is.

    Raises:
        InputError: for a name that no pattern matches, a pattern that matches nothing, and what :func:`pack_tensor`
            refuses; the message names the tensor.

    >>> weights = {"mlp/kernel": jnp.ones((4, 8)), "mlp/bias": jnp.zeros(8)}
    >>> packed = pack_tensors(weights, {".*kernel": PackRule("E3M4", granularity="channel"), ".*": None})
    >>> packed["mlp/kernel"].scales.shape, packed["mlp/bias"].dtype
    ((1, 8), dtype('float32'))
    """
    names, packed = tuple(tensors), dict[str, PackedTensor | jax.Array](tensors)
    for pattern, places in group_by_pattern(names, tuple(rules)).items():
        rule = rules[pattern]
        if rule is None:
            continue
        for name in (names[place] for place in places):
            with naming(f"tensor {name!r}"):
                packed[name] = pack_tensor(tensors[name], rule.format, scale=rule.scale, granularity=rule.granularity)
    return packed


def unpack_tensors(tensors: Mapping[str, PackedTensor | jax.Array]) -> dict[str, jax.Array]:
    """Tensors by name, those unpacked that are packed.

    >>> unpack_tensors({"w": pack_tensor(jnp.ones(2), "E5M2"), "b": jnp.zeros(1)})["w"].tolist()
    [1.0, 1.0]
    """
    return {name: unpack_tensor(x) if isinstance(x, PackedTensor) else x for name, x in tensors.items()}


def check_x64(dtype: str, what: str) -> None:
    """Refuse a dtype of 64 bits where JAX would silently make one of 32 of it.

    Raises:
        InputError: naming the dtype and ``what`` has it.
    """
    if jax.dtypes.canonicalize_dtype(numpy_dtype(dtype)) != numpy_dtype(dtype):
        raise InputError(f"{what} is {dtype}, which JAX has with jax.enable_x64(True) only; expected it to be on")


class _Packed(NamedTuple):
    codes: jax.Array
    scales: jax.Array
    lost: jax.Array
    """Whether there is an element that the format has no code for."""


# One program: operation by operation would be thirty.
@partial(jax.jit, static_argnums=(3, 4))
def _packed(
    x: jax.Array, scales: jax.Array | None, params: CodeParams, granularity: Granularity, kind: ScaleKind
) -> _Packed:
    if isinstance(granularity, PerBlock) and kind in BLOCK_RULES:
        # A NaN or an infinity makes the scale of its block NaN, so none is lost.
        codes, exponents = encode_blocks(x, params, block=granularity.size, axis=granularity.axis, rule=kind)
        return _Packed(codes, exponents, jnp.zeros((), bool))
    if scales is None:
        by_amax = power_of_two_scale if kind == "power_of_two" else ratio_scale
        scales = by_amax(amaxes(x, granularity), params.params.max_value)
    codes = encode(scaled_down(x, spread(scales, x.shape, granularity)), params)
    keeps_inf = params.params.overflow == OVERFLOWS.index("saturate_finite")
    lost = jnp.any(jnp.isnan(x)) & (params.nan_code == 0)
    lost |= jnp.any(jnp.isinf(x)) & keeps_inf & (params.inf_code == params.max_code)
    if isinstance(granularity, PerBlock) and kind != "ratio":
        scales = (lax.bitcast_convert_type(scales, jnp.int32) >> 23).astype(jnp.uint8)
    return _Packed(codes, scales.reshape(()) if isinstance(granularity, PerTensor) else scales, lost)


def _checked_scales(scales: jax.Array, layout: PackedLayout, shape: tuple[int, ...]) -> jax.Array:
    """Scales that were given, in the shape that they are kept in."""
    expected = layout.scales_shape(shape)
    if scales.size != 1 and scales.shape != expected:
        raise InputError(f"the scales have shape {scales.shape}; expected {expected} for {layout.granularity}, or one")
    check_scales(np.asarray(scales))
    return jnp.broadcast_to(scales.reshape(()) if scales.size == 1 else scales, expected)


def _count(mask: jax.Array) -> int:
    """Summed on the host: of more than 2^31 elements int32 would wrap."""
    return int(np.count_nonzero(np.asarray(mask)))


@partial(jax.jit, static_argnums=(3, 4), inline=True)
def _unpacked(
    codes: jax.Array, scales: jax.Array, params: CodeParams, granularity: Granularity, dtype: np.dtype
) -> jax.Array:
    scales = decode(scales, E8M0) if scales.dtype == jnp.uint8 else scales
    scale = spread(scales, codes.shape, granularity)
    # Not left to the product: what becomes of NaN there is the backend's.
    on_grid = jnp.where(jnp.isnan(scale), jnp.float32(np.nan), decode(codes, params))
    return scaled_up(on_grid, scale, dtype)

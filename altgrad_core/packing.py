"""What a packed tensor is: codes, scales, and the description that makes values of them again, in either framework."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

from altgrad_core.codes import parse_codable
from altgrad_core.errors import InputError, check_choice
from altgrad_core.formats import Format, Overflow, UnknownFormatError, parse
from altgrad_core.scaling import (
    BLOCK_RULES,
    E8M0_NAN,
    MX_BLOCK,
    Granularity,
    PerBlock,
    PerChannel,
    PerTensor,
    checked_axes,
    checked_axis,
    parse_granularity,
    reduced_axes,
)

ScaleKind = Literal["power_of_two", "ratio", "mx", "fit"]
"""What the scales of a packed tensor are.

``power_of_two``: powers of two, by default the smallest that bring an amax to at most max, and overflow is what the
policy says. ``ratio``: any positive numbers, by default ``amax / max``. ``mx`` and ``fit``: powers of two for blocks
that saturate, see :data:`altgrad_core.scaling.BlockRule`.
"""

SCALE_KINDS: tuple[ScaleKind, ...] = ("power_of_two", "ratio", "mx", "fit")

FLOATS = ("float32", "bfloat16", "float16", "float64")
"""Dtypes of what is packed."""

STORED_AS: Mapping[str, str] = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2": "F8_E5M2",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
    "complex64": "C64",
}
"""The dtypes that safetensors writes and both frameworks have, by their names, and what safetensors calls them."""

E8M0 = parse("float8_e8m0fnu")
"""The format of the scales of blocks."""

_SMALLEST_SCALE = np.float32(2.0**-126)


@dataclass(frozen=True)
class PackRule:
    """How the tensors that a rule is for are packed.

    Args:
        format: a name or a :class:`~altgrad_core.formats.Format`, signed and of at most 16 bits.
        scale: where scales come from.
        granularity: which elements share one.

    >>> PackRule("E4M3", granularity="channel")
    PackRule(format='E4M3', scale='power_of_two', granularity='channel')
    """

    format: str | Format
    scale: ScaleKind = "power_of_two"
    granularity: str | Granularity = "tensor"


@dataclass(frozen=True)
class PackedLayout:
    """What codes and scales mean.

    Args:
        format: of the codes: signed, of at most 16 bits, with a name that :func:`altgrad_core.formats.parse` knows.
        granularity: which elements share a scale.
        scale_kind: what the scales are.
        dtype: of what was packed, and of what is unpacked: one of :data:`FLOATS`.

    Raises:
        InputError: for what is none of these, and for ``mx`` or ``fit`` without blocks.

    >>> PackedLayout(parse("E3M4"), PerBlock(), "mx", "float32").scales_shape((4, 40))
    (4, 2)
    """

    format: Format
    granularity: Granularity
    scale_kind: ScaleKind
    dtype: str

    def __post_init__(self) -> None:
        """Check that the parts go together."""
        parse_codable(self.format)
        if not self.format.is_signed:
            raise InputError(
                f"{self.format} has no sign and no zero: it is for scales; expected a signed format, such as E4M3"
            )
        _check_name(self.format)
        check_choice("kind of scale", self.scale_kind, SCALE_KINDS)
        check_choice("dtype to pack", self.dtype, FLOATS)
        if self.scale_kind in BLOCK_RULES and not isinstance(self.granularity, PerBlock):
            raise InputError(
                f"scale={self.scale_kind!r} is a rule for blocks; expected a granularity such as 'block{MX_BLOCK}', "
                f"not {self.granularity}"
            )

    @classmethod
    def of(cls, format: str | Format, granularity: str | Granularity, kind: ScaleKind, dtype: str) -> PackedLayout:
        """The layout of what is given by names.

        Raises:
            InputError: for unknown names, and what does not go together.
        """
        return cls(parse_codable(format), parse_granularity(granularity), kind, dtype)

    @property
    def code_dtype(self) -> np.dtype:
        """uint8, or uint16 for more than 8 bits. Narrower codes have a byte each."""
        return np.dtype(np.uint8 if self.format.bits <= 8 else np.uint16)

    @cached_property
    def stored_dtype(self) -> np.dtype:
        """What codes are in a file: the format's own dtype where safetensors has it, else :attr:`code_dtype`."""
        own = self.format.dtype
        return own if own is not None and own.name in STORED_AS else self.code_dtype

    @property
    def has_e8m0_scales(self) -> bool:
        """Whether scales are E8M0 codes, a byte each: of blocks, if they are powers of two. Others are float32."""
        return isinstance(self.granularity, PerBlock) and self.scale_kind != "ratio"

    @property
    def scale_dtype(self) -> np.dtype:
        """uint8 for E8M0 codes, else float32."""
        return np.dtype(np.uint8 if self.has_e8m0_scales else np.float32)

    @property
    def stored_scale_dtype(self) -> np.dtype:
        """What scales are in a file."""
        return numpy_dtype("float8_e8m0fnu") if self.has_e8m0_scales else np.dtype(np.float32)

    def scales_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the scales of a tensor: that of ``amaxes``, but ``()`` for one scale.

        Raises:
            InputError: for an axis that the tensor does not have.
        """
        granularity = self.granularity
        if isinstance(granularity, PerTensor):
            return ()
        if isinstance(granularity, PerBlock):
            axis = checked_axis(granularity.axis, len(shape))
            return (*shape[:axis], granularity.count(shape[axis]), *shape[axis + 1 :])
        shared = reduced_axes(granularity, len(shape))
        return tuple(1 if axis in shared else length for axis, length in enumerate(shape))

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of the codes and scales of a tensor.

        >>> PackedLayout(parse("E3M4"), PerBlock(), "mx", "float32").nbytes((4, 64))
        264
        """
        scales = math.prod(self.scales_shape(shape)) * self.scale_dtype.itemsize
        return math.prod(shape) * self.code_dtype.itemsize + scales


def kind_of(scales: npt.NDArray[np.float32]) -> ScaleKind:
    """``power_of_two`` if all scales are, else ``ratio``.

    >>> kind_of(np.float32([0.5, 4.0])), kind_of(np.float32([3.0]))
    ('power_of_two', 'ratio')
    """
    return "power_of_two" if bool(np.all(np.frexp(scales)[0] == 0.5)) else "ratio"


def check_scales(scales: npt.NDArray[np.float32]) -> None:
    """Refuse scales that are not positive, finite and normal float32.

    Raises:
        InputError: naming the first.
    """
    bad = np.ravel(scales)[~((np.ravel(scales) >= _SMALLEST_SCALE) & np.isfinite(np.ravel(scales)))]
    if bad.size:
        raise InputError(f"a scale is {bad[0]}; expected positive float32 from 2^-126 on")


def check_overflow(kind: ScaleKind, overflow: Overflow) -> None:
    """Refuse an overflow policy where blocks saturate.

    Raises:
        InputError: for any but the default.
    """
    if kind in BLOCK_RULES and overflow != "native":
        raise InputError(f"overflow={overflow!r} would have no effect: scale={kind!r} makes blocks saturate")


def check_representable(format: Format, nans: int, infs: int, size: int) -> None:
    """Refuse elements that the codes of a format cannot hold: a 0 or a maximum in their place would hide a failure.

    Args:
        format: of the codes.
        nans: how many elements are NaN.
        infs: how many infinities are to be kept.
        size: how many elements there are.

    Raises:
        InputError: if the format has no code for them.

    >>> check_representable(parse("E3M4"), 2, 0, 10)
    Traceback (most recent call last):
    altgrad_core.errors.InputError: 2 of 10 elements are NaN, for which E3M4 has no code; expected finite numbers, ...
    """
    if nans and not format.has_nan:
        raise InputError(
            f"{nans} of {size} elements are NaN, for which {format} has no code; expected finite numbers, or a format "
            "with NaN, such as E5M2"
        )
    if infs and not format.has_inf:
        raise InputError(
            f"{infs} of {size} elements are infinite, for which {format} has no code and which "
            "overflow='saturate_finite' keeps; expected finite numbers, overflow='saturate', or a format with "
            "infinities, such as E5M2"
        )


def check_contents(
    layout: PackedLayout,
    codes: npt.NDArray[np.generic],
    scales: npt.NDArray[np.generic],
) -> None:
    """Refuse codes and scales that no tensor of the layout has.

    Args:
        layout: what they are said to mean.
        codes: as they are in a packed tensor.
        scales: likewise.

    Raises:
        InputError: for codes or scales of another dtype, scales of a shape that does not fit, codes of more bits than
            the format has, scales that are no normal positive numbers (only those of ``mx`` and ``fit`` may be NaN),
            and scales that are no powers of two where they are said to be.
    """
    if codes.dtype != layout.code_dtype:
        raise InputError(f"its codes are {codes.dtype}; expected {layout.code_dtype} for {layout.format}")
    shape = layout.scales_shape(codes.shape)
    if (scales.dtype, scales.shape) != (layout.scale_dtype, shape):
        raise InputError(
            f"its scales are {scales.dtype} of shape {scales.shape}; expected {layout.scale_dtype} of {shape} for "
            f"{layout.granularity}"
        )
    bits = layout.format.bits
    if codes.size and bits < 8 * codes.dtype.itemsize and int(codes.max()) >> bits:
        raise InputError(
            f"a code is {int(codes.max())}; expected at most {(1 << bits) - 1}, {layout.format} has {bits} bits"
        )
    if not layout.has_e8m0_scales:
        numbers = scales.astype(np.float32, copy=False)
        check_scales(numbers)
        if layout.scale_kind == "power_of_two" and kind_of(numbers) != "power_of_two":
            uneven = np.ravel(numbers)[np.ravel(np.frexp(numbers)[0]) != 0.5][0]
            raise InputError(f"a scale is {uneven}; expected powers of two, as scale={layout.scale_kind!r} says")
        return
    if np.any(scales == 0):
        raise InputError("a scale is the E8M0 code 0, worth 2^-127; expected codes from 1 on, normal float32")
    if layout.scale_kind not in BLOCK_RULES and np.any(scales == E8M0_NAN):
        raise InputError(f"a scale is NaN, the E8M0 code {E8M0_NAN}; expected that with scale='mx' or 'fit' only")


def check_cast_alike(
    layout: PackedLayout, ndim: int, format: Format, granularity: Granularity, *, power_of_two: bool
) -> None:
    """Refuse packed weights of another format or granularity, and of ratios for a layer that scales by powers of two.

    Scales of blocks by another rule (``mx``, ``fit``) are taken: what they scaled is on the grid of the layer's, too.
    So are powers of two where the layer has ratios, which may be powers of two as well: that cannot be told here.

    Args:
        layout: of what was packed.
        ndim: how many axes it has.
        format: the one that the layer casts to.
        granularity: the one that it scales by.
        power_of_two: whether its scales are powers of two.

    Raises:
        InputError: naming what was found and what was expected.

    >>> layout = PackedLayout(parse("E3M4"), PerBlock(32, 1), "mx", "float32")
    >>> check_cast_alike(layout, 2, parse("E3M4"), PerBlock(32, -1), power_of_two=True)
    >>> check_cast_alike(layout, 2, parse("E3M4"), PerTensor(), power_of_two=True)
    Traceback (most recent call last):
    altgrad_core.errors.InputError: its scales are of PerBlock(size=32, axis=1); expected PerTensor(), ...
    """
    if layout.format != format:
        raise InputError(f"it is packed as {layout.format}; expected {format}, as its layer casts")
    if _from_the_front(layout.granularity, ndim) != _from_the_front(granularity, ndim):
        raise InputError(f"its scales are of {layout.granularity}; expected {granularity}, as its layer casts")
    if power_of_two and layout.scale_kind == "ratio":
        raise InputError("its scales are ratios; expected powers of two, as its layer casts")


def _from_the_front(granularity: Granularity, ndim: int) -> Granularity:
    match granularity:
        case PerChannel(axes):
            return PerChannel(checked_axes(axes, ndim))
        case PerBlock(size, axis):
            return PerBlock(size, checked_axis(axis, ndim))
    return granularity


def check_same_names(held: Iterable[str], given: Iterable[str]) -> None:
    """Refuse tensors for a model whose names are not the model's.

    Args:
        held: the names of what the model holds.
        given: those of the tensors.

    Raises:
        InputError: with the first names that one side lacks.

    >>> check_same_names(["up/kernel"], ["up/kernel"])
    """
    for what, names in (("tensors lack", {*held} - {*given}), ("model has no", {*given} - {*held})):
        if names:
            raise InputError(f"the {what} {', '.join(sorted(names)[:6])}; expected the same names on both sides")


def numpy_dtype(name: str) -> np.dtype:
    """The dtype of a name of NumPy or ml_dtypes.

    >>> numpy_dtype("bfloat16"), numpy_dtype("int8")
    (dtype(bfloat16), dtype('int8'))
    """
    import ml_dtypes  # late: a layout without a dtype of its own needs no more than NumPy

    return np.dtype(getattr(ml_dtypes, name, name))


def _check_name(format: Format) -> None:
    """Refuse what a file could not name: formats of 2 bits, for which the grammar has no name."""
    try:
        named = parse(str(format))
    except UnknownFormatError:
        named = None
    if named != format:
        raise InputError(f"{format.name!r} has {format.bits} bits, which no name means; expected 3 to 16 bits")

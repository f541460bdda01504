"""A format as data: what a cast needs to know of it, in tensors that a compiled program takes as arguments."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from altgrad_core.errors import InputError
from altgrad_core.formats import CastPath, Format, parse

_INF = 0x7F800000


class FormatParams(NamedTuple):
    """What a cast needs to know of a format, in tensors that may be arguments of compiled code, batched and replaced.

    For ``torch.compile``: a function of ``(x, params)`` that calls ``quantize(x, params)`` is compiled once for each
    ``path``. Eager torch casts faster by a name or a :class:`~altgrad_core.formats.Format`. Rounding and overflow are
    arguments of the cast; each compiles a program of its own.

    Every tensor has the same shape: ``()`` for one format, ``(n,)`` for n formats to map over, as in
    ``torch.vmap(lambda params: quantize(x, params))(FormatParams.stack(...))``. Params are made by :meth:`from_format`.

    Attributes:
        mantissa_bits: int32.
        min_exponent: int32, exponent of the smallest normal value.
        max_value: float32, the largest finite value.
        native_overflow: float32, what overflow natively becomes: inf, NaN or ``max_value``.
        negative_zero: bool, whether the format tells -0 from 0.
    """

    mantissa_bits: Tensor
    min_exponent: Tensor
    max_value: Tensor
    native_overflow: Tensor
    negative_zero: Tensor

    @property
    def path(self) -> CastPath:
        """Which implementation casts to nearest even.

        It belongs to the type, because transforms take a named tuple for its type and its tensors: so params of
        another path compile another program, and ``torch.vmap`` finds nothing but tensors in them.
        """
        return _PATH_OF[type(self)]

    @staticmethod
    def from_format(
        format: str | Format, *, path: CastPath | None = None, device: torch.device | str | None = None
    ) -> FormatParams:
        """The params of one format.

        Args:
            format: a name or a :class:`~altgrad_core.formats.Format`.
            path: ``"wide"`` to share a program with any signed format; by default the fastest that is right.
            device: where the tensors live.

        Raises:
            UnknownFormatError: for an unknown name.
            ValueError: for a path that cannot serve the format.

        >>> FormatParams.from_format("E7M0").path, FormatParams.from_format("bf16").path
        ('fast', 'wide')
        """
        resolved = parse(format)
        natural = resolved.cast_path
        able = ("fast", "wide") if natural == "fast" else (natural,)
        if path is not None and path not in able:
            raise InputError(f"path {path!r} cannot cast to {resolved}; expected {' or '.join(able)}")

        def scalar(value: float, dtype: torch.dtype) -> Tensor:
            return torch.tensor(value, dtype=dtype, device=device)

        return _TYPE_OF[natural if path is None else path](
            mantissa_bits=scalar(resolved.mantissa_bits, torch.int32),
            min_exponent=scalar(resolved.min_exponent, torch.int32),
            max_value=scalar(resolved.max_representable_value, torch.float32),
            native_overflow=scalar(resolved.overflow_value, torch.float32),
            negative_zero=scalar(resolved.has_negative_zero, torch.bool),
        )

    def set_(self, format: str | Format) -> None:
        """Make these the params of another format, in place, so that compiled code that holds them need not be told.

        Raises:
            UnknownFormatError: for an unknown name.
            InputError: for a format that their path cannot serve.

        >>> params = FormatParams.from_format("E7M0")
        >>> params.set_("E5M2")
        >>> float(params.max_value)
        57344.0
        """
        other = FormatParams.from_format(format, path=self.path)
        for mine, theirs in zip(self, other, strict=True):
            mine.copy_(theirs)

    @staticmethod
    def stack(params: Iterable[FormatParams]) -> FormatParams:
        """Params of n formats of one path, with a leading axis of n to map over.

        Raises:
            ValueError: if the sequence is empty or mixes paths.

        >>> from altgrad_torch.casting import quantize
        >>> both = FormatParams.stack([FormatParams.from_format(name) for name in ("E5M2", "E7M0")])
        >>> torch.vmap(lambda params: quantize(torch.tensor([0.75, 6.0]), params))(both).tolist()
        [[0.75, 6.0], [0.5, 8.0]]
        """
        params = list(params)
        if not params:
            raise InputError("cannot stack: there are no params; expected those of at least one format")
        paths = {each.path for each in params}
        if len(paths) != 1:
            raise ValueError(f"cannot stack params of the paths {sorted(paths)}; expected one path")
        return type(params[0])(*(torch.stack(tensors) for tensors in zip(*params, strict=True)))


class _Fast(FormatParams):
    __slots__ = ()


class _Wide(FormatParams):
    __slots__ = ()


class _Unsigned(FormatParams):
    __slots__ = ()


class _Identity(FormatParams):
    __slots__ = ()


_TYPE_OF: dict[CastPath, type[FormatParams]] = {
    "fast": _Fast,
    "wide": _Wide,
    "unsigned": _Unsigned,
    "identity": _Identity,
}
_PATH_OF = {kind: path for path, kind in _TYPE_OF.items()}


class Edges(NamedTuple):
    """Where a grid ends, as bits of magnitudes.

    Attributes:
        overflows_from: the smallest magnitude that overflows: an integer, or an int32 tensor of shape ``()``.
        vanishes_to: the largest that becomes zero, likewise.
    """

    overflows_from: int | Tensor
    vanishes_to: int | Tensor


def edges(params: FormatParams) -> Edges:
    """Where the grid of a format ends, for casts to nearest even."""
    if params.path == "identity":
        return Edges(_INF, 0)
    maximum = params.max_value.view(torch.int32)
    max_exponent = (maximum >> 23) - 127
    half_exponent = 22 - params.mantissa_bits + (params.min_exponent - max_exponent).clamp_min(0)
    half = torch.ones_like(maximum) << half_exponent
    # A tie beyond max goes to the even code: to max itself where its last code bit is 0.
    without_mantissa = params.mantissa_bits == 0
    code = torch.where(without_mantissa, max_exponent - params.min_exponent + 1, maximum >> (23 - params.mantissa_bits))
    code = torch.where(max_exponent < params.min_exponent, 1, code)
    if params.path == "unsigned":  # without a code for zero, whose place the smallest value takes
        return Edges(maximum + half + 1 - ((code + 1) & 1), 0)
    # Results below 2^-126 are zero, so quanta of binades further down than the next do not show.
    lowest = params.min_exponent.clamp_min(-127) - params.mantissa_bits
    # There the last to vanish is what rounds to just below 2^-126; the tie does, too, if the code of 2^-126 is odd.
    odd = (params.min_exponent + 1) & without_mantissa
    last_flushed = (1 << 23) - (torch.ones_like(lowest) << (lowest + 148).clamp(0, 22)) - 1 + odd
    vanishes = torch.where(lowest == -126, 1 << 22, last_flushed)
    return Edges(maximum + half + 1 - (code & 1), torch.where(lowest > -126, (lowest + 126) << 23, vanishes))

"""A format as data: what a cast needs to know of it, in a pytree of scalars that may be traced and replaced."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from altgrad_core.errors import InputError
from altgrad_core.formats import OVERFLOWS, ROUNDINGS, STOCHASTIC_BITS, CastPath, Format, Overflow, Rounding, parse
from altgrad_core.reference import check_modes, check_stochastic_bits

_INF = np.int32(0x7F800000)
_NATIVE = OVERFLOWS.index("native")
_SATURATE_FINITE = OVERFLOWS.index("saturate_finite")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FormatParams:
    """What a cast needs to know of a format, as a pytree of scalars that may be traced, batched and replaced.

    Only ``path`` is static: casts by params of one path share a compiled program, so a run changes its format by
    writing eight scalars. Every array has the same shape: ``()`` for one format, ``(n,)`` for n formats to ``vmap``
    over; scalars among arrays belong to all (see :meth:`for_each`). Where formats of several paths should share a
    program, give them all the path ``"wide"`` (any signed format, to nearest even) or ``"integer"`` (any rounding as
    well).

    Attributes:
        mantissa_bits: int32.
        min_exponent: int32, exponent of the smallest normal value.
        max_value: float32, the largest finite value.
        native_overflow: int32, the bits of the float32 that overflow natively becomes: inf, NaN or ``max_value``. Bits,
            since a NaN in a state is what ``jax_debug_nans`` and checks of finiteness look for.
        overflow: int32, index into :data:`altgrad_core.formats.OVERFLOWS`.
        rounding: int32, index into :data:`altgrad_core.formats.ROUNDINGS`; 0 on the paths that know no other.
        stochastic_bits: int32, how many random bits stochastic rounding uses.
        negative_zero: bool, whether the format tells -0 from 0.
        path: which implementation casts (static).
    """

    mantissa_bits: jax.Array
    min_exponent: jax.Array
    max_value: jax.Array
    native_overflow: jax.Array
    overflow: jax.Array
    rounding: jax.Array
    stochastic_bits: jax.Array
    negative_zero: jax.Array
    path: CastPath = field(metadata={"static": True})

    @classmethod
    def from_format(
        cls,
        format: str | Format,
        *,
        rounding: Rounding = "nearest_even",
        overflow: Overflow = "native",
        stochastic_bits: int = STOCHASTIC_BITS,
        path: CastPath | None = None,
    ) -> FormatParams:
        """The params of one format.

        Args:
            format: a name or a :class:`~altgrad_core.formats.Format`.
            rounding: how to round; all but ``nearest_even`` take the integer path.
            overflow: what overflow becomes.
            stochastic_bits: how many random bits stochastic rounding uses, 1 to 24.
            path: ``"wide"`` to share a program with any signed format, ``"integer"`` to keep the rounding changeable
                as well; by default the fastest that is right.

        Raises:
            UnknownFormatError: for an unknown name.
            ValueError: for an unknown mode, one without effect, or a path that cannot serve the format.

        >>> FormatParams.from_format("E7M0").path, FormatParams.from_format("bf16").path
        ('fast', 'wide')
        """
        resolved = parse(format)
        check_modes(rounding, overflow)
        check_stochastic_bits(stochastic_bits)
        able = paths_of(resolved, rounding)
        if path is not None and path not in able:
            raise InputError(
                f"path {path!r} cannot cast to {resolved} with rounding {rounding!r}; expected {' or '.join(able)}"
            )
        chosen = able[0] if path is None else path
        if stochastic_bits != STOCHASTIC_BITS and rounding != "stochastic" and chosen != "integer":
            raise InputError(f"stochastic_bits={stochastic_bits} would have no effect: rounding is {rounding!r}")
        return cls(
            mantissa_bits=jnp.asarray(resolved.mantissa_bits, jnp.int32),
            min_exponent=jnp.asarray(resolved.min_exponent, jnp.int32),
            max_value=jnp.asarray(resolved.max_representable_value, jnp.float32),
            native_overflow=jnp.asarray(float_bits(resolved.overflow_value), jnp.int32),
            overflow=jnp.asarray(OVERFLOWS.index(overflow), jnp.int32),
            rounding=jnp.asarray(ROUNDINGS.index(rounding), jnp.int32),
            stochastic_bits=jnp.asarray(stochastic_bits, jnp.int32),
            negative_zero=jnp.asarray(resolved.has_negative_zero, jnp.bool_),
            path=chosen,
        )

    def scaled(self, scale: jax.Array) -> FormatParams:
        """The params of the grid ``scale`` times as wide: a cast to it is ``Q(x / scale) * scale`` without the scaling.

        Shifts exponents, so it costs nothing per element. The shifted grid keeps to what its path casts well (see
        :attr:`altgrad_core.formats.Format.cast_path`): finer quanta or a larger maximum are cut off.

        Args:
            scale: float32, a power of two, of a shape that broadcasts against these params (and then against ``x``).

        >>> from altgrad_jax.casting import quantize
        >>> params = FormatParams.from_format("E4M3").scaled(jnp.float32(2.0**-8))
        >>> float(params.max_value), quantize(jnp.array([1.1, 9.0]), params).tolist()
        (1.75, [1.125, nan])
        """
        if self.path == "identity":
            return self
        shift = (lax.shift_right_logical(_bits(scale), jnp.full_like(_bits(scale), 23)) & 0xFF) - 127
        if self.path == "unsigned":
            maximum = _float(jnp.clip((_bits(self.max_value) >> 23) + shift, 0, 254) << 23)
            # Natively these overflow to NaN; infinity marks what overflows.
            native = jnp.broadcast_to(self.native_overflow, maximum.shape)
            return replace(self, min_exponent=self.min_exponent + shift, max_value=maximum, native_overflow=native)
        lowest, highest = (-125, jnp.minimum(103 + self.mantissa_bits, 126)) if self.path == "fast" else (-149, 127)
        room = highest - ((_bits(self.max_value) >> 23) - 127)
        widened = _float((jnp.minimum(shift, room) + 127) << 23)
        min_exponent = jnp.maximum(self.min_exponent + shift, self.mantissa_bits + lowest)
        if self.path == "fast":
            min_exponent = jnp.minimum(min_exponent, highest + 1)
        maximum = self._on_grid(self.max_value * widened, min_exponent)
        return replace(
            self,
            min_exponent=min_exponent,
            max_value=maximum,
            native_overflow=jnp.where(self.native_overflow < _INF, _bits(maximum), self.native_overflow),
        )

    def _on_grid(self, magnitude: jax.Array, min_exponent: jax.Array) -> jax.Array:
        """The next value, toward zero, of the grid that begins there: a cast counts on max to be one of its values."""
        bits = _bits(magnitude)
        dropped = 23 - self.mantissa_bits + jnp.maximum(min_exponent - ((bits >> 23) - 127), 0)
        kept = bits & -(1 << jnp.minimum(dropped, 23))
        return _float(jnp.where(dropped > 23, 0, kept))

    def for_each(self, count: int) -> FormatParams:
        """The params of ``count`` tensors, whose formats may come to differ: arrays of shape ``(count,)``.

        How they round and overflow belongs to all of them, in scalars.

        >>> FormatParams.from_format("E4M3").for_each(3).max_value.tolist()
        [448.0, 448.0, 448.0]
        """
        of_format = ("mantissa_bits", "min_exponent", "max_value", "native_overflow", "negative_zero")
        return replace(self, **{name: jnp.broadcast_to(getattr(self, name), (count,)) for name in of_format})

    def at(self, *index: int | Sequence[int]) -> FormatParams:
        """One of batched params, or several in a sequence; scalars among them belong to all."""
        places = tuple(each if isinstance(each, int) else np.array(each) for each in index)
        return jax.tree.map(lambda leaf: leaf[places] if leaf.ndim else leaf, self)

    @classmethod
    def stack(cls, params: Iterable[FormatParams]) -> FormatParams:
        """Params of n formats of one path, with a leading axis of n to ``vmap`` or map over.

        Raises:
            ValueError: if the sequence is empty or mixes paths.
        """
        params = list(params)
        paths = {each.path for each in params}
        if not paths:
            raise InputError("cannot stack: there are no params; expected those of at least one format")
        if len(paths) != 1:
            raise ValueError(f"cannot stack params of the paths {sorted(paths)}; expected one path")
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)


class FormatHolder(abc.ABC):
    """A pytree node that keeps its params in another form, which :func:`altgrad_jax.set_format` can write."""

    @property
    @abc.abstractmethod
    def params(self) -> FormatParams:
        """The params."""

    @abc.abstractmethod
    def with_params(self, params: FormatParams) -> Self:
        """The same with other params, of the same path."""


WORDS = 8
"""How many words params have."""

_DTYPES = (jnp.int32, jnp.int32, jnp.float32, jnp.int32, jnp.int32, jnp.int32, jnp.int32, jnp.bool_)


def to_words(params: FormatParams) -> jax.Array:
    """The data of params in one array, to be carried where many arrays would be slow.

    Returns:
        int32 of shape ``(*shape, 8)``: the attributes in their order, of floats the bits.

    >>> to_words(FormatParams.from_format("E5M2")).tolist()[:2]
    [2, -14]
    """
    leaves = jnp.broadcast_arrays(*jax.tree.leaves(params))
    return jnp.stack([_bits(leaf) if leaf.dtype == jnp.float32 else leaf.astype(jnp.int32) for leaf in leaves], -1)


def from_words(words: jax.Array, path: CastPath) -> FormatParams:
    """The params that :func:`to_words` wrote.

    Args:
        words: int32 of shape ``(*shape, 8)``.
        path: which implementation casts.

    >>> float(from_words(to_words(FormatParams.from_format("E5M2")), "fast").max_value)
    57344.0
    """
    words = jnp.asarray(words)
    apart = [words[..., k] for k in range(WORDS)]
    leaves = [_float(x) if dtype == jnp.float32 else x.astype(dtype) for x, dtype in zip(apart, _DTYPES, strict=True)]
    return FormatParams(*leaves, path=path)


def paths_of(format: Format, rounding: Rounding = "nearest_even") -> tuple[CastPath, ...]:
    """The paths that can cast to a format in a mode, the fastest first."""
    natural = format.cast_path
    if natural == "identity" and rounding != "nearest_even":
        raise InputError(f"rounding={rounding!r} would have no effect: float32 values are on the grid of {format}")
    if natural in ("identity", "unsigned"):
        return (natural,)
    if rounding != "nearest_even":
        return ("integer",)
    return ("fast", "wide", "integer") if natural == "fast" else ("wide", "integer")


def as_params(
    format: str | Format | FormatParams,
    rounding: Rounding = "nearest_even",
    overflow: Overflow = "native",
    stochastic_bits: int = STOCHASTIC_BITS,
) -> FormatParams:
    """Params of whatever names a format; params are returned as they are.

    Raises:
        ValueError: if params, which carry their modes, come with other modes beside them.
    """
    if not isinstance(format, FormatParams):
        return FormatParams.from_format(format, rounding=rounding, overflow=overflow, stochastic_bits=stochastic_bits)
    check_modes(rounding, overflow)
    if (rounding, overflow, stochastic_bits) != ("nearest_even", "native", STOCHASTIC_BITS):
        raise InputError(
            f"rounding={rounding!r}, overflow={overflow!r}, stochastic_bits={stochastic_bits} would have no effect: "
            "FormatParams carry their own; give them to FormatParams.from_format"
        )
    return format


def check_one_for_each(params: FormatParams, count: int) -> None:
    """Check that params are of one format, or of one for each of ``count`` tensors.

    Raises:
        InputError: if they are not.
    """
    if params.max_value.shape not in ((), (count,)):
        raise InputError(
            f"params have the shape {params.max_value.shape}; expected (), or ({count},) for {count} leaves"
        )


def beyond_max(params: FormatParams) -> jax.Array:
    """What a finite value beyond max becomes under the overflow policy: float32, of the shape of the params."""
    return _float(jnp.where(params.overflow == _NATIVE, params.native_overflow, _bits(params.max_value)))


def replaced_from(params: FormatParams, limits: Edges | None = None) -> jax.Array:
    """The smallest magnitude, in bits, that casts to nearest even replace: by what stands for overflow, or by NaN.

    Natively that is what rounds beyond max, if inf or NaN stands for it. What saturates only needs to be bounded:
    infinities, where they are kept, and NaN are left. int32, of the shape of the params.

    Args:
        params: the format.
        limits: its :func:`edges`, if they are at hand.
    """
    limits = edges(params) if limits is None else limits
    # Results below 2^-126 are zero, also under a scale that leaves none above.
    native = jnp.maximum(limits.overflows_from, np.int32(1 << 23))
    saturating = jnp.where(params.overflow == _SATURATE_FINITE, _INF, _INF + 1)
    return jnp.where((params.overflow == _NATIVE) & (params.native_overflow >= _INF), native, saturating)


class Edges(NamedTuple):
    """Where a grid ends, as bits of magnitudes: int32, of the shape of the params.

    Attributes:
        overflows_from: the smallest magnitude that overflows.
        vanishes_to: the largest that becomes zero.
    """

    overflows_from: jax.Array
    vanishes_to: jax.Array


def edges(params: FormatParams) -> Edges:
    """Where the grid of a format ends, for casts to nearest even."""
    if params.path == "identity":
        return Edges(jnp.full_like(params.min_exponent, _INF), jnp.zeros_like(params.min_exponent))
    maximum = _bits(params.max_value)
    max_exponent = (maximum >> 23) - 127
    half = jnp.int32(1) << (22 - params.mantissa_bits + jnp.maximum(params.min_exponent - max_exponent, 0))
    # A tie beyond max goes to the even code: to max itself where its last code bit is 0.
    last_bit = jnp.where(
        params.mantissa_bits == 0, max_exponent - params.min_exponent + 1, (maximum >> (23 - params.mantissa_bits)) & 1
    )
    last_bit = jnp.where(max_exponent < params.min_exponent, 1, last_bit)
    if params.path == "unsigned":  # without a code for zero, whose place the smallest value takes
        last_bit = last_bit + 1
    # Results below 2^-126 are zero, so quanta of binades further down than the next do not show.
    lowest = jnp.maximum(params.min_exponent, -127) - params.mantissa_bits
    half_smallest = (lowest - 1 + 127) << 23
    # There the last to vanish is what rounds to just below 2^-126; the tie does, too, if the code of 2^-126 is odd.
    odd = jnp.where(params.mantissa_bits == 0, params.min_exponent + 1, 0) & 1
    last_flushed = (1 << 23) - (jnp.int32(1) << jnp.clip(lowest - 1 + 149, 0, 22)) - 1 + odd
    vanishes = jnp.where(lowest > -126, half_smallest, jnp.where(lowest == -126, 1 << 22, last_flushed))
    if params.path == "unsigned":
        vanishes = jnp.zeros_like(vanishes)
    return Edges(maximum + half + 1 - (last_bit & 1), vanishes)


def float_bits(value: float) -> int:
    """The bits of the float32 nearest to a value."""
    return int(np.float32(value).view(np.int32))


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.int32)


def _float(bits: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(bits, jnp.float32)

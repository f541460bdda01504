"""Casts to the grid of any format, with the format as data: changing it compiles nothing.

The definition of a cast is :func:`altgrad_core.reference.round_to_format`; every function here agrees with it in every
bit. ``altgrad_torch/casting.py`` says the same thing in torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from altgrad_core.errors import InputError
from altgrad_core.formats import OVERFLOWS, ROUNDINGS, STOCHASTIC_BITS, CastPath, Format, Overflow, Rounding, parse
from altgrad_core.reference import check_modes

_SIGN = np.int32(-(2**31))
_MAGNITUDE = np.int32(0x7FFFFFFF)
_INF = np.int32(0x7F800000)
_NAN = np.int32(0x7FC00000)
_IMPLICIT_ONE = np.int32(1 << 23)
_FLOAT32_MAX = np.finfo(np.float32).max
_NEAREST_EVEN, _NEAREST_AWAY, _TOWARD_ZERO, _STOCHASTIC = range(len(ROUNDINGS))
_NATIVE, _SATURATE, _SATURATE_FINITE = range(len(OVERFLOWS))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FormatParams:
    """What a cast needs to know of a format, as a pytree of scalars that may be traced, batched and replaced.

    Only ``path`` is static: casts by params of one path share a compiled program, so a run changes its format by
    writing six scalars. Every array has the same shape: ``()`` for one format, ``(n,)`` for n formats to ``vmap`` over.

    Attributes:
        mantissa_bits: int32.
        min_exponent: int32, exponent of the smallest normal value.
        max_value: float32, the largest finite value.
        native_overflow: float32, what overflow natively becomes: inf, NaN or ``max_value``.
        overflow: int32, index into :data:`altgrad_core.formats.OVERFLOWS`.
        rounding: int32, index into :data:`altgrad_core.formats.ROUNDINGS`; 0 on the fast path, which knows no other.
        path: which implementation casts (static).
    """

    mantissa_bits: jax.Array
    min_exponent: jax.Array
    max_value: jax.Array
    native_overflow: jax.Array
    overflow: jax.Array
    rounding: jax.Array
    path: CastPath = field(metadata={"static": True})

    @classmethod
    def from_format(
        cls,
        format: str | Format,
        *,
        rounding: Rounding = "nearest_even",
        overflow: Overflow = "native",
        path: CastPath | None = None,
    ) -> FormatParams:
        """The params of one format.

        Args:
            format: a name or a :class:`~altgrad_core.formats.Format`.
            rounding: how to round; all but ``nearest_even`` take the integer path.
            overflow: what overflow becomes.
            path: ``"integer"`` to keep rounding changeable later; by default the fastest that is right.

        Raises:
            UnknownFormatError: for an unknown name.
            ValueError: for an unknown mode, or a path that cannot serve the format.

        >>> FormatParams.from_format("E7M0").path, FormatParams.from_format("bf16").path
        ('fast', 'integer')
        """
        resolved = parse(format)
        check_modes(rounding, overflow)
        natural = resolved.cast_path
        if natural == "identity" and rounding != "nearest_even":
            raise InputError(
                f"rounding={rounding!r} would have no effect: float32 values are on the grid of {resolved}"
            )
        if natural == "fast" and rounding != "nearest_even":
            natural = "integer"
        chosen = natural if path is None else path
        if chosen != natural and not (chosen == "integer" and natural == "fast"):
            raise ValueError(
                f"path {chosen!r} cannot cast to {resolved} with rounding {rounding!r}; expected {natural!r}"
            )
        return cls(
            mantissa_bits=jnp.asarray(resolved.mantissa_bits, jnp.int32),
            min_exponent=jnp.asarray(resolved.min_exponent, jnp.int32),
            max_value=jnp.asarray(resolved.max_representable_value, jnp.float32),
            native_overflow=jnp.asarray(resolved.overflow_value, jnp.float32),
            overflow=jnp.asarray(OVERFLOWS.index(overflow), jnp.int32),
            rounding=jnp.asarray(ROUNDINGS.index(rounding), jnp.int32),
            path=chosen,
        )

    def scaled(self, scale: jax.Array) -> FormatParams:
        """The params of the grid ``scale`` times as wide: a cast to it is ``Q(x / scale) * scale`` without the scaling.

        Shifts exponents, so it costs nothing per element. The shifted grid keeps to what its path casts well (see
        :attr:`altgrad_core.formats.Format.cast_path`): finer quanta or a larger maximum are cut off.

        Args:
            scale: float32, a power of two, of a shape that broadcasts against these params (and then against ``x``).

        >>> params = FormatParams.from_format("E4M3").scaled(jnp.float32(2.0**-8))
        >>> float(params.max_value), quantize(jnp.array([1.1, 9.0]), params).tolist()
        (1.75, [1.125, nan])
        """
        if self.path == "identity":
            return self
        shift = (lax.shift_right_logical(_bits(scale), jnp.full_like(_bits(scale), 23)) & 0xFF) - 127
        lowest, highest = (-125, jnp.minimum(103 + self.mantissa_bits, 126)) if self.path == "fast" else (-149, 127)
        room = highest - ((_bits(self.max_value) >> 23) - 127)
        widened = _float((jnp.minimum(shift, room) + 127) << 23)
        return replace(
            self,
            min_exponent=jnp.maximum(self.min_exponent + shift, self.mantissa_bits + lowest),
            max_value=self.max_value * widened,
            native_overflow=self.native_overflow * widened,
        )

    def at(self, *index: int) -> FormatParams:
        """One of batched params; scalars among them belong to all."""
        return jax.tree.map(lambda leaf: leaf[index] if leaf.ndim else leaf, self)

    @classmethod
    def stack(cls, params: Sequence[FormatParams]) -> FormatParams:
        """Params of n formats of one path, with a leading axis of n to ``vmap`` or map over.

        Raises:
            ValueError: if the sequence is empty or mixes paths.
        """
        paths = {each.path for each in params}
        if len(paths) != 1:
            raise ValueError(f"cannot stack params of the paths {sorted(paths)}; expected one path")
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)


def as_params(
    format: str | Format | FormatParams, rounding: Rounding = "nearest_even", overflow: Overflow = "native"
) -> FormatParams:
    """Params of whatever names a format; params are returned as they are.

    Raises:
        ValueError: if params, which carry their modes, come with other modes beside them.
    """
    if not isinstance(format, FormatParams):
        return FormatParams.from_format(format, rounding=rounding, overflow=overflow)
    check_modes(rounding, overflow)
    if rounding != "nearest_even" or overflow != "native":
        raise ValueError(
            f"rounding={rounding!r}, overflow={overflow!r} would have no effect: FormatParams carry their own; give "
            "them to FormatParams.from_format"
        )
    return format


def quantize(
    x: jax.Array,
    format: str | Format | FormatParams,
    *,
    scale: jax.typing.ArrayLike | None = None,
    rounding: Rounding = "nearest_even",
    overflow: Overflow = "native",
    random_bits: jax.Array | None = None,
) -> jax.Array:
    """Round ``x`` to the values of a format: ``Q(x / scale) * scale``. The gradient passes straight through.

    NaN stays NaN and -0 stays -0. Subnormal float32 inputs count at their value; a result below 2^-126 is zero. With
    a scale that is a power of two the scaling is exact.

    Args:
        x: floating-point array of any shape; its dtype is kept. float64 is rounded once, from its own value. A
            float16 result that float16 cannot hold is inf.
        format: a name, a :class:`~altgrad_core.formats.Format`, or :class:`FormatParams`, which may be traced.
        scale: the worth of one, positive, broadcast against ``x``.
        rounding: see :data:`altgrad_core.formats.Rounding`; not beside ``FormatParams``, which carry their own.
        overflow: see :data:`altgrad_core.formats.Overflow`; likewise.
        random_bits: for stochastic rounding, integers of the shape of ``x``, uniform in the lowest 24 bits.

    Returns:
        Array of the shape and dtype of ``x``.

    Raises:
        TypeError: if ``x`` is not floating point, or ``random_bits`` are not integers.
        ValueError: for unknown formats or modes, or random bits that are missing, useless or of another shape.

    >>> quantize(jnp.array([0.75, 1.5, 3.0, 6.0]), "E7M0").tolist()
    [0.5, 2.0, 2.0, 8.0]
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"quantize takes floating-point arrays; got {x.dtype}")
    params = as_params(format, rounding, overflow)
    if random_bits is None:
        refuse_missing_random_bits(params)
    else:
        _check_random_bits(random_bits, x, params, named=None if isinstance(format, FormatParams) else rounding)
    if params.path == "identity":
        return x
    return _straight_through(x, None if scale is None else jnp.asarray(scale), params, random_bits)


def refuse_missing_random_bits(params: FormatParams) -> None:
    """Refuse what can be seen here; a traced rounding that turns out stochastic gives NaN (see ``_cast_integer``)."""
    if not isinstance(params.rounding, jax.core.Tracer) and np.any(np.asarray(params.rounding) == _STOCHASTIC):
        raise ValueError("rounding='stochastic' needs random_bits: integers of the shape of x")


def _check_random_bits(random_bits: jax.Array, x: jax.Array, params: FormatParams, named: Rounding | None) -> None:
    if params.path != "integer" or named not in (None, "stochastic"):
        raise ValueError(
            "random_bits would have no effect: they need rounding='stochastic', or params that may take it"
        )
    if not jnp.issubdtype(random_bits.dtype, jnp.integer):
        raise TypeError(f"random_bits are integers; got {random_bits.dtype}")
    if random_bits.shape != x.shape:
        raise ValueError(f"random_bits have shape {random_bits.shape}; expected that of x, {x.shape}")


@jax.custom_jvp
def _straight_through(
    x: jax.Array, scale: jax.Array | None, params: FormatParams, random_bits: jax.Array | None
) -> jax.Array:
    value = to_float32_odd(x) if x.dtype == jnp.float64 else x.astype(jnp.float32)
    if scale is None:
        return cast(value, params, random_bits).astype(x.dtype)
    scale = scale.astype(jnp.float32)
    return flush_subnormals(cast(divide_by_scale(value, scale), params, random_bits) * scale).astype(x.dtype)


@_straight_through.defjvp
def _straight_through_jvp(
    primals: tuple[jax.Array, jax.Array | None, FormatParams, jax.Array | None], tangents: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
    return _straight_through(*primals), tangents[0]


def cast(x: jax.Array, params: FormatParams, random_bits: jax.Array | None = None) -> jax.Array:
    """The bare cast of float32 to float32: no scale, no checks, no gradient rule. See :func:`quantize`."""
    if params.path == "identity":
        return x
    if params.path == "fast":
        return _cast_fast(x, params)
    return _cast_integer(x, params, random_bits)


def _cast_fast(x: jax.Array, params: FormatParams) -> jax.Array:
    """Round by adding a power of two and taking it away again: one float32 addition rounds to nearest even.

    The number added is the quantum's exponent raised by 23. It depends on the element, so that XLA, which would delete
    ``(x + c) - c`` for a constant c, keeps both operations; and it stays above the smallest quantum, so that the
    format's subnormals round in the same way.
    """
    bits = _bits(x)
    magnitude = bits & _MAGNITUDE
    bounded = jnp.minimum(_float(magnitude), 2 * params.max_value)
    lowest = (params.min_exponent + 127) << 23
    exponent = jnp.maximum(_bits(bounded) & _INF, lowest)
    # Without mantissa bits the parity of a code is that of its exponent. From an even one a tie must go down, which an
    # odd magic number does.
    even = lax.shift_right_logical(exponent ^ lowest, jnp.full_like(exponent, 23))
    odd_magic = even & jnp.where(params.mantissa_bits == 0, 1, 0)
    magic = _float((exponent + ((23 - params.mantissa_bits) << 23)) | odd_magic)
    rounded = (bounded + magic) - magic
    rounded = jnp.where(rounded > params.max_value, beyond_max(params), rounded)
    rounded = jnp.where(magnitude >= _INF, _of_nonfinite(magnitude, params), rounded)
    return _float(_bits(rounded) | (bits & _SIGN))


def _cast_integer(x: jax.Array, params: FormatParams, random_bits: jax.Array | None) -> jax.Array:
    """Round in integer arithmetic: any format up to bf16's range, any rounding, subnormals read from their bits."""
    bits = _bits(x)
    magnitude = bits & _MAGNITUDE
    stored = jnp.maximum(lax.shift_right_logical(magnitude, jnp.full_like(magnitude, 23)), 1)
    significand = (magnitude & (_IMPLICIT_ONE - 1)) | jnp.where(magnitude >= _IMPLICIT_ONE, _IMPLICIT_ONE, 0)
    # Of subnormals only those from 2^-127 on, which is their exponent, can round to a result that is not flushed.
    exponent = jnp.maximum(stored - 127 - (magnitude < _IMPLICIT_ONE).astype(jnp.int32), params.min_exponent)
    dropped = (23 - params.mantissa_bits) + exponent - (stored - 127)
    steps = _round_steps(significand, dropped, exponent - params.min_exponent, params, random_bits)
    # steps has at most 24 bits, so it is exact in float32; its exponent field then takes up the quantum's.
    scaled = _bits(steps.astype(jnp.float32)) + ((exponent - params.mantissa_bits) << 23)
    rounded = jnp.where((steps == 0) | (scaled < _IMPLICIT_ONE), 0, scaled)
    rounded = jnp.where(rounded > _bits(params.max_value), _bits(beyond_max(params)), rounded)
    rounded = jnp.where(magnitude >= _INF, _bits(_of_nonfinite(magnitude, params)), rounded)
    if random_bits is None:
        rounded = jnp.where(params.rounding == _STOCHASTIC, _NAN, rounded)
    return _float(rounded | (bits & _SIGN))


def _round_steps(
    significand: jax.Array, dropped: jax.Array, binade: jax.Array, params: FormatParams, random_bits: jax.Array | None
) -> jax.Array:
    """Round ``significand / 2^dropped`` to an integer by the mode in ``params``; ``binade`` counts from the lowest."""
    shift = jnp.minimum(dropped, 25)
    whole = lax.shift_right_logical(significand, shift)
    rest = significand - lax.shift_left(whole, shift)
    one = lax.shift_left(jnp.ones_like(shift), shift)
    odd = jnp.where(params.mantissa_bits == 0, whole + binade, whole) & 1
    mode = params.rounding
    up = jnp.where(mode == _NEAREST_EVEN, 2 * rest + odd > one, (mode == _NEAREST_AWAY) & (2 * rest >= one))
    if random_bits is not None:
        left, right = jnp.clip(STOCHASTIC_BITS - dropped, 0, 31), jnp.clip(dropped - STOCHASTIC_BITS, 0, 31)
        fraction = lax.shift_right_logical(lax.shift_left(rest, left), right)
        drawn = random_bits.astype(jnp.int32) & ((1 << STOCHASTIC_BITS) - 1)
        up = jnp.where(mode == _STOCHASTIC, fraction + drawn >= (1 << STOCHASTIC_BITS), up)
    return whole + up.astype(jnp.int32)


def beyond_max(params: FormatParams) -> jax.Array:
    """What a finite value beyond max becomes under the overflow policy: float32, of the shape of the params."""
    return jnp.where(params.overflow == _NATIVE, params.native_overflow, params.max_value)


def _of_nonfinite(magnitude: jax.Array, params: FormatParams) -> jax.Array:
    of_inf = jnp.where(params.overflow == _SATURATE_FINITE, jnp.float32(np.inf), beyond_max(params))
    return jnp.where(magnitude > _INF, jnp.float32(np.nan), of_inf)


def encode(
    x: jax.Array, format: str | Format, *, rounding: Rounding = "nearest_even", overflow: Overflow = "native"
) -> jax.Array:
    """The codes that ``x`` rounds to.

    NaN becomes the format's NaN, or 0 where it has none: count those with
    :func:`altgrad_jax.statistics.cast_counts`. An infinity that the format lacks becomes ±max.

    Args:
        x: floating-point array.
        format: a name or a :class:`~altgrad_core.formats.Format` of at most 16 bits.
        rounding: all but ``stochastic``.
        overflow: see :data:`altgrad_core.formats.Overflow`.

    Returns:
        uint8 (uint16 for formats of more than 8 bits) of the shape of ``x``; the code sits in the low bits.

    Raises:
        TypeError: if ``x`` is not floating point.
        ValueError: for unknown formats or modes, and formats of more than 16 bits.

    >>> encode(jnp.array([1.0, -1.0]), "E5M2").tolist()
    [60, 188]
    """
    resolved = _codable(format)
    on_grid = _bits(quantize(x, resolved, rounding=rounding, overflow=overflow).astype(jnp.float32))
    magnitude = on_grid & _MAGNITUDE
    stored = jnp.maximum(lax.shift_right_logical(magnitude, jnp.full_like(magnitude, 23)), 1)
    significand = (magnitude & (_IMPLICIT_ONE - 1)) | jnp.where(magnitude >= _IMPLICIT_ONE, _IMPLICIT_ONE, 0)
    exponent = jnp.maximum(stored - 127, resolved.min_exponent)
    shift = jnp.minimum((23 - resolved.mantissa_bits) + exponent - (stored - 127), 31)
    code = lax.shift_right_logical(significand, shift) + ((exponent - resolved.min_exponent) << resolved.mantissa_bits)
    code = jnp.where(magnitude == 0, 0, code)
    code = jnp.where(magnitude == _INF, resolved.to_bits(float("inf"), overflow="saturate_finite"), code)
    code = jnp.where(on_grid < 0, code | resolved.sign_mask, code)
    code = jnp.where(magnitude > _INF, resolved.to_bits(float("nan")), code)
    return code.astype(jnp.uint8 if resolved.bits <= 8 else jnp.uint16)


def decode(codes: jax.Array, format: str | Format) -> jax.Array:
    """The float32 values of codes; those below 2^-126 are zero.

    Args:
        codes: unsigned integers; bits above the format's width are ignored.
        format: a name or a :class:`~altgrad_core.formats.Format` of at most 16 bits.

    Raises:
        TypeError: if the codes are not unsigned integers.
        ValueError: for unknown formats and formats of more than 16 bits.

    >>> decode(jnp.array([60, 188], jnp.uint8), "E5M2").tolist()
    [1.0, -1.0]
    """
    codes = jnp.asarray(codes)
    if not jnp.issubdtype(codes.dtype, jnp.unsignedinteger):
        raise TypeError(f"codes are unsigned integers; got {codes.dtype}")
    resolved = _codable(format)
    book = resolved.code_book()
    values = np.where(np.abs(book) < 2.0**-126, np.copysign(0.0, book), book).astype(np.float32)
    return jnp.asarray(values)[codes.astype(jnp.int32) & (2 * resolved.sign_mask - 1)]


def _codable(format: str | Format) -> Format:
    if isinstance(format, FormatParams):
        raise TypeError("codes need a static format: a name or a Format; got FormatParams")
    resolved = parse(format)
    if resolved.bits > 16:
        raise ValueError(f"{resolved} has {resolved.bits} bits; codes are made for formats of at most 16")
    return resolved


def divide_by_scale(x: jax.Array, scale: jax.Array) -> jax.Array:
    """``x / scale`` in float32; a subnormal ``x``, which XLA's CPU backend reads as zero, counts at its value.

    Exact for powers of two within 2^-100 to 2^100, but for a quotient below 2^-126, which is zero, and one of a finite
    ``x`` beyond float32's maximum, which is that: finite values and infinities are told apart later.
    """
    magnitude = _bits(x) & _MAGNITUDE
    # A subnormal is its bits times 2^-149, a factor that is no normal number: half of it before, half after.
    from_bits = magnitude.astype(jnp.float32) * jnp.float32(2.0**-75) / scale * jnp.float32(2.0**-74)
    signed = _float(_bits(from_bits) | (_bits(x) & _SIGN))
    # A divisor of its own for each element: XLA turns division by one scalar into a product with its reciprocal.
    quotient = x / jnp.where(magnitude >= 0, scale, 1)
    bounded = jnp.where(magnitude < _INF, jnp.clip(quotient, -_FLOAT32_MAX, _FLOAT32_MAX), quotient)
    return jnp.where(magnitude < _IMPLICIT_ONE, signed, bounded)


def flush_subnormals(x: jax.Array) -> jax.Array:
    """Zero, with the sign kept, where float32 ``x`` is below 2^-126: what XLA's CPU backend does by itself."""
    bits = _bits(x)
    return _float(jnp.where((bits & _MAGNITUDE) < _IMPLICIT_ONE, bits & _SIGN, bits))


def to_float32_odd(x: jax.Array) -> jax.Array:
    """float64 to float32, rounded to odd: rounding the result again, to fewer bits, equals rounding ``x`` once."""
    nearest = x.astype(jnp.float32)
    bits = _bits(nearest)
    exact = nearest.astype(jnp.float64) == x
    too_far = jnp.abs(nearest.astype(jnp.float64)) > jnp.abs(x)
    odd = (bits - too_far.astype(jnp.int32)) | 1
    # A subnormal float32, which XLA's CPU backend would flush, is put together from its steps of 2^-149.
    steps = jnp.abs(x) * 2.0**149
    whole = jnp.minimum(steps, 2.0**23).astype(jnp.int32)
    subnormal = whole | (whole < steps).astype(jnp.int32) | (bits & _SIGN)
    return _float(jnp.where(steps < 2.0**23, subnormal, jnp.where(exact | jnp.isnan(x), bits, odd)))


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.int32)


def _float(bits: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(bits, jnp.float32)

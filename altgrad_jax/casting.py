"""Casts to the grid of any format, with the format as data: changing it compiles nothing.

The definition of a cast is :func:`altgrad_core.reference.round_to_format`; every function here agrees with it in every
bit. ``altgrad_torch/casting.py`` says the same thing in torch.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from altgrad_core.errors import InputError
from altgrad_core.formats import OVERFLOWS, ROUNDINGS, STOCHASTIC_BITS, Format, Overflow, Rounding
from altgrad_core.reference import check_width
from altgrad_core.scaling import check_given_scale
from altgrad_core.shapes import broadcasts_within
from altgrad_jax.addition import BY_ADDITION, Addition
from altgrad_jax.arithmetic import product, quotient
from altgrad_jax.params import FormatParams, as_params, beyond_max, edges

_SIGN = np.int32(-(2**31))
_MAGNITUDE = np.int32(0x7FFFFFFF)
_INF = np.int32(0x7F800000)
_NAN = np.int32(0x7FC00000)
_IMPLICIT_ONE = np.int32(1 << 23)
_FLOAT32_MAX = np.finfo(np.float32).max
_FLOAT64_INF = np.int64(0x7FF << 52)
_FAR = 600
"""No float64 beyond 2^±600, divided by whatever a float32 scale may be, is anywhere near a grid."""
_QUIET_NAN = {np.dtype(jnp.bfloat16): 0x7FC0, np.dtype(jnp.float16): 0x7E00}
_NEAREST_EVEN, _NEAREST_AWAY, _TOWARD_ZERO, _STOCHASTIC = range(len(ROUNDINGS))
_NATIVE, _SATURATE, _SATURATE_FINITE = range(len(OVERFLOWS))
_ADDEND_BITS = 30
"""What a rounding adds before the rest is cut off is counted in 2^-30 of a quantum."""
_HALF = np.int32(1 << (_ADDEND_BITS - 1))


def quantize(
    x: jax.Array,
    format: str | Format | FormatParams,
    *,
    scale: jax.typing.ArrayLike | None = None,
    rounding: Rounding = "nearest_even",
    overflow: Overflow = "native",
    random_bits: jax.Array | None = None,
    stochastic_bits: int = STOCHASTIC_BITS,
    saturation_mask: bool = False,
) -> jax.Array:
    """Round ``x`` to the values of a format: ``Q(x / scale) * scale``. The gradient passes straight through.

    NaN stays NaN, and -0 stays -0 where the format has it. Subnormal float32 inputs count at their value; a result
    below 2^-126 is zero. With a scale that is a power of two the scaling is exact, but for a quotient below 2^-126,
    which counts as zero. A format without a sign has neither zero nor subnormals: zero and negative values are NaN
    there, what is below its smallest value becomes that, 2^-127 included, and of a scale only the exponent counts.

    float64 is scaled in float64, where every quotient counts at its value, and so does what a scale makes of a result.
    To float32 it is rounded as to any format, but keeps subnormals and takes no notice of a scale; all that is no wider
    than float32 is returned as it is, infinities included, whatever the overflow policy.

    Args:
        x: float32, bfloat16, float16 or float64, any shape; its dtype is kept. float64 is rounded once, from its own
            value. A float16 result that float16 cannot hold is inf.
        format: a name, a :class:`~altgrad_core.formats.Format`, or :class:`FormatParams`, which may be traced.
        scale: the worth of one, positive, of a shape that broadcasts to that of ``x``; a float32, also of float64.
        rounding: see :data:`altgrad_core.formats.Rounding`; not beside ``FormatParams``, which carry their own.
        overflow: see :data:`altgrad_core.formats.Overflow`; likewise.
        random_bits: for stochastic rounding, integers of the shape of ``x``, uniform in the lowest bits; see
            :func:`altgrad_jax.hashing.hash_bits` and ``jax.random.bits``.
        stochastic_bits: how many of them count, 1 to 24. A magnitude goes up if the fraction of a quantum cut off, in
            so many bits, and the random number add up to one or more. No more than a random integer has.
        saturation_mask: whether the gradient is zero where ``x`` overflows, infinities included.

    Returns:
        Array of the shape and dtype of ``x``.

    Raises:
        TypeError: if ``x`` is not floating point, or ``random_bits`` are not integers.
        ValueError: for unknown formats or modes, a scale that is a number but no positive float32, or random bits that
            are missing, useless or of another shape.

    >>> quantize(jnp.array([0.75, 1.5, 3.0, 6.0]), "E7M0").tolist()
    [0.5, 2.0, 2.0, 8.0]
    """
    x = floating(x, "quantize")
    params = as_params(format, rounding, overflow, stochastic_bits)
    _refuse_stacked(params, x)
    random_bits = checked_random_bits(random_bits, x, params, None if isinstance(format, FormatParams) else rounding)
    scale = None if scale is None else checked_scale(scale, x)
    if params.path == "identity":
        if saturation_mask:
            raise InputError("saturation_mask=True would have no effect: no finite float32 value overflows float32")
        if x.dtype != jnp.float64:
            return x
        scale = None
    return _in_one_program(saturation_mask, x, scale, params, random_bits)


def _refuse_stacked(params: FormatParams, x: jax.Array) -> None:
    """Refuse params of several formats that are not mapped over, and would enlarge ``x``."""
    shape = params.max_value.shape
    if not broadcasts_within(shape, x.shape):
        raise InputError(
            f"params of shape {shape} for x of shape {x.shape}; expected those of one format, or jax.vmap over them"
        )


def floating(x: jax.Array, taker: str) -> jax.Array:
    """``x`` as an array, if its dtype is one that casts take.

    Raises:
        TypeError: if not; it names the taker.
    """
    x = jnp.asarray(x)
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64):
        expected = "expected float32, bfloat16, float16 or float64"
        raise TypeError(f"{taker} takes floating-point arrays; got {x.dtype}, {expected}")
    return x


def checked_scale(scale: jax.typing.ArrayLike, x: jax.Array) -> jax.Array:
    """A scale as an array of float32.

    Raises:
        InputError: if it would enlarge ``x``, or is a number that is no scale.
    """
    check_given_scale(scale)
    scale = jnp.asarray(scale, jnp.float32)
    if not broadcasts_within(scale.shape, x.shape):
        raise InputError(f"the scale has shape {scale.shape}; expected one that broadcasts to that of x, {x.shape}")
    return scale


def refuse_missing_random_bits(params: FormatParams) -> None:
    """Refuse what can be seen here; a traced rounding that turns out stochastic gives NaN (see ``_cast_integer``)."""
    if not isinstance(params.rounding, jax.core.Tracer) and np.any(np.asarray(params.rounding) == _STOCHASTIC):
        raise ValueError("rounding='stochastic' needs random_bits: integers of the shape of x")


def checked_random_bits(
    random_bits: jax.Array | None, x: jax.Array, params: FormatParams, named: Rounding | None
) -> jax.Array | None:
    """Random bits as an array, if they are what ``x`` needs to be rounded.

    Args:
        random_bits: as they were given.
        x: what is rounded.
        params: to what.
        named: the rounding, if the params were made for this cast; params that were given may take any.

    Raises:
        TypeError: for what are no integers.
        ValueError: if they are missing, useless, of another shape or of too few bits.
    """
    if random_bits is None:
        refuse_missing_random_bits(params)
        return None
    random_bits = jnp.asarray(random_bits)
    if params.path not in ("integer", "unsigned") or named not in (None, "stochastic"):
        raise ValueError(
            "random_bits would have no effect: they need rounding='stochastic', or params that may take it"
        )
    if not jnp.issubdtype(random_bits.dtype, jnp.integer):
        raise TypeError(f"random_bits are integers; got {random_bits.dtype}")
    if random_bits.shape != x.shape:
        raise ValueError(f"random_bits have shape {random_bits.shape}; expected that of x, {x.shape}")
    if not isinstance(params.stochastic_bits, jax.core.Tracer):
        used = int(np.max(np.asarray(params.stochastic_bits)))
        check_width(used, str(random_bits.dtype), jnp.iinfo(random_bits.dtype).bits)
    return random_bits


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _straight_through(
    saturation_mask: bool,
    x: jax.Array,
    scale: jax.Array | None,
    params: FormatParams,
    random_bits: jax.Array | None,
) -> jax.Array:
    scale, params = _scaling_of(x, scale, params)
    on_grid = _on_grid(x, scale, params, random_bits)
    return _to_dtype(on_grid, x.dtype) if scale is None else scaled_up(on_grid, scale, x.dtype)


def _scaling_of(x: jax.Array, scale: jax.Array | None, params: FormatParams) -> tuple[jax.Array | None, FormatParams]:
    """By what ``x`` is divided, and to what it is then rounded.

    To unsigned formats the grid is moved instead, for all but float64: float32 may not hold the quotients.
    """
    if scale is None or params.path != "unsigned":
        return scale, params
    if x.dtype == jnp.float64:
        return _power_of_two_below(scale), params
    return None, params.scaled(scale)


def _power_of_two_below(scale: jax.Array) -> jax.Array:
    """The scale, or the next power of two below; in integers, because it may be subnormal."""
    magnitude = _bits(scale) & _MAGNITUDE
    highest_bit = lax.shift_right_logical(jnp.full_like(magnitude, _SIGN), lax.clz(magnitude))
    return _float(jnp.where(magnitude < _IMPLICIT_ONE, highest_bit, magnitude & _INF))


def _on_grid(x: jax.Array, scale: jax.Array | None, params: FormatParams, random_bits: jax.Array | None) -> jax.Array:
    """``x / scale`` rounded, as float32."""
    if params.path == "identity":
        return to_float32_grid(x, params)
    if x.dtype == jnp.float64:
        return cast_float64(x if scale is None else scaled_down(x, scale), params, random_bits)
    return cast(widened(x) if scale is None else scaled_down(x, scale), params, random_bits)


def scaled_down(x: jax.Array, scale: jax.Array) -> jax.Array:
    """``x / scale`` as it is rounded to a grid: float64 in float64, all else in float32. See :func:`quantize`."""
    return _divide_float64_by_scale(x, scale) if x.dtype == jnp.float64 else divide_by_scale(widened(x), scale)


def scaled_up(on_grid: jax.Array, scale: jax.Array, dtype: np.dtype) -> jax.Array:
    """``on_grid * scale`` of float32 values, computed in float64 for that dtype and in float32 for all others."""
    if dtype == jnp.float64:
        return _to_float64(on_grid) * _to_float64(scale)
    return _to_dtype(jnp.where(jnp.isnan(on_grid), on_grid, product(on_grid, scale)), dtype)


def _to_dtype(result: jax.Array, dtype: np.dtype) -> jax.Array:
    """A float32 result in the dtype that it is asked for. NaN, of which a GPU makes another, is canonical again."""
    if dtype == jnp.float32:
        return result
    if dtype == jnp.float64:
        return _to_float64(result)
    quiet = _QUIET_NAN[dtype]
    signed = (_bits(result) >> 16).astype(jnp.int16) & np.int16(-(2**15)) | np.int16(quiet)
    halved = lax.bitcast_convert_type(result.astype(dtype), jnp.int16)
    return lax.bitcast_convert_type(jnp.where(jnp.isnan(result), signed, halved), dtype)


def to_float32_grid(x: jax.Array, params: FormatParams) -> jax.Array:
    """float64 rounded to float32, subnormals in their steps; what overflows by the policy."""
    steps = jnp.round(jnp.abs(x) * 2.0**149)
    subnormal = jnp.minimum(steps, 2.0**23).astype(jnp.int32) | (_bits(x.astype(jnp.float32)) & _SIGN)
    nearest = jnp.where(steps < 2.0**23, _float(subnormal), x.astype(jnp.float32))
    saturated = jnp.where((params.overflow != _NATIVE) & jnp.isfinite(x), _FLOAT32_MAX, jnp.inf).astype(jnp.float32)
    saturated = jnp.where(params.overflow == _SATURATE, jnp.float32(_FLOAT32_MAX), saturated)
    return jnp.where(jnp.isinf(nearest), jnp.copysign(saturated, nearest), nearest)


def _to_float64(x: jax.Array) -> jax.Array:
    """float32 as float64, subnormals at their value, which XLA's CPU backend would read as zero."""
    bits = _bits(x)
    magnitude = bits & _MAGNITUDE
    subnormal = jnp.copysign(magnitude.astype(jnp.float64) * 2.0**-149, jnp.where(bits < 0, -1.0, 1.0))
    return jnp.where(magnitude < _IMPLICIT_ONE, subnormal, x.astype(jnp.float64))


@_straight_through.defjvp
def _straight_through_jvp(
    saturation_mask: bool,
    primals: tuple[jax.Array, jax.Array | None, FormatParams, jax.Array | None],
    tangents: tuple[jax.Array, ...],
) -> tuple[jax.Array, jax.Array]:
    result = _straight_through(saturation_mask, *primals)
    if not saturation_mask:
        return result, tangents[0]
    x, scale, params, random_bits = primals
    return result, jnp.where(_overflows(x, scale, params, random_bits), 0, tangents[0])


# Outside of jit, operation by operation would be thirty programs to compile and thirty passes over x.
_in_one_program = jax.jit(_straight_through, static_argnums=0, inline=True)


def _overflows(x: jax.Array, scale: jax.Array | None, params: FormatParams, random_bits: jax.Array | None) -> jax.Array:
    """Whether each element rounds beyond max, by whatever rounding: where a cast that makes inf of that makes one."""
    inf = jnp.full_like(params.native_overflow, _INF)
    marking = replace(params, overflow=jnp.full_like(params.overflow, _NATIVE), native_overflow=inf)
    scale, marking = _scaling_of(x, scale, marking)
    # Before the scale is multiplied in, which may make an infinity of what the format holds.
    return jnp.isinf(_on_grid(x, scale, marking, random_bits))


def widened(x: jax.Array) -> jax.Array:
    """Half precision as float32, which holds it as it is. NaN keeps its sign, which a GPU takes from float16's."""
    single = x.astype(jnp.float32)
    if x.dtype != jnp.float16:
        return single
    signs = lax.bitcast_convert_type(x, jnp.int16).astype(jnp.int32) & _SIGN
    return _float((_bits(single) & _MAGNITUDE) | signs)


def to_float32(x: jax.Array, taker: str) -> jax.Array:
    """``x`` as float32 that rounds on as ``x`` itself would: float64 is rounded to odd, the others are exact.

    Finite float64 beyond float32 counts as its maximum.

    Raises:
        TypeError: if ``x`` is not floating point; it names the taker.
    """
    x = floating(x, taker)
    return widened(x) if x.dtype != jnp.float64 else within_float32(float64_to_odd(x), x)


def within_float32(single: jax.Array, x: jax.Array) -> jax.Array:
    """float32's maximum where ``single`` is infinite and ``x`` is not."""
    return jnp.where(jnp.isinf(single) & jnp.isfinite(x), jnp.copysign(jnp.float32(_FLOAT32_MAX), single), single)


def cast(x: jax.Array, params: FormatParams | Addition, random_bits: jax.Array | None = None) -> jax.Array:
    """The bare cast of float32 to float32: no scale, no checks, no gradient rule. See :func:`quantize`.

    Of formats that are rounded to by addition, what that needs may be at hand: see :class:`Addition`.
    """
    if isinstance(params, Addition):
        return params.cast(x)
    if params.path == "identity":
        return x
    if params.path in BY_ADDITION:
        return Addition.of(params, edges(params)).cast(x)
    if params.path == "unsigned":
        return _cast_unsigned(x, params, random_bits)
    return _cast_integer(x, params, random_bits)


def _cast_integer(x: jax.Array, params: FormatParams, random_bits: jax.Array | None) -> jax.Array:
    """Round in integer arithmetic: any signed format, any rounding, subnormals read from their bits."""
    magnitude = _bits(x) & _MAGNITUDE
    field = magnitude & _INF
    stored = jnp.maximum(field, _IMPLICIT_ONE)
    significand = magnitude - stored + _IMPLICIT_ONE
    # Of subnormals only those from 2^-127 on, which is their exponent, can round to a result that is not flushed.
    # A grid that is scaled may begin beyond float32, by so many binades.
    lowest = params.min_exponent + 127
    beyond = jnp.maximum(lowest - 255, 0)
    exponent = jnp.maximum(field, jnp.clip(lowest, 0, 255) << 23)
    # At least 0: the first may be -1, for 2^-127 on, and the second is at least 1.
    dropped = ((exponent - stored) >> 23) + (23 - params.mantissa_bits + beyond)
    # Of the binade's number, which counts from the lowest.
    without_mantissa = params.mantissa_bits == 0
    count = jnp.broadcast_to(jnp.where(without_mantissa, np.int32(23), np.int32(31)), exponent.shape)
    parity = lax.shift_right_logical(exponent, count) ^ jnp.where(without_mantissa, lowest - beyond, 0)
    steps = _round_steps(significand, dropped, parity, params, random_bits)
    # steps has at most 24 bits, so it is exact in float32; its exponent field then takes up the quantum's.
    # Zero has none: what is added to its bits is all that is left.
    quantum = exponent - ((params.mantissa_bits + 127 - beyond) << 23)
    scaled = _bits(steps.astype(jnp.float32)) + quantum
    rounded = jnp.where(scaled > jnp.maximum(quantum, _IMPLICIT_ONE - 1), scaled, 0)
    return _without_random_bits_nan(_finish_integer(rounded, _bits(x), params), params, random_bits)


def _finish_integer(rounded: jax.Array, bits: jax.Array, params: FormatParams) -> jax.Array:
    """From bits of magnitudes, rounded without a bound, to results: what overflows, infinities, NaN, signs.

    ``bits`` are of float32 of the same kind.
    """
    magnitude = bits & _MAGNITUDE
    rounded = jnp.where(rounded > _bits(params.max_value), _bits(beyond_max(params)), rounded)
    result = jnp.where(magnitude >= _INF, _bits(_of_nonfinite(magnitude, params)), rounded)
    # Told by a difference's sign: a mask is cheap where a loop is split by it, for which this one is too long.
    signs = bits & ~(result - jnp.where(params.negative_zero, 0, 1)) & _SIGN
    return _float(result | signs)


def _cast_unsigned(x: jax.Array, params: FormatParams, random_bits: jax.Array | None) -> jax.Array:
    """Round to powers of two without zero: in the exponent's bits, the one below 2^-126 included."""
    bits = _bits(x)
    magnitude = bits & _MAGNITUDE
    # A subnormal at its own exponent, so that all magnitudes are exponent and 23 bits of fraction.
    zeros = jnp.where(magnitude < _IMPLICIT_ONE, lax.clz(magnitude) - 8, 0)
    exponent = jnp.where(zeros > 0, 1 - zeros, magnitude >> 23) - 127
    significand = lax.shift_left(magnitude, zeros) & (_IMPLICIT_ONE - 1) | _IMPLICIT_ONE
    smallest = exponent < params.min_exponent
    exponent = jnp.maximum(exponent, params.min_exponent)
    significand = jnp.where(smallest, _IMPLICIT_ONE, significand)
    dropped = jnp.full_like(exponent, 23)
    # A code is its binade's number here, where signed formats have one more, for zero: the significand is worth one.
    steps = _round_steps(significand, dropped, exponent - params.min_exponent + 1, params, random_bits)
    return _without_random_bits_nan(_finish_unsigned(exponent + steps - 1, bits, params), params, random_bits)


def _finish_unsigned(exponent: jax.Array, bits: jax.Array, params: FormatParams) -> jax.Array:
    """As :func:`_finish_integer`, of powers of two by their exponents; zero and negative values are NaN."""
    magnitude = bits & _MAGNITUDE
    below = lax.shift_left(jnp.ones_like(exponent), jnp.clip(exponent + 149, 0, 31))
    rounded = jnp.where(exponent < -126, below, (exponent + 127) << 23)
    maximum = (_bits(params.max_value) >> 23) - 127
    rounded = jnp.where(exponent > maximum, _bits(beyond_max(params)), rounded)
    rounded = jnp.where(magnitude >= _INF, _bits(_of_nonfinite(magnitude, params)), rounded)
    return _float(jnp.where(bits <= 0, _NAN, rounded))


def cast_float64(x: jax.Array, params: FormatParams, random_bits: jax.Array | None = None) -> jax.Array:
    """The bare cast of float64 to float32, to any grid but float32 itself; see :func:`cast`.

    From its own bits: of float32, even if it is rounded to odd, too few are left where a quantum is within two of
    float32's, and where fractions have 24 bits that a random number may tip.
    """
    bits = lax.bitcast_convert_type(x, jnp.int64)
    magnitude = bits & np.int64(2**63 - 1)
    steps, exponent = _float64_steps(magnitude, params, random_bits)
    # To all that follows a value is zero, finite, infinite or NaN, and has a sign: said in the bits of a float32.
    finite = jnp.minimum(magnitude, np.int64(1))
    kind = jnp.where(magnitude < _FLOAT64_INF, finite, np.int64(_INF) + (magnitude > _FLOAT64_INF).astype(jnp.int64))
    kind = (kind | (bits >> 63 << 31)).astype(jnp.int32)
    if params.path == "unsigned":
        return _without_random_bits_nan(_finish_unsigned(exponent + steps - 1, kind, params), params, random_bits)
    # steps has at most 24 bits, so it is exact in float32; its exponent field then takes up the quantum's.
    quantum, whole = exponent - params.mantissa_bits, _bits(steps.astype(jnp.float32))
    field = (whole >> 23) + quantum
    rounded = jnp.where(field > 254, _INF, jnp.where((field < 1) | (steps == 0), 0, whole + (quantum << 23)))
    return _without_random_bits_nan(_finish_integer(rounded, kind, params), params, random_bits)


def _float64_steps(
    magnitude: jax.Array, params: FormatParams, random_bits: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """The quanta that magnitudes, as bits of float64, round to, and the exponents of their binades: int32."""
    stored = jnp.maximum(magnitude >> 52, np.int64(1))
    significand = magnitude - ((stored - 1) << 52)
    unbiased = (stored - 1023).astype(jnp.int32)
    exponent = jnp.maximum(unbiased, params.min_exponent)
    codes_below = exponent - params.min_exponent
    if params.path == "unsigned":
        # Without a code for zero every code is one less. What is below the smallest value becomes that.
        significand = jnp.where(unbiased < exponent, np.int64(1 << 52), significand)
        dropped, parity = jnp.full_like(exponent, 52), codes_below + 1
    else:
        dropped = exponent - unbiased + (52 - params.mantissa_bits)
        parity = jnp.where(params.mantissa_bits == 0, codes_below, 0)
    # In 2^-30 of a quantum and rounded to odd: enough for ties, and for all that can be drawn.
    unseen = jnp.minimum(dropped - _ADDEND_BITS, 62).astype(jnp.int64)
    kept = significand >> unseen
    kept = kept | ((kept << unseen) != significand).astype(jnp.int64)
    # int32 has room for the fraction and for the last of the whole quanta, by which ties are broken.
    whole, low = (kept >> _ADDEND_BITS).astype(jnp.int32), (kept & np.int64(2**31 - 1)).astype(jnp.int32)
    rounded = _round_steps(low, jnp.full_like(low, _ADDEND_BITS), parity, params, random_bits)
    return (whole & -2) + rounded, exponent


def _without_random_bits_nan(result: jax.Array, params: FormatParams, random_bits: jax.Array | None) -> jax.Array:
    """NaN where the rounding turned out to be stochastic and there are no random bits to round by."""
    if random_bits is not None:
        return result
    return jnp.where(params.rounding == _STOCHASTIC, jnp.float32(np.nan), result)


def _round_steps(
    significand: jax.Array, dropped: jax.Array, parity: jax.Array, params: FormatParams, random_bits: jax.Array | None
) -> jax.Array:
    """Round ``significand / 2^dropped`` to an integer by the mode in ``params``.

    Every mode adds something and cuts off what is left: half of a quantum, nothing, or what was drawn.

    Args:
        significand: int32, at most 24 bits.
        dropped: int32, at least 0.
        parity: int32, whose lowest bit tells whether even integers have odd codes.
        params: the format.
        random_bits: for stochastic rounding.
    """
    # 30 bits hold the most that can be drawn, and what lies further down cannot tip the sum.
    shift = _bounded(dropped, _ADDEND_BITS)
    significand = lax.shift_right_logical(significand, _bounded(dropped - shift, 31))
    mode = params.rounding
    addend = jnp.where(mode == _NEAREST_EVEN, _HALF - 1, jnp.where(mode == _NEAREST_AWAY, _HALF, np.int32(0)))
    if random_bits is not None:
        addend = addend | _drawn(random_bits, params)
    # A tie with an odd code goes up.
    odd = (lax.shift_right_logical(significand, shift) ^ parity) & one_if_zero(mode - _NEAREST_EVEN)
    addend = lax.shift_right_logical(jnp.broadcast_to(addend, shift.shape), _ADDEND_BITS - shift)
    return lax.shift_right_logical(significand + odd + addend, shift)


def _bounded(count: jax.Array, limit: int) -> jax.Array:
    """A count of at least 0, at most so much: as unsigned, from which XLA sees that a shift by it needs no guard."""
    unsigned = lax.bitcast_convert_type(count, jnp.uint32)
    return lax.bitcast_convert_type(jnp.minimum(unsigned, np.uint32(limit)), jnp.int32)


def _drawn(random_bits: jax.Array, params: FormatParams) -> jax.Array:
    """The random bits that count, at the top of the addend; 0 unless the rounding is stochastic.

    By a mask: a choice between this and other addends becomes a jump within the loop, which costs more.
    """
    count = params.stochastic_bits
    mask = jnp.where(params.rounding == _STOCHASTIC, (1 << count) - 1, 0)
    return (random_bits.astype(jnp.int32) & mask) << ((_ADDEND_BITS - count) & 31)


def one_if_zero(x: jax.Array) -> jax.Array:
    """1 for 0 and 0 for what is positive, by arithmetic: a comparison becomes a jump within the loop."""
    return lax.shift_right_logical(x - 1, jnp.full_like(x, 31))


def _of_nonfinite(magnitude: jax.Array, params: FormatParams) -> jax.Array:
    of_inf = jnp.where(params.overflow == _SATURATE_FINITE, jnp.float32(np.inf), beyond_max(params))
    return jnp.where(magnitude > _INF, jnp.float32(np.nan), of_inf)


def divide_by_scale(x: jax.Array, scale: jax.Array) -> jax.Array:
    """``x / scale`` in float32; a subnormal ``x``, which XLA's CPU backend reads as zero, counts at its value.

    Exact for powers of two within 2^-100 to 2^100, but for a quotient below 2^-126, which is zero, and one of a finite
    ``x`` beyond float32's maximum, which is that: finite values and infinities are told apart later.
    """
    magnitude = _bits(x) & _MAGNITUDE
    # A subnormal is its bits times 2^-149, a factor that is no normal number: half of it before, half after.
    raised = quotient(magnitude.astype(jnp.float32) * jnp.float32(2.0**-75), scale)
    from_bits = jnp.where(raised >= 2.0**-52, _bits(raised * jnp.float32(2.0**-74)), 0)
    signed = _float(from_bits | (_bits(x) & _SIGN))
    bounded = jnp.clip(quotient(x, scale), -_FLOAT32_MAX, _FLOAT32_MAX)
    return jnp.where(magnitude < _IMPLICIT_ONE, signed, jnp.where(magnitude < _INF, bounded, x))


def _divide_float64_by_scale(x: jax.Array, scale: jax.Array) -> jax.Array:
    """``x / scale`` in float64: infinite only where ``x`` is, zero only where ``x`` is."""
    bits = lax.bitcast_convert_type(x, jnp.int64)
    magnitude = bits & np.int64(2**63 - 1)
    # In integers, because XLA's CPU backend flushes the smallest.
    near = jnp.clip(magnitude, np.int64((1023 - _FAR) << 52), np.int64((1023 + _FAR) << 52))
    magnitude = jnp.where((magnitude == 0) | (magnitude >= _FLOAT64_INF), magnitude, near)
    # A divisor of its own for each element: division by one that is shared XLA makes a product with its reciprocal.
    divisor = jnp.where(magnitude >= 0, _to_float64(scale), 1.0)
    return lax.bitcast_convert_type(magnitude | (bits & np.int64(-(2**63))), jnp.float64) / divisor


def float64_to_odd(x: jax.Array) -> jax.Array:
    """float64 to float32, rounded to odd: rounding the result again, to fewer bits, equals rounding ``x`` once.

    From 2^128 on, beyond whatever float32 could round to, it is an infinity. In integers, because XLA may take a
    conversion to float32 and back for none, and its CPU backend flushes what is smallest.
    """
    bits = lax.bitcast_convert_type(x, jnp.int64)
    magnitude = bits & np.int64(2**63 - 1)
    field = magnitude >> 52
    normal = magnitude - np.int64((1023 - 127) << 52)
    subnormal = (magnitude & np.int64(2**52 - 1)) | np.int64(1 << 52)
    # 29 bits go; of what float32 has below 2^-126, in steps of 2^-149, one more for each binade further down.
    dropped = jnp.clip(926 - field, 29, 62)
    source = jnp.where(field > 1023 - 127, normal, subnormal)
    kept = source >> dropped
    odd = kept | ((kept << dropped) != source).astype(jnp.int64)
    odd = jnp.where(magnitude == 0, 0, jnp.where(field >= 1023 + 128, np.int64(_INF), odd))
    odd = jnp.where(magnitude > _FLOAT64_INF, np.int64(_NAN), odd)
    return _float((odd | (bits >> 63 << 31)).astype(jnp.int32))


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.int32)


def _float(bits: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(bits, jnp.float32)

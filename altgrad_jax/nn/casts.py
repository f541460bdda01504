"""What a layer does with an operand: it casts it as a :class:`~altgrad_jax.nn.cast_state.CastState` says, and records.

The state is only read while a model computes; what is seen meanwhile goes to a :class:`~altgrad_jax.nn.record.Record`,
if there is one, from which the next states are made.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.export import is_symbolic_dim

from altgrad_core.scaling import PerTensor
from altgrad_jax.axes import is_whole
from altgrad_jax.casting import cast, divide_by_scale, quantize
from altgrad_jax.granularity import amaxes, spread
from altgrad_jax.hashing import hash_bits
from altgrad_jax.nn.border import as_one_value
from altgrad_jax.nn.cast_state import CastState, scale_of
from altgrad_jax.nn.record import Record, Sight, check_recording, current_record
from altgrad_jax.params import edges
from altgrad_jax.scaling import Current, amax
from altgrad_jax.statistics import TallyParts, tally_parts

_FLAT_UP_TO = 2**16
"""Elements of tensors that are cast flat, so that all of a size share what is traced and compiled, where there is one
device: what is split over several would be gathered. Larger ones would take longer: what XLA does to their layout on
the way to a product it would do apart from the cast."""


def cast_operand(x: jax.Array, state: CastState | None) -> jax.Array:
    """An operand as its layer sees it: cast, and recorded. The gradient passes straight through.

    Args:
        x: float32, bfloat16 or float16; its dtype is kept.
        state: how to cast; None for not at all.
    """
    if state is None:
        return x
    state.check()
    return _cast_operand(x, state, _record_for(state))


def cast_gradient(x: jax.Array, state: CastState | None) -> jax.Array:
    """``x`` itself, whose gradient is cast, and recorded, on its way back."""
    if state is None:
        return x
    state.check()
    return _cast_gradient(x, state, _record_for(state))


def _record_for(state: CastState) -> Record | None:
    return current_record(state.number, state.total, state.shape) if state.total else None


@jax.custom_vjp
def _cast_operand(x: jax.Array, state: CastState, record: Record | None) -> jax.Array:
    return _cast_and_record(x, state, record)


def _cast_operand_forward(
    x: jax.Array, state: CastState, record: Record | None
) -> tuple[jax.Array, tuple[jax.Array | None, Sight | None, Record | None]]:
    check_recording(record)
    quantized, sight = _quantized(x, state, recorded=record is not None)
    return quantized, (state.place, sight, record)


def _cast_operand_backward(
    residuals: tuple[jax.Array | None, Sight | None, Record | None], gradient: jax.Array
) -> tuple[jax.Array, None, None]:
    # Here and not on the way forward, which `jax.checkpoint` takes twice: each cast counts once.
    place, sight, record = residuals
    check_recording(record)
    if record is not None and sight is not None:
        record.write(place, gradient.size, sight)
    return gradient, None, None


_cast_operand.defvjp(_cast_operand_forward, _cast_operand_backward)


@jax.custom_vjp
def _cast_gradient(x: jax.Array, state: CastState, record: Record | None) -> jax.Array:
    return x


def _cast_gradient_forward(
    x: jax.Array, state: CastState, record: Record | None
) -> tuple[jax.Array, tuple[CastState, Record | None]]:
    return x, (state, record)


def _cast_gradient_backward(
    residuals: tuple[CastState, Record | None], gradient: jax.Array
) -> tuple[jax.Array, None, None]:
    check_recording(residuals[1])
    return _cast_and_record(gradient, *residuals), None, None


_cast_gradient.defvjp(_cast_gradient_forward, _cast_gradient_backward)


def _cast_and_record(x: jax.Array, state: CastState, record: Record | None) -> jax.Array:
    quantized, sight = _quantized(x, state, recorded=record is not None)
    if record is not None and sight is not None:
        record.write(state.place, x.size, sight)
    return quantized


def _quantized(x: jax.Array, state: CastState, *, recorded: bool) -> tuple[jax.Array, Sight | None]:
    is_of_any_size = any(map(is_symbolic_dim, x.shape))  # in what is exported, whose size compares with nothing
    is_small = not is_of_any_size and x.size <= _FLAT_UP_TO
    is_flat = is_small and is_whole(x) and isinstance(state.granularity, PerTensor)
    given = x.reshape(-1) if is_flat else x
    quantized, sight = as_one_value(_quantize_and_see, given, state.anonymous(), recorded=recorded)
    return quantized.reshape(x.shape) if is_flat else quantized, sight


def _quantize_and_see(x: jax.Array, state: CastState, *, recorded: bool) -> tuple[jax.Array, Sight | None]:
    wide = x.astype(jnp.float32)
    bits = hash_bits(x.shape, state.seed, state.step) if state.path == "integer" else None
    if state.has_grid:
        grid, limits = state.grid
        sight = Sight(_together(tally_parts(wide, limits)), None) if recorded else None
        return cast(wide, grid, bits).astype(x.dtype), sight
    params = state.params
    own = (
        amaxes(x, state.granularity)
        if isinstance(state.scaling, Current) or (recorded and state.writes_amaxes)
        else None
    )
    scale = scale_of(state, own)
    if scale.ndim == 0 and state.scaling.power_of_two:
        grid = params.scaled(scale)
        limits = edges(grid)
        sight = Sight(_together(tally_parts(wide, limits)), None) if recorded else None
        return cast(wide, grid, bits).astype(x.dtype), sight
    scale = spread(scale, x.shape, state.granularity)
    quantized = quantize(x, params, scale=scale, random_bits=bits)
    if not recorded:
        return quantized, None
    largest = lax.bitcast_convert_type(amax(x), jnp.int32)
    seen = tally_parts(divide_by_scale(wide, scale), edges(params))._replace(amax=largest)
    apart = own.reshape(state.amax_shape) if own is not None and state.writes_amaxes else None
    return quantized, Sight(_together(seen), apart)


def _together(seen: TallyParts) -> jax.Array:
    """In one array, in a kernel that casts of all sizes share: all that is seen in a step is joined once more."""
    return lax.concatenate([lax.reshape(each, (1,)) for each in seen], 0)

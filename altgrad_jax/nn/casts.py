"""The three casts of a layer, each with its format, scale, rounding and history as a pytree of data.

A :class:`CastState` is all that a cast carries from step to step. It is only read while a model computes; what is seen
meanwhile goes to a :class:`~altgrad_jax.nn.seen.Record`, if there is one, from which the next states are made.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from altgrad_core.errors import InputError
from altgrad_core.formats import Format
from altgrad_core.rules import DEFAULT_WINDOW, CastSpec, Operand, check_block_scaling
from altgrad_core.scaling import Granularity, PerBlock, PerTensor
from altgrad_jax.casting import cast, divide_by_scale, quantize, refuse_missing_random_bits
from altgrad_jax.granularity import amaxes, spread
from altgrad_jax.hashing import hash_bits
from altgrad_jax.nn.border import as_one_value
from altgrad_jax.nn.record import Record, Sight, check_recording, current_record
from altgrad_jax.params import FormatParams, edges
from altgrad_jax.scaling import Current, Delayed, Scaling, Static, amax, push_amax
from altgrad_jax.statistics import tally

_GOLDEN = 0x9E3779B9
"""2^32 over the golden ratio, odd: multiples of it are far apart, so neighbouring casts start from unlike seeds."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CastState:
    """How one operand of a layer is cast, and what was seen of it: a pytree, to be carried like any other state.

    In a model whose layers are stacked, to be scanned over, every array has the leading axes of the stack.

    Attributes:
        params: format, rounding and overflow policy.
        scaling: where scales come from.
        history: float32 ``(window, *amax)``, the amaxes of earlier steps; None unless scales are delayed.
        row: int32, where in a record the cast writes.
        seed: uint32, of stochastic rounding.
        step: uint32, recordings so far: another step, other random bits.
        granularity: which elements share a scale (static).
        operand: what is cast (static).
        rows: how many casts the model has in all (static).
    """

    params: FormatParams
    scaling: Scaling
    history: jax.Array | None
    row: jax.Array
    seed: jax.Array
    step: jax.Array
    granularity: Granularity = field(metadata={"static": True})
    operand: Operand = field(metadata={"static": True})
    rows: int = field(metadata={"static": True})

    @classmethod
    def of(
        cls,
        spec: CastSpec,
        operand: Operand,
        granularity: Granularity,
        amax_shape: tuple[int, ...] = (),
        *,
        row: int = 0,
        rows: int = 1,
        seed: int = 0,
    ) -> CastState:
        """The state before the first step.

        Args:
            spec: what a rule says.
            operand: what is cast.
            granularity: that of the spec, with the axes of this operand.
            amax_shape: shape of what shares no scale, such as ``()`` or ``(features,)``.
            row: where in a record the cast writes.
            rows: how many casts there are.
            seed: of stochastic rounding, of the whole model.

        Raises:
            InputError: for scaling that is none, or that cannot serve the granularity; for a format without a sign.
        """
        _check_signed(spec.format)
        scaling = scaling_of(spec)
        return cls(
            params=FormatParams.from_format(spec.format, rounding=spec.rounding, overflow=spec.overflow),
            scaling=scaling,
            history=scaling.init(amax_shape),
            row=jnp.int32(row),
            seed=jnp.asarray(_seeds(seed, row)),
            step=jnp.uint32(0),
            granularity=granularity,
            operand=operand,
            rows=rows,
        )

    def numbered(self, row: np.ndarray, *, rows: int, seed: int) -> CastState:
        """The state in other rows.

        Args:
            row: integers, of the shape of the stack that the state is of.
            rows: how many casts there are.
            seed: of stochastic rounding, of the whole model.
        """
        return replace(self, row=jnp.asarray(row, jnp.int32), seed=jnp.asarray(_seeds(seed, row)), rows=rows)

    @classmethod
    def without_history(
        cls, params: FormatParams, scaling: Static | Current, operand: Operand, granularity: Granularity
    ) -> CastState:
        """The state of a cast that nothing is carried for from step to step.

        Raises:
            InputError: for delayed scales and stochastic rounding, which need a history and a step.
            ValueError: for params that round stochastically.
        """
        if not isinstance(scaling, Static | Current):
            raise InputError(f"scaling={scaling!r} needs a state; expected Static or Current, or quantize_model")
        refuse_missing_random_bits(params)
        zero = jnp.uint32(0)
        return cls(params, scaling, None, jnp.int32(0), zero, zero, granularity, operand, rows=0)

    @property
    def amax_shape(self) -> tuple[int, ...]:
        """The shape of what has a scale of its own, such as ``()``; of one layer, where layers are stacked."""
        return () if self.history is None else self.history.shape[self.row.ndim + 1 :]

    @property
    def writes_amaxes(self) -> bool:
        """Whether there is more to record of an amax than the largest of all."""
        return self.history is not None and not isinstance(self.granularity, PerTensor)

    def updated(self, seen: jax.Array, largest: jax.Array) -> CastState:
        """The state after a step.

        Args:
            seen: bool scalar, whether the cast took place.
            largest: float32, the amaxes, of the shape of a row of the history.
        """
        history = self.history
        if history is not None:
            history = jnp.where(seen, push_amax(history, largest.reshape(history.shape[1:])), history)
        return replace(self, history=history, step=self.step + 1)


def cast_operand(x: jax.Array, state: CastState | None) -> jax.Array:
    """An operand as its layer sees it: cast, and recorded. The gradient passes straight through.

    Args:
        x: float32, bfloat16 or float16; its dtype is kept.
        state: how to cast; None for not at all.
    """
    return x if state is None else _cast_operand(x, state, _record_for(state))


def cast_gradient(x: jax.Array, state: CastState | None) -> jax.Array:
    """``x`` itself, whose gradient is cast, and recorded, on its way back."""
    return x if state is None else _cast_gradient(x, state, _record_for(state))


def _record_for(state: CastState) -> Record | None:
    return current_record(state.rows) if state.rows else None


@jax.custom_vjp
def _cast_operand(x: jax.Array, state: CastState, record: Record | None) -> jax.Array:
    return _cast_and_record(x, state, record)


def _cast_operand_forward(
    x: jax.Array, state: CastState, record: Record | None
) -> tuple[jax.Array, tuple[jax.Array, Sight | None, Record | None]]:
    check_recording(record)
    quantized, sight = _quantized(x, state, recorded=record is not None)
    return quantized, (state.row, sight, record)


def _cast_operand_backward(
    residuals: tuple[jax.Array, Sight | None, Record | None], gradient: jax.Array
) -> tuple[jax.Array, None, None]:
    # Here and not on the way forward, which `jax.checkpoint` takes twice: each cast counts once.
    row, sight, record = residuals
    check_recording(record)
    if record is not None and sight is not None:
        record.write(row, sight)
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
        record.write(state.row, sight)
    return quantized


def _quantized(x: jax.Array, state: CastState, *, recorded: bool) -> tuple[jax.Array, Sight | None]:
    # So that casts of one shape share what JAX traces of them, whatever they are of:
    state = replace(state, row=jnp.int32(0), operand="activations", rows=0)
    return as_one_value(_quantize_and_see, x, state, recorded=recorded)


def _quantize_and_see(x: jax.Array, state: CastState, *, recorded: bool) -> tuple[jax.Array, Sight | None]:
    params, wide = state.params, x.astype(jnp.float32)
    bits = hash_bits(x.shape, state.seed, state.step) if params.path == "integer" else None
    own = (
        amaxes(x, state.granularity)
        if isinstance(state.scaling, Current) or (recorded and state.writes_amaxes)
        else None
    )
    scale = scale_of(state, own)
    if scale.ndim == 0 and state.scaling.power_of_two:
        grid = params.scaled(scale)
        sight = Sight(tally(wide, edges(grid)), None) if recorded else None
        return cast(wide, grid, bits).astype(x.dtype), sight
    scale = spread(scale, x.shape, state.granularity)
    quantized = quantize(x, params, scale=scale, random_bits=bits)
    if not recorded:
        return quantized, None
    seen = tally(divide_by_scale(wide, scale), edges(params)).at[-1].set(_bits(amax(x)))
    return quantized, Sight(seen, own.reshape(state.amax_shape) if own is not None and state.writes_amaxes else None)


def scale_of(state: CastState, own: jax.Array | None) -> jax.Array:
    """The scales that a cast goes by.

    Args:
        state: of the cast.
        own: the tensor's own amaxes, as :func:`~altgrad_jax.granularity.amaxes` gives them; needed by current scales.

    Returns:
        float32: a scalar where all elements share one, else of a shape that :func:`~altgrad_jax.granularity.spread`
        takes.
    """
    match state.scaling:
        case Current() as current if own is not None:
            return current.scale(own if own.size > 1 else own.reshape(()), state.params.max_value)
        case Delayed() as delayed if state.history is not None:
            return delayed.scale(0, state.params.max_value, state.history)
        case Static() as static:
            return static.scale(0, state.params.max_value)
        case _:
            raise AssertionError(f"{state.scaling} without what it scales by")


def _seeds(seed: int, row: int | np.ndarray) -> np.ndarray:
    return np.asarray((seed + np.asarray(row, np.uint64) * _GOLDEN) % 2**32).astype(np.uint32)


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.int32)


def scaling_of(spec: CastSpec) -> Scaling:
    """Where the scales of a cast come from: delayed by default, of blocks current.

    Raises:
        InputError: for what is no scaling of this framework, and for one that cannot serve blocks.
    """
    scaling = spec.scaling
    if scaling is None:
        return Current() if isinstance(spec.granularity, PerBlock) else Delayed(DEFAULT_WINDOW)
    if not isinstance(scaling, Scaling):
        raise InputError(f"scaling is {scaling!r}; expected a Static, Current or Delayed of altgrad_jax")
    check_block_scaling(spec, isinstance(scaling, Current))
    return (
        Static(jnp.asarray(scaling.value, jnp.float32), scaling.power_of_two)
        if isinstance(scaling, Static)
        else scaling
    )


def _check_signed(format: Format) -> None:
    if not format.is_signed:
        raise InputError(f"{format} has no sign and no zero; expected a signed format for the operands of a layer")


def begun_anew(state: CastState, x: jax.Array) -> CastState:
    """The state whose history begins with the amax of ``x``: of a weight, which is known before any step."""
    if state.history is None:
        return state
    largest = amaxes(x, state.granularity).reshape(state.history.shape[1:])
    return replace(state, history=push_amax(jnp.zeros_like(state.history), largest))

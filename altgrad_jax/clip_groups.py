"""One group of gradients that are clipped together: its rate, its threshold, its gate. See ``clipping.py``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from altgrad_core.clip_rules import NORMS_NEEDED, REFERENCE_BINADES, ClipRule
from altgrad_core.errors import InputError
from altgrad_core.nonfinite import Nonfinite
from altgrad_core.norms import NOT_MEASURED, ROUNDS_TO_NORMAL
from altgrad_core.stability import CLIP_EPSILON, REFERENCE_MAX
from altgrad_jax.axes import AxisName, by_axes, largest_over, varying_as
from altgrad_jax.casting import to_float32
from altgrad_jax.nonfinite import Culprit, find_culprit, without_nonfinite
from altgrad_jax.norms import Norm, as_norm, norm_of, quotient
from altgrad_jax.params import FormatParams
from altgrad_jax.scaling import amax, delayed_scale, empty_history, push_amax
from altgrad_jax.statistics import observe, overflow_rate_of

_SIGN = np.int32(-(2**31))
_MIN_NORMAL = np.float32(2.0**-126)


class PartitionRelativeClipState(NamedTuple):
    """State of :func:`~altgrad_jax.clipping.partition_relative_clip`: what it clips by, what it saw at the last update.

    Attributes:
        format: the format whose range sets the threshold; replace it with :func:`altgrad_jax.control.set_format`.
        amax_history: float32 of shape ``(window, leaves)``, amax of past gradients, oldest first; moves only when the
            rate is measured here, or the rule needs it.
        norm_history: float32 of shape ``(norm_window,)``, norms of past gradients, oldest first, 0 where empty; None
            unless the rule is ``quantile``.
        overflow_rate: float32, the rate that the gate was given or measured.
        threshold: float32, the norm that gradients are clipped to; inf where nothing would be.
        total_norm: float32, the norm before clipping; -1 where none was taken, never that of an earlier update.
        clipped: bool, whether the gate was open, so that the rule was applied.
        culprit: the first leaf that was not finite.
    """

    format: FormatParams
    amax_history: jax.Array
    norm_history: jax.Array | None
    overflow_rate: jax.Array
    threshold: jax.Array
    total_norm: jax.Array
    clipped: jax.Array
    culprit: Culprit


class _Seen(NamedTuple):
    """What was seen of gradients before they were clipped."""

    total_norm: jax.Array
    culprit: Culprit

    @classmethod
    def nothing(cls) -> _Seen:
        return cls(jnp.float32(NOT_MEASURED), Culprit.none())

    @classmethod
    def of(cls, norm: Norm, leaves: Sequence[jax.Array], axis_name: AxisName | None) -> _Seen:
        return cls(norm.single, culprit_of_norm(norm, leaves, axis_name))


@dataclass(frozen=True)
class ClipGroup:
    """What :func:`~altgrad_jax.clipping.partition_relative_clip` was told, of leaves that are clipped together.

    Lengths of histories are None where they are traced: the state's own shapes tell them, once there is a state.
    """

    format: FormatParams
    base_clip: float | jax.Array
    overflow_threshold: float | jax.Array
    rule: ClipRule
    window: int | None
    quantile: float | jax.Array
    norm_window: int | None
    nonfinite: Nonfinite
    axis_name: AxisName | None

    def init(self, leaves: Sequence[jax.Array]) -> PartitionRelativeClipState:
        """The state before the first update.

        Raises:
            InputError: if a length that it depends on is traced.
        """
        return PartitionRelativeClipState(
            format=jax.tree.map(jnp.copy, self.format),
            amax_history=empty_history(_known("window", self.window), (len(leaves),)),
            norm_history=empty_history(_known("norm_window", self.norm_window)) if self.rule == "quantile" else None,
            overflow_rate=jnp.float32(0),
            threshold=jnp.float32(np.inf),
            total_norm=jnp.float32(NOT_MEASURED),
            clipped=jnp.asarray(False),
            culprit=Culprit.none(),
        )

    def update(
        self,
        leaves: list[jax.Array],
        state: PartitionRelativeClipState,
        overflow_rate: jax.Array | None,
        total_norm: jax.Array | None = None,
    ) -> tuple[list[jax.Array], PartitionRelativeClipState]:
        """Clip leaves if the gate opens; their rate and their norm are taken here unless they are given."""
        rate, history = self._rate(leaves, state, overflow_rate)
        culprit = None if self.nonfinite == "propagate" else find_culprit(leaves, self.axis_name)
        finite = [without_nonfinite(leaf) for leaf in leaves] if self.nonfinite == "zero" else leaves
        # Not "rate >= threshold": a rate that is NaN must open the gate.
        is_open = ~(rate < jnp.asarray(self.overflow_threshold, jnp.float32))
        threshold, norm = self._threshold(state), self._norm(finite, total_norm)
        # Leaves that nobody reads after the conditional pass through a shut gate without a copy, if they are donated.
        if norm is None:
            nothing = varying_as(_Seen.nothing(), finite, self.axis_name)
            clipped, seen = lax.cond(
                is_open, lambda them: self._clip(them, threshold), lambda them: (them, nothing), finite
            )
        else:
            seen = _Seen.of(norm, finite, self.axis_name)
            limit = _after(seen, threshold)
            clipped = lax.cond(is_open, lambda them: scaled_to(them, limit, norm), lambda them: them, finite)
        after = PartitionRelativeClipState(
            format=state.format,
            amax_history=history,
            norm_history=None if state.norm_history is None else _remember(state.norm_history, seen.total_norm),
            overflow_rate=rate,
            threshold=threshold,
            total_norm=seen.total_norm,
            clipped=is_open,
            culprit=seen.culprit if culprit is None else culprit,
        )
        return clipped, after

    def _norm(self, leaves: Sequence[jax.Array], given: jax.Array | None) -> Norm | None:
        """The norm where it is known or needed whether or not the gate opens."""
        if given is not None:
            return as_norm(given)
        return norm_of(leaves, axis_name=self.axis_name) if self.rule == "quantile" else None

    def _clip(self, leaves: list[jax.Array], threshold: jax.Array) -> tuple[list[jax.Array], _Seen]:
        norm = norm_of(leaves, axis_name=self.axis_name)
        seen = _Seen.of(norm, leaves, self.axis_name)
        return scaled_to(leaves, _after(seen, threshold), norm), seen

    def _rate(
        self, leaves: list[jax.Array], state: PartitionRelativeClipState, given: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """The overflow rate, given or measured under delayed scales, and the amax history after this update."""
        history = state.amax_history
        if given is None:
            rate, amaxes = _measure_overflow(leaves, state.format, history, self.axis_name)
        elif self.rule == "scaled_max":
            rate, amaxes = given, jnp.stack([amax(leaf) for leaf in leaves])
        else:
            return given, history
        return rate, push_amax(history, largest_over(amaxes, self.axis_name))

    def _threshold(self, state: PartitionRelativeClipState) -> jax.Array:
        if self.rule == "max" or self.rule == "binades":
            return format_threshold(state.format, self.base_clip, self.rule)
        with jax.enable_x64(True):
            if state.norm_history is None:
                measure = lax.convert_element_type(state.format.max_value, jnp.float64) * _largest_scale(state)
            else:
                measure = _quantile(state.norm_history, self.quantile)
            return _measured_threshold(jnp.asarray(self.base_clip, jnp.float32), measure)


@jax.custom_jvp
def _measured_threshold(base: jax.Array, measure: jax.Array) -> jax.Array:
    """Of a quantile the derivative goes on to the norms of the steps before; a scale, a power of two, is constant."""
    with jax.enable_x64(True):
        return lax.convert_element_type(lax.convert_element_type(base, jnp.float64) * measure, jnp.float32)


@_measured_threshold.defjvp
def _measured_threshold_tangent(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    (base, measure), (base_move, measure_move) = primals, tangents
    # While there is too little to measure it is inf: times the zero of a step that clips nothing it would be NaN.
    slope = jnp.where(jnp.isfinite(measure), measure, jnp.zeros_like(measure)).astype(jnp.float32)
    return _measured_threshold(base, measure), base_move * slope + base * measure_move.astype(jnp.float32)


def _known(name: str, length: int | None) -> int:
    if length is None:
        raise InputError(static_needed(name, "the state's shapes depend on it"))
    return length


def static_needed(name: str, why: str) -> str:
    """What the error says where a number is traced that must not be."""
    return (
        f"{name} is traced, but {why}; expected a number: under optax.inject_hyperparams it is one if it is named in "
        f"static_args=({name!r},)"
    )


def format_threshold(
    params: FormatParams, base_clip: float | jax.Array = 1.0, rule: Literal["max", "binades"] = "max"
) -> jax.Array:
    """:func:`altgrad_core.clip_rules.format_threshold` of traced params: float64 inside, rounded once to float32."""
    with jax.enable_x64(True):
        base = lax.convert_element_type(jnp.asarray(base_clip, jnp.float32), jnp.float64)
        if rule == "binades":
            return lax.convert_element_type(base * _binades(params) / REFERENCE_BINADES, jnp.float32)
        # A divisor that hangs on data: XLA turns division by a constant into a product with its reciprocal.
        reference = jnp.where(params.mantissa_bits >= 0, REFERENCE_MAX, 1.0)
        return lax.convert_element_type(
            base * lax.convert_element_type(params.max_value, jnp.float64) / reference, jnp.float32
        )


def _after(seen: _Seen, threshold: jax.Array) -> jax.Array:
    """The threshold, for XLA's eyes a result of looking for the culprit: then it scales donated leaves in place."""
    return jnp.where(seen.culprit.count < 0, jnp.float32(0), threshold)


def culprit_of_norm(norm: Norm, leaves: Sequence[jax.Array], axis_name: AxisName | None = None) -> Culprit:
    """Look for the culprit only if the norm says that there is one."""
    nobody = varying_as(Culprit.none(), leaves, axis_name)
    return lax.cond(
        jnp.isfinite(norm.single), lambda _: nobody, lambda them: find_culprit(them, axis_name), list(leaves)
    )


def scaled_to(
    leaves: Sequence[jax.Array], max_norm: float | jax.Array, norm: Norm, eps: float | jax.Array = CLIP_EPSILON
) -> list[jax.Array]:
    """Leaves times ``min(1, max_norm / (norm + eps))``, in float64 and rounded once; below 2^-126 they are zero.

    On any backend: XLA's CPU one flushes what is below, rounded to 24 bits; a GPU would round some of it up to 2^-126.
    An infinite ``max_norm`` leaves every bit as it is, as in torch.

    Derivatives are those of the rule without its roundings, with respect to leaves, norm, ``max_norm`` and ``eps``.
    Where the limit just reaches the norm it counts as clipping, as in optax; where leaves are not finite they are NaN.
    """
    return _scaled_to(list(leaves), _in_two_dtypes(max_norm), norm, _in_two_dtypes(eps))


def _in_two_dtypes(number: float | jax.Array) -> Norm:
    """A number as it is, in float64, with a float32 to hold its derivative."""
    with jax.enable_x64(True):
        return Norm(lax.convert_element_type(number, jnp.float32), lax.convert_element_type(number, jnp.float64))


@jax.custom_jvp
def _scaled_to(leaves: list[jax.Array], max_norm: Norm, norm: Norm, eps: Norm) -> list[jax.Array]:
    with jax.enable_x64(True):
        limit = max_norm.double
        is_unlimited = jnp.isinf(limit)
        divisor = norm.double + eps.double
        coefficient = jnp.minimum(limit / jnp.where(divisor == 0, 1.0, divisor), 1.0)
        coefficient = jnp.where(is_unlimited | (divisor == 0), 1.0, coefficient)
        coefficient_or_zero = jnp.where(coefficient < ROUNDS_TO_NORMAL, 0.0, coefficient)
        # Behind a barrier: XLA may take a conversion to float32 and back for none.
        single = lax.optimization_barrier(lax.convert_element_type(coefficient_or_zero, jnp.float32))
        survives_from = _float32_at_least(ROUNDS_TO_NORMAL / lax.convert_element_type(single, jnp.float64))

    def scaled(leaf: jax.Array) -> jax.Array:
        if leaf.dtype == jnp.float64:
            return jnp.where(is_unlimited, leaf, leaf * coefficient)
        value = leaf.astype(jnp.float32)
        product = value * single
        signed_zero = _float(_bits(value) & _SIGN)
        limited = jnp.where(jnp.abs(value) < survives_from, signed_zero, product).astype(leaf.dtype)
        return jnp.where(is_unlimited, leaf, limited)

    return [scaled(leaf) for leaf in leaves]


@_scaled_to.defjvp
def _scaled_to_tangent(
    primals: tuple[list[jax.Array], Norm, Norm, Norm], tangents: tuple[list[jax.Array], Norm, Norm, Norm]
) -> tuple[list[jax.Array], list[jax.Array]]:
    leaves, max_norm, norm, eps = primals
    moves, max_norm_move, norm_move, eps_move = tangents
    with jax.enable_x64(True):
        divisor = Norm(norm.single + eps.single, norm.double + eps.double)
        # Not "limit <= divisor": a norm that is NaN must show.
        passes = (max_norm.double > divisor.double) | jnp.isinf(max_norm.double) | (divisor.double == 0)
    # A limit that is inf must not reach a product that transposing would make with zero.
    limit = jnp.where(passes, jnp.zeros_like(max_norm.single), max_norm.single)
    ratio = quotient(limit, divisor)
    coefficient = jnp.where(passes, jnp.ones_like(ratio), ratio)
    move = max_norm_move.single - ratio * (norm_move.single + eps_move.single)
    # Where leaves pass, that of a norm which is not finite must not show.
    scaled_move = jnp.where(passes, jnp.zeros_like(move), move)

    def moved(leaf: jax.Array, leaf_move: jax.Array) -> jax.Array:
        # The coefficient's own move is this one by the divisor, which may overflow. The leaf by it is 1 at most.
        unit = quotient(leaf, divisor)
        by_leaf = coefficient.astype(unit.dtype) * leaf_move.astype(unit.dtype)
        return (by_leaf + unit * scaled_move.astype(unit.dtype)).astype(leaf.dtype)

    return _scaled_to(leaves, max_norm, norm, eps), list(map(moved, leaves, moves))


def _float32_at_least(value: jax.Array) -> jax.Array:
    """The smallest float32 that is not below a positive float64 value; inf beyond float32's maximum."""
    nearest = lax.optimization_barrier(lax.convert_element_type(value, jnp.float32))
    is_below = lax.convert_element_type(nearest, jnp.float64) < value
    return _float(_bits(nearest) + is_below.astype(jnp.int32))


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.int32)


def _float(bits: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(bits, jnp.float32)


def zeros_if(condition: jax.Array, leaves: Sequence[jax.Array]) -> list[jax.Array]:
    """The leaves, or zeros in their place."""
    return [jnp.where(condition, jnp.zeros_like(leaf), leaf) for leaf in leaves]


def _measure_overflow(
    leaves: Sequence[jax.Array], params: FormatParams, history: jax.Array, axis_name: AxisName | None
) -> tuple[jax.Array, jax.Array]:
    # Where the grid ends is moved, instead of every gradient: on the wide path, which reaches as far as float32 does.
    wide = replace(params, path="wide") if params.path == "fast" else params
    grids = wide.scaled(delayed_scale(history, params.max_value))
    has_history = _has_history(history).astype(jnp.int32)
    countable = [to_float32(leaf, "the clipper") if leaf.dtype == jnp.float64 else leaf for leaf in leaves]
    counts, amaxes = zip(*(observe(leaf, grids.at(k)) for k, leaf in enumerate(countable)), strict=True)
    seen = {}
    for axes, group in by_axes(leaves, axis_name).items():
        limbs = jnp.stack([counts[k].limbs for k in group])
        seen[axes] = limbs.at[:, 1].multiply(has_history[np.array(group)][:, None])
    return overflow_rate_of(seen), jnp.stack(amaxes)


def _binades(params: FormatParams) -> jax.Array:
    """float64: :func:`altgrad_core.clip_rules.binades` of params."""
    max_exponent = (lax.bitcast_convert_type(params.max_value, jnp.int32) >> 23) - 127
    return lax.convert_element_type(max_exponent - params.min_exponent + params.mantissa_bits + 1, jnp.float64)


def _largest_scale(state: PartitionRelativeClipState) -> jax.Array:
    """float64: the largest delayed scale of leaves that have a history; inf without any, so that nothing is clipped."""
    scales = delayed_scale(state.amax_history, state.format.max_value)
    largest = jnp.max(jnp.where(_has_history(state.amax_history), scales, 0))
    return lax.convert_element_type(jnp.where(largest > 0, largest, jnp.float32(np.inf)), jnp.float64)


def _has_history(history: jax.Array) -> jax.Array:
    """bool, of each leaf. Subnormals are none on any backend: the CPU reads them as zero."""
    return jnp.max(history, axis=0) >= _MIN_NORMAL


def _remember(norms: jax.Array, norm: jax.Array) -> jax.Array:
    """The norms with one more, if it is finite and not zero: an amax repeats itself in such a step, a norm must not."""
    return jnp.where(jnp.isfinite(norm) & (norm > 0), push_amax(norms, norm), norms)


def _quantile(norms: jax.Array, quantile: float | jax.Array) -> jax.Array:
    """float64: the quantile of the norms so far, as it stands among them; inf while there are too few."""
    count = jnp.sum(norms > 0)
    ordered = jnp.sort(jnp.where(norms > 0, norms, jnp.inf))
    # In the precision of an array: in a higher one, what a float32 lost of 0.7 would show in 0.7 * 10.
    fraction = jnp.asarray(quantile)
    fraction = fraction.astype(jnp.promote_types(fraction.dtype, jnp.float32))
    chosen = ordered[jnp.floor(fraction * jnp.maximum(count - 1, 0).astype(fraction.dtype)).astype(jnp.int32)]
    return lax.convert_element_type(jnp.where(count >= NORMS_NEEDED, chosen, jnp.inf), jnp.float64)

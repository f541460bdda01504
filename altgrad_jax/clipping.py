"""Gradient clipping by global norm, with torch's rule, gated by the measured overflow rate: optax elements.

``altgrad_torch/clipping.py`` says the same thing on top of torch's own clipping; norms, coefficients and clipped
gradients have the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from altgrad_core.formats import Format
from altgrad_core.stability import CLIP_EPSILON, REFERENCE_MAX, check_base_clip, check_rate
from altgrad_jax.casting import FormatParams, as_params, flush_subnormals, to_float32_odd
from altgrad_jax.scaling import delayed_scale, empty_history, push_amax
from altgrad_jax.statistics import CastCounts, observe

NOT_MEASURED = -1.0
"""What ``total_norm`` reads where no norm was taken, since no norm is negative."""

_FLOAT32_MAX = float(np.finfo(np.float32).max)
_MAGNITUDE = np.int32(0x7FFFFFFF)
_SUBNORMALS_COUNT_BELOW = 2.0**-160
_ROW = 1024


def global_norm(tree: optax.Updates) -> jax.Array:
    """The Euclidean norm of all leaves together, as float32.

    Squares and sum are float64, so nothing overflows or vanishes on the way, float32 subnormals included. A norm beyond
    float32's maximum, of leaves that are all finite, is float32's maximum: not inf, which would clip them all to zero.

    Args:
        tree: pytree of floating-point arrays of any shapes.

    Returns:
        float32 scalar; inf or NaN if a leaf holds one.

    Raises:
        ValueError: if the tree has no leaves.
        TypeError: if a leaf is not real floating point.

    >>> norm = global_norm({"w": jnp.array([3.0, 4.0]) * 2.0**-120, "b": jnp.zeros(2)})
    >>> float(norm) == 5 * 2.0**-120
    True
    """
    return _norm_as_float32(_norm_float64(_float_leaves(tree)))


def clip_by_global_norm(
    max_norm: float | jax.Array, eps: float | jax.Array = CLIP_EPSILON
) -> optax.GradientTransformationExtraArgs:
    """Scale updates by ``min(1, max_norm / (norm + eps))``: the rule of ``torch.nn.utils.clip_grad_norm_``.

    The coefficient is formed in float64 from the norm rounded to float32, and rounded once. Results below 2^-126 are
    zero. The norm can be read with ``optax.tree.get(state, "total_norm")``.

    Args:
        max_norm: largest norm to let through; 0 makes all updates zero.
        eps: what is added to the norm.

    Raises:
        ValueError: if ``max_norm`` or ``eps`` is negative or not a finite number.

    >>> tx = clip_by_global_norm(1.0)
    >>> updates, state = tx.update({"w": jnp.array([3.0, 4.0])}, tx.init({"w": jnp.zeros(2)}))
    >>> float(state.total_norm), [round(float(u), 4) for u in updates["w"]]
    (5.0, [0.6, 0.8])
    """
    for name, value in (("max_norm", max_norm), ("eps", eps)):
        if not isinstance(value, jax.Array) and not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} is {value!r}; expected a finite number of at least 0")

    def init(params: optax.Params) -> ClipByGlobalNormState:
        del params
        return ClipByGlobalNormState(total_norm=jnp.float32(NOT_MEASURED))

    def update(
        updates: optax.Updates, state: ClipByGlobalNormState, params: optax.Params | None = None, **extra_args: object
    ) -> tuple[optax.Updates, ClipByGlobalNormState]:
        del state, params, extra_args
        clipped, norm = _clip(updates, max_norm, eps)
        return clipped, ClipByGlobalNormState(total_norm=norm)

    # optax types every state as any pytree, its own states included.
    return optax.GradientTransformationExtraArgs(init, update)  # pyrefly: ignore[bad-argument-type]


class ClipByGlobalNormState(NamedTuple):
    """State of :func:`clip_by_global_norm`.

    Attributes:
        total_norm: float32, the norm before clipping; -1 before the first update.
    """

    total_norm: jax.Array


class PartitionRelativeClipState(NamedTuple):
    """State of :func:`partition_relative_clip`: what it clips by, and what it saw at the last update.

    Attributes:
        format: the format whose range sets the threshold; replace it with :func:`altgrad_jax.control.set_format`.
        amax_history: float32 of shape ``(window, leaves)``, amax of past gradients, oldest first; moves only when the
            rate is measured here.
        overflow_rate: float32, the rate that the gate was given or measured.
        total_norm: float32, the norm before clipping; -1 where the gate was shut and none was taken.
        clipped: bool, whether the gate was open, so that the rule was applied.
    """

    format: FormatParams
    amax_history: jax.Array
    overflow_rate: jax.Array
    total_norm: jax.Array
    clipped: jax.Array


def partition_relative_clip(
    format: str | Format | FormatParams,
    base_clip: float | jax.Array = 1.0,
    overflow_threshold: float | jax.Array = 0.01,
    *,
    window: int = 16,
) -> optax.GradientTransformationExtraArgs:
    """Clip to a threshold that follows the format's range, and only when the overflow rate reaches a limit.

    The threshold is ``base_clip * max / 57344`` (AltGrad rule; see :func:`altgrad_core.stability.clip_threshold`) and
    the rule is that of :func:`clip_by_global_norm`. Below ``overflow_threshold`` the updates pass untouched and no norm
    is taken. The rate is given to ``update`` as ``overflow_rate``, or else measured: on each leaf under a power-of-two
    scale from the amax of its ``window`` last updates. A leaf without history (at the first update) is not measured,
    so that a measured rate starts at 0. A traced rate that is NaN opens the gate. Put this before the optimizer.

    Under ``vmap`` both branches run, as with any ``lax.cond``.

    Args:
        format: a name, a :class:`~altgrad_core.formats.Format`, or params. It lives in the state as data: to change it
            compiles nothing.
        base_clip: the threshold that E5M2 would have; positive.
        overflow_threshold: the rate, 0 to 1, at and above which gradients are clipped.
        window: steps of amax history for the measured rate.

    Returns:
        A transformation whose ``update`` takes the keyword ``overflow_rate`` (scalar in [0, 1], optional).

    Raises:
        ValueError: for values out of range, here or (where it is concrete) in ``overflow_rate``.
        UnknownFormatError: for an unknown format.

    >>> tx = optax.chain(partition_relative_clip("E3M4"), optax.sgd(1.0))
    >>> grads = {"w": jnp.array([3.0, 4.0])}
    >>> _, state = tx.update(grads, tx.init(grads), overflow_rate=0.02)
    >>> float(optax.tree.get(state, "total_norm")), bool(optax.tree.get(state, "clipped"))
    (5.0, True)
    """
    # optax.inject_hyperparams hands over arrays, which may be traced: those are taken as they are.
    if not isinstance(base_clip, jax.Array):
        check_base_clip(base_clip)
    if not isinstance(overflow_threshold, jax.Array):
        check_rate("overflow_threshold", overflow_threshold)
    initial = as_params(format)

    def init(params: optax.Params) -> PartitionRelativeClipState:
        return PartitionRelativeClipState(
            format=jax.tree.map(jnp.copy, initial),
            amax_history=empty_history(window, (len(_float_leaves(params)),)),
            overflow_rate=jnp.float32(0),
            total_norm=jnp.float32(NOT_MEASURED),
            clipped=jnp.asarray(False),
        )

    def update(
        updates: optax.Updates,
        state: PartitionRelativeClipState,
        params: optax.Params | None = None,
        *,
        overflow_rate: jax.typing.ArrayLike | None = None,
        **extra_args: object,
    ) -> tuple[optax.Updates, PartitionRelativeClipState]:
        del params, extra_args
        history = state.amax_history
        if overflow_rate is None:
            rate, history = _measure_overflow(_float_leaves(updates), state.format, history)
        else:
            rate = _checked_rate(overflow_rate)
        # Not "rate >= threshold": a rate that is NaN must open the gate.
        is_open = ~(rate < jnp.asarray(overflow_threshold, jnp.float32))
        clipped, norm = lax.cond(
            is_open,
            lambda tree: _clip(tree, _threshold(state.format, base_clip), CLIP_EPSILON),
            lambda tree: (tree, jnp.float32(NOT_MEASURED)),
            updates,
        )
        return clipped, PartitionRelativeClipState(state.format, history, rate, norm, is_open)

    # optax types every state as any pytree, its own states included.
    return optax.GradientTransformationExtraArgs(init, update)  # pyrefly: ignore[bad-argument-type]


def _threshold(params: FormatParams, base_clip: float | jax.Array) -> jax.Array:
    """:func:`altgrad_core.stability.clip_threshold` on traced params: float64 inside, rounded once to float32."""
    with jax.enable_x64(True):
        maximum = lax.convert_element_type(params.max_value, jnp.float64)
        # A divisor that hangs on data: XLA turns division by a constant into a product with its reciprocal.
        reference = jnp.where(params.mantissa_bits >= 0, REFERENCE_MAX, 1.0)
        base = lax.convert_element_type(jnp.asarray(base_clip, jnp.float32), jnp.float64)
        return lax.convert_element_type(base * maximum / reference, jnp.float32)


def _checked_rate(overflow_rate: jax.typing.ArrayLike) -> jax.Array:
    if not isinstance(overflow_rate, jax.core.Tracer):
        check_rate("overflow_rate", np.asarray(overflow_rate).item())
    return jnp.asarray(overflow_rate, jnp.float32)


def _measure_overflow(leaves: list[jax.Array], params: FormatParams, history: jax.Array) -> tuple[jax.Array, jax.Array]:
    scales = delayed_scale(history, params.max_value)
    has_history = jnp.max(history, axis=0) > 0
    countable = [to_float32_odd(leaf) if leaf.dtype == jnp.float64 else leaf for leaf in leaves]
    counts, amaxes = zip(*(observe(leaf, params, scale=scales[k]) for k, leaf in enumerate(countable)), strict=True)
    limbs = jnp.stack([count.limbs for count in counts])
    overflow_seen = limbs.at[:, 1].multiply(has_history[:, None].astype(jnp.int32))
    return CastCounts(overflow_seen).pooled().overflow_rate, push_amax(history, jnp.stack(amaxes))


def _clip(
    updates: optax.Updates, max_norm: jax.Array | float, eps: float | jax.Array
) -> tuple[optax.Updates, jax.Array]:
    norm = _norm_float64(_float_leaves(updates))
    rounded = _norm_as_float32(norm)
    with jax.enable_x64(True):
        coefficient = lax.convert_element_type(max_norm, jnp.float64) / (_rounded_to_float32(norm) + eps)
        coefficient = jnp.minimum(coefficient, 1.0)
        single = lax.convert_element_type(coefficient, jnp.float32)

    def scaled(leaf: jax.Array) -> jax.Array:
        if leaf.dtype == jnp.float64:
            return leaf * coefficient
        product = leaf.astype(jnp.float32) * single
        return (flush_subnormals(product) if leaf.dtype == jnp.float32 else product).astype(leaf.dtype)

    return jax.tree.map(scaled, updates), rounded


def _float_leaves(tree: optax.Updates) -> list[jax.Array]:
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    if not leaves:
        raise ValueError("the tree of gradients is empty; expected at least one array")
    for leaf in leaves:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(f"gradients are real floating-point arrays; got one of {leaf.dtype}")
    return leaves


def _norm_float64(leaves: list[jax.Array]) -> jax.Array:
    with jax.enable_x64(True):
        total = _sum_of_squares(leaves, _widen)
        # Subnormals add less than 2^-252 each: they count only in a sum so small that XLA may have dropped some of it.
        total = lax.cond(
            total < _SUBNORMALS_COUNT_BELOW,
            lambda them: _sum_of_squares(them, _widen_subnormals),
            lambda _: total,
            leaves,
        )
        return jnp.sqrt(total)


def _sum_of_squares(leaves: list[jax.Array], widen: Callable[[jax.Array], jax.Array]) -> jax.Array:
    total = jnp.float64(0)
    for leaf in leaves:
        flat = leaf.reshape(-1)
        whole = flat.size - flat.size % _ROW
        # Sums over rows run at the speed of memory; one long float64 sum would run ten times slower on a CPU.
        rows = widen(flat[:whole].reshape(-1, _ROW))
        rest = widen(flat[whole:])
        total = total + jnp.sum(jnp.sum(rows * rows, axis=1)) + jnp.sum(rest * rest)
    return total


def _widen(leaf: jax.Array) -> jax.Array:
    return lax.convert_element_type(leaf, jnp.float64)


def _widen_subnormals(leaf: jax.Array) -> jax.Array:
    """Exact conversion to float64 of float32 subnormals too, which XLA's CPU backend would read as zero."""
    if leaf.dtype == jnp.float64:
        return leaf
    leaf = leaf.astype(jnp.float32)
    magnitude = lax.bitcast_convert_type(leaf, jnp.int32) & _MAGNITUDE
    return jnp.where(magnitude < 1 << 23, _widen(magnitude) * 2.0**-149, _widen(leaf))


def _norm_as_float32(norm: jax.Array) -> jax.Array:
    """Round a float64 norm to float32 without overflow; a subnormal result is put together from its bits."""
    with jax.enable_x64(True):
        bounded = jnp.where(jnp.isfinite(norm), jnp.minimum(norm, _FLOAT32_MAX), norm)
        normal = lax.convert_element_type(bounded, jnp.float32)
        steps = lax.convert_element_type(jnp.round(jnp.minimum(bounded, 2.0**-126) * 2.0**149), jnp.int32)
        return jnp.where(bounded < 2.0**-126, lax.bitcast_convert_type(steps, jnp.float32), normal)


def _rounded_to_float32(norm: jax.Array) -> jax.Array:
    """The float64 value of :func:`_norm_as_float32`, which a subnormal could not be read back from."""
    with jax.enable_x64(True):
        bounded = jnp.where(jnp.isfinite(norm), jnp.minimum(norm, _FLOAT32_MAX), norm)
        normal = lax.convert_element_type(lax.convert_element_type(bounded, jnp.float32), jnp.float64)
        return jnp.where(bounded < 2.0**-126, jnp.round(bounded * 2.0**149) * 2.0**-149, normal)

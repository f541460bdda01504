"""Gradient clipping by norm, with torch's rule, gated by the measured overflow rate: optax elements.

``altgrad_torch/clipping.py`` says the same thing on top of torch's own clipping; norms, coefficients and clipped
gradients have the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from altgrad_core.clip_rules import NORMS_NEEDED, ClipRule, check_quantile, check_rule
from altgrad_core.errors import InputError
from altgrad_core.format_trees import FormatTree, Positions, formats_of_groups
from altgrad_core.formats import Format
from altgrad_core.nonfinite import Nonfinite, check_nonfinite
from altgrad_core.norms import NOT_MEASURED, check_norm_type
from altgrad_core.scalars import as_real
from altgrad_core.scaling import check_window
from altgrad_core.stability import CLIP_EPSILON, check_base_clip, check_epsilon, check_max_norm, check_rate
from altgrad_jax.axes import AxisName
from altgrad_jax.clip_groups import (
    ClipGroup,
    PartitionRelativeClipState,
    culprit_of_norm,
    scaled_to,
    static_needed,
    zeros_if,
)
from altgrad_jax.nonfinite import Culprit, find_culprit, leaf_paths, raise_if_nonfinite, without_nonfinite
from altgrad_jax.norms import float_leaves, norm_of
from altgrad_jax.params import FormatParams, as_params

FormatLike = str | Format | FormatParams
Number = TypeVar("Number", int, float)


class ClipByGlobalNormState(NamedTuple):
    """State of :func:`clip_by_global_norm`.

    Attributes:
        total_norm: float32, the norm before clipping; -1 before the first update.
        culprit: the first leaf that was not finite at the last update.
    """

    total_norm: jax.Array
    culprit: Culprit


class GroupedClipState(NamedTuple):
    """State of :func:`partition_relative_clip` with a format for each group of leaves.

    Attributes:
        groups: by pattern or place, the state of each group; the culprit's index counts all leaves of the tree.
    """

    groups: dict[str, PartitionRelativeClipState]


def clip_by_global_norm(
    max_norm: float | jax.Array,
    eps: float | jax.Array = CLIP_EPSILON,
    *,
    norm_type: float | jax.Array | None = None,
    nonfinite: Nonfinite = "propagate",
    axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Scale updates by ``min(1, max_norm / (norm + eps))``: the rule of ``torch.nn.utils.clip_grad_norm_``.

    The coefficient is formed in float64 from the norm rounded to float32, and rounded once. Results below 2^-126 are
    zero. The norm can be read with ``optax.tree.get(state, "total_norm")``. (``optax.clip_by_global_norm`` has no
    ``eps``; its float32 norm overflows beyond 1.8e19.) A tree without leaves passes, and nothing is measured.

    Derivatives are those of the rule without its roundings, by updates, ``max_norm`` and ``eps``; of second ones
    through a scan see :func:`altgrad_jax.global_norm`.

    ``optax.inject_hyperparams`` works on it: ``max_norm`` and ``eps`` are data, which are checked unless they are
    traced; a ``norm_type`` that is given has to be named in ``static_args``.

    Args:
        max_norm: largest norm to let through; 0 makes all updates zero, inf leaves them as they are.
        eps: what is added to the norm; with 0, gradients whose norm is zero stay as they are.
        norm_type: order of the norm: 2, the default, 1, inf or any other positive number; see
            :func:`altgrad_jax.norms.norm_of`.
        nonfinite: what becomes of updates that are not finite; see :data:`altgrad_core.nonfinite.Nonfinite`.
        axis_name: inside ``shard_map``, the axes over which leaves are parts of larger ones; see
            :func:`altgrad_jax.global_norm`.

    Raises:
        ValueError: if ``max_norm`` is negative or NaN, ``eps`` negative or not finite, or another argument unknown.
        FloatingPointError: from ``update`` with ``nonfinite="raise"``.

    >>> tx = clip_by_global_norm(1.0)
    >>> updates, state = tx.update({"w": jnp.array([3.0, 4.0])}, tx.init({"w": jnp.zeros(2)}))
    >>> float(state.total_norm), [round(float(u), 4) for u in updates["w"]]
    (5.0, [0.6, 0.8])
    """
    limit = _checked("max_norm", max_norm, check_max_norm)
    epsilon = _checked("eps", eps, check_epsilon)
    if isinstance(norm_type, jax.core.Tracer):
        raise InputError(static_needed("norm_type", "what is computed depends on it"))
    order = check_norm_type(_seen("norm_type", 2.0 if norm_type is None else norm_type, stand_in=2.0))
    check_nonfinite(nonfinite)

    def init(params: optax.Params) -> ClipByGlobalNormState:
        del params
        return ClipByGlobalNormState(jnp.float32(NOT_MEASURED), Culprit.none())

    def update(
        updates: optax.Updates, state: ClipByGlobalNormState, params: optax.Params | None = None, **extra_args: object
    ) -> tuple[optax.Updates, ClipByGlobalNormState]:
        del params, extra_args
        if nonfinite == "raise":
            raise_if_nonfinite(updates)
        leaves, structure = _leaves_of(updates), jax.tree.structure(updates)
        if not leaves:
            return updates, state
        finite = [without_nonfinite(leaf) for leaf in leaves] if nonfinite == "zero" else leaves
        norm = norm_of(finite, order, axis_name)
        culprit = (
            culprit_of_norm(norm, leaves, axis_name) if nonfinite == "propagate" else find_culprit(leaves, axis_name)
        )
        clipped = scaled_to(finite, limit, norm, epsilon)
        if nonfinite == "skip":
            clipped = zeros_if(culprit.count > 0, clipped)
        return jax.tree.unflatten(structure, clipped), ClipByGlobalNormState(norm.single, culprit)

    # optax types every state as any pytree, its own states included.
    return optax.GradientTransformationExtraArgs(init, update)  # pyrefly: ignore[bad-argument-type]


def partition_relative_clip(
    format: FormatTree[FormatLike],
    base_clip: float | jax.Array = 1.0,
    overflow_threshold: float | jax.Array = 0.01,
    *,
    rule: ClipRule = "max",
    window: int | jax.Array | None = None,
    quantile: float | jax.Array | None = None,
    norm_window: int | jax.Array | None = None,
    nonfinite: Nonfinite = "propagate",
    axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Clip to a threshold that follows the format's range, and only when the overflow rate reaches a limit.

    The threshold is ``base_clip * max / 57344`` (AltGrad rule; see :func:`altgrad_core.stability.clip_threshold`), or
    that of another ``rule``, and gradients are scaled as by :func:`clip_by_global_norm`. Below ``overflow_threshold``
    the updates pass untouched and no norm is taken. The rate is given to ``update`` as ``overflow_rate``, or else
    measured: on each leaf under a power-of-two scale from the amax of its ``window`` last updates. A leaf without
    history (at the first update) is not measured, so that a measured rate starts at 0. A traced rate that is NaN opens
    the gate. Put this before the optimizer.

    ``optax.inject_hyperparams`` works on it: ``base_clip``, ``overflow_threshold`` and ``quantile`` are data, which are
    checked unless they are traced. ``window`` and ``norm_window`` are read by ``init`` alone, which fixes the shapes of
    the state by them; where ``init`` itself is traced, those that are given have to be named in ``static_args``.

    Under ``vmap`` both branches run, as with any ``lax.cond``: the norm is taken whether or not the gate is open.
    A tree without leaves passes, and the state stays as it was. Several of these in one chain are told apart by
    ``optax.named_chain`` or ``optax.tree.get_all_with_path``.

    Args:
        format: a name, a :class:`~altgrad_core.formats.Format`, or params; it lives in the state as data: to change it
            compiles nothing. Or formats for groups of leaves, each with its own rate, norm and gate. A flat mapping is
            of rules: regular expressions on paths such as ``attn/.*``, of which the first full match counts. A nested
            one is a tree, a prefix of that of the parameters: ``{"attn": {"q": "E3M4"}, "mlp": "E5M2"}``, where each
            format makes a group of all leaves at or below its place, named by it: ``attn/q``. It has to have one for
            every leaf.
        base_clip: the threshold that E5M2 would have; positive.
        overflow_threshold: the rate, 0 to 1, at and above which gradients are clipped.
        rule: what the threshold follows; see :data:`altgrad_core.clip_rules.ClipRule`. ``scaled_max`` reads the
            gradients at every update, ``quantile`` takes their norm.
        window: steps of amax history for the measured rate and for ``scaled_max``: 16 by default.
        quantile: for that rule, which one: 0.5, the median, by default.
        norm_window: for that rule, of how many of the last norms: 128 by default. Raw norms, as they were before
            clipping: a quantile of clipped ones would sink step by step.
        nonfinite: what becomes of updates that are not finite; see :data:`altgrad_core.nonfinite.Nonfinite`. All but
            ``propagate`` read the gradients at every update. ``skip`` makes all of them zero, whatever their group.
        axis_name: inside ``shard_map``, the axes over which leaves are parts of larger ones; see
            :func:`altgrad_jax.global_norm`.

    Returns:
        A transformation whose ``update`` takes two keywords, both optional: ``overflow_rate``, a scalar in [0, 1], or
        with groups also a mapping of their names to one each; and ``total_norm``, what
        :func:`~altgrad_jax.norms.global_norm` says of the updates, or with groups a mapping to that of each.

    Raises:
        ValueError: for values out of range or without effect, here or (where it is concrete) in ``overflow_rate``.
        UnknownFormatError: for an unknown format.
        FloatingPointError: from ``update`` with ``nonfinite="raise"``.

    >>> tx = optax.chain(partition_relative_clip("E3M4"), optax.sgd(1.0))
    >>> grads = {"w": jnp.array([3.0, 4.0])}
    >>> _, state = tx.update(grads, tx.init(grads), overflow_rate=0.02)
    >>> float(optax.tree.get(state, "total_norm")), bool(optax.tree.get(state, "clipped"))
    (5.0, True)
    """
    check_rule(rule)
    check_nonfinite(nonfinite)
    base = _checked("base_clip", base_clip, check_base_clip)
    threshold = _checked("overflow_threshold", overflow_threshold, partial(check_rate, "overflow_threshold"))
    steps = _seen("window", 16 if window is None else window, stand_in=1)
    check_window(steps)
    fraction, norms = check_quantile(
        None if quantile is None else _seen("quantile", quantile, stand_in=0.5),
        None if norm_window is None else _seen("norm_window", norm_window, stand_in=NORMS_NEEDED),
        rule,
    )

    def group(format: FormatLike) -> ClipGroup:
        return ClipGroup(
            format=as_params(format),
            base_clip=base,
            overflow_threshold=threshold,
            rule=rule,
            window=None if isinstance(window, jax.core.Tracer) else steps,
            quantile=quantile if isinstance(quantile, jax.Array) else fraction,
            norm_window=None if isinstance(norm_window, jax.core.Tracer) else norms,
            nonfinite=nonfinite,
            axis_name=axis_name,
        )

    if not isinstance(format, (Mapping, list, tuple)):
        return _clip_together(group(format))
    formats, positions = formats_of_groups(format, "/")
    return _clip_in_groups({name: group(each) for name, each in formats.items()}, positions)


def _clip_together(group: ClipGroup) -> optax.GradientTransformationExtraArgs:
    def init(params: optax.Params) -> PartitionRelativeClipState:
        return group.init(_leaves_of(params))

    def update(
        updates: optax.Updates,
        state: PartitionRelativeClipState,
        params: optax.Params | None = None,
        *,
        overflow_rate: jax.typing.ArrayLike | None = None,
        total_norm: jax.typing.ArrayLike | None = None,
        **extra_args: object,
    ) -> tuple[optax.Updates, PartitionRelativeClipState]:
        del params, extra_args
        if group.nonfinite == "raise":
            raise_if_nonfinite(updates)
        for name, given in (("overflow_rate", overflow_rate), ("total_norm", total_norm)):
            if isinstance(given, Mapping):
                raise InputError(f"{name} is a mapping, but there are no groups; expected one number")
        rate, norm = _checked_rate(overflow_rate), _checked_norm(total_norm, group.nonfinite)
        leaves = _leaves_of(updates)
        if not leaves:
            return updates, state
        clipped, state = group.update(leaves, state, rate, norm)
        if group.nonfinite == "skip":
            clipped = zeros_if(state.culprit.count > 0, clipped)
        return jax.tree.unflatten(jax.tree.structure(updates), clipped), state

    # optax types every state as any pytree, its own states included.
    return optax.GradientTransformationExtraArgs(init, update)  # pyrefly: ignore[bad-argument-type]


def _clip_in_groups(groups: Mapping[str, ClipGroup], positions_of: Positions) -> optax.GradientTransformationExtraArgs:
    nonfinite = next(iter(groups.values())).nonfinite

    def positions_in(tree: optax.Updates) -> Mapping[str, tuple[int, ...]]:
        paths = leaf_paths(tree)
        return positions_of(paths) if paths else dict.fromkeys(groups, ())

    def init(params: optax.Params) -> GroupedClipState:
        leaves, positions = _leaves_of(params), positions_in(params)
        return GroupedClipState({name: groups[name].init([leaves[k] for k in at]) for name, at in positions.items()})

    def update(
        updates: optax.Updates,
        state: GroupedClipState,
        params: optax.Params | None = None,
        *,
        overflow_rate: jax.typing.ArrayLike | Mapping[str, jax.typing.ArrayLike] | None = None,
        total_norm: Mapping[str, jax.typing.ArrayLike] | None = None,
        **extra_args: object,
    ) -> tuple[optax.Updates, GroupedClipState]:
        del params, extra_args
        if nonfinite == "raise":
            raise_if_nonfinite(updates)
        leaves, states, patterns = _leaves_of(updates), {}, list(groups)
        rates, norms = _rates_of(overflow_rate, patterns), _norms_of(total_norm, patterns, nonfinite)
        if not leaves:
            return updates, state
        for name, at in positions_in(updates).items():
            clipped, after = groups[name].update([leaves[k] for k in at], state.groups[name], rates[name], norms[name])
            states[name] = after._replace(culprit=_in_the_tree(after.culprit, at))
            for k, leaf in zip(at, clipped, strict=True):
                leaves[k] = leaf
        if nonfinite == "skip":
            counts = jnp.stack([each.culprit.count for each in states.values()])
            leaves = zeros_if(jnp.any(counts > 0), leaves)
        return jax.tree.unflatten(jax.tree.structure(updates), leaves), GroupedClipState(states)

    # optax types every state as any pytree, its own states included.
    return optax.GradientTransformationExtraArgs(init, update)  # pyrefly: ignore[bad-argument-type]


def _in_the_tree(culprit: Culprit, positions: Sequence[int]) -> Culprit:
    at = jnp.asarray(np.array(positions, np.int32))
    return culprit._replace(index=jnp.where(culprit.index < 0, culprit.index, at[jnp.maximum(culprit.index, 0)]))


def _rates_of(
    overflow_rate: jax.typing.ArrayLike | Mapping[str, jax.typing.ArrayLike] | None, patterns: Sequence[str]
) -> dict[str, jax.Array | None]:
    if not isinstance(overflow_rate, Mapping):
        return dict.fromkeys(patterns, _checked_rate(overflow_rate))
    _check_patterns("overflow_rate", overflow_rate, patterns)
    return {pattern: _checked_rate(rate) for pattern, rate in overflow_rate.items()}


def _checked_rate(overflow_rate: jax.typing.ArrayLike | None) -> jax.Array | None:
    if overflow_rate is None:
        return None
    return jnp.asarray(_checked("overflow_rate", overflow_rate, partial(check_rate, "overflow_rate")), jnp.float32)


def _norms_of(
    total_norm: Mapping[str, jax.typing.ArrayLike] | None, patterns: Sequence[str], nonfinite: Nonfinite
) -> dict[str, jax.Array | None]:
    if total_norm is None:
        return dict.fromkeys(patterns, None)
    if not isinstance(total_norm, Mapping):
        raise InputError(f"total_norm is one for all groups; expected a mapping to that of each: {', '.join(patterns)}")
    _check_patterns("total_norm", total_norm, patterns)
    return {pattern: _checked_norm(norm, nonfinite) for pattern, norm in total_norm.items()}


def _checked_norm(total_norm: jax.typing.ArrayLike | None, nonfinite: Nonfinite) -> jax.Array | None:
    if total_norm is None:
        return None
    if nonfinite == "zero":
        raise InputError("total_norm does not go with nonfinite='zero': the norm is that of what is left, taken here")
    return jnp.asarray(_checked("total_norm", total_norm, _check_norm), jnp.float32)


def _check_norm(total_norm: float) -> float:
    if as_real(total_norm) < 0:
        raise InputError(f"total_norm is {total_norm!r}; expected a norm, such as global_norm's")
    return total_norm


def _check_patterns(name: str, given: Mapping[str, object], patterns: Sequence[str]) -> None:
    if set(given) != set(patterns):
        raise InputError(f"{name} is given for {', '.join(given)}; expected {', '.join(patterns)}")


def _leaves_of(tree: optax.Updates) -> list[jax.Array]:
    """The leaves of a tree of gradients, if it has any: ``optax.partition`` may have nothing for a label."""
    return float_leaves(tree) if jax.tree.leaves(tree) else []


def _checked(name: str, value: jax.typing.ArrayLike, check: Callable[[float], float]) -> float | jax.Array:
    """A number as its check returns it; a traced one, of which nothing can be seen, as it is."""
    seen = _seen(name, value, stand_in=1.0)
    return value if isinstance(value, jax.core.Tracer) else check(seen)


def _seen(name: str, value: jax.typing.ArrayLike, stand_in: Number) -> Number:
    """What checks look at: the number that a scalar of any kind holds, or the stand-in for a traced one."""
    if np.shape(value) != ():
        raise InputError(f"{name} has the shape {np.shape(value)}; expected one number")
    return stand_in if isinstance(value, jax.core.Tracer) else np.asarray(value).item()

"""The numbers that clippers are given: arrays, as ``optax.inject_hyperparams`` makes of them, traced or not; checks."""

import math
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from altgrad_core.clip_rules import NORMS_NEEDED
from altgrad_core.errors import InputError
from altgrad_jax import clip_by_global_norm, partition_relative_clip

GRADS = {"attn": {"q": jnp.array([3.0, 4.0])}, "mlp": {"up": jnp.array([[6.0], [8.0]])}}
STEPS = [jax.tree.map(lambda leaf, k=k: leaf * (1 + k % 5) * 10.0 ** (k % 3), GRADS) for k in range(12)]
WAYS = {"eager": lambda f: f, "jit": jax.jit}


def assert_same(left: Any, right: Any) -> None:
    chex.assert_trees_all_equal_shapes_and_dtypes(left, right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


def clipped(tx: optax.GradientTransformationExtraArgs, wrap: Callable[..., Any], **extra: Any) -> tuple[Any, Any]:
    """The updates of all steps, and the last state of the clipper."""
    init, update, seen = wrap(tx.init), wrap(lambda g, s: tx.update(g, s, **extra)), []
    state = init(GRADS)
    for grads in STEPS:
        updates, after = update(grads, state)
        chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
        state = after
        seen.append(updates)
    return seen, getattr(state, "inner_state", state)


CLIPPERS = {
    "norm": (clip_by_global_norm, (1.0,), {}),
    "norm, eps": (clip_by_global_norm, (1.0, 0.0), {}),
    "max": (partition_relative_clip, ("E3M4", 1.0), {}),
    "binades": (partition_relative_clip, ("E3M4",), {"base_clip": 0.5, "rule": "binades"}),
    "scaled_max": (partition_relative_clip, ("E3M4",), {"rule": "scaled_max"}),
    "quantile": (partition_relative_clip, ("E3M4",), {"rule": "quantile"}),
    "a quantile": (partition_relative_clip, ("E3M4",), {"rule": "quantile", "quantile": 0.7}),
    "groups": (partition_relative_clip, ({"attn/.*": "E3M4", ".*": "E5M2"}, 1.0, 0.25), {"nonfinite": "skip"}),
}


@pytest.mark.parametrize(
    ("name", "way"),
    [
        pytest.param(name, way, marks=pytest.mark.exhaustive if way == "eager" and name != "norm" else ())
        for name in CLIPPERS
        for way in WAYS
    ],
)
def test_without_static_args(name: str, way: str) -> None:
    """As if nothing were injected, also where the state is made under jit."""
    make, arguments, keywords = CLIPPERS[name]
    extra = {} if make is clip_by_global_norm else {"overflow_rate": 0.5}
    expected = clipped(make(*arguments, **keywords), WAYS[way], **extra)
    assert_same(clipped(optax.inject_hyperparams(make)(*arguments, **keywords), WAYS[way], **extra), expected)


LENGTHS = {
    "window": {"rule": "scaled_max", "window": 3},
    "norm_window": {"rule": "quantile", "norm_window": NORMS_NEEDED},
}


@pytest.mark.parametrize("name", LENGTHS)
def test_the_state_keeps_the_shapes_that_init_gave_it(name: str) -> None:
    injected = optax.inject_hyperparams(partition_relative_clip)("E3M4", **LENGTHS[name])
    expected = clipped(partition_relative_clip("E3M4", **LENGTHS[name]), jax.jit, overflow_rate=0.5)
    update, state = jax.jit(lambda g, s: injected.update(g, s, overflow_rate=0.5)), injected.init(GRADS)
    for k, grads in enumerate(STEPS):
        updates, state = update(grads, state)
        assert_same(updates, expected[0][k])
        state.hyperparams[name] = jnp.asarray(20)  # of no consequence: there is a state
    assert_same(state.inner_state, expected[1])
    with pytest.raises(InputError, match=rf"^{name} is traced, but the state's .* static_args=\('{name}',\)"):
        jax.eval_shape(injected.init, GRADS)
    static = optax.inject_hyperparams(partition_relative_clip, static_args=(name,))("E3M4", **LENGTHS[name])
    assert_same(clipped(static, jax.jit, overflow_rate=0.5), expected)


def test_another_order_has_to_be_static_under_jit() -> None:
    injected = optax.inject_hyperparams(clip_by_global_norm)(1.0, norm_type=1)
    _, state = injected.update(GRADS, injected.init(GRADS))
    assert float(optax.tree.get(state, "total_norm")) == 21.0
    with pytest.raises(InputError, match=r"norm_type is traced, but what .* static_args=\('norm_type',\)"):
        jax.jit(injected.update)(GRADS, state)
    static = optax.inject_hyperparams(clip_by_global_norm, static_args="norm_type")(1.0, norm_type=1)
    _, state = jax.jit(static.update)(GRADS, static.init(GRADS))
    assert float(optax.tree.get(state, "total_norm")) == 21.0


def test_schedules_and_changes_are_followed_and_nothing_is_traced_again() -> None:
    tx = optax.inject_hyperparams(partition_relative_clip)(
        "E5M2", base_clip=lambda count: 1.0 / (1 + count), rule="quantile", quantile=0.0
    )
    chex.clear_trace_counter()
    update = jax.jit(chex.assert_max_traces(lambda g, s: tx.update(g, s, overflow_rate=0.2), n=1))
    state, norms = tx.init(GRADS), []
    for k, grads in enumerate(STEPS):
        if k == 10:
            state.hyperparams["quantile"] = jnp.float32(1.0)
        if k == 11:
            state.hyperparams["overflow_threshold"] = jnp.float32(0.3)
        _, state = update(grads, state)
        chosen = (max if k >= 10 else min)(norms, default=0.0) if k >= NORMS_NEEDED else math.inf
        np.testing.assert_allclose(state.inner_state.threshold, chosen / (1 + k), rtol=1e-6)
        assert bool(state.inner_state.clipped) is (k < 11)
        norms.append(float(state.inner_state.total_norm))


def test_inside_scan_and_vmap() -> None:
    tx = optax.inject_hyperparams(partition_relative_clip)("E3M4", 0.5, rule="scaled_max", window=2)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *STEPS)

    def run(state: Any) -> Any:
        def step(state: Any, grads: Any) -> tuple[Any, Any]:
            updates, state = tx.update(grads, state, overflow_rate=0.5)
            return state, updates

        return jax.lax.scan(step, state, stacked)[1]

    alone = clipped(partition_relative_clip("E3M4", 0.5, rule="scaled_max", window=2), jax.jit, overflow_rate=0.5)[0]
    seen = jax.jit(run)(tx.init(GRADS))
    together = jax.vmap(run)(jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), tx.init(GRADS)))
    for k, expected in enumerate(alone):
        assert_same(jax.tree.map(lambda leaf, k=k: leaf[k], seen), expected)
        assert_same(jax.tree.map(lambda leaf, k=k: leaf[1, k], together), expected)


def test_half_precision_parameters_make_half_precision_hyperparameters() -> None:
    params = {"w": jnp.ones(4, jnp.bfloat16)}
    for make, arguments in ((clip_by_global_norm, (0.5,)), (partition_relative_clip, ("E5M2", 0.5))):
        tx = optax.inject_hyperparams(make)(*arguments)
        for update in (tx.update, jax.jit(tx.update)):
            updates, _ = update(params, tx.init(params), params)
            chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)


@pytest.mark.parametrize("way", WAYS)
def test_an_injected_quantile_is_the_one_that_was_given(way: str) -> None:
    """Of float32, 0.7 is below 0.7, and yet the lowest of 0.7 * 10 and more is the seventh of eleven norms."""
    keywords = {"rule": "quantile", "quantile": 0.7, "norm_window": 11}
    grads = [{"w": jnp.array([1.0 + k])} for k in range(12)]
    for tx in (
        partition_relative_clip("E5M2", **keywords),
        optax.inject_hyperparams(partition_relative_clip)("E5M2", **keywords),
    ):
        state, update = tx.init(grads[0]), WAYS[way](lambda g, s, tx=tx: tx.update(g, s, overflow_rate=1.0))
        for each in grads:
            _, state = update(each, state)
        assert float(optax.tree.get(state, "threshold")) == 8.0


# ---- what is checked


@pytest.mark.parametrize("kind", [float, np.float32, np.asarray, jnp.float32])
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"base_clip": -1.0}, "base_clip is -1.0"),
        ({"base_clip": 0.0}, "base_clip is 0.0"),
        ({"base_clip": math.nan}, "base_clip is nan"),
        ({"overflow_threshold": 5.0}, "overflow_threshold is 5.0"),
        ({"overflow_threshold": math.nan}, "overflow_threshold is nan"),
        ({"rule": "quantile", "quantile": 1.5}, "quantile is 1.5"),
        ({"max_norm": -1.0}, "max_norm is -1.0"),
        ({"max_norm": math.nan}, "max_norm is nan"),
        ({"max_norm": 1.0, "eps": -1.0}, "eps is -1.0"),
        ({"max_norm": 1.0, "eps": math.inf}, "eps is inf"),
        ({"max_norm": 1.0, "norm_type": -2.0}, "norm_type is -2.0"),
    ],
)
def test_numbers_are_checked_unless_they_are_traced(kind: Any, arguments: dict[str, Any], told: str) -> None:
    make = clip_by_global_norm if "max_norm" in arguments else lambda **each: partition_relative_clip("E5M2", **each)
    given = {name: kind(value) if isinstance(value, float) else value for name, value in arguments.items()}
    with pytest.raises(InputError, match=told):
        make(**given)
    with pytest.raises(InputError, match=told):
        jax.jit(lambda: make(**given).init(GRADS))()
    if kind is not jnp.float32 or "norm_type" in arguments:
        return
    assert jax.eval_shape(
        lambda each: make(**(arguments | each)).init(GRADS),
        {name: value for name, value in given.items() if isinstance(value, jax.Array)},
    )


@pytest.mark.parametrize("bad", [0, -1, True, 2.0, "2", jnp.float32(2), jnp.zeros(2, jnp.int32)])
def test_lengths_are_integers(bad: Any) -> None:
    for name, rule in (("window", "max"), ("norm_window", "quantile")):
        with pytest.raises(InputError, match=f"{name} (is|has the shape)"):
            partition_relative_clip("E5M2", rule=rule, **{name: bad})


@pytest.mark.parametrize("kind", [np.int64, np.float32, np.float16, jnp.float32, jnp.bfloat16, jnp.int32])
def test_numbers_of_any_kind(kind: Any) -> None:
    expected, tx = partition_relative_clip("E5M2", 2.0, 0.0), partition_relative_clip("E5M2", kind(2), kind(0))
    assert_same(
        tx.update(GRADS, tx.init(GRADS), overflow_rate=0.5),
        expected.update(GRADS, expected.init(GRADS), overflow_rate=0.5),
    )
    expected, tx = (
        clip_by_global_norm(2.0, 1.0, norm_type=1.0),
        clip_by_global_norm(kind(2), kind(1), norm_type=kind(1)),
    )
    assert_same(tx.update(GRADS, tx.init(GRADS)), expected.update(GRADS, expected.init(GRADS)))


def test_windows_of_any_integer_type() -> None:
    for kind in (int, np.int64, jnp.int32):
        tx = partition_relative_clip("E5M2", rule="quantile", window=kind(3), norm_window=kind(9))
        state = tx.init(GRADS)
        assert (state.amax_history.shape, state.norm_history.shape) == ((3, 2), (9,))


def test_bools_are_no_numbers() -> None:
    for bad in (True, np.True_, jnp.asarray(True)):
        with pytest.raises(InputError, match="base_clip is True"):
            partition_relative_clip("E5M2", bad)
        with pytest.raises(InputError, match="max_norm is True"):
            clip_by_global_norm(bad)


def test_what_is_no_single_number() -> None:
    tx = partition_relative_clip("E5M2")
    grouped = partition_relative_clip({".*": "E5M2"})
    pair = jnp.array([0.5])
    for name in ("overflow_rate", "total_norm"):
        with pytest.raises(InputError, match=rf"{name} has the shape \(1,\); expected one number"):
            tx.update(GRADS, tx.init(GRADS), **({"overflow_rate": 0.5} | {name: pair}))
        with pytest.raises(InputError, match=rf"{name} has the shape \(1,\)"):
            jax.jit(lambda g, s, x, name=name: tx.update(g, s, **{name: x}))(GRADS, tx.init(GRADS), pair)
        with pytest.raises(InputError, match=rf"{name} has the shape \(1,\)"):
            grouped.update(GRADS, grouped.init(GRADS), **{name: {".*": pair}})
        with pytest.raises(InputError, match=f"{name} is a mapping, but there are no groups; expected one number"):
            tx.update(GRADS, tx.init(GRADS), **{name: {".*": 0.5}})
    for name in ("base_clip", "overflow_threshold"):
        with pytest.raises(InputError, match=rf"{name} has the shape \(1,\)"):
            partition_relative_clip("E5M2", **{name: pair})
    with pytest.raises(InputError, match=r"max_norm has the shape \(1,\)"):
        clip_by_global_norm(pair)

"""The optax clippers: thresholds, gate, norm, and every way in which optax and JAX may wrap them."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from altgrad_core import FORMAT_REGISTRY, UnknownFormatError, clip_threshold
from altgrad_core.errors import InputError
from altgrad_jax import (
    FormatParams,
    clip_by_global_norm,
    global_norm,
    partition_relative_clip,
    set_format,
)
from altgrad_jax.clip_groups import format_threshold

ROOT = Path(__file__).resolve().parents[1]
FLOAT32_MAX = np.finfo(np.float32).max
GATE = 0.01
JUST_BELOW = float(np.nextafter(np.float32(GATE), np.float32(0)))
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def bits(x: Any) -> np.ndarray:
    x = np.asarray(x)
    return x.view(f"u{x.dtype.itemsize}")


def assert_same_bits(left: Any, right: Any) -> None:
    chex.assert_trees_all_equal(jax.tree.map(bits, left), jax.tree.map(bits, right))


def exact_norm(*leaves: Any) -> np.float32:
    """The norm by rational arithmetic, rounded once to float32, ties to even, at most float32's maximum."""
    total = sum((Fraction(float(x)) ** 2 for leaf in leaves for x in np.asarray(leaf).ravel()), Fraction(0))
    guess = np.float32(min(math.sqrt(total), float(FLOAT32_MAX)))
    below, above = np.nextafter(guess, np.float32(0)), np.nextafter(guess, FLOAT32_MAX)
    # sqrt(total) lies above a midpoint if total lies above its square.
    up = total - ((Fraction(float(guess)) + Fraction(float(above))) / 2) ** 2
    down = total - ((Fraction(float(guess)) + Fraction(float(below))) / 2) ** 2
    is_odd = bool(bits(guess) & 1)
    if guess < above and (up > 0 or (up == 0 and is_odd)):
        return above
    return below if down < 0 or (down == 0 and is_odd) else guess


def clipped_by_hand(leaf: Any, norm: np.float32, max_norm: float, eps: float = 1e-6) -> np.ndarray:
    """The documented rule in NumPy: float64 coefficient of the rounded norm, rounded once, one product."""
    coefficient = np.float32(min(1.0, float(max_norm) / (float(norm) + eps)))
    leaf = np.asarray(leaf)
    product = leaf.astype(np.float32) * coefficient
    if leaf.dtype == np.float32:
        product = np.where(np.abs(product) < 2.0**-126, np.copysign(np.float32(0), product), product)
    return product.astype(leaf.dtype)


def tree(seed: int = 0, scale: float = 1.0) -> dict[str, jax.Array]:
    draw = np.random.default_rng(seed)
    return {
        "w": jnp.asarray(draw.normal(size=(32, 40)) * scale, jnp.float32),
        "b": jnp.asarray(draw.normal(size=3) * scale, jnp.float32),
    }


# ---- the norm


NORM = jax.jit(global_norm)


@pytest.mark.parametrize("size", [1, 3, 1023, 1024, 5000])
@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e19, 1e-38])
def test_norm_is_the_exact_one(size: int, scale: float) -> None:
    x = (np.random.default_rng(size).normal(size=size) * scale).astype(np.float32)
    assert_same_bits(NORM([jnp.asarray(x)]), exact_norm(x))


@given(hnp.arrays(np.float32, 37, elements=st.floats(width=32, allow_nan=False, allow_infinity=False)))
def test_norm_of_any_finite_input(x: np.ndarray) -> None:
    assert_same_bits(NORM([jnp.asarray(x)]), exact_norm(x))


def test_norm_of_constants() -> None:
    x = np.full(100_000, 0.1, np.float32)
    total = Fraction(float(x[0])) ** 2 * x.size
    assert float(global_norm([jnp.asarray(x)])) == float(np.float32(math.sqrt(total)))


@pytest.mark.parametrize("count", [1, 7, 1500])
def test_norm_of_subnormals(count: int) -> None:
    x = np.random.default_rng(count).integers(1, 2**23, count).astype(np.uint32).view(np.float32)
    assert_same_bits(NORM([jnp.asarray(x)]), exact_norm(x))


def test_norm_of_subnormals_beside_normals() -> None:
    x = np.array([2.0**-126, 1e-39, -3e-42, 2.0**-126], np.float32)
    assert_same_bits(global_norm([jnp.asarray(x)]), exact_norm(x))


def test_huge_norm_is_the_largest_float_not_inf() -> None:
    assert_same_bits(global_norm([jnp.full(1000, 1e38)]), FLOAT32_MAX)
    assert_same_bits(global_norm([jnp.full(3, 1e38)]), exact_norm(np.full(3, 1e38, np.float32)))


def test_norm_of_mixed_dtypes_and_empty_leaves() -> None:
    draw = np.random.default_rng(1).normal(size=50)
    leaves = [jnp.asarray(draw, dtype) for dtype in DTYPES]
    mixed = {"all": leaves, "none": jnp.zeros((0, 4)), "scalar": jnp.float32(-2.5)}
    assert_same_bits(global_norm(mixed), exact_norm(*(np.asarray(leaf, np.float64) for leaf in leaves), -2.5))


@pytest.mark.parametrize("leaf", [np.zeros(5), np.zeros((0,)), np.array([-0.0])], ids=["zeros", "empty", "minus zero"])
def test_norm_of_nothing_is_zero(leaf: np.ndarray) -> None:
    assert_same_bits(global_norm([jnp.asarray(leaf, jnp.float32)]), np.float32(0))


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_norm_shows_what_is_not_finite(bad: float) -> None:
    norm = float(global_norm([jnp.ones(5), jnp.array([1.0, bad])]))
    assert math.isnan(norm) if math.isnan(bad) else norm == math.inf


@pytest.mark.parametrize("empty", [{}, [], (), None, {"a": []}])
def test_the_norm_of_an_empty_tree_is_an_error(empty: Any) -> None:
    with pytest.raises(ValueError, match="empty"):
        global_norm(empty)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.complex64, jnp.bool_])
def test_other_leaves_are_an_error(dtype: Any) -> None:
    tx = partition_relative_clip("E5M2")
    state, bad = tx.init([jnp.ones(2), jnp.ones(2)]), [jnp.ones(2), jnp.ones(2, dtype)]
    for use in (global_norm, tx.init, lambda t: tx.update(t, state), lambda t: tx.update(t, state, overflow_rate=1.0)):
        with pytest.raises(TypeError, match=jnp.dtype(dtype).name):
            use(bad)


# ---- the threshold


@pytest.mark.parametrize("name", [name for name in FORMAT_REGISTRY if name != "float32"])
def test_threshold_has_the_bits_of_core(name: str) -> None:
    params = FormatParams.from_format(name)
    # Multiples of 7 make quotients by 57344 = 7 * 2^13 exact, and so among them ties of the last rounding.
    bases = [0.1, 1.0, 1 / 3, 3.7, 1e-30, 1e20, *range(7, 7000, 497), *(7 * odd for odd in range(1082401, 1082481, 2))]
    got = THRESHOLD(params, tuple(map(float, bases)))
    assert_same_bits(got, [np.float32(clip_threshold(name, float(base))) for base in bases])


THRESHOLD = jax.jit(lambda params, bases: [format_threshold(params, base) for base in bases], static_argnums=1)


@pytest.mark.parametrize("name", ["E0M7", "E3M4", "E5M2", "E7M0"])
def test_clips_by_the_threshold_of_the_format(name: str) -> None:
    grads = tree(scale=1e4)
    tx = partition_relative_clip(name, base_clip=0.3)
    updates, state = jax.jit(lambda g, s: tx.update(g, s, overflow_rate=0.02))(grads, tx.init(grads))
    norm = exact_norm(*grads.values())
    assert_same_bits(state.total_norm, norm)
    assert_same_bits(updates, {k: clipped_by_hand(v, norm, clip_threshold(name, 0.3)) for k, v in grads.items()})
    assert bool(state.clipped)


def test_threshold_ratio() -> None:
    assert clip_threshold("E3M4") / clip_threshold("E5M2") == pytest.approx(124 / 57344)
    grads = {"w": jnp.array([3e3, 4e3])}
    narrow, wide = (
        tx.update(grads, tx.init(grads), overflow_rate=1.0)[0]["w"]
        for tx in (partition_relative_clip("E3M4"), partition_relative_clip("E7M0"))
    )
    assert 0 < float(jnp.linalg.norm(narrow)) < 0.00217
    assert_same_bits(wide, grads["w"])


def test_set_format_moves_the_threshold_and_traces_nothing() -> None:
    grads = tree(scale=1e4)
    tx = partition_relative_clip("E3M4")
    chex.clear_trace_counter()
    update = jax.jit(chex.assert_max_traces(lambda g, s: tx.update(g, s, overflow_rate=0.5), n=1))
    state = tx.init(grads)
    for name in ("E3M4", "E5M2", "E7M0", "E4M3"):
        state = set_format(state, name)
        updates, state = update(grads, state)
        norm = exact_norm(*grads.values())
        assert_same_bits(updates, {k: clipped_by_hand(v, norm, clip_threshold(name)) for k, v in grads.items()})


# ---- the gate


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_gate_of_a_given_rate(wrap: Callable[..., Any]) -> None:
    grads = tree()
    tx = partition_relative_clip("E3M4")
    update = wrap(lambda g, s, rate: tx.update(g, s, overflow_rate=rate))
    for rate, is_open in ((0.0, False), (JUST_BELOW, False), (GATE, True), (np.float32(GATE), True), (1, True)):
        updates, state = update(grads, tx.init(grads), rate)
        assert bool(state.clipped) is is_open, rate
        assert float(state.overflow_rate) == np.float32(rate)
        assert float(state.total_norm) == (exact_norm(*grads.values()) if is_open else -1.0)
        if not is_open:
            assert_same_bits(updates, grads)


@pytest.mark.parametrize(("count", "is_open"), [(99, True), (100, True), (101, False)])
def test_gate_of_a_measured_rate(count: int, is_open: bool) -> None:
    tx = partition_relative_clip("E5M2")
    calm = {"w": jnp.ones(count)}
    update = jax.jit(tx.update)
    updates, state = update(calm, tx.init(calm))
    assert (float(state.overflow_rate), bool(state.clipped)) == (0.0, False)
    assert_same_bits(updates, calm)
    spike = {"w": calm["w"].at[5].set(1e9)}
    updates, state = update(spike, state)
    assert float(state.overflow_rate) == np.float32(1 / count)
    assert bool(state.clipped) is is_open
    assert float(jnp.max(updates["w"])) == (1.0 if is_open else 1e9)


def test_measured_rate_starts_at_zero_whatever_the_first_gradient() -> None:
    tx = partition_relative_clip("E0M7")
    grads = {"a": jnp.full(10, 1e30), "b": jnp.array([jnp.inf])}
    _, state = jax.jit(tx.update)(grads, tx.init(grads))
    assert float(state.overflow_rate) == 0
    assert float(state.total_norm) == -1


def test_history_refuses_what_is_not_finite() -> None:
    tx = partition_relative_clip("E5M2", window=3)
    state = tx.init({"w": jnp.ones(4)})
    update = jax.jit(tx.update)
    for value in (2.0, math.inf, math.nan):
        updates, state = update({"w": jnp.full(4, value)}, state)
    np.testing.assert_array_equal(state.amax_history, [[2.0], [2.0], [2.0]])
    assert bool(jnp.all(jnp.isnan(updates["w"])))  # clipping does not hide a failure


def test_given_rate_leaves_the_history_alone() -> None:
    grads = tree()
    tx = partition_relative_clip("E5M2")
    _, state = jax.jit(tx.update)(grads, tx.init(grads))
    _, after = tx.update(tree(scale=100.0), state, overflow_rate=0.0)
    assert_same_bits(after.amax_history, state.amax_history)


def test_total_norm_is_never_stale() -> None:
    grads = tree()
    tx = optax.chain(partition_relative_clip("E5M2"), optax.sgd(1.0))
    state = tx.init(grads)
    assert float(optax.tree.get(state, "total_norm")) == -1.0
    for rate, expected in ((1.0, exact_norm(*grads.values())), (0.0, -1.0)):
        _, state = tx.update(grads, state, grads, overflow_rate=rate)
        assert float(optax.tree.get(state, "total_norm")) == expected
        assert bool(optax.tree.get(state, "clipped")) is (rate == 1.0)


@pytest.mark.parametrize("scale", [1e-42, 1.0, 1e19])
@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_a_given_norm_is_not_taken_again(rate: float, scale: float) -> None:
    grads = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf) * np.float32(scale)), tree())
    tx = partition_relative_clip("E3M4")
    update = jax.jit(lambda norm: tx.update(grads, tx.init(grads), overflow_rate=rate, total_norm=norm))
    given, state = update(global_norm(grads))
    taken, seen = tx.update(grads, tx.init(grads), overflow_rate=rate)
    assert_same_bits(given, taken)
    assert_same_bits(state.total_norm, exact_norm(*grads.values()))
    assert bool(state.clipped) is bool(seen.clipped) is (rate == 1.0)
    _, state = update(jnp.float32(np.nan))
    assert bool(jnp.isnan(state.total_norm))


def test_bad_norms() -> None:
    grads = tree()
    tx = partition_relative_clip("E3M4")
    with pytest.raises(InputError, match=r"total_norm is -1\.0; expected a norm"):
        tx.update(grads, tx.init(grads), overflow_rate=1.0, total_norm=-1.0)
    tx = partition_relative_clip("E3M4", nonfinite="zero")
    with pytest.raises(InputError, match="total_norm does not go with nonfinite='zero'"):
        tx.update(grads, tx.init(grads), overflow_rate=1.0, total_norm=1.0)
    tx = partition_relative_clip({".*": "E3M4"})
    with pytest.raises(InputError, match=r"total_norm is one for all groups; expected a mapping to that of each: \.\*"):
        tx.update(grads, tx.init(grads), overflow_rate=1.0, total_norm=1.0)
    with pytest.raises(InputError, match=r"total_norm is given for w; expected \.\*"):
        tx.update(grads, tx.init(grads), overflow_rate=1.0, total_norm={"w": 1.0})
    _, state = tx.update(grads, tx.init(grads), overflow_rate=0.0, total_norm={".*": 2.0})
    assert float(state.groups[".*"].total_norm) == 2.0


def test_shut_gate_touches_no_bit() -> None:
    x = np.array([1e-45, -1e-40, -0.0, 3.0, np.inf], np.float32)
    strange = jnp.asarray(np.concatenate([x, np.array([0x7FC12345, 0xFF812345], np.uint32).view(np.float32)]))
    grads = {"w": strange, "h": strange.astype(jnp.bfloat16)}
    tx = partition_relative_clip("E3M4")
    updates, _ = jax.jit(lambda g, s: tx.update(g, s, overflow_rate=JUST_BELOW))(grads, tx.init(grads))
    assert_same_bits(updates, grads)


def test_traced_nan_rate_opens_the_gate() -> None:
    grads = tree()
    tx = partition_relative_clip("E3M4")
    _, state = jax.jit(lambda rate: tx.update(grads, tx.init(grads), overflow_rate=rate))(math.nan)
    assert bool(state.clipped)
    assert float(state.total_norm) == exact_norm(*grads.values())


@pytest.mark.parametrize("rate", [math.nan, -1e-9, 1.0001, math.inf, jnp.float32(2), np.float32(np.nan)])
def test_bad_concrete_rate_is_an_error(rate: float) -> None:
    grads = tree()
    tx = partition_relative_clip("E3M4")
    with pytest.raises(ValueError, match=r"overflow_rate is .*expected a fraction from 0\.0 to 1\.0"):
        tx.update(grads, tx.init(grads), overflow_rate=rate)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"base_clip": 0.0}, "base_clip is 0.0"),
        ({"base_clip": -1.0}, "base_clip is -1.0"),
        ({"base_clip": math.nan}, "base_clip is nan"),
        ({"base_clip": math.inf}, "base_clip is inf"),
        ({"base_clip": 1e39}, r"base_clip is 1e\+39"),
        ({"base_clip": 1e-50}, "base_clip is 1e-50"),
        ({"overflow_threshold": 1.5}, "overflow_threshold is 1.5"),
        ({"overflow_threshold": math.nan}, "overflow_threshold is nan"),
    ],
)
def test_bad_arguments(arguments: dict[str, float], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        partition_relative_clip("E5M2", **arguments)


def test_other_bad_arguments() -> None:
    with pytest.raises(UnknownFormatError, match="E5M2"):
        partition_relative_clip("e5m2")
    with pytest.raises(ValueError, match="window is 0"):
        partition_relative_clip("E5M2", window=0).init([jnp.ones(1)])
    for bad in (-1.0, math.nan):
        with pytest.raises(ValueError, match="max_norm"):
            clip_by_global_norm(bad)
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="eps"):
            clip_by_global_norm(1.0, bad)


# ---- dtypes


MEASURED, GIVEN = {}, {"overflow_rate": 0.5}


def measured_or_given(dtypes: Sequence[Any], *in_every_run: tuple[dict[str, float], Any]) -> list[Any]:
    """All combinations of arguments and dtypes; but for those that are named, for the exhaustive tests."""
    return [
        pytest.param(arguments, dtype, marks=() if (arguments, dtype) in in_every_run else pytest.mark.exhaustive)
        for arguments in (MEASURED, GIVEN)
        for dtype in dtypes
    ]


@pytest.mark.parametrize(
    ("arguments", "dtype"),
    measured_or_given(DTYPES, (MEASURED, jnp.bfloat16), (GIVEN, jnp.float32), (GIVEN, jnp.float16)),
)
def test_dtype_is_kept(arguments: dict[str, float], dtype: Any) -> None:
    grads = {"w": tree()["w"].astype(dtype)}
    tx = partition_relative_clip("E3M4")
    updates, state = jax.jit(lambda g, s: tx.update(g, s, **arguments))(grads, tx.init(grads))
    norm = exact_norm(np.asarray(grads["w"], np.float64))
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, grads)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(grads))
    if arguments:
        assert_same_bits(updates["w"], clipped_by_hand(grads["w"], norm, clip_threshold("E3M4")))


@pytest.mark.parametrize(
    ("arguments", "dtype"),
    measured_or_given(
        [jnp.float64, *DTYPES],
        (MEASURED, jnp.float64),
        (GIVEN, jnp.float64),
        (MEASURED, jnp.float32),
        (MEASURED, jnp.float16),
        (GIVEN, jnp.bfloat16),
    ),
)
def test_all_of_it_under_x64(arguments: dict[str, float], dtype: Any) -> None:
    with jax.enable_x64(True):
        grads = {"w": jnp.asarray(np.random.default_rng(0).normal(size=300), dtype)}
        tx = partition_relative_clip("E3M4")
        state = tx.init(grads)
        update = jax.jit(lambda g, s: tx.update(g, s, **arguments))
        for factor in (1, 1000):
            scaled = jax.tree.map(lambda leaf, factor=factor: leaf * jnp.asarray(factor, dtype), grads)
            updates, after = update(scaled, state)
            chex.assert_trees_all_equal_shapes_and_dtypes((updates, after), (grads, state))
            state = after
        norm = exact_norm(np.asarray(scaled["w"], np.float64))
        assert_same_bits(state.total_norm, norm)
        assert bool(state.clipped)
        if dtype == jnp.float64:
            coefficient = clip_threshold("E3M4") / (float(norm) + 1e-6)
            assert_same_bits(updates["w"], np.asarray(scaled["w"]) * coefficient)
        else:
            assert_same_bits(updates["w"], clipped_by_hand(scaled["w"], norm, clip_threshold("E3M4")))


@pytest.mark.parametrize("arguments", [{}, {"overflow_rate": 0.5}], ids=["measured", "given"])
def test_strict_promotion(arguments: dict[str, float]) -> None:
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        grads = {"w": tree()["w"], "h": jnp.ones((2, 3), jnp.bfloat16)}
        tx = partition_relative_clip("E3M4")
        seen = jax.eval_shape(lambda g, s: tx.update(g, s, **arguments), grads, tx.init(grads))
    chex.assert_trees_all_equal_shapes_and_dtypes(seen, (grads, tx.init(grads)))


# ---- clip_by_global_norm


@pytest.mark.parametrize("max_norm", [0.0, 1e-3, 1.0, 1e6])
def test_clip_by_global_norm(max_norm: float) -> None:
    tx = clip_by_global_norm(max_norm)
    update = jax.jit(tx.update)
    for scale in (1.0, 1e19, 1e-20):
        grads = tree(scale=scale)
        updates, state = update(grads, tx.init(grads))
        norm = exact_norm(*grads.values())
        assert_same_bits(state.total_norm, norm)
        assert_same_bits(updates, {k: clipped_by_hand(v, norm, max_norm) for k, v in grads.items()})


def test_clip_to_zero() -> None:
    tx = clip_by_global_norm(0)
    updates, _ = tx.update({"w": jnp.array([3.0, -4.0, 0.0])}, tx.init({"w": jnp.zeros(3)}))
    assert_same_bits(updates["w"], np.array([0.0, -0.0, 0.0], np.float32))


def test_zero_gradients_stay_zero() -> None:
    tx = clip_by_global_norm(1.0)
    updates, state = tx.update({"w": jnp.zeros(3)}, tx.init({"w": jnp.zeros(3)}))
    assert float(state.total_norm) == 0
    assert_same_bits(updates["w"], np.zeros(3, np.float32))


# ---- derivatives


DIFFERENTIABLE: dict[str, tuple[Callable[[Any], Any], dict[str, float]]] = {
    "clip": (lambda limit: clip_by_global_norm(limit, 0.0), {}),
    "clip, eps": (clip_by_global_norm, {}),
    "relative": (lambda limit: partition_relative_clip("E5M2", limit), {"overflow_rate": 0.5}),
    "groups": (lambda limit: partition_relative_clip({".*": "E5M2"}, limit), {"overflow_rate": 0.5}),
}
WEIGHTS = tree(7)


def clipped_sum(tx: Any, updates: Any, **rate: float) -> jax.Array:
    clipped, _ = tx.update(updates, tx.init(updates), **rate)
    return sum(jax.tree.leaves(jax.tree.map(lambda w, u: jnp.sum(w * u), WEIGHTS, clipped)), jnp.float32(0))


def by_optax(limit: jax.typing.ArrayLike, updates: Any) -> jax.Array:
    return clipped_sum(optax.clip_by_global_norm(limit), updates)


def second_order(f: Callable[..., jax.Array]) -> Callable[..., Any]:
    return jax.grad(lambda limit, updates: jnp.sum(jax.grad(f, 1)(limit, updates)["w"] ** 2), argnums=(0, 1))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("limit", [0.5, 1e6])
def test_derivatives_are_those_of_optax(name: str, limit: float) -> None:
    """With respect to updates and the limit, of first and second order."""
    make, rate = DIFFERENTIABLE[name]

    def ours(limit: Any, updates: Any) -> jax.Array:
        return clipped_sum(make(limit), updates, **rate)

    for derive in (lambda f: jax.grad(f, (0, 1)), second_order):
        actual, expected = (jax.jit(derive(f))(jnp.float32(limit), tree(3)) for f in (ours, by_optax))
        chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_derivatives_at_limits_of_zero_and_infinity() -> None:
    of = jax.grad(lambda limit, updates: clipped_sum(clip_by_global_norm(limit, 0.0), updates), (0, 1))
    chex.assert_trees_all_close(of(0.0, tree(3)), jax.grad(by_optax, (0, 1))(0.0, tree(3)), rtol=1e-5)
    chex.assert_trees_all_equal(of(jnp.float32(math.inf), tree(3)), (jnp.float32(0), WEIGHTS))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_what_is_clipped_does_not_move_with_the_scale(name: str) -> None:
    make, rate = DIFFERENTIABLE[name]

    def of(scale: jax.typing.ArrayLike) -> jax.Array:
        return clipped_sum(make(0.5), jax.tree.map(lambda leaf: leaf * scale, tree(3)), **rate)

    np.testing.assert_allclose(jax.grad(of)(2.0), 0, atol=2e-5)


def test_a_shut_gate_passes_derivatives() -> None:
    tx = partition_relative_clip("E5M2", 0.5)
    of = jax.jit(jax.grad(lambda updates, rate: clipped_sum(tx, updates, overflow_rate=rate)))
    chex.assert_trees_all_equal(of(tree(3), 0.0), WEIGHTS)
    chex.assert_trees_all_close(of(tree(3), 0.5), jax.grad(by_optax, 1)(0.5, tree(3)), rtol=1e-4, atol=1e-5)


def test_a_norm_that_is_given_has_a_derivative() -> None:
    tx = partition_relative_clip("E5M2", 0.5)

    def with_norm(updates: Any) -> jax.Array:
        clipped, _ = tx.update(updates, tx.init(updates), overflow_rate=0.5, total_norm=global_norm(updates))
        return jnp.sum((9 * clipped["w"]) ** 3)

    def plain(updates: Any) -> jax.Array:
        return jnp.sum((9 * optax.clip_by_global_norm(0.5).update(updates, optax.EmptyState())[0]["w"]) ** 3)

    chex.assert_trees_all_close(jax.grad(with_norm)(tree(3)), jax.grad(plain)(tree(3)), rtol=1e-4, atol=1e-6)


def test_derivatives_with_respect_to_eps() -> None:
    def of(eps: jax.typing.ArrayLike) -> jax.Array:
        tx = clip_by_global_norm(1.0, eps)
        return jnp.sum(tx.update(jnp.array([3.0, 4.0]), tx.init(jnp.zeros(2)))[0])

    np.testing.assert_allclose(jax.grad(of)(0.5), -7 / 5.5**2, 1e-6)


@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_zero_updates_have_finite_derivatives(eps: float) -> None:
    tx, zeros = clip_by_global_norm(1.0, eps), jax.tree.map(jnp.zeros_like, WEIGHTS)
    chex.assert_trees_all_equal(jax.grad(lambda updates: clipped_sum(tx, updates))(zeros), WEIGHTS)


@pytest.mark.parametrize("rule", ["max", "binades", "scaled_max", "quantile"])
def test_derivatives_through_steps(rule: Any) -> None:
    """Of all steps together by base_clip and by the first gradient, thresholds that are still inf among them."""

    def of(base: jax.typing.ArrayLike, scale: jax.typing.ArrayLike) -> jax.Array:
        tx = partition_relative_clip("E5M2", base, rule=rule)

        def step(state: Any, factor: jax.Array) -> tuple[Any, jax.Array]:
            updates, state = tx.update(jnp.array([3.0, 4.0]) * factor * scale, state, overflow_rate=0.5)
            return state, jnp.sum(updates**3)

        return jnp.sum(jax.lax.scan(step, tx.init(jnp.zeros(2)), jnp.linspace(1.1, 1.9, 12))[1])

    by_base, by_scale = jax.jit(jax.grad(of, (0, 1)))(0.25, 1.0)
    for derivative, low, high in (
        (by_base, of(0.249, 1.0), of(0.251, 1.0)),
        (by_scale, of(0.25, 0.999), of(0.25, 1.001)),
    ):
        np.testing.assert_allclose(derivative, (high - low) / 0.002, 5e-3, 0.05)


# ---- inside optax and JAX


def test_order_in_a_chain() -> None:
    grads = tree(scale=100.0)
    tx = optax.chain(partition_relative_clip("E5M2"), optax.sgd(0.5))
    updates, _ = jax.jit(lambda g, s: tx.update(g, s, overflow_rate=0.02))(grads, tx.init(grads))
    norm = exact_norm(*grads.values())
    assert_same_bits(updates, {k: clipped_by_hand(v, norm, 1.0) * np.float32(-0.5) for k, v in grads.items()})


def test_vmap_over_runs() -> None:
    grads = [tree(seed, scale=100.0) for seed in range(4)]
    formats, rates = ["E3M4", "E5M2", "E7M0", "E5M2"], [0.5, 0.5, 0.5, 0.0]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *grads)
    tx = partition_relative_clip("E5M2")
    states = set_format(jax.vmap(tx.init)(stacked), formats)
    updates, after = jax.jit(jax.vmap(lambda g, s, r: tx.update(g, s, overflow_rate=r)))(
        stacked, states, jnp.array(rates)
    )
    for k, (one, name, rate) in enumerate(zip(grads, formats, rates, strict=True)):
        alone = partition_relative_clip(name)
        expected = alone.update(one, alone.init(one), overflow_rate=rate)
        assert_same_bits(jax.tree.map(lambda leaf, k=k: leaf[k], (updates, after)), expected)


def test_scan_over_steps() -> None:
    grads = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(tree(k, scale=10.0**k) for k in (0, 0, 4, 1)))
    tx = partition_relative_clip("E4M3", window=2)
    first = tx.init(tree())
    final, seen = jax.lax.scan(lambda s, g: (lambda u, s: (s, (u, s.clipped)))(*tx.update(g, s)), first, grads)
    state, update = first, jax.jit(tx.update)
    for k in range(4):
        updates, state = update(jax.tree.map(lambda leaf, k=k: leaf[k], grads), state)
        assert_same_bits(jax.tree.map(lambda leaf, k=k: leaf[k], seen), (updates, state.clipped))
    assert_same_bits(final, state)
    assert np.asarray(seen[1]).tolist() == [False, False, True, False]


def test_multi_steps_clips_the_mean() -> None:
    grads = [tree(seed, scale=100.0) for seed in (1, 2)]
    tx = optax.MultiSteps(partition_relative_clip("E5M2"), every_k_schedule=2)
    state = tx.init(grads[0])
    update = jax.jit(lambda g, s: tx.update(g, s, overflow_rate=0.02))
    for one in grads:
        updates, state = update(one, state)
    mean = {k: (grads[0][k] + grads[1][k]) / 2 for k in grads[0]}
    assert_same_bits(optax.tree.get(state, "total_norm"), exact_norm(*mean.values()))
    assert float(global_norm(updates)) == pytest.approx(1.0, rel=1e-5)


def test_partition_clips_its_part_alone() -> None:
    grads = tree(scale=100.0)
    parts = {"clip": partition_relative_clip("E5M2"), "rest": optax.identity()}
    tx = optax.partition(parts, {"w": "clip", "b": "rest"})
    updates, state = jax.jit(lambda g, s: tx.update(g, s, g, overflow_rate=0.02))(grads, tx.init(grads))
    norm = exact_norm(grads["w"])
    assert_same_bits(optax.tree.get(state, "total_norm"), norm)
    assert_same_bits(updates, {"w": clipped_by_hand(grads["w"], norm, 1.0), "b": grads["b"]})


def test_beside_injected_hyperparameters() -> None:
    grads = tree(scale=100.0)
    tx = optax.chain(partition_relative_clip("E5M2"), optax.inject_hyperparams(optax.sgd)(learning_rate=0.5))
    state = set_format(tx.init(grads), "E3M4")
    updates, state = jax.jit(lambda g, s: tx.update(g, s, overflow_rate=0.02))(grads, state)
    norm = exact_norm(*grads.values())
    expected = {k: clipped_by_hand(v, norm, clip_threshold("E3M4")) * np.float32(-0.5) for k, v in grads.items()}
    assert_same_bits(updates, expected)


SHARDED = """
import hashlib, json
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from altgrad_jax import partition_relative_clip

draw = np.random.default_rng(0)
base = {"w": draw.normal(size=(64, 48)), "v": draw.lognormal(size=(16, 8)), "b": draw.normal(size=3)}
specs = {"w": P("data"), "v": P(None, "data"), "b": P()}
tx = partition_relative_clip("E3M4")

def seen(devices):
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
    place = lambda factor: {
        k: jax.device_put(jnp.asarray(v * factor, jnp.float32), NamedSharding(mesh, specs[k])) for k, v in base.items()
    }
    state, lines = tx.init(place(1)), []
    measured = jax.jit(lambda g, s: tx.update(g, s))
    given = jax.jit(lambda g, s, rate: tx.update(g, s, overflow_rate=rate))
    for factor, rate in ((1, None), (1e4, None), (1, 0.5), (1e19, 0.01), (1, 0.0)):
        grads = place(factor)
        updates, state = measured(grads, state) if rate is None else given(grads, state, rate)
        assert all(updates[k].sharding.is_equivalent_to(grads[k].sharding, updates[k].ndim) for k in base)
        raw = b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves((updates, state)))
        lines.append([float(state.total_norm), bool(state.clipped), hashlib.sha256(raw).hexdigest()])
    return lines

print(json.dumps({n: seen(n) for n in (1, 2, 8)}))
"""


@pytest.mark.exhaustive  # tests/test_distribution_jax.py compares norms and clipped gradients of a mesh every time
def test_devices_do_not_matter() -> None:
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SHARDED],
        cwd=ROOT,
        env={**os.environ, **flags},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert [line[1] for line in seen["1"]] == [False, True, True, True, False]
    assert seen["1"] == seen["2"] == seen["8"]

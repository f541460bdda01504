"""Skipped steps, weights on the grid, snapshots: what keeps a run alive."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from altgrad_core import parse
from altgrad_core.errors import InputError
from altgrad_core.formats import EIGHT
from altgrad_core.reference import quantize_reference
from altgrad_jax import (
    FormatParams,
    Snapshots,
    all_finite,
    commit,
    get_format,
    partition_relative_clip,
    power_of_two_scale,
    reset_moments,
    rollback,
    select_if_finite,
    set_format,
    skip_nonfinite,
    snapshot,
    stall_monitor,
)

ROUNDINGS = ("nearest_even", "nearest_away", "toward_zero", "stochastic")
BAD = (np.nan, np.inf, -np.inf)
PARAMS = {"w": jnp.array([1.0, -2.0, 3.0]), "b": jnp.array([0.5])}


def bits(tree: Any) -> Any:
    return jax.tree.map(lambda x: np.asarray(x).view(f"u{x.dtype.itemsize}"), tree)


def assert_same_bits(left: Any, right: Any) -> None:
    chex.assert_trees_all_equal(bits(left), bits(right))


def gradients(count: int, bad_at: tuple[int, ...] = (), bad: float = np.nan) -> dict[str, jax.Array]:
    draw = np.random.default_rng(0)
    w, b = draw.normal(size=(count, 3)).astype(np.float32), draw.normal(size=(count, 1)).astype(np.float32)
    w[list(bad_at), 1] = bad
    return {"w": jnp.asarray(w), "b": jnp.asarray(b)}


def trained(tx: Any, grads: dict[str, jax.Array]) -> tuple[Any, Any]:
    def step(carry: Any, grads: Any) -> tuple[Any, None]:
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.jit(lambda: jax.lax.scan(step, (PARAMS, tx.init(PARAMS)), grads)[0])()


# ---- skip_nonfinite


@pytest.mark.parametrize("bad", BAD)
def test_skipped_steps_leave_no_trace(bad: float) -> None:
    grads = gradients(8, bad_at=(0, 3, 4, 7), bad=bad)
    good = jax.tree.map(lambda leaf: leaf[np.array([1, 2, 5, 6])], grads)
    params, state = trained(skip_nonfinite(optax.adamw(0.1)), grads)
    expected_params, expected_state = trained(optax.adamw(0.1), good)
    assert_same_bits((params, state.inner_state), (expected_params, expected_state))
    assert (int(state.skipped), int(state.consecutive), bool(state.finite)) == (4, 1, False)


def test_finite_steps_are_those_of_the_inner_transformation() -> None:
    params, state = trained(skip_nonfinite(optax.adamw(0.1)), gradients(5))
    expected_params, expected_state = trained(optax.adamw(0.1), gradients(5))
    assert_same_bits((params, state.inner_state), (expected_params, expected_state))
    assert (int(state.skipped), int(state.consecutive), bool(state.finite)) == (0, 0, True)


def test_same_as_optax_until_that_gives_in() -> None:
    grads = gradients(9, bad_at=(1, 2, 3, 6))
    ours, _ = trained(skip_nonfinite(optax.adam(0.1)), grads)
    theirs, _ = trained(optax.apply_if_finite(optax.adam(0.1), max_consecutive_errors=5), grads)
    assert_same_bits(ours, theirs)


def test_never_gives_in() -> None:
    grads = jax.tree.map(
        lambda leaf: jnp.concatenate([leaf, jnp.ones_like(leaf[:1])]), gradients(1000, tuple(range(1000)))
    )
    tx = skip_nonfinite(optax.adam(0.1))
    params, state = trained(tx, grads)
    expected, _ = trained(optax.adam(0.1), jax.tree.map(lambda leaf: leaf[-1:], grads))
    assert_same_bits(params, expected)
    assert (int(state.skipped), int(state.consecutive)) == (1000, 0)
    given_in, _ = trained(optax.apply_if_finite(optax.adam(0.1), max_consecutive_errors=5), grads)
    assert not bool(all_finite(given_in))


def test_counts_reset_when_finite() -> None:
    tx = skip_nonfinite(optax.sgd(1.0))
    state = tx.init(PARAMS)
    seen = []
    for bad in (True, True, False, True):
        updates, state = tx.update(jax.tree.map(lambda leaf, bad=bad: leaf * jnp.where(bad, jnp.nan, 1), PARAMS), state)
        seen.append((int(state.consecutive), int(state.skipped), bool(state.finite), float(updates["b"][0])))
    assert seen == [(1, 1, False, 0.0), (2, 2, False, 0.0), (0, 2, True, -0.5), (1, 3, False, 0.0)]


def test_a_fresh_state_may_be_donated() -> None:
    tx = skip_nonfinite(optax.sgd(1.0))
    _, state = jax.jit(tx.update, donate_argnums=1)(PARAMS, tx.init(PARAMS))
    assert int(state.skipped) == 0


def test_extra_arguments_pass_through() -> None:
    tx = skip_nonfinite(optax.chain(partition_relative_clip("E3M4"), optax.sgd(1.0)))
    _, state = jax.jit(lambda rate: tx.update(PARAMS, tx.init(PARAMS), PARAMS, overflow_rate=rate))(0.5)
    assert bool(optax.tree.get(state, "clipped"))


def test_skip_under_vmap() -> None:
    tx = skip_nonfinite(optax.sgd(0.1, momentum=0.9))
    grads = {"w": jnp.array([[1.0, jnp.nan, 0.0], [1.0, 2.0, 3.0]]), "b": jnp.ones((2, 1))}
    updates, state = jax.vmap(lambda g: tx.update(g, tx.init(PARAMS), PARAMS))(grads)
    assert state.skipped.tolist() == [1, 0]
    assert updates["w"][0].tolist() == [0.0, 0.0, 0.0]
    alone, _ = tx.update(jax.tree.map(lambda leaf: leaf[1], grads), tx.init(PARAMS), PARAMS)
    assert_same_bits(jax.tree.map(lambda leaf: leaf[1], updates), alone)


def test_strict_promotion_and_x64() -> None:
    tx = skip_nonfinite(optax.sgd(0.1, momentum=0.9))
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        updates, state = jax.jit(tx.update)(PARAMS, tx.init(PARAMS), PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes((updates, state), (PARAMS, tx.init(PARAMS)))
    with jax.enable_x64(True):
        wide = {"w": jnp.ones(2, jnp.float64), "h": jnp.ones(2, jnp.bfloat16)}
        updates, state = jax.jit(tx.update)(wide, tx.init(wide), wide)
        chex.assert_trees_all_equal_shapes_and_dtypes((updates, state), (wide, tx.init(wide)))


@pytest.mark.parametrize("bad", [1.0, np.nan])
@pytest.mark.parametrize(
    ("inner", "dtype", "of_params"),
    [
        (optax.adamw(0.1), jnp.bfloat16, jnp.float32),
        (optax.sgd(0.1, momentum=0.9), jnp.float32, jnp.bfloat16),  # its moments are of bfloat16 until the first step
        (optax.chain(optax.noisy_sgd(0.1, key=jax.random.key(0)), optax.scale(1.0)), jnp.float16, jnp.float32),
    ],
    ids=["adamw", "momentum", "noise"],
)
def test_updates_have_the_dtypes_of_the_inner_ones(inner: Any, dtype: Any, of_params: Any, bad: float) -> None:
    params = jax.tree.map(lambda leaf: leaf.astype(of_params), PARAMS)
    grads = jax.tree.map(lambda leaf: (leaf * bad).astype(dtype), PARAMS)
    tx = skip_nonfinite(inner)
    expected, inner_state = inner.update(grads, inner.init(params), params)
    for wrap in (jax.jit, lambda update: update):
        updates, state = wrap(tx.update)(grads, tx.init(params), params)
        chex.assert_trees_all_equal_shapes_and_dtypes((updates, state.inner_state), (expected, inner_state))
        assert bool(state.finite) is (bad == 1.0)
        if not state.finite:
            assert not any(leaf.any() for leaf in jax.tree.leaves(updates))
            jax.tree.map(np.testing.assert_array_equal, raw(state.inner_state), raw(inner.init(params)))


def raw(tree: Any) -> Any:
    """The tree with the words of its PRNG keys."""
    is_key = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)  # noqa: E731
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if is_key(leaf) else leaf, tree)


def test_integers_pass_beside_what_is_skipped() -> None:
    tx = skip_nonfinite(optax.identity())
    grads = {"steps": jnp.arange(3), "w": jnp.array([1.0, 2.0])}
    updates, _ = tx.update(grads, tx.init(grads))
    jax.tree.map(np.testing.assert_array_equal, updates, grads)
    updates, _ = tx.update({**grads, "w": grads["w"] * jnp.nan}, tx.init(grads))
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, grads)
    assert not any(leaf.any() for leaf in jax.tree.leaves(updates))


def test_half_precision_is_skipped_inside_shard_map() -> None:
    inner = optax.stateless(lambda updates, params: jax.tree.map(lambda leaf: leaf.astype(jnp.float32), updates))
    tx = skip_nonfinite(inner, axis_name="data")
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    spec = jax.sharding.PartitionSpec("data")
    update = jax.shard_map(lambda x: tx.update(x, tx.init(x))[0], mesh=mesh, in_specs=spec, out_specs=spec)
    assert jax.jit(update)(jnp.array([1.0, jnp.nan], jnp.bfloat16)).tolist() == [0.0, 0.0]


# ---- all_finite, select_if_finite


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_all_finite(bad: float, dtype: Any) -> None:
    assert bool(all_finite({"w": jnp.ones(3, dtype), "n": jnp.arange(2), "none": jnp.zeros((0, 2))}))
    assert not bool(all_finite([jnp.ones(3), jnp.array([1.0, bad], dtype)]))
    assert bool(all_finite({"n": jnp.arange(2)}))
    assert bool(all_finite([jnp.ones(2, "float4_e2m1fn"), jnp.ones(3, "float4_e2m1fn"), jnp.ones(2, "float8_e5m2")]))


def test_select_takes_all_or_nothing() -> None:
    old = {"params": PARAMS, "count": jnp.int32(3), "flag": jnp.asarray(True)}
    new = jax.tree.map(lambda leaf: leaf * jnp.asarray(jnp.nan if leaf.dtype == jnp.float32 else 0, leaf.dtype), old)
    for ok, expected in ((True, new), (False, old)):
        got = jax.jit(select_if_finite)(jnp.asarray(ok), new, old)
        assert_same_bits(got, expected)
        chex.assert_trees_all_equal_shapes_and_dtypes(got, old)


# ---- commit


def weights(seed: int = 0, size: int = 300) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return (draw.normal(size=size) * 10.0 ** draw.uniform(-3, 0, size)).astype(np.float32)


COMMIT = jax.jit(lambda params, grid, seed: commit(params, grid, {"w": True, "b": False}, seed=seed))


def committed(w: np.ndarray, name: str, rounding: Any, seed: int = 0) -> np.ndarray:
    grid = FormatParams.from_format(name, rounding=rounding, overflow="saturate_finite", path="integer")
    return np.asarray(COMMIT({"w": jnp.asarray(w), "b": jnp.ones(2)}, grid, jnp.uint32(seed))["w"])


@pytest.mark.parametrize("name", EIGHT)
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 3e4])
def test_committed_weights_are_on_the_grid(name: str, rounding: Any, scale: float) -> None:
    w = weights() * np.float32(scale)
    unit = float(power_of_two_scale(np.max(np.abs(w)), parse(name).max_representable_value))
    got = committed(w, name, rounding)
    grid = parse(name).code_book()
    assert np.isin(got.astype(np.float64) / unit, grid[np.isfinite(grid)]).all()
    assert len(np.unique(got)) > 3
    if rounding == "nearest_even":
        expected = quantize_reference(w.astype(np.float64) / unit, parse(name), overflow="saturate_finite") * unit
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("name", EIGHT)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_committing_again_changes_nothing(name: str, rounding: Any) -> None:
    for seed in range(5):
        once = committed(weights(seed), name, rounding, seed)
        assert_same_bits(committed(once, name, rounding, seed + 100), once)


@pytest.mark.parametrize("name", EIGHT)
def test_stochastic_rounding_is_unbiased(name: str) -> None:
    w = weights(size=40)
    grid = FormatParams.from_format(name, rounding="stochastic", overflow="saturate_finite")
    steps = jnp.arange(2000)
    draw = jax.jit(jax.vmap(lambda step: commit(jnp.asarray(w), grid, True, seed=1, step=step)))
    drawn = np.asarray(draw(steps), np.float64)
    unit = float(power_of_two_scale(np.max(np.abs(w)), parse(name).max_representable_value))
    down, up = (np.asarray(drawn.min(0)), np.asarray(drawn.max(0)))
    moving = down < up  # the others sit on the grid, or so close to it that 2000 draws went one way
    exponent = np.maximum(np.frexp(np.abs(w.astype(np.float64)) / unit)[1] - 1, parse(name).min_exponent)
    quantum = np.exp2(exponent - parse(name).mantissa_bits) * unit
    assert moving.sum() > 20
    assert (np.abs(drawn - w) < quantum).all()
    np.testing.assert_array_equal((up - down)[moving], quantum[moving])
    share = (np.abs(w) % quantum) / quantum
    deviation = quantum * np.sqrt(share * (1 - share) / len(steps))
    assert (np.abs(drawn.mean(0) - w) <= 5 * deviation + quantum * 2.0**-23).all()


def test_each_leaf_has_its_own_scale_and_randomness() -> None:
    half = jnp.full(64, 1.125)  # between 1 and 1.25
    tree = {"a": half, "b": half, "tiny": half * 2.0**-40}
    got = commit(
        tree,
        FormatParams.from_format("E5M2", rounding="stochastic"),
        {"a": True, "b": True, "tiny": True},
        seed=0,
    )
    assert not np.array_equal(got["a"], got["b"])
    assert set(np.unique(np.asarray(got["tiny"]) * 2.0**40)) == {1.0, 1.25}


def test_the_mask_leaves_the_rest_alone() -> None:
    params = {"w": jnp.array([1.1, 0.3]), "b": jnp.array([1.1, jnp.nan])}
    got = commit(params, "E5M2", {"w": True, "b": False})
    assert_same_bits(got["b"], params["b"])
    assert got["w"].tolist() == [1.0, np.float32(0.3125)]


def test_commit_hides_no_nan() -> None:
    got = commit({"w": jnp.array([1.0, jnp.nan])}, "E4M3", {"w": True})["w"]
    assert got[0] == 1.0
    assert bool(jnp.isnan(got[1]))


def test_float32_is_its_own_grid() -> None:
    params = {"w": jnp.asarray(weights())}
    assert_same_bits(commit(params, "float32", {"w": True}, seed=0), params)


def test_bad_commits() -> None:
    with pytest.raises(ValueError, match="mask has the structure"):
        commit(PARAMS, "E5M2", {"w": True})
    with pytest.raises(ValueError, match="needs random_bits"):
        commit(PARAMS, FormatParams.from_format("E5M2", rounding="stochastic"), {"w": True, "b": True})


def test_commit_under_strict_promotion() -> None:
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        grid = FormatParams.from_format("E7M0", rounding="stochastic")
        got = jax.jit(lambda p: commit(p, grid, {"w": True, "b": True}, seed=0))(PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(got, PARAMS)


# ---- snapshots


def state_of(value: float) -> dict[str, jax.Array]:
    return {"w": jnp.full(2, value, jnp.float32), "count": jnp.int32(value)}


def values(snapshots: Snapshots[dict[str, jax.Array]]) -> tuple[int, ...]:
    """Oldest first."""
    return tuple(int(snapshots.state(back)["count"]) for back in range(snapshots.keep, 0, -1))


KEEP, BACK = jax.jit(snapshot, donate_argnums=0), jax.jit(rollback, donate_argnums=0)


def test_one_goes_back_to_the_older() -> None:
    snapshots = Snapshots.of(state_of(0))
    assert values(snapshots) == (0, 0)
    seen = []
    for value, good in ((1, True), (2, True), (3, False), (4, True)):
        snapshots = KEEP(snapshots, state_of(value), good)
        seen.append(values(snapshots))
    assert seen == [(0, 1), (1, 2), (1, 2), (2, 4)]
    state, same = BACK(snapshots, state_of(9), False)
    assert (int(state["count"]), values(same)) == (9, (2, 4))
    state, left = BACK(same, {**state_of(9), "w": jnp.full(2, jnp.nan)}, True)
    assert_same_bits(state, state_of(2))
    assert values(left) == (2, 2)
    assert values(KEEP(left, state_of(5), True)) == (2, 5)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_snapshots_are_the_last_good_states_and_go_with_what_is_gone_back_to(keep: int) -> None:
    draw = np.random.default_rng(keep)
    snapshots, expected = Snapshots.of(state_of(0), keep), [0] * keep
    for value in range(1, 60):
        good, do, back = draw.random() < 0.7, draw.random() < 0.3, int(draw.integers(1, keep + 1))
        snapshots = KEEP(snapshots, state_of(value), good)
        expected = [*expected[1:], value] if good else expected
        assert values(snapshots) == tuple(expected)
        state, snapshots = BACK(snapshots, state_of(-1), do, jnp.int32(back))
        assert_same_bits(state, state_of(expected[keep - back] if do else -1))
        expected = expected[: keep - back] + [expected[keep - back]] * back if do else expected
        assert values(snapshots) == tuple(expected)


def test_one_may_go_back_to_the_newest() -> None:
    snapshots = KEEP(KEEP(Snapshots.of(state_of(0), 3), state_of(1), True), state_of(2), True)
    state, left = rollback(snapshots, state_of(9), True, back=1)  # pyrefly: ignore[bad-argument-type]
    assert_same_bits(state, state_of(2))
    assert values(left) == (0, 1, 2)
    _, left = rollback(snapshots, state_of(9), jnp.asarray(True), back=2)
    assert values(left) == (0, 1, 1)


def test_nan_in_the_newer_does_not_come_through() -> None:
    poisoned = KEEP(Snapshots.of(state_of(1)), {**state_of(7), "w": jnp.full(2, jnp.nan)}, True)
    state, left = rollback(poisoned, state_of(3), jnp.asarray(True))
    assert_same_bits((state, left.state(back=1)), (state_of(1), state_of(1)))


def test_snapshots_are_copies() -> None:
    state = state_of(1)
    snapshots = Snapshots.of(state)
    donated = jax.jit(lambda s: jax.tree.map(lambda leaf: leaf + 1, s), donate_argnums=0)(state)
    assert int(donated["count"]) == 2
    assert values(snapshots) == (1, 1)


def test_donated_snapshots_stay_where_they_are() -> None:
    state = {"w": jnp.ones(10_000), "key": jax.random.key(0)}
    snapshots = Snapshots.of(state, keep=5)
    place = snapshots.slots["w"].unsafe_buffer_pointer()
    for program in (KEEP, BACK):
        memory = program.lower(snapshots, state, True).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 1000
    for _ in range(3):
        snapshots = KEEP(snapshots, state, True)
        _, snapshots = BACK(snapshots, state, True)
        assert snapshots.slots["w"].unsafe_buffer_pointer() == place


def test_rollback_of_some_runs_of_many() -> None:
    runs = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(state_of(value) for value in (1, 2, 3)))
    later = jax.tree.map(lambda leaf: leaf + 10, runs)
    do = jnp.array([False, True, False])
    snapshots = jax.vmap(snapshot)(jax.vmap(Snapshots.of)(runs), later, ~do)
    state, left = jax.vmap(rollback)(snapshots, jax.tree.map(lambda leaf: leaf + 20, runs), do)
    assert state["count"].tolist() == [21, 2, 23]
    assert jax.vmap(lambda each: each.state(back=1))(left)["count"].tolist() == [11, 2, 13]


def test_bad_snapshots() -> None:
    for keep in (0, -1, 1.5, True):
        with pytest.raises(InputError, match=f"keep is {keep}; expected an integer of at least 1"):
            Snapshots.of(state_of(0), keep)  # pyrefly: ignore[bad-argument-type]
    for back in (0, 3, 1.0, True):
        with pytest.raises(InputError, match=f"back is {back}; expected 1, the newest snapshot, to 2, the oldest"):
            rollback(Snapshots.of(state_of(0)), state_of(1), jnp.asarray(True), back)  # pyrefly: ignore


# ---- new moments


def after_steps(tx: Any, params: Any, count: int = 3) -> Any:
    state = tx.init(params)
    for _ in range(count):
        _, state = jax.jit(tx.update)(jax.tree.map(jnp.ones_like, params), state, params)
    return state


def test_new_moments_make_the_first_step_of_a_new_optimizer_and_all_else_goes_on() -> None:
    def rate(count: Any) -> Any:
        return 0.1 / (1 + count)

    tx = skip_nonfinite(optax.chain(partition_relative_clip("E5M2"), optax.adam(rate, b2=0.999), stall_monitor("E5M2")))
    worn = set_format(after_steps(tx, PARAMS, 300), "E3M4")
    state = jax.jit(lambda state, params: reset_moments(tx, state, params))(worn, PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, worn)
    clipper, (moments, schedule), monitor = state.inner_state
    before = worn.inner_state
    chex.assert_trees_all_equal((clipper, schedule, monitor), (before[0], before[1][1], before[2]))
    assert (float(get_format(state).max_value), int(schedule.count)) == (124.0, 300)
    chex.assert_trees_all_equal(moments, optax.scale_by_adam().init(PARAMS))
    grads = gradients(1)
    first, state = tx.update(jax.tree.map(lambda leaf: leaf[0], grads), state, PARAMS)
    np.testing.assert_allclose(np.abs(first["w"]), rate(300), rtol=1e-3)  # a first step has the size of the rate
    gone_on = optax.tree.set(worn, mu=moments.mu, nu=moments.nu)
    overshot, _ = tx.update(jax.tree.map(lambda leaf: leaf[0], grads), gone_on, PARAMS)
    assert float(jnp.max(jnp.abs(overshot["w"]))) > 1.5 * rate(300)  # what the count beside the moments is for


OTHERS = {
    "masked": (optax.masked(optax.adam(0.1), {"w": True, "b": False}), PARAMS, 0),
    "parts": (optax.multi_transform({"a": optax.adam(0.1), "s": optax.sgd(0.1, 0.9)}, {"w": "a", "b": "s"}), PARAMS, 0),
    "one array": (optax.adam(0.1), jnp.ones(3), 0),
    "list": (optax.chain(optax.clip(1.0), optax.adam(0.1)), [jnp.ones(3), jnp.ones((2, 2))], 0),
    "accumulated": (optax.apply_every(2), PARAMS, 0),
    "injected": (optax.inject_hyperparams(optax.sgd)(lambda count: 0.1 / (1 + count), momentum=0.9), PARAMS, 3),
}


@pytest.mark.parametrize("name", OTHERS)
def test_moments_are_found_in_whatever_holds_them(name: str) -> None:
    tx, params, count = OTHERS[name]
    worn = after_steps(tx, params)
    assert any(np.any(leaf) for leaf in jax.tree.leaves(worn))
    state = reset_moments(tx, worn, params)
    counts = [int(leaf) for leaf in jax.tree.leaves(state) if leaf.dtype == jnp.int32]
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert set(counts) == {count} if count else not any(counts)


def test_formats_stay_in_force_beside_the_moments_of_a_single_array() -> None:
    tx = optax.chain(partition_relative_clip("E5M2"), optax.adam(0.1))
    state = reset_moments(tx, set_format(after_steps(tx, jnp.ones(3)), "E3M4"), jnp.ones(3))
    assert float(get_format(state).max_value) == 124.0
    assert not np.any(state[1][0].mu)


def test_state_without_moments_is_left_alone() -> None:
    tx = optax.chain(optax.scale_by_schedule(lambda count: 0.1 / (1 + count)), partition_relative_clip("E5M2"))
    worn = after_steps(tx, PARAMS)
    chex.assert_trees_all_equal(reset_moments(tx, worn, PARAMS), worn)


def test_accumulation_starts_anew_at_the_step_that_its_schedule_is_at() -> None:
    tx = optax.MultiSteps(optax.adam(0.1), every_k_schedule=lambda step: jnp.where(step < 2, 1, 4))
    worn = after_steps(tx, PARAMS, 7)
    assert (int(worn.gradient_step), int(worn.mini_step)) == (3, 1)
    state = jax.jit(lambda state: reset_moments(tx, state, PARAMS))(worn)
    chex.assert_trees_all_equal(state, tx.init(PARAMS)._replace(gradient_step=worn.gradient_step))


def test_steps_are_kept_in_an_accumulation_of_an_accumulation() -> None:
    tx = optax.chain(optax.MultiSteps(optax.MultiSteps(optax.adam(0.1), 2), 2).gradient_transformation())
    worn = after_steps(tx, PARAMS, 7)
    (state,) = reset_moments(tx, worn, PARAMS)
    assert (int(state.gradient_step), int(state.inner_opt_state.gradient_step)) == (3, 1)
    assert (int(state.mini_step), int(state.inner_opt_state.mini_step)) == (0, 0)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves((state.acc_grads, state.inner_opt_state.acc_grads)))


def test_the_step_of_a_schedule_beside_averages_goes_on() -> None:
    tx = optax.contrib.schedule_free(optax.sgd(0.1), lambda count: 0.1 / (1 + count))
    worn = after_steps(tx, PARAMS)
    state = reset_moments(tx, worn, PARAMS)
    chex.assert_trees_all_equal(state, tx.init(PARAMS)._replace(step_count=worn.step_count))


@pytest.mark.parametrize("shape", [(), (1,), (16,), (16, 1)])
def test_one_array_has_its_moments_told_from_whatever_has_its_shape(shape: tuple[int, ...]) -> None:
    params = jnp.ones(shape)
    clip = partition_relative_clip("E5M2", rule="quantile", norm_window=16)
    tx = optax.chain(clip, optax.adam(lambda count: 0.1 / (1 + count)))
    worn = after_steps(tx, params, 7)
    clipper, (moments, schedule) = jax.jit(lambda state: reset_moments(tx, state, params))(worn)
    chex.assert_trees_all_equal((clipper, schedule), (worn[0], worn[1][1]))
    assert int(schedule.count) == 7
    chex.assert_trees_all_equal(moments, optax.scale_by_adam().init(params))


def test_a_rate_that_was_set_stays_beside_a_scalar_parameter() -> None:
    tx, params = optax.inject_hyperparams(optax.adam)(0.1), jnp.float32(1)
    worn = optax.tree.set(after_steps(tx, params), learning_rate=jnp.float32(0.25))
    state = reset_moments(tx, worn, params)
    assert float(state.hyperparams["learning_rate"]) == 0.25
    assert int(state.count) == 3
    assert not np.any(state.inner_state[0].mu)


@pytest.mark.parametrize("params", [PARAMS, jnp.ones(3), jnp.float32(1)], ids=["tree", "array", "scalar"])
def test_moments_that_are_the_whole_state(params: Any) -> None:
    tx = optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda updates, state, params=None: (updates, jax.tree.map(jnp.add, updates, state)),
    )
    chex.assert_trees_all_equal(reset_moments(tx, after_steps(tx, params), params), tx.init(params))

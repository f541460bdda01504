"""Rules, groups and policies of the clippers in optax, and the ways in which optax may wrap them."""

import math
import warnings
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from altgrad_core.clip_rules import CLIP_RULES, NORMS_NEEDED, binades, format_threshold, quantile_index
from altgrad_core.errors import InputError
from altgrad_core.formats import EIGHT, FORMAT_REGISTRY, parse
from altgrad_core.patterns import group_by_pattern
from altgrad_core.stability import clip_threshold
from altgrad_jax import FormatParams, clip_by_global_norm, partition_relative_clip, set_format, skip_nonfinite
from altgrad_jax.clip_groups import format_threshold as traced_threshold
from altgrad_jax.nonfinite import leaf_path

GRADS = {"attn": {"q": jnp.array([3.0, 4.0])}, "mlp": {"up": jnp.array([[6.0], [8.0]])}}


def close_to(norm: float, limit: float) -> float:
    return min(1.0, limit / (norm + 1e-6))


# ---- thresholds


def test_binades_by_counting_them() -> None:
    for name in EIGHT:
        positive = [abs(value) for value in parse(name).code_book() if 0 < abs(value) < math.inf]
        assert binades(name) == math.frexp(max(positive))[1] - math.frexp(min(positive))[1] + 1, name


@pytest.mark.parametrize("rule", ["max", "binades"])
def test_thresholds_of_formats_have_the_bits_of_core(rule: Any) -> None:
    names = [name for name in FORMAT_REGISTRY if parse(name).cast_path == "fast"]
    params = FormatParams.stack([FormatParams.from_format(name) for name in names])
    for base in (1.0, 0.1, 1 / 3, 1e20):
        traced = jax.jit(jax.vmap(lambda each, base=base: traced_threshold(each, base, rule)))(params)
        np.testing.assert_array_equal(traced, [format_threshold(name, base, rule) for name in names])
    assert format_threshold("E3M4", 0.3) == clip_threshold("E3M4", 0.3)


def test_rules_that_follow_gradients_have_no_threshold_of_a_format() -> None:
    with pytest.raises(InputError, match="'quantile' follows the gradients; expected max or binades"):
        format_threshold("E5M2", rule="quantile")


def test_scaled_max_is_the_norm_at_which_nothing_could_overflow() -> None:
    tx = partition_relative_clip("E4M3", rule="scaled_max", window=2)
    state, update = tx.init(GRADS), jax.jit(lambda g, s: tx.update(g, s, overflow_rate=1.0))
    updates, state = update(GRADS, state)
    assert float(state.threshold) == math.inf  # no history yet: nothing is clipped
    np.testing.assert_array_equal(updates["mlp"]["up"], GRADS["mlp"]["up"])
    # amaxes of 4 and 8 under max 448 have the scales 2^-6 and 2^-5.
    updates, state = update(jax.tree.map(lambda leaf: 100 * leaf, GRADS), state)
    assert float(state.threshold) == 448 * 2.0**-5
    norm = float(state.total_norm)
    np.testing.assert_array_equal(updates["attn"]["q"], 100 * GRADS["attn"]["q"] * np.float32(close_to(norm, 14.0)))


def test_quantile_clips_what_is_unusual_once_it_has_seen_enough() -> None:
    tx = partition_relative_clip("E5M2", 2.0, rule="quantile", quantile=0.5, norm_window=NORMS_NEEDED)
    state, update = tx.init(GRADS), jax.jit(lambda g, s: tx.update(g, s, overflow_rate=1.0))
    scales = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    for scale in scales:
        grads = {"w": jnp.array([scale])}
        updates, state = update(grads, state)
        np.testing.assert_array_equal(updates["w"], grads["w"])
    spike = {"w": jnp.array([100.0])}
    updates, state = update(spike, state)
    median = sorted(scales)[quantile_index(8, 0.5)]
    assert float(state.threshold) == 2 * median
    np.testing.assert_array_equal(updates["w"], spike["w"] * np.float32(close_to(100.0, 2 * median)))
    # The raw norm enters the history, not the clipped one; what is not finite does not.
    assert float(state.norm_history[-1]) == 100.0
    _, after = update({"w": jnp.array([jnp.nan])}, state)
    np.testing.assert_array_equal(after.norm_history, state.norm_history)


def test_quantile_measures_behind_a_shut_gate_too() -> None:
    tx = partition_relative_clip("E5M2", rule="quantile")
    updates, state = tx.update(GRADS, tx.init(GRADS), overflow_rate=0.0)
    assert float(state.total_norm) == float(np.float32(math.sqrt(125)))
    assert not bool(state.clipped)
    np.testing.assert_array_equal(updates["attn"]["q"], GRADS["attn"]["q"])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"rule": "maximum"}, "unknown clip rule 'maximum'; did you mean 'max'"),
        ({"quantile": 0.9}, "quantile=0.9 would have no effect: the rule is 'max'"),
        ({"norm_window": 64}, "norm_window=64 would have no effect"),
        ({"rule": "quantile", "quantile": 1.5}, "quantile is 1.5"),
        ({"rule": "quantile", "norm_window": 3}, "norm_window is 3"),
        ({"nonfinite": "skp"}, "did you mean 'skip'"),
        ({"format": {}}, "there are no rules"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        partition_relative_clip(arguments.pop("format", "E5M2"), **arguments)


# ---- groups


def test_groups_have_thresholds_rates_and_gates_of_their_own() -> None:
    tx = partition_relative_clip({"attn/.*": "E3M4", ".*": "E5M2"})
    update = jax.jit(lambda g, s, rates: tx.update(g, s, overflow_rate=rates))
    updates, state = update(GRADS, tx.init(GRADS), {"attn/.*": 0.5, ".*": 0.0})
    threshold = clip_threshold("E3M4")
    np.testing.assert_array_equal(updates["attn"]["q"], GRADS["attn"]["q"] * np.float32(close_to(5.0, threshold)))
    np.testing.assert_array_equal(updates["mlp"]["up"], GRADS["mlp"]["up"])
    assert {name: float(group.total_norm) for name, group in state.groups.items()} == {"attn/.*": 5.0, ".*": -1.0}
    _, state = update(GRADS, state, {"attn/.*": 0.0, ".*": 0.5})
    assert {name: float(group.total_norm) for name, group in state.groups.items()} == {"attn/.*": -1.0, ".*": 10.0}
    found = optax.tree.get_all_with_path(state, "total_norm")
    assert len(found) == 2


def test_one_rate_for_all_groups_and_measured_rates() -> None:
    tx = partition_relative_clip({"attn/.*": "E3M4", ".*": "E3M4"}, overflow_threshold=0.5)
    _, state = tx.update(GRADS, tx.init(GRADS), overflow_rate=0.6)
    assert [bool(group.clipped) for group in state.groups.values()] == [True, True]
    spiked = {**GRADS, "attn": {"q": 1e6 * GRADS["attn"]["q"]}}
    measured = jax.jit(tx.update)
    _, state = measured(GRADS, state)
    _, state = measured(spiked, state)
    assert {name: bool(group.clipped) for name, group in state.groups.items()} == {"attn/.*": True, ".*": False}


def test_set_format_reaches_every_group() -> None:
    tx = partition_relative_clip({"attn/.*": "E3M4", ".*": "E7M0"})
    state = set_format(tx.init(GRADS), "E5M2")
    assert [float(group.format.max_value) for group in state.groups.values()] == [57344.0, 57344.0]


def test_rules_that_match_nothing_or_leave_something_out() -> None:
    with pytest.raises(InputError, match=r"the rule 'conv/\.\*' matches nothing"):
        partition_relative_clip({"conv/.*": "E3M4", ".*": "E5M2"}).init(GRADS)
    with pytest.raises(InputError, match="no rule matches 'mlp/up'"):
        partition_relative_clip({"attn/.*": "E3M4"}).init(GRADS)
    for use in (lambda rule: group_by_pattern(["a"], [rule]), lambda rule: partition_relative_clip({rule: "E5M2"})):
        with pytest.raises(InputError, match=r"the rule '\(' is no regular expression"):
            use("(")
    tx = partition_relative_clip({"attn/.*": "E3M4", ".*": "E5M2"})
    with pytest.raises(InputError, match=r"overflow_rate is given for attn; expected attn/\.\*"):
        tx.update(GRADS, tx.init(GRADS), overflow_rate={"attn": 0.1})


def test_a_tree_of_formats_makes_a_group_of_each_place() -> None:
    grads = {"attn": {"q": jnp.array([3.0, 4.0]), "k": jnp.ones(2)}, "mlp": [{"up": jnp.ones(1), "b": jnp.ones(3)}]}
    tree = partition_relative_clip({"attn": {"q": "E3M4", "k": FormatParams.from_format("E4M3")}, "mlp": "E5M2"})
    rules = partition_relative_clip({"attn/q": "E3M4", "attn/k": "E4M3", "mlp/.*": "E5M2"})
    names = {"attn/q": "attn/q", "attn/k": "attn/k", "mlp": "mlp/.*"}
    state, expected = tree.init(grads), rules.init(grads)
    assert set(state.groups) == set(names)
    for rates in (0.5, {"attn/q": 0.5, "attn/k": 0.0, "mlp": 0.5}):
        as_rules = {names[name]: rate for name, rate in rates.items()} if isinstance(rates, dict) else rates
        updates, state = jax.jit(lambda g, s, r: tree.update(g, s, overflow_rate=r))(grads, state, rates)
        clipped, expected = rules.update(grads, expected, overflow_rate=as_rules)
        jax.tree.map(np.testing.assert_array_equal, updates, clipped)
        for name, rule in names.items():
            jax.tree.map(np.testing.assert_array_equal, state.groups[name], expected.groups[rule])
    state = set_format(state, {"attn/q": "E5M2"})
    assert [float(state.groups[name].format.max_value) for name in names] == [57344.0, 448.0, 57344.0]


def test_trees_over_lists_and_beside_injected_hyperparameters() -> None:
    grads = [jnp.array([3.0]), {"w": jnp.array([4.0])}]
    for formats in (["E3M4", "E5M2"], ("E3M4", {"w": "E5M2"})):
        tx = optax.inject_hyperparams(partition_relative_clip)(formats, 0.5)
        _, state = jax.jit(lambda g, s, tx=tx: tx.update(g, s, overflow_rate=0.5))(grads, tx.init(grads))
        groups = state.inner_state.groups.values()
        assert [float(group.threshold) for group in groups] == [clip_threshold("E3M4", 0.5), 0.5]


@pytest.mark.parametrize(
    ("formats", "told"),
    [
        (
            {"attn": {"k": "E3M4"}, "mlp": "E5M2"},
            "the tree of formats has none for 'attn/q'; it has those of attn/k, mlp",
        ),
        (
            {"attn": {"q": "E3M4", "v": "E3M4"}, "mlp": "E5M2"},
            "has one for 'attn/v', where no parameter is.* attn/q, mlp",
        ),
        ({"attn": {"q": "E3M4"}, "mlp/.*": "E5M2"}, r"has none for 'mlp/up'; it has those of attn/q, mlp/\.\*"),
        ({"attn": {"q": "E3M4"}, "mlp": {}}, "has none for 'mlp/up'"),
        ({"attn": {"q": "E3M4"}, "attn/q": "E5M2"}, "has two for 'attn/q'"),
        ({"attn": {}}, "there are no rules, and no formats in a tree"),
        ([], "there are no rules, and no formats in a tree"),
        ({"attn": {"q": "E3M5x"}, "mlp": "E5M2"}, "E3M5x"),
        (
            {"attn": "E3M4", "mlp": "E5M2"},
            r"no rule matches 'attn/q'; .* did you mean 'attn/\.\*'\?",
        ),  # a flat mapping is of rules
    ],
)
def test_bad_trees_of_formats(formats: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        partition_relative_clip(formats).init(GRADS)


# ---- what is not finite

BAD = {"attn": {"q": jnp.array([3.0, 4.0])}, "mlp": {"up": jnp.array([[jnp.nan], [jnp.inf]])}}


def clippers(**arguments: Any) -> list[optax.GradientTransformationExtraArgs]:
    return [
        clip_by_global_norm(1.0, **arguments),
        partition_relative_clip("E5M2", **arguments),
        partition_relative_clip({"attn/.*": "E5M2", ".*": "E5M2"}, **arguments),
    ]


def culprit_of(state: Any) -> tuple[int, int]:
    groups = list(state.groups.values()) if hasattr(state, "groups") else [state]
    found = [group.culprit for group in groups if int(group.culprit.count)]
    return (int(found[0].index), int(found[0].count)) if found else (-1, 0)


@pytest.mark.parametrize(
    ("kind", "rate"),
    [
        (0, 0.0),
        (2, 1.0),
        *(pytest.param(*other, marks=pytest.mark.exhaustive) for other in ((0, 1.0), (1, 0.0), (1, 1.0), (2, 0.0))),
    ],
)
def test_the_culprit_is_named_and_dealt_with(kind: int, rate: float) -> None:
    is_open = rate >= 0.01 or kind == 0
    for policy in ("propagate", "skip", "zero"):
        tx = clippers(nonfinite=policy)[kind]
        extra = {} if kind == 0 else {"overflow_rate": rate}
        updates, state = jax.jit(lambda g, s, tx=tx, extra=extra: tx.update(g, s, **extra))(BAD, tx.init(GRADS))
        index, count = culprit_of(state)
        if policy == "propagate" and not is_open:
            assert (index, count) == (-1, 0)
            np.testing.assert_array_equal(updates["mlp"]["up"], BAD["mlp"]["up"])
            continue
        assert (leaf_path(GRADS, index), count) == ("mlp/up", 2)
        if policy == "skip":
            assert all(not leaf.any() for leaf in jax.tree.leaves(updates))
        if policy == "zero":
            assert not updates["mlp"]["up"].any()
            expected = GRADS["attn"]["q"] * np.float32(close_to(5.0, 1.0)) if is_open else GRADS["attn"]["q"]
            np.testing.assert_array_equal(updates["attn"]["q"], expected)


@pytest.mark.parametrize("kind", range(3))
def test_raise_names_the_leaf_and_works_outside_jit_only(kind: int) -> None:
    tx = clippers(nonfinite="raise")[kind]
    extra = {} if kind == 0 else {"overflow_rate": 0.0}
    with pytest.raises(FloatingPointError, match="gradient mlp/up holds 2 infinities or NaN among its 2 elements"):
        tx.update(BAD, tx.init(GRADS), **extra)
    tx.update(GRADS, tx.init(GRADS), **extra)
    with pytest.raises(InputError, match="outside of jit"):
        jax.jit(lambda g, s: tx.update(g, s, **extra))(GRADS, tx.init(GRADS))


def test_limits_without_effect() -> None:
    for limit, eps in ((math.inf, 1e-6), (0.0, 0.0)):
        tx = clip_by_global_norm(limit, eps)
        zeros = {"w": jnp.zeros(2)}
        updates, _ = tx.update(zeros, tx.init(zeros))
        np.testing.assert_array_equal(updates["w"], zeros["w"])
    tx = clip_by_global_norm(math.inf)
    updates, _ = tx.update(GRADS, tx.init(GRADS))
    np.testing.assert_array_equal(updates["attn"]["q"], GRADS["attn"]["q"])


# ---- optax's habits

NAMES = (
    "adabelief adadelta adafactor adagrad adam adamax adamaxw adamw adan amsgrad fromage lamb lars lbfgs lion nadam "
    "nadamw noisy_sgd novograd optimistic_adam optimistic_adam_v2 optimistic_gradient_descent polyak_sgd radam rmsprop "
    "rprop sgd sign_sgd signum sm3 yogi"
)
ARGUMENTS = {"noisy_sgd": {"key": jax.random.key(0)}, "optimistic_adam": {"optimism": 1e-2}}
with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # of optimistic_adam
    ALIASES = {name: getattr(optax, name)(1e-2, **ARGUMENTS.get(name, {})) for name in NAMES.split(" ")}


def loss(params: Any, overflow_rate: jax.Array) -> jax.Array:
    """The line search of L-BFGS hands the loss all extra arguments, and refuses those that it does not take."""
    del overflow_rate
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))


# What these two are given beside the gradients: the loss, and for the line search also itself and the gradients that it
# has without a clipper.
BESIDE = {
    "polyak_sgd": {"value": jnp.float32(1.0)},
    "lbfgs": {"value": jnp.float32(1.0), "grad": GRADS, "value_fn": loss},
}


@pytest.mark.parametrize("alias", ALIASES)
def test_before_every_optimizer(alias: str) -> None:
    """Its numbers are found, and a step leaves the state as it was in structure, shapes, dtypes: nothing retraces."""
    tx, params = optax.chain(partition_relative_clip("E3M4"), ALIASES[alias]), jax.tree.map(jnp.ones_like, GRADS)
    beside = BESIDE.get(alias, {})
    step = lambda grads, state, rate: tx.update(grads, state, params, overflow_rate=rate, **beside)  # noqa: E731
    state = tx.init(params)
    updates, after = jax.eval_shape(step, GRADS, state, jnp.float32(0.5))
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, GRADS)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, jax.eval_shape(lambda: state))
    assert optax.tree.get(after, "total_norm").dtype == jnp.float32


def test_every_optimizer_is_tried() -> None:
    aliases = {name for name, each in vars(optax._src.alias).items() if getattr(optax, name, None) is each}
    assert {name for name in aliases if callable(getattr(optax, name)) and name.islower()} == set(ALIASES)


@pytest.mark.parametrize(
    "alias", ["adamw", "sgd", *(pytest.param(alias, marks=pytest.mark.exhaustive) for alias in ("adafactor", "lion"))]
)
def test_an_optimizer_sees_clipped_gradients(alias: str) -> None:
    """As if they had been given to it."""
    clip = partition_relative_clip("E3M4")
    tx, params, traces = optax.chain(clip, ALIASES[alias]), jax.tree.map(jnp.ones_like, GRADS), []

    @jax.jit
    def step(state: optax.OptState, grads: optax.Updates, rate: jax.Array) -> tuple[optax.Updates, optax.OptState]:
        traces.append(1)
        return tx.update(grads, state, params, overflow_rate=rate)

    updates, state = step(tx.init(params), GRADS, jnp.float32(0.5))
    assert float(optax.tree.get(state, "total_norm")) == float(np.float32(math.sqrt(125)))
    clipped, _ = clip.update(GRADS, clip.init(GRADS), overflow_rate=0.5)
    untouched, state = step(tx.init(params), clipped, jnp.float32(0.0))
    assert float(optax.tree.get(state, "total_norm")) == -1.0
    jax.tree.map(np.testing.assert_array_equal, updates, untouched)
    assert len(traces) == 1


def test_no_tracer_leaks() -> None:
    tx = optax.chain(partition_relative_clip({"attn/.*": "E3M4", ".*": "E5M2"}, nonfinite="zero"), optax.adamw(1e-3))
    with jax.check_tracer_leaks(True):
        jax.jit(tx.update)(GRADS, tx.init(GRADS), GRADS)


@pytest.mark.parametrize(
    "rule", [pytest.param(rule, marks=pytest.mark.exhaustive if rule == "binades" else ()) for rule in CLIP_RULES]
)
def test_a_state_is_saved_and_restored(rule: Any, tmp_path: Any) -> None:
    tx = optax.chain(partition_relative_clip({"attn/.*": "E3M4", ".*": "E5M2"}, rule=rule), optax.adam(1e-3))
    _, state = tx.update(GRADS, tx.init(GRADS), GRADS, overflow_rate=0.5)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(lambda: state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_injected_hyperparameters_of_the_clipper_itself() -> None:
    tx = optax.inject_hyperparams(partition_relative_clip)("E5M2", base_clip=0.5, overflow_threshold=0.1)
    state = tx.init(GRADS)
    update = jax.jit(lambda g, s: tx.update(g, s, overflow_rate=0.2))
    updates, state = update(GRADS, state)
    norm = float(np.float32(math.sqrt(125)))
    np.testing.assert_array_equal(updates["attn"]["q"], GRADS["attn"]["q"] * np.float32(close_to(norm, 0.5)))
    state.hyperparams["overflow_threshold"] = jnp.float32(0.3)
    updates, _ = update(GRADS, state)
    np.testing.assert_array_equal(updates["attn"]["q"], GRADS["attn"]["q"])


ELEMENTS = {
    "clip_by_global_norm": clip_by_global_norm(1.0),
    "one format": partition_relative_clip("E3M4", rule="quantile"),
    "scaled_max": partition_relative_clip("E3M4", rule="scaled_max", nonfinite="zero"),
    "groups": partition_relative_clip({"attn/.*": "E3M4", ".*": "E5M2"}, nonfinite="skip"),
    "raising": partition_relative_clip("E3M4", nonfinite="raise"),
    "skip_nonfinite": skip_nonfinite(optax.chain(partition_relative_clip("E3M4"), optax.adam(1e-2))),
}


@pytest.mark.parametrize("extra", [{}, {"overflow_rate": 0.5}], ids=["measured", "given"])
@pytest.mark.parametrize("element", ELEMENTS)
def test_a_label_may_have_no_parameters(element: str, extra: dict[str, float]) -> None:
    """An empty tree passes, as it does through optax's own elements, and nothing was measured."""
    tx = optax.partition({"a": optax.sgd(0.5), "b": ELEMENTS[element]}, {"attn": "a", "mlp": "a"})
    state = tx.init(GRADS)
    ways = (tx.update,) if element == "raising" else (tx.update, jax.jit(tx.update))
    for update in ways:
        updates, after = update(GRADS, state, GRADS, **extra)
        jax.tree.map(lambda u, g: np.testing.assert_array_equal(u, -0.5 * g), updates, GRADS)
        chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
        assert all(float(norm) == -1 for _, norm in optax.tree.get_all_with_path(after, "total_norm"))
        assert not any(clipped for _, clipped in optax.tree.get_all_with_path(after, "clipped"))
    for empty in ({}, [], (), None, {"a": []}):
        updates, _ = ELEMENTS[element].update(empty, ELEMENTS[element].init(empty), empty)
        assert jax.tree.structure(updates) == jax.tree.structure(empty)


def test_several_in_one_chain_are_told_apart() -> None:
    tx = optax.named_chain(("first", partition_relative_clip("E5M2")), ("second", partition_relative_clip("E3M4")))
    _, state = tx.update(GRADS, tx.init(GRADS), overflow_rate=0.5)
    assert [float(state[name].total_norm) for name in ("first", "second")] == pytest.approx([125**0.5, 1.0])
    assert len(optax.tree.get_all_with_path(state, "total_norm")) == 2


@pytest.mark.parametrize(
    "rule",
    ["max", "quantile", *(pytest.param(rule, marks=pytest.mark.exhaustive) for rule in ("binades", "scaled_max"))],
)
def test_under_vmap_and_scan(rule: Any) -> None:
    tx = partition_relative_clip("E5M2", rule=rule, nonfinite="skip")
    stacked = {"w": jnp.arange(1.0, 25.0).reshape(12, 2) ** 3}

    def run(gradients: jax.Array) -> jax.Array:
        def step(state: Any, gradient: jax.Array) -> tuple[Any, Any]:
            updates, state = tx.update({"w": gradient}, state, overflow_rate=0.5)
            return state, (updates["w"], state.threshold)

        return jax.lax.scan(step, tx.init({"w": gradients[0]}), gradients)[1]

    alone = jax.jit(run)(stacked["w"])
    together = jax.jit(jax.vmap(run))(jnp.stack([stacked["w"], 3 * stacked["w"]]))
    jax.tree.map(lambda one, two: np.testing.assert_array_equal(one, two[0]), alone, together)


def test_inside_shard_map() -> None:
    """Over a mapped axis, measured: the rate and the norm are those of the whole."""
    tx_whole, tx = partition_relative_clip("E4M3"), partition_relative_clip("E4M3", axis_name="parts")
    draw = np.random.default_rng(0)
    seen = [jnp.asarray(draw.standard_normal(32) * factor, jnp.float32) for factor in (1, 1e4, 1)]

    def run(transformation: optax.GradientTransformationExtraArgs, parts: list[jax.Array]) -> Any:
        state, updates = transformation.init([parts[0]]), []
        for part in parts:
            clipped, state = transformation.update([part], state)
            updates.append(clipped[0])
        return updates, state

    whole = jax.jit(lambda parts: run(tx_whole, parts))(seen)
    split = [leaf.reshape(4, 8) for leaf in seen]
    parts = jax.jit(jax.vmap(lambda each: run(tx, each), axis_name="parts"))(split)
    for one, four in zip(whole[0], parts[0], strict=True):
        np.testing.assert_array_equal(one, four.reshape(-1))
    for one, four in zip(jax.tree.leaves(whole[1]), jax.tree.leaves(parts[1]), strict=True):
        np.testing.assert_array_equal(np.broadcast_to(one, four.shape), four)

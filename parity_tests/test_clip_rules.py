"""Rules, groups and policies of the clippers: the same decisions, norms and bits in both packages, step after step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from altgrad_core.clip_rules import CLIP_RULES
from altgrad_core.errors import InputError
from altgrad_jax import partition_relative_clip
from altgrad_torch import PartitionRelativeClipper, clip_grad_norm_
from parity_tests.support import as_numpy, assert_same_bits, to_torch

STEPS = 14


class Model(torch.nn.Module):
    """Two groups of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = torch.nn.Linear(5, 3)
        self.mlp = torch.nn.Linear(3, 4)


def gradients(step: int) -> dict[str, np.ndarray]:
    """By name; every fifth step is a spike, one holds an infinity and a NaN."""
    draw = np.random.default_rng(step)
    factor = 1e5 if step % 5 == 4 else 1.0
    made = {
        name: (draw.standard_normal(parameter.shape) * factor).astype(np.float32)
        for name, parameter in Model().named_parameters()
    }
    if step == 11:
        made["mlp.bias"][1:3] = [np.inf, np.nan]
    return made


def give(model: Model, step: int) -> None:
    for name, parameter in model.named_parameters():
        parameter.grad = to_torch(gradients(step)[name].copy())


def compare(format: Any, **arguments: Any) -> None:
    """Both clip the same gradients, with the gate open at every second step."""
    element, clipper, model = (
        partition_relative_clip(format, 0.5, **arguments),
        PartitionRelativeClipper(format, 0.5, **arguments),
        Model(),
    )
    state = element.init({name: jnp.asarray(leaf) for name, leaf in gradients(0).items()})
    update = jax.jit(lambda g, s, rate: element.update(g, s, overflow_rate=rate))
    for step in range(STEPS):
        rate = 0.5 if step % 2 else 0.0
        clipped, state = update({name: jnp.asarray(leaf) for name, leaf in gradients(step).items()}, state, rate)
        give(model, step)
        opened = clipper.clip_if_needed(model, rate)
        states = state.groups if hasattr(state, "groups") else {".*": state}
        assert opened == any(bool(each.clipped) for each in states.values())
        for name, theirs in clipper.groups.items():
            ours = states[name]
            told = (float(ours.threshold), float(ours.total_norm), int(ours.culprit.count))
            np.testing.assert_array_equal(told, (theirs.clip_threshold, theirs.total_norm, theirs.culprit.count))
        for name, parameter in model.named_parameters():
            nan_or_equal(np.asarray(clipped[name]), as_numpy(parameter.grad), f"{name} at {step}")


def nan_or_equal(left: np.ndarray, right: np.ndarray, what: str) -> None:
    assert np.array_equal(np.isnan(left), np.isnan(right)), what
    assert_same_bits(np.nan_to_num(left), np.nan_to_num(right), what=what)


@pytest.mark.parametrize(
    ("rule", "nonfinite"),
    [
        pytest.param(rule, nonfinite, marks=() if (place + k) % 3 == 0 else pytest.mark.exhaustive)
        for place, rule in enumerate(CLIP_RULES)
        for k, nonfinite in enumerate(("propagate", "skip", "zero"))
    ],
)
def test_same_decisions_and_bits(rule: Any, nonfinite: Any) -> None:
    compare("E4M3", rule=rule, nonfinite=nonfinite)


@pytest.mark.parametrize("nonfinite", ["skip", "zero"])
def test_same_groups(nonfinite: Any) -> None:
    rules = {r"attn\..*": "E3M4", ".*": "E5M2"}
    compare(rules, rule="quantile", norm_window=8, nonfinite=nonfinite)


def test_same_tree_of_formats() -> None:
    """Nested alike in JAX; places are named with slashes there, and with dots in torch."""
    tree = {"attn": {"weight": "E3M4", "bias": "E4M3"}, "mlp": "E5M2"}
    clipper, model = PartitionRelativeClipper(tree, 0.5, nonfinite="zero"), Model()
    element = partition_relative_clip(tree, 0.5, nonfinite="zero")
    assert list(clipper.groups) == ["attn.weight", "attn.bias", "mlp"]
    for step in (0, 4, 11):
        give(model, step)
        made = gradients(step)
        nested = {
            layer: {name: jnp.asarray(made[f"{layer}.{name}"]) for name in ("weight", "bias")}
            for layer in ("attn", "mlp")
        }
        rates = {"attn.weight": 0.5, "attn.bias": 0.0, "mlp": 1.0}
        clipped, state = element.update(
            nested, element.init(nested), overflow_rate={name.replace(".", "/"): rate for name, rate in rates.items()}
        )
        assert clipper.clip_if_needed(model, rates)
        for name, theirs in clipper.groups.items():
            ours = state.groups[name.replace(".", "/")]
            told = (float(ours.threshold), float(ours.total_norm), int(ours.culprit.count))
            np.testing.assert_array_equal(told, (theirs.clip_threshold, theirs.total_norm, theirs.culprit.count))
        for name, parameter in model.named_parameters():
            layer, leaf = name.split(".")
            assert_same_bits(clipped[layer][leaf], parameter.grad)


def test_trees_of_formats_that_do_not_fit() -> None:
    model = Model()
    give(model, 0)
    with pytest.raises(
        InputError, match=r"the tree of formats has none for 'attn\.bias'; it has those of attn\.weight"
    ):
        PartitionRelativeClipper({"attn": {"weight": "E3M4"}, "mlp": "E5M2"}).clip_if_needed(model, 0.5)
    with pytest.raises(InputError, match=r"has one for 'norm\.scale', where no parameter is"):
        PartitionRelativeClipper({"norm": {"scale": "E3M4"}, "attn": "E5M2", "mlp": "E5M2"}).clip_if_needed(model, 0.5)
    with pytest.raises(InputError, match="groups are found by the names of parameters"):
        PartitionRelativeClipper({"attn": {"weight": "E3M4"}}).clip_if_needed(model.parameters(), 0.5)


def test_a_quantile_lives_on_in_a_checkpoint() -> None:
    first, second = (PartitionRelativeClipper("E5M2", rule="quantile", norm_window=8) for _ in range(2))
    model = Model()
    for step in range(10):
        give(model, step)
        first.clip_if_needed(model, 0.0)
    second.load_state_dict(first.state_dict())
    for clipper in (first, second):
        give(model, 10)
        clipper.clip_if_needed(model, 1.0)
    assert first.clip_threshold == second.clip_threshold < np.inf
    with pytest.raises(InputError, match=r"the state is of the groups a; expected \.\*"):
        first.load_state_dict({"a": {}})
    with pytest.raises(InputError, match="a group's state has nothing; expected rule, norms, amaxes"):
        first.load_state_dict({".*": {}})
    with pytest.raises(InputError, match="the state is of rule='quantile'; expected that of a clipper with 'max'"):
        PartitionRelativeClipper("E5M2").load_state_dict(first.state_dict())


def test_torch_names_the_culprit() -> None:
    model = Model()
    give(model, 11)
    clipper = PartitionRelativeClipper("E5M2", nonfinite="skip")
    clipper.clip_if_needed(model, 0.0)
    assert clipper.culprit == ("mlp.bias", 2)
    assert not any(parameter.grad.any() for parameter in model.parameters())
    give(model, 11)
    with pytest.raises(FloatingPointError, match=r"gradient mlp\.bias holds 2 infinities or NaN among its 4 elements"):
        PartitionRelativeClipper("E5M2", nonfinite="raise").clip_if_needed(model, 0.0)
    with pytest.raises(FloatingPointError, match=r"gradient of parameter 3 holds 2 infinities"):
        clip_grad_norm_(model.parameters(), 1.0, nonfinite="raise")


def test_the_gated_rule_in_one_call() -> None:
    model, twin = Model(), Model()
    for rate, norm in ((0.0, -1.0), (0.5, None)):
        give(model, 0)
        give(twin, 0)
        clipper = PartitionRelativeClipper("E3M4", 2.0)
        clipper.clip_if_needed(twin, rate)
        total = clip_grad_norm_(model.parameters(), 2.0, format="E3M4", overflow_rate=rate)
        assert float(total) == clipper.total_norm == (clipper.total_norm if norm is None else norm)
        for one, other in zip(model.parameters(), twin.parameters(), strict=True):
            assert_same_bits(one.grad, other.grad)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({}, "max_norm is missing"),
        ({"max_norm": 1.0, "overflow_rate": 0.5}, "overflow_rate would have no effect"),
        ({"format": "E5M2"}, "overflow_rate is missing"),
        ({"format": "E5M2", "overflow_rate": 0.5, "norm_type": 1.0}, "norm_type=1.0 would have no effect"),
        ({"max_norm": -1.0}, "max_norm is -1.0"),
    ],
)
def test_bad_arguments_of_the_one_call(arguments: dict[str, Any], told: str) -> None:
    model = Model()
    give(model, 0)
    with pytest.raises(InputError, match=told):
        clip_grad_norm_(model.parameters(), **arguments)


def test_bad_arguments_of_the_clipper() -> None:
    with pytest.raises(InputError, match="window=4 would have no effect"):
        PartitionRelativeClipper("E5M2", window=4)
    with pytest.raises(InputError, match="give the module"):
        PartitionRelativeClipper({"a": "E5M2", ".*": "E3M4"}).clip_if_needed(Model().parameters(), 0.5)
    clipper = PartitionRelativeClipper({r"attn\..*": "E5M2", ".*": "E3M4"})
    with pytest.raises(InputError, match="there are 2 groups, each with its own numbers"):
        _ = clipper.total_norm


# One leaf's gradients, step by step: what is not finite, after something and first of all; subnormals alone.
AMAXES = {
    "nan in between": [[800, 0], [1, 0], [np.nan, 0], [3, 4], [3, 4]],
    "infinity first": [[np.inf, 0], [1, 0], [800, 0], [-np.inf, 1], [np.nan, 1], [3, 4], [3, 4]],
    "subnormal": [[1e-40, 0], [3, 4], [1e-40, 0], [1e-40, 0], [3, 4]],
}


@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize("steps", AMAXES.values(), ids=AMAXES)
def test_same_memory_of_amaxes(steps: list[list[float]], window: int) -> None:
    """Of a step whose amax is not finite the last one stands again, and the oldest goes."""
    element = partition_relative_clip("E3M4", rule="scaled_max", window=window)
    clipper = PartitionRelativeClipper("E3M4", rule="scaled_max", window=window)
    state, update = element.init([jnp.zeros(2)]), jax.jit(lambda g, s: element.update(g, s, overflow_rate=0.5))
    for step in steps:
        parameter = torch.nn.Parameter(torch.zeros(2))
        parameter.grad = torch.tensor(step, dtype=torch.float32)
        clipped, state = update([jnp.array(step, jnp.float32)], state)
        clipper.clip_if_needed([parameter], 0.5)
        assert float(state.threshold) == clipper.clip_threshold
        nan_or_equal(np.asarray(clipped[0]), as_numpy(parameter.grad), str(step))
        np.testing.assert_array_equal(state.amax_history[:, 0], clipper.state_dict()[".*"]["amaxes"]["0"])


def test_a_short_memory_is_taken_up() -> None:
    """As it was written before a memory was filled up with zeros, or with another window."""
    clipper = PartitionRelativeClipper("E5M2", rule="scaled_max", window=3)
    for amaxes, threshold in (([7.0], 7.0), ([15.0, 14.0, 7.0, 7.0], 14.0)):
        clipper.load_state_dict({".*": {"rule": "scaled_max", "norms": [], "amaxes": {"0": amaxes}}})
        parameter = torch.nn.Parameter(torch.zeros(1))
        parameter.grad = torch.ones(1)
        clipper.clip_if_needed([parameter], 0.0)
        assert clipper.clip_threshold == threshold
        assert clipper.state_dict()[".*"]["amaxes"]["0"] == [*[0.0, *amaxes][-2:], 1.0]


# ---- torch alone


def test_nothing_is_clipped_or_remembered_before_an_error() -> None:
    """Of groups, the bad gradient is in the last: the first is as it was."""
    rules = {r"attn\..*": "E3M4", ".*": "E5M2"}
    for rule in ("max", "quantile", "scaled_max"):
        clipper, model = PartitionRelativeClipper(rules, rule=rule, nonfinite="raise"), Model()
        give(model, 11)
        before = [as_numpy(parameter.grad.clone()) for parameter in model.parameters()]
        remembered = clipper.state_dict()
        for rate in (0.0, 1.0, {r"attn\..*": 1.0, ".*": 0.0}):
            with pytest.raises(FloatingPointError, match=r"^gradient mlp\.bias holds 2 infinities or NaN among its 4"):
                clipper.clip_if_needed(model, rate)
        for gradient, parameter in zip(before, model.parameters(), strict=True):
            assert_same_bits(parameter.grad, gradient)
        assert clipper.state_dict() == remembered
        assert clipper.culprit == ("mlp.bias", 2)
        assert [group.total_norm for group in clipper.groups.values()] == [-1.0, -1.0]
        give(model, 10)
        assert clipper.clip_if_needed(model, 1.0)
    model = Model()
    model.attn.weight.grad = torch.ones(3, 5)
    with pytest.raises(ValueError, match="none of the 4 parameters has a gradient"):
        PartitionRelativeClipper(rules).clip_if_needed(model, 1.0)
    assert bool((model.attn.weight.grad == 1).all())


@pytest.mark.parametrize("nonfinite", ["propagate", "skip", "zero", "raise"])
def test_the_culprit_is_the_first_of_the_module(nonfinite: Any) -> None:
    """Whatever the order of the groups; counts are of all."""
    model = Model()
    give(model, 0)
    for name in ("attn.bias", "mlp.weight", "mlp.bias"):
        model.get_parameter(name).grad.view(-1)[:2] = float("nan")
    clipper = PartitionRelativeClipper({r"mlp\..*": "E5M2", r".*bias": "E5M2", ".*": "E5M2"}, nonfinite=nonfinite)
    if nonfinite == "raise":
        with pytest.raises(FloatingPointError, match=r"gradient attn\.bias holds 2 .* and 2 more gradients do"):
            clipper.clip_if_needed(model, 1.0)
    else:
        clipper.clip_if_needed(model, 1.0)
    assert clipper.culprit == ("attn.bias", 6)
    give(model, 0)
    clipper.clip_if_needed(model, 1.0)
    assert clipper.culprit == (None, 0)


def test_numbers_of_any_kind() -> None:
    for kind in (np.float32, np.float64, np.int64):
        norms = []
        for number in (kind, float):
            model = Model()
            give(model, 0)
            norms.append(float(clip_grad_norm_(model.parameters(), number(1), number(1))))
            PartitionRelativeClipper("E5M2", number(2), number(0)).clip_if_needed(model, number(1))
            norms.append([as_numpy(parameter.grad).tolist() for parameter in model.parameters()])
        assert norms[:2] == norms[2:]
    clipper = PartitionRelativeClipper("E5M2", rule="scaled_max", window=np.int64(2))
    clipper.clip_if_needed(model, 0.0)
    assert {len(amaxes) for amaxes in clipper.state_dict()[".*"]["amaxes"].values()} == {2}
    for bad in (True, "1", np.float32(-1)):
        with pytest.raises(InputError, match="max_norm is"):
            clip_grad_norm_(Model().parameters(), bad)
        with pytest.raises(InputError, match="base_clip is"):
            PartitionRelativeClipper("E5M2", bad)


def test_rates_are_single_numbers() -> None:
    model = Model()
    give(model, 0)
    clipper = PartitionRelativeClipper("E5M2")
    for rate in (torch.tensor(0.5), np.asarray(0.5), np.float32(0.5)):
        assert clipper.clip_if_needed(model, rate)
    for rate in (torch.tensor([0.5]), np.array([0.5, 0.5])):
        with pytest.raises(InputError, match=r"overflow_rate has the shape \([12],\); expected one number"):
            clipper.clip_if_needed(model, rate)
        with pytest.raises(InputError, match="overflow_rate has the shape"):
            clipper.clip_if_needed(model, {".*": rate})


def test_bad_rules_are_found_at_once() -> None:
    with pytest.raises(InputError, match=r"the rule '\(' is no regular expression"):
        PartitionRelativeClipper({"(": "E5M2"})

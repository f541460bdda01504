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

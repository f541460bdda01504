"""Weights committed to a grid have the same bits in both packages, and in both a skipped step leaves no trace."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from altgrad_core.formats import ROUNDINGS
from altgrad_jax import FormatParams, all_finite, commit, skip_nonfinite
from altgrad_torch import FormatParams as TorchParams
from altgrad_torch import SkipNonfinite, commit_
from altgrad_torch import all_finite as torch_all_finite
from parity_tests.support import EIGHT, assert_same_bits, assert_same_values, to_torch

_NAMES = [str(each) for each in EIGHT]


def _leaves() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    spread = (draw.normal(size=400) * 10.0 ** draw.uniform(-4, 0, 400)).astype(np.float32)
    return {
        **{f"times {scale:g}": spread * np.float32(scale) for scale in (1e-33, 1e-28, 1e-6, 1.0, 3e4, 1e28, 1e34)},
        "zeros": np.zeros((2, 3), np.float32),
        "not finite": np.array([1.0, -0.0, np.nan, np.inf, -np.inf, 1e-3, -1e30], np.float32),
        "scalar": np.array(-1.1, np.float32),
        "none": np.zeros((0, 2), np.float32),
    }


LEAVES = _leaves()
COMMIT = jax.jit(lambda leaves, grid: commit(leaves, grid, dict.fromkeys(LEAVES, True), seed=7, step=3))


@pytest.mark.parametrize("name", _NAMES)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_committed_weights_have_the_same_bits(name: str, rounding: str) -> None:
    grid = FormatParams.from_format(name, rounding=rounding, overflow="saturate_finite", path="integer")
    ours = COMMIT({name: jnp.asarray(leaf) for name, leaf in LEAVES.items()}, grid)
    theirs = {name: to_torch(leaf.copy()) for name, leaf in LEAVES.items()}
    order = sorted(LEAVES)
    seed = 7 if rounding == "stochastic" else None
    commit_([theirs[each] for each in order], name, rounding=rounding, overflow="saturate_finite", seed=seed, step=3)
    for leaf in LEAVES:
        assert_same_values(theirs[leaf], ours[leaf], LEAVES[leaf], f"{name}, {rounding}, {leaf}")


@pytest.mark.parametrize("name", _NAMES)
def test_by_name_and_as_data_too(name: str) -> None:
    """At the ends of float32's range, too, where the fast path's shifted grid is cut off."""
    ours = jax.jit(lambda leaves: commit(leaves, name, dict.fromkeys(LEAVES, True)))(
        {each: jnp.asarray(leaf) for each, leaf in LEAVES.items()}
    )
    assert np.isfinite(ours["times 1e+34"]).all()
    for grid in (name, TorchParams.from_format(name)):
        theirs = {each: to_torch(LEAVES[each].copy()) for each in LEAVES}
        commit_(theirs.values(), grid)
        for each in LEAVES:
            assert_same_values(theirs[each], ours[each], LEAVES[each], f"{name}, {each}")


def test_the_same_trees_are_finite() -> None:
    for name, leaf in LEAVES.items():
        expected = name != "not finite"
        assert bool(all_finite({"w": jnp.asarray(leaf)})) is bool(torch_all_finite([to_torch(leaf)])) is expected


def test_the_same_steps_are_skipped() -> None:
    draw = np.random.default_rng(1)
    gradients = (draw.integers(-8, 9, (12, 3)) * 0.25).astype(np.float32)
    gradients[[0, 4, 5, 11], 1] = np.inf, np.nan, -np.inf, np.nan
    tx = skip_nonfinite(optax.sgd(0.25, momentum=0.5))
    params, weight = jnp.zeros(3), torch.nn.Parameter(torch.zeros(3))
    state, skipping = tx.init(params), SkipNonfinite(torch.optim.SGD([weight], lr=0.25, momentum=0.5))
    update = jax.jit(tx.update)
    for gradient in gradients:  # all sums and products are exact
        updates, state = update(jnp.asarray(gradient), state, params)
        params = optax.apply_updates(params, updates)
        weight.grad = to_torch(gradient.copy())
        skipping.step()
        assert_same_bits(weight, params)
        seen = (bool(skipping.finite), int(skipping.consecutive), int(skipping.skipped))
        assert seen == (bool(state.finite), int(state.consecutive), int(state.skipped))
    assert int(state.skipped) == 4

"""Formats that differ from layer to layer: each is cast, stored and judged as it would be alone."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from altgrad_core.errors import InputError
from altgrad_jax import (
    CodeParams,
    EmergencyMantissaShift,
    FormatController,
    FormatParams,
    Policy,
    commit,
    partition_relative_clip,
    quantize,
    set_format,
    stall_monitor,
)
from altgrad_jax.nn.products import Grid

FORMATS = ("E0M7", "E4M3", "E5M2", "E7M0")
WEIGHTS = {f"w{k}": jnp.asarray(np.random.default_rng(k).standard_normal(40) * 10.0**k, jnp.float32) for k in range(4)}
MASK = {"w0": True, "w1": False, "w2": True, "w3": True}


def of(*formats: str, **options: Any) -> FormatParams:
    """Params of several formats that started as one."""
    return set_format(FormatParams.from_format("E4M3", **options).for_each(len(formats)), formats)


def same(left: Any, right: Any) -> None:
    chex.assert_trees_all_equal(*(jax.tree.map(np.asarray, each) for each in (left, right)))


@pytest.mark.parametrize("path", ["fast", "wide", "integer"])
def test_grids_of_rows_are_those_of_each_format(path: Any) -> None:
    scales = jnp.array([[2.0**-7, 1.0, 2.0**9]] * 4) * jnp.array([1.0, 2.0, 4.0, 8.0])[:, None]
    grids = Grid.of(of(*FORMATS, path=path), scales)
    for row, name in enumerate(FORMATS):
        alone = Grid.of(FormatParams.from_format(name, path=path), scales[row])
        for column in range(3):
            same(grids.looked_up(jnp.array([row, column])), alone.looked_up(jnp.array([column])))


@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic"])
def test_weights_are_stored_on_grids_of_their_own(rounding: Any) -> None:
    options: Any = {"rounding": rounding, "overflow": "saturate_finite", "path": "integer"}
    stored = commit(WEIGHTS, of("E0M7", "E5M2", "E7M0", **options), MASK, seed=3, step=5)
    for name, kind in zip(("w0", "w2", "w3"), ("E0M7", "E5M2", "E7M0"), strict=True):
        alone = commit(WEIGHTS, FormatParams.from_format(kind, **options), MASK, seed=3, step=5)
        same(stored[name], alone[name])
    same(stored["w1"], WEIGHTS["w1"])


def test_stalls_are_judged_on_grids_of_their_own() -> None:
    updates = jax.tree.map(lambda leaf: leaf * 0.03, WEIGHTS)
    tx = stall_monitor(of("E0M7", "E5M2", "E7M0"), MASK)
    _, state = tx.update(updates, tx.init(WEIGHTS), WEIGHTS)
    alone = [stall_monitor(kind, MASK) for kind in ("E0M7", "E5M2", "E7M0")]
    rates = [each.update(updates, each.init(WEIGHTS), WEIGHTS)[1].stall_rates for each in alone]
    expected = jnp.array([rates[k][k] for k in range(3)])
    same(state.stall_rates, expected)
    assert len(set(expected.tolist())) == 3
    same(state.stall_rate, jnp.mean(expected))


def test_another_number_of_formats_is_refused() -> None:
    for call in (
        lambda: stall_monitor(of("E5M2", "E4M3"), MASK).init(WEIGHTS),
        lambda: commit(WEIGHTS, of("E5M2"), MASK),
    ):
        with pytest.raises(InputError, match=r"expected \(\), or \(3,\) for 3 leaves"):
            call()


# ---- set_format


def test_set_format_for_runs_and_their_layers() -> None:
    layers = FormatParams.from_format("E4M3").for_each(3)
    runs = {
        "layers": FormatParams.stack([layers] * 2),
        "whole": FormatParams.stack([FormatParams.from_format("E4M3")] * 2),
    }
    by_run = set_format(runs, ["E7M0", "E5M2"])
    assert by_run["layers"].max_value.tolist() == [[2.0**64] * 3, [57344.0] * 3]
    assert by_run["whole"].max_value.tolist() == [2.0**64, 57344.0]
    by_layer = set_format(runs["layers"], [["E7M0", "E5M2", "E3M4"], ["E4M3"] * 3])
    assert by_layer.max_value.tolist() == [[2.0**64, 57344.0, 124.0], [448.0] * 3]
    assert by_layer.rounding.shape == (2,)
    for formats in (["E5M2"] * 3, [["E5M2"] * 2] * 2):
        with pytest.raises(ValueError, match=r"formats for params of shape \(2, 3\)"):
            set_format(runs["layers"], formats)
    with pytest.raises(ValueError, match=r"2 x 3 formats for params of shape \(2,\)"):
        set_format(runs["whole"], [["E7M0", "E5M2", "E3M4"]] * 2)


def test_set_format_leaves_no_special_codes_of_another_format() -> None:
    state = {"cast": FormatParams.from_format("E4M3"), "code": CodeParams.from_format("E4M3")}
    with pytest.raises(InputError, match="holds CodeParams"):
        set_format(state, "E5M2")


def test_set_format_finds_layers_by_their_keys() -> None:
    params = FormatParams.from_format("E4M3")
    state = {"blocks": [{"mlp": params, "attention": (params, params)}, {"mlp": params}], "clip": params}

    def maxima(formats: dict[str, str]) -> list[float]:
        written = set_format(state, formats)
        nodes = jax.tree.leaves(written, is_leaf=lambda node: isinstance(node, FormatParams))
        return [float(node.max_value) for node in nodes]

    # In the order attention, attention, mlp, mlp of the second block, clip.
    assert maxima({"mlp": "E5M2"}) == [448.0, 448.0, 57344.0, 57344.0, 448.0]
    assert maxima({"blocks/1": "E5M2"}) == [448.0, 448.0, 448.0, 57344.0, 448.0]
    assert maxima({"blocks/0/mlp": "E3M4", "mlp": "E5M2"}) == [448.0, 448.0, 124.0, 57344.0, 448.0]
    for layer, hint in (
        ("mpl", "did you mean 'mlp'"),
        ("block", "did you mean 'blocks'"),
        ("lp", "blocks/1/mlp, clip"),
    ):
        with pytest.raises(InputError, match=hint):
            set_format(state, {"mlp": "E5M2", layer: "E4M3"})


# ---- a loop of one's own


def test_a_controller_moves_one_layer_and_nothing_is_traced_again() -> None:
    policy = Policy("by_cause", window=1, warmup=0, cooldown=0)
    controller = FormatController({"mlp": "E4M3", "logits": "E4M3"}, policy=policy, shifter=EmergencyMantissaShift())
    formats = {layer: FormatParams.from_format("E4M3") for layer in ("mlp", "logits")}
    state = {"formats": formats, "clip": partition_relative_clip("E4M3").init(WEIGHTS)}

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(state: Any, x: jax.Array) -> dict[str, jax.Array]:
        cast = {layer: quantize(x, params) for layer, params in state["formats"].items()}
        rates = {f"{layer}/overflow_rate": jnp.mean(jnp.isnan(y)) for layer, y in cast.items()}
        return {"loss": jnp.float32(1), "finite": jnp.asarray(True), **rates, "logits/overflow_rate": jnp.float32(0)}

    for k in range(4):
        state = controller.step(k, step(state, jnp.array([1.0, 1e4])), state)
    assert controller.formats == {"mlp": "E5M2", "logits": "E4M3"}
    assert [(event.step, event.numbers["layer"], event.numbers["to"]) for event in controller.events] == [
        (0, "mlp", "E5M2")
    ]
    maxima = {layer: float(params.max_value) for layer, params in state["formats"].items()}
    assert (maxima, float(state["clip"].format.max_value)) == ({"mlp": 57344.0, "logits": 448.0}, 448.0)

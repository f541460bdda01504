"""The same metrics drive both packages' controllers to the same decisions at the same steps, and runs heal alike.

The runs take gradient steps on one quadratic whose weights are used on the grid of the current format, all arithmetic
exact in float32, so that the weights must agree in every bit through skips, shifts and rollbacks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import altgrad_jax
import altgrad_torch
from altgrad_jax import EmergencyMantissaShift, Policy
from altgrad_jax.control import get_format
from parity_tests.support import as_numpy, to_torch

_EAGER = {"window": 2, "warmup": 0, "cooldown": 4}
POLICIES = {
    "off": Policy("off"),
    "literal": Policy("fallback_chain", **_EAGER),
    "relative": Policy("relative_stall", **_EAGER),
    "by cause": Policy("by_cause", **_EAGER, recover_after=6),
}


def metrics_of(draw: np.random.Generator, steps: int) -> list[dict[str, np.generic]]:
    """Bursts of NaN, losses that run away, poisoned parameters, rates of all sizes."""
    rows: list[dict[str, np.generic]] = []
    state = "calm"
    for _ in range(steps):
        state = draw.choice(["calm", "nan", "high"]) if draw.random() < 0.25 else state
        nan = state == "nan"
        rows.append(
            {
                "loss": np.float32(math.nan if nan else 1.0 + draw.random() * 0.1 + 5 * (state == "high")),
                "finite": np.bool_(not nan),
                "params_finite": np.bool_(draw.random() > 0.02),
                "stall_rate": np.float32(draw.choice([0.1, 0.4, 0.9])),
                "overflow_rate": np.float32(draw.choice([0.0, 0.005, 0.05])),
                "underflow_rate": np.float32(draw.choice([0.0, 0.3])),
            }
        )
    return rows


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("can_roll_back", [False, True])
def test_same_decisions_at_the_same_steps(name: str, can_roll_back: bool) -> None:
    settings: dict[str, Any] = {"policy": POLICIES[name], "can_roll_back": can_roll_back}
    ours = altgrad_jax.FormatController("E2M5", shifter=EmergencyMantissaShift(), **settings)
    theirs = altgrad_torch.FormatController("E2M5", shifter=EmergencyMantissaShift(), **settings)
    state = {"format": altgrad_jax.FormatParams.from_format("E2M5"), "rolled back": jnp.int32(0)}
    clipper, detector = altgrad_torch.PartitionRelativeClipper("E2M5"), altgrad_torch.BitStallDetector("E2M5")
    params = altgrad_torch.FormatParams.from_format("E2M5")
    holders, rolled_back = [clipper, detector, params], []
    back: dict[str, Any] = {"ours": None, "theirs": None}
    if can_roll_back:
        back = {
            "ours": lambda state: {**state, "rolled back": state["rolled back"] + 1},
            "theirs": lambda: rolled_back.append(None),
        }
    for step, row in enumerate(metrics_of(np.random.default_rng(len(name)), 80)):
        state = ours.step(step, {key: jnp.asarray(value) for key, value in row.items()}, state, back["ours"])
        theirs.step(step, {key: torch.tensor(value.item()) for key, value in row.items()}, holders, back["theirs"])
        assert repr(theirs.saved()) == repr(ours.saved()), "with the step in flight"
        assert (theirs.format, theirs.calm, len(rolled_back)) == (ours.format, ours.calm, int(state["rolled back"]))
        assert str(clipper.format) == str(detector.format) == ours.format
        assert float(params.max_value) == float(state["format"].max_value)
    ours.drain(state, back["ours"])
    theirs.drain(holders, back["theirs"])
    assert [event.to_json() for event in theirs.events] == [event.to_json() for event in ours.events]
    assert repr(theirs.saved()) == repr(ours.saved())
    assert any(event.kind == "shift" for event in ours.events)
    assert any(event.kind == "rollback" for event in ours.events) is can_roll_back


_TARGET = np.array([0.75, -3.0, 6.5, 1e-3], np.float32)
_RATE, _STEPS, _EVERY = 0.25, 40, 4
NAN_STEPS, POISONED = (10, 11, 12), 25


@dataclass
class _Trace:
    formats: list[str] = field(default_factory=list)
    weights: list[bytes] = field(default_factory=list)
    events: list[str] = field(default_factory=list)


def _controller(package: Any) -> Any:
    return package.FormatController("E3M4", policy="off", shifter=EmergencyMantissaShift(), can_roll_back=True)


def _factor(step: int) -> float:
    return math.nan if step in NAN_STEPS else 1.0


def _run_jax(where: Any) -> _Trace:
    tx = altgrad_jax.skip_nonfinite(
        optax.chain(altgrad_jax.partition_relative_clip("E3M4"), optax.sgd(_RATE, momentum=0.5))
    )
    state = {"weights": jnp.zeros(4), "optimizer": tx.init(jnp.zeros(4))}
    controller, trace = _controller(altgrad_jax), _Trace()
    keeper = altgrad_jax.SnapshotKeeper(state, every=_EVERY, where=where)

    @jax.jit
    def train(state: Any, factor: Any) -> tuple[Any, Any]:
        weights, optimizer = state["weights"], state["optimizer"]
        gradient = (altgrad_jax.quantize(weights, get_format(optimizer)) - _TARGET) * factor
        updates, optimizer = tx.update(gradient, optimizer, weights, overflow_rate=0.0)
        weights = weights + updates
        metrics = {"loss": jnp.max(jnp.abs(gradient)), "finite": optimizer.finite}
        metrics["params_finite"] = altgrad_jax.all_finite(weights)
        return {"weights": weights, "optimizer": optimizer}, metrics

    for step in range(_STEPS):
        if step == POISONED:
            state["weights"] = state["weights"].at[0].set(jnp.inf)
        state, metrics = train(state, _factor(step))
        state = controller.step(step, metrics, state, keeper.roll_back)
        keeper.offer(step, state, metrics["finite"] & metrics["params_finite"] & controller.calm)
        trace.formats.append(controller.format)
        trace.weights.append(np.asarray(state["weights"]).tobytes())
    assert train._cache_size() == 1
    trace.events = [event.to_json() for event in controller.events]
    return trace


def _run_torch(where: Any) -> _Trace:
    weights = torch.nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([weights], lr=_RATE, momentum=0.5)
    skipping, clipper = altgrad_torch.SkipNonfinite(optimizer), altgrad_torch.PartitionRelativeClipper("E3M4")
    controller, trace = _controller(altgrad_torch), _Trace()
    keeper = altgrad_torch.SnapshotKeeper(torch.nn.ParameterList([weights]), optimizer, every=_EVERY, where=where)
    for step in range(_STEPS):
        if step == POISONED:
            weights.data[0] = math.inf
        gradient = altgrad_torch.quantize(weights.detach(), controller.format) - to_torch(_TARGET)
        weights.grad = gradient * _factor(step)
        clipper.clip_if_needed([weights], overflow_rate=0.0)
        metrics = {"loss": weights.grad.abs().amax(), "finite": skipping.step()}
        metrics["params_finite"] = altgrad_torch.all_finite([weights])
        controller.step(step, metrics, [clipper], keeper.roll_back)
        keeper.offer(step, metrics["finite"] & metrics["params_finite"] & controller.calm)
        trace.formats.append(controller.format)
        trace.weights.append(as_numpy(weights).tobytes())
    trace.events = [event.to_json() for event in controller.events]
    return trace


@pytest.mark.parametrize("where", ["device", "host"])
def test_runs_heal_alike(where: str) -> None:
    ours, theirs = _run_jax(where), _run_torch(where)
    assert theirs.formats == ours.formats == ["E3M4"] * 13 + ["E5M2"] * (_STEPS - 13)
    assert theirs.events == ours.events
    assert [line.split('"kind": ')[1].split(",")[0] for line in ours.events] == ['"shift"', '"rollback"']
    assert theirs.weights == ours.weights
    assert np.isfinite(np.frombuffer(ours.weights[-1], np.float32)).all()
    assert ours.weights[26] == ours.weights[20]  # of the snapshots of steps 20 and 24 the older

"""Two processes of jax.distributed on loopback train as one does: same norms, gates, formats, at the same steps.

Run as a module it is one of the two; the tests look at what each wrote.
"""

import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from altgrad_core.evidence import Evidence
from altgrad_core.remedies import Remedy
from altgrad_jax import (
    EmergencyMantissaShift,
    FormatController,
    Observation,
    Policy,
    get_format,
    partition_relative_clip,
    quantize,
    skip_nonfinite,
)
from altgrad_jax import consensus as consensus_module
from altgrad_jax.consensus import Consensus
from tests.processes import results_of, write_result

STEPS = 12
NANS = (3, 4, 5)
SPIKE = 9
BATCH, INPUTS, OUTPUTS = 16, 8, 6
OFF = Policy("off")
Metrics = dict[str, jax.Array]


@cache
def element() -> optax.GradientTransformationExtraArgs:
    """Made late: it holds arrays, and jax.distributed has to come first."""
    return skip_nonfinite(optax.chain(partition_relative_clip("E4M3"), optax.sgd(2.0**-6)))


def batch(step: int) -> tuple[np.ndarray, np.ndarray]:
    """Small integers. At some steps one element, which lies on the second process, is not finite, or far too large."""
    draw = np.random.default_rng(step)
    x = draw.integers(-2, 3, (BATCH, INPUTS)).astype(np.float32)
    y = draw.integers(-4, 5, (BATCH, OUTPUTS)).astype(np.float32)
    y[-1, 2] = np.nan if step in NANS else 400.0 if step == SPIKE else y[-1, 2]
    return x, y


@jax.jit
def train_step(state: Any, x: jax.Array, y: jax.Array) -> tuple[Any, Metrics]:
    """Weights and errors on the grid, inputs integers: the sums are exact, whatever their order."""
    weights, optimizer = state
    error = quantize(x @ quantize(weights, "E4M3") - y, "E4M3", overflow="saturate_finite")
    loss = jnp.sum(jnp.abs(error))
    updates, after = element().update(x.T @ error, optimizer, weights)
    seen = {name: optax.tree.get(after, name) for name in ("total_norm", "clipped", "finite")}
    return (weights + updates, after), {"loss": loss, "max": get_format(optimizer).max_value, **seen}


def train(mesh: Mesh, seen_by: Callable[[int, Metrics], Metrics] = lambda step, metrics: metrics) -> dict[str, Any]:
    """A run, and what it was at each step. ``seen_by`` changes what this process tells its controller."""

    def place(value: Any, spec: P) -> jax.Array:
        whole = np.asarray(value)
        return jax.make_array_from_callback(whole.shape, NamedSharding(mesh, spec), lambda index: whole[index])

    weights = np.zeros((INPUTS, OUTPUTS), np.float32)
    state = jax.tree.map(lambda leaf: place(leaf, P()), (weights, element().init(weights)))
    state = (place(weights, P(None, "model")), state[1])
    controller = FormatController("E4M3", policy=OFF, shifter=EmergencyMantissaShift(len(NANS)))
    lines = []
    for step in range(STEPS):
        x, y = batch(step)
        state, metrics = train_step(state, place(x, P("data")), place(y, P("data", "model")))
        told = seen_by(step, {name: metrics[name] for name in ("loss", "finite")})
        state = controller.step(step, told, state)
        lines.append({name: repr(float(value)) for name, value in metrics.items()} | {"format": controller.format})
    state = controller.drain(state)
    parts = [(str(part.index), np.asarray(part.data).tobytes().hex()) for part in state[0].addressable_shards]
    return {
        "lines": lines,
        "events": [event.to_json() for event in controller.events],
        "memory": controller.saved(),
        "compiled": train_step._cache_size(),
        "weights": dict(parts),
    }


def nan_at(steps: Mapping[int, tuple[int, ...]]) -> Callable[[int, Metrics], Metrics]:
    """Metrics that are not finite at other steps on each process."""
    mine = steps[jax.process_index()]
    return lambda step, _: {
        "loss": jnp.float32(math.nan if step in mine else 1),
        "finite": jnp.asarray(step not in mine),
    }


NANS_APART = {0: (6, 7, 8), 1: (1, 2, 3, 8, 9, 10)}


# ---- one of two processes


def keeps_devices_busy(mesh: Mesh) -> dict[str, bool]:
    """Decide on, and write formats into a state on all devices, while they have something else to do."""
    sharding = NamedSharding(mesh, P(("data", "model")))
    ones = jax.make_array_from_callback((4, 200, 200), sharding, lambda _: np.ones((1, 200, 200), np.float32))
    busy = jax.jit(lambda x: jax.lax.fori_loop(0, 500, lambda _, y: jnp.tanh(y @ x[0]) + jnp.mean(y), x))
    compiled = busy.lower(ones).compile()
    clip = partition_relative_clip("E4M3").init(np.zeros(2))
    state = jax.tree.map(
        lambda leaf: jax.make_array_from_callback(leaf.shape, NamedSharding(mesh, P()), lambda _: np.asarray(leaf)),
        clip.format,
    )
    controller = FormatController("E4M3", policy=OFF, shifter=EmergencyMantissaShift(1))
    bad = {"loss": jnp.float32(math.nan), "finite": jnp.asarray(False)}
    controller.step(0, bad, state)
    result = compiled(ones)
    state = controller.step(1, bad, state)
    still = not result.is_ready()
    result.block_until_ready()
    return {"shifted": float(state.max_value) == 57344.0, "busy meanwhile": still}


def told(act: Callable[[], object]) -> str:
    try:
        return str(act())
    except (RuntimeError, TimeoutError, TypeError) as error:
        return f"{type(error).__name__}: {error}"


def at_odds(rank: int) -> dict[str, str]:
    """What is said where processes do not do the same. Each has to hear of it, and none may wait for ever."""

    def rule(evidence: Evidence, policy: Policy, shifter: EmergencyMantissaShift | None) -> tuple[Remedy, ...]:
        raise RuntimeError("no rule")

    def numpy_rule(evidence: Evidence, policy: Policy, shifter: EmergencyMantissaShift | None) -> tuple[Remedy, ...]:
        return (Remedy("whim", format="E5M2", numbers={"why": np.float32(0.5)}),)

    alone = FormatController("E4M3", policy=OFF, shifter=EmergencyMantissaShift(1), together=False)
    found = {"alone": told(lambda: alone.observe(Observation(0, math.nan, finite=rank == 0)).format)}
    untold = FormatController("E4M3", policy=Policy(numpy_rule), shifter=EmergencyMantissaShift(3))
    found["untold"] = told(lambda: untold.observe(Observation(1, 1.0, True)))
    found["failed"] = told(lambda: FormatController("E4M3", policy=Policy(rule)).observe(Observation(3, 1.0, True)))
    found["apart"] = told(lambda: FormatController("E4M3").observe(Observation(7 + rank, 1.0, True)).acts)
    consensus_module._PATIENCE = 0.2
    if rank == 1:
        found["late"] = told(lambda: FormatController("E4M3").observe(Observation(0, 1.0, True)))
    return found


def many_messages(rank: int) -> dict[str, Any]:
    """More than are kept: all arrive, and those before the last sweep are gone."""
    consensus_module._SWEEP, series = 4, Consensus()
    texts = [series.from_first(str(k) if rank == 0 else "") for k in range(11)]
    store = consensus_module.distributed.global_state.client
    store.wait_at_barrier("all swept", 10_000)
    kept = [key for key, _ in store.key_value_dir_get(f"altgrad/consensus/{series._number}")]
    return {"texts": texts, "kept": sorted(key.rsplit("/", 2)[1] for key in kept)}


def main(rank: int, count: int, port: int, file: str) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        f"127.0.0.1:{port}", count, rank, heartbeat_timeout_seconds=20, shutdown_timeout_seconds=5
    )
    assert (jax.device_count(), jax.local_device_count()) == (4, 2)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "model"))
    found: dict[str, Any] = {"run": train(mesh), "apart": train(mesh, nan_at(NANS_APART))}
    found["busy"] = keeps_devices_busy(mesh)
    found["many"] = many_messages(rank)
    found["at odds"] = at_odds(rank)
    write_result(file, found)
    jax.distributed.shutdown()
    os._exit(0)  # what gloo does on the way down is not under test


# ---- the tests


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    return results_of("tests.test_distribution_processes", 2, environment=flags)


def of_one_process(seen_by: Callable[[int, Metrics], Metrics] = lambda step, metrics: metrics) -> dict[str, Any]:
    return json.loads(json.dumps(train(Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model")), seen_by)))


@pytest.mark.parametrize("run", ["run", "apart"])
def test_two_processes_train_as_one(found: list[dict[str, Any]], run: str) -> None:
    """Also where process 1 sees what is not finite earlier, and later once more: process 0 decides."""
    one = of_one_process() if run == "run" else of_one_process(nan_at(NANS_APART))
    for process in found:
        for part in ("lines", "events", "memory"):
            assert process[run][part] == one[part], part
    formats = [line["max"] for line in one["lines"]]
    last = (NANS if run == "run" else NANS_APART[0])[-1]
    # Seen at the step after, in force from the one after that.
    assert formats == ["448.0"] * (last + 2) + ["57344.0"] * (STEPS - last - 2)
    assert [line["clipped"] for line in one["lines"]] == [str(float(step == SPIKE)) for step in range(STEPS)]


@pytest.mark.parametrize("run", ["run", "apart"])
def test_weights_have_the_same_bits(found: list[dict[str, Any]], run: str) -> None:
    """Every part, wherever it lies."""
    one = of_one_process() if run == "run" else of_one_process(nan_at(NANS_APART))
    (raw,) = one["weights"].values()
    whole = np.frombuffer(bytes.fromhex(raw), np.float32).reshape(INPUTS, OUTPUTS)
    halves = {str((slice(None), slice(k, k + 3))): whole[:, k : k + 3].tobytes().hex() for k in (0, 3)}
    for process in found:
        assert process[run]["weights"] == halves


def test_a_shift_compiles_nothing(found: list[dict[str, Any]]) -> None:
    assert [process["apart"]["compiled"] for process in found] == [1, 1]


def test_no_device_is_waited_for(found: list[dict[str, Any]]) -> None:
    """A decision is made, told and written into the state while the devices compute something else."""
    assert [process["busy"] for process in found] == [{"shifted": True, "busy meanwhile": True}] * 2


def test_messages_are_thrown_away(found: list[dict[str, Any]]) -> None:
    expected = {"texts": [str(k) for k in range(11)], "kept": ["2"] * 3}
    assert [process["many"] for process in found] == [expected] * 2


def test_a_run_of_ones_own(found: list[dict[str, Any]]) -> None:
    """Not told to the others: process 1 alone saw what is not finite."""
    assert [process["at odds"]["alone"] for process in found] == ["None", "E5M2"]


def test_processes_at_odds(found: list[dict[str, Any]]) -> None:
    first, second = (process["at odds"] for process in found)
    assert first["untold"].startswith("TypeError: Object of type float32 is not JSON")
    assert second["untold"].startswith("RuntimeError: process 0 could not decide on step 1: TypeError(")
    assert first["failed"] == "RuntimeError: no rule"
    assert second["failed"] == "RuntimeError: process 0 could not decide on step 3: RuntimeError('no rule')"
    assert first["apart"] == "False"
    assert second["apart"].startswith("RuntimeError: process 1 observes step 8 but process 0 step 7")
    assert second["late"].startswith("TimeoutError: process 1 has waited for message 1 of process 0 for 0.2 s")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])

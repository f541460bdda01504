"""Whole trainings with exact sums on eight devices, batch and weights split among them, have the bits of one device.

Run as a module it is the process with eight devices, which writes what it computed; the tests compute the same on one.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from altgrad_core.twins import Batch, Batches, GPTShape, MLPShape, Recipe, Shape
from altgrad_jax.twins import make
from tests.processes import results_of, write_result

# Of the shapes of parity_tests/test_twins.py, whose compiled programs the cache of a test run has.
SHAPES: dict[str, Shape] = {
    "mlp": MLPShape((24, 16, 10), batch=8),
    "gpt": GPTShape(context=8, layers=1, width=16, heads=2, batch=2),
}
BATCH_OVER = {"mlp": P(("data", "model")), "gpt": P("data")}
"""A batch of eight over all devices, one of two over two of them; weights over the four that are the other axis."""

RECIPES = {
    "sgd": Recipe("E5M2"),
    "spans that have to be sliced": Recipe("E7M0"),
    "adamw, committed": Recipe("E4M3", "adamw", "committed"),
}
STEPS = {"mlp": 4, "gpt": 20}

Place = Callable[[str, Any], Any]
"""Puts ``"batch"`` or ``"weight"``, an array, where it is to be."""


def digests(model: str, recipe: Recipe, place: Place) -> tuple[list[dict[str, str]], list[str]]:
    """Of each step every tensor's bits, shortened, by name; and which weights are split among devices in the end."""
    shape = SHAPES[model]
    batches = shape.batches(0) if isinstance(shape, MLPShape) else windows(shape)

    def placed(step: int) -> Any:
        return tuple(place("batch", each) for each in batches(step))

    state, step = make(shape, recipe, shape.initial_weights(0), placed)
    state, found = jax.tree.map(lambda weight: place("weight", weight), state), []
    for number in range(STEPS[model]):
        state, seen = step(state, number)
        bits = {name: np.asarray(tensor).tobytes() for name, tensor in seen.items()}
        found.append({name: hashlib.sha256(each).hexdigest()[:16] for name, each in bits.items()})
    return found, [name for name, weight in state.weights.items() if not weight.sharding.is_fully_replicated]


def windows(shape: GPTShape) -> Batches:
    """Tokens that follow each other as in a text: by a rule, with some noise."""

    def batch(step: int) -> Batch:
        draw = np.random.default_rng(step)
        tokens = np.cumsum(draw.integers(1, 4, (shape.batch, shape.context + 1)), axis=1) % shape.vocabulary
        return tokens[:, :-1].astype(np.int32), tokens[:, 1:].astype(np.int32)

    return batch


def main(path: str) -> None:
    """Every recipe of the model that the environment names, on eight devices."""
    model, mesh = os.environ["ALTGRAD_TEST_MODEL"], Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "model"))

    def place(kind: str, x: Any) -> Any:
        if kind == "batch":
            return jax.device_put(x, NamedSharding(mesh, BATCH_OVER[model]))
        last = "model" if x.shape[-1] % mesh.shape["model"] == 0 else None
        return jax.device_put(x, NamedSharding(mesh, P(*(None,) * (x.ndim - 1), last)))

    write_result(path, {name: digests(model, recipe, place) for name, recipe in RECIPES.items()})


@pytest.mark.exhaustive  # exact steps are compiled for one device and for eight, in a process of their own
@pytest.mark.parametrize("model", ["mlp", "gpt"])
def test_eight_devices_train_to_the_bits_of_one(model: str) -> None:
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "ALTGRAD_TEST_MODEL": model}
    (found,) = results_of("tests.test_twins_devices", environment=environment, timeout=600)
    for name, recipe in RECIPES.items():
        (steps, split), (expected, _) = found[name], digests(model, recipe, lambda kind, x: x)
        assert {"mlp": "layer0.weight", "gpt": "block0.qkv"}[model] in split
        for number, (tensors, wanted) in enumerate(zip(steps, expected, strict=True)):
            assert wanted.keys() == tensors.keys()
            assert [tensor for tensor in wanted if wanted[tensor] != tensors[tensor]] == [], (name, number)


if __name__ == "__main__":
    main(sys.argv[-1])

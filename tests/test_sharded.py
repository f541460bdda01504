"""Arrays that are split over the axes of a mesh, explicit ones and others: the bits of one device, nothing gathered.

Run as a module it is the process with eight devices, which does everything once; the tests look at what it wrote.
"""

from __future__ import annotations

import hashlib
import math
import re
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import altgrad_jax as ag
from altgrad_jax import statistics
from altgrad_jax.nn import CastVariable, Rule, quantize_model, recording
from tests.processes import results_of, write_result

SPECS = {
    "both": P("data", "model"),
    "rows": P("data", None),
    "columns": P(None, "model"),
    "together": P(("data", "model")),
}
SHAPES = {"small": (16, 64), "large": (1024, 512)}
RULES: dict[str, dict[str, object]] = {
    "delayed": {},
    "channel": {"granularity": "channel"},
    "block4": {"granularity": "block4"},
    "stochastic": {"rounding": "stochastic"},
}


def _clipped(x: jax.Array) -> jax.Array:
    tx = ag.partition_relative_clip("E5M2")
    return tx.update([1e6 * x], tx.init([x]))[0]


def _masked(x: jax.Array) -> jax.Array:
    return jax.grad(lambda x: ag.quantize(x, "E4M3", saturation_mask=True).sum())(200 * x)


OPERATIONS: dict[str, Callable[[jax.Array], Any]] = {
    "quantize": partial(ag.quantize, format="E4M3"),
    "with a mask": _masked,
    "stochastic": lambda x: ag.quantize(x, "E4M3", rounding="stochastic", random_bits=ag.hash_bits(x.shape, 0, 1)),
    "there and back": lambda x: ag.decode(ag.encode(x, "E4M3"), "E4M3"),
    "observe": partial(ag.observe, format="E4M3", scale=2.0**-7),
    "observe by channels": lambda x: ag.observe(x, "E4M3", scale=jnp.full((x.shape[0], 1), 2.0**-7)),
    "with counts": partial(ag.quantize_with_counts, format="E4M3"),
    "stalls": lambda x: ag.stall_counts(x, 1e-2 * x, "E4M3"),
    "amax of rows": lambda x: ag.amaxes(x, ag.PerChannel(0)),
    "amax of blocks": partial(ag.amaxes, granularity="block32"),
    "blocks": partial(ag.quantize_blocks, format="E4M3"),
    "blocks down": partial(ag.quantize_blocks, format="E4M3", block=8, axis=0),
    "uneven blocks": partial(ag.quantize_blocks, format="E4M3", block=24),
    "codes of blocks": lambda x: ag.decode_blocks(*ag.encode_blocks(x, "E4M3"), "E4M3"),
    "norm": lambda x: ag.global_norm([x]),
    "clipped": _clipped,
    "product": lambda x: ag.exact_dot_general(x, x, (((), ()), ((0, 1), (0, 1)))),
}
CASES = [(name, "small") for name in OPERATIONS] + [
    (name, "large") for name in ("observe", "amax of rows", "blocks", "norm", "stalls")
]
MOVED = ("both", "columns")
"""Where the last axis is split, so that to flatten an array is to gather it."""
GATHER_NOTHING = ("observe", "with counts", "stalls", "amax of rows", "blocks", "blocks down", "norm", "clipped")


LAYERS = [(name, "native") for name in RULES] + [("delayed", "exact")]


class Model(nnx.Module):
    """Says how its results are to be split, as Flax's layers let it."""

    def __init__(self, rngs: nnx.Rngs, *, split: bool) -> None:
        self.up = nnx.Linear(16, 32, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(32, 8, use_bias=False, rngs=rngs)
        self.out = nnx.Einsum("bi,ij->bj", (8, 4), rngs=rngs)
        self.split = split

    def __call__(self, x: jax.Array) -> jax.Array:
        wide, narrow = (P("data", "model"), P("data", None)) if self.split else (None, None)
        x = self.down(nnx.relu(self.up(x, out_sharding=wide)), out_sharding=narrow)
        return self.out(x, out_sharding=narrow)


def digest(tree: object) -> str:
    arrays = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    return hashlib.sha256(b"".join(each.tobytes() for each in arrays)).hexdigest()


def values(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def mesh(kind: AxisType) -> Mesh:
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))


def ways(size: str) -> list[tuple[AxisType, str]]:
    """In which an array of a size is split: large ones in those in which most is to be moved."""
    return [(AxisType.Explicit, place) for place in (SPECS if size == "small" else MOVED)] + [(AxisType.Auto, "both")]


def of_operations() -> dict[str, str]:
    found = {}
    for name, size in CASES:
        x = values(SHAPES[size])
        for kind, place in ways(size):
            on = mesh(kind)
            with jax.set_mesh(on):
                split = jax.device_put(x, NamedSharding(on, SPECS[place]))
                found[f"{name}/{size}/{kind.name}/{place}"] = digest(jax.jit(OPERATIONS[name])(split))
    return found


def gathered() -> dict[str, int]:
    """Elements in the largest array that is gathered or exchanged."""
    found, on = {}, mesh(AxisType.Auto)
    for name in GATHER_NOTHING:
        for place in MOVED:
            x = jax.ShapeDtypeStruct(SHAPES["large"], jnp.float32, sharding=NamedSharding(on, SPECS[place]))
            text = jax.jit(OPERATIONS[name]).lower(x).compile().as_text()
            moved = re.findall(r"= \w+\[([\d,]*)\]\S* (?:all-gather|all-to-all|collective-permute)\(", text)
            found[f"{name}/{place}"] = max((math.prod(map(int, each.split(","))) for each in moved if each), default=0)
    return found


def step(model: Model, x: jax.Array) -> object:
    with recording(model) as seen:
        gradients = nnx.grad(lambda model, x: (model(x) ** 2).sum())(model, x)
    return nnx.state(gradients), seen.all, nnx.state(model, CastVariable)


def quantized(name: str, accumulate: str, *, split: bool) -> Model:
    rule = Rule(".*", "E4M3", gradients="E5M2", accumulate=accumulate, **RULES[name])
    return quantize_model(Model(nnx.Rngs(0), split=split), [rule])


def of_layers() -> dict[str, str]:
    """Gradients, counts and what is carried to the next step."""
    found, on = {}, mesh(AxisType.Explicit)
    x = values((8, 16))
    for name, accumulate in LAYERS:
        model, jitted = quantized(name, accumulate, split=True), nnx.jit(step)
        for layer, spec in ((model.up, P(None, "model")), (model.down, P("model", None))):
            layer.kernel.set_value(jax.device_put(layer.kernel.get_value(), NamedSharding(on, spec)))
        with jax.set_mesh(on):
            split = jax.device_put(x, NamedSharding(on, P("data", None)))
            found[f"{name}/{accumulate}"] = digest(jitted(model, split))
    return found


def of_placed_layers() -> dict[str, str]:
    """Of weights that are split before they are quantized, and of an exact convolution of a split batch."""
    on, found = mesh(AxisType.Explicit), {}
    with jax.set_mesh(on):
        for name, layer in placed_layers(split=True).items():
            model, x = quantize_model(layer, [PLACED[name]]), inputs_of(layer)
            split = jax.device_put(x, NamedSharding(on, P("data", *[None] * (x.ndim - 1))))
            found[name] = digest(nnx.jit(step)(model, split))
    return found


PLACED = {
    "channel": Rule(".*", "E4M3", gradients="E5M2", granularity="channel"),
    "exact convolution": Rule(".*", "E4M3", gradients="E5M2", accumulate="exact"),
}


class Split(nnx.Linear):
    """Says how its result is split."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return super().__call__(x, out_sharding=P("data", "model"))


def placed_layers(*, split: bool) -> dict[str, nnx.Module]:
    metadata = {"out_sharding": P(None, "model")} if split else {}
    kind = Split if split else nnx.Linear
    return {
        "channel": kind(16, 8, use_bias=False, rngs=nnx.Rngs(0), kernel_metadata=metadata),
        "exact convolution": nnx.Conv(2, 4, (3,), use_bias=False, rngs=nnx.Rngs(0)),
    }


def inputs_of(layer: nnx.Module) -> np.ndarray:
    return values((8, 6, 2)) if isinstance(layer, nnx.Conv) else values((8, 16))


def of_more_than_int32_counts() -> dict[str, dict[str, object]]:
    """As if int32 held no more than a hundred."""
    x = jnp.asarray(values((16, 64)) * 1e3)
    found = {"whole": ag.cast_counts(x, "E4M3").as_integers()}
    statistics._MOST_AT_ONCE = 100
    jax.clear_caches()
    on = mesh(AxisType.Explicit)
    with jax.set_mesh(on):
        for place, spec in SPECS.items():
            split = jax.device_put(x, NamedSharding(on, spec))
            found[place] = jax.jit(partial(ag.cast_counts, format="E4M3"))(split).as_integers()
    return found


def main(file: str) -> None:
    assert jax.device_count() == 8
    found = {"operations": of_operations(), "gathered": gathered(), "layers": of_layers(), "placed": of_placed_layers()}
    write_result(file, found | {"many": of_more_than_int32_counts()})


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    return results_of("tests.test_sharded", environment=flags, timeout=300)[0]


@pytest.mark.parametrize(("name", "size"), CASES)
def test_operations_have_the_bits_of_one_device(found: dict[str, Any], name: str, size: str) -> None:
    one = digest(jax.jit(OPERATIONS[name])(values(SHAPES[size])))
    for kind, place in ways(size):
        assert found["operations"][f"{name}/{size}/{kind.name}/{place}"] == one, (kind, place)


@pytest.mark.parametrize("name", GATHER_NOTHING)
def test_nothing_is_gathered(found: dict[str, Any], name: str) -> None:
    """But a few numbers: counts, or the sums and scales of rows."""
    for place in MOVED:
        assert found["gathered"][f"{name}/{place}"] <= SHAPES["large"][0]


@pytest.mark.parametrize(("name", "accumulate"), LAYERS)
def test_layers_under_explicit_axes(found: dict[str, Any], name: str, accumulate: str) -> None:
    """Gradients are of few terms here, whose sums come out alike in any order."""
    model, jitted, x = quantized(name, accumulate, split=False), nnx.jit(step), values((8, 16))
    assert found["layers"][f"{name}/{accumulate}"] == digest(jitted(model, x))


@pytest.mark.parametrize("name", PLACED)
def test_weights_that_are_split_before_and_exact_convolutions(found: dict[str, Any], name: str) -> None:
    layer = placed_layers(split=False)[name]
    model = quantize_model(layer, [PLACED[name]])
    assert found["placed"][name] == digest(nnx.jit(step)(model, inputs_of(layer)))


def test_counts_of_more_than_int32_holds(found: dict[str, Any]) -> None:
    assert all(counts == found["many"]["whole"] for counts in found["many"].values())


if __name__ == "__main__":
    main(sys.argv[4])

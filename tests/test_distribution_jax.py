"""Clipping on eight devices, sharded under jit and inside shard_map, has the bits that it has on one.

Run as a module it is the process with eight devices, which does everything once; the tests look at what it wrote.
"""

import hashlib
import math
import sys
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from altgrad_jax import (
    all_finite,
    clip_by_global_norm,
    global_norm,
    partition_relative_clip,
    skip_nonfinite,
    stall_monitor,
)
from altgrad_jax.nonfinite import find_culprit
from altgrad_jax.norms import norm_of
from altgrad_jax.scaling import power_of_two_scale
from altgrad_jax.statistics import stall_counts
from tests.processes import results_of, write_result

AXES = ("data", "model")
SPECS = {
    "both": P("data", "model"),
    "flat": P(("data", "model")),
    "model": P(None, "model"),
    "whole": P(),
}
SHAPES = {"both": (16, 8), "flat": (16,), "model": (7, 6), "whole": (4,)}
SIZE = sum(math.prod(shape) for shape in SHAPES.values())
FLOAT32_MAX = float(np.finfo(np.float32).max)
Grads = dict[str, jax.Array]


def tree(values: np.ndarray) -> dict[str, np.ndarray]:
    """Numbers as the leaves of a small model, cut in the order of their names."""
    cuts = np.cumsum([math.prod(shape) for shape in SHAPES.values()])[:-1]
    parts = zip(np.split(values.astype(np.float32), cuts), SHAPES.items(), strict=True)
    return {name: part.reshape(shape) for part, (name, shape) in parts}


def at(places: Mapping[int, float], fill: float = 0.0) -> np.ndarray:
    values = np.full(SIZE, fill)
    values[list(places)] = list(places.values())
    return values


NORMAL = np.random.default_rng(3).standard_normal(SIZE)
# 1 + 2^-24 lies half way between two float32, and is the root of the sum of these squares.
TIE = {0: 1.0, 60: 2.0**-12, 140: 2.0**-12, 180: 2.0**-24}
LAST = SIZE - 1
CASES: dict[str, np.ndarray] = {
    "normal": NORMAL,
    "constant": np.full(SIZE, 0.1),
    "tie": at(TIE),
    "just above a tie": at(TIE | {7: 2.0**-149}),
    "just above a tie by what is replicated": at(TIE | {LAST: 2.0**-149}),
    "subnormal": NORMAL * 1e-40,
    "one subnormal in one shard": at({130: 2.0**-149}),
    "zero": at({}),
    "norm beyond float32": np.sign(NORMAL) * 3e38,
    "mixed": NORMAL * 10.0 ** np.linspace(-44, 37, SIZE),
    "inf in one shard": np.where(np.arange(SIZE) == 77, np.inf, NORMAL),
    "NaN in one shard": np.where(np.arange(SIZE) == 130, np.nan, NORMAL),
    "NaN in what is replicated": np.where(np.arange(SIZE) == LAST, np.nan, NORMAL),
}
GATE = np.float32(0.01)
RATES = {
    "below": float(np.nextafter(GATE, np.float32(0))),
    "at": float(GATE),
    "above": float(np.nextafter(GATE, np.float32(1))),
}
RUNS = np.where(np.arange(128) == 45, np.inf, NORMAL[:128]).reshape(16, 8).astype(np.float32)
"""Four rows each for four runs, of which the second is not finite."""
SPIKES = 3
SPIKED = (5, LAST - 1, 130, 180)
"""Where elements overflow: in shards, and in a leaf that is replicated, which must count once."""

# The largest weight of each leaf lies in one shard; under the scales of their own amaxes the other shards stall less.
WEIGHTS = np.where(np.arange(SIZE) % 31 == 0, 124.0, NORMAL)
CHANGES = np.where(np.arange(SIZE) % 31 == 0, 50.0, 0.02 * NORMAL[::-1])
"""Outward at the largest weights, which therefore stall at max."""

Step = Callable[..., tuple[Grads, Any]]
Clipper = optax.GradientTransformationExtraArgs


def given(tx: Clipper) -> Step:
    return lambda grads, state, rate: tx.update(grads, state, overflow_rate=rate)


CLIPPERS: dict[str, Callable[[Any], Clipper]] = {
    "propagate": lambda axes: partition_relative_clip("E3M4", axis_name=axes),
    "skip": lambda axes: partition_relative_clip(
        "E4M3", 1e-3, SPIKES / SIZE, rule="scaled_max", nonfinite="skip", axis_name=axes
    ),
    "zero": lambda axes: partition_relative_clip(
        "E2M5", 1.0, SPIKES / SIZE, rule="quantile", norm_window=9, nonfinite="zero", axis_name=axes
    ),
}
WAYS = {"propagate": ("jit", "shard_map"), "skip": ("jit", "shard_map"), "zero": ("shard_map",)}
"""On how many devices; each way is a program to compile."""


def ways(kind: str) -> dict[str, Step]:
    """One step of a clipper on one device, on eight under jit, and on eight inside shard_map."""
    clipper, is_given = CLIPPERS[kind], kind == "propagate"
    make = given if is_given else lambda tx: tx.update
    more = (P(),) if is_given else ()
    inside = jax.shard_map(
        make(clipper(AXES)), mesh=mesh(), in_specs=(SPECS, P(), *more), out_specs=(SPECS, P()), check_vma=True
    )
    plain = jax.jit(make(clipper(None)))
    steps = {"jit": plain, "shard_map": jax.jit(inside)}
    return {"one": plain, **{way: steps[way] for way in WAYS[kind]}}


@cache
def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()).reshape(4, 2), AXES)


def placed(way: str, values: np.ndarray) -> Grads:
    if way == "one":
        return {name: jnp.asarray(leaf) for name, leaf in tree(values).items()}
    return {name: jax.device_put(leaf, NamedSharding(mesh(), SPECS[name])) for name, leaf in tree(values).items()}


def initial(kind: str, way: str) -> Any:
    """The state to start from, placed as a step returns it: else the second step would compile anew."""
    state = CLIPPERS[kind](None).init(placed("one", NORMAL))
    return state if way == "one" else jax.device_put(state, NamedSharding(mesh(), P()))


def seen(updates: Grads, state: Any) -> dict[str, Any]:
    """All bits of an update as a digest, and what a test wants to look at."""
    # A NaN is a NaN: which one is up to the machine.
    steady = [np.array(leaf) for leaf in jax.tree.leaves((updates, state))]
    for leaf in steady:
        leaf[np.isnan(leaf)] = np.nan if leaf.dtype.kind == "f" else 0
    return {
        "digest": hashlib.sha256(b"".join(leaf.tobytes() for leaf in steady)).hexdigest(),
        "norm": float(state.total_norm),
        "clipped": bool(state.clipped),
        "rate": float(state.overflow_rate),
        "culprit": [int(state.culprit.index), int(state.culprit.count)],
        "zero": all(not np.any(np.asarray(leaf)) for leaf in updates.values()),
    }


def clipped_by_given_rates() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for way, step in ways("propagate").items():
        init = initial("propagate", way)
        for case, values in CASES.items():
            found[f"{case}/{way}"] = seen(*step(placed(way, values), init, RATES["at"]))
        for name, rate in RATES.items():
            found[f"{name}/{way}"] = seen(*step(placed(way, NORMAL), init, rate))
    return found


def clipped_by_measured_rates(kind: str) -> dict[str, Any]:
    """Some calm updates, then each of these once, from where the calm ones led."""
    then = {
        **{f"{k} spikes": np.where(np.isin(np.arange(SIZE), SPIKED[:k]), 1e9, NORMAL) for k in (2, 3, 4)},
        **{case: CASES[case] for case in CASES if "NaN" in case or "inf" in case},
    }
    found: dict[str, Any] = {}
    for way, step in ways(kind).items():
        state = initial(kind, way)
        for k in range(9):
            _, state = step(placed(way, NORMAL * (1 + k)), state)
        for case, values in then.items():
            updates, after = step(placed(way, values), state)
            found[f"{case}/{way}"] = seen(updates, after)
            found[f"after {case}/{way}"] = seen(*step(placed(way, NORMAL), after))
    return found


def other_ways() -> dict[str, list[float]]:
    """Parts only, where types say nothing; other orders; and one axis of runs that are split over the other."""
    leaves = placed("jit", NORMAL)

    def untyped(grads: Grads) -> jax.Array:
        return global_norm(grads, axis_name=AXES)

    def orders(grads: Grads) -> list[jax.Array]:
        return [norm_of(list(grads.values()), order, AXES).single for order in (1.0, math.inf)]

    def runs(part: jax.Array) -> tuple[jax.Array, jax.Array]:
        tx = clip_by_global_norm(1.0, axis_name="model")
        updates, state = tx.update([part], tx.init([part]))
        return updates[0], state.total_norm[None]

    def skipping(grads: Grads) -> tuple[Grads, jax.Array]:
        """Where one place alone skipped, the others would wait for it in the norm."""
        tx = skip_nonfinite(clip_by_global_norm(1.0, axis_name=AXES), axis_name=AXES)
        updates, state = tx.update(grads, tx.init(grads))
        return updates, state.skipped

    parts = {name: leaves[name] for name in ("both", "flat")}
    specs = {name: SPECS[name] for name in parts}
    on_mesh = partial(jax.shard_map, mesh=mesh())
    of_parts = jax.jit(on_mesh(untyped, in_specs=(specs,), out_specs=P(), check_vma=False))(parts)
    of_orders = jax.jit(on_mesh(orders, in_specs=(SPECS,), out_specs=P()))(leaves)
    updates, of_runs = jax.jit(on_mesh(runs, in_specs=SPECS["both"], out_specs=(SPECS["both"], P("data"))))(RUNS)
    skip = jax.jit(on_mesh(skipping, in_specs=(SPECS,), out_specs=(SPECS, P())))
    outcomes = [skip(placed("jit", CASES[case])) for case in ("normal", "NaN in one shard")]
    return {
        "skipped": [float(skipped) for _, skipped in outcomes],
        "left": [float(sum(np.count_nonzero(leaf) for leaf in grads.values())) for grads, _ in outcomes],
        "parts": [float(of_parts)],
        "orders": [float(norm) for norm in of_orders],
        "runs": [float(norm) for norm in of_runs],
        "updates": np.asarray(updates).reshape(-1).tolist(),
    }


def stalled(weights: np.ndarray, changes: np.ndarray) -> dict[str, list[float]]:
    """Stall and saturation rates on one device, and on eight inside shard_map."""

    def rates(params: Grads, updates: Grads, axes: Any = None) -> tuple[jax.Array, jax.Array]:
        tx = stall_monitor("E3M4", axis_name=axes)
        _, state = tx.update(updates, tx.init(params), params)
        return state.stall_rate, state.saturation_rate  # pyrefly: ignore[missing-attribute]

    inside = partial(rates, axes=AXES)
    sharded = jax.jit(jax.shard_map(inside, mesh=mesh(), in_specs=(SPECS, SPECS), out_specs=P()))
    found = {"one": jax.jit(rates), "shard_map": sharded}
    return {
        way: [float(rate) for rate in step(*(placed(way, v) for v in (weights, changes)))]
        for way, step in found.items()
    }


def looked_through() -> dict[str, Any]:
    """What is finite, of leaves split over the axes of a mesh, auto and explicit; and whether that gathers leaves."""
    good = {"short": np.ones((8, 4)), "shorter": np.ones(8), "whole": np.ones(4)}
    bad = {name: np.where(np.arange(x.size).reshape(x.shape) == 3, np.inf, x) for name, x in good.items()}
    specs = (P(None, "model"), P("data"), P())
    found: dict[str, Any] = {}
    for kind in (AxisType.Auto, AxisType.Explicit):
        on = jax.make_mesh((4, 2), AXES, axis_types=(kind, kind))
        for case, arrays in (("good", good), ("bad", bad)):
            shardings = [NamedSharding(on, spec) for spec in specs]
            leaves = jax.device_put([jnp.asarray(x, jnp.float32) for x in arrays.values()], shardings)
            culprit = jax.jit(find_culprit)(leaves)
            found[f"{kind.name}/{case}"] = [bool(jax.jit(all_finite)(leaves)), int(culprit.index), int(culprit.count)]
    columns = jax.device_put(jnp.ones((512, 512)), NamedSharding(mesh(), P(None, "model")))
    for look in (all_finite, find_culprit):
        found[f"gathers/{look.__name__}"] = "all-gather" in jax.jit(look).lower([columns]).compile().as_text()
    return found


def main(file: str) -> None:
    assert jax.device_count() == 8
    found = {"propagate": clipped_by_given_rates(), "other": other_ways(), "stalls": stalled(WEIGHTS, CHANGES)}
    found["looked through"] = looked_through()
    write_result(file, found | {kind: clipped_by_measured_rates(kind) for kind in ("skip", "zero")})


# ---- the tests


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    return results_of("tests.test_distribution_jax", environment=flags)[0]


def like_one_device(found: dict[str, Any], kind: str, case: str) -> dict[str, Any]:
    """What one device saw, which must be what eight saw."""
    one = found[kind][f"{case}/one"]
    for way in WAYS[kind]:
        assert repr(found[kind][f"{case}/{way}"]) == repr(one), way  # a NaN is not equal to itself
    return one


def expected_norm(case: str) -> float:
    """By exact squares and a correctly rounded sum of them. What is beside a tie has to be told."""
    if "tie" in case:
        return 1.0 if case == "tie" else 1.0 + 2.0**-23
    values = CASES[case].astype(np.float32).astype(np.float64)
    if not np.isfinite(values).all():
        return math.nan if np.isnan(values).any() else math.inf
    unit = max(np.abs(values).max(), 2.0**-149)
    norm = unit * math.sqrt(math.fsum((values / unit) ** 2))
    return min(float(np.float32(min(norm, FLOAT32_MAX))), FLOAT32_MAX)


@pytest.mark.parametrize("case", CASES)
def test_norm_and_clipped_gradients(found: dict[str, Any], case: str) -> None:
    one = like_one_device(found, "propagate", case)
    np.testing.assert_array_equal(one["norm"], expected_norm(case))
    leaf = {"inf in one shard": 0, "NaN in one shard": 1, "NaN in what is replicated": 3}.get(case)
    assert one["culprit"] == ([-1, 0] if leaf is None else [leaf, 1])


@pytest.mark.parametrize("rate", RATES)
def test_gate_of_a_given_rate(found: dict[str, Any], rate: str) -> None:
    one = like_one_device(found, "propagate", rate)
    assert one["clipped"] is (rate != "below")
    assert (one["norm"] == -1) is (rate == "below")


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("kind", ["skip", "zero"])
def test_gate_of_a_measured_rate(found: dict[str, Any], kind: str, count: int) -> None:
    """What is replicated counts once: the rate is that of the whole, and it is at the gate exactly at three."""
    one = like_one_device(found, kind, f"{count} spikes")
    like_one_device(found, kind, f"after {count} spikes")
    assert one["clipped"] is (count >= 3)
    assert one["rate"] == np.float32(count / SIZE)


@pytest.mark.parametrize("case", ["inf in one shard", "NaN in one shard", "NaN in what is replicated"])
@pytest.mark.parametrize("kind", ["skip", "zero"])
def test_what_is_not_finite_on_one_device_concerns_all(found: dict[str, Any], kind: str, case: str) -> None:
    """All skip the step, and none takes the amax of the shard that holds it into the history."""
    one = like_one_device(found, kind, case)
    like_one_device(found, kind, f"after {case}")
    assert one["zero"] is (kind == "skip")


def test_all_places_skip_together(found: dict[str, Any]) -> None:
    assert found["other"]["skipped"] == [0, 1]
    assert found["other"]["left"] == [SIZE, 0]


def test_where_types_say_nothing_every_leaf_is_a_part(found: dict[str, Any]) -> None:
    parts = tree(NORMAL)
    both = np.concatenate([parts[name].astype(np.float64).reshape(-1) for name in ("both", "flat")])
    assert found["other"]["parts"] == [float(np.float32(math.sqrt(math.fsum(both**2))))]


def test_other_orders(found: dict[str, Any]) -> None:
    magnitudes = np.abs(NORMAL.astype(np.float32).astype(np.float64))
    assert found["other"]["orders"] == [float(np.float32(math.fsum(magnitudes))), float(magnitudes.max())]


def test_runs_on_one_axis_split_over_another(found: dict[str, Any]) -> None:
    """Each has its own norm, and only the one that is not finite is not finite afterwards."""
    rows = RUNS.astype(np.float64).reshape(4, 32)
    assert found["other"]["runs"] == [float(np.float32(math.sqrt(math.fsum(row**2)))) for row in rows]
    clipped = np.array(found["other"]["updates"]).reshape(4, 32)
    assert [bool(np.isfinite(row).all()) for row in clipped] == [True, False, True, True]


def test_stalls_are_those_of_whole_leaves(found: dict[str, Any]) -> None:
    """Under the scale of the whole, and what is replicated counts once."""
    weights, changes = tree(WEIGHTS), tree(CHANGES)
    counts = [
        stall_counts(weights[name], changes[name], "E3M4", scale=power_of_two_scale(np.abs(weights[name]).max(), 124.0))
        for name in SHAPES
    ]
    exact = [each.as_integers() for each in counts]
    total = {name: sum(each[name] for each in exact) for name in ("nonzero", "precision", "saturation")}
    assert total["nonzero"] == SIZE
    assert total["saturation"] > 0
    expected = [np.float32((total["precision"] + total["saturation"]) / SIZE), np.float32(total["saturation"] / SIZE)]
    assert found["stalls"] == {"one": expected, "shard_map": expected}
    shard = (slice(4, 8), slice(4))
    whole, alone = (
        stall_counts(weights["both"][shard], changes["both"][shard], "E3M4", scale=scale).as_integers()["precision"]
        for scale in (1.0, 2.0**-5)  # 2^-5 is the scale of the shard's own amax
    )
    assert whole > alone


if __name__ == "__main__":
    main(sys.argv[-1])


def test_leaves_are_looked_through_where_they_lie(found: dict[str, Any]) -> None:
    seen = found["looked through"]
    assert seen["Auto/good"] == seen["Explicit/good"] == [True, -1, 0]
    assert seen["Auto/bad"] == seen["Explicit/bad"] == [False, 0, 3]
    assert not seen["gathers/all_finite"]
    assert not seen["gathers/find_culprit"]

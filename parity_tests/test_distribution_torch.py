"""Two processes of torch under gloo clip as one does, and as JAX: plain, DDP, FSDP2 and other DTensors.

Run as a module it is one of the two; the tests look at what each wrote.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from altgrad_core.clip_rules import ClipRule
from altgrad_core.formats import Rounding
from altgrad_core.nonfinite import Nonfinite
from altgrad_torch import (
    BitStallDetector,
    PartitionRelativeClipper,
    amax,
    amaxes,
    cast_counts,
    clip_grad_norm_,
    commit_,
    decode,
    encode,
    encode_blocks,
    exact_matmul,
    global_norm,
    hash_bits,
    pack_tensor,
    power_of_two_scale,
    quantize,
    quantize_blocks,
    stall_counts,
)
from altgrad_torch.norms import norm_of
from tests.processes import results_of, write_result

Single = npt.NDArray[np.float32]

SHAPES = {"uneven": (7, 5), "on one": (1, 4), "short": (3,), "plain": (2, 3), "whole": (4,), "scalar": ()}
"""``on one`` lies on process 0 alone; ``plain`` is no DTensor, ``whole`` and ``scalar`` are on both processes."""
SPLIT = ("uneven", "on one", "short")
SIZE = sum(math.prod(shape) for shape in SHAPES.values())
NORMAL = np.random.default_rng(4).standard_normal(SIZE)
ON_1 = 30
"""The place of an element that process 1 holds."""


def at(places: dict[int, float], fill: float = 0.0) -> npt.NDArray[np.float64]:
    values = np.full(SIZE, fill)
    values[list(places)] = list(places.values())
    return values


# 1 + 2^-24 lies half way between two float32, and is the root of the sum of these squares.
TIE = {0: 1.0, ON_1: 2.0**-12, 38: 2.0**-12, 45: 2.0**-24}
CASES = {
    "normal": NORMAL,
    "constant": np.full(SIZE, 0.1),
    "tie": at(TIE),
    "just above a tie": at(TIE | {34: 2.0**-149}),
    "subnormal": NORMAL * 1e-40,
    "zero": at({}),
    "norm beyond float32": np.sign(NORMAL) * 3e38,
    "mixed": NORMAL * 10.0 ** np.linspace(-44, 37, SIZE),
    "inf on one": np.where(np.arange(SIZE) == ON_1, np.inf, NORMAL),
    "NaN on one": np.where(np.arange(SIZE) == ON_1, np.nan, NORMAL),
}
GATE = np.float32(0.01)
RATES = {
    "below": float(np.nextafter(GATE, np.float32(0))),
    "at": float(GATE),
    "above": float(np.nextafter(GATE, np.float32(1))),
}
RULES: tuple[tuple[ClipRule, Nonfinite], ...] = (("scaled_max", "skip"), ("quantile", "zero"))
FOREACH = (None, True, False)
DETERMINISTIC: tuple[Rounding, ...] = ("nearest_even", "nearest_away", "toward_zero")


def tree(values: npt.NDArray[np.float64]) -> dict[str, Single]:
    cuts = np.cumsum([math.prod(shape) for shape in SHAPES.values()])[:-1]
    parts = zip(np.split(values.astype(np.float32), cuts), SHAPES.items(), strict=True)
    return {name: part.reshape(shape) for part, (name, shape) in parts}


def digits(tensor: Tensor) -> list[str]:
    """All values of a tensor, of whatever kind, so that equal text means equal bits; a NaN is a NaN."""
    whole: Any = tensor.detach()
    whole = whole.full_tensor() if hasattr(whole, "full_tensor") else whole
    return [float(value).hex() for value in whole.reshape(-1).tolist()]


def model_of(values: npt.NDArray[np.float64], wrap: Callable[[str, Tensor], Tensor]) -> torch.nn.Module:
    """A module whose parameters have these gradients."""
    model = torch.nn.Module()
    for name, leaf in tree(values).items():
        parameter = torch.nn.Parameter(wrap(name, torch.zeros(leaf.shape)))
        parameter.grad = wrap(name, torch.tensor(leaf))
        model.register_parameter(name, parameter)
    return model


def gradients(model: torch.nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def clipped(wrap: Callable[[str, Tensor], Tensor]) -> dict[str, Any]:
    """What both functions do to every case, the gate to every rate, and the rules to a few gradients in a row."""
    found: dict[str, Any] = {}
    for case, values in CASES.items():
        model = model_of(values, wrap)
        norm = clip_grad_norm_(model.parameters(), format="E3M4", overflow_rate=RATES["at"])
        found[case] = [digits(norm), *map(digits, gradients(model))]
        clipper, model = PartitionRelativeClipper("E3M4"), model_of(values, wrap)
        assert clipper.clip_if_needed(model, RATES["at"])
        assert [clipper.total_norm.hex(), *map(digits, gradients(model))] == [*found[case][0], *found[case][1:]]
        found[f"{case}: culprit"] = list(clipper.culprit)
        norms = [norm_of(gradients(model_of(values, wrap)), order).hex() for order in (1.0, math.inf)]
        found[f"{case}: orders"] = norms
    for name, rate in RATES.items():
        model = model_of(NORMAL, wrap)
        found[name] = [PartitionRelativeClipper("E3M4").clip_if_needed(model, rate), *map(digits, gradients(model))]
    for rule, nonfinite in RULES:
        clipper = PartitionRelativeClipper("E4M3", 1e-3, rule=rule, nonfinite=nonfinite)
        for k in range(10):
            values = NORMAL * (1 + k) if k % 4 else CASES["NaN on one"]
            model = model_of(values, wrap)
            clipper.clip_if_needed(model, 1.0)
            found[f"{rule} {k}"] = [list(clipper.culprit), clipper.clip_threshold.hex(), *map(digits, gradients(model))]
        found[rule] = clipper.state_dict()
    for foreach in FOREACH:
        model = model_of(NORMAL, wrap)
        clip_grad_norm_(model.parameters(), 0.3, foreach=foreach)
        found[f"foreach {foreach}"] = [digits(gradient) for gradient in gradients(model)]
    spiked = gradients(model_of(np.where(np.arange(SIZE) % 20 == 10, 1e9, NORMAL), wrap))
    found["counts"] = [cast_counts(gradient, "E5M2").as_integers() for gradient in spiked]
    try:
        clip_grad_norm_(model_of(CASES["NaN on one"], wrap).parameters(), 1.0, nonfinite="raise")
    except FloatingPointError as error:
        found["raised"] = str(error)
    return found


def casts(wrap: Callable[[str, Tensor], Tensor]) -> dict[str, Any]:
    """What casts, scales and counts make of every tensor, values that no one process holds beside it included."""
    found: dict[str, Any] = {}
    for name, leaf in tree(np.where(np.arange(SIZE) % 11 == 3, 40.0, NORMAL)).items():
        plain = torch.tensor(leaf)
        x = wrap(name, plain)
        bits = hash_bits(tuple(plain.shape), seed=3)
        values = [quantize(x, "E3M4", rounding=rounding, overflow="saturate") for rounding in DETERMINISTIC]
        values.append(quantize(x, "E4M3", rounding="stochastic", random_bits=bits, scale=2.0**-7))
        values.append(quantize(x, "E4M3", rounding="stochastic", random_bits=wrap(name, bits), scale=wrap(name, plain)))
        values.append(quantize(x, "E3M4", scale=torch.full(plain.shape[-1:], 0.3)))
        values.append(decode(encode(x, "E2M5"), "E2M5"))
        values += [amax(x), power_of_two_scale(amax(x), 124.0), amaxes(x, "channel" if plain.ndim else "tensor")]
        leaf_of = wrap(name, plain).requires_grad_()
        quantize(leaf_of, "E2M5", saturation_mask=True).backward(wrap(name, plain * 3))
        assert leaf_of.grad is not None
        found[name] = [*map(digits, values), digits(encode(x, "E4M3")), digits(leaf_of.grad)]
        found[f"{name}: stalls"] = stall_counts(x, x * 2.0**-6, "E3M4", gradient=x).as_integers()
    model = model_of(NORMAL, wrap)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    detector = BitStallDetector("E3M4")
    commit_(model, "E3M4")
    with detector.watch(model), torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(parameter, alpha=2.0**-6)
    found["detector"] = detector.counts.as_integers()
    commit_(model, "E2M5", rounding="stochastic", seed=1)
    found["committed"] = [digits(parameter) for parameter in model.parameters()]
    return found


def placed_otherwise(mesh: Any) -> list[dict[str, int]]:
    """Stalls of updates that are split over another axis, plain, or yet to be added up over the two processes."""
    from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

    whole = torch.arange(-14.0, 14.0).reshape(7, 4)
    weight, update = distribute_tensor(whole, mesh, [Shard(0)]), whole * 2.0**-6
    halves = DTensor.from_local(update / 2, mesh, [Partial()], run_check=False)
    updates = (distribute_tensor(update, mesh, [Shard(1)]), update, halves)
    return [stall_counts(weight, each, "E3M4", gradient=whole).as_integers() for each in updates]


def refused(x: Tensor) -> list[str]:
    """What those say that look at neighbours."""
    takers = (quantize_blocks, encode_blocks, pack_tensor, lambda x, _: exact_matmul(x, torch.ones(5, 1)))
    told = []
    for taker in takers:
        with pytest.raises(ValueError, match="a DTensor") as error:
            taker(x, "E3M4")
        told.append(str(error.value))
    return told


# A small network, whose gradients are exact: small integers, added up in any order and halved.


def network() -> torch.nn.Module:
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.ReLU(), torch.nn.Linear(7, 3))
    draw = np.random.default_rng(5)
    for parameter in model.parameters():
        parameter.data = torch.tensor(draw.integers(-4, 5, parameter.shape), dtype=torch.float32) / 4
    return model


def batch(rank: int, count: int) -> tuple[Tensor, Tensor]:
    draw = np.random.default_rng(6)
    x, y = draw.integers(-3, 4, (8, 5)), draw.integers(-3, 4, (8, 3))
    share = slice(8 // count * rank, 8 // count * (rank + 1))
    return torch.tensor(x[share], dtype=torch.float32), torch.tensor(y[share], dtype=torch.float32)


def step(model: torch.nn.Module, rank: int, count: int, *, scaled: bool = False, poison: str = "") -> list[Any]:
    """One step of training with clipping.

    ``poison`` makes something of the last process infinite: an ``input``, or the end of the last ``gradient``.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
    x, y = batch(rank, count)
    is_last = rank == count - 1
    if poison == "input" and is_last:
        x[-1, 0] = math.inf
    scaler.scale((model(x) * y).sum() * count / 2).backward()
    if poison == "gradient" and is_last:
        last: Any = gradients(model)[-1]
        (last.to_local() if hasattr(last, "to_local") else last)[-1] = math.inf
    scaler.unscale_(optimizer)
    rates = [cast_counts(gradient, "E2M5") for gradient in gradients(model)]
    rate = sum(rates[1:], rates[0]).overflow_rate
    clipper = PartitionRelativeClipper("E4M3", 30.0)
    is_open = clipper.clip_if_needed(model, rate)
    scaler.step(optimizer)
    scaler.update()
    culprit = [clipper.culprit.name and clipper.culprit.name.removeprefix("module."), clipper.culprit.count]
    seen = [is_open, float(rate).hex(), clipper.total_norm.hex(), culprit, scaler.get_scale()]
    return [*seen, *map(digits, gradients(model)), *map(digits, model.parameters())]


def steps(
    wrap: Callable[[torch.nn.Module], torch.nn.Module], rank: int, count: int, shards: bool = True
) -> dict[str, Any]:
    found = {
        "plain": step(wrap(network()), rank, count),
        "scaled": step(wrap(network()), rank, count, scaled=True),
        "input": step(wrap(network()), rank, count, scaled=True, poison="input"),
    }
    if shards:  # under DDP every process holds all gradients, so that none is of the last one alone
        found["gradient"] = step(wrap(network()), rank, count, scaled=True, poison="gradient")
    return found


# ---- one of two processes


def strided(rank: int) -> list[Any]:
    """Sharded by tensor-parallel and then by FSDP2, which leaves ``_StridedShard``, not a ``Shard`` to torch."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    mesh = init_device_mesh("cpu", (2, 1))
    whole = torch.arange(1.0, 9.0).reshape(4, 2)
    placements = [_StridedShard(0, split_factor=1), Shard(0)]
    gradient = DTensor.from_local(whole.chunk(2)[rank], mesh, placements, run_check=False)
    return [float(global_norm([gradient])), cast_counts(gradient, "E5M2").as_integers()["elements"]]


def summand(rank: int) -> Single:
    return np.random.default_rng(rank).standard_normal(16).astype(np.float32)


def summands(rank: int, mesh: Any) -> list[Any]:
    """Gradients of which each process holds a summand."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    found: list[Any] = []
    for act in (
        lambda parameter: clip_grad_norm_([parameter], 1.0),
        lambda parameter: PartitionRelativeClipper("E5M2").clip_if_needed([parameter], 1.0),
    ):
        parameter = torch.nn.Parameter(DTensor.from_local(torch.zeros(16), mesh, [Replicate()]))
        parameter.grad = DTensor.from_local(torch.tensor(summand(rank)), mesh, [Partial()])
        norm = float(global_norm([parameter.grad]))
        found.append([norm, float(act(parameter)), digits(parameter.grad)])
    return found


CHUNK = 1 << 15
FAR = 32
"""Chunks in a row of what follows: by so many roundings more the error of a longer shard is bounded."""


def beside_a_tie(rank: int, mesh: Any) -> float:
    """Of which the process with the longer shard would not be certain, while the other one would be."""
    from torch.distributed.tensor import DTensor, Shard

    rows = torch.zeros((2 - rank, FAR * CHUNK))
    if rank == 0:
        distance = (CHUNK + 1.5 * FAR) * 2.0**-53
        rows[0, :5] = torch.tensor([1.0, 2.0**-12, 2.0**-12, 2.0**-24, math.sqrt(2 * distance)])
    shape, stride = torch.Size((3, FAR * CHUNK)), (FAR * CHUNK, 1)
    return float(global_norm([DTensor.from_local(rows, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)]))


def main(rank: int, count: int, port: int, file: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    limit = datetime.timedelta(seconds=30)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=count, timeout=limit)
    mesh = init_device_mesh("cpu", (count,))

    def placed(name: str, tensor: Tensor) -> Tensor:
        if name == "plain":
            return tensor
        return distribute_tensor(tensor, mesh, [Shard(0) if name in SPLIT else Replicate()])

    def sharded(model: torch.nn.Module) -> torch.nn.Module:
        assert isinstance(model, torch.nn.Sequential)
        fully_shard(model[0], mesh=mesh)
        return fully_shard(model, mesh=mesh)

    found = {
        "clipped": clipped(placed),
        "casts": casts(placed),
        "placed otherwise": placed_otherwise(mesh),
        "refused": refused(placed("uneven", torch.ones(SHAPES["uneven"]))),
        "ddp": steps(torch.nn.parallel.DistributedDataParallel, rank, count, shards=False),
        "fsdp": steps(sharded, rank, count),
        "strided": strided(rank),
        "summands": summands(rank, mesh),
        "beside a tie": beside_a_tie(rank, mesh),
    }
    write_result(file, found)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo may still fail on the way down


# ---- the tests


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return results_of("parity_tests.test_distribution_torch", 2)


@pytest.fixture(scope="module")
def of_one_process() -> dict[str, Any]:
    return json.loads(json.dumps(clipped(lambda _, tensor: tensor)))


@pytest.fixture(scope="module")
def casts_of_one_process() -> dict[str, Any]:
    return json.loads(json.dumps(casts(lambda _, tensor: tensor.clone())))


@pytest.fixture(scope="module")
def steps_of_one_process() -> dict[str, Any]:
    return json.loads(json.dumps(steps(lambda model: model, 0, 1)))


def same(found: list[dict[str, Any]], of_one_process: dict[str, Any], name: str) -> Any:
    """What one process saw, which must be what either of two saw."""
    for process in found:
        assert process["clipped"][name] == of_one_process[name]
    return of_one_process[name]


def in_jax(values: npt.NDArray[np.float64], rate: float) -> tuple[float, bool, list[list[str]]]:
    import jax.numpy as jnp  # not needed by the processes

    import altgrad_jax

    tx = altgrad_jax.partition_relative_clip("E3M4")
    leaves = {name: jnp.asarray(leaf) for name, leaf in tree(values).items()}
    updates, state = tx.update(leaves, tx.init(leaves), overflow_rate=rate)
    bits = [digits(torch.tensor(np.asarray(updates[name]))) for name in SHAPES]
    return float(state.total_norm), bool(state.clipped), bits


@pytest.mark.parametrize("case", CASES)
def test_clipped_as_on_one_process_and_as_in_jax(
    found: list[dict[str, Any]], of_one_process: dict[str, Any], case: str
) -> None:
    norm, *clipped_gradients = same(found, of_one_process, case)
    expected, is_open, bits = in_jax(CASES[case], RATES["at"])
    assert is_open
    assert norm == [expected.hex()]
    assert clipped_gradients == bits


@pytest.mark.parametrize("name", [*SHAPES, *(f"{name}: stalls" for name in SHAPES), "detector", "committed"])
def test_cast_as_on_one_process(found: list[dict[str, Any]], casts_of_one_process: dict[str, Any], name: str) -> None:
    for process in found:
        assert process["casts"][name] == casts_of_one_process[name]


def test_stalls_of_updates_that_are_placed_otherwise(found: list[dict[str, Any]]) -> None:
    whole = torch.arange(-14.0, 14.0).reshape(7, 4)
    expected = stall_counts(whole, whole * 2.0**-6, "E3M4", gradient=whole).as_integers()
    for process in found:
        assert process["placed otherwise"] == [expected] * 3


def test_what_looks_at_neighbours_refuses_shards(found: list[dict[str, Any]]) -> None:
    for process in found:
        assert all("expected x.full_tensor()" in told for told in process["refused"])


@pytest.mark.parametrize("rate", RATES)
def test_gate(found: list[dict[str, Any]], of_one_process: dict[str, Any], rate: str) -> None:
    is_open, *after = same(found, of_one_process, rate)
    assert is_open is (rate != "below")
    assert (is_open, after) == in_jax(NORMAL, RATES[rate])[1:]


@pytest.mark.parametrize("case", CASES)
def test_culprits_and_other_orders(found: list[dict[str, Any]], of_one_process: dict[str, Any], case: str) -> None:
    """A maximum over processes must not lose the NaN of one of them."""
    culprit = same(found, of_one_process, f"{case}: culprit")
    assert culprit == (["uneven", 1] if "on one" in case else [None, 0])
    orders = same(found, of_one_process, f"{case}: orders")
    if "NaN" in case:
        assert orders == ["nan", "nan"]


@pytest.mark.parametrize(("rule", "nonfinite"), RULES)
def test_rules_remember_the_same(
    found: list[dict[str, Any]], of_one_process: dict[str, Any], rule: str, nonfinite: str
) -> None:
    thresholds = [same(found, of_one_process, f"{rule} {k}")[1] for k in range(10)]
    assert "inf" not in thresholds[9]
    memory = same(found, of_one_process, rule)[".*"]
    assert memory["norms"] or memory["amaxes"]
    assert all(float.fromhex(value) == 0 for value in same(found, of_one_process, f"{rule} 4")[2]) is (
        nonfinite == "skip"
    )


@pytest.mark.parametrize("foreach", FOREACH)
def test_foreach(found: list[dict[str, Any]], of_one_process: dict[str, Any], foreach: bool | None) -> None:
    after = same(found, of_one_process, f"foreach {foreach}")
    assert after == of_one_process["foreach False"]


def test_counts_are_of_all_shards(found: list[dict[str, Any]], of_one_process: dict[str, Any]) -> None:
    counts = same(found, of_one_process, "counts")
    assert sum(each["elements"] for each in counts) == SIZE
    assert sum(each["overflow"] for each in counts) == len(range(10, SIZE, 20))


def test_every_process_raises(found: list[dict[str, Any]], of_one_process: dict[str, Any]) -> None:
    assert "of parameter 0 holds 1 infinities or NaN among its 35" in same(found, of_one_process, "raised")


TRAINED = [*((kind, run) for kind in ("ddp", "fsdp") for run in ("plain", "scaled", "input")), ("fsdp", "gradient")]


@pytest.mark.parametrize(("kind", "run"), TRAINED)
def test_training(found: list[dict[str, Any]], steps_of_one_process: dict[str, Any], kind: str, run: str) -> None:
    """Rates, gates, norms, gradients and weights after a step, with a GradScaler and without."""
    one = steps_of_one_process[run]
    for process in found:
        assert process[kind][run] == one
    is_open, _, norm, culprit, scale = one[:5]
    assert is_open
    assert math.isfinite(float.fromhex(norm)) is (run in ("plain", "scaled"))
    assert culprit[0] == {"input": "0.weight", "gradient": "2.bias"}.get(run)
    # What is not finite makes the scaler skip the step, on all processes, and halve its scale.
    assert scale == {"plain": 1.0, "scaled": 2.0**10}.get(run, 2.0**9)
    weights = [*map(digits, network().parameters())]
    assert (one[-len(weights) :] == weights) is (run in ("input", "gradient"))


def test_strided_shards(found: list[dict[str, Any]]) -> None:
    expected = [float(np.float32(math.sqrt(sum(k * k for k in range(1, 9))))), 8]
    assert [process["strided"] for process in found] == [expected] * 2


def test_summands_are_added_up_first(found: list[dict[str, Any]]) -> None:
    """Clipped is the sum: clipped summands would add up to other bits, and their norm is none of anything."""
    whole = summand(0) + summand(1)
    norm = np.float32(math.sqrt(math.fsum(whole.astype(np.float64) ** 2)))
    after = [float(value).hex() for value in whole * np.float32(1 / (float(norm) + 1e-6))]
    expected = [[float(norm), float(norm), after], [float(norm), 1.0, after]]
    assert [process["summands"] for process in found] == [expected] * 2


def test_processes_agree_on_what_is_certain(found: list[dict[str, Any]]) -> None:
    """Else one would wait for the exact sum of the other for ever."""
    assert [process["beside a tie"] for process in found] == [1.0 + 2.0**-23] * 2


def second_device() -> str | None:
    return next((kind for kind in ("cuda", "mps", "xpu") if getattr(torch, kind).is_available()), None)


@pytest.mark.skipif(second_device() is None, reason="gradients on two kinds of device need a GPU")
def test_mixed_devices(of_one_process: dict[str, Any]) -> None:
    """The device that is not the CPU holds every other parameter."""
    names = list(SHAPES)
    mixed = clipped(lambda name, tensor: tensor.to(second_device() if names.index(name) % 2 else "cpu"))
    assert json.loads(json.dumps(mixed)) == of_one_process


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])

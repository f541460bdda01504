"""Counts in torch: the processor's own pass against torch's operations and against integers, and who takes which."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import altgrad_torch as ag
from altgrad_core.formats import EIGHT, parse
from altgrad_torch import FormatParams, statistics
from altgrad_torch.casting import divide_by_scale
from tests.threads import fixture_of_threads

MIN_NORMAL, INF = 0x00800000, 0x7F800000
FORMATS = (*EIGHT, "bf16", "fp16", "float32", "float8_e8m0fnu", "E8M7b140", "E8M0b134", "E7M0b23", "E5M10b120")
SCALES = (None, 2.0**-126, 2.0**-100, 2.0**-9, 1.0, 2.0**20, 2.0**100, 2.0**127)


def of_any_bits(size: int, seed: int) -> npt.NDArray[np.uint32]:
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**32, size, dtype=np.uint32)
    bits[::7] &= np.uint32(2**31)
    return bits


def next_to(limits: tuple[int, ...]) -> npt.NDArray[np.uint32]:
    steps = np.arange(-2, 3)
    magnitudes = np.clip(np.array(limits)[:, None] + steps, 0, 2**31 - 1).astype(np.uint32).reshape(-1)
    return np.concatenate([magnitudes, magnitudes | np.uint32(2**31)])


def by_torch(x: Tensor, name: str, scale: float | None) -> tuple[ag.CastCounts, Tensor]:
    grid = parse(name)
    return statistics._observe_by_chunks(x, grid, statistics._thresholds(grid), _unit(scale))


class Passing(TorchDispatchMode):
    """What torch does passes through here, unlike what NumPy does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.fixture
def without_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("memory is read that may not be")

    monkeypatch.setattr(statistics, "count_magnitudes", refuse)


@pytest.fixture
def without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("torch counts what is counted faster without it")

    monkeypatch.setattr(statistics, "_observe_by_chunks", refuse)


def assert_same(left: tuple[ag.CastCounts, Tensor], right: tuple[ag.CastCounts, Tensor]) -> None:
    assert left[0].totals.dtype == right[0].totals.dtype == torch.int64
    assert left[0].as_integers() == right[0].as_integers()
    assert left[1].shape == right[1].shape == ()
    assert left[1].view(torch.int32) == right[1].view(torch.int32)


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_counts_and_amax(name: str) -> None:
    """Next to every limit one by one; then all together, of three dtypes, for a format as a name and as data."""
    params = FormatParams.from_format(name)
    many = torch.from_numpy(of_any_bits(3000, 1).view(np.float32))
    for scale in SCALES:
        x = many if scale is None else many.where(many.abs() > 1, many * scale)
        limits = statistics._limits_of_magnitudes(x, statistics._thresholds(parse(name)), _unit(scale))
        assert limits is not None
        near = torch.from_numpy(next_to((*limits, MIN_NORMAL, INF)).view(np.float32))
        for each in near.unbind()[:: 1 if scale in (None, 2.0**-9) else 7]:
            assert_same(statistics.observe(each, name, scale=scale), by_torch(each, name, scale))
        for each in (near, x, x.bfloat16(), x.half(), x[:0], x[::3]):
            expected = by_torch(each, name, scale)
            for known_as in (name, params):
                assert_same(statistics.observe(each, known_as, scale=scale), expected)


def _unit(scale: float | None) -> Tensor | None:
    return None if scale is None else torch.tensor(scale)


def test_limits_under_every_scale() -> None:
    """The first magnitude whose quotient is at a limit, and the one before it, whose quotient is not."""
    limits = [1, MIN_NORMAL - 1, MIN_NORMAL, MIN_NORMAL + 1, 0x3F7FFFFF, 0x3F800001, 0x47700000, INF - 1, INF]
    for exponent in range(-126, 128):
        first = [statistics._first_to_reach(limit, exponent) for limit in limits]
        at, before = (torch.tensor(bits, dtype=torch.int32) for bits in (first, [each - 1 for each in first]))
        scale, expected = torch.tensor(2.0**exponent), torch.tensor(limits, dtype=torch.int32)
        quotient = divide_by_scale(at.view(torch.float32), scale).view(torch.int32)
        assert bool((quotient >= expected).all())
        assert bool((divide_by_scale(before.view(torch.float32), scale).view(torch.int32) < expected).all())


def test_subnormals_count_even_where_they_are_flushed() -> None:
    x = torch.from_numpy(np.arange(1, 2**23, 9001, dtype=np.int32).view(np.float32))
    for scale in (None, 2.0**-126, 2.0**-100):
        expected = statistics.observe(x, "E5M2", scale=scale)
        torch.set_flush_denormal(True)
        try:
            assert_same(statistics.observe(x, "E5M2", scale=scale), expected)
        finally:
            torch.set_flush_denormal(False)


@pytest.mark.usefixtures("without_torch")
def test_who_is_counted_without_torch() -> None:
    x = torch.tensor([[1e6, 1e-9, 0.0], [1.0, -2.0, 3.0]])
    expected = {"elements": 6, "overflow": 1, "nonzero": 5, "underflow": 1, "nan": 0}
    for each in (x, x.mT, x.bfloat16(), x.clone().requires_grad_(), torch.nn.Parameter(x), x.flip(1)):
        assert ag.cast_counts(each, "E5M2").as_integers() == expected
        assert ag.cast_counts(each, FormatParams.from_format("E5M2"), scale=torch.ones(1, 1)).as_integers() == expected


@pytest.mark.usefixtures("without_numpy")
def test_who_is_counted_by_torch() -> None:
    """Whoever is not an ordinary tensor, and scales that are several or no powers of two."""
    x = torch.tensor([1e6, 1e-9, 0.0])
    expected, params = torch.tensor([3, 1, 2, 1, 0]), FormatParams.from_format("E5M2")

    def totals(x: Tensor, scale: Tensor | float | None = None) -> Tensor:
        return ag.cast_counts(x, "E5M2", scale=scale).totals

    assert torch.equal(torch.func.vmap(totals)(torch.stack([x, x])), torch.stack([expected, expected]))
    scales = torch.tensor([1.0, 2.0**-30])
    by_scale = torch.func.vmap(totals, in_dims=(None, 0))(x, scales)
    assert torch.equal(by_scale, torch.stack([totals(x, torch.ones(3)), totals(x, torch.full((3,), 2.0**-30))]))
    assert torch.func.grad_and_value(lambda x: (x.sum(), totals(x)), has_aux=True)(x)[1][1].equal(expected)
    assert torch.func.functionalize(totals)(x).equal(expected)
    for scale in (torch.ones(3), 0.999):
        assert totals(x, scale).equal(expected)
    with Passing():
        assert totals(x).equal(expected)
    with FakeTensorMode() as mode:
        assert totals(mode.from_tensor(x), 2.0).shape == (5,)
    assert totals(mode.from_tensor(x)).shape == (5,)
    assert totals(x.to("meta"), 2.0).shape == (5,)
    compiled = torch.compile(lambda x: ag.cast_counts(x, params).totals, backend="eager", fullgraph=True)
    assert compiled(x).equal(expected)


class Named(Tensor):
    """A subclass, which may do with operations whatever it likes."""


@pytest.mark.usefixtures("without_numpy")
def test_subclasses_are_counted_by_torch() -> None:
    x = torch.tensor([1e6, 1e-9, 0.0])
    assert ag.cast_counts(x.as_subclass(Named), "E5M2").as_integers()["overflow"] == 1
    scale = torch.tensor(1.0).as_subclass(Named)
    assert ag.cast_counts(x, "E5M2", scale=scale).as_integers()["overflow"] == 1


# Stalls


threads = fixture_of_threads(1, 2)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("scale", [None, 2.0**-3, "one for each column"])
def test_stalls_of_what_does_not_fit_the_cache(scale: float | str | None) -> None:
    """As many as in parts that do, counted one after another."""
    draw = torch.Generator().manual_seed(0)
    weight, update, gradient = torch.randn(3, 50, 6000, generator=draw)
    update *= 10.0 ** torch.randint(-6, 1, update.shape, generator=draw) * (update > -1)
    unit = 2.0 ** torch.randint(-2, 3, (6000,), generator=draw) if isinstance(scale, str) else scale
    rows = [(*each, unit) for each in zip(weight, update, gradient, strict=True)]
    expected = sum(ag.stall_counts(w, u, "E5M2", scale=s, gradient=g).totals for w, u, g, s in rows)
    assert min(expected.tolist()[k] for k in (0, 1, 3)) > 0
    for order in (lambda x: x, lambda x: x.mT.contiguous().mT):
        counted = ag.stall_counts(order(weight), update, "E5M2", scale=unit, gradient=order(gradient))
        assert counted.totals.tolist() == expected.tolist()
    assert ag.stall_counts(weight, update, "E5M2", scale=unit).totals.tolist() == [*expected.tolist()[:3], 0]


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_detector_watches_every_element(dtype: torch.dtype) -> None:
    """A weight in several chunks as weights of one chunk each, of which each holds the same largest magnitude."""
    draw = torch.Generator().manual_seed(1)
    start = torch.randn(4, 50_000, generator=draw).clamp(-3, 3).to(dtype)
    start[:, 0] = 4
    gradient = torch.randn(4, 50_000, generator=draw).to(dtype) * (start > -1)
    totals = []
    for parts in (1, 4):
        weights = [torch.nn.Parameter(each) for each in start.clone().chunk(parts)]
        for weight, each in zip(weights, gradient.chunk(parts), strict=True):
            weight.grad = each.clone()
        detector = ag.BitStallDetector("E4M3")
        with detector.watch(weights):
            torch.optim.SGD(weights, lr=1e-3).step()
        totals.append(detector.counts.totals.tolist())
    assert totals[0] == totals[1]
    assert totals[0][0] == int((gradient != 0).sum())


def test_the_detector_watches_a_parameter_without_elements() -> None:
    detector = ag.BitStallDetector("E4M3")
    with detector.watch([torch.nn.Parameter(torch.ones(0, 3))]):
        pass
    assert detector.counts.totals.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", FORMATS)
def test_the_overflow_rate_is_that_of_all_counts(name: str, scale: float | None) -> None:
    """Next to the limit, where nothing overflows and where something does; with NaN; of three dtypes; as data."""
    limits = statistics._limits_of_magnitudes(torch.ones(1), statistics._thresholds(parse(name)), _unit(scale))
    assert limits is not None
    below = np.clip(limits[0] - np.arange(1, 9), 0, INF - 1).astype(np.uint32).view(np.float32)
    calm = [torch.from_numpy(np.concatenate([below, -below])), torch.zeros(3, 2), torch.empty(0)]
    mixed = [
        torch.from_numpy(next_to(limits).view(np.float32)),
        torch.tensor([torch.nan, 1.0]),
        torch.tensor(-torch.inf),
    ]
    for tensors in (calm, calm + mixed, [each.to(torch.bfloat16) for each in mixed], [torch.ones(4).to(torch.float16)]):
        pooled = ag.CastCounts(
            torch.stack([ag.cast_counts(each, name, scale=scale).totals for each in tensors])
        ).pooled()
        for grid in (name, FormatParams.from_format(name)):
            rate = ag.overflow_rate(tensors, grid, scale=scale)
            assert rate.dtype == torch.float32
            assert rate.shape == ()
            assert rate == pooled.overflow_rate
    assert ag.overflow_rate(calm, name, scale=scale) == 0
    assert ag.overflow_rate(torch.tensor([-torch.inf, 0.0]), name, scale=scale) == 0.5


def test_nothing_is_counted_where_nothing_overflows(without_numpy: None, without_torch: None) -> None:
    gradient = torch.nn.Parameter(torch.linspace(-5e4, 5e4, 1001))
    with torch.device("meta"):  # the default device is not that of the tensors
        rate = ag.overflow_rate([gradient, gradient[::3], gradient.detach().reshape(7, 11, 13).mT], "E5M2")
    assert rate == 0


def test_an_overflow_rate_of_nothing() -> None:
    assert ag.overflow_rate(torch.empty(0), "E5M2") == 0
    with pytest.raises(ValueError, match="no tensors"):
        ag.overflow_rate([], "E5M2")
    with pytest.raises(TypeError, match="int32"):
        ag.overflow_rate([torch.zeros(2, dtype=torch.int32)], "E5M2")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_memory_that_was_counted_or_clipped_can_be_freed(dtype: torch.dtype) -> None:
    """As FSDP2 does with parameters and gradients between steps."""
    x = torch.nn.Parameter(torch.ones(64, 64, dtype=dtype))
    x.grad = torch.ones_like(x)
    ag.cast_counts(x, "E4M3")
    ag.overflow_rate([x, x.grad], "E4M3")
    ag.clip_grad_norm_([x], 0.5)
    assert x.untyped_storage().resizable()
    assert x.grad.untyped_storage().resizable()

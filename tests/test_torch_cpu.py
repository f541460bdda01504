"""Passes over tensors in the processor's memory: every element once, at every size, on any number of threads."""

from __future__ import annotations

import tracemalloc

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import altgrad_torch
from altgrad_torch import cpu
from tests.threads import fixture_of_threads

Single = npt.NDArray[np.float32]

CHUNK, PIECE = 1 << 15, 1 << 20
SIZES = (0, 1, 4095, 4096, 4097, CHUNK - 1, CHUNK, CHUNK + 1, PIECE - 1, PIECE + 1, 3 * PIECE + 5)
MIN_NORMAL = 2.0**-126
ROUNDS_TO_NORMAL = MIN_NORMAL * (1 - 2.0**-25)
FACTORS = (1.0, 0.7, 0.0, 1 - 2.0**-23, 1 - 2.0**-24, 2.0**-60, 1e-38, float("nan"))


threads = fixture_of_threads(1, 3)


def of_all_magnitudes(size: int, seed: int = 0) -> Single:
    """Any bits, which is every magnitude with its subnormals, infinities and NaNs; many next to the smallest normal."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**32, size, dtype=np.uint32)
    near = rng.integers(0x00800000 - 40, 0x00800000 + 40, size, dtype=np.uint32) | (bits & 0x80000000)
    return np.where(rng.random(size) < 0.5, bits, near).view(np.float32)


def multiplied(values: Single, factor: np.float32) -> Single:
    """What XLA makes of it on x86: float64 holds every product exactly, and subnormal operands are zero."""
    with np.errstate(all="ignore"):
        exact = _normal(values) * _normal(factor)
        return np.where(np.abs(exact) < ROUNDS_TO_NORMAL, np.copysign(0.0, exact), exact).astype(np.float32)


def _normal(values: Single | np.float32) -> npt.NDArray[np.float64]:
    wide = np.float64(values)
    return np.where(np.abs(wide) < MIN_NORMAL, np.copysign(0.0, wide), wide)


def assert_same(got: Tensor, expected: Single) -> None:
    """The same bits, but for those of NaN."""
    found = got.numpy()
    nan = np.isnan(expected)
    assert np.array_equal(np.isnan(found), nan)
    assert np.array_equal(found[~nan].view(np.uint32), expected[~nan].view(np.uint32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_sums_count_every_element_once(threads: int, dtype: torch.dtype) -> None:
    """Of small integers, whose squares are summed without rounding."""
    rng = np.random.default_rng(threads)
    arrays = [rng.integers(-100, 100, size) for size in SIZES]
    tensors = [torch.from_numpy(each).to(dtype) for each in arrays]
    assert cpu.sums_of_squares(tensors) == [float((each * each).sum()) for each in arrays]


def test_sums_of_any_strides() -> None:
    whole = torch.arange(120.0).reshape(2, 3, 4, 5)
    views = [whole.mT, whole[..., ::2], whole[:, 1].expand(3, 2, 4, 5), whole.permute(3, 1, 0, 2), whole[0, 0, 0, 3]]
    views.append(torch._neg_view(whole))
    assert cpu.sums_of_squares(views) == [float((each.double() ** 2).sum()) for each in views]


def test_sums_do_not_depend_on_threads(threads: int) -> None:
    """Processes that hold the same tensor must find the same sum, or some would wait for the others for ever."""
    values = torch.from_numpy(of_magnitudes_that_round(9 * PIECE))
    in_order = sum(sorted(cpu.sums_of_squares(list(values.split(PIECE)))))
    assert all(cpu.sums_of_squares([values]) == [in_order] for _ in range(20))


def of_magnitudes_that_round(size: int) -> Single:
    """Each piece of another magnitude, so that the order of their sums shows in the last bits."""
    normal = np.random.default_rng(3).standard_normal(size, np.float32)
    return normal * np.repeat(np.float32(3) ** np.arange(size // PIECE, dtype=np.float32), PIECE)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_sums_of_what_is_not_finite(bad: float) -> None:
    for place in (0, CHUNK + 7, 3 * PIECE + 4):
        values = torch.ones(3 * PIECE + 5)
        values[place] = bad
        assert not np.isfinite(cpu.sums_of_squares([values])[0])


@pytest.mark.parametrize("factor", FACTORS)
def test_products_are_flushed_after_rounding(threads: int, factor: float) -> None:
    single = np.float32(factor)
    arrays = [of_all_magnitudes(size, seed) for seed, size in enumerate((*SIZES, 2 * PIECE))]
    tensors = [torch.from_numpy(each.copy()) for each in arrays]
    cpu.multiply_(tensors, single)
    for tensor, values in zip(tensors, arrays, strict=True):
        assert_same(tensor, multiplied(values, single))


@pytest.mark.parametrize("flushing", [False, True])
def test_the_switch_is_left_as_it_was(threads: int, flushing: bool) -> None:
    torch.set_flush_denormal(flushing)
    try:
        for size in (7, 3 * PIECE):
            cpu.multiply_([torch.ones(size)], np.float32(0.5))
            assert bool(torch.tensor([2.0**-130]) * 0.5 == 0) is flushing
    finally:
        torch.set_flush_denormal(False)


def test_strides_that_are_multiplied_in_place() -> None:
    whole = torch.randn(2, 3, 4, 5)
    expected = whole * 0.5
    for view in (whole.mT, whole.permute(3, 1, 0, 2), whole[0, 0, 0, 0]):
        assert cpu.can_multiply(view)
    cpu.multiply_([whole.permute(3, 1, 0, 2)], np.float32(0.5))
    assert torch.equal(whole, expected)
    refused = [torch.ones(1).expand(3), whole[..., ::2], torch._neg_view(whole), whole.double(), whole.bfloat16()]
    assert not any(map(cpu.can_multiply, [*refused, torch.ones(2).to_sparse(), torch.ones(2, device="meta")]))


def test_a_tensor_that_comes_again(threads: int) -> None:
    """It is multiplied again, and by threads that do not meet in it; so is what two views share."""
    values = torch.from_numpy(np.random.default_rng(0).standard_normal(PIECE, np.float32))
    expected, factor = values.numpy().copy(), np.float32(0.7)
    parts = [slice(None)] * 40 + [slice(100, None)]
    for part in parts:
        expected[part] *= factor
    cpu.multiply_([values[part] for part in parts], factor)
    assert_same(values, expected)


def clipped(values: Single, max_norm: float, dtype: torch.dtype = torch.float32) -> Tensor:
    parameter = torch.nn.Parameter(torch.zeros(values.shape, dtype=dtype))
    parameter.grad = torch.from_numpy(values.copy()).to(dtype)
    altgrad_torch.clip_grad_norm_([parameter], max_norm)
    assert parameter.grad is not None
    return parameter.grad


@pytest.mark.parametrize("max_norm", [1e30, 1.0, 1e-30, 0.0])
def test_processors_that_flush_otherwise(monkeypatch: pytest.MonkeyPatch, max_norm: float) -> None:
    """There torch multiplies, and what would vanish is made zero before."""
    for scale in (1.0, MIN_NORMAL * 2, MIN_NORMAL * 2e30):
        values = (np.random.default_rng(1).standard_normal(5000) * scale).astype(np.float32)
        quick = clipped(values, max_norm)
        with monkeypatch.context() as patched:
            patched.setattr(cpu, "_FLUSHES_LIKE_XLA", False)
            assert_same(clipped(values, max_norm), quick.numpy())


def test_autograd_sees_that_gradients_were_scaled() -> None:
    """As with torch's own clipping: a gradient that backward still needs must not change unseen."""
    weight = torch.nn.Parameter(torch.full((3,), 2.0))
    weight.grad = torch.full((3,), 5.0)
    product = (weight.grad * weight).sum()
    altgrad_torch.clip_grad_norm_([weight], 1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


# Counts of magnitudes

ONE = 0x3F800000
INF = 0x7F800000
LIMITS = (
    (INF, 0),
    (ONE, ONE - 1),
    (ONE, ONE),
    (1, 0),
    (0x00800000, 0x007FFFFF),
    (INF - 1, INF - 1),
    (0x477, 0x12345678),
)


def magnitudes_counted(values: Single, large: int, small: int) -> tuple[int, ...]:
    magnitude = values.view(np.uint32).astype(np.int64).reshape(-1) % 2**31
    number = magnitude <= INF
    kinds = (number & (magnitude >= large), magnitude == 0, magnitude <= small, ~number)
    return (*(int(kind.sum()) for kind in kinds), int(magnitude.max(initial=0)))


def with_zeros(size: int, seed: int = 0) -> Single:
    values = of_all_magnitudes(size, seed)
    values[seed % 3 :: 5] = np.copysign(np.float32(0), values[seed % 3 :: 5])
    return values


@pytest.mark.parametrize("size", [*SIZES, (1 << 17) - 1, 1 << 17, (1 << 17) + 1])
def test_magnitudes_of_every_element_once(threads: int, size: int) -> None:
    values = with_zeros(size, threads)
    for large, small in LIMITS:
        assert cpu.count_magnitudes(torch.from_numpy(values), large, small) == magnitudes_counted(values, large, small)


@pytest.mark.parametrize("limit", [1, 2, 0x007FFFFF, 0x00800000, ONE, 0x477FFFFF, INF - 1])
def test_magnitudes_next_to_limits(limit: int) -> None:
    """One at a time, of either sign, so that an error in one cannot be made good by another."""
    near = np.array([0, limit - 1, limit, limit + 1, INF - 1, INF, INF + 1, 2**31 - 1], np.uint32)
    for values in np.concatenate([near, near | np.uint32(2**31)]).view(np.float32)[:, None]:
        for beside in (0, 1):
            counted = cpu.count_magnitudes(torch.from_numpy(values), limit, limit - beside)
            assert counted == magnitudes_counted(values, limit, limit - beside)


@pytest.mark.parametrize("rare", [0, INF, INF + 1, 2**31 - 1])
def test_what_is_rare_is_found_anywhere(threads: int, rare: int) -> None:
    size = 2 * PIECE + 5
    for place in (0, (1 << 17) - 1, 1 << 17, PIECE, size - 1):
        values = np.ones(size, np.float32)
        values.view(np.uint32)[place] = rare
        assert cpu.count_magnitudes(torch.from_numpy(values), INF, 0) == magnitudes_counted(values, INF, 0)


def test_magnitudes_of_any_strides(threads: int) -> None:
    whole = torch.from_numpy(with_zeros(6 * PIECE)).reshape(2, 3, PIECE)
    views = [
        whole[..., ::3],
        whole.mT,
        whole.mT[:, 1],
        whole[:, :1].expand(2, 4, PIECE),
        whole[0, 0, 1].expand(70, 1000),
    ]
    views += [whole.permute(1, 2, 0)[..., 0], torch._neg_view(whole[1]), whole[0, 0, 7], whole[:, :0, ::2]]
    views += [whole[0].requires_grad_(), torch.nn.Parameter(whole[1, :, ::2])]
    for view in views:
        expected = magnitudes_counted(view.detach().resolve_neg().contiguous().numpy(), ONE, 0x00800000)
        assert cpu.count_magnitudes(view, ONE, 0x00800000) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_magnitudes_of_half_precision(dtype: torch.dtype) -> None:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    for tensor in (every, every.flip(0)[::3], every.reshape(2**8, 2**8).mT):
        for large, small in LIMITS:
            expected = magnitudes_counted(tensor.float().contiguous().numpy(), large, small)
            assert cpu.count_magnitudes(tensor, large, small) == expected


def test_memory_that_may_not_be_read() -> None:
    """Where a tensor stands for others, or what is done to it is recorded."""
    x = torch.ones(3)
    seen: list[bool] = []

    def noting(y: Tensor) -> Tensor:
        seen.extend([cpu.is_plain(y), cpu.is_plain(x)])
        return y * 2

    torch.func.vmap(noting)(torch.ones(2, 3))
    torch.func.grad(lambda y: noting(y).sum())(x)
    torch.func.functionalize(noting)(x)
    with TorchDispatchMode():
        seen += [cpu.is_plain(x)]
    assert len(seen) == 7
    assert not any(seen)
    assert cpu.is_plain(x)


def test_counts_take_little_memory() -> None:
    """Whatever the strides: no copy of a tensor, nor of a piece of one."""
    whole = torch.ones(4 * PIECE, dtype=torch.bfloat16)
    for tensor in (whole, whole[::2], whole.reshape(2, -1).mT):
        tracemalloc.start()
        with torch.profiler.profile(profile_memory=True) as profiled:
            cpu.count_magnitudes(tensor, INF, 0)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert most < 2**20
        assert sum(max(each.self_cpu_memory_usage, 0) for each in profiled.key_averages()) < 2**20


def test_autograd_sees_that_a_gradient_was_multiplied() -> None:
    """Once, so that a backward pass that still needs the old values is refused."""
    parameter = torch.nn.Parameter(torch.zeros(3))
    parameter.grad = torch.full((3,), 2.0)
    before = parameter.grad._version
    altgrad_torch.clip_grad_norm_([parameter], 1.0)
    assert parameter.grad._version == before + 1

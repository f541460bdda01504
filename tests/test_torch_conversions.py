"""torch's own conversions in eager casts: the bits of the reference, wherever they are used or not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import altgrad_torch.conversions as conversions
from altgrad_core.formats import Format, Overflow, Rounding, parse
from altgrad_core.reference import quantize_reference
from altgrad_torch import decode, encode, quantize
from altgrad_torch.conversions import codes_by_torch, values_by_torch
from altgrad_torch.cpu import while_flushing
from tests.threads import fixture_of_threads

X = torch.tensor([1.1, -3.9, 0.3])

some_threads = fixture_of_threads(1, 2)

ROUND_TRIPS = [parse(name) for name in ("E5M2", "bf16", "fp16")]
ENCODED = [parse(name) for name in ("E5M2", "E4M3", "float8_e4m3fnuz", "float8_e5m2fnuz", "fp16")]


def inputs_within(format: Format, count: int = 3 << 17) -> Tensor:
    """What tells a right cast from a wrong one within a format's range, then random numbers of all its binades."""
    generator = np.random.default_rng(5)
    reach = np.array([2.0**-149, format.max_representable_value], np.float32).view(np.uint32)
    drawn = generator.integers(*reach.tolist(), count, dtype=np.uint32, endpoint=True)
    drawn |= generator.integers(0, 2, count, dtype=np.uint32) << 31
    known = conversions._boundaries(format)
    return torch.from_numpy(np.concatenate([known, drawn.view(np.float32)]))


def expected(x: Tensor, format: Format) -> Tensor:
    rounded = quantize_reference(x.numpy(), format)
    flushed = np.where(np.abs(rounded) < 2.0**-126, np.copysign(0.0, rounded), rounded)
    return torch.from_numpy(flushed.astype(np.float32))


def assert_same_bits(found: Tensor | None, wanted: Tensor) -> None:
    assert found is not None
    assert torch.equal(found.view(torch.int32), wanted.view(torch.int32))


@pytest.mark.parametrize("flushing", [False, True])
@pytest.mark.parametrize("format", ROUND_TRIPS, ids=str)
def test_values_are_those_of_the_reference(threads: int, format: Format, flushing: bool) -> None:
    """In parts that torch shares out among threads, which do not learn that the first flushes."""
    x = inputs_within(format, count=conversions._CHUNK)
    wanted = expected(x, format)
    with while_flushing(flushing):
        assert_same_bits(values_by_torch(x, format), wanted)
        assert_same_bits(quantize(x, format), wanted)


@pytest.mark.parametrize("flushing", [False, True])
@pytest.mark.parametrize("format", ENCODED, ids=str)
def test_codes_are_those_of_the_values(threads: int, format: Format, flushing: bool) -> None:
    x = inputs_within(format)
    wanted = expected(x, format)
    with while_flushing(flushing):
        codes = codes_by_torch(x, format)
        assert codes is not None
        assert torch.equal(encode(x, format).to(torch.int32), codes.to(torch.int32))
        assert_same_bits(decode(codes, format), wanted)


@pytest.mark.parametrize("format", ROUND_TRIPS, ids=str)
def test_every_layout(format: Format) -> None:
    x = inputs_within(format)[: 1 << 18].reshape(64, 64, 64)
    wanted = expected(x, format)
    alike = {
        "transposed": (x.permute(2, 0, 1).contiguous().permute(1, 2, 0), wanted),
        "every other": (x[:, ::2], wanted[:, ::2]),
        "spread out": (x[:, :, :1].expand(64, 64, 8), wanted[:, :, :1].expand(64, 64, 8)),
        "one": (x[1, 2, 3], wanted[1, 2, 3]),
        "a parameter": (torch.nn.Parameter(x), wanted),
    }
    for layout, (given, result) in alike.items():
        rounded = quantize(given, format)
        assert torch.equal(rounded.detach().view(torch.int32), result.contiguous().view(torch.int32)), layout
        assert rounded.requires_grad == given.requires_grad, layout


def test_layouts_of_more_than_a_chunk_that_lie_apart() -> None:
    x = inputs_within(parse("E5M2"), count=2 * conversions._CHUNK + 10)
    assert values_by_torch(x[::2], parse("E5M2")) is None
    assert_same_bits(quantize(x[::2], "E5M2"), quantize(x, "E5M2")[::2].contiguous())


@pytest.mark.parametrize("format", ROUND_TRIPS, ids=str)
@pytest.mark.parametrize("beyond", [float("inf"), -float("inf"), float("nan"), 3.4e38, -3.4e38])
@pytest.mark.parametrize("overflow", ["native", "saturate", "saturate_finite"])
def test_what_is_no_number_within_range_is_ours(format: Format, beyond: float, overflow: Overflow) -> None:
    x = torch.linspace(-2.0, 2.0, 1000)
    x[777] = beyond
    assert values_by_torch(x, format) is None
    rounded = quantize(x, format, overflow=overflow)
    wanted = torch.from_numpy(quantize_reference(x.numpy(), format, overflow=overflow).astype(np.float32))
    assert torch.equal(rounded.nan_to_num(nan=7.0), wanted.nan_to_num(nan=7.0))
    assert codes_by_torch(x, format) is None


def test_there_is_nothing_in_nothing() -> None:
    assert values_by_torch(torch.empty(0), parse("E5M2")) is None
    assert quantize(torch.empty(3, 0), "E5M2").shape == (3, 0)
    assert encode(torch.empty(0), "E4M3").dtype == torch.uint8


@pytest.mark.parametrize("name", ["E0M7", "E3M4", "float8_e4m3", "float8_e8m0fnu", "float4_e2m1fn", "E4M3"])
def test_other_formats_are_ours(name: str) -> None:
    assert values_by_torch(torch.ones(8), parse(name)) is None


def test_what_may_not_be_read_is_ours() -> None:
    """A view that negates, which torch may convert without doing so; what is traced before it is dispatched."""
    negated = torch._neg_view(torch.linspace(0.5, 2.0, 8))
    assert negated.is_neg()
    assert all(values_by_torch(negated, each) is None for each in ROUND_TRIPS)
    assert all(codes_by_torch(negated, each) is None for each in ENCODED)
    traced = make_fx(lambda x: quantize(x, "E5M2"), pre_dispatch=True)(torch.ones(3))
    assert traced(X).tolist() == [1.0, -4.0, 0.3125]
    assert torch.is_grad_enabled()


def test_scratch_is_the_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the default device, and however NumPy is to take what underflows while torch is tried out."""
    monkeypatch.setattr(conversions, "_is_right", conversions._is_right.__wrapped__)
    conversions._dtype_of.cache_clear()
    with torch.device("meta"), np.errstate(all="raise"):
        assert values_by_torch(X, parse("fp16")) is not None
        assert quantize(X, "E5M2").tolist() == [1.0, -4.0, 0.3125]
        assert encode(X, "E4M3").tolist() == [57, 200, 42]


@pytest.mark.parametrize("format", ROUND_TRIPS, ids=str)
def test_what_torch_is_tried_out_on(format: Format) -> None:
    """Ties down, up and into the next binade, from normal numbers and from what lies below 2^-126."""
    values = conversions._boundaries(format)
    dropped = 23 - format.mantissa_bits
    rest = values.view(np.uint32) & ((1 << dropped) - 1)
    ties = rest == 1 << (dropped - 1)
    last = values.view(np.uint32) >> dropped & 1
    assert (ties & (last == 0)).any()
    assert (ties & (last == 1)).any()
    exponent = np.frexp(quantize_reference(values, format))[1]
    assert (exponent > np.frexp(values)[1]).any()
    assert np.float32(2.0**-126 - 2.0**-149) in values


def test_a_torch_that_rounds_otherwise_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def truncates(out: Tensor, x: Tensor, narrow: Tensor, halves: Tensor) -> None:
        out.copy_((x.view(torch.int32) & ~((1 << 21) - 1)).view(torch.float32))

    def flushes(out: Tensor, x: Tensor, narrow: Tensor, halves: Tensor) -> None:
        out.copy_((x * (x.abs() >= 2.0**-126)).to(torch.bfloat16))

    def saturates(x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.clamp(-240.0, 240.0).to(dtype).view(torch.uint8)

    is_right = conversions._is_right.__wrapped__
    assert is_right(parse("bf16"))
    monkeypatch.setattr(conversions, "_round_trip_into", flushes)
    assert not is_right(parse("bf16"))
    monkeypatch.setattr(conversions, "_round_trip_into", truncates)
    assert not is_right(parse("E5M2"))
    assert is_right(parse("E4M3"))
    monkeypatch.setattr(conversions, "_codes", saturates)
    assert not is_right(parse("E4M3"))


@pytest.mark.parametrize("rounding", ["nearest_even", "nearest_away", "toward_zero"])
@pytest.mark.parametrize("name", ["bf16", "E8M5b128", "E7M3b124"])
def test_threads_that_do_not_flush_change_nothing(threads: int, name: str, rounding: Rounding) -> None:
    """Results below 2^-126 are zero in every thread, though only the one that asks flushes."""
    known = conversions._boundaries(parse("bf16"))
    x = torch.from_numpy(np.concatenate([known, known[::-1]]))  # so that subnormals fall to each of two threads
    x[::1000] = float("inf")  # which leaves all chunks to our own kernels
    wanted = quantize(x, name, rounding=rounding)
    with while_flushing(True):
        found = quantize(x, name, rounding=rounding)
    assert torch.equal(found.view(torch.int32), wanted.view(torch.int32))
    assert not ((wanted != 0) & (wanted.abs() < 2.0**-126)).any()

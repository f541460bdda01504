"""What the torch package refuses, and what it says then: the bad value, what was expected, the nearest right one."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest

torch = pytest.importorskip("torch")

import altgrad_torch as ag  # noqa: E402 (after the skip)
from altgrad_core.errors import InputError  # noqa: E402
from altgrad_core.formats import Format, UnknownFormatError  # noqa: E402

TAKES_A_FORMAT: dict[str, Callable[[str], object]] = {
    "quantize": lambda name: ag.quantize(torch.ones(2), name),
    "encode": lambda name: ag.encode(torch.ones(2), name),
    "decode": lambda name: ag.decode(torch.zeros(2, dtype=torch.uint8), name),
    "cast_counts": lambda name: ag.cast_counts(torch.ones(2), name),
    "stall_counts": lambda name: ag.stall_counts(torch.ones(2), torch.ones(2), name),
    "BitStallDetector": ag.BitStallDetector,
    "PartitionRelativeClipper": ag.PartitionRelativeClipper,
}


@pytest.mark.parametrize("function", TAKES_A_FORMAT)
def test_unknown_formats_suggest_known_ones(function: str) -> None:
    with pytest.raises(UnknownFormatError, match=r"'E5M22x'.*did you mean .*E5M2"):
        TAKES_A_FORMAT[function]("E5M22x")


@pytest.mark.parametrize(
    "dtype", [torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e8m0fnu]
)
def test_quantize_takes_floats(dtype: torch.dtype) -> None:
    for function in (ag.quantize, ag.encode, ag.quantize_blocks, ag.cast_counts, ag.overflow_rate):
        with pytest.raises(TypeError, match=rf"\(float32, bfloat16, float16, float64\); got {dtype}"):
            function(torch.ones(2).to(dtype), "E5M2")


@pytest.mark.parametrize("x", [[1.0, 2.0], 1.0, None])
def test_quantize_takes_tensors(x: object) -> None:
    with pytest.raises(TypeError, match="floating-point tensors"):
        ag.quantize(x, "E5M2")


@pytest.mark.parametrize("modes", [{"rounding": "up"}, {"overflow": "wrap"}, {"rounding": None}])
def test_unknown_modes(modes: dict[str, str]) -> None:
    for function in (ag.quantize, ag.encode):
        with pytest.raises(ValueError, match=r"unknown (rounding|overflow).*[Ee]xpected one of"):
            function(torch.ones(2), "E5M2", **modes)
    for modes, near in (({"rounding": "nearest"}, "nearest_even"), ({"overflow": "sat"}, "saturate")):
        with pytest.raises(ValueError, match=f"did you mean '{near}'"):
            ag.quantize(torch.ones(2), "E5M2", **modes)


def test_random_bits() -> None:
    x = torch.ones(3)
    with pytest.raises(ValueError, match="needs random_bits"):
        ag.quantize(x, "E5M2", rounding="stochastic")
    with pytest.raises(ValueError, match="needs random_bits"):
        ag.quantize(x, "float32", rounding="stochastic")
    with pytest.raises(ValueError, match="no effect"):
        ag.quantize(x, "E5M2", random_bits=torch.zeros(3, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"shape \(2,\); expected that of x, \(3,\)"):
        ag.quantize(x, "E5M2", rounding="stochastic", random_bits=torch.zeros(2, dtype=torch.int32))
    for dtype in (torch.float32, torch.bool):
        with pytest.raises(TypeError, match="integers"):
            ag.quantize(x, "E5M2", rounding="stochastic", random_bits=torch.zeros(3, dtype=dtype))
    for function in (ag.quantize, ag.quantize_blocks):
        with pytest.raises(TypeError, match="random_bits are a tensor of integers; got <class 'list'>"):
            function(x, "E5M2", rounding="stochastic", random_bits=[1, 2, 3])
    with pytest.raises(ValueError, match="needs random_bits"):
        ag.encode(x, "E5M2", rounding="stochastic")


@pytest.mark.parametrize(("shape", "scale"), [((3,), (2, 3)), ((), (1,)), ((4, 1), (4, 3)), ((4, 3), (4,))])
def test_scales_that_do_not_broadcast_to_x(shape: tuple[int, ...], scale: tuple[int, ...]) -> None:
    x, unit = torch.ones(shape), torch.ones(scale)
    message = re.escape(f"the scale has shape {scale}; expected one that broadcasts to that of x, {shape}")
    for function in (ag.quantize, ag.cast_counts, ag.quantize_with_counts):
        for name in ("E4M3", "float8_e8m0fnu", "float32"):
            with pytest.raises(InputError, match=message):
                function(x, name, scale=unit)
    with pytest.raises(InputError, match=message):
        ag.stall_counts(x, x, "E4M3", scale=unit)


def test_codes() -> None:
    with pytest.raises(TypeError, match=r"unsigned integers; got torch\.int32"):
        ag.decode(torch.zeros(2, dtype=torch.int32), "E5M2")
    with pytest.raises(ValueError, match="32 bits"):
        ag.encode(torch.ones(2), "float32")
    with pytest.raises(ValueError, match="20 bits"):
        ag.decode(torch.zeros(2, dtype=torch.uint8), Format("wide", 8, 11, 130))


def test_stalls_of_different_shapes() -> None:
    with pytest.raises(ValueError, match=r"\(2,\) but update \(3,\)"):
        ag.stall_counts(torch.ones(2), torch.ones(3), "E5M2")


def test_window_of_no_steps() -> None:
    with pytest.raises(ValueError, match="window is 0"):
        ag.empty_history(0)


# Clipping


@pytest.fixture
def model() -> torch.nn.Module:
    model = torch.nn.Linear(2, 1)
    model(torch.ones(2)).sum().backward()
    return model


@pytest.mark.parametrize("base_clip", [0, -1.0, math.nan, math.inf, "1"])
def test_base_clip(base_clip: float) -> None:
    with pytest.raises(ValueError, match="base_clip is"):
        ag.PartitionRelativeClipper("E5M2", base_clip=base_clip)


@pytest.mark.parametrize("threshold", [-0.01, 1.01, math.nan])
def test_overflow_threshold(threshold: float) -> None:
    with pytest.raises(ValueError, match="overflow_threshold is"):
        ag.PartitionRelativeClipper("E5M2", overflow_threshold=threshold)


@pytest.mark.parametrize("rate", [-0.01, 1.01, math.nan, math.inf, torch.tensor(math.nan)])
def test_overflow_rate(model: torch.nn.Module, rate: float) -> None:
    before = model.weight.grad.clone()
    with pytest.raises(ValueError, match="overflow_rate is"):
        ag.PartitionRelativeClipper("E5M2").clip_if_needed(model, rate)
    assert torch.equal(model.weight.grad, before)


def test_nothing_was_backpropagated() -> None:
    model = torch.nn.Linear(2, 1)
    with pytest.raises(ValueError, match=r"none of the 2 parameters has a gradient; call loss\.backward\(\)"):
        ag.PartitionRelativeClipper("E5M2").clip_if_needed(model, 0.5)
    with pytest.raises(ValueError, match="backward"):
        ag.clip_grad_norm_(model.parameters(), 1.0)
    assert not ag.PartitionRelativeClipper("E5M2").clip_if_needed(model, 0.0), "a shut gate looks at no gradient"


def test_models_without_parameters() -> None:
    with pytest.raises(ValueError, match="none of the 0 parameters"):
        ag.PartitionRelativeClipper("E5M2").clip_if_needed(torch.nn.ReLU(), 0.5)


@pytest.mark.parametrize("max_norm", [-1.0, math.nan, -math.inf])
def test_max_norm(model: torch.nn.Module, max_norm: float) -> None:
    with pytest.raises(ValueError, match="max_norm is"):
        ag.clip_grad_norm_(model.parameters(), max_norm)


def test_norms_of_what_has_none() -> None:
    with pytest.raises(ValueError, match="no tensors"):
        ag.global_norm([])
    for dtype in (torch.complex64, torch.int32):
        with pytest.raises(TypeError, match=str(dtype)):
            ag.global_norm([torch.ones(2), torch.ones(2).to(dtype)])


def test_complex_gradients() -> None:
    weight = torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))
    weight.grad = torch.ones(2, dtype=torch.complex64)
    with pytest.raises(TypeError, match="complex64"):
        ag.clip_grad_norm_([weight], 1.0)


def test_sparse_gradients() -> None:
    layer = torch.nn.Embedding(10, 4, sparse=True)
    layer(torch.tensor([1, 2])).sum().backward()
    assert layer.weight.grad is not None
    for call in (
        lambda: ag.clip_grad_norm_(layer.parameters(), 0.1),
        lambda: ag.PartitionRelativeClipper("E3M4").clip_if_needed(layer, 0.5),
        lambda: ag.global_norm([layer.weight.grad]),
        lambda: ag.cast_counts(layer.weight.grad, "E4M3"),
        lambda: ag.quantize(layer.weight.grad, "E4M3"),
        lambda: ag.amax(layer.weight.grad),
    ):
        with pytest.raises(InputError, match=r"dense tensors; got one of torch.sparse_coo.*expected its to_dense\(\)"):
            call()


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.complex64, torch.bool])
def test_the_amax_is_that_of_floats(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"amax takes floating-point tensors .*; got {dtype}"):
        ag.amax(torch.ones(2).to(dtype))

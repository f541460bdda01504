"""Scales and blocks in torch: strides, shapes, gradients and bad input. Values are compared in parity_tests."""

from __future__ import annotations

import math
from collections.abc import Iterator

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import altgrad_torch as ag  # noqa: E402 (after the skip)
from altgrad_core.errors import InputError  # noqa: E402


@pytest.fixture(params=[torch.float32, torch.float64], ids=str, autouse=True)
def _default_dtype(request: pytest.FixtureRequest) -> Iterator[None]:
    """What torch makes of Python numbers changes nothing."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(before)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32)


@pytest.mark.parametrize("planted", [math.nan, -math.inf, -1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_amax_loses_nothing(planted: float, dtype: torch.dtype) -> None:
    x = normal(200, 33).clamp_(-1, 1).to(dtype)
    x[77, 5] = planted
    found = ag.amax(x)
    assert found.dtype == torch.float32
    assert found.shape == ()
    assert math.isnan(found) if math.isnan(planted) else float(found) == abs(planted)
    assert ag.amax(x, 1).shape == (200, 1)
    assert torch.equal(ag.amax(x, ()).isfinite(), x.isfinite())


def test_amax_of_little() -> None:
    assert float(ag.amax(torch.zeros(0, 3))) == 0.0
    assert ag.amax(torch.zeros(0, 3), 0).tolist() == [[0.0, 0.0, 0.0]]
    assert ag.amax(torch.zeros(0, 3), 1).shape == (0, 1)
    assert float(ag.amax(torch.tensor(-3.0))) == 3.0
    assert not ag.amax(torch.ones(2, requires_grad=True)).requires_grad


def test_scales_are_float32() -> None:
    for scale in (
        ag.ratio_scale(3.0, 448.0),
        ag.power_of_two_scale(torch.tensor(3.0), 448.0),
        ag.Static(0.25).scale(1.0, 448.0),
        ag.Delayed(2).scale(1.0, 448.0, ag.Delayed(2).init()),
        ag.block_scales(normal(5), "E4M3"),
    ):
        assert scale.dtype == torch.float32
    assert ag.Delayed(2).update(ag.empty_history(2), 3.0).tolist() == [0.0, 3.0]


@pytest.mark.parametrize(
    "x", [normal(40, 6).t(), normal(6, 40)[:, ::2], normal(1, 40).expand(3, 40), normal(6, 40)[:, 3:]], ids=range(4)
)
def test_any_strides(x: torch.Tensor) -> None:
    for granularity in ("tensor", "channel", "block8"):
        assert torch.equal(ag.amaxes(x, granularity), ag.amaxes(x.contiguous(), granularity))
    assert torch.equal(ag.quantize_blocks(x, "E4M3", block=8), ag.quantize_blocks(x.contiguous(), "E4M3", block=8))


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 40)])
def test_nothing(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, dtype=torch.float32)
    assert ag.quantize_blocks(x, "E4M3").shape == shape
    codes, scales = ag.encode_blocks(x, "E4M3")
    assert ag.decode_blocks(codes, scales, "E4M3").shape == shape


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.func.jvp makes one of its own
def test_gradients_pass_straight_through() -> None:
    x, weight = normal(4, 40).requires_grad_(), normal(4, 40)
    (ag.quantize_blocks(x, "E4M3") * weight).sum().backward()
    assert torch.equal(x.grad, weight)
    _, tangent = torch.func.jvp(lambda x: ag.quantize_blocks(x, "E4M3"), (x.detach(),), (weight,))
    assert torch.equal(tangent, weight)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of clamp_ in vmap
def test_under_vmap() -> None:
    x = normal(4, 40)
    assert torch.equal(torch.func.vmap(lambda x: ag.quantize_blocks(x, "E4M3"))(x), ag.quantize_blocks(x, "E4M3"))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"block": 0}, "block size is 0; expected an integer of at least 1"),
        ({"axis": 2}, "axis 2 is out of range for an array of 2 axes; expected -2 to 1"),
        ({"rule": "mxx"}, "unknown block rule 'mxx'; did you mean 'mx'"),
        ({"rounding": "up"}, "unknown rounding 'up'"),
        ({"random_bits": torch.zeros(3, dtype=torch.int32)}, r"shape \(3,\); expected that of x, \(4, 40\)"),
        ({"random_bits": torch.zeros(4, 40, dtype=torch.int32)}, "no effect"),
    ],
)
def test_bad_input_of_blocks(how: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ag.quantize_blocks(normal(4, 40), "E4M3", **how)


def test_bad_formats_and_scales_of_blocks() -> None:
    with pytest.raises(InputError, match="no sign"):
        ag.quantize_blocks(normal(4), "float8_e8m0fnu")
    with pytest.raises(InputError, match="a scalar has none"):
        ag.quantize_blocks(torch.tensor(1.0), "E4M3")
    with pytest.raises(TypeError, match="quantize_blocks takes floating-point tensors"):
        ag.quantize_blocks(torch.arange(3), "E4M3")
    codes, scales = ag.encode_blocks(normal(6, 70), "E4M3")
    with pytest.raises(InputError, match="5 blocks of 16 along axis 1"):
        ag.decode_blocks(codes, scales, "E4M3", block=16)
    with pytest.raises(TypeError, match="uint8"):
        ag.decode_blocks(codes, scales.to(torch.int32), "E4M3")


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf, torch.tensor([1.0, 0.0]), 0.3])
def test_bad_static_scales(scale: float) -> None:
    with pytest.raises(InputError, match="the static scale is"):
        ag.Static(scale)


@pytest.mark.parametrize("scale", ["x", None, True, 1j, [1.0, "a"], [[1.0], [1.0, 2.0]], np.ones(2, bool), 10**400])
def test_static_scales_that_are_no_numbers(scale: object) -> None:
    kind = type(scale).__name__
    with pytest.raises(InputError, match=f"the static scale is .*, a {kind}; expected a positive number within 2"):
        ag.Static(scale)
    with pytest.raises(InputError, match="on the meta device, where it has no value"):
        ag.Static(torch.ones((), device="meta"))
    for good in (np.int64(4), np.float32(0.5), ml_dtypes.bfloat16(2), torch.ones(2, dtype=torch.bfloat16)):
        assert ag.Static(good).value is good


def test_bad_scalings_and_granularities() -> None:
    with pytest.raises(InputError, match="window is 0"):
        ag.Delayed(0)
    with pytest.raises(InputError, match="did you mean 'most_recent'"):
        ag.Delayed(4, "most_recnt")
    with pytest.raises(InputError, match="did you mean 'tensor'"):
        ag.amaxes(normal(3), "tensors")
    with pytest.raises(InputError, match="expected \\(2, 3\\), one for each block of 2"):
        ag.spread(torch.ones(2, 2), (2, 5), "block2")

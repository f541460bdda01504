"""Causes of a difference: each is planted, in both frameworks where they differ by it, and has to be the one named."""

from __future__ import annotations

import json
from fractions import Fraction
from typing import get_args

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from altgrad.parity import Cause, Leaf, compare, made_by, named_tensors, recognise
from altgrad.parity.casts import cast_ways
from altgrad.parity.exact import fused, rounded, sum_rounded
from altgrad.parity.floats import widened
from altgrad.parity.operation import OperationName
from altgrad.parity.ways import same_values
from altgrad_core.errors import InputError
from altgrad_core.formats import EIGHT, parse
from altgrad_core.reference import quantize_reference, round_to_format
from altgrad_jax import quantize as jax_quantize
from altgrad_torch import quantize as torch_quantize

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FORMATS = (*EIGHT, "float8_e4m3fnuz", "binary8p3se", "bf16")


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def cause_of(a: object, b: object) -> Cause:
    """The cause by which two tensors differ, which have to differ."""
    found = compare(a, b, labels=("jax", "torch"))
    assert not found.identical
    assert found.cause is not None
    return found.cause


def moved(x: np.ndarray, ulps: int, seed: int = 0) -> np.ndarray:
    """Every fifth element moved by some ulps, up or down at random."""
    at = np.arange(0, x.size, 5)
    up = np.random.default_rng(seed).random(at.size) < 0.5
    bits = x.copy().view(np.uint32)
    bits[at] += np.where(up, ulps, -ulps).astype(np.int64).astype(np.uint32)
    return bits.view(np.float32)


# What the frameworks really do


def test_fused_multiply_add_of_xla() -> None:
    x, y, z = (normal(4096, seed=seed) for seed in range(3))
    in_jax = jax.jit(lambda x, y, z: x * y + z)(x, y, z)
    in_torch = torch.from_numpy(x) * torch.from_numpy(y) + torch.from_numpy(z)
    cause = cause_of(made_by(in_jax, "multiply_add", x=x, y=y, z=z), in_torch)
    assert (cause.names, cause.sides) == (("fused multiply-add",), ("rounded once", "rounded twice"))
    assert cause.elements > 500
    twisted = cause_of(in_torch, made_by(in_jax, "multiply_add", x=x, y=y, z=z))
    assert twisted.sides == ("rounded twice", "rounded once")


def test_reduction_order_of_sums() -> None:
    x = normal(64, 1000)
    in_jax, in_torch = jnp.sum(x, axis=1), torch.from_numpy(x).sum(dim=1)
    cause = cause_of(made_by(in_jax, "sum", x=x, axis=1), made_by(in_torch, "sum", x=torch.from_numpy(x), axis=1))
    assert cause.names == ("reduction order",)
    in_turn = np.add.accumulate(x[0])[-1]
    from_behind = np.add.accumulate(x[0, ::-1])[-1]
    assert cause_of(made_by(in_turn, "sum", x=x[0]), from_behind).names == ("reduction order",)


def test_reduction_order_of_a_matmul() -> None:
    x, y = normal(32, 512), normal(512, 16, seed=1)
    in_turn = np.zeros((32, 16), np.float32)
    for k in range(512):
        in_turn += x[:, k : k + 1] * y[k]
    in_torch = torch.from_numpy(x) @ torch.from_numpy(y)
    assert cause_of(made_by(in_torch, "dot", x=x, y=y), in_turn).names == ("reduction order",)


def test_sqrt_of_torch() -> None:
    """torch's float32 sqrt is vectorised and may be an ulp off; where it is not, one that is off is planted."""
    x = np.abs(normal(4096))
    in_jax, in_torch = np.asarray(jax.jit(jnp.sqrt)(x)), torch.from_numpy(x).sqrt().numpy()
    if np.array_equal(in_jax, in_torch):
        in_torch = moved(in_jax, 1)
    assert cause_of(made_by(in_jax, "sqrt", x=x), in_torch).names == ("sqrt",)


def test_saturation_of_torch() -> None:
    x = normal(1024) * 300
    x[:3] = 1e6, -1e6, 449
    in_jax = jnp.asarray(x).astype(jnp.float8_e4m3fn).astype(jnp.float32)
    in_torch = torch.from_numpy(x).to(torch.float8_e4m3fn).float()
    cause = cause_of(made_by(in_jax, "cast", x=x, format="E4M3"), in_torch)
    assert cause.names == ("saturation",)
    assert cause.sides[0] == "made overflow NaN"
    alone = cause_of(in_jax, in_torch)
    assert (alone.names, alone.sides) == (("saturation",), ("has inf or NaN", "has ±max"))


def test_flush_of_xla() -> None:
    x = np.float32(2.0**-130) * normal(256)
    in_jax, in_torch = jax.jit(lambda x: x * 3)(x), torch.from_numpy(x) * 3
    cause = cause_of(in_jax, in_torch)
    assert cause.names in (("flushed subnormals",), ("signed zero", "flushed subnormals"))
    assert "has zero" in cause.sides[0]


def test_library_functions() -> None:
    x = normal(4096)
    in_jax, in_torch = jax.jit(jnp.tanh)(x), torch.from_numpy(x).tanh()
    assert cause_of(made_by(in_jax, "tanh", x=x), in_torch).names == ("library function",)
    in_float64 = torch.from_numpy(x).double().tanh().float()
    cause = cause_of(made_by(in_jax, "tanh", x=x), in_float64)
    assert (cause.names, cause.alternatives) == (("library function",), ("dtype promotion",))
    assert cause.sides[1] == "is correctly rounded"


# Planted


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_tie_rule(name: str, framework: str) -> None:
    """All midpoints of a format, M = 0 among them: to even, which both frameworks do, against the other rules."""
    grid = parse(name).code_book()[: parse(name).max_code + 1]
    ties = ((grid[1:] + grid[:-1]) / 2)[-200:].astype(np.float32)
    x = np.concatenate([ties, -ties])
    quantize = {"jax": jax_quantize, "torch": lambda x, name, **how: torch_quantize(torch.from_numpy(x), name, **how)}
    even, away = (quantize[framework](x, name, rounding=rounding) for rounding in ("nearest_even", "nearest_away"))
    cause = cause_of(made_by(even, "cast", x=x, format=name), away)
    assert (cause.names, cause.sides) == (("tie rule",), ("sent ties to the even code", "sent ties away from zero"))
    down = np.concatenate([grid[:-1][-200:], -grid[:-1][-200:]]).astype(np.float32)
    if not parse(name).has_negative_zero:
        down += 0  # it has one zero
    cause = cause_of(made_by(even, "cast", x=x, format=name), down)
    assert cause.names == ("tie rule",)
    assert cause.sides[1] == "sent ties toward zero"


@pytest.mark.parametrize("name", FORMATS)
def test_rounding_mode_and_overflow(name: str) -> None:
    known = parse(name)
    scale = np.float32(known.max_representable_value / 2)
    x = np.clip(normal(2000), -1.9, 1.9) * scale if known.bits > 8 else normal(2000) * scale
    even = jax_quantize(x, name)
    truncated = jax_quantize(x, name, rounding="toward_zero", overflow="saturate")
    cause = cause_of(made_by(even, "cast", x=x, format=name), truncated)
    assert "rounding mode" in cause.names
    assert set(cause.names) <= {"rounding mode", "tie rule", "saturation"}
    saturated = jax_quantize(x, name, overflow="saturate")
    if not compare(even, saturated).identical:
        assert cause_of(made_by(even, "cast", x=x, format=name), saturated).names == ("saturation",)


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_eps_of_the_clip(framework: str) -> None:
    norm = np.abs(normal(64)) + np.float32(0.5)
    limit = np.float32(0.25)
    if framework == "jax":
        with_eps, without = jnp.minimum(1, limit / (norm + 1e-6)), jnp.minimum(1, limit / jnp.asarray(norm))
    else:
        with_eps, without = (torch.clamp(limit / (torch.from_numpy(norm) + eps), max=1.0) for eps in (1e-6, 0))
    cause = cause_of(made_by(with_eps, "clip_coefficient", norm=norm, max_norm=limit), without)
    assert cause.names == ("eps of the clip",)
    assert cause.sides == ("divided by norm + 1e-06", "divided by the norm")
    x, one = normal(500), norm[0]
    scaled = made_by(x * np.asarray(with_eps)[0], "clip", x=x, norm=one, max_norm=limit)
    assert cause_of(scaled, x * np.asarray(without)[0]).names == ("eps of the clip",)
    by_optax = x / one * limit
    assert cause_of(made_by(x * np.asarray(without)[0], "clip", x=x, norm=one, max_norm=limit), by_optax).names == (
        "order of operations",
    )


def test_precision_and_reciprocal_of_the_clip() -> None:
    norm = np.abs(normal(400)) + np.float32(0.5)
    in_float32 = np.float32(0.3) / (norm + np.float32(1e-6))
    by_reciprocal = (1 / (norm + np.float32(1e-6))) * np.float32(0.3)
    in_float64 = (np.float64(np.float32(0.3)) / (norm.astype(np.float64) + 1e-6)).astype(np.float32)
    made = made_by(in_float32, "clip_coefficient", norm=norm, max_norm=np.float32(0.3))
    assert cause_of(made, by_reciprocal).names == ("reciprocal",)
    assert cause_of(made, in_float64).names == ("dtype promotion",)


@pytest.mark.parametrize("framework", ["jax", "torch"])
@pytest.mark.parametrize("name", ["multiply", "add", "divide", "sqrt", "exp"])
@pytest.mark.parametrize("narrow", ["bfloat16", "float16"])
def test_dtype_promotion(framework: str, name: str, narrow: str) -> None:
    x, y = np.abs(normal(512)) + np.float32(0.1), np.abs(normal(512, seed=1)) + np.float32(0.1)
    inputs = {"x": x} if name in ("sqrt", "exp") else {"x": x, "y": y}
    library, tensor = (jnp, jnp.asarray) if framework == "jax" else (torch, torch.from_numpy)
    operation = getattr(library, name)
    tensors = list(map(tensor, inputs.values()))
    if framework == "jax":
        low = operation(*(each.astype(narrow) for each in tensors)).astype("float32")
    else:
        low = operation(*(each.to(getattr(torch, narrow)) for each in tensors)).float()
    high = operation(*tensors)
    cause = cause_of(made_by(high, name, **inputs), low)
    assert cause.names == ("dtype promotion",)
    assert narrow in cause.sides[1]
    assert cause_of(low, high).names == ("dtype promotion",)  # the two alone show it, too


def test_reciprocal_of_a_division() -> None:
    x, y = normal(512), normal(512, seed=1)
    assert cause_of(made_by(x / y, "divide", x=x, y=y), x * (np.float32(1) / y)).names == ("reciprocal",)


def test_sums_in_float64_or_bfloat16() -> None:
    x = normal(200, 100)
    in_float64 = x.astype(np.float64).sum(1).astype(np.float32)
    in_turn = np.add.accumulate(x, axis=1)[:, -1]
    cause = cause_of(made_by(in_float64, "sum", x=x, axis=1), in_turn)
    assert cause.names == ("dtype promotion",)
    few = cause_of(made_by(in_float64[:9], "sum", x=x[:9], axis=1), in_turn[:9])
    assert (few.names, few.alternatives) == (("reduction order",), ("dtype promotion",))
    narrow = x[:, :50].astype(BFLOAT16)  # 100 bfloat16 additions may lose more than a quarter of the terms
    by_float32 = narrow.astype(np.float32).sum(1).astype(BFLOAT16)
    by_bfloat16 = np.zeros(200, BFLOAT16)
    for column in narrow.T:
        by_bfloat16 = by_bfloat16 + column
    assert cause_of(made_by(by_bfloat16, "sum", x=narrow, axis=1), by_float32).names == ("dtype promotion",)


def test_different_dtypes() -> None:
    x = normal(100)
    cause = cause_of(jnp.asarray(x), torch.from_numpy(x).bfloat16())
    assert (cause.names, cause.sides) == (("dtype promotion",), ("is float32", "is bfloat16"))
    assert cause_of(jnp.asarray(moved(x, 2**17)), torch.from_numpy(x).bfloat16()).names == ("unknown",)
    assert cause_of(np.ones(2, np.int32), np.ones(2, np.float32)).names == ("unknown",)


@pytest.mark.parametrize(
    ("one", "other", "dtypes", "cause"),
    [
        ([1, -2], [1, -2], ("int32", "int64"), "dtype promotion"),
        ([1, 0], [1, 0], ("bool", "uint8"), "dtype promotion"),
        ([1, -2], [1, -2], ("int4", "int32"), "dtype promotion"),
        ([1, 2**63 - 1], [1, 2**63 - 1], ("int64", "uint64"), "dtype promotion"),
        ([-1, -1], [2**64 - 1, 2**64 - 1], ("int64", "uint64"), "unknown"),
        ([1, 2], [1, 3], ("int32", "int64"), "unknown"),
    ],
)
def test_integers_of_different_dtypes(one: list[int], other: list[int], dtypes: tuple[str, str], cause: str) -> None:
    a, b = (np.array(each).astype(name) for each, name in zip((one, other), dtypes, strict=True))
    found = cause_of(a, b)
    assert (found.names, found.sides) == ((cause,), (f"is {dtypes[0]}", f"is {dtypes[1]}"))


def test_nan_payload_and_signed_zero() -> None:
    bits = np.full(16, 0x7FC00000, np.uint32)
    bits[:8] = np.arange(8) << 23
    x = bits.view(np.float32)
    other = np.where(np.isnan(x), (bits | 0x80000000).view(np.float32), x)
    assert cause_of(torch.from_numpy(x), jnp.asarray(other)).names == ("NaN payload",)
    other[0] = -0.0
    assert cause_of(torch.from_numpy(x), jnp.asarray(other)).names == ("NaN payload", "signed zero")


@pytest.mark.parametrize("dtype", ["float8_e5m2", "float8_e4m3", "float8_e4m3fnuz", "bfloat16"])
def test_flushed_subnormals_of_every_code(dtype: str) -> None:
    numpy_dtype = np.dtype(getattr(ml_dtypes, dtype))
    width = 8 * numpy_dtype.itemsize
    codes = np.arange(2**width, dtype=f"u{numpy_dtype.itemsize}").view(numpy_dtype)
    least = ml_dtypes.finfo(numpy_dtype).smallest_normal
    flushed = np.where(np.abs(codes.astype(np.float32)) < float(least), numpy_dtype.type(0), codes)
    names = cause_of(codes, flushed).names
    assert names[-1] == "flushed subnormals"
    assert set(names) <= {"flushed subnormals", "signed zero"}


def test_several_causes_at_once() -> None:
    x = np.float32([500, 17, 1e30, -17, 19])  # 17 and 19 are ties of E4M3
    by_a = np.float32([np.nan, 16, np.nan, -16, 20])
    by_b = np.float32([448, 18, 448, -18, 20])
    cause = cause_of(made_by(by_a, "cast", x=x, format="E4M3"), by_b)
    assert set(cause.names) == {"tie rule", "saturation"}
    assert cause.name == "saturation and tie rule"


# Not mislabelled


@pytest.mark.parametrize(
    ("name", "ulps"),
    [
        ("multiply_add", 2),
        ("multiply", 1),
        ("add", 1),
        ("divide", 3),
        ("sqrt", 2),
        ("exp", 20),
        ("log", 50),
        ("tanh", 20),
    ],
)
def test_unrelated_differences_of_arithmetic_are_unknown(name: str, ulps: int) -> None:
    x, y, z = (np.abs(normal(512, seed=seed)) + np.float32(0.1) for seed in range(3))
    results = {
        "multiply_add": x * y + z,
        "multiply": x * y,
        "add": x + y,
        "divide": x / y,
        "sqrt": np.sqrt(x),
        "exp": np.exp(x),
        "log": np.log(x),
        "tanh": np.tanh(x),
    }
    inputs = {"multiply_add": {"x": x, "y": y, "z": z}}
    inputs |= {key: {"x": x, "y": y} for key in ("multiply", "add", "divide")}
    made = made_by(results[name], name, **inputs.get(name, {"x": x}))
    assert cause_of(made, moved(results[name], ulps)).name == "unknown"


def test_unrelated_differences_of_sums_are_unknown() -> None:
    x = normal(20, 100)
    total = x.sum(1)
    off = total + np.float32(1e-4) * np.abs(x).sum(1)  # 100 float32 roundings make 6e-6 at most
    assert cause_of(made_by(total, "sum", x=x, axis=1), off).name == "unknown"
    assert cause_of(made_by(total, "sum", x=x[:5], axis=1), moved(total, 1)).name == "unknown"  # inputs do not fit
    assert cause_of(made_by(x @ x.T, "dot", x=x, y=x.T), x @ x.T + np.float32(0.01)).name == "unknown"
    # So many bfloat16 additions may end anywhere, so that their bound is evidence of nothing.
    long = np.ones(4096, BFLOAT16)
    assert cause_of(made_by(np.array(4096, BFLOAT16), "sum", x=long), np.array(256, BFLOAT16)).name == "unknown"


def test_an_axis_that_is_not_there_is_named() -> None:
    x = normal(4, 5)
    with pytest.raises(InputError, match=r"the axis 2 of a tensor \[4, 5\]"):
        compare(made_by(x.sum(1), "sum", x=x, axis=2), moved(x.sum(1), 1))


@pytest.mark.parametrize("name", EIGHT)
def test_unrelated_differences_of_casts_are_unknown(name: str) -> None:
    x = normal(500)
    result = np.asarray(jax_quantize(x, name))
    book = parse(name).code_book()
    other = result.copy()
    other[::7] = book[book < np.inf][np.random.default_rng(1).integers(1, 60, other[::7].size)]
    if not np.array_equal(result, other):
        assert cause_of(made_by(result, "cast", x=x, format=name), other).name == "unknown"


def test_unrelated_differences_of_clips_are_unknown() -> None:
    norm, x = np.abs(normal(64)) + np.float32(0.5), normal(64)
    value = np.float32(0.25) / norm
    made = made_by(value, "clip_coefficient", norm=norm, max_norm=0.25)
    assert cause_of(made, np.float32(0.25) / (norm + np.float32(1e-3))).name == "unknown"
    assert cause_of(made_by(x * value, "clip", x=x, norm=norm, max_norm=0.25), moved(x * value, 40)).name == "unknown"


@given(st.integers(0, 2**32 - 1), st.integers(1, 100_000))
def test_two_tensors_alone_show_little(seed: int, ulps: int) -> None:
    x = np.random.default_rng(seed).normal(size=100).astype(np.float32)
    assert recognise(Leaf(x), Leaf(moved(x, ulps, seed))).name == "unknown"


@given(
    st.sampled_from(get_args(OperationName)),
    st.sampled_from([np.dtype(np.float64), np.dtype(np.float32), BFLOAT16, np.dtype(ml_dtypes.float8_e5m2)]),
    st.binary(min_size=320, max_size=320),
    st.floats(0.0, width=32),
)
def test_any_bits_at_all(name: OperationName, dtype: np.dtype, drawn: bytes, max_norm: float) -> None:
    """Whatever the bits, NaN and subnormals among them: a cause comes out, without an error or a warning."""
    a, b, *given = np.frombuffer(drawn, dtype).reshape(5, -1)[:, :8]
    names = {"clip": ("x", "norm"), "clip_coefficient": ("norm",), "multiply_add": ("x", "y", "z")}
    names |= dict.fromkeys(("add", "multiply", "divide", "dot"), ("x", "y"))
    inputs = dict(zip(names.get(name, ("x",)), given, strict=False))
    options = {"max_norm": max_norm} if "clip" in name else {"format": "E5M2"} if name == "cast" else {}
    value = a[0] if name in ("sum", "dot") else a
    made = made_by(value, name, **inputs, **options)
    found = compare(made, b[0] if name in ("sum", "dot") else b)
    assert found.identical == (found.cause is None)
    assert found.cause is None or json.dumps(found.as_dict(), allow_nan=False)


def test_saturation_alone_needs_a_maximum() -> None:
    x = normal(100)
    infinite = np.where(np.arange(100) % 9 == 0, np.float32(np.inf), x)
    assert cause_of(x, infinite).name == "unknown"
    both_ways = np.float32([448, np.inf, 1]), np.float32([np.nan, 448, 1])
    assert cause_of(*both_ways).name == "unknown"


def test_promotion_alone_needs_to_be_near() -> None:
    x = normal(64)
    assert cause_of(x, (2 * x).astype(BFLOAT16).astype(np.float32)).name == "unknown"
    assert cause_of(x[:5], x[:5].astype(BFLOAT16).astype(np.float32)).name == "unknown"  # too few to tell


# What came before


def test_inputs_that_differ_are_the_cause() -> None:
    x = np.abs(normal(16))
    one, other = made_by(np.sqrt(x), "sqrt", x=x), made_by(np.sqrt(moved(x, 900)), "sqrt", x=moved(x, 900))
    cause = cause_of(one, other)
    assert cause.names == ("inputs differ",)
    assert cause.told(("jax", "torch")) == "inputs differ: jax was given another x than the other side"


def test_operations_that_differ_are_the_cause() -> None:
    x = np.abs(normal(16))
    assert cause_of(made_by(np.sqrt(x), "sqrt", x=x), made_by(np.exp(x), "exp", x=x)).names == ("operations differ",)
    casts = made_by(x, "cast", x=x, format="E4M3"), made_by(2 * x, "cast", x=x, format="E5M2")
    assert cause_of(*casts).names == ("operations differ",)


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("fma", {"x": 1.0}, "unknown operation 'fma'"),
        ("sqrt", {"y": 1.0}, "unknown input of sqrt 'y'"),
        ("divide", {"x": 1.0}, "divide was given x; expected y as well"),
        ("cast", {"x": 1.0}, "cast was given x; expected format as well"),
        ("cast", {"x": 1.0, "format": "E4M33"}, "E4M33"),
        ("sqrt", {"x": 1.0, "max_norm": 1.0}, "unknown input of sqrt 'max_norm'"),
    ],
)
def test_bad_operations_are_named(name: str, given: dict[str, object], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        made_by(1.0, name, **given)
    with pytest.raises(InputError, match="no single tensor"):
        named_tensors(made_by([1.0, 2.0], "sqrt", x=1.0))


# The exact results that sides are held against


@pytest.mark.parametrize("name", FORMATS)
def test_the_ways_of_a_cast_are_those_of_the_reference(name: str) -> None:
    """Every way that the exact reference knows, on all values and midpoints, their neighbours and the specials."""
    known = parse(name)
    grid = known.code_book()[: known.max_code + 1][-300:]
    points = np.concatenate([grid, (grid[1:] + grid[:-1]) / 2, [1.1 * grid[-1], 1e38, np.inf, np.nan]])
    points = np.concatenate([points, np.nextafter(points, 0), np.nextafter(points, np.inf)])
    x = np.concatenate([points, -points])
    ways = list(cast_ways(x, known, np.dtype(np.float64)))
    for rounding in ("nearest_even", "nearest_away", "toward_zero"):
        for overflow in ("native", "saturate", "saturate_finite"):
            wanted = [round_to_format(each, known, rounding=rounding, overflow=overflow) for each in x.tolist()]
            assert any(same_values(np.array(wanted), way.value) for way in ways), (rounding, overflow)


@given(*[st.floats(allow_nan=False, allow_infinity=False, width=32)] * 3)
def test_fused_is_rounded_once(x: float, y: float, z: float) -> None:
    exact = Fraction(x) * Fraction(y) + Fraction(z)
    got = fused(*(np.array([each], np.float32) for each in (x, y, z)))[0]
    assert_nearest(got, exact)


@given(*[st.floats(-1e100, 1e100)] * 3)
def test_fused_float64_is_rounded_once(x: float, y: float, z: float) -> None:
    exact = Fraction(x) * Fraction(y) + Fraction(z)
    assert fused(*(np.array([each]) for each in (x, y, z)))[0] == (float(exact) if exact else 0.0)


@given(st.floats(allow_nan=False, allow_infinity=False), st.sampled_from(["bfloat16", "float8_e5m2", "float8_e4m3fn"]))
def test_rounded_is_rounded_once(x: float, name: str) -> None:
    dtype = np.dtype(getattr(ml_dtypes, name))
    wanted = quantize_reference(np.array([x]), parse("bf16" if name == "bfloat16" else name), overflow="native")
    got = rounded(np.array([x]), dtype).astype(np.float64)
    assert np.array_equal(got, wanted, equal_nan=True)


@pytest.mark.parametrize("name", ["bfloat16", "float8_e5m2", "float8_e4m3fn", "float8_e4m3b11fnuz"])
def test_a_hair_beside_a_midpoint_decides(name: str) -> None:
    """All midpoints of a dtype and what lies beside them by less than float32 can tell."""
    dtype = np.dtype(getattr(ml_dtypes, name))
    codes = np.arange(2 ** (8 * dtype.itemsize - 1), dtype=f"u{dtype.itemsize}").view(dtype)
    values = widened(codes)
    below, above = values[:-1], values[1:]
    finite = np.isfinite(below) & np.isfinite(above)
    below, above = below[finite], above[finite]
    middle = (below + above) / 2
    assert np.array_equal(rounded(middle * (1 - 2.0**-40), dtype).astype(np.float64), below)
    assert np.array_equal(rounded(middle * (1 + 2.0**-40), dtype).astype(np.float64), above)
    assert np.array_equal(rounded(-middle * (1 + 2.0**-40), dtype).astype(np.float64), -above)
    is_even = np.arange(codes.size - 1)[finite] % 2 == 0
    assert np.array_equal(rounded(middle, dtype).astype(np.float64), np.where(is_even, below, above))


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("odd", [1, 3])
def test_what_a_sum_lost_decides_a_tie(sign: float, odd: int) -> None:
    """A midpoint of float32 and a hair that float64 cannot hold beside it: exact arithmetic knows the side."""
    middle, float32 = 1 + odd * 2.0**-24, np.dtype(np.float32)
    for hair in (2.0**-80, -(2.0**-80), 0.0):
        got = sum_rounded(np.array([sign * middle]), np.array([sign * hair]), float32)[0]
        assert_nearest(got, Fraction(sign * middle) + Fraction(sign * hair))
    x = np.float32([sign * (1 + 2.0**-12)])  # x * y = 1 + 2^-11 + 2^-24, which is one
    y = np.float32([1 + 2.0**-12])
    for hair in (2.0**-80, -(2.0**-80), 0.0):
        got = fused(x, y, np.float32([sign * hair]))[0]
        assert_nearest(got, Fraction(float(x[0])) * Fraction(float(y[0])) + Fraction(sign * hair))


@given(*[st.floats(-1e30, 1e30)] * 2)
def test_sums_are_rounded_once(x: float, y: float) -> None:
    assert_nearest(sum_rounded(np.array([x]), np.array([y]), np.dtype(np.float32))[0], Fraction(x) + Fraction(y))


def assert_nearest(got: np.float32, exact: Fraction) -> None:
    """That a float32 is the nearest to a number, and of two the even one."""
    if np.isinf(got):
        assert abs(exact) >= Fraction(2) ** 128 - Fraction(2) ** 103
        return
    with np.errstate(over="ignore"):
        near = [np.nextafter(got, np.float32(way)) for way in (-np.inf, np.inf)]
    off = abs(Fraction(float(got)) - exact)
    for other in near:
        if np.isfinite(other):
            farther = abs(Fraction(float(other)) - exact)
            assert off < farther or (off == farther and int(got.view(np.uint32)) % 2 == 0)

"""Scales, granularities and blocks: JAX = torch = exact arithmetic = third parties, in every bit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from fractions import Fraction
from functools import partial
from typing import Any

import gfloat
import gfloat.formats
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import altgrad_jax as in_jax
import altgrad_torch as in_torch
from altgrad_core.errors import InputError
from altgrad_core.formats import FORMAT_REGISTRY, Format, parse
from altgrad_core.reference import round_to_format
from altgrad_core.scaling import BLOCK_RULES, BlockRule, Granularity, PerBlock, PerChannel, block_exponents
from altgrad_jax import FormatParams
from parity_tests.support import EIGHT, MIN_NORMAL, as_numpy, assert_same_bits, many_inputs, to_torch

GRANULARITIES = ["tensor", "channel", "block32", PerChannel(0), PerChannel((0, 2)), PerBlock(7, axis=1), PerBlock(100)]
MAXIMA = sorted({known.max_representable_value for known in FORMAT_REGISTRY.values() if known.is_signed})

eight_formats = pytest.mark.parametrize("format", EIGHT, ids=str)
both_rules = pytest.mark.parametrize("rule", BLOCK_RULES)


def wide_array(shape: tuple[int, ...], seed: int = 0, spread: int = 12) -> npt.NDArray[np.float32]:
    """Normal values times powers of two, with zeros of both signs among them."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * 2.0 ** rng.integers(-spread, spread, shape)
    x[rng.random(shape) < 0.05] = 0.0
    return np.where(rng.random(shape) < 0.5, x, -x).astype(np.float32)


def blocks_of_all_kinds(size: int, count: int) -> npt.NDArray[np.float32]:
    """Flat blocks from one end of float32 to the other; some hold NaN, infinities, zeros or subnormals alone."""
    rng = np.random.default_rng(size)
    magnitudes = rng.uniform(0, 2, (count, size)) * 2.0 ** rng.integers(-9, 1, (count, size))
    with np.errstate(over="ignore", under="ignore"):
        x = np.ldexp(magnitudes, np.linspace(-150, 127, count).astype(int)[:, None]).astype(np.float32)
    x = np.where(rng.random(x.shape) < 0.5, x, -x)
    x[rng.random(x.shape) < 0.05] = 0.0
    x[5::40], x[6::40], x[7::40] = 0.0, -0.0, np.float32(1e-40)
    x[8::40, 0], x[9::40, -1], x[10::40, 0] = np.nan, -np.inf, np.inf
    x[11::40] = np.float32(2.0**-126)
    return x


def block_by_hand(values: list[float], format: Format, rule: BlockRule) -> tuple[list[float], float]:
    """The values of one block and its scale, by rational arithmetic."""
    largest = max(map(abs, values))
    if not all(map(math.isfinite, values)):
        return [math.nan] * len(values), math.nan
    scale = Fraction(1)
    if largest >= MIN_NORMAL:
        exponent = math.frexp(largest)[1] - 1 - format.max_exponent
        if rule == "fit" and Fraction(largest) > Fraction(format.max_representable_value) * Fraction(2) ** exponent:
            exponent += 1
        lowest, highest = block_exponents(format)
        scale = Fraction(2) ** min(max(exponent, lowest), highest)
    on_grid = [round_to_format(Fraction(v) / scale, format, overflow="saturate") for v in values]
    rounded = [math.copysign(float(scale * Fraction(abs(q))), v) for q, v in zip(on_grid, values, strict=True)]
    return [v if abs(v) >= MIN_NORMAL else math.copysign(0.0, v) for v in rounded], float(scale)


@pytest.mark.parametrize("name", ["E0M7", "E3M4", "E4M3", "E5M2", "E6M1", "E7M0", "E2M1", "E2M3", "fp16", "bf16"])
@both_rules
def test_blocks_by_rational_arithmetic(name: str, rule: BlockRule) -> None:
    x = blocks_of_all_kinds(8, 280)
    by_hand = [block_by_hand(row, parse(name), rule) for row in x.astype(np.float64).tolist()]
    expected = np.array([values for values, _ in by_hand]).astype(np.float32)
    scales = np.array([scale for _, scale in by_hand]).astype(np.float32)
    how = {"block": 8, "rule": rule}
    assert_same_bits(in_jax.quantize_blocks(jnp.asarray(x), name, **how), expected, x, "jax")
    assert_same_bits(in_torch.quantize_blocks(to_torch(x), name, **how), expected, x, "torch")
    assert_same_bits(in_jax.block_scales(jnp.asarray(x), name, **how)[:, 0], scales, what="jax scales")
    assert_same_bits(in_torch.block_scales(to_torch(x), name, **how)[:, 0], scales, what="torch scales")
    assert np.isfinite(expected[np.isfinite(x).all(axis=1)]).all(), "nothing finite becomes infinite"


def combined(*axes: Iterable[object], every: int) -> list[Any]:
    """All combinations: one in so many, by turns, is for every run, and the others for the exhaustive tests."""
    return [
        pytest.param(
            *(value for _, value in each),
            marks=pytest.mark.exhaustive if sum(place for place, _ in each) % every else (),
        )
        for each in itertools.product(*map(enumerate, axes))
    ]


@pytest.mark.parametrize(
    ("format", "size", "rule"),
    [
        *combined(map(str, EIGHT), [32], BLOCK_RULES, every=2),
        *combined(["E4M3", "E7M0"], [7, 33], BLOCK_RULES, every=2),
        *(
            pytest.param(*each, marks=pytest.mark.exhaustive)
            for each in itertools.product(["E0M7", "E4M3", "E7M0"], [1, 128], BLOCK_RULES)
        ),
    ],
)
def test_codes_of_blocks(format: str, size: int, rule: BlockRule) -> None:
    """Codes and scales are the same in both, and decode to what quantize_blocks gives; the last block may be short."""
    x = blocks_of_all_kinds(32, 120).reshape(40, -1)
    how = {"block": size, "rule": rule}
    codes, scales = in_jax.encode_blocks(jnp.asarray(x), format, **how)
    torch_codes, torch_scales = in_torch.encode_blocks(to_torch(x), format, **how)
    assert_same_bits(codes, torch_codes, what="codes")
    assert_same_bits(scales, torch_scales, what="scales")
    params = in_torch.CodeParams.from_format(format)
    for by_params, by_jax in zip(in_torch.encode_blocks(to_torch(x), params, **how), (codes, scales), strict=True):
        assert_same_bits(by_params, by_jax, what="by params")
    quantized = in_torch.quantize_blocks(to_torch(x), params.params, **how)
    expected = in_jax.quantize_blocks(jnp.asarray(x), format, **how)
    assert_same_bits(in_torch.quantize_blocks(to_torch(x), format, **how), expected, x, "torch")
    assert_same_bits(quantized, expected, x, "torch by params")
    assert_same_bits(in_jax.decode_blocks(codes, scales, format, block=size), expected, x, "jax decoded")
    assert_same_bits(in_torch.decode_blocks(torch_codes, torch_scales, format, block=size), expected, x, "decoded")
    values = in_jax.block_scales(jnp.asarray(x), format, **how)
    np.testing.assert_array_equal(as_numpy(scales).view(ml_dtypes.float8_e8m0fnu).astype(np.float32), values)


@pytest.mark.parametrize(
    ("axis", "dtype"), combined([0, 1, 2, -2], ["float32", "bfloat16", "float16", "float64"], every=2)
)
def test_axes_and_dtypes_of_blocks(axis: int, dtype: str) -> None:
    x = to_torch(wide_array((5, 70, 6))).to(getattr(torch, dtype))
    with jax.enable_x64(dtype == "float64"):
        actual = in_jax.quantize_blocks(jnp.asarray(as_numpy(x)), "E4M3", axis=axis)
    expected = in_torch.quantize_blocks(x, "E4M3", axis=axis)
    assert expected.dtype == x.dtype
    assert_same_bits(actual, expected, what="values")
    moved = in_torch.quantize_blocks(x.movedim(axis, -1), "E4M3").movedim(-1, axis)
    assert_same_bits(moved.contiguous(), expected, what="moved")


def test_stochastic_rounding_in_blocks() -> None:
    x, drawn = wide_array((40, 50)), np.random.default_rng(1).integers(0, 2**24, (40, 50)).astype(np.int32)
    how = {"block": 32, "rounding": "stochastic"}
    actual = in_jax.quantize_blocks(jnp.asarray(x), "E3M4", random_bits=jnp.asarray(drawn), **how)
    expected = in_torch.quantize_blocks(to_torch(x), "E3M4", random_bits=to_torch(drawn), **how)
    assert_same_bits(actual, expected, x)
    nearest = in_torch.quantize_blocks(to_torch(x), "E3M4")
    assert not torch.equal(nearest, expected)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("E4M3", gfloat.formats.format_info_mxfp8_e4m3),
        ("E5M2", gfloat.formats.format_info_mxfp8_e5m2),
        ("E3M2", gfloat.formats.format_info_mxfp6_e3m2),
        ("E2M3", gfloat.formats.format_info_mxfp6_e2m3),
        ("E2M1", gfloat.formats.format_info_mxfp4_e2m1),
    ],
)
def test_mx_as_in_gfloat(name: str, theirs: gfloat.BlockFormatInfo) -> None:
    """gfloat scales zeros by 2^-127 where we take 1, and looks at one block at a time."""
    x = wide_array((60, 32), spread=20)
    codes, scales = in_jax.encode_blocks(jnp.asarray(x), name)
    decoded = in_jax.quantize_blocks(jnp.asarray(x), name)
    for row in range(x.shape[0]):
        wide = x[row].astype(np.float64)
        expected = gfloat.quantize_block(theirs, wide, gfloat.compute_scale_amax)
        np.testing.assert_array_equal(decoded[row], expected)
        scale = gfloat.compute_scale_amax(theirs.etype.emax, wide)
        assert [int(scales[row, 0]), *codes[row].tolist()] == list(gfloat.encode_block(theirs, scale, wide / scale))


@pytest.mark.parametrize(
    ("dtype", "axes"),
    combined(["float32", "bfloat16", "float16", "float64"], [None, 0, -1, (0, 2), (0, 1, 2), ()], every=2),
)
@pytest.mark.parametrize("planted", [None, math.nan, -math.inf, 1e-40])
def test_amax(dtype: str, axes: int | tuple[int, ...] | None, planted: float | None) -> None:
    wide = wide_array((6, 64, 33)).astype(np.float64)
    if planted is not None:
        wide[2:4, :, 7], wide[1] = planted, planted
    x = to_torch(wide).to(getattr(torch, dtype))
    with jax.enable_x64(dtype == "float64"):
        actual = jax.jit(in_jax.amax, static_argnums=1)(jnp.asarray(as_numpy(x)), axes)
    expected = in_torch.amax(x, axes)
    assert_same_bits(actual, expected)
    with np.errstate(over="ignore"):
        by_numpy = np.max(np.abs(as_numpy(x.double())), axis=axes, keepdims=axes is not None).astype(np.float32)
    if dtype == "float64":
        by_numpy = np.where(by_numpy < MIN_NORMAL, 0, by_numpy)
    np.testing.assert_array_equal(as_numpy(expected), by_numpy)


@pytest.mark.parametrize("maximum", MAXIMA)
def test_scales_of_many_amaxes(maximum: float) -> None:
    amaxes = np.abs(many_inputs())
    amaxes = np.where(np.isnan(amaxes), np.float32(np.nan), amaxes)
    for name in ("power_of_two_scale", "ratio_scale"):
        ours = jax.jit(getattr(in_jax, name))
        expected = getattr(in_torch, name)(to_torch(amaxes), maximum)
        assert_same_bits(ours(amaxes, np.float32(maximum)), expected, amaxes, name)
        constant = jax.jit(lambda amaxes, name=name: getattr(in_jax, name)(amaxes, maximum))
        assert_same_bits(constant(amaxes), expected, amaxes, f"{name} with the maximum known to the compiler")
        assert_same_bits(getattr(in_jax, name)(amaxes[7], maximum), getattr(in_torch, name)(amaxes[7], maximum))
    with np.errstate(over="ignore", under="ignore"):
        divided = np.clip(amaxes / np.float32(maximum), np.float32(2.0**-100), np.float32(2.0**100))
    plain = np.isfinite(amaxes) & (amaxes >= MIN_NORMAL) & (maximum < 2.0**100)
    assert_same_bits(expected, np.where(plain, divided, np.float32(1)), amaxes)


@partial(jax.jit, static_argnums=(2, 3))
def scaled_in_jax(x: jax.Array, params: FormatParams, granularity: str | Granularity, power_of_two: bool) -> jax.Array:
    """The format is data: one compilation serves all."""
    largest = in_jax.amaxes(x, granularity)
    scale = in_jax.Current(power_of_two).scale(largest, params.max_value)
    return in_jax.quantize(x, params, scale=in_jax.spread(scale, x.shape, granularity))


@pytest.mark.parametrize(("format", "granularity"), combined(EIGHT, GRANULARITIES, every=3), ids=str)
@pytest.mark.parametrize("power_of_two", [True, False])
def test_current_scaling(format: Format, granularity: str | Granularity, power_of_two: bool) -> None:
    """The three steps in both frameworks, and once more: that changes nothing."""
    x, maximum = wide_array((4, 21, 40)), format.max_representable_value

    def by_jax(x: jax.Array) -> jax.Array:
        return scaled_in_jax(x, FormatParams.from_format(format), granularity, power_of_two)

    def by_torch(x: torch.Tensor) -> torch.Tensor:
        largest = in_torch.amaxes(x, granularity)
        scale = in_torch.Current(power_of_two).scale(largest, maximum)
        return in_torch.quantize(x, format, scale=in_torch.spread(scale, x.shape, granularity))

    once, expected = by_jax(jnp.asarray(x)), by_torch(to_torch(x))
    assert_same_bits(once, expected, x)
    assert np.isfinite(as_numpy(once)).all()
    assert_same_bits(by_jax(once), once, x, "jax again")
    assert_same_bits(by_torch(expected), expected, x, "torch again")


@eight_formats
@pytest.mark.parametrize("reduce", ["max", "most_recent"])
@pytest.mark.parametrize("power_of_two", [True, False])
def test_delayed_scaling(format: Format, reduce: str, power_of_two: bool) -> None:
    ours, theirs = in_jax.Delayed(3, reduce, power_of_two), in_torch.Delayed(3, reduce, power_of_two)
    history, mirror = ours.init((2,)), theirs.init((2,))
    for step in range(6):
        seen = wide_array((2,), seed=step)
        seen[0] = np.nan if step == 3 else abs(seen[0])
        history, mirror = ours.update(history, jnp.asarray(seen)), theirs.update(mirror, to_torch(seen))
        assert_same_bits(history, mirror)
        scales = [s.scale(None, format.max_representable_value, h) for s, h in ((ours, history), (theirs, mirror))]
        assert_same_bits(*scales)


@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False), min_size=1, max_size=8),
    st.sampled_from(EIGHT),
    st.booleans(),
)
@settings(max_examples=300)
def test_quantising_twice_changes_nothing(values: list[float], format: Format, power_of_two: bool) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.tensor(values, dtype=torch.float32).to(dtype)
        scaling = in_torch.Current(power_of_two)
        scale = scaling.scale(in_torch.amax(x), format.max_representable_value)
        once = in_torch.quantize(x, format, scale=scale)
        again = scaling.scale(in_torch.amax(once), format.max_representable_value)
        if not power_of_two and dtype == torch.float32 and float(in_torch.amax(once)) > 0:
            assert float(again) == float(scale), "the ratio gives its scale back"
        assert_same_bits(in_torch.quantize(once, format, scale=again), once, what=f"{dtype}, current")
        assert_same_bits(in_torch.quantize(once, format, scale=scale), once, what=f"{dtype}, given")
        for rule in BLOCK_RULES:
            blocks = in_torch.quantize_blocks(x, format, block=3, rule=rule)
            assert_same_bits(in_torch.quantize_blocks(blocks, format, block=3, rule=rule), blocks, what=rule)


@pytest.mark.parametrize("maximum", sorted({m for m in MAXIMA if m < 2.0**100}))
def test_a_ratio_gives_its_scale_back(maximum: float) -> None:
    """``amax -> scale -> amax of what was quantised -> scale``, for all 2^23 significands: the scale stays."""
    amaxes = torch.arange(0x3F800000, 0x40000000, 3 if maximum != 448.0 else 1, dtype=torch.int32).view(torch.float32)
    scales = in_torch.ratio_scale(amaxes, maximum)
    assert torch.equal(in_torch.ratio_scale(scales * maximum, maximum), scales)


@pytest.mark.parametrize("bad", [0.0, -0.5, math.nan, math.inf, 1e300, 1e-300, True, np.float64(1e39), np.ones(2) * -1])
def test_a_number_that_is_no_scale_is_refused(bad: Any) -> None:
    for package, ones in ((in_jax, jnp.ones(2)), (in_torch, torch.ones(2))):
        for call in (package.quantize, package.quantize_with_counts, package.cast_counts):
            with pytest.raises(InputError, match=r"the scale is .*; expected a positive number within 2\^-149 to 3.4"):
                call(ones, "E4M3", scale=bad)


@pytest.mark.parametrize("scale", [2.0**-149, 2.0**-130, 2.0**127, np.float32(3.0), np.array([0.5, 2.0])])
def test_any_float32_that_is_positive_is_a_scale(scale: Any) -> None:
    found = in_jax.quantize(jnp.ones(2), "E5M2", scale=scale, overflow="saturate")
    assert_same_bits(found, in_torch.quantize(torch.ones(2), "E5M2", scale=scale, overflow="saturate"))


def test_a_stall_is_counted_on_a_grid_moved_by_a_power_of_two() -> None:
    ones = jnp.ones(2)
    assert in_jax.stall_counts(ones, ones, "E4M3", scale=0.25).as_integers()["nonzero"] == 2
    with pytest.raises(InputError, match=r"the scale is 0.3, which is no power of two; expected one .* is 0.25"):
        in_jax.stall_counts(ones, ones, "E4M3", scale=0.3)


def test_an_amax_of_another_shape_does_not_enter_a_history() -> None:
    for package, array in ((in_jax, jnp.asarray), (in_torch, torch.tensor)):
        history = package.empty_history(4, (2,))
        for amax in (array(1.0), array([1.0]), array([[1.0, 2.0]])):
            with pytest.raises(InputError, match=r"the amax has shape .*; expected \(2,\), that of a row"):
                package.push_amax(history, amax)

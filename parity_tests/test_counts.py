"""Counts and scales: JAX = torch = the definitions, evaluated in NumPy and in Python integers."""

from __future__ import annotations

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import altgrad_jax.scaling as scaling_in_jax
import altgrad_jax.statistics as in_jax
import altgrad_torch.scaling as scaling_in_torch
import altgrad_torch.statistics as in_torch
from altgrad_core.formats import Format, parse
from altgrad_core.reference import round_to_format
from altgrad_jax.params import FormatParams
from parity_tests.support import (
    EIGHT,
    MIN_NORMAL,
    as_numpy,
    assert_same_bits,
    boundaries,
    many_inputs,
    padded,
    to_torch,
    widened,
)

BOUNDARY_SIZE = 2048
CASTS = ("elements", "overflow", "nonzero", "underflow", "nan")
STALLS = ("nonzero", "precision", "saturation", "vanished")
LIMB = 2**30


def formats(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("format", [*EIGHT, *map(parse, names)], ids=str)


def counted_by_definition(
    x: npt.NDArray[np.float32] | npt.NDArray[np.float64], format: Format, scale: float
) -> dict[str, int]:
    """Overflow is what rounds beyond max: past half a quantum above it, or at it if the tie is for an odd code."""
    wide = np.abs(widened(x)) / scale
    quantum = 2.0 ** (
        max(math.floor(math.log2(format.max_representable_value)), format.min_exponent) - format.mantissa_bits
    )
    tie = format.max_representable_value + quantum / 2
    overflow = (wide > tie) | ((wide == tie) & (format.max_code % 2 == 1))
    nonzero = (x != 0) & ~np.isnan(x)
    # Only float32 itself keeps what is below 2^-126.
    smallest = 2.0**-149 if format.cast_path == "identity" else MIN_NORMAL
    becomes_zero = [
        abs(round_to_format(value, format, overflow="saturate")) < smallest
        for value in wide[nonzero & ~overflow].tolist()
    ]
    return {
        "elements": x.size,
        "overflow": int(overflow.sum()),
        "nonzero": int(nonzero.sum()),
        "underflow": sum(becomes_zero),
        "nan": int(np.isnan(x).sum()),
    }


@jax.jit
def jax_counts(x: jax.Array, params: FormatParams, scale: jax.Array) -> tuple[in_jax.CastCounts, jax.Array]:
    return in_jax.observe(x, params, scale=scale)


@jax.jit
def jax_counts_unscaled(x: jax.Array, params: FormatParams) -> tuple[in_jax.CastCounts, jax.Array]:
    return in_jax.observe(x, params)


def spread(format: Format, scale: float = 1.0) -> npt.NDArray[np.float32]:
    """Boundaries, shuffled lest formats share the counts of their padding, and numbers around 2^-126 and elsewhere."""
    rng = np.random.default_rng(int(format.max_code))
    edges = rng.permutation(boundaries(format))[: BOUNDARY_SIZE // 2]
    tiny = (2**23 - 2 ** np.arange(24)[:, None] + np.array([-1, 0, 1])).clip(1).astype(np.uint32).view(np.float32)
    with np.errstate(all="ignore"):
        moved = (widened(edges) * scale).astype(np.float32)
        others = (rng.standard_normal(900) * 10.0 ** rng.uniform(-12, 12, 900) * scale).astype(np.float32)
    return padded(np.concatenate([moved, others, tiny.reshape(-1)]), BOUNDARY_SIZE)


@formats("bf16", "fp16", "E8M7b140", "E8M4b130", "E8M7b142", "E8M0b134", "E8M0b135", "E7M0b23")
def test_cast_counts(format: Format) -> None:
    """The last six are formats whose range nearly leaves float32's."""
    x = spread(format)
    expected = counted_by_definition(x, format, 1.0)
    in_both, amax = jax_counts_unscaled(jnp.asarray(x), FormatParams.from_format(format))
    assert in_both.as_integers() == expected
    counts, torch_amax = in_torch.observe(to_torch(x), format)
    assert counts.as_integers() == expected
    assert_same_bits(amax, torch_amax)
    for rate in ("overflow_rate", "underflow_rate", "nan_rate"):
        assert_same_bits(getattr(in_both, rate), getattr(counts, rate), what=rate)


@formats()
@pytest.mark.parametrize("exponent", [-100, -7, 5, 100])
def test_cast_counts_under_a_scale(format: Format, exponent: int) -> None:
    scale = 2.0**exponent
    x = spread(format, scale)
    expected = counted_by_definition(x, format, scale)
    from_jax, amax = jax_counts(jnp.asarray(x), FormatParams.from_format(format), jnp.float32(scale))
    from_torch, torch_amax = in_torch.observe(to_torch(x), format, scale=scale)
    assert from_jax.as_integers() == from_torch.as_integers() == expected
    assert_same_bits(amax, torch_amax)


@formats()
def test_counts_of_each_boundary(format: Format) -> None:
    """One count for each element, so that an error in one cannot be made good by another: ties at the edge included."""
    x = boundaries(format)
    counts = [in_torch.cast_counts(each[None], format).as_integers() for each in to_torch(x).unbind()]
    assert counts == [counted_by_definition(each[None], format, 1.0) for each in x]
    params = FormatParams.from_format(format)
    one_by_one = jax.vmap(lambda each: in_jax.cast_counts(each[None], params))(jnp.asarray(x)).as_integers()
    assert one_by_one == {name: [count[name] for count in counts] for name in CASTS}


@formats("bf16", "fp16", "E8M7b140", "E8M4b130", "E8M0b134", "float32")
@pytest.mark.parametrize("scale", [1.0, 2.0**-40])
def test_float64_counts_at_its_own_values(format: Format, scale: float) -> None:
    """Next to each edge, at steps that float32 does not have, and beyond what it holds."""
    near = widened(many_inputs()[:: 2**9] if format.mantissa_bits > 16 else boundaries(format)[:1024:3])
    with np.errstate(all="ignore"):
        x = np.concatenate([near, near * (1 + 2.0**-50), near * (1 - 2.0**-50), near * 2.0**-130, near * 1e200])
    x = np.append(x, [2.0**128, 2.0**128 - 2.0**103, np.nextafter(2.0**128 - 2.0**103, 0), 2.0**-150, 1e-300]) * scale
    own = 1.0 if format.cast_path == "identity" else scale  # which takes no notice of a scale
    expected = counted_by_definition(x, format, own)
    with jax.enable_x64(True):
        for form in (format, FormatParams.from_format(format)):
            from_jax, amax = jax.jit(in_jax.observe, static_argnums=() if form is not format else 1)(
                jnp.asarray(x), form, scale=scale
            )
            assert from_jax.as_integers() == expected
    from_torch, torch_amax = in_torch.observe(to_torch(x), format, scale=scale)
    assert from_torch.as_integers() == expected
    assert_same_bits(amax, torch_amax)
    assert float(in_torch.overflow_rate([to_torch(x)], format, scale=scale)) == np.float32(
        expected["overflow"] / expected["elements"]
    )
    each = to_torch(x).expand(2, -1), torch.tensor([[scale], [scale]])
    apart = in_torch.cast_counts(each[0], format, scale=each[1]).as_integers()
    assert apart == {name: 2 * count for name, count in expected.items()}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_counts_at_its_own_values(dtype: str) -> None:
    x = many_inputs()[: 2**16] if dtype == "bfloat16" else many_inputs()[2**16 : 2**17]
    from_jax, amax = in_jax.observe(jnp.asarray(x).astype(dtype), "E4M3")
    from_torch, torch_amax = in_torch.observe(to_torch(x).to(getattr(torch, dtype)), "E4M3")
    assert from_jax.as_integers() == from_torch.as_integers() == counted_by_definition(x, parse("E4M3"), 1.0)
    assert np.isnan(float(amax))
    assert np.isnan(float(torch_amax))


def test_nan_is_neither_nonzero_nor_overflow() -> None:
    x = np.array([np.nan, np.inf, 0.0, -0.0, 1.0], np.float32)
    expected = {"elements": 5, "overflow": 1, "nonzero": 2, "underflow": 0, "nan": 1}
    assert in_jax.cast_counts(jnp.asarray(x), "E5M2").as_integers() == expected
    assert in_torch.cast_counts(to_torch(x), "E5M2").as_integers() == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [([], 0.0), ([-3.0, 1.0], 3.0), ([1.0, -math.inf], math.inf), ([math.nan, math.inf], math.nan)],
)
def test_amax(values: list[float], expected: float) -> None:
    x = np.array(values, np.float32)
    for amax in (in_jax.observe(jnp.asarray(x), "E5M2")[1], in_torch.observe(to_torch(x), "E5M2")[1]):
        assert float(amax) == expected or (math.isnan(expected) and math.isnan(float(amax)))


def test_nothing_has_rate_zero() -> None:
    for counts in (in_jax.CastCounts.zeros(), in_torch.CastCounts.zeros()):
        assert [float(counts.overflow_rate), float(counts.underflow_rate), float(counts.nan_rate)] == [0.0, 0.0, 0.0]
    for stalls in (in_jax.StallCounts.zeros(), in_torch.StallCounts.zeros()):
        assert [float(stalls.stall_rate), float(stalls.saturation_rate)] == [0.0, 0.0]


def test_more_than_one_chunk() -> None:
    x = np.random.default_rng(6).standard_normal(2**20 + 77, np.float32) * np.float32(1e5)
    scale = np.full(x.shape, 0.5, np.float32)
    expected = in_jax.cast_counts(jnp.asarray(x), "E5M2", scale=0.5).as_integers()
    assert in_torch.cast_counts(to_torch(x), "E5M2", scale=to_torch(scale)).as_integers() == expected


COUNT = st.integers(0, 2**45)


@given(st.lists(st.tuples(COUNT, COUNT, COUNT, COUNT, COUNT), min_size=1, max_size=4))
def test_sums_and_rates_of_large_counts(totals: list[tuple[int, ...]]) -> None:
    """Beyond 2^31, where 32-bit integers wrap; rates are quotients in float64, rounded once to float32."""
    limbs = np.array([[[n // LIMB, n % LIMB] for n in each] for each in totals], np.int32)
    from_jax = in_jax.CastCounts(jnp.asarray(limbs))
    from_torch = in_torch.CastCounts(torch.tensor(totals, dtype=torch.int64))
    summed = [sum(each) for each in zip(*totals, strict=True)]
    assert from_jax.pooled().as_integers() == from_torch.pooled().as_integers() == dict(zip(CASTS, summed, strict=True))
    doubled = {name: [2 * each[k] for each in totals] for k, name in enumerate(CASTS)}
    assert (from_jax + from_jax).as_integers() == (from_torch + from_torch).as_integers() == doubled
    for rate, above, below in (("overflow_rate", 1, 0), ("underflow_rate", 3, 2), ("nan_rate", 4, 0)):
        quotients = [np.float32(each[above] / each[below]) if each[below] else np.float32(0) for each in totals]
        assert_same_bits(getattr(from_jax, rate), np.array(quotients), what=rate)
        assert_same_bits(getattr(from_torch, rate), np.array(quotients), what=rate)


# Stalls


def stalls_by_definition(
    weight: npt.NDArray[np.float32],
    update: npt.NDArray[np.float32],
    gradient: npt.NDArray[np.float32],
    format: Format,
    scale: float,
) -> dict[str, int]:
    """One weight at a time; the sum is float32's."""
    counts = dict.fromkeys(STALLS, 0)
    for w, u, g in zip(weight, update, gradient, strict=True):
        if abs(u) < MIN_NORMAL:
            counts["vanished"] += bool(not abs(g) < MIN_NORMAL)
            continue
        counts["nonzero"] += 1
        before, after = (round_to_scaled_format(float(value), format, scale) for value in (w, flushed(w + u)))
        if before == after:
            at_max = abs(before) == format.max_representable_value and np.signbit(before) == np.signbit(u)
            counts["saturation" if at_max else "precision"] += 1
    return counts


def round_to_scaled_format(value: float, format: Format, scale: float) -> float:
    exact = value if not math.isfinite(value) else Fraction(value) / Fraction(scale)
    return round_to_format(exact, format, overflow="saturate")


@jax.jit
def jax_stalls(
    weight: jax.Array, update: jax.Array, gradient: jax.Array, params: FormatParams, scale: jax.Array
) -> in_jax.StallCounts:
    return in_jax.stall_counts(weight, update, params, scale=scale, gradient=gradient)


@formats("bf16")
@pytest.mark.parametrize("exponent", [-20, 0, 6])
def test_stall_counts(format: Format, exponent: int) -> None:
    rng, scale, size = np.random.default_rng(7), 2.0**exponent, 1000
    grid = format.code_book()[: format.max_code + 1]
    with np.errstate(over="ignore"):
        weight = (rng.choice(grid[-200:], size) * rng.choice([-1, 1], size) * scale).astype(np.float32)
    weight[::2] = (rng.standard_normal(weight[::2].size) * scale).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        update = (weight * 10.0 ** rng.uniform(-6, 0.5, size) * rng.choice([-1, 1], size)).astype(np.float32)
        update[:10] = [math.inf, -math.inf, math.nan, 1e38, -1e38, *[0.0] * 5]
        gradient = np.where(rng.random(size) < 0.5, 0, update + 1).astype(np.float32)
        expected = stalls_by_definition(weight, update, gradient, format, scale)
    arrays = (weight, update, gradient)
    from_jax = jax_stalls(*map(jnp.asarray, arrays), FormatParams.from_format(format), jnp.float32(scale))
    w, u, g = map(to_torch, arrays)
    from_torch = in_torch.stall_counts(w, u, format, scale=scale, gradient=g)
    assert expected["nonzero"] > expected["precision"] > 0
    assert expected["saturation"] > 0 or format.name == "bf16"
    assert from_jax.as_integers() == from_torch.as_integers() == expected
    assert_same_bits(from_jax.stall_rate, from_torch.stall_rate)
    assert_same_bits(from_jax.saturation_rate, from_torch.saturation_rate)
    assert from_torch.stall_rate == np.float32((expected["precision"] + expected["saturation"]) / expected["nonzero"])


@pytest.mark.parametrize("format", [*map(parse, ("E4M3", "E5M2", "bf16"))], ids=str)
def test_subnormals_do_not_count_as_updates(format: Format) -> None:
    """Depending on what it is fused with, XLA would see them or not."""
    bits = np.random.default_rng(8).integers(0, 2**24, (3, 3000), np.uint32)
    weight, update, gradient = (bits | (bits << 31)).view(np.float32)
    expected = stalls_by_definition(flushed(weight), update, gradient, format, 2.0**-90)
    arrays = (weight, update, gradient)
    from_jax = jax_stalls(*map(jnp.asarray, arrays), FormatParams.from_format(format), jnp.float32(2.0**-90))
    w, u, g = map(to_torch, arrays)
    from_torch = in_torch.stall_counts(w, u, format, scale=2.0**-90, gradient=g)
    assert from_torch.as_integers() == expected
    assert from_jax.as_integers() == expected


def flushed(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return np.where(np.abs(x) < MIN_NORMAL, np.copysign(np.float32(0), x), x)


@pytest.mark.parametrize("format", [*map(parse, ("E0M7", "E5M2", "E7M0", "bf16"))], ids=str)
@pytest.mark.parametrize("exponent", [-60, 0, 20])
def test_stalls_at_the_maximum(format: Format, exponent: int) -> None:
    """Outward it is saturation; inward, too small to leave, precision."""
    scale = 2.0 ** min(exponent, 126 - format.max_exponent)
    top = format.max_representable_value * scale
    weight = np.array([top, top, -top, -top, top], np.float32)
    update = np.array([top / 2, -top / 2**20, -top / 2, top / 2**20, -top], np.float32)
    expected = {"nonzero": 5, "precision": 2, "saturation": 2, "vanished": 0}
    params = FormatParams.from_format(format)
    from_jax = jax_stalls(jnp.asarray(weight), jnp.asarray(update), jnp.asarray(update), params, jnp.float32(scale))
    assert from_jax.as_integers() == expected
    from_torch = in_torch.stall_counts(to_torch(weight), to_torch(update), format, scale=scale)
    assert from_torch.as_integers() == expected


# Scales

MAGNITUDE = st.integers(0, 0x7FFFFFFF).map(lambda bits: float(np.uint32(bits).view(np.float32)))


@given(MAGNITUDE, st.sampled_from(EIGHT))
def test_power_of_two_scale(amax: float, format: Format) -> None:
    """The smallest power of two that brings amax to at most max, within 2^-100 to 2^100; subnormals count as zero."""
    maximum = format.max_representable_value
    expected = 1.0
    if MIN_NORMAL <= amax < math.inf:
        exponent = math.ceil(
            math.log2(Fraction(amax) / Fraction(maximum))
        )  # off by one at worst; settled exactly below
        exponent += Fraction(amax) > Fraction(2) ** exponent * Fraction(maximum)
        exponent -= Fraction(amax) <= Fraction(2) ** (exponent - 1) * Fraction(maximum)
        expected = 2.0 ** min(max(exponent, -100), 100)
    assert_same_bits(scaling_in_jax.power_of_two_scale(np.float32(amax), maximum), np.float32(expected))
    assert_same_bits(scaling_in_torch.power_of_two_scale(torch.tensor(amax), maximum), np.float32(expected))


@pytest.mark.parametrize("max_value", [2.0**99, 2.0**100, 3.4028234663852886e38])
def test_nothing_needs_scaling_to_float32(max_value: float) -> None:
    amax = np.array([1e-30, 1.0, 3e38], np.float32)
    from_jax = scaling_in_jax.power_of_two_scale(jnp.asarray(amax), max_value)
    assert_same_bits(from_jax, scaling_in_torch.power_of_two_scale(to_torch(amax), max_value))
    assert (np.asarray(from_jax) == 1).all() == (max_value >= 2.0**100)


AMAX = MAGNITUDE | st.sampled_from([math.inf, math.nan])


@given(st.lists(st.tuples(AMAX, AMAX), min_size=1, max_size=6))
def test_amax_history(steps: list[tuple[float, float]]) -> None:
    """The same history and scale after any steps; what is not finite repeats the step before."""
    from_jax, from_torch = scaling_in_jax.empty_history(3, (2,)), scaling_in_torch.empty_history(3, (2,))
    expected = [(0.0, 0.0)] * 3
    for amax in steps:
        from_jax = scaling_in_jax.push_amax(from_jax, jnp.asarray(amax, jnp.float32))
        from_torch = scaling_in_torch.push_amax(from_torch, torch.tensor(amax, dtype=torch.float32))
        seen = tuple(new if math.isfinite(new) else old for new, old in zip(amax, expected[-1], strict=True))
        expected = [*expected[1:], (seen[0], seen[1])]
    assert_same_bits(from_jax, np.array(expected, np.float32))
    assert_same_bits(from_torch, np.array(expected, np.float32))
    scale = scaling_in_jax.delayed_scale(from_jax, 448.0)
    assert_same_bits(scale, scaling_in_torch.delayed_scale(from_torch, 448.0))
    largest = np.array(expected, np.float32).max(0)
    assert_same_bits(scale, scaling_in_jax.power_of_two_scale(largest, 448.0))


# The detector


def test_detector_measures_the_real_update() -> None:
    """Adam's update differs from lr * grad; a momentum moves weights whose gradient is zero."""
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    detector = in_torch.BitStallDetector("E4M3")
    params = FormatParams.from_format("E4M3")
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(5, 8)).square().mean().backward()
        before = [parameter.detach().clone() for parameter in model.parameters()]
        with detector.watch(model):
            optimizer.step()
        total = in_jax.StallCounts.zeros()
        for old, new in zip(before, model.parameters(), strict=True):
            arrays = tuple(map(as_numpy, (old, new - old, new.grad)))
            scale = scaling_in_jax.power_of_two_scale(float(old.abs().max()), 448.0)
            total = total + jax_stalls(*map(jnp.asarray, arrays), params, scale)
        assert detector.counts.as_integers() == total.as_integers()
        assert 0 < detector.stall_rate == float(total.stall_rate) < 1


def test_an_update_lost_in_the_addition_is_a_stall_not_an_update_of_zero() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, 1.0, 0.0]))
    weight.grad = torch.tensor([1e-9, 0.5, 0.0])
    detector = in_torch.BitStallDetector("E5M2")
    with detector.watch([weight]):
        torch.optim.SGD([weight], lr=1.0).step()
    assert detector.counts.as_integers() == {"nonzero": 2, "precision": 1, "saturation": 0, "vanished": 0}


def test_detector_is_never_stale() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    detector = in_torch.BitStallDetector("E5M2")
    assert detector.stall_rate == 0.0
    with detector.watch([weight]), torch.no_grad():
        weight += 1e-6
    assert detector.stall_rate == 1.0
    with pytest.raises(RuntimeError, match="interrupted"), detector.watch([weight]):
        raise RuntimeError("interrupted")
    assert detector.stall_rate == 0.0
    assert detector.counts.as_integers()["nonzero"] == 0


def test_detector_of_nothing() -> None:
    detector = in_torch.BitStallDetector("E5M2")
    with detector.watch(torch.nn.ReLU()):
        pass
    assert detector.stall_rate == 0.0
    empty = torch.nn.Parameter(torch.zeros(0, 3))
    with detector.watch([empty]):
        pass
    assert detector.counts.as_integers()["nonzero"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_updates_lost_in_the_addition_are_stalls_in_both(dtype: torch.dtype) -> None:
    weight = torch.nn.Parameter(torch.ones(8, dtype=dtype))
    weight.grad = torch.ones_like(weight)
    detector = in_torch.BitStallDetector("E5M2")
    with detector.watch([weight]):
        torch.optim.SGD([weight], lr=1e-9).step()
    monitor = in_jax.stall_monitor("E5M2")
    params = jnp.ones(8)
    _, state = monitor.update(jnp.full(8, -1e-9), monitor.init(params), params)
    assert detector.stall_rate == float(state.stall_rate) == 1.0
    assert detector.counts.as_integers() == {"nonzero": 8, "precision": 8, "saturation": 0, "vanished": 0}

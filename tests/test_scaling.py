"""Power-of-two scales and the amax history that they come from."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from altgrad_core import FORMAT_REGISTRY
from altgrad_jax import amax, delayed_scale, empty_history, power_of_two_scale, push_amax, quantize

MAXIMA = sorted({known.max_representable_value for known in FORMAT_REGISTRY.values()})
SCALE = jax.jit(power_of_two_scale)
AMAX = st.floats(0, allow_nan=False, allow_infinity=False, width=32)


def scale_by_hand(amax: float, maximum: float) -> float:
    """The smallest power of two s with amax <= s * maximum, by rational arithmetic."""
    if amax < 2.0**-126 or not math.isfinite(amax) or maximum >= 2.0**100:
        return 1.0
    exponent = -150
    while Fraction(amax) > Fraction(maximum) * Fraction(2) ** exponent:
        exponent += 1
    return 2.0 ** max(-100, min(100, exponent))


@given(AMAX, st.sampled_from(MAXIMA))
def test_smallest_power_of_two_that_fits(amax: float, maximum: float) -> None:
    assert float(SCALE(np.float32(amax), np.float32(maximum))) == scale_by_hand(amax, maximum)


@pytest.mark.parametrize("maximum", [m for m in MAXIMA if m < 2.0**100])
@pytest.mark.parametrize("exponent", [-90, -3, 0, 3, 20])
def test_around_the_maximum(maximum: float, exponent: int) -> None:
    top = np.float32(maximum * 2.0**exponent)
    above, below = np.nextafter(top, np.float32(np.inf)), np.nextafter(top, np.float32(0))
    got = [float(SCALE(value, np.float32(maximum))) for value in (below, top, above)]
    assert got == [2.0**exponent, 2.0**exponent, 2.0 ** (exponent + 1)]


@pytest.mark.parametrize("amax", [0.0, 1e-45, 1.1e-38, math.inf, math.nan])
def test_nothing_to_go_by(amax: float) -> None:
    assert float(power_of_two_scale(np.float32(amax), 448.0)) == 1.0


def test_broadcasts_and_jits() -> None:
    amax = jnp.array([[1.0], [1000.0]])
    got = SCALE(amax, jnp.array([0.9921875, 124.0, 57344.0]))
    expected = [[scale_by_hand(a, m) for m in (0.9921875, 124.0, 57344.0)] for a in (1.0, 1000.0)]
    np.testing.assert_array_equal(got, expected)
    assert got.dtype == jnp.float32


def test_scaled_by_its_own_amax_nothing_overflows() -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=1000) * 1e-9, jnp.float32)
    for name in ("E0M7", "E4M3", "E5M2"):
        scale = power_of_two_scale(jnp.max(jnp.abs(x)), FORMAT_REGISTRY[name].max_representable_value)
        assert bool(jnp.all(jnp.isfinite(quantize(x, name, scale=scale))))
        assert float(jnp.max(jnp.abs(quantize(x, name, scale=scale) - x))) < 1e-9


def test_history_keeps_the_last_steps() -> None:
    history = empty_history(3, (2,))
    assert history.shape == (3, 2)
    assert float(delayed_scale(history, 448.0)[0]) == 1.0
    for step in range(1, 6):
        history = push_amax(history, jnp.array([float(step), 10.0 * step]))
    np.testing.assert_array_equal(history, [[3, 30], [4, 40], [5, 50]])
    np.testing.assert_array_equal(delayed_scale(history, 4.5), [2.0, 16.0])


def test_a_large_amax_leaves_after_the_window() -> None:
    history = push_amax(empty_history(2), jnp.float32(1e6))
    scales = []
    for _ in range(3):
        scales.append(float(delayed_scale(history, 1.0)))
        history = push_amax(history, jnp.float32(1.0))
    assert scales == [2.0**20, 2.0**20, 1.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_amax_that_is_not_finite_is_refused_alone(bad: float) -> None:
    history = push_amax(push_amax(empty_history(2, (2,)), jnp.array([1.0, 2.0])), jnp.array([bad, 3.0]))
    np.testing.assert_array_equal(history, [[1, 2], [1, 3]])


def test_history_of_an_array_before_anything_was_seen() -> None:
    history = push_amax(empty_history(2), jnp.float32(math.nan))
    np.testing.assert_array_equal(history, [0, 0])


@pytest.mark.parametrize("window", [0, -1])
def test_window_is_positive(window: int) -> None:
    with pytest.raises(ValueError, match=f"window is {window}; expected at least 1"):
        empty_history(window)


def test_under_scan_strict_and_x64() -> None:
    amaxes = jnp.array([1.0, 5.0, math.inf, 2.0])

    def step(history: jax.Array, amax: jax.Array) -> tuple[jax.Array, jax.Array]:
        return push_amax(history, amax), delayed_scale(history, 1.0)

    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        history, scales = jax.lax.scan(step, empty_history(2), amaxes)
    assert scales.tolist() == [1.0, 1.0, 8.0, 8.0]
    assert history.tolist() == [5.0, 2.0]
    with jax.enable_x64(True):
        assert push_amax(empty_history(2), jnp.float32(1)).dtype == jnp.float32
        assert power_of_two_scale(3.0, 1.0).dtype == jnp.float32


@pytest.mark.parametrize("shape", [(7,), (256, 64), (3, 5, 129), (2**19 + 3,)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("planted", [math.nan, -math.inf, -1000.0])
def test_amax_loses_nothing(shape: tuple[int, ...], dtype: jnp.dtype, planted: float) -> None:
    """A maximum of floats loses the NaN on XLA's CPU backend (jax 0.10.2, 256 x 64)."""
    x = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    x.flat[x.size // 2] = planted
    found = jax.jit(amax)(jnp.asarray(x, dtype))
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, abs(planted))


def test_amax_of_little() -> None:
    assert float(amax(jnp.zeros((0, 3)))) == 0.0
    assert amax(jnp.float32(-(2.0**-130))).view(jnp.int32) == 1 << 19

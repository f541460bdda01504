"""Scales: amax and its history, powers of two and ratios, how a tensor is scaled, and who shares a scale."""

import math
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

from altgrad_core import FORMAT_REGISTRY
from altgrad_core.errors import InputError
from altgrad_jax import (
    Current,
    Delayed,
    PerBlock,
    PerChannel,
    Static,
    amax,
    amaxes,
    delayed_scale,
    empty_history,
    power_of_two_scale,
    push_amax,
    quantize,
    quantize_blocks,
    ratio_scale,
    spread,
)

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


@pytest.mark.parametrize("axes", [0, -1, (0, 2), ()])
def test_amax_along_axes_broadcasts(axes: int | tuple[int, ...]) -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 64, 5)), jnp.float32)
    found = jax.jit(amax, static_argnums=1)(x, axes)
    np.testing.assert_array_equal(found, np.max(np.abs(x), axis=axes, keepdims=True))
    assert jnp.broadcast_shapes(found.shape, x.shape) == x.shape


@pytest.mark.parametrize("length", [0, 1, 31, 32, 64, 97, 2048])
def test_amax_of_any_length(length: int) -> None:
    x = -np.arange(2 * length, dtype=np.float32).reshape(2, length)
    np.testing.assert_array_equal(amax(jnp.asarray(x), axes=1)[:, 0], [max(length - 1, 0), max(2 * length - 1, 0)])


def test_amax_has_one_nan() -> None:
    """Payloads differ between NaN; a scale file or a comparison of bits should not see them."""
    x = lax.bitcast_convert_type(jnp.array([0x7F800001, 0x7FFFFFFF, -1], jnp.int32), jnp.float32)
    assert [int(amax(each).view(jnp.int32)) for each in x] == [0x7FC00000] * 3


def test_amax_of_float64() -> None:
    with jax.enable_x64(True):
        x = jnp.array([1e-40, 1e300])
        assert amax(x, ()).tolist() == [0.0, math.inf]
        assert amax(x).dtype == jnp.float32


def test_amax_of_axes_that_are_not_there() -> None:
    with pytest.raises(InputError, match="axis 2 is out of range for an array of 2 axes; expected -2 to 1"):
        amax(jnp.ones((2, 3)), 2)
    with pytest.raises(InputError, match="name an axis twice"):
        amax(jnp.ones((2, 3)), (0, -2))


@pytest.mark.parametrize("bad", [0.0, 1e-45, 1.1e-38, math.inf, math.nan])
def test_no_ratio_to_go_by(bad: float) -> None:
    assert float(ratio_scale(np.float32(bad), 448.0)) == 1.0


def test_ratios_keep_to_their_range() -> None:
    assert ratio_scale(jnp.array([1e-37, 3e38]), 0.9921875).tolist() == [2.0**-100, 2.0**100]


def test_most_recent_amax() -> None:
    history = jnp.array([[1.0, 8.0], [4.0, 2.0]])
    assert delayed_scale(history, 1.0).tolist() == [4.0, 8.0]
    assert delayed_scale(history, 1.0, reduce="most_recent").tolist() == [4.0, 2.0]
    assert delayed_scale(history, 3.0, reduce="most_recent", power_of_two=False).tolist() == [
        np.float32(4) / np.float32(3),
        np.float32(2) / np.float32(3),
    ]


ALL_SCALINGS = [Static(0.25), Static(0.3, power_of_two=False), Current(), Current(False), Delayed(4, "most_recent")]


@pytest.mark.parametrize("scaling", ALL_SCALINGS, ids=str)
def test_scalings_are_pytrees(scaling: Static | Current | Delayed) -> None:
    leaves, structure = jax.tree.flatten(scaling)
    assert len(leaves) == isinstance(scaling, Static)
    assert jax.tree.unflatten(structure, leaves) == scaling
    assert jax.tree.map(lambda leaf: leaf * 0, scaling) is not None, "leaves may be anything"

    @jax.jit
    def run(scaling: Static | Current | Delayed, amaxes: jax.Array) -> jax.Array:
        def step(state: jax.Array | None, amax: jax.Array) -> tuple[jax.Array | None, jax.Array]:
            return scaling.update(state, amax), scaling.scale(amax, 448.0, state)

        return lax.scan(step, scaling.init(), amaxes)[1]

    amaxes, state = jnp.array([1.0, 500.0, math.nan, 3.0]), scaling.init()
    for amax_seen, got in zip(amaxes, run(scaling, amaxes), strict=True):
        assert float(got) == float(scaling.scale(amax_seen, 448.0, state))
        state = scaling.update(state, amax_seen)


@pytest.mark.parametrize("scale", ["x", None, True, 1j, [1.0, "a"], [[1.0], [1.0, 2.0]], np.ones(2, bool), 10**400])
def test_static_scales_that_are_no_numbers(scale: object) -> None:
    kind = type(scale).__name__
    with pytest.raises(InputError, match=f"the static scale is .*, a {kind}; expected a positive number within 2"):
        Static(scale)
    for good in (np.int64(4), np.float32(0.5), ml_dtypes.bfloat16(2), jnp.ones(2, jnp.bfloat16)):
        assert Static(good).value is good


def test_static_scales_may_be_traced_and_batched() -> None:
    scales = jax.vmap(lambda scale: Static(scale).scale(1.0, 448.0))(jnp.array([1.0, 2.0]))
    assert scales.tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (0.0, "scale is 0.0; expected a positive number within"),
        (-1.0, "scale is -1.0"),
        (math.nan, "scale is nan"),
        (math.inf, "scale is inf"),
        (2.0**101, "within 2\\^-100 to 2\\^100"),
        (0.3, "0.3, which is no power of two; expected one \\(the nearest is 0.25\\)"),
        (np.array([1.0, 0.0]), "scale is 0.0"),
        (jnp.array([1.0, -2.0]), "scale is -2.0"),
    ],
)
def test_bad_static_scales(scale: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Static(scale)


def test_bad_scalings() -> None:
    with pytest.raises(InputError, match="window is 0; expected at least 1 step"):
        Delayed(0)
    with pytest.raises(InputError, match=r"unknown reduction.*'most_recnt'; did you mean 'most_recent'"):
        Delayed(4, "most_recnt")
    with pytest.raises(InputError, match="Expected one of max, most_recent"):
        delayed_scale(empty_history(2), 1.0, reduce="mean")


# Granularities


@pytest.mark.parametrize(
    ("granularity", "shape"),
    [
        ("tensor", (1, 1, 1)),
        ("channel", (1, 1, 5)),
        (PerChannel(0), (3, 1, 1)),
        (PerChannel((0, -1)), (3, 1, 5)),
        ("block32", (3, 40, 1)),
        ("block2", (3, 40, 3)),
        (PerBlock(32, axis=1), (3, 2, 5)),
    ],
)
def test_who_shares_a_scale(granularity: str, shape: tuple[int, ...]) -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 40, 5)), jnp.float32)
    largest = jax.jit(amaxes, static_argnums=1)(x, granularity)
    assert largest.shape == shape
    wide = jnp.broadcast_to(spread(largest, x.shape, granularity), x.shape)
    assert bool(jnp.all(jnp.abs(x) <= wide))
    assert set(np.unique(wide)) == set(np.unique(largest)), "every amax is somebody's"
    assert all(float(value) in np.abs(x) for value in np.unique(largest))


@pytest.mark.parametrize(
    ("granularity", "message"),
    [
        ("tensors", "unknown granularity 'tensors'; did you mean 'tensor'"),
        ("Block32", "did you mean 'block32'"),
        ("block0", "block size is 0"),
        ("block", "did you mean"),
        (32, "unknown granularity 32"),
        (PerChannel(3), "axis 3 is out of range"),
        (PerBlock(4, axis=-4), "axis -4 is out of range"),
    ],
)
def test_unknown_granularities(granularity: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        amaxes(jnp.ones((2, 3, 4)), granularity)


def test_scales_of_another_shape() -> None:
    with pytest.raises(InputError, match=r"shape \(2, 2\); expected \(2, 3\), one for each block of 2"):
        spread(jnp.ones((2, 2)), (2, 5), "block2")
    assert spread(jnp.float32(2), (2, 5), "block2").shape == ()


SHARDED = """
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from altgrad_jax import amax, quantize_blocks

x = np.random.default_rng(0).standard_normal((64, 96)).astype(np.float32)
x[3, 4] = -np.inf
mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))
expected = np.asarray(quantize_blocks(x, "E4M3"))
for spec in (P("a", "b"), P(("b", "a"), None), P(None, ("a", "b"))):
    put = jax.device_put(x, NamedSharding(mesh, spec))
    for axes in (None, 0, 1):
        np.testing.assert_array_equal(jax.jit(amax, static_argnums=1)(put, axes), amax(x, axes))
    np.testing.assert_array_equal(jax.jit(lambda x: quantize_blocks(x, "E4M3"))(put), expected)
print("same")
"""


def test_one_device_or_eight() -> None:
    """Rows and blocks that lie on several devices: what crosses between them must be a reduction that they know."""
    done = subprocess.run(
        [sys.executable, "-c", SHARDED],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout.strip() == "same", done.stderr


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.complex64, jnp.bool_, jnp.float8_e5m2])
def test_the_amax_is_that_of_floats(dtype: jnp.dtype) -> None:
    with pytest.raises(TypeError, match=r"amax takes floating-point arrays; got .*expected float32"):
        amax(jnp.ones(2).astype(dtype))


def test_scales_are_exported_for_any_size() -> None:
    (batch,) = jax.export.symbolic_shape("batch")
    x = jax.ShapeDtypeStruct((batch, 64), jnp.float32)
    given = jnp.linspace(-3, 5, 3 * 64).reshape(3, 64)
    for function in (amax, lambda x: amaxes(x, "channel"), lambda x: quantize_blocks(x, "E4M3")):
        exported = jax.export.export(jax.jit(function))(x)
        np.testing.assert_array_equal(exported.call(given), function(given))

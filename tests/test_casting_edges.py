"""Edges of the JAX casts: scales that broadcast, float64 beyond float32, formats without a sign, what is refused."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from altgrad_core.errors import InputError
from altgrad_core.formats import OVERFLOWS, Format, Overflow, Rounding, parse
from altgrad_core.reference import round_to_format
from altgrad_jax import FormatParams, cast_counts, decode, encode, quantize, quantize_blocks, quantize_with_counts

BEYOND = np.array([3e38, 3.4e38, 2.0**128, 1e39, -1e39, 1e300, np.inf, -np.inf, 0.1, 1e-320, 2.0**-127, -0.0])
X = jnp.array([[1e6, 1.0, 1e-9], [448.0, 449.0, 0.01]])


def expected_of(values: np.ndarray, format: Format, **modes: Any) -> np.ndarray:
    """By rational arithmetic; a result below 2^-126 is zero, but for float32 and the scales of blocks."""
    exact = np.array([round_to_format(float(value), format, **modes) for value in values])
    keeps = format.is_float32 or not format.is_signed
    return exact if keeps else np.where(np.abs(exact) < 2.0**-126, np.copysign(0.0, exact), exact)


@pytest.mark.parametrize("overflow", OVERFLOWS)
@pytest.mark.parametrize(
    ("name", "rounding"),
    [("bf16", "toward_zero"), ("bf16", "nearest_even"), ("float8_e8m0fnu", "toward_zero"), ("float32", "nearest_even")],
)
def test_float64_is_rounded_from_its_own_value_beyond_float32(name: str, rounding: Any, overflow: Any) -> None:
    with jax.enable_x64(True):
        actual = np.asarray(quantize(jnp.asarray(BEYOND), name, rounding=rounding, overflow=overflow))
    expected = expected_of(BEYOND, parse(name), rounding=rounding, overflow=overflow)
    np.testing.assert_array_equal(actual, expected)
    np.testing.assert_array_equal(np.signbit(actual[:-1]), np.signbit(expected[:-1]))


@pytest.mark.parametrize("overflow", OVERFLOWS)
def test_codes_of_float64_beyond_float32(overflow: Any) -> None:
    with jax.enable_x64(True):
        codes = encode(jnp.asarray(BEYOND[:9]), "bf16", rounding="toward_zero", overflow=overflow)
    assert codes.tolist() == [parse("bf16").to_bits(float(each), "toward_zero", overflow) for each in BEYOND[:9]]


def test_float64_is_scaled_in_float64() -> None:
    with jax.enable_x64(True):
        scaled = quantize(jnp.array([1e39, 3e40]), "E5M2", scale=2.0**120)
    np.testing.assert_array_equal(
        scaled, [2.0**120 * round_to_format(x / 2.0**120, parse("E5M2")) for x in (1e39, 3e40)]
    )


@pytest.mark.parametrize("scale", [None, 1.0, 0.25, 4.0])
def test_a_format_without_a_sign_is_scaled_exactly(scale: float | None) -> None:
    x = np.array([0.75 * 2.0**-126, 5e-39, 1.1, 0.3, 3e37], np.float32)
    actual = np.asarray(quantize(jnp.asarray(x), "float8_e8m0fnu", scale=scale)).view(np.uint32)
    unit = scale or 1.0
    expected = [unit * round_to_format(float(each) / unit, parse("float8_e8m0fnu")) for each in x]
    assert actual.tolist() == np.array(expected).astype(np.float32).view(np.uint32).tolist()


def test_the_saturation_mask_lets_pass_what_is_nan_for_its_sign() -> None:
    def cast(x: jax.Array) -> jax.Array:
        return quantize(x, "float8_e8m0fnu", saturation_mask=True)

    assert jax.vmap(jax.grad(cast))(jnp.array([0.0, -1.0, 1.0, 3e38])).tolist() == [1, 1, 1, 0]
    masked = jax.grad(lambda x: quantize_with_counts(x, "E4M3", saturation_mask=True)[0].sum())(jnp.array([1.0, 1e6]))
    assert masked.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("rounding", "quanta"),
    [
        ("nearest_even", [0, 1, 2, 2, 3, 4, 6]),
        ("nearest_away", [1, 1, 2, 3, 3, 4, 6]),
        ("toward_zero", [0, 0, 1, 2, 3, 3, 5]),
    ],
)
def test_a_grid_whose_binades_begin_beyond_float32(rounding: Rounding, quanta: list[int]) -> None:
    """Scaled by 2^69 the smallest normal value of this format is 2^130, and its quantum 2^125."""
    params = FormatParams.from_format("E2M5b-60", rounding=rounding, path="integer").scaled(jnp.float32(2.0**69))
    x = jnp.array([0.5, 0.75, 1.5, 2.5, 3.0, 3.5, 5.5]) * 2.0**125
    assert (quantize(x, params) / 2.0**125).tolist() == quanta


@pytest.mark.parametrize("shape", [(2, 1), (3,), (2, 3), (1, 1), ()])
def test_counts_under_scales_that_broadcast(shape: tuple[int, ...]) -> None:
    scale = jnp.asarray(2.0 ** np.arange(np.prod(shape, dtype=int)).reshape(shape), jnp.float32)
    quotient = X / scale
    expected = cast_counts(quotient, "E4M3").as_integers()
    assert jax.jit(lambda x, s: cast_counts(x, "E4M3", scale=s))(X, scale).as_integers() == expected


def test_no_minus_zero_comes_out_of_codes_below_float32() -> None:
    """Code 188 of this format is a value that float32 holds as a subnormal only."""
    value = decode(jnp.array([188], jnp.uint8), "E1M6b127fnuz")
    assert value.tolist() == [0.0]
    assert not np.signbit(value).any()


def test_what_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"the scale has shape \(2, 3\); expected one that broadcasts to that of x, \(3,\)"
    ):
        quantize(jnp.ones(3), "E4M3", scale=jnp.ones((2, 3)))
    with pytest.raises(InputError, match="the scale has shape"):
        cast_counts(jnp.ones((2, 1)), "E4M3", scale=jnp.ones((2, 3)))
    with pytest.raises(TypeError, match=r"got float8_e5m2, expected float32, bfloat16, float16 or float64"):
        quantize(jnp.ones(3, jnp.float8_e5m2), "E4M3")
    with pytest.raises(ValueError, match="needs random_bits"):
        quantize_blocks(jnp.ones(3), "E4M3", rounding="stochastic")
    assert quantize(jnp.ones(2), "E4M3", rounding="stochastic", random_bits=[1, 2]).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("overflow", OVERFLOWS)
@pytest.mark.parametrize(("format", "exponent"), [("E4M3b40", -100), ("E2M1", 105), ("E2M1", 106), ("E4M3", 120)])
def test_a_grid_that_is_scaled_beyond_its_path_is_bounded_by_its_own_values(
    format: str, exponent: int, overflow: Overflow
) -> None:
    """Its finest quanta or its largest values are cut off; what is left has a maximum that is one of its values."""
    params = FormatParams.from_format(format, overflow=overflow).scaled(jnp.float32(2.0**exponent))
    maximum = float(params.max_value)
    x = np.float32(maximum) * np.linspace(0, 3, 97, dtype=np.float32)
    once = quantize(jnp.asarray(x), params)
    np.testing.assert_array_equal(quantize(once, params), once)
    finite = np.asarray(once)[np.isfinite(once)]
    assert np.isfinite(once).all() or (format == "E4M3" and overflow == "native")
    assert (finite <= maximum).all()
    assert finite.max() == maximum


def test_under_a_scale_that_leaves_nothing_above_what_is_flushed_small_values_are_zero() -> None:
    params = FormatParams.from_format(Format("ieee", 2, 5, 110, has_inf=True, has_nan=True)).scaled(
        jnp.float32(2.0**-19)
    )
    assert np.asarray(quantize(jnp.array([-4.87e-39, 4.87e-39]), params)).view(np.uint32).tolist() == [0x80000000, 0]

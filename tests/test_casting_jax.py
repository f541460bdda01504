"""What is JAX's own about the casts: dtypes, transformations, traced formats, scaled formats, and bad input."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from altgrad_core import UnknownFormatError, parse
from altgrad_core.formats import EIGHT
from altgrad_core.reference import quantize_reference, round_to_format
from altgrad_jax import FormatParams, decode, encode, quantize, quantize_blocks, quantize_with_counts

CODABLE = (*EIGHT, "bf16", "fp16", "E5M6", "E8M2b140", "E8M0b128", "E8M0b129", "E7M0b126", "E7M0b127", "E6M1b126")
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
FLAT = jax.jit(quantize)


def bits(x: Any) -> np.ndarray:
    x = np.asarray(x)
    return x.view(f"u{x.dtype.itemsize}")


def wide(count: int = 400, decades: float = 30) -> np.ndarray:
    """Float32 values over many binades, both signs, with what is special among them."""
    draw = np.random.default_rng(7)
    values = (draw.normal(size=count) * 10.0 ** draw.uniform(-decades, decades, count)).astype(np.float32)
    return np.concatenate([values, np.array([0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-39], np.float32)])


def near_the_grid(name: str) -> np.ndarray:
    """All values, midpoints and their float32 neighbours."""
    book = parse(name).code_book()
    grid = np.unique(np.abs(book[np.isfinite(book)]))
    exact = np.concatenate([grid, (grid[1:] + grid[:-1]) / 2, [1.25 * grid[-1], 1.5 * grid[-1]]])
    close = np.minimum(exact, 3e38).astype(np.float32)
    return np.concatenate([close, np.nextafter(close, np.float32(0)), np.nextafter(close, np.float32(3.1e38))])


def on_grid(x: np.ndarray, name: str, **modes: Any) -> np.ndarray:
    """The exact reference, with results below 2^-126 as zero."""
    exact = quantize_reference(x, parse(name), **modes)
    return np.where(np.abs(exact) < 2.0**-126, np.copysign(0.0, exact), exact)


# ---- values


@pytest.mark.parametrize("name", CODABLE)
def test_values_and_neighbours(name: str) -> None:
    x = np.concatenate([wide(), near_the_grid(name), -near_the_grid(name)])
    got = FLAT(jnp.asarray(x), FormatParams.from_format(name))
    np.testing.assert_array_equal(bits(got), bits(on_grid(x, name).astype(np.float32)))


@pytest.mark.parametrize("name", [*EIGHT, "bf16"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_keeps_its_dtype(name: str, dtype: Any) -> None:
    x = jnp.asarray(wide(decades=6)).astype(dtype)
    got = FLAT(x, FormatParams.from_format(name))
    assert got.dtype == dtype
    with np.errstate(over="ignore", invalid="ignore"):
        expected = on_grid(np.asarray(x, np.float64), name).astype(np.float32).astype(dtype)
    np.testing.assert_array_equal(bits(got), bits(expected))


@pytest.mark.parametrize("name", [*EIGHT, "bf16"])
def test_float64_is_rounded_once(name: str) -> None:
    draw = np.random.default_rng(3)
    grid = near_the_grid(name).astype(np.float64)
    with jax.enable_x64(True):
        # A hair beside each midpoint, much closer than float32 can say.
        x = np.concatenate([grid * (1 + sign * 1e-12) for sign in (-1, 0, 1)] + [draw.normal(size=50) * 1e-3])
        got = quantize(jnp.asarray(x), name)
        assert got.dtype == jnp.float64
        np.testing.assert_array_equal(got, on_grid(x, name))


def test_float64_beyond_float32() -> None:
    with jax.enable_x64(True):
        x = np.array([1e300, -1e300, 1e-300, 5e-324, 1.5e38, np.inf, np.nan])
        np.testing.assert_array_equal(quantize(jnp.asarray(x), "E7M0", overflow="saturate_finite")[:5], SATURATED)
        assert np.isinf(quantize(jnp.asarray(x), "E5M2")[:2]).all()
        assert np.isnan(quantize(jnp.asarray(x), "E0M7")[-1])


SATURATED = [2.0**64, -(2.0**64), 0, 0, 2.0**64]


@pytest.mark.parametrize("name", ["E5M2", "bf16", "float32"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_strict_promotion(name: str, dtype: Any) -> None:
    def every_way(x: jax.Array) -> list[jax.Array]:
        params = FormatParams.from_format(name)
        return [quantize(x, name), quantize(x, params, scale=2.0), quantize(x, params.scaled(jnp.float32(2)))]

    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        assert {got.dtype for got in jax.eval_shape(every_way, jnp.ones((2, 3), dtype))} == {jnp.dtype(dtype)}


def test_strict_promotion_of_random_bits_and_codes() -> None:
    def stochastic(x: jax.Array, random_bits: jax.Array) -> jax.Array:
        return quantize(x, "E5M2", rounding="stochastic", random_bits=random_bits)

    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        x = jnp.ones((2, 3), jnp.bfloat16)
        assert jax.eval_shape(stochastic, x, jnp.zeros((2, 3), jnp.uint32)).dtype == jnp.bfloat16
        assert jax.eval_shape(lambda x: decode(encode(x, "E5M2"), "E5M2"), x).dtype == jnp.float32


# ---- shapes


@pytest.mark.parametrize("name", ["E5M2", "E7M0", "bf16"])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1, 1, 1), (2, 3, 5)])
def test_any_shape(name: str, shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    got = FLAT(x, FormatParams.from_format(name))
    assert got.shape == shape
    np.testing.assert_array_equal(got, on_grid(x, name))
    assert encode(jnp.asarray(x), name).shape == shape


def test_views_with_strides() -> None:
    base = np.random.default_rng(0).normal(size=(500, 300)).astype(np.float32)
    for view in (base[::97, ::-101], base.T[5:9], np.broadcast_to(base[:1, :1], (4, 5))):
        np.testing.assert_array_equal(FLAT(view, FormatParams.from_format("E4M3")), on_grid(view, "E4M3"))


def test_identity_returns_its_input() -> None:
    x = jnp.asarray(wide())
    assert quantize(x, "float32") is x
    assert FormatParams.from_format("float32").scaled(jnp.float32(4)).path == "identity"


# ---- transformations


@pytest.mark.parametrize("name", ["E4M3", "bf16"])
def test_jit_vmap_and_scan_change_nothing(name: str) -> None:
    x = wide().reshape(11, 37)
    expected = bits(on_grid(x, name).astype(np.float32))
    for function in (
        lambda x: quantize(x, name),
        jax.jit(lambda x: quantize(x, name)),
        jax.vmap(lambda row: quantize(row, name)),
        lambda x: jax.lax.scan(lambda carry, row: (carry, quantize(row, name)), 0, x)[1],
        lambda x: jax.lax.map(lambda row: quantize(row, name), x),
    ):
        np.testing.assert_array_equal(bits(function(jnp.asarray(x))), expected)


def test_vmap_over_formats() -> None:
    x = jnp.asarray(wide())
    params = FormatParams.stack([FormatParams.from_format(name) for name in EIGHT])
    together = jax.jit(jax.vmap(quantize, in_axes=(None, 0)))(x, params)
    for got, name in zip(together, EIGHT, strict=True):
        np.testing.assert_array_equal(bits(got), bits(on_grid(np.asarray(x), name).astype(np.float32)))


@pytest.mark.parametrize("path", [None, "integer"])
def test_formats_are_data(path: Any) -> None:
    x = jnp.asarray(wide())
    chex.clear_trace_counter()
    one = jax.jit(chex.assert_max_traces(lambda x, params: quantize(x, params), n=1))
    for name in EIGHT:
        for overflow in ("native", "saturate", "saturate_finite"):
            got = one(x, FormatParams.from_format(name, overflow=overflow, path=path))
            expected = on_grid(np.asarray(x), name, overflow=overflow).astype(np.float32)
            np.testing.assert_array_equal(bits(got), bits(expected))


def test_roundings_are_data() -> None:
    x, random_bits = wide(100, 3), np.random.default_rng(0).integers(0, 2**32, 107, np.uint32)
    x = np.where(np.isnan(x), 0, x)
    chex.clear_trace_counter()
    one = jax.jit(chex.assert_max_traces(lambda params: quantize(x, params, random_bits=random_bits), n=1))
    for rounding in ("nearest_even", "nearest_away", "toward_zero", "stochastic"):
        got = one(FormatParams.from_format("E3M4", rounding=rounding, path="integer"))
        drawn = random_bits.tolist() if rounding == "stochastic" else [None] * x.size
        expected = [
            round_to_format(float(value), parse("E3M4"), rounding=rounding, random_bits=each)
            for value, each in zip(x, drawn, strict=True)
        ]
        np.testing.assert_array_equal(bits(got), bits(np.float32(expected)))


# ---- gradients


STRAIGHT: list[tuple[str, Callable[[jax.Array], jax.Array]]] = [
    ("plain", lambda x: quantize(x, "E4M3")),
    ("scaled", lambda x: quantize(x, "E4M3", scale=0.3)),
    ("traced", lambda x: quantize(x, FormatParams.from_format("E0M7").scaled(jnp.float32(8)))),
    ("integer", lambda x: quantize(x, "bf16")),
    ("identity", lambda x: quantize(x, "float32")),
    (
        "stochastic",
        lambda x: quantize(x, "E4M3", rounding="stochastic", random_bits=jnp.zeros(x.shape, jnp.uint32)),
    ),
]


@pytest.mark.parametrize("function", [f for _, f in STRAIGHT], ids=[name for name, _ in STRAIGHT])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_gradient_passes_straight_through(function: Callable[[jax.Array], jax.Array], wrap: Any) -> None:
    x = jnp.asarray(wide())
    incoming = jnp.asarray(np.where(np.isnan(wide()), 3.0, wide()))

    def backward(x: jax.Array, incoming: jax.Array) -> jax.Array:
        return jax.vjp(function, x)[1](incoming)[0]

    got = wrap(backward)(x, incoming)
    np.testing.assert_array_equal(bits(got), bits(incoming))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_has_the_dtype_of_the_input(dtype: Any) -> None:
    gradient = jax.grad(lambda x: jnp.sum(quantize(x, "E3M4", scale=2.0).astype(jnp.float32) * 3))(jnp.ones(4, dtype))
    assert gradient.dtype == dtype
    np.testing.assert_array_equal(gradient, 3)


def test_forward_mode_and_second_order() -> None:
    def cubed(x: jax.Array) -> jax.Array:
        return quantize(x, "E4M3") ** 3

    value, tangent = jax.jvp(cubed, (jnp.float32(1.01),), (jnp.float32(1.0),))
    assert (float(value), float(tangent)) == (1.0, 3.0)
    assert float(jax.grad(jax.grad(cubed))(1.01)) == 6.0


def test_gradient_under_vmap_and_scan() -> None:
    def loss(x: jax.Array) -> jax.Array:
        total, _ = jax.lax.scan(lambda total, row: (total + jnp.sum(quantize(row, "E7M0")), None), 0.0, x)
        return total

    x = jnp.asarray(np.abs(wide(53, 3)).reshape(4, 15))
    np.testing.assert_array_equal(jax.vmap(jax.grad(loss))(jnp.stack([x, -x])), 1)


# ---- scales


@pytest.mark.parametrize("name", [*EIGHT, "fp16"])
@pytest.mark.parametrize("overflow", ["native", "saturate", "saturate_finite"])
def test_scaled_params_are_scaled_values(name: str, overflow: Any) -> None:
    """As documented: while quanta are at least 2^-125 and the maximum is below 2^101."""
    known = parse(name)
    lowest, highest = known.min_exponent - known.mantissa_bits, known.max_exponent
    x = np.concatenate([wide(), near_the_grid(name)])
    for exponent in (-125 - lowest, -60, -7, 0, 1, 20, 100 - highest):
        if not -125 <= lowest + exponent <= highest + exponent <= 100 or abs(exponent) > 100:
            continue
        scale = jnp.float32(2.0**exponent)
        values = jnp.asarray((x.astype(np.float64) * 2.0**exponent).clip(-3e38, 3e38).astype(np.float32))
        params = FormatParams.from_format(name, overflow=overflow)
        np.testing.assert_array_equal(
            bits(SHIFTED(values, params, scale)), bits(SCALED(values, params, scale)), err_msg=f"2^{exponent}"
        )
        exact = on_grid(np.asarray(values, np.float64) / 2.0**exponent, name, overflow=overflow) * 2.0**exponent
        flushed = np.where(np.abs(exact) < 2.0**-126, np.copysign(0.0, exact), exact).astype(np.float32)
        np.testing.assert_array_equal(bits(SCALED(values, params, scale)), bits(flushed), err_msg=f"2^{exponent}")


SHIFTED = jax.jit(lambda x, params, scale: quantize(x, params.scaled(scale)))
SCALED = jax.jit(lambda x, params, scale: quantize(x, params, scale=scale))


def test_scaled_params_broadcast() -> None:
    x = wide(13, 3).reshape(4, 5)
    scales = jnp.array([[0.5], [1.0], [2.0], [64.0]])
    got = quantize(jnp.asarray(x), FormatParams.from_format("E4M3").scaled(scales))
    np.testing.assert_array_equal(bits(got), bits(quantize(jnp.asarray(x), "E4M3", scale=scales)))


@given(st.floats(2.0**-60, 2.0**60, width=32) | st.integers(3, 999).map(float), st.sampled_from(EIGHT))
def test_any_scale(scale: float, name: str) -> None:
    """Not a power of two: one division, one cast, one product, each rounded once; midpoints show a wrong last bit."""
    divisor = np.float32(scale)
    x = np.resize(np.concatenate([wide(200, 3), near_the_grid(name) * divisor]), 1200)
    with np.errstate(over="ignore"):
        expected = on_grid(x / divisor, name).astype(np.float32) * divisor
    expected = np.where(np.abs(expected) < 2.0**-126, 0, expected)
    np.testing.assert_array_equal(SCALED(jnp.asarray(x), FormatParams.from_format(name), divisor), expected)
    np.testing.assert_array_equal(quantize(x, name, scale=scale), expected)


# ---- bad input


@pytest.mark.parametrize("bad", [[1, 2], np.arange(3), np.ones(2, bool), np.ones(2, np.complex64)])
def test_only_floats(bad: Any) -> None:
    for function in (quantize, encode):
        with pytest.raises(TypeError, match="floating-point arrays; got"):
            function(jnp.asarray(bad), "E5M2")


@pytest.mark.parametrize(
    ("name", "near"), [("e5m2", "E5M2"), ("E5M3x", "E5M2"), ("E3N4", "E3M4"), ("E7 M0", "E7M0"), ("bfloat", "bf16")]
)
def test_unknown_format_names_the_nearest(name: str, near: str) -> None:
    for function in (quantize, encode, lambda x, name: FormatParams.from_format(name)):
        with pytest.raises(UnknownFormatError, match=f"unknown format '{name}'; did you mean.*{near}"):
            function(jnp.ones(2), name)


@pytest.mark.parametrize("name", ["nonsense", "", "E9M2", "E0M0", "E8M12", None, 8])
def test_other_names(name: Any) -> None:
    with pytest.raises(UnknownFormatError):
        quantize(jnp.ones(2), name)


def test_unknown_modes() -> None:
    with pytest.raises(ValueError, match=r"unknown rounding 'nearest'; did you mean 'nearest_even'\?"):
        quantize(jnp.ones(2), "E5M2", rounding="nearest")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown overflow policy 'clamp'; Expected one of native"):
        quantize(jnp.ones(2), "E5M2", overflow="clamp")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"unknown overflow policy 'sat'; did you mean 'saturate'\?"):
        quantize(jnp.ones(2), "E5M2", overflow="sat")  # type: ignore[arg-type]


def test_no_params_cannot_be_stacked() -> None:
    with pytest.raises(ValueError, match="there are no params; expected those of at least one format"):
        FormatParams.stack([])


@pytest.mark.parametrize("extra", [{"rounding": "toward_zero"}, {"overflow": "saturate"}])
def test_params_carry_their_modes(extra: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="would have no effect: FormatParams carry their own"):
        quantize(jnp.ones(2), FormatParams.from_format("E5M2"), **extra)


def test_paths_that_cannot_serve() -> None:
    with pytest.raises(ValueError, match="path 'fast' cannot cast to bf16"):
        FormatParams.from_format("bf16", path="fast")
    with pytest.raises(ValueError, match="path 'fast' cannot cast to E5M2 with rounding 'stochastic'"):
        FormatParams.from_format("E5M2", rounding="stochastic", path="fast")
    with pytest.raises(ValueError, match="cannot stack params of the paths"):
        FormatParams.stack([FormatParams.from_format("E5M2"), FormatParams.from_format("bf16")])
    with pytest.raises(ValueError, match="cannot stack"):
        FormatParams.stack([])


def test_random_bits_that_are_missing() -> None:
    x = jnp.ones(3)
    with pytest.raises(ValueError, match="needs random_bits"):
        quantize(x, "E5M2", rounding="stochastic")
    with pytest.raises(ValueError, match="needs random_bits"):
        quantize(x, FormatParams.from_format("E5M2", rounding="stochastic"))
    # What cannot be seen while tracing is not silently rounded in another way.
    hidden = jax.jit(quantize)(x, FormatParams.from_format("E5M2", rounding="stochastic"))
    assert np.isnan(hidden).all()


@pytest.mark.parametrize("format", ["E5M2", "float32", FormatParams.from_format("E5M2")])
def test_random_bits_without_effect(format: Any) -> None:
    with pytest.raises(ValueError, match="random_bits would have no effect"):
        quantize(jnp.ones(3), format, random_bits=jnp.zeros(3, jnp.uint32))


@pytest.mark.parametrize("rounding", ["nearest_even", "nearest_away", "toward_zero"])
@pytest.mark.parametrize("cast", [quantize, quantize_with_counts, quantize_blocks])
def test_random_bits_beside_another_rounding(cast: Any, rounding: Any) -> None:
    with pytest.raises(ValueError, match="random_bits would have no effect"):
        cast(jnp.ones(3), "E5M2", rounding=rounding, random_bits=jnp.zeros(3, jnp.uint32))


@pytest.mark.parametrize("cast", [quantize, quantize_with_counts, quantize_blocks])
def test_random_bits_that_are_none(cast: Any) -> None:
    for bits, error, told in ((jnp.zeros(3), TypeError, "are integers"), ([1, 2], ValueError, r"expected that of x")):
        with pytest.raises(error, match=told):
            cast(jnp.ones(3), "E5M2", rounding="stochastic", random_bits=bits)


def test_params_of_several_formats_are_mapped_over() -> None:
    params = FormatParams.stack([FormatParams.from_format(name) for name in ("E5M2", "E4M3", "E3M4")])
    for x in (jnp.float32(1.0), jnp.ones(4), jnp.ones((3, 2))):
        with pytest.raises(
            ValueError, match=r"params of shape \(3,\) for x of shape .*; expected .* jax.vmap over them"
        ):
            quantize(x, params)


@pytest.mark.parametrize(
    ("random_bits", "error", "told"),
    [
        (jnp.zeros(3), TypeError, "random_bits are integers; got float32"),
        (jnp.zeros(3, bool), TypeError, "random_bits are integers; got bool"),
        (jnp.zeros(2, jnp.uint32), ValueError, r"shape \(2,\); expected that of x, \(3,\)"),
        (jnp.zeros((), jnp.uint32), ValueError, r"shape \(\); expected that of x, \(3,\)"),
    ],
)
def test_random_bits_of_another_kind(random_bits: jax.Array, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        quantize(jnp.ones(3), "E5M2", rounding="stochastic", random_bits=random_bits)


def test_codes_need_a_narrow_format_with_its_specials() -> None:
    with pytest.raises(TypeError, match="CodeParams"):
        encode(jnp.ones(2), FormatParams.from_format("E5M2"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at most 16"):
        encode(jnp.ones(2), "float32")
    for bad in (jnp.ones(2), jnp.zeros(2, jnp.int8)):
        with pytest.raises(TypeError, match="codes are unsigned integers"):
            decode(bad, "E5M2")


# ---- codes


@pytest.mark.parametrize("name", [*EIGHT, "bf16", "fp16"])
def test_codes_there_and_back(name: str) -> None:
    known = parse(name)
    codes = np.arange(2 * known.sign_mask, dtype=np.uint8 if known.bits <= 8 else np.uint16)
    values = decode(jnp.asarray(codes), name)
    book = known.code_book()
    np.testing.assert_array_equal(values, np.where(np.abs(book) < 2.0**-126, 0, book))
    exact = ~np.isnan(book) & ((np.abs(book) >= 2.0**-126) | (book == 0))
    got = np.asarray(encode(values, name))
    assert got.dtype == codes.dtype
    np.testing.assert_array_equal(got[exact], codes[exact])
    np.testing.assert_array_equal(got[np.isnan(book)], known.to_bits(np.nan))

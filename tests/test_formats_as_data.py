"""Formats as data in JAX: one compiled program for all of them, mapped over, scanned over, codes and masks included."""

from __future__ import annotations

import math
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import pytest

from altgrad_core.errors import InputError
from altgrad_core.formats import FORMAT_REGISTRY, Format, parse
from altgrad_core.hashing import hash_bits_reference
from altgrad_core.reference import quantize_reference, round_to_format
from altgrad_jax import (
    CodeParams,
    FormatParams,
    cast_counts,
    decode,
    encode,
    hash_bits,
    partition_relative_clip,
    quantize,
    quantize_with_counts,
    set_format,
)
from altgrad_jax.params import paths_of

MIN_NORMAL = 2.0**-126
SIGNED = [known for known in FORMAT_REGISTRY.values() if known.is_signed and known.bits <= 16]
FAST = [known for known in SIGNED if known.cast_path == "fast"]
CODED = [known for known in FORMAT_REGISTRY.values() if known.bits <= 16]
WIDE_ONLY = [parse(name) for name in ("bf16", "E8M2b140", "E8M0b128", "E8M0b129", "E3M4b-100", "E5M2b-90", "E8M2ieee")]
every_code = pytest.mark.parametrize("format", CODED, ids=str)


def inputs() -> npt.NDArray[np.float32]:
    """All bfloat16, every exponent with few and with random fractions, ties and their neighbours among them."""
    rng = np.random.default_rng(0)
    every = np.arange(2**16, dtype=np.uint32) << 16
    bits = np.concatenate([every, every + 1, every - 1, rng.integers(0, 2**32, 2**14, dtype=np.uint32)])
    return bits.view(np.float32)


def expected(x: npt.NDArray[np.float32], format: Format) -> npt.NDArray[np.float32]:
    return flushed(quantize_reference(x, format), format)


def flushed(exact: npt.NDArray[np.float64], format: Format) -> npt.NDArray[np.float32]:
    """As the packages give it: nothing below 2^-126 but where there is no zero to put in its place."""
    if format.is_signed:
        zero = np.copysign(0.0, exact) if format.has_negative_zero else 0.0
        exact = np.where(np.abs(exact) < MIN_NORMAL, zero, exact)
    return exact.astype(np.float32)


def same(actual: jax.Array, wanted: npt.NDArray[np.float32]) -> None:
    """Same bits, NaN as NaN."""
    got = np.asarray(actual)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(np.isnan(got), np.isnan(wanted))
    number = ~np.isnan(wanted)
    np.testing.assert_array_equal(got.view(np.uint32)[number], wanted.view(np.uint32)[number])


def test_one_program_casts_to_every_signed_format() -> None:
    cast = jax.jit(chex.assert_max_traces(quantize, 1))
    x = inputs()
    for known in [*SIGNED, *WIDE_ONLY]:
        same(cast(jnp.asarray(x), FormatParams.from_format(known, path="wide")), expected(x, known))


def test_one_program_on_the_fast_path() -> None:
    cast = jax.jit(chex.assert_max_traces(quantize, 1))
    x = inputs()
    for known in FAST:
        same(cast(jnp.asarray(x), FormatParams.from_format(known)), expected(x, known))


@pytest.mark.parametrize("path", ["wide", "integer"])
def test_vmap_and_scan_over_formats(path: str) -> None:
    chosen = [parse(name) for name in ("E0M7", "E7M0", "E4M3", "bf16", "float8_e4m3fnuz", "binary8p3se", "E8M0b129")]
    stacked = FormatParams.stack([FormatParams.from_format(each, path=path) for each in chosen])
    x = jnp.asarray(inputs())
    mapped = jax.jit(jax.vmap(quantize, in_axes=(None, 0)))(x, stacked)
    _, scanned = jax.lax.scan(lambda carry, params: (carry, quantize(x, params)), None, stacked)
    for index, known in enumerate(chosen):
        same(mapped[index], expected(inputs(), known))
        same(scanned[index], expected(inputs(), known))


@every_code
def test_codes_as_data_and_as_constants(format: Format) -> None:
    codes = np.arange(1 << format.bits, dtype=np.uint8 if format.bits <= 8 else np.uint16)
    values = flushed(format.code_book(), format)
    params = CodeParams.from_format(format)
    for decoded in (decode(codes, format), jax.jit(decode)(codes, params)):
        same(decoded, values)
    back = np.array([format.to_bits(float(value), overflow="saturate_finite") for value in values])
    keep_inf = CodeParams.from_format(format, overflow="saturate_finite")
    for encoded in (encode(values, format, overflow="saturate_finite"), jax.jit(encode)(values, keep_inf)):
        assert encoded.dtype == codes.dtype
        np.testing.assert_array_equal(encoded, back)


@every_code
def test_codes_are_those_of_the_rounded_value(format: Format) -> None:
    x = inputs()[:: 7 if format.bits > 8 else 1]
    rounded = np.asarray(quantize(jnp.asarray(x), format))
    codes = {value: format.to_bits(value, overflow="saturate") for value in set(rounded[~np.isnan(rounded)].tolist())}
    codes |= {sign * np.inf: format.to_bits(sign * np.inf, overflow="saturate_finite") for sign in (1, -1)}
    if format.has_negative_zero:
        codes.pop(0.0, None)
        signed_zero = np.where(np.signbit(rounded), format.sign_mask, 0)
    else:
        signed_zero = np.zeros(rounded.shape, int)
    wanted = [
        (format.nan_code or 0) if math.isnan(value) else zero if value == 0 else codes[value]
        for value, zero in zip(rounded.tolist(), signed_zero.tolist(), strict=True)
    ]
    np.testing.assert_array_equal(jax.jit(encode)(jnp.asarray(x), CodeParams.from_format(format)), wanted)


def test_one_program_encodes_to_all_fast_8_bit_formats() -> None:
    of = jax.jit(chex.assert_max_traces(encode, 1))
    for known in FAST:
        if known.bits <= 8:
            of(jnp.ones(3), CodeParams.from_format(known))


def test_codes_mapped_over_formats() -> None:
    formats = [known for known in FAST if known.bits <= 8]
    stacked = CodeParams.stack([CodeParams.from_format(known) for known in formats])
    x, codes = jnp.asarray(inputs()[::9]), jnp.arange(256, dtype=jnp.uint8)
    encoded, decoded = jax.jit(jax.vmap(lambda code: (encode(x, code), decode(codes, code))))(stacked)
    for known, alone, values in zip(formats, encoded, decoded, strict=True):
        np.testing.assert_array_equal(alone, encode(x, known))
        same(values, np.asarray(decode(codes, known)))
    with pytest.raises(ValueError, match=r"dtypes \['uint16', 'uint8'\]; expected one dtype"):
        CodeParams.stack([CodeParams.from_format("E4M3"), CodeParams.from_format("fp16")])


@pytest.mark.parametrize("rounding", ["nearest_even", "nearest_away", "toward_zero"])
def test_unsigned_rounds_as_defined(rounding: str) -> None:
    known = parse("float8_e8m0fnu")
    x = inputs()[::5]
    wanted = [round_to_format(float(value), known, rounding=rounding) for value in x]
    same(quantize(jnp.asarray(x), known, rounding=rounding), np.array(wanted, np.float32))


@pytest.mark.parametrize("count", [1, 2, 7, 13, 24])
@pytest.mark.parametrize("name", ["E4M3", "E7M0", "bf16", "binary8p3se", "float8_e8m0fnu"])
def test_stochastic_rounding_with_few_bits(name: str, count: int) -> None:
    known = parse(name)
    x = inputs()[::97]
    drawn = np.random.default_rng(count).integers(0, 2**32, x.size, dtype=np.uint32)
    exact = [
        round_to_format(float(value), known, rounding="stochastic", random_bits=int(bits), stochastic_bits=count)
        for value, bits in zip(x, drawn, strict=True)
    ]
    got = quantize(jnp.asarray(x), name, rounding="stochastic", random_bits=jnp.asarray(drawn), stochastic_bits=count)
    same(got, flushed(np.array(exact), known))


@pytest.mark.parametrize("rounding", ["nearest_even", "nearest_away", "toward_zero"])
def test_saturation_mask_stops_the_gradient_of_what_overflows(rounding: str) -> None:
    known = parse("E4M3")
    x = jnp.array([1.0, 448.0, 463.9, 464.0, 464.1, 480.0, -1e6, jnp.inf, jnp.nan, 0.0])
    beyond = [round_to_format(float(value), known, rounding=rounding) for value in x]
    wanted = np.where(np.isnan(beyond) & ~np.isnan(x), 0.0, 2.0)
    for overflow in ("native", "saturate", "saturate_finite"):
        cast = partial(quantize, format="E4M3", rounding=rounding, overflow=overflow, saturation_mask=True)
        _, pullback = jax.vjp(cast, x)
        np.testing.assert_array_equal(pullback(jnp.full_like(x, 2))[0], wanted)


def test_saturation_mask_under_a_scale_and_dynamic() -> None:
    x, params = jnp.array([1.0, 7.0, 900.0]), FormatParams.from_format("E4M3")
    _, pullback = jax.vjp(jax.jit(lambda x: quantize(x, params, scale=0.25, saturation_mask=True)), x)
    assert pullback(jnp.ones(3))[0].tolist() == [1.0, 1.0, 0.0]
    _, tangent = jax.jvp(lambda x: quantize(x, params, scale=0.25), (x,), (jnp.ones(3),))
    assert tangent.tolist() == [1.0, 1.0, 1.0]


def test_cast_and_counts_in_one_call() -> None:
    x = jnp.asarray(inputs())
    quantized, counts = jax.jit(lambda x, params: quantize_with_counts(x, params, scale=0.5))(
        x, FormatParams.from_format("E3M4", overflow="saturate")
    )
    np.testing.assert_array_equal(quantized, quantize(x, "E3M4", scale=0.5, overflow="saturate"))
    assert counts.as_integers() == cast_counts(x, "E3M4", scale=0.5).as_integers()
    donated = jax.jit(quantize_with_counts, donate_argnums=0)
    text = donated.lower(x, FormatParams.from_format("E3M4")).compile().as_text()
    assert " copy(" not in text  # the counts are taken before the cast overwrites what they read


@pytest.mark.parametrize(("seed", "step"), [(0, 0), (1, 0), (0, 1), (2**32 - 1, 2**32 - 1), (12345, 678)])
def test_hash_bits_are_the_definition(seed: int, step: int) -> None:
    wanted = np.array(hash_bits_reference(1000, seed, step), np.uint32)
    np.testing.assert_array_equal(hash_bits((1000,), seed, step), wanted)
    traced = jax.jit(lambda seed, step: hash_bits((10, 100), seed, step))(jnp.uint32(seed), jnp.uint32(step))
    np.testing.assert_array_equal(traced, wanted.reshape(10, 100))
    assert hash_bits((), seed, step) == wanted[0]
    assert hash_bits((3, 0), seed).shape == (3, 0)


@pytest.mark.parametrize(
    ("sizes", "shapes"), [("n", [(1,), (4096,)]), ("n, 8", [(1, 8), (5, 8)]), ("3, n, m", [(3, 1, 7), (3, 5, 1)])]
)
def test_hash_bits_are_exported_for_any_size(sizes: str, shapes: list[tuple[int, ...]]) -> None:
    given = jax.ShapeDtypeStruct(jax.export.symbolic_shape(sizes), jnp.float32)
    exported = jax.export.export(jax.jit(lambda x: hash_bits(x.shape, 7, 3)))(given)
    for shape in shapes:
        np.testing.assert_array_equal(exported.call(jnp.zeros(shape)), hash_bits(shape, 7, 3))


def test_stochastic_rounding_by_hash_is_one_program_for_all_steps() -> None:
    @jax.jit
    @chex.assert_max_traces(1)
    def rounded(x: jax.Array, step: jax.Array) -> jax.Array:
        return quantize(x, "E4M3", rounding="stochastic", random_bits=hash_bits(x.shape, 7, step))

    x = jnp.full(2**16, 1.03)  # between 1 and 1.125
    shares = [float(jnp.mean(rounded(x, jnp.uint32(step)) == 1.125)) for step in range(4)]
    deviation = np.sqrt(0.24 * 0.76 / 2**16)
    assert np.all(np.abs(np.array(shares) - (np.float32(1.03) - 1) / 0.125) < 5 * deviation)
    assert len(set(shares)) == 4


def test_what_has_no_effect_or_no_meaning() -> None:
    x = jnp.ones(2)
    with pytest.raises(InputError, match="stochastic_bits=8 would have no effect"):
        quantize(x, "E4M3", stochastic_bits=8)
    with pytest.raises(InputError, match="stochastic_bits is 25; expected an integer from 1 to 24"):
        FormatParams.from_format("E4M3", rounding="stochastic", stochastic_bits=25)
    with pytest.raises(InputError, match="saturation_mask=True would have no effect"):
        quantize(x, "float32", saturation_mask=True)
    with pytest.raises(InputError, match=r"path 'fast' cannot cast to bf16 .*; expected wide or integer"):
        FormatParams.from_format("bf16", path="fast")
    with pytest.raises(InputError, match="path 'wide' cannot cast to float8_e8m0fnu"):
        FormatParams.from_format("float8_e8m0fnu", path="wide")
    with pytest.raises(InputError, match="CodeParams carry their own"):
        encode(x, CodeParams.from_format("E4M3"), overflow="saturate")
    with pytest.raises(InputError, match="quantize with them, then encode"):
        encode(x, "E4M3", rounding="stochastic")
    with pytest.raises(InputError, match="seed is -1; expected an integer from 0 to"):
        hash_bits((2,), -1)
    with pytest.raises(InputError, match="step is 4294967296"):
        hash_bits((2,), 0, 2**32)
    with pytest.raises(TypeError, match="seed is an integer; got float32"):
        hash_bits((2,), jnp.float32(1))
    with pytest.raises(InputError, match="more than the 2"):
        hash_bits((2**17, 2**16), 0)


def test_a_state_takes_formats_with_and_without_negative_zero() -> None:
    state = FormatParams.from_format("E4M3")
    moved = set_format({"format": state}, "float8_e4m3fnuz")["format"]
    chex.assert_trees_all_equal(moved, FormatParams.from_format("float8_e4m3fnuz"))
    with pytest.raises(ValueError, match="wide path"):
        set_format({"format": state}, "bf16")
    roomy = FormatParams.from_format("E4M3", path="wide")
    chex.assert_trees_all_equal(
        set_format({"format": roomy}, "bf16")["format"], FormatParams.from_format("bf16", path="wide")
    )


def test_paths_are_those_that_are_exact() -> None:
    assert paths_of(parse("E4M3")) == ("fast", "wide", "integer")
    assert paths_of(parse("E4M3"), "toward_zero") == ("integer",)
    assert paths_of(parse("bf16")) == ("wide", "integer")
    assert paths_of(parse("float8_e8m0fnu"), "stochastic") == ("unsigned",)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("format", [parse("binary8p4se"), parse("float8_e5m2fnuz"), parse("float6_e2m3fn")], ids=str)
def test_every_half_precision_input(dtype: jnp.dtype, format: Format) -> None:
    x = jnp.asarray(np.arange(2**16, dtype=np.uint16)).view(dtype)
    with np.errstate(over="ignore"):
        wanted = expected(np.asarray(x.astype(jnp.float32)), format).astype(dtype)
    got = jax.jit(quantize, static_argnums=1)(x, format)
    assert got.dtype == dtype
    same(got.astype(jnp.float32), wanted.astype(np.float32))


def test_x64_and_strict_promotion() -> None:
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        x = jnp.asarray(inputs()[:1000])
        for name in ("E4M3", "bf16", "float8_e8m0fnu", "binary8p3se"):
            same(quantize(x, name), expected(inputs()[:1000], parse(name)))
            assert decode(encode(x, name), name).dtype == jnp.float32
        assert hash_bits((4,), 1).dtype == jnp.uint32
        assert quantize(x.astype(jnp.float64), "E4M3", saturation_mask=True).dtype == jnp.float64


@pytest.mark.parametrize("name", ["E4M3", "float8_e4m3fnuz", "float8_e8m0fnu"])
def test_a_format_whose_overflow_is_nan_is_no_nan_to_the_debugger(name: str) -> None:
    def step(x: jax.Array, params: FormatParams) -> tuple[jax.Array, FormatParams]:
        return quantize(x, params), params

    with jax.debug_nans(True):
        params = FormatParams.from_format(name)
        stacked = FormatParams.stack([params, params])
        _, carried = jax.jit(step)(jnp.linspace(0.5, 2, 33), params)
        mapped, _ = jax.vmap(step, in_axes=(None, 0))(jnp.linspace(0.5, 2, 33), stacked)
        assert mapped.shape == (2, 33)
        state = set_format(partition_relative_clip(parse(name)).init(jnp.ones(3)), name)
        with pytest.raises(FloatingPointError):
            step(jnp.array([np.inf], jnp.float32), params)  # what does become NaN is found
    chex.assert_tree_all_finite((params, stacked, carried, state.format))

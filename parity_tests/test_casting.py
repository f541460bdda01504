"""Casts: JAX = torch = exact reference = third parties, in every bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from functools import partial

import gfloat
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import altgrad_jax.blocks as blocks_in_jax
import altgrad_jax.casting as in_jax
import altgrad_jax.codes as codes_in_jax
import altgrad_torch.blocks as blocks_in_torch
import altgrad_torch.casting as in_torch
import altgrad_torch.codes as codes_in_torch
from altgrad_core.errors import InputError
from altgrad_core.formats import OVERFLOWS, ROUNDINGS, Format, Overflow, Rounding, parse
from altgrad_core.reference import round_to_format
from altgrad_jax.params import FormatParams
from parity_tests.support import (
    EIGHT,
    MIN_NORMAL,
    TORCH_DEVICE,
    as_cast_gives,
    assert_same_bits,
    assert_same_values,
    bits_of,
    boundaries,
    expected_nearest,
    expected_one_by_one,
    jax_cast,
    jax_casts,
    many_inputs,
    padded,
    to_torch,
    torch_cast,
    widened,
)

BOUNDARY_SIZE = 2048
"""What the boundaries of each of the eight formats are padded to."""


def formats(*names: str, and_the_eight: bool = False) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("format", [*(EIGHT if and_the_eight else ()), *map(parse, names)], ids=str)


eight_formats = formats(and_the_eight=True)


def padded_boundaries(format: Format) -> npt.NDArray[np.float32]:
    return padded(boundaries(format), BOUNDARY_SIZE)


@eight_formats
@pytest.mark.parametrize("overflow", OVERFLOWS)
def test_nearest_even_on_many_inputs(format: Format, overflow: Overflow) -> None:
    x = np.concatenate([padded_boundaries(format), many_inputs()])
    expected = expected_nearest(x, format, overflow)
    for path, actual in jax_casts(x, format, overflow).items():
        assert_same_bits(actual, expected, x, path)
    assert_same_bits(torch_cast(x, format, overflow), expected, x, "torch")


@formats("bf16", "fp16", "E2M3", "E3M2", "E8M4b130", "E4M11", and_the_eight=True)
@pytest.mark.parametrize("overflow", OVERFLOWS)
def test_the_two_references_agree(format: Format, overflow: Overflow) -> None:
    """The code book's rounding is that of rational arithmetic: else both tests above and below would mean less."""
    x = np.random.default_rng(1).permutation(boundaries(format))[:600]
    assert_same_bits(expected_nearest(x, format, overflow), expected_one_by_one(x, format, "nearest_even", overflow), x)


@eight_formats
@pytest.mark.parametrize("rounding", ["nearest_even", "nearest_away", "toward_zero"])
def test_roundings_by_rational_arithmetic(format: Format, rounding: Rounding) -> None:
    x = padded_boundaries(format)
    expected = expected_one_by_one(x, format, rounding)
    params = FormatParams.from_format(format, rounding=rounding, path="integer")
    assert_same_bits(jax_cast(jnp.asarray(x), params), expected, x, "jax")
    assert_same_bits(torch_cast(x, format, rounding=rounding), expected, x, "torch")


@eight_formats
@pytest.mark.parametrize("overflow", OVERFLOWS)
def test_stochastic_rounding_uses_the_same_bits(format: Format, overflow: Overflow) -> None:
    x = padded_boundaries(format)
    drawn = np.random.default_rng(2).integers(-(2**31), 2**31, x.size).astype(np.int32)
    drawn[::7], drawn[1::7], drawn[2::7] = 0, 2**24 - 1, 2**23
    expected = expected_one_by_one(x, format, "stochastic", overflow, drawn)
    params = FormatParams.from_format(format, rounding="stochastic", overflow=overflow)
    assert_same_bits(jax_cast(jnp.asarray(x), params, jnp.asarray(drawn)), expected, x, "jax")
    assert_same_bits(torch_cast(x, format, overflow, "stochastic", drawn), expected, x, "torch")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8, torch.uint32])
def test_random_bits_of_any_integer_dtype(dtype: torch.dtype) -> None:
    x, drawn = torch.full((4,), 1.1), torch.tensor([0, 1, 77, 255])
    count = min(torch.iinfo(dtype).bits, 24)
    rounded = partial(in_torch.quantize, x, "E3M4", rounding="stochastic", stochastic_bits=count)
    assert_same_bits(rounded(random_bits=drawn.to(dtype)), rounded(random_bits=drawn))
    if dtype != torch.uint8:
        return
    refusal = "random_bits of uint8 have 8 bits; expected stochastic_bits of at most 8, not 9"
    with pytest.raises(InputError, match=refusal):
        in_torch.quantize(x, "E3M4", rounding="stochastic", stochastic_bits=9, random_bits=drawn.to(dtype))
    given = jnp.asarray(drawn.numpy(), jnp.uint8)
    with pytest.raises(InputError, match=refusal):
        in_jax.quantize(jnp.asarray(x), "E3M4", rounding="stochastic", stochastic_bits=9, random_bits=given)
    with pytest.raises(InputError, match="not 24"):
        blocks_in_torch.quantize_blocks(x, "E3M4", block=2, rounding="stochastic", random_bits=drawn.to(dtype))
    with pytest.raises(InputError, match="not 24"):
        blocks_in_jax.quantize_blocks(jnp.asarray(x), "E3M4", block=2, rounding="stochastic", random_bits=given)


@formats("bf16", "fp16", "E8M4b130", "E4M11", "E8M7b140")
def test_wide_formats(format: Format) -> None:
    """Formats on the integer path; of the boundaries of so many codes, every 5th with its neighbours."""
    x = np.concatenate([boundaries(format)[::5], many_inputs()[::3]])
    expected = expected_nearest(x, format, "native")
    for path, actual in jax_casts(padded(x, 2**18), format).items():
        assert_same_bits(actual[: x.size], expected, x, path)
    assert_same_bits(torch_cast(x, format), expected, x, "torch")


def boundaries_at(format: Format, scale: float) -> npt.NDArray[np.float32]:
    """The boundaries of the grid and those of the grid times the scale, each format's of the same number."""
    with np.errstate(over="ignore"):
        moved = (widened(boundaries(format)) * scale).astype(np.float32)
    return padded(np.concatenate([moved, boundaries(format)]), 2 * BOUNDARY_SIZE)


@jax.jit
def jax_scaled(x: jax.Array, params: FormatParams, scale: jax.Array) -> jax.Array:
    return in_jax.quantize(x, params, scale=scale)


@eight_formats
@pytest.mark.parametrize("exponent", [-100, -17, 3, 100])
@pytest.mark.parametrize("overflow", ["native", "saturate_finite"])
def test_power_of_two_scales(format: Format, exponent: int, overflow: Overflow) -> None:
    scale = 2.0**exponent
    x = boundaries_at(format, scale)
    params = FormatParams.from_format(format, overflow=overflow)
    expected = expected_one_by_one(x, format, "nearest_even", overflow, scale=scale)
    assert_same_bits(jax_scaled(jnp.asarray(x), params, jnp.float32(scale)), expected, x, "jax")
    actual = in_torch.quantize(to_torch(x), format, scale=scale, overflow=overflow)
    assert_same_bits(actual, expected, x, "torch")


@formats("E4M3", "bf16", "E8M4b130")
@pytest.mark.parametrize("scale", [0.3, 7.7, 2.0**-100, 2.0**100])
def test_other_scales_and_wide_formats(format: Format, scale: float) -> None:
    """A scale that is no power of two rounds twice more, the same way in both; near 2^-126 it makes no promise."""
    x = many_inputs()[::7]
    x = x if math.frexp(scale)[0] == 0.5 else x[~(np.abs(x) < MIN_NORMAL * max(scale, 1) * 2)]
    from_jax = jax_scaled(jnp.asarray(x), FormatParams.from_format(format), jnp.float32(scale))
    assert_same_bits(from_jax, in_torch.quantize(to_torch(x), format, scale=scale), x)


@pytest.mark.parametrize("exponent", [-100, -20, 0, 20, 100])
def test_division_by_a_scale(exponent: int) -> None:
    """Exact, but zero below 2^-126, and float32's maximum where a finite value leaves its range."""
    x, scale = many_inputs()[::3], np.float32(2.0**exponent)
    x = x[~np.isnan(x)]
    exact = widened(x) / float(scale)
    bounded = np.where(np.isinf(x), exact, np.clip(exact, -np.finfo(np.float32).max, np.finfo(np.float32).max))
    expected = np.where(np.abs(exact) < MIN_NORMAL, np.copysign(0.0, exact), bounded).astype(np.float32)
    assert_same_bits(jax.jit(in_jax.divide_by_scale)(jnp.asarray(x), scale), expected, x, "jax")
    assert_same_bits(in_torch.divide_by_scale(to_torch(x), torch.tensor(scale)), expected, x, "torch")


@eight_formats
@pytest.mark.parametrize("exponent", [-50, 3])
@pytest.mark.parametrize("overflow", ["native", "saturate_finite"])
def test_scaled_params(format: Format, exponent: int, overflow: Overflow) -> None:
    """The grid moved, instead of the values: the same bits as scaling."""
    x = boundaries_at(format, 2.0**exponent)
    params = FormatParams.from_format(format, overflow=overflow)
    expected = expected_one_by_one(x, format, "nearest_even", overflow, scale=2.0**exponent)
    moved = jax_cast(jnp.asarray(x), params.scaled(jnp.float32(2.0**exponent)))
    assert_same_bits(moved, expected, x)


def test_scale_of_each_row() -> None:
    x = np.random.default_rng(3).standard_normal((3, 50), np.float32)
    scale = np.array([[0.25], [1.0], [64.0]], np.float32)
    expected = np.stack(
        [
            expected_one_by_one(row, parse("E3M4"), "nearest_even", scale=s)
            for row, s in zip(x, (0.25, 1.0, 64.0), strict=True)
        ]
    )
    assert_same_bits(in_jax.quantize(jnp.asarray(x), "E3M4", scale=scale), expected, x, "jax")
    assert_same_bits(in_torch.quantize(to_torch(x), "E3M4", scale=to_torch(scale)), expected, x, "torch")


# Third parties


@pytest.mark.parametrize(
    ("format", "dtype"),
    [
        (parse("E5M2"), ml_dtypes.float8_e5m2),
        (parse("E4M3"), ml_dtypes.float8_e4m3fn),
        (parse("bf16"), ml_dtypes.bfloat16),
        (parse("fp16"), np.float16),
        (parse("E5M2"), torch.float8_e5m2),
        (parse("bf16"), torch.bfloat16),
        (parse("fp16"), torch.float16),
    ],
    ids=str,
)
def test_same_as_other_dtypes(format: Format, dtype: npt.DTypeLike | torch.dtype) -> None:
    """Their results below 2^-126, which only bf16 has, are ours flushed to zero."""
    x = np.concatenate([boundaries(format)[-BOUNDARY_SIZE:], boundaries(format)[:BOUNDARY_SIZE], many_inputs()])
    if isinstance(dtype, torch.dtype):
        theirs = to_torch(x).to(dtype).to(torch.float32).cpu().numpy()
    else:
        with np.errstate(all="ignore"):
            theirs = x.astype(dtype).astype(np.float32)
    theirs = np.where(np.abs(theirs) < MIN_NORMAL, np.copysign(np.float32(0), theirs), theirs)
    for path, actual in jax_casts(x, format).items():
        assert_same_values(actual, theirs, x, path)
    assert_same_values(torch_cast(x, format), theirs, x, "torch")


@pytest.mark.skipif(torch.__version__ < (2, 13), reason="torch's cast to float8_e4m3fn does not saturate before 2.13")
def test_saturating_e4m3_is_that_of_torch() -> None:
    """torch saturates where JAX and ml_dtypes give NaN, infinities included; we offer both."""
    x = np.concatenate([boundaries(parse("E4M3")), many_inputs()])
    theirs = torch.from_numpy(x).to(torch.float8_e4m3fn).to(torch.float32).numpy()
    assert_same_values(torch_cast(x, "E4M3", "saturate"), theirs, x)


def gfloat_format(format: Format) -> gfloat.FormatInfo:
    """The same format in gfloat's terms. It counts the exponents of fixed point from 1."""
    return gfloat.FormatInfo(
        format.name,
        format.bits,
        format.mantissa_bits + 1,
        bias=format.bias if format.exponent_bits else 1,
        is_signed=True,
        domain=gfloat.Domain.Extended if format.has_inf else gfloat.Domain.Finite,
        has_nz=True,
        num_high_nans=2**format.mantissa_bits - 1 if format.has_inf else int(format.has_nan),
        has_subnormals=True,
        is_twos_complement=False,
    )


@eight_formats
@pytest.mark.parametrize(
    ("rounding", "theirs"),
    [("nearest_even", gfloat.RoundMode.TiesToEven), ("nearest_away", gfloat.RoundMode.TiesToAway)],
    ids=["nearest_even", "nearest_away"],
)
def test_same_as_gfloat(format: Format, rounding: Rounding, theirs: gfloat.RoundMode) -> None:
    """gfloat refuses NaN, and overflow unless it saturates, where a finite format has no code for them."""
    info = gfloat_format(format)
    assert [gfloat.decode_float(info, code).fval for code in (1, 77, 120)] == [
        format.to_real(code) for code in (1, 77, 120)
    ]
    x = np.concatenate([padded_boundaries(format), many_inputs()[::16]])
    x = x if format.has_nan else x[~np.isnan(x)]
    expected = gfloat.round_ndarray(info, widened(x), theirs, sat=not format.has_nan)
    actual = torch_cast(x, format, rounding=rounding)
    assert_same_values(actual, expected.astype(np.float32), x)


# Codes


@formats("bf16", "fp16", "E2M1", "E8M7b128", and_the_eight=True)
def test_every_code_is_decoded(format: Format) -> None:
    codes = np.arange(2 * format.sign_mask, dtype=np.uint8 if format.bits <= 8 else np.uint16)
    expected = format.code_book()
    expected = np.where(np.abs(expected) < MIN_NORMAL, np.copysign(0.0, expected), expected).astype(np.float32)
    assert_same_values(np.asarray(codes_in_jax.decode(jnp.asarray(codes), format)), expected, codes, "jax")
    assert_same_values(codes_in_torch.decode(to_torch(codes), format), expected, codes, "torch")


@formats("bf16", "fp16", "E2M1", "E8M4b130", and_the_eight=True)
def test_every_value_is_encoded(format: Format) -> None:
    """Back to its own code; NaN to the canonical code with the value's sign lost, and bf16's subnormals to zero."""
    values = format.code_book()
    codes = np.arange(values.size)
    codes = np.where(np.abs(values) < MIN_NORMAL, codes & format.sign_mask, codes)
    codes = np.where(np.isnan(values), format.to_bits(math.nan), codes).astype(
        np.uint8 if format.bits <= 8 else np.uint16
    )
    x = values.astype(np.float32)
    assert_same_bits(codes_in_jax.encode(jnp.asarray(x), format), codes, x, "jax")
    assert_same_bits(codes_in_torch.encode(to_torch(x), format), codes, x, "torch")


@eight_formats
@pytest.mark.parametrize("overflow", OVERFLOWS)
def test_codes_of_values_off_the_grid(format: Format, overflow: Overflow) -> None:
    x = padded_boundaries(format)
    codes = np.array([format.to_bits(value, overflow=overflow) for value in widened(x).tolist()], np.uint8)
    assert_same_bits(codes_in_jax.encode(jnp.asarray(x), format, overflow=overflow), codes, x, "jax")
    assert_same_bits(codes_in_torch.encode(to_torch(x), format, overflow=overflow), codes, x, "torch")


@eight_formats
def test_codes_rounded_toward_zero(format: Format) -> None:
    x = padded_boundaries(format)
    codes = np.array([format.to_bits(value, "toward_zero") for value in widened(x).tolist()], np.uint8)
    assert_same_bits(codes_in_jax.encode(jnp.asarray(x), format, rounding="toward_zero"), codes, x, "jax")
    assert_same_bits(codes_in_torch.encode(to_torch(x), format, rounding="toward_zero"), codes, x, "torch")


# Dtypes


@jax.jit
def jax_quantize(x: jax.Array, params: FormatParams) -> jax.Array:
    return in_jax.quantize(x, params)


@formats("bf16", "fp16", and_the_eight=True)
@pytest.mark.parametrize(
    ("dtype", "torch_dtype"), [(ml_dtypes.bfloat16, torch.bfloat16), (np.float16, torch.float16)], ids=["bf16", "fp16"]
)
def test_all_half_precision_inputs(format: Format, dtype: npt.DTypeLike, torch_dtype: torch.dtype) -> None:
    """The dtype is kept, so the result is rounded to it; NaN stays canonical, with its sign."""
    every = np.arange(2**16, dtype=np.uint16)
    x = every.view(dtype)
    exact = expected_nearest(x.astype(np.float32), format, "native")
    with np.errstate(over="ignore"):
        expected = exact.astype(dtype)
    canonical = np.array([np.nan], np.float32).astype(dtype).view(np.uint16)[0]
    expected = np.where(np.isnan(exact), canonical | (every & 0x8000), expected.view(np.uint16)).view(dtype)
    assert_same_bits(jax_quantize(jnp.asarray(x), FormatParams.from_format(format)), expected, x, "jax")
    tensor = to_torch(every.view(np.int16)).view(torch_dtype)
    assert_same_bits(in_torch.quantize(tensor, format), expected, x, "torch")


@pytest.mark.parametrize("format", ["E4M3", "E5M2", "E7M0", "bf16"])
@pytest.mark.parametrize("overflow", OVERFLOWS)
def test_float64_under_a_scale_that_its_quotient_does_not_survive(format: str, overflow: Overflow) -> None:
    """A quotient beyond float64 is still that of a finite value, and one that vanishes not that of zero."""
    x = np.array([1e300, -1e300, np.inf, 1e-300, 5e-324, 0.0, np.nan, 1.3])
    for scale in (2.0**-100, 2.0**100, 2.0**-140, 0.1):
        unit, bound = float(np.float32(scale)), parse(format).max_representable_value
        quotients = [value / unit if abs(value) != 1e300 else np.copysign(bound * 2, value) for value in x.tolist()]
        on_grid = [round_to_format(each, parse(format), overflow=overflow) * unit for each in quotients]
        expected = np.copysign(on_grid, x)
        with jax.enable_x64(True):
            from_jax = np.asarray(in_jax.quantize(jnp.asarray(x), format, scale=scale, overflow=overflow))
        assert_same_bits(from_jax, expected, what="jax")
        assert_same_bits(in_torch.quantize(to_torch(x), format, scale=scale, overflow=overflow), expected)


@pytest.mark.parametrize("sharing", ["one", "row", "none"])
def test_float64_is_divided_by_its_scale(sharing: str) -> None:
    """Not multiplied by the scale's reciprocal, however many elements share one, none of them a power of two."""
    draw = np.random.default_rng(8)
    scales = (1 + draw.random((64, 1))).astype(np.float32)
    on_grid = draw.choice(parse("E4M3").code_book()[1:100], (64, 48)) * scales.astype(np.float64)
    x = np.concatenate([np.nextafter(on_grid, 0), on_grid, np.nextafter(on_grid, np.inf)], axis=1)
    rounded = np.vectorize(partial(round_to_format, format=parse("E4M3"), rounding="toward_zero"))(x / scales)
    expected = rounded * scales.astype(np.float64)
    cast = partial(in_jax.quantize, format="E4M3", rounding="toward_zero")
    given = {"one": scales[:, 0], "row": scales, "none": np.repeat(scales, x.shape[1], axis=1)}[sharing]
    with jax.enable_x64(True):
        cast_of_scale = jax.jit(lambda x, scale: cast(x, scale=scale))
        together = [cast_of_scale(*each) for each in zip(x, given, strict=True)]
        actual = np.stack(together) if sharing == "one" else np.asarray(cast_of_scale(x, given))
    assert_same_bits(actual, expected, x, "jax")
    theirs = in_torch.quantize(to_torch(x), "E4M3", scale=to_torch(scales), rounding="toward_zero")
    assert_same_bits(theirs, expected, x, "torch")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_the_mask_is_of_what_overflows_the_format_not_its_product_with_the_scale(dtype: str) -> None:
    """``Q(x / s) * s`` is beyond float32 for a value within the format's range."""
    values = [3e38, 1.0, np.inf, -3e38]
    with jax.enable_x64(dtype == "float64"):

        def masked(x: jax.Array) -> jax.Array:
            return in_jax.quantize(x, "E7M0", scale=2.0**64, saturation_mask=True).sum()

        from_jax = jax.grad(masked)(jnp.asarray(values, dtype)).tolist()
    x = torch.tensor(values, dtype=getattr(torch, dtype), requires_grad=True)
    in_torch.quantize(x, "E7M0", scale=2.0**64, saturation_mask=True).sum().backward()
    assert x.grad is not None
    assert from_jax == x.grad.tolist() == [1.0, 1.0, 0.0, 1.0]


@formats("bf16", "fp16", and_the_eight=True)
def test_float64_is_rounded_once(format: Format) -> None:
    """Just beside each midpoint, where rounding to float32 first would land on the tie, and beside 2^-126."""
    edges = widened(boundaries(format)[:: 1 if format.bits == 8 else 131])
    small = MIN_NORMAL * (1 - 2.0 ** -np.array([8.0, 10, 30, 52]))
    large = [3.4028235677973366e38, 1e300]
    x = np.concatenate([edges, edges * (1 + 2.0**-40), edges * (1 - 2.0**-40), small, large, [-1e300, 1e-300, 5e-324]])
    x = padded(x, 5 * BOUNDARY_SIZE)
    expected = expected_one_by_one(x, format, "nearest_even").astype(np.float64)
    with jax.enable_x64(True):
        actual = jax_quantize(jnp.asarray(x), FormatParams.from_format(format))
    assert_same_bits(actual, expected, x, "jax")
    assert_same_bits(in_torch.quantize(to_torch(x), format), expected, x, "torch")


FINEST = Format("E7M22", 7, 22, 63)
"""One of its quanta has two of float32's: none of them is left to tell what is beside a tie from the tie."""


@formats("E7M0", "float8_e8m0fnu", "E8M0b148fnu")
@pytest.mark.parametrize("stochastic_bits", [1, 23, 24])
def test_float64_is_rounded_by_all_random_bits(format: Format, stochastic_bits: int) -> None:
    """A binade has 2^23 float32, and 24 random bits tell apart twice as many."""
    fractions = (np.arange(8) + 0.25 * np.arange(8)[:, None]).ravel() * 2.0**-24
    fractions = np.concatenate([fractions, 0.5 + fractions, 1 - 2.0**-24 + fractions[:4] / 8])
    least = np.ceil((1 - fractions) * 2.0**stochastic_bits).astype(np.int64)
    x = np.concatenate([1 + fractions] * 4)
    drawn = np.concatenate([least + each for each in range(-2, 2)]) % 2**stochastic_bits
    modes = {"rounding": "stochastic", "stochastic_bits": stochastic_bits}
    expected = np.array(
        [round_to_format(each, format, random_bits=bits, **modes) for each, bits in zip(x, drawn.tolist(), strict=True)]
    )
    with jax.enable_x64(True):
        actual = in_jax.quantize(jnp.asarray(x), format, random_bits=jnp.asarray(drawn), **modes)
        assert_same_bits(actual, expected, x, "jax")
    theirs = in_torch.quantize(to_torch(x), format, random_bits=to_torch(drawn), **modes)
    assert_same_bits(theirs, expected, x, "torch")


@pytest.mark.parametrize("rounding", ["nearest_even", "nearest_away", "toward_zero"])
def test_float64_is_rounded_once_to_the_finest_quanta(rounding: Rounding) -> None:
    quanta = (2.0**22 + np.arange(9)[:, None] + np.array([0, 2.0**-20, 0.25, 0.5, 0.5 + 2.0**-29, 0.75])).ravel()
    x = np.concatenate([quanta * 2.0**-22, quanta * -(2.0**-84), (FINEST.max_representable_value, 1.3 * 2.0**-70)])
    expected = np.array([round_to_format(each, FINEST, rounding=rounding) for each in x])
    with jax.enable_x64(True):
        assert_same_bits(in_jax.quantize(jnp.asarray(x), FINEST, rounding=rounding), expected, x, "jax")
    assert_same_bits(in_torch.quantize(to_torch(x), FINEST, rounding=rounding), expected, x, "torch")


SCALES = 2.0 ** np.array([-149, -148, -140, -127, -126, -125, -100, -26, -25, -24, -23, -22, -21, -1, 0, 1, 10, 127])
"""Of some the grid of E8M0 goes on where float32 has quanta too wide for it, or ends; 1.5 of each are no power of two.
"""


def around_the_grid(format: Format, unit: float) -> list[float]:
    """Powers of two where the grid times ``unit`` ends, and where float32 does; what is beside and between them."""
    ends = format.smallest_subnormal or 2.0**format.min_exponent, format.max_representable_value
    powers = [end * unit * 2.0**k for end in ends for k in range(-2, 3)]
    powers += [2.0**k for k in (-160, -151, -150, -149, -148, -147, -128, -127, -126, -125, 0, 127, 128, 130)]
    between = np.multiply.outer(powers, [1, 1.25, 1.5, 1.75]).ravel()
    beside = [np.nextafter(between, 0), between, np.nextafter(between, np.inf)]
    return [*np.concatenate(beside).tolist(), 0.0, -1.0, 5e-324, 1e308, math.inf, -math.inf, math.nan]


@formats("float8_e8m0fnu", "E5M0fnu", "E8M0b148fnu")
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("overflow", OVERFLOWS)
def test_float64_to_a_scaled_format_without_a_sign(format: Format, rounding: Rounding, overflow: Overflow) -> None:
    """``Q(x / s) * s`` in every bit, with s the power of two in the scale, wherever the scaled grid may lie."""
    units = np.concatenate([SCALES, SCALES[1::5]])
    scales = np.concatenate([SCALES, SCALES[1::5] * 1.5]).astype(np.float32)
    x = np.array([around_the_grid(format, unit) for unit in units.tolist()])
    drawn = np.random.default_rng(5).integers(0, 2**24, x.shape).astype(np.int32) if rounding == "stochastic" else None
    expected = np.empty_like(x)
    for (row, column), value in np.ndenumerate(x):
        unit = Fraction(units[row])
        quotient = Fraction(value) / unit if value and math.isfinite(value) else float(value)
        bits = None if drawn is None else int(drawn[row, column])
        on_grid = round_to_format(quotient, format, rounding=rounding, overflow=overflow, random_bits=bits)
        expected[row, column] = float(Fraction(on_grid) * unit) if math.isfinite(on_grid) else on_grid
    with jax.enable_x64(True):
        actual = in_jax.quantize(
            jnp.asarray(x),
            FormatParams.from_format(format, rounding=rounding, overflow=overflow),
            scale=jnp.asarray(scales[:, None]),
            random_bits=None if drawn is None else jnp.asarray(drawn),
        )
    assert_same_bits(actual, expected, x, "jax")
    modes = {"rounding": rounding, "overflow": overflow, "random_bits": None if drawn is None else to_torch(drawn)}
    assert_same_bits(in_torch.quantize(to_torch(x), format, scale=to_torch(scales[:, None]), **modes), expected, x)


@formats("E8M0b148fnu")
def test_codes_of_float64_without_a_sign(format: Format) -> None:
    """2^-148 is one of its values: beside the tie with the next one float32 has none."""
    x = np.array([1, 1.25, 1.5 - 2.0**-40, 1.5, 1.5 + 2.0**-40, 1.75, 3 - 2.0**-40, 3, 3 + 2.0**-40]) * 2.0**-148
    expected = [format.to_bits(each) for each in x.tolist()]
    with jax.enable_x64(True):
        assert codes_in_jax.encode(jnp.asarray(x), format).tolist() == expected
    assert codes_in_torch.encode(to_torch(x), format).tolist() == expected


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_float32_is_the_identity(dtype: npt.DTypeLike) -> None:
    x = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(dtype)
    assert_same_bits(in_jax.quantize(jnp.asarray(x), "float32", scale=4.0), x)
    assert_same_bits(in_torch.quantize(to_torch(x), "float32", scale=4.0), x)


@formats("E4M3", "E7M0", "bf16")
def test_the_default_dtype_of_torch_changes_nothing(format: Format) -> None:
    x = many_inputs()[::64]
    expected, scaled = torch_cast(x, format), in_torch.quantize(to_torch(x), format, scale=2.0)
    try:
        torch.set_default_dtype(torch.float64)
        assert_same_bits(torch_cast(x, format), expected, x)
        assert_same_bits(in_torch.quantize(to_torch(x), format, scale=2.0), scaled, x)
        assert codes_in_torch.decode(codes_in_torch.encode(to_torch(x), format), format).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


# Shapes, strides, gradients, batches


@formats("E3M4", "E7M0", "bf16")
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (5, 7), (2, 3, 70_001)], ids=str)
def test_shapes(format: Format, shape: tuple[int, ...]) -> None:
    """The last is cast in several chunks by torch, with an odd rest."""
    x = np.random.default_rng(4).standard_normal(shape).astype(np.float32)
    expected = expected_nearest(x, format, "native")
    assert_same_bits(jax_quantize(jnp.asarray(x), FormatParams.from_format(format)), expected, x, "jax")
    assert_same_bits(in_torch.quantize(to_torch(x), format), expected, x, "torch")
    strided = to_torch(np.stack([x, x], -1))[..., 0]
    assert_same_bits(in_torch.quantize(strided, format), expected, x, "torch, strided")


def test_chunks_take_their_own_scale_and_random_bits() -> None:
    rng = np.random.default_rng(5)
    x = rng.standard_normal((3, 100_003), np.float32)
    drawn = rng.integers(0, 2**24, x.shape, np.int32)
    scale = np.array([[0.5], [1], [2]], np.float32)
    in_one = in_torch.quantize(
        to_torch(x),
        "E3M4",
        scale=to_torch(scale),
        rounding="stochastic",
        random_bits=to_torch(drawn),
    )
    by_row = in_jax.quantize(
        jnp.asarray(x), "E3M4", scale=jnp.asarray(scale), rounding="stochastic", random_bits=jnp.asarray(drawn)
    )
    assert_same_bits(in_one, by_row)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_gradients_pass_straight_through(dtype: str) -> None:
    x, weight = np.array([6e4, 0.3, -7.0, 1e-7, np.nan], np.float32), np.array([1.1, -2.3, 0.0, 5.0, 3.0], np.float32)
    expected = jnp.asarray(weight, dtype)
    _, pullback = jax.vjp(lambda x: in_jax.quantize(x, "E4M3", scale=0.5), jnp.asarray(x, dtype))
    assert_same_bits(pullback(expected)[0], expected, x, "jax")
    tensor = to_torch(x).to(getattr(torch, dtype)).requires_grad_()
    in_torch.quantize(tensor, "E4M3", scale=0.5).backward(to_torch(weight).to(tensor.dtype))
    assert_same_bits(tensor.grad, expected, x, "torch")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.func.jvp makes one of its own
def test_torch_transforms() -> None:
    x = torch.randn(3, 8, generator=torch.Generator(TORCH_DEVICE).manual_seed(0))
    gradient = torch.func.vmap(torch.func.grad(lambda row: in_torch.quantize(row, "E4M3").square().sum()))(x)
    assert_same_bits(gradient, 2 * in_torch.quantize(x, "E4M3"))
    value, tangent = torch.func.jvp(lambda x: in_torch.quantize(x, "E4M3"), (x,), (x,))
    assert_same_bits(value, in_torch.quantize(x, "E4M3"))
    assert_same_bits(tangent, x)


def test_no_graph_without_requires_grad() -> None:
    x = torch.ones(3)
    assert not in_torch.quantize(x, "E5M2").requires_grad
    assert in_torch.quantize(x.requires_grad_(), "E5M2").requires_grad
    assert not in_torch.cast(x, parse("E5M2")).requires_grad


def test_vmap_over_formats() -> None:
    x = many_inputs()[::31]
    stacked = FormatParams.stack([FormatParams.from_format(each) for each in EIGHT])
    batched = jax.jit(jax.vmap(in_jax.quantize, in_axes=(None, 0)))(jnp.asarray(x), stacked)
    for row, each in zip(batched, EIGHT, strict=True):
        assert_same_bits(row, torch_cast(x, each), x, str(each))


# Any float32, any format

FLOAT32 = st.integers(0, 2**32 - 1).map(lambda bits: float(np.uint32(bits).view(np.float32)))


@st.composite
def any_format(draw: Callable[[st.SearchStrategy[int]], int]) -> Format:
    """Any format of 3 to 16 bits that float32 has room for, with or without specials."""
    exponent_bits = draw(st.integers(0, 8))
    mantissa_bits = draw(st.integers(max(0, 2 - exponent_bits), 15 - exponent_bits))
    specials = draw(st.integers(0, 2)) if exponent_bits else 0
    has_inf = specials == 2 and mantissa_bits > 0
    top = 2**exponent_bits - 1 - has_inf
    bias = draw(st.integers(max(top - 127, -126), min(top + 126, 149 - mantissa_bits))) if exponent_bits else 0
    return Format("drawn", exponent_bits, mantissa_bits, bias, has_inf=has_inf, has_nan=specials > 0)


@settings(max_examples=300)
@given(FLOAT32, any_format(), st.sampled_from(OVERFLOWS))
@example(0.75 * 2.0**-126, Format("quantum 2^-126", 7, 1, 126), "native")
@example(3e38, Format("max 2^104", 7, 0, 23), "saturate")
@example(1 + 3 * 2.0**-23, Format("23 significant bits", 7, 22, 63), "native")
@example(math.nan, Format("max 2^105", 7, 2, 21, has_inf=True, has_nan=True), "native")
def test_any_input_any_format(value: float, format: Format, overflow: Overflow) -> None:
    x = np.array([value], np.float32)
    expected = as_cast_gives(np.array([round_to_format(value, format, overflow=overflow)]), x)
    for path, actual in jax_casts(x, format, overflow).items():
        assert_same_bits(actual, expected, x, f"{format!r} {path}")
    assert_same_bits(torch_cast(x, format, overflow), expected, x, f"{format!r} torch")


# All 2^32 inputs


def test_comparison_of_bits_can_fail() -> None:
    """What the assertions above would say, lest they say nothing."""
    zero = np.zeros(3, np.float32)
    with pytest.raises(AssertionError, match="1 of 3 differ; at 1 0x80000000, not 0x0"):
        assert_same_bits(np.array([0, -0.0, 0], np.float32), zero)
    with pytest.raises(AssertionError, match="float64, not float32"):
        assert_same_bits(zero.astype(np.float64), zero)
    assert bits_of(torch.tensor([-0.0], dtype=torch.bfloat16)).tolist() == [0x8000]

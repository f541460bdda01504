"""Every format of the registry, each framework against the exact reference: casts, codes, modes, random bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Protocol

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import altgrad_jax
import altgrad_torch
from altgrad_core.formats import FORMAT_REGISTRY, OVERFLOWS, ROUNDINGS, Format, Overflow, Rounding, parse
from altgrad_core.reference import quantize_reference, round_to_format
from parity_tests.support import (
    MIN_NORMAL,
    SPECIAL_BITS,
    Array,
    as_numpy,
    assert_same_bits,
    both_signs,
    to_torch,
    widened,
)

DISTINCT = tuple(dict.fromkeys(known for known in FORMAT_REGISTRY.values() if known.bits <= 16))
every_format = pytest.mark.parametrize("format", DISTINCT, ids=str)
HALVES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


class Framework(Protocol):
    """What is tested of a framework, on NumPy arrays; half precision comes and goes as ml_dtypes has it."""

    def quantize(self, x: Array, format: Format, **modes: object) -> Array: ...

    def encode(self, x: Array, format: Format, **modes: object) -> Array: ...

    def decode(self, codes: Array, format: Format) -> Array: ...


class InTorch:
    def quantize(self, x: Array, format: Format, **modes: object) -> Array:
        drawn = modes.pop("random_bits", None)
        bits = None if drawn is None else to_torch(drawn)
        return as_numpy(altgrad_torch.quantize(to_torch(x), format, random_bits=bits, **modes))

    def encode(self, x: Array, format: Format, **modes: object) -> Array:
        return as_numpy(altgrad_torch.encode(to_torch(x), format, **modes))

    def decode(self, codes: Array, format: Format) -> Array:
        return as_numpy(altgrad_torch.decode(to_torch(codes), format))


class InJax:
    """Of every half precision input, under jit, the format as data."""

    _quantize, _encode, _decode = map(jax.jit, (altgrad_jax.quantize, altgrad_jax.encode, altgrad_jax.decode))

    def quantize(self, x: Array, format: Format, **modes: object) -> Array:
        return np.asarray(InJax._quantize(jnp.asarray(x), altgrad_jax.FormatParams.from_format(format, **modes)))

    def encode(self, x: Array, format: Format, **modes: object) -> Array:
        return np.asarray(InJax._encode(jnp.asarray(x), altgrad_jax.CodeParams.from_format(format, **modes)))

    def decode(self, codes: Array, format: Format) -> Array:
        return np.asarray(InJax._decode(jnp.asarray(codes), altgrad_jax.CodeParams.from_format(format)))


every_framework = pytest.mark.parametrize("framework", [InTorch()], ids=["torch"])
both_frameworks = pytest.mark.parametrize("framework", [InTorch(), InJax()], ids=["torch", "jax"])


@lru_cache(maxsize=64)
def boundaries(format: Format) -> npt.NDArray[np.float32]:
    """Code values, midpoints and the edge of overflow, each with its float32 neighbours, and the specials.

    Of formats of more than 8 bits, every so manieth value.
    """
    grid = format.code_book()[: format.max_code + 1]
    beyond = math.ldexp(*format.finite_parts(format.max_code + 1))
    edge = grid[-1] + (beyond - grid[-1]) * np.array([0.25, 0.5, 0.75, 1, 2, 40])
    middle = np.concatenate([grid, (grid[1:] + grid[:-1]) / 2])[:: max(1, grid.size // 128)]
    points = np.concatenate([middle, grid[:4], grid[-4:], grid[:4] / 2, edge])
    bits = points[points <= np.finfo(np.float32).max].astype(np.float32).view(np.uint32)
    bits = np.unique(np.concatenate([np.maximum(bits, 1) - 1, bits, bits + 1]))
    return both_signs(np.concatenate([bits, SPECIAL_BITS]))


def as_delivered(exact: npt.NDArray[np.float64], x: Array, format: Format) -> npt.NDArray[np.float32]:
    """Exact results as a cast of ``x`` has to return them.

    Results below 2^-126 are zero, but for the 2^-127 of formats without a sign. NaN is canonical; where the format has
    a sign, it has that of ``x``, and so has zero if the format tells -0 from 0.
    """
    magnitude = np.abs(exact)
    if format.is_signed:
        magnitude = np.where(magnitude < MIN_NORMAL, 0.0, magnitude)
    with np.errstate(over="ignore", invalid="ignore"):
        bits = np.where(np.isnan(exact), np.uint32(0x7FC0_0000), magnitude.astype(np.float32).view(np.uint32))
    negative = np.signbit(x) & format.is_signed & ((bits != 0) | format.has_negative_zero)
    return (bits | np.where(negative, np.uint32(0x8000_0000), np.uint32(0))).view(np.float32)


def one_by_one(x: Array, format: Format, drawn: Array | None = None, **modes: object) -> npt.NDArray[np.float32]:
    values = widened(x).tolist()
    bits = [None] * len(values) if drawn is None else [int(each) for each in drawn]
    rounded = [round_to_format(v, format, random_bits=b, **modes) for v, b in zip(values, bits, strict=True)]
    return as_delivered(np.array(rounded), x, format)


@both_frameworks
@every_format
@pytest.mark.parametrize("dtype", HALVES)
def test_all_half_precision_inputs(framework: Framework, format: Format, dtype: str) -> None:
    """The dtype is kept, so the result is rounded to it."""
    every = np.arange(2**16, dtype=np.uint16)
    x = every.view(HALVES[dtype])
    exact = as_delivered(quantize_reference(widened(x), format), x, format)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = exact.astype(x.dtype).view(np.uint16)
    nan = np.array([np.nan], np.float32).astype(x.dtype).view(np.uint16)[0] & 0x7FFF
    expected = np.where(np.isnan(exact), nan | np.where(np.signbit(exact), 0x8000, 0), expected).astype(np.uint16)
    assert_same_bits(framework.quantize(x, format), expected.view(x.dtype), x)


@both_frameworks
@every_format
@pytest.mark.parametrize("dtype", HALVES)
def test_codes_of_all_half_precision_inputs(framework: Framework, format: Format, dtype: str) -> None:
    """Each rounded once, from its own value, though float16 could not hold what it rounds to."""
    x = np.arange(2**16, dtype=np.uint16).view(HALVES[dtype])
    codes = framework.encode(x, format)
    values = format.code_book()[codes]
    rounded = quantize_reference(widened(x), format)
    if not format.has_nan:
        rounded = np.where(np.isnan(rounded), 0.0, rounded)
    if format.min_exponent - format.mantissa_bits < -126 and format.is_signed:
        rounded = np.where(np.abs(rounded) < MIN_NORMAL, np.copysign(0.0, rounded), rounded)
    assert np.array_equal(values, rounded, equal_nan=True)
    zero = values == 0
    assert np.array_equal(np.signbit(values[zero]), np.signbit(rounded[zero]))


@every_framework
@every_format
@pytest.mark.parametrize("overflow", OVERFLOWS)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_modes_on_boundaries(framework: Framework, format: Format, rounding: Rounding, overflow: Overflow) -> None:
    x = boundaries(format)
    modes = {"rounding": rounding, "overflow": overflow}
    drawn = None
    if rounding == "stochastic":
        drawn = np.random.default_rng(2).integers(-(2**31), 2**31, x.size).astype(np.int32)
        drawn[::7], drawn[1::7], drawn[2::7] = 0, 2**24 - 1, 2**23
    expected = one_by_one(x, format, drawn, **modes)
    actual = framework.quantize(x, format, **modes, **({} if drawn is None else {"random_bits": drawn}))
    assert_same_bits(actual, expected, x)


@every_framework
@every_format
@pytest.mark.parametrize("stochastic_bits", [1, 4, 8, 16, 23])
def test_fewer_random_bits(framework: Framework, format: Format, stochastic_bits: int) -> None:
    x = boundaries(format)
    drawn = np.random.default_rng(3).integers(-(2**31), 2**31, x.size).astype(np.int32)
    modes = {"rounding": "stochastic", "stochastic_bits": stochastic_bits}
    expected = one_by_one(x, format, drawn, **modes)
    assert_same_bits(framework.quantize(x, format, random_bits=drawn, **modes), expected, x)


@every_framework
@every_format
def test_float64_is_rounded_once(framework: Framework, format: Format) -> None:
    """Just beside each midpoint, where rounding to float32 first would land on the tie, and where float32 ends."""
    edges = widened(boundaries(format)[::3])
    small = MIN_NORMAL * (1 - 2.0 ** -np.array([8.0, 10, 30, 52]))
    small = np.concatenate([small, small / 2, MIN_NORMAL * np.array([0.5, 0.75, 0.75 + 2.0**-50, 0.75 - 2.0**-50])])
    large = [3.4028235677973366e38, 1e300, -1e300, 1e-300, -1e-300, 5e-324, -5e-324]
    x = np.concatenate([edges, edges * (1 + 2.0**-40), edges * (1 - 2.0**-40), small, large])
    assert_same_bits(framework.quantize(x, format), one_by_one(x, format).astype(np.float64), x)


@every_framework
@every_format
@pytest.mark.parametrize("exponent", [-17, 3])
def test_power_of_two_scales(framework: Framework, format: Format, exponent: int) -> None:
    scale = 2.0**exponent
    with np.errstate(over="ignore"):
        x = (widened(boundaries(format)) * scale).astype(np.float32)
    x = x[(np.abs(x) >= MIN_NORMAL * 2.0 ** abs(exponent)) | (x == 0) | ~np.isfinite(x)]
    x = x[(np.abs(x) <= 2.0**100) | ~np.isfinite(x)]
    exact = [round_to_format(v if not math.isfinite(v) else v / scale, format) for v in widened(x).tolist()]
    expected = as_delivered(np.array(exact) * scale, x, format)
    assert_same_bits(framework.quantize(x, format, scale=scale), expected, x)


@every_framework
@every_format
def test_every_code_there_and_back(framework: Framework, format: Format) -> None:
    """To its value and back to the code; NaN to the canonical one, and to zero what float32 has as subnormal."""
    dtype = np.uint8 if format.bits <= 8 else np.uint16
    codes = np.arange(2**format.bits, dtype=dtype)
    book = format.code_book()
    values = np.where((np.abs(book) < MIN_NORMAL) & format.is_signed, np.copysign(0.0, book), book).astype(np.float32)
    decoded = framework.decode(codes, format)
    assert decoded.dtype == np.float32
    assert np.array_equal(decoded, values, equal_nan=True)
    assert np.array_equal(np.signbit(decoded[values == 0]), np.signbit(values[values == 0]))
    returned = np.array([format.to_bits(value) for value in values.tolist()], dtype)
    assert_same_bits(framework.encode(values, format), returned, values)


@every_framework
@every_format
@pytest.mark.parametrize("rounding", ["nearest_even", "nearest_away", "toward_zero"])
@pytest.mark.parametrize("overflow", OVERFLOWS)
def test_codes_of_boundaries(framework: Framework, format: Format, rounding: Rounding, overflow: Overflow) -> None:
    x = boundaries(format)
    expected = np.array([format.to_bits(value, rounding, overflow) for value in widened(x).tolist()])
    if format.min_exponent - format.mantissa_bits < -126 and format.is_signed:
        below = (expected & format.magnitude_mask) < (1 << format.mantissa_bits)
        expected = np.where(below, expected & format.sign_mask, expected)
    codes = framework.encode(x, format, rounding=rounding, overflow=overflow)
    assert_same_bits(codes, expected.astype(np.uint8 if format.bits <= 8 else np.uint16), x)


FLOAT32 = st.integers(0, 2**32 - 1).map(lambda bits: float(np.uint32(bits).view(np.float32)))


@st.composite
def any_format(draw: Callable[[st.SearchStrategy[int]], int]) -> Format:
    """Any format of 2 to 16 bits, with or without sign, -0 and specials."""
    exponent_bits = draw(st.integers(0, 8))
    mantissa_bits = draw(st.integers(max(0, 2 - exponent_bits), 15 - exponent_bits))
    family = draw(st.sampled_from(["", "fn", "ieee", "fnuz", "nuz", "fnu"])) if exponent_bits else ""
    if (family == "ieee" and mantissa_bits == 0) or (family == "fnu" and exponent_bits < 2):
        family = "fn"
    mantissa_bits = 0 if family == "fnu" else mantissa_bits
    top = 2**exponent_bits - 1
    # Quanta from 2^-148: the smallest exponent is 1 - bias, without a sign -bias.
    largest = min(top + 124, 149 - (family == "fnu") - mantissa_bits)
    bias = draw(st.integers(top - 127, largest)) if exponent_bits else 0
    return Format(
        "drawn",
        exponent_bits,
        mantissa_bits,
        bias,
        has_inf=family in ("ieee", "nuz"),
        has_nan=family != "",
        has_negative_zero=family in ("", "fn", "ieee"),
        is_signed=family != "fnu",
    )


@every_framework
@settings(max_examples=300)
@given(FLOAT32, any_format(), st.sampled_from(OVERFLOWS), st.sampled_from(ROUNDINGS), st.integers(0, 2**24 - 1))
def test_any_input_any_format(
    framework: Framework, value: float, format: Format, overflow: Overflow, rounding: Rounding, bits: int
) -> None:
    x = np.array([value], np.float32)
    drawn = np.array([bits], np.int32) if rounding == "stochastic" else None
    modes = {"rounding": rounding, "overflow": overflow}
    expected = one_by_one(x, format, drawn, **modes)
    actual = framework.quantize(x, format, **modes, **({} if drawn is None else {"random_bits": drawn}))
    assert_same_bits(actual, expected, x, repr(format))


def test_names_of_the_registry() -> None:
    assert len(FORMAT_REGISTRY) == 38
    assert parse("float32") not in DISTINCT

"""Codes by format and by params: JAX = torch = exact, for every format of the registry."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import altgrad_jax as in_jax
import altgrad_torch as in_torch
from altgrad_core.formats import FORMAT_REGISTRY, OVERFLOWS, Format, Overflow
from parity_tests.support import MIN_NORMAL, assert_same_bits, boundaries, padded, to_torch, widened

DISTINCT = tuple(dict.fromkeys(known for known in FORMAT_REGISTRY.values() if known.bits <= 16))
every_format = pytest.mark.parametrize("format", DISTINCT, ids=str)
encode_in_jax, decode_in_jax = jax.jit(in_jax.encode), jax.jit(in_jax.decode)


@every_format
def test_every_code(format: Format) -> None:
    codes = np.arange(1 << format.bits, dtype=np.uint8 if format.bits <= 8 else np.uint16)
    book = format.code_book()
    zeros = np.copysign(0.0, book) if format.has_negative_zero else 0.0
    exact = np.where((np.abs(book) < MIN_NORMAL) & format.is_signed, zeros, book).astype(np.float32)
    exact = np.where(np.isnan(exact), np.float32(np.nan), exact)  # which has no sign
    of_torch = to_torch(codes)
    assert_same_bits(decode_in_jax(codes, in_jax.CodeParams.from_format(format)), exact, codes, "jax by params")
    assert_same_bits(in_torch.decode(of_torch, in_torch.CodeParams.from_format(format)), exact, codes, "by params")
    assert_same_bits(in_torch.decode(of_torch, format), exact, codes, "by format")


@every_format
@pytest.mark.parametrize("overflow", OVERFLOWS)
def test_codes_of_boundaries(format: Format, overflow: Overflow) -> None:
    """Around every value, midpoint and the edge of overflow: of formats of 16 bits around every 61st."""
    x = boundaries(format)
    x = padded(x if format.bits <= 8 else x[::61], 2**13)
    params = in_jax.CodeParams.from_format(format, overflow=overflow)
    by_jax = encode_in_jax(jnp.asarray(x), params)
    by_torch = in_torch.encode(to_torch(x), in_torch.CodeParams.from_format(format, overflow=overflow))
    assert_same_bits(by_torch, by_jax, x, "torch and jax by params")
    assert_same_bits(in_torch.encode(to_torch(x), format, overflow=overflow), by_jax, x, "by format")
    some = slice(None, None, 41)
    exact = np.array([format.to_bits(value, overflow=overflow) for value in widened(x[some]).tolist()])
    if format.min_exponent - format.mantissa_bits < -126 and format.is_signed:
        below = (exact & format.magnitude_mask) < (1 << format.mantissa_bits)
        exact = np.where(below, exact & format.sign_mask, exact)
    assert_same_bits(by_torch[some].contiguous(), exact.astype(np.asarray(by_jax).dtype), x[some], "exact")

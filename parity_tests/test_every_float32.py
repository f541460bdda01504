"""Casts of all 2^32 float32 values to the eight formats: JAX = torch = the thresholds of the code book, and one hash.

A cast to nearest is a staircase: between the float32 next to two midpoints nothing changes. So the expected outputs are
runs of equal bits, laid out without computing a single cast.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import pytest

from altgrad_core.formats import Format
from altgrad_jax.params import FormatParams
from parity_tests.support import EIGHT, SIGN, expected_nearest, jax_cast, torch_cast

CHUNK = 2**20  # arrays that malloc keeps: larger ones would be page faults for the most part
HASHES = json.loads((Path(__file__).parent / "every_float32.json").read_text())
"""SHA-256 of the outputs, little-endian float32 in the order of the inputs' bits; see docs/vectors.md."""

Bits = npt.NDArray[np.uint32]


def staircase(format: Format) -> tuple[Bits, Bits]:
    """Where each step of the cast begins, as bits of the magnitude, and the bits that it gives from there on."""
    grid = format.code_book()[: format.max_code + 1]
    after_max = np.ldexp(*format.finite_parts(format.max_code + 1))
    middles = (grid + np.append(grid[1:], after_max)) / 2
    middle_bits = middles.astype(np.float32).view(np.uint32)
    np.testing.assert_array_equal(middle_bits.view(np.float32), middles)  # all of them are float32
    # A tie goes to the even code: up to the next one if this one is odd.
    starts = middle_bits + (np.arange(len(grid), dtype=np.uint32) % 2 == 0)
    results = np.append(grid[1:], format.overflow_value).astype(np.float32).view(np.uint32)
    ends = np.array([0x7F800000, 0x7F800001], np.uint32)
    specials = np.array([format.overflow_value, np.nan], np.float32).view(np.uint32)
    return (
        np.concatenate([np.zeros(1, np.uint32), starts, ends]),
        np.concatenate([np.zeros(1, np.uint32), results, specials]),
    )


def expected_chunks(format: Format) -> Iterator[tuple[Bits, Bits]]:
    """Inputs and expected outputs, as bits, for all magnitudes and then all of them with a sign."""
    starts, results = staircase(format)
    for sign in (np.uint32(0), SIGN):
        for first in range(0, 2**31, CHUNK):
            edges = np.clip(np.append(starts.astype(np.int64), 2**31) - first, 0, CHUNK)
            yield np.arange(first, first + CHUNK, dtype=np.uint32) | sign, np.repeat(results, np.diff(edges)) | sign


@pytest.mark.parametrize("format", EIGHT, ids=str)
def test_staircase_is_the_cast(format: Format) -> None:
    """On a sample, against the code book's own lookup."""
    starts, results = staircase(format)
    magnitudes = np.random.default_rng(0).integers(0, 2**31, 2**14, dtype=np.uint32)
    magnitudes = np.concatenate([magnitudes, starts, starts + 1, np.maximum(starts, 1) - 1])
    looked_up = results[np.searchsorted(starts, magnitudes, side="right") - 1]
    np.testing.assert_array_equal(
        looked_up, expected_nearest(magnitudes.view(np.float32), format, "native").view(np.uint32)
    )


@pytest.mark.exhaustive
@pytest.mark.parametrize("format", EIGHT, ids=str)
def test_every_float32(format: Format) -> None:
    params, digest = FormatParams.from_format(format), hashlib.sha256()
    for inputs, expected in expected_chunks(format):
        digest.update(expected.astype("<u4").data)
        x = inputs.view(np.float32)
        in_jax = np.asarray(jax_cast(jnp.asarray(x), params)).view(np.uint32)
        assert np.array_equal(in_jax, expected), f"jax differs from {inputs[in_jax != expected][:3]} on"
        in_torch = torch_cast(x, format).view(np.uint32)
        assert np.array_equal(in_torch, expected), f"torch differs from {inputs[in_torch != expected][:3]} on"
    assert digest.hexdigest() == HASHES[format.name]

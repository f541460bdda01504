"""Random bits from a counter: their definition, their quality, and stochastic rounding by them.

All seeds are fixed, so a test that passes once passes always. Each bound is what true randomness would exceed with a
probability of about 1e-6 per test, all of its comparisons taken together.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
import pytest

from altgrad_core.hashing import hash_bits_reference

torch = pytest.importorskip("torch")

from altgrad_torch import hash_bits, quantize  # noqa: E402 (after the skip)
from altgrad_torch import hashing as in_torch  # noqa: E402

FALSE_ALARM = 1e-6
COUNT = 2**20


def deviations(comparisons: int = 1) -> float:
    """So many standard deviations a normal statistic exceeds with the probability above, in any of the comparisons."""
    return NormalDist().inv_cdf(1 - FALSE_ALARM / (2 * comparisons))


@lru_cache(8)
def drawn(count: int, seed: int, step: int = 0) -> npt.NDArray[np.uint32]:
    return hash_bits((count,), seed, step).numpy().view(np.uint32)


@pytest.mark.parametrize(("seed", "step"), [(0, 0), (1, 0), (0, 1), (2**32 - 1, 2**31), (12345, 2**32 - 1)])
def test_the_same_as_the_definition(seed: int, step: int) -> None:
    assert np.array_equal(drawn(1000, seed, step), hash_bits_reference(1000, seed, step))


def test_row_major_order() -> None:
    assert torch.equal(hash_bits((3, 4, 5), 7), hash_bits((60,), 7).reshape(3, 4, 5))
    assert hash_bits((), 7).shape == ()
    assert hash_bits((0, 3), 7).shape == (0, 3)
    assert hash_bits((2,), 7).dtype == torch.int32


def test_chunks_join(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = hash_bits((1001,), 3)
    monkeypatch.setattr(in_torch, "_CHUNK", 64)
    assert torch.equal(hash_bits((1001,), 3), whole)


def test_indices_beyond_31_bits() -> None:
    start = 2**32 - 3
    key = in_torch._mix(in_torch._mix(torch.tensor(5 + in_torch._signed(in_torch.SEED_OFFSET), dtype=torch.int32)))
    second = in_torch._mix(key + in_torch._signed(in_torch.STREAM_OFFSET))
    actual = in_torch._hashed(torch.arange(start, start + 3), key, second).numpy().view(np.uint32)
    assert np.array_equal(actual, hash_bits_reference(3, 5, start=start))


@pytest.mark.parametrize("bad", [-1, 2**32, 1.0, True, "1"])
def test_seeds_and_steps_out_of_range(bad: int) -> None:
    functions: list[Callable[..., object]] = [lambda *words: hash_bits((2,), *words), lambda *w: drawn(2, *w)]
    functions.append(lambda *words: hash_bits_reference(2, *words))
    for function in functions:
        with pytest.raises(ValueError, match=r"seed is .*; expected an integer from 0 to 2\^32 - 1"):
            function(bad)
        with pytest.raises(ValueError, match="step is"):
            function(0, bad)


def test_tensors_for_words() -> None:
    for dtype in (torch.int32, torch.int64, torch.uint32):
        assert torch.equal(
            hash_bits((9,), torch.tensor(3, dtype=dtype), torch.tensor(4, dtype=dtype)), hash_bits((9,), 3, 4)
        )
    assert torch.equal(hash_bits((9,), torch.tensor(2**32 - 1)), hash_bits((9,), 2**32 - 1))
    with pytest.raises(TypeError, match="seed is an integer"):
        hash_bits((2,), torch.tensor(1.0))


def test_more_elements_than_indices() -> None:
    with pytest.raises(ValueError, match=r"2\^32"):
        hash_bits((2**16, 2**16, 2), 0)


STREAMS = [(0, 0), (0, 1), (1, 0), (2**31, 77), (2**32 - 1, 2**32 - 1)]


@pytest.mark.parametrize(("seed", "step"), STREAMS)
def test_no_value_comes_twice(seed: int, step: int) -> None:
    """For a key the hash is a bijection of the index."""
    assert np.unique(drawn(COUNT, seed, step)).size == COUNT


@pytest.mark.parametrize(("seed", "step"), STREAMS)
@pytest.mark.parametrize("kept", [1, 4, 8, 24])
def test_mean_of_the_lowest_bits(seed: int, step: int, kept: int) -> None:
    values = (drawn(COUNT, seed, step) & (2**kept - 1)).astype(np.float64)
    expected, variance = (2**kept - 1) / 2, (4**kept - 1) / 12
    assert abs(values.mean() - expected) < deviations(len(STREAMS) * 4) * np.sqrt(variance / COUNT)


@pytest.mark.parametrize(("seed", "step"), STREAMS)
def test_each_bit_is_balanced(seed: int, step: int) -> None:
    values = drawn(COUNT, seed, step)
    ones = np.array([np.count_nonzero((values >> np.uint32(k)) & np.uint32(1)) for k in range(32)])
    assert np.abs(ones - COUNT / 2).max() < deviations(32 * len(STREAMS)) * np.sqrt(COUNT) / 2


@pytest.mark.parametrize(("seed", "step"), STREAMS)
@pytest.mark.parametrize("byte", range(4))
def test_bytes_by_chi_square(seed: int, step: int, byte: int) -> None:
    counts = np.bincount((drawn(COUNT, seed, step) >> np.uint32(8 * byte)) & np.uint32(255), minlength=256)
    chi_square = float(np.sum((counts - COUNT / 256) ** 2) / (COUNT / 256))
    freedom = 255
    # Wilson and Hilferty: the cube root of chi-square over its freedom is all but normal.
    normal = ((chi_square / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / np.sqrt(2 / (9 * freedom))
    assert abs(normal) < deviations(4 * len(STREAMS))


def correlation(left: npt.NDArray[np.uint32], right: npt.NDArray[np.uint32]) -> float:
    """Of the lowest 24 bits, times the root of the size: for independent bits a standard normal."""
    a, b = ((each & np.uint32(2**24 - 1)).astype(np.float64) / 2**24 - 0.5 for each in (left, right))
    return float(np.mean(a * b) * 12 * np.sqrt(a.size))


@pytest.mark.parametrize(("seed", "step"), STREAMS)
@pytest.mark.parametrize("lag", range(1, 9))
def test_neighbours_are_uncorrelated(seed: int, step: int, lag: int) -> None:
    values = drawn(COUNT, seed, step)
    assert abs(correlation(values[lag:], values[:-lag])) < deviations(8 * len(STREAMS))


@pytest.mark.parametrize("distance", [1, 2, 3, 64, 1024, 2**16, 2**31])
def test_steps_and_seeds_are_uncorrelated(distance: int) -> None:
    """At the same index, and where steps or seeds are counted up along with the index."""
    here = drawn(COUNT, 9, 9)
    pairs = [(here, drawn(COUNT, 9, 9 + distance)), (here, drawn(COUNT, 9 + distance, 9))]
    pairs += [(left[1:], right[:-1]) for left, right in pairs]
    assert max(abs(correlation(*pair)) for pair in pairs) < deviations(7 * 4)


def test_the_same_element_over_steps() -> None:
    """One weight sees a new draw at each step: these, too, are a sequence without correlation."""
    of_all_steps = torch.vmap(lambda step: hash_bits((16,), 5, step))(torch.arange(2**14))
    values = of_all_steps.numpy().view(np.uint32).T
    assert np.array_equal(values[:, -1], drawn(16, 5, 2**14 - 1))
    limit = deviations(16 * 9)
    for element in values:
        assert all(abs(correlation(element[lag:], element[:-lag])) < limit for lag in range(1, 9))
        mean = (element & np.uint32(2**24 - 1)).mean() / 2**24 - 0.5
        assert abs(mean) * np.sqrt(12 * element.size) < limit


@pytest.mark.parametrize("format", ["E4M3", "E7M0", "bf16", "float8_e4m3fnuz"])
@pytest.mark.parametrize("stochastic_bits", [8, 24])
def test_stochastic_rounding_is_unbiased(format: str, stochastic_bits: int) -> None:
    """The mean is the value, but for the bits of the fraction that are not drawn against: those are cut off."""
    value = 1.3
    x = torch.full((COUNT,), value)
    errors = []
    for step in range(4):
        rounded = quantize(
            x, format, rounding="stochastic", random_bits=hash_bits(x.shape, 11, step), stochastic_bits=stochastic_bits
        ).numpy()
        low, high = float(rounded.min()), float(rounded.max())
        chance = (
            np.floor((np.float64(np.float32(value)) - low) / (high - low) * 2**stochastic_bits) / 2**stochastic_bits
        )
        spread = np.sqrt(chance * (1 - chance))
        error = ((rounded - low) / (high - low) - chance) / spread
        assert abs(error.mean()) * np.sqrt(COUNT) < deviations(8 * 4 * 10)
        for lag in range(1, 9):
            assert abs(np.mean(error[lag:] * error[:-lag])) * np.sqrt(COUNT) < deviations(8 * 4 * 10)
        errors.append(error)
    between = [abs(np.mean(errors[k] * errors[j])) * np.sqrt(COUNT) for k in range(4) for j in range(k)]
    assert max(between) < deviations(8 * 6)


def test_words_of_numpy() -> None:
    for kind in (np.uint8, np.int16, np.uint32, np.int64):
        assert np.array_equal(hash_bits_reference(9, kind(100), kind(7)), hash_bits_reference(9, 100, 7))


def test_a_seed_is_one_for_all_elements_in_torch() -> None:
    """Where it is mapped, one for each example."""
    with pytest.raises(ValueError, match=r"seed has shape \(2, 3\); expected \(\), one for all elements"):
        hash_bits((1, 3), torch.arange(6).reshape(2, 3))
    with pytest.raises(ValueError, match=r"step has shape \(1,\); expected \(\), one for all elements"):
        hash_bits((1, 3), 0, torch.arange(1))
    assert torch.vmap(lambda seed: hash_bits((1, 3), seed))(torch.arange(6)).shape == (6, 1, 3)


def test_a_seed_is_one_for_all_elements_in_jax() -> None:
    jax, in_jax = pytest.importorskip("jax"), pytest.importorskip("altgrad_jax").hash_bits
    for words, shown in (
        ((jax.numpy.arange(6).reshape(2, 3),), r"seed .*2, 3"),
        ((0, jax.numpy.arange(1)), "step .*1,"),
    ):
        for function in (in_jax, jax.jit(in_jax, static_argnums=0)):
            with pytest.raises(ValueError, match=rf"{shown}\); expected \(\), one for all elements"):
                function((1, 3), *words)
    assert jax.vmap(lambda seed: in_jax((1, 3), seed))(jax.numpy.arange(6)).shape == (6, 1, 3)


def test_the_lowest_bits_of_a_negative_seed_count() -> None:
    jax = pytest.importorskip("jax")
    in_jax = pytest.importorskip("altgrad_jax").hash_bits
    expected = hash_bits_reference(4, 2**32 - 1, 2**32 - 2)
    for name in ("int8", "int16", "int32", "int64"):
        kind = getattr(torch, name)
        ours = hash_bits((4,), torch.tensor(-1, dtype=kind), torch.tensor(-2, dtype=kind))
        assert np.array_equal(ours.numpy().view(np.uint32), expected)
        with jax.enable_x64(name == "int64"):
            assert np.array_equal(in_jax((4,), jax.numpy.array(-1, name), jax.numpy.array(-2, name)), expected)


@pytest.mark.parametrize("package", ["altgrad_jax", "altgrad_torch"])
def test_shapes_of_random_bits(package: str) -> None:
    hash_bits = pytest.importorskip(package).hash_bits
    with pytest.raises(TypeError, match=r"shape is 2; expected a tuple of sizes, such as \(2,\)"):
        hash_bits(2, 5)
    with pytest.raises(TypeError, match="shape is None; expected a tuple of sizes"):
        hash_bits(None, 5)
    assert tuple(hash_bits([2], 5).shape) == (2,)

"""Casts, codes, counts and scales in JAX against a plain multiply, a sum, a shift and XLA's own casts, in one run.

Arrays are donated: without that, beyond about 32 MB, page faults are what is measured.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import gfloat
import gfloat.formats
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from altgrad_core.formats import EIGHT
from altgrad_jax import (
    CodeParams,
    FormatParams,
    decode,
    encode,
    hash_bits,
    observe,
    quantize,
    quantize_blocks,
    quantize_with_counts,
)
from altgrad_jax.casting import cast
from benchmarks.page import write_page
from benchmarks.timing import Comparison, Donated, side_by_side

_SIZES = {"2^24 elements, donated": 2**24, "2^18 elements, in cache": 2**18}
_FEW = 2**18
_ROUNDS = 25


def main() -> None:
    for comparison in comparisons():
        comparison.show()


def comparisons() -> Iterator[Comparison]:
    """One after the other, measured when asked for."""
    rng = np.random.default_rng(0)
    for label, size in _SIZES.items():
        x = rng.standard_normal(size).astype(np.float32)
        yield _casts(x, label)
        yield _codes(x, label)
        yield _counts(x, label)
        yield _cast_and_counts(x, label)
    yield _many_formats(rng.standard_normal(_FEW).astype(np.float32))
    yield _libraries(rng.standard_normal(_FEW).astype(np.float32))


def cast_contestants(x: jax.typing.ArrayLike) -> dict[str, Callable[[], object]]:
    """A multiply, and every kind of cast beside it, each on memory of its own that is donated to it."""
    contestants: dict[str, Callable[[], object]] = {"x * c": Donated(lambda x, c: x * c, x, jnp.float32(1))}
    for name in EIGHT:
        contestants[name] = Donated(cast, x, FormatParams.from_format(name, overflow="saturate"))
    contestants["bf16, wide path"] = Donated(cast, x, FormatParams.from_format("bf16"))
    contestants["E5M2, integer path"] = Donated(cast, x, FormatParams.from_format("E5M2", path="integer"))
    contestants["E4M3, stochastic by hash"] = Donated(
        lambda x, params, step: quantize(x, params, random_bits=hash_bits(x.shape, 0, step)),
        x,
        FormatParams.from_format("E4M3", rounding="stochastic"),
        jnp.uint32(1),
    )
    contestants["E4M3 in blocks of 32"] = Donated(lambda x: quantize_blocks(x, "E4M3"), x)
    contestants["astype(float8_e5m2)"] = Donated(lambda x: x.astype(jnp.float8_e5m2).astype(jnp.float32), x)
    return contestants


def _casts(x: np.ndarray, label: str) -> Comparison:
    contestants, wide = cast_contestants(x), "E5M2, wide path"
    fnuz = FormatParams.from_format("float8_e4m3fnuz", overflow="saturate")
    contestants["float8_e4m3fnuz"] = Donated(cast, x, fnuz)
    contestants[wide] = Donated(cast, x, FormatParams.from_format("E5M2", path="wide"))
    contestants["E4M3 constant, stochastic by hash"] = Donated(
        lambda x, step: quantize(x, "E4M3", rounding="stochastic", random_bits=hash_bits(x.shape, 0, step)),
        x,
        jnp.uint32(1),
    )
    contestants["hash alone"] = Donated(
        lambda x, step: jax.lax.bitcast_convert_type(hash_bits(x.shape, 0, step) >> 9, jnp.float32) + x,
        x,
        jnp.uint32(1),
    )
    contestants["E5M2, toward zero"] = Donated(lambda x: quantize(x, "E5M2", rounding="toward_zero"), x)
    wanted = dict.fromkeys(EIGHT, 0.9) | {"bf16, wide path": 0.7, wide: 0.7}
    wanted |= {"E4M3, stochastic by hash": 0.4, "E4M3 in blocks of 32": 0.5}
    return Comparison(f"Casts, {label}", "x * c", side_by_side(contestants, _ROUNDS), wanted)


def _codes(x: np.ndarray, label: str) -> Comparison:
    array, params = jnp.asarray(x), CodeParams.from_format("E5M2")
    shift = jax.jit(lambda x: (jax.lax.bitcast_convert_type(x, jnp.uint32) >> 24).astype(jnp.uint8))
    of, values = jax.jit(encode), jax.jit(decode)
    of_constant = jax.jit(lambda x: encode(x, "E5M2"))
    codes = of(array, params)
    contestants = {
        "shift to uint8": lambda: shift(array),
        "encode": lambda: of(array, params),
        "encode, E5M2 constant": lambda: of_constant(array),
        "decode": lambda: values(codes, params),
    }
    return Comparison(f"Codes, {label}", "shift to uint8", side_by_side(contestants, _ROUNDS), {"encode": 0.85})


def _counts(x: np.ndarray, label: str) -> Comparison:
    params, array = FormatParams.from_format("E5M2"), jnp.asarray(x)
    total, counted = jax.jit(jnp.sum), jax.jit(lambda x, p: observe(x, p))
    contestants = {"jnp.sum": lambda: total(array), "counts and amax": lambda: counted(array, params)}
    timings = side_by_side(contestants, _ROUNDS)
    return Comparison(f"Counts, {label}", "jnp.sum", timings, {"counts and amax": 0.9})


def _cast_and_counts(x: np.ndarray, label: str) -> Comparison:
    params = FormatParams.from_format("E5M2")
    both = jax.jit(quantize_with_counts, donate_argnums=0)
    value = jnp.array(x)

    def cast_and_counts() -> object:
        nonlocal value
        value, counts = both(value, params)
        return value, counts

    contestants = {"cast": Donated(cast, x, params), "cast and counts": cast_and_counts}
    timings = side_by_side(contestants, _ROUNDS)
    return Comparison(f"Cast and counts, {label}", "cast", timings, {"cast and counts": 1 / 2.6})


def _many_formats(x: np.ndarray) -> Comparison:
    array, eight = jnp.asarray(x), FormatParams.stack([FormatParams.from_format(name) for name in EIGHT])
    mapped = jax.jit(jax.vmap(cast, in_axes=(None, 0)))
    product = jax.jit(lambda x, c: x * c[:, None])
    factors = jnp.ones(len(EIGHT))
    contestants = {"x * c, 8 factors": lambda: product(array, factors), "8 formats": lambda: mapped(array, eight)}
    timings = side_by_side(contestants, _ROUNDS)
    return Comparison("8 formats at once by vmap, 2^18 elements", "x * c, 8 factors", timings, {"8 formats": 1 / 1.7})


def _libraries(x: np.ndarray) -> Comparison:
    params, array = FormatParams.from_format("E5M2", overflow="saturate"), jnp.asarray(x)
    info = gfloat.formats.format_info_ocp_e5m2
    ours, theirs = jax.jit(cast), jax.jit(lambda x: gfloat.round_ndarray(info, x, sat=True))
    contestants = {
        "cast to E5M2": lambda: ours(array, params),
        "gfloat.round_ndarray, jitted": lambda: theirs(array),
        "gfloat.round_ndarray in NumPy": lambda: gfloat.round_ndarray(info, x, sat=True),
        "ml_dtypes in NumPy": lambda: x.astype(ml_dtypes.float8_e5m2).astype(np.float32),
    }
    return Comparison("Other libraries, 2^18 elements", "cast to E5M2", side_by_side(contestants, 7, warmup=1))


if __name__ == "__main__":
    measured = list(comparisons())
    for measurement in measured:
        measurement.show()
    if "--write" in sys.argv[1:]:
        print(write_page("casting", "What a cast costs in JAX", measured, ["jax", "numpy", "ml_dtypes", "gfloat"]))

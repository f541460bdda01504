"""What the parity tests share: inputs worth trying, the expected bits, and the comparison of bits."""

from __future__ import annotations

import os
from fractions import Fraction
from functools import lru_cache

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch

from altgrad_core.formats import EIGHT as EIGHT_NAMES
from altgrad_core.formats import Format, Overflow, Rounding, parse
from altgrad_core.reference import quantize_reference, round_to_format
from altgrad_jax.casting import cast as jax_bare_cast
from altgrad_jax.params import FormatParams
from altgrad_torch.casting import cast as torch_bare_cast

Array = npt.NDArray[np.generic]

TORCH_DEVICE = os.environ.get("ALTGRAD_TORCH_DEVICE", "cpu")
"""Where torch's side of the tests runs; that of JAX is chosen by JAX_PLATFORMS. See docs/gpu.md."""

EIGHT = tuple(map(parse, EIGHT_NAMES))
MIN_NORMAL = 2.0**-126
SIGN = np.uint32(0x8000_0000)
SPECIAL_BITS = np.array(
    [
        *(0, 1, 2, 3, 0x1234, 0x3F_FFFF, 0x40_0000, 0x7F_FFFE, 0x7F_FFFF, 0x80_0000, 0x80_0001),  # zero, subnormals
        *(0x7F7F_FFFF, 0x7F80_0000, 0x7F80_0001, 0x7FBF_FFFF, 0x7FC0_0000, 0x7FC0_0001, 0x7FFF_FFFF),  # max, inf, NaN
    ],
    np.uint32,
)


def both_signs(magnitude_bits: npt.NDArray[np.uint32]) -> npt.NDArray[np.float32]:
    """float32 values of both signs from their magnitudes' bits."""
    return np.concatenate([magnitude_bits, magnitude_bits | SIGN]).view(np.float32)


@lru_cache(maxsize=64)
def boundaries(format: Format) -> npt.NDArray[np.float32]:
    """Every code value, every midpoint and the edge of overflow, each with its float32 neighbours, and the specials."""
    grid = format.code_book()[: format.max_code + 1]
    step = np.ldexp(*format.finite_parts(format.max_code + 1)) - grid[-1]
    points = np.concatenate([grid, (grid[1:] + grid[:-1]) / 2, grid[-1] + step * np.array([0.25, 0.5, 0.75, 1, 2])])
    bits = points[points <= np.finfo(np.float32).max].astype(np.float32).view(np.uint32)
    bits = np.unique(np.concatenate([np.maximum(bits, 1) - 1, bits, bits + 1]))
    return both_signs(np.concatenate([bits, SPECIAL_BITS]))


@lru_cache(maxsize=1)
def many_inputs() -> npt.NDArray[np.float32]:
    """All bfloat16 and all float16 values, as float32, and 2^16 random bit patterns."""
    every = np.arange(2**16, dtype=np.uint16)
    random = np.random.default_rng(0).integers(0, 2**32, 2**16, dtype=np.uint32)
    return np.concatenate(
        [
            (every.astype(np.uint32) << 16).view(np.float32),
            every.view(np.float16).astype(np.float32),
            random.view(np.float32),
        ]
    )


def padded(values: Array, size: int) -> Array:
    """Repeat the last element up to a size, so that inputs of different formats share a compiled program."""
    assert values.size <= size, f"{values.size} values do not fit {size}"
    return np.concatenate([values, np.full(size - values.size, values[-1])])


def widened(x: Array) -> npt.NDArray[np.float64]:
    """As float64. NumPy warns of signalling NaN, which are there on purpose."""
    with np.errstate(invalid="ignore"):
        return x.astype(np.float64)


def as_cast_gives(exact: npt.NDArray[np.float64], x: Array) -> npt.NDArray[np.float32]:
    """Exact results as a cast of ``x`` has to return them: float32, nothing below 2^-126, canonical NaN, sign of x."""
    magnitude = np.abs(exact)
    with np.errstate(over="ignore"):
        single = np.where(magnitude < MIN_NORMAL, 0.0, magnitude).astype(np.float32)
    bits = np.where(np.isnan(exact), np.uint32(0x7FC0_0000), single.view(np.uint32) & ~SIGN)
    return (bits | np.where(np.signbit(x), SIGN, np.uint32(0))).view(np.float32)


def expected_nearest(x: npt.NDArray[np.float32], format: Format, overflow: Overflow) -> npt.NDArray[np.float32]:
    """The expected cast of an array, from the code book."""
    return as_cast_gives(quantize_reference(x, format, overflow=overflow), x)


def expected_one_by_one(
    x: Array,
    format: Format,
    rounding: Rounding,
    overflow: Overflow = "native",
    random_bits: npt.NDArray[np.integer] | None = None,
    scale: float = 1.0,
) -> npt.NDArray[np.float32]:
    """The expected cast of an array, by rational arithmetic on each element."""
    drawn = [None] * x.size if random_bits is None else [int(bits) for bits in random_bits]
    rounded = [
        round_to_format(_over(value, scale), format, rounding=rounding, overflow=overflow, random_bits=bits)
        for value, bits in zip(widened(x).tolist(), drawn, strict=True)
    ]
    return as_cast_gives(np.array(rounded) * float(scale), x)


def _over(value: float, scale: float) -> float | Fraction:
    if scale == 1.0 or value == 0.0 or not np.isfinite(value):
        return value
    return Fraction(value) / Fraction(scale)


@jax.jit
def jax_cast(x: jax.Array, params: FormatParams, random_bits: jax.Array | None = None) -> jax.Array:
    """The JAX cast with everything traced, so that all formats of a path share one program."""
    return jax_bare_cast(x, params, random_bits)


def jax_casts(x: Array, name: str | Format, overflow: Overflow = "native") -> dict[str, Array]:
    """The JAX cast to nearest even, on every path that serves the format."""
    paths = {parse(name).cast_path, "integer"}
    return {
        f"jax {path}": np.asarray(
            jax_cast(jnp.asarray(x), FormatParams.from_format(name, overflow=overflow, path=path))
        )
        for path in sorted(paths)
    }


def to_torch(x: Array) -> torch.Tensor:
    """A NumPy array as a tensor where torch's side runs, bfloat16 included."""
    if x.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16).to(TORCH_DEVICE)
    return torch.from_numpy(x).to(TORCH_DEVICE)


def torch_cast(
    x: Array,
    name: str | Format,
    overflow: Overflow = "native",
    rounding: Rounding = "nearest_even",
    random_bits: Array | None = None,
) -> Array:
    """The torch cast on NumPy arrays."""
    drawn = None if random_bits is None else to_torch(random_bits)
    return as_numpy(torch_bare_cast(to_torch(x), parse(name), drawn, rounding=rounding, overflow=overflow))


def as_numpy(x: object) -> Array:
    """An array of either framework in NumPy, bfloat16 included."""
    if isinstance(x, torch.Tensor):
        x = x.detach().cpu()
        x = x.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if x.dtype == torch.bfloat16 else x.numpy()
    return np.asarray(x)


def bits_of(x: object) -> Array:
    """The bits of an array of either framework, as unsigned integers of its width."""
    array = np.ascontiguousarray(as_numpy(x))
    return array.view(np.dtype(f"u{array.dtype.itemsize}")).reshape(np.shape(x))


def assert_same_bits(actual: object, expected: object, inputs: object = None, what: str = "") -> None:
    """Assert equality of every bit and of dtypes; the message names the first difference."""
    assert _dtype_name(actual) == _dtype_name(expected), f"{what}: {_dtype_name(actual)}, not {_dtype_name(expected)}"
    left, right = bits_of(actual), bits_of(expected)
    assert left.shape == right.shape, f"{what}: shape {left.shape}, not {right.shape}"
    differing = np.flatnonzero(left.reshape(-1) != right.reshape(-1))
    if differing.size:
        k = int(differing[0])
        given = "" if inputs is None else f" for {bits_of(inputs).reshape(-1)[k]:#x}"
        got, wanted = left.reshape(-1)[k], right.reshape(-1)[k]
        raise AssertionError(f"{what}: {differing.size} of {left.size} differ; at {k}{given} {got:#x}, not {wanted:#x}")


def assert_same_values(actual: object, expected: object, inputs: object = None, what: str = "") -> None:
    """Assert equality of every bit, but for NaN, whose sign and payload each party chooses for itself."""
    left, right = as_numpy(actual), as_numpy(expected)
    assert np.array_equal(np.isnan(left), np.isnan(right)), f"{what}: NaN in different places"
    zero = np.zeros((), left.dtype)
    assert_same_bits(np.where(np.isnan(left), zero, left), np.where(np.isnan(right), zero, right), inputs, what)


def _dtype_name(x: object) -> str:
    return str(getattr(x, "dtype", None)).removeprefix("torch.")

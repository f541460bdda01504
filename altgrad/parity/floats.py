"""Floating-point values as places on a line: bits, magnitudes, and how many steps apart two values are."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import numpy.typing as npt

from altgrad_core.errors import InputError

Array = npt.NDArray[np.generic]
Bits = npt.NDArray[np.unsignedinteger]

_UNSIGNED = "float8_e8m0fnu"


def is_float(dtype: np.dtype) -> bool:
    """Whether a dtype is one of NumPy's or ml_dtypes' real floats of up to 64 bits.

    >>> [is_float(np.dtype(name)) for name in ("float32", "int8", "complex64", ml_dtypes.float8_e5m2)]
    [True, False, False, True]
    """
    if dtype.itemsize not in (1, 2, 4, 8) or "complex" in dtype.name:
        return False
    try:
        ml_dtypes.finfo(dtype)
    except ValueError:
        return False
    return True


def is_exact(dtype: np.dtype) -> bool:
    """Whether a dtype holds integers or truth values, ml_dtypes' narrow integers among them."""
    if dtype.kind in "biu":
        return True
    try:
        ml_dtypes.iinfo(dtype)
    except ValueError:
        return False
    return True


def bits_of(x: Array) -> Bits:
    """The bits of an array, as unsigned integers of its width; same shape.

    >>> [hex(code) for code in bits_of(np.array([1, -2], np.float32))]
    ['0x3f800000', '0xc0000000']
    """
    return np.ascontiguousarray(x).view(np.dtype(f"u{x.dtype.itemsize}")).reshape(x.shape)


def magnitudes(x: Array) -> npt.NDArray[np.uint64]:
    """How many steps each value is from zero; infinity is one step beyond max, of NaN it says nothing.

    Args:
        x: floats of any shape.

    >>> magnitudes(np.array([0, 2**-149, -(2**-148)], np.float32)).tolist()
    [0, 1, 2]
    """
    return (bits_of(x) & np.asarray(_sign_bit(x.dtype) - 1, bits_of(x).dtype)).astype(np.uint64)


def signs(x: Array) -> npt.NDArray[np.bool_]:
    """Whether the sign bit is set: also of zeros and NaN."""
    if x.dtype.name == _UNSIGNED:
        return np.zeros(x.shape, bool)
    return (bits_of(x) & np.asarray(_sign_bit(x.dtype), bits_of(x).dtype)) != 0


def is_nan(x: Array) -> npt.NDArray[np.bool_]:
    """Where NaN is, in floats of any dtype."""
    with np.errstate(invalid="ignore"):  # signalling NaN is no surprise here
        return np.isnan(x)


def is_infinite(x: Array) -> npt.NDArray[np.bool_]:
    """Where ±inf is, in floats of any dtype."""
    with np.errstate(invalid="ignore"):
        return np.isinf(x)


def ulps_between(a: Array, b: Array) -> npt.NDArray[np.uint64]:
    """How many representable steps lie between two arrays, element by element: 0 for the same value and for +0 and -0.

    Infinity is one step beyond max. Where either is NaN the number means nothing.

    Args:
        a: floats.
        b: floats of the same dtype and shape.

    Raises:
        InputError: if the dtypes differ.

    >>> ulps_between(np.array([1, 0], np.float32), np.array([1 + 2**-23, -(2**-149)], np.float32)).tolist()
    [1, 1]
    """
    if a.dtype != b.dtype:
        raise InputError(f"steps between {a.dtype} and {b.dtype} are not defined; expected one dtype")
    far, near = np.maximum(magnitudes(a), magnitudes(b)), np.minimum(magnitudes(a), magnitudes(b))
    # Unsigned: the way from -max to max has more steps than an int64 can count.
    return np.where(signs(a) == signs(b), far - near, far + near)


def is_subnormal(x: Array) -> npt.NDArray[np.bool_]:
    """Where values are subnormal: not zero, and smaller than every normal number of the dtype."""
    info = ml_dtypes.finfo(x.dtype)
    if x.dtype.name == _UNSIGNED:  # it has no subnormals
        return np.zeros(x.shape, bool)
    magnitude = magnitudes(x)
    return (magnitude > 0) & (magnitude < np.uint64(1) << np.uint64(info.nmant)) & ~is_nan(x)


def plain(value: np.generic) -> float | int | bool:
    """A scalar of any dtype as a Python number, exactly.

    >>> plain(ml_dtypes.bfloat16(1.5)), plain(np.int8(3))
    (1.5, 3)
    """
    if value.dtype.kind == "b":
        return bool(value)
    with np.errstate(invalid="ignore"):
        return float(value) if is_float(value.dtype) else int(value)


def hex_bits(value: np.generic) -> str:
    """The bits of a scalar in hexadecimal, of its width.

    >>> hex_bits(np.float16(1)), hex_bits(np.True_)
    ('0x3c00', '0x01')
    """
    return f"0x{int(bits_of(np.asarray(value))):0{2 * value.dtype.itemsize}x}"


def widened(x: Array) -> npt.NDArray[np.float64]:
    """Any floats as float64, exactly."""
    with np.errstate(invalid="ignore"):
        return np.asarray(x).astype(np.float64)


def spelled(value: float | int | bool) -> str:
    """A number as people read it: nine digits if they tell float32 values apart, else as many as float64 takes.

    >>> spelled(float(np.float32(0.1))), spelled(0.1), spelled(-0.0)
    ('0.100000001', '0.1', '-0')
    """
    if not isinstance(value, float):
        return str(value)
    if math.isnan(value):
        return "NaN"
    short = f"{value:.9g}"
    with np.errstate(over="ignore"):
        return short if value in (float(short), float(np.float32(short))) else repr(value)


def _sign_bit(dtype: np.dtype) -> int:
    width = int(ml_dtypes.finfo(dtype).bits)
    return 1 << (width if dtype.name == _UNSIGNED else width - 1)

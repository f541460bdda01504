"""Results rounded once from exact ones: what the two frameworks' results are held against."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from altgrad.parity.floats import Array, bits_of, widened

Float64 = npt.NDArray[np.float64]

_DIRECT = ("float64", "float32", "float16")


def rounded(x: Float64, dtype: np.dtype) -> Array:
    """float64 rounded once to a dtype, to nearest even; beyond max becomes what the dtype makes of it.

    ml_dtypes goes from float64 through float32, which rounds twice; here the first of the two is rounded to odd, so
    that the second decides as if it were the only one.

    >>> import ml_dtypes
    >>> x = np.array([1 + 2**-8 + 2**-40])  # just above the tie between 1 and 1 + 2^-7
    >>> x.astype(ml_dtypes.bfloat16).item(), rounded(x, np.dtype(ml_dtypes.bfloat16)).item()
    (1.0, 1.0078125)
    """
    with np.errstate(all="ignore"):
        return x.astype(dtype) if dtype.name in _DIRECT else _to_odd_float32(x).astype(dtype)


def fused(x: Array, y: Array, z: Array) -> Array:
    """``x * y + z``, rounded once (IEEE 754 fusedMultiplyAdd).

    Args:
        x: floats.
        y: of the same dtype and shape.
        z: of the same dtype and shape.

    >>> a = np.array([1 + 2**-12], np.float32)
    >>> fused(a, a, -a * a).item() == 2**-24
    True
    """
    if x.dtype == np.float64:
        return _fused_float64(widened(x), widened(y), widened(z))
    with np.errstate(all="ignore"):
        return sum_rounded(widened(x) * widened(y), widened(z), x.dtype)  # this product is exact


def sum_rounded(x: Float64, y: Float64, dtype: np.dtype) -> Array:
    """``x + y`` of float64, rounded once to a dtype."""
    with np.errstate(all="ignore"):
        total = x + y
        if dtype == np.float64:
            return total
        # What the rounding of the total lost, exactly (Knuth's TwoSum); a total that lost something is made odd.
        part = total - x
        lost = (x - (total - part)) + (y - part)
    lost = np.where(np.isfinite(total), lost, 0.0)
    toward_zero = np.where((lost != 0) & (np.signbit(lost) != np.signbit(total)), np.nextafter(total, 0.0), total)
    odd = (bits_of(toward_zero) | (lost != 0).astype(np.uint64)).view(np.float64)
    return rounded(odd, dtype)


def _to_odd_float32(x: Float64) -> npt.NDArray[np.float32]:
    nearest = x.astype(np.float32)
    inexact = (widened(nearest) != x) & ~np.isnan(x)
    beyond = inexact & (np.abs(widened(nearest)) > np.abs(x))
    toward_zero = np.where(beyond, np.nextafter(nearest, np.float32(0)), nearest)
    return (bits_of(toward_zero) | inexact.astype(np.uint32)).view(np.float32)


def _fused_float64(x: Float64, y: Float64, z: Float64) -> Float64:
    plain = x * y + z
    places = np.flatnonzero(np.isfinite(plain))
    for at in places:
        exact = Fraction(float(x.flat[at])) * Fraction(float(y.flat[at])) + Fraction(float(z.flat[at]))
        if exact != 0:  # the sign of an exact zero is that of the plain sum
            plain.flat[at] = _as_float(exact)
    return plain


def _as_float(exact: Fraction) -> float:
    try:
        return float(exact)
    except OverflowError:
        return math.copysign(math.inf, exact)

"""Sums and dot products: whether two results are the same sum, taken in another order or in another precision."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import ml_dtypes
import numpy as np

from altgrad.parity.cause import Cause
from altgrad.parity.exact import Float64
from altgrad.parity.floats import Array, widened
from altgrad_core.errors import InputError

_MOST_RESULTS = 256
"""Results that are summed exactly; more say nothing new."""
_ENOUGH = 16
"""From so many results on it is not chance that one side has less error than its dtype's accumulation allows."""
_VACUOUS = 0.25


def cause_in_sum(a: Array, b: Array, terms: Float64) -> Cause | None:
    """The cause by which two sums differ, None if either is further from the exact one than any order of summation.

    The bound for n terms is that of summation in any order with products rounded on the way, ``n u sum |t|`` (Jeannerod
    and Rump, "Improved error bounds for inner products in floating-point arithmetic", 2013), and of the result's
    rounding to its dtype. It is a worst case: where n is so large that it allows for a quarter of ``sum |t|`` it says
    nothing, and so does this function.

    Args:
        a: the differing results of a side, one dimension.
        b: those of the other.
        terms: what was summed, exactly, ``[results, n]``.
    """
    if not np.all(np.isfinite(terms)) or not (np.all(np.isfinite(widened(a))) and np.all(np.isfinite(widened(b)))):
        return None
    in_a, in_b = _accumulated_in(a, terms), _accumulated_in(b, terms)
    if in_a is None or in_b is None:
        return None
    sides = f"is within the error of {in_a} sums", f"is within that of {in_b} sums"
    if in_a == in_b:
        return Cause(("reduction order",), sides, a.size)
    if a.size < _ENOUGH:
        return Cause(("reduction order",), sides, a.size, ("dtype promotion",))
    return Cause(("dtype promotion",), sides, a.size, ("reduction order",))


def terms_of_sum(x: Array, axis: int | Sequence[int] | None, size: int, places: np.ndarray) -> Float64 | None:
    """What was summed for the results at some places, ``[places, n]``; None if there would not be ``size`` results.

    Raises:
        InputError: for an axis that x does not have.
    """
    try:
        axes = tuple(range(x.ndim)) if axis is None else np.lib.array_utils.normalize_axis_tuple(axis, x.ndim)
    except np.exceptions.AxisError as error:
        raise InputError(f"a sum is said to go over the axis {axis} of a tensor {list(x.shape)}: {error}") from None
    kept = [each for each in range(x.ndim) if each not in axes]
    rows = x.transpose(*kept, *axes).reshape(math.prod(x.shape[each] for each in kept), -1)
    return widened(rows[places[:_MOST_RESULTS]]) if len(rows) == size else None


def terms_of_dot(x: Array, y: Array, size: int, places: np.ndarray) -> Float64 | None:
    """The products that were summed for the elements of ``x @ y`` at some places, exact for 32 bits and less."""
    if not x.ndim or y.ndim not in (1, 2) or x.shape[-1] != y.shape[0] or x.dtype.itemsize > 4 or y.dtype.itemsize > 4:
        return None
    left, right = x.reshape(-1, x.shape[-1]), y.reshape(y.shape[0], -1)
    if len(left) * right.shape[1] != size:
        return None
    row, column = np.divmod(places[:_MOST_RESULTS], right.shape[1])
    return widened(left[row]) * widened(right[:, column].T)


def _accumulated_in(side: Array, terms: Float64) -> np.dtype | None:
    """The most precise dtype whose accumulation would give errors as small as these; None if none would."""
    exact = [(math.fsum(row), math.fsum(np.abs(row))) for row in terms.tolist()]
    for dtype in _accumulators(side.dtype):
        if all(
            abs(value - total) <= _bound(terms.shape[1], size, total, dtype, side.dtype)
            for value, (total, size) in zip(widened(side).tolist(), exact, strict=False)
        ):
            return dtype
    return None


def _accumulators(dtype: np.dtype) -> Iterator[np.dtype]:
    yield np.dtype(np.float64)
    if dtype.itemsize <= 4:
        yield np.dtype(np.float32)
    if dtype.itemsize < 4:
        yield dtype


def _bound(terms: int, size: float, total: float, accumulator: np.dtype, result: np.dtype) -> float:
    unit, last = (float(ml_dtypes.finfo(each).eps) / 2 for each in (accumulator, result))
    if terms * unit > _VACUOUS:
        return -1.0  # nothing is within it
    order = terms * unit * size
    smallest = float(ml_dtypes.finfo(result).smallest_subnormal)
    return order + (0.0 if accumulator == result else last * (abs(total) + order) + smallest)

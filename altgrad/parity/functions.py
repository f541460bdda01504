"""Square roots, exp, log and tanh: correctly rounded, approximations that differ, or computed in another dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from altgrad.parity.arithmetic import in_dtypes
from altgrad.parity.cause import Cause
from altgrad.parity.exact import Float64, rounded
from altgrad.parity.floats import Array, bits_of, is_nan, ulps_between, widened
from altgrad.parity.ways import Way, cause_by_ways

FUNCTIONS: Mapping[str, Callable[[Float64], Float64]] = {
    "sqrt": np.sqrt,
    "exp": np.exp,
    "log": np.log,
    "tanh": np.tanh,
}
_FAR_OFF = 8
"""Ulps within which float32 implementations of exp, log and tanh lie; the frameworks' are within 4."""


def cause_in_function(name: str, a: Array, b: Array, x: Array) -> Cause | None:
    """The cause in the result of one of :data:`FUNCTIONS`.

    Args:
        name: which function.
        a: results of a side, one dimension: those that differ and others, since a side that is always right tells more.
        b: those of the other.
        x: what they were computed from.
    """
    apart = bits_of(a) != bits_of(b)
    return cause_by_ways(a[apart], b[apart], _ways(name, x[apart], a.dtype)) or _by_distance(name, a, b, x)


def _ways(name: str, x: Array, dtype: np.dtype) -> Iterator[Way]:
    for computed, given in in_dtypes({"x": x}, dtype):
        with np.errstate(all="ignore"):
            value = rounded(FUNCTIONS[name](widened(given["x"])), computed)
        yield Way({"dtype promotion": f"computed in {computed}"}, rounded(widened(value), dtype))


def _by_distance(name: str, a: Array, b: Array, x: Array) -> Cause | None:
    """The cause where at least one side is an approximation, of which nobody knows the bits but all know the error."""
    if a.dtype.itemsize > 4:
        return None  # float64's own functions are no exact reference of float64
    with np.errstate(all="ignore"):
        best = rounded(FUNCTIONS[name](widened(x)), a.dtype)
    if not (np.array_equal(is_nan(a), is_nan(best)) and np.array_equal(is_nan(b), is_nan(best))):
        return None
    off = [int(np.where(is_nan(best), 0, ulps_between(side, best)).max(initial=0)) for side in (a, b)]
    if max(off) > (1 if name == "sqrt" else _FAR_OFF):
        return None
    differing = int(np.count_nonzero(bits_of(a) != bits_of(b)))
    sides = _told(off[0]), _told(off[1])
    if name == "sqrt":
        return Cause(("sqrt",), sides, differing)
    # The best libraries are right nearly always, which looks like float64 rounded once.
    return Cause(("library function",), sides, differing, ("dtype promotion",) if 0 in off else ())


def _told(ulps: int) -> str:
    return f"is off by up to {ulps} ulp{'s' * (ulps != 1)}" if ulps else "is correctly rounded"

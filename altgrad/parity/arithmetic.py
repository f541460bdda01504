"""The ways of arithmetic: fused or not, by quotient or reciprocal, in this dtype or a narrower one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import ml_dtypes
import numpy as np

from altgrad.parity.cause import Cause, CauseName
from altgrad.parity.exact import fused, rounded, sum_rounded
from altgrad.parity.floats import Array, widened
from altgrad.parity.ways import Way, cause_by_ways

_DTYPES = tuple(np.dtype(each) for each in (np.float32, ml_dtypes.bfloat16, np.float16))


def cause_in_arithmetic(name: str, a: Array, b: Array, inputs: Mapping[str, Array]) -> Cause | None:
    """The cause in an elementwise operation.

    Args:
        name: ``multiply_add``, ``add``, ``multiply`` or ``divide``.
        a: the differing elements of a side, one dimension.
        b: those of the other.
        inputs: the elements that they were computed from, at the same places.
    """
    return cause_by_ways(a, b, _ways(name, inputs, a.dtype))


def _ways(name: str, inputs: Mapping[str, Array], dtype: np.dtype) -> Iterator[Way]:
    for computed, given in in_dtypes(inputs, dtype):
        how = f"computed in {computed}"
        for aspect, did, value in _results(name, given):
            own: dict[CauseName, str] = {} if aspect is None else {aspect: did}
            yield Way({**own, "dtype promotion": how}, rounded(widened(value), dtype))


def in_dtypes(inputs: Mapping[str, Array], dtype: np.dtype) -> Iterator[tuple[np.dtype, dict[str, Array]]]:
    """The inputs in the result's dtype, then in each of those that one computes in."""
    for computed in (dtype, *(each for each in _DTYPES if each != dtype)):
        yield computed, {key: rounded(widened(given), computed) for key, given in inputs.items()}


def _results(name: str, given: Mapping[str, Array]) -> Iterator[tuple[CauseName | None, str, Array]]:
    """What an operation gives in the dtype of its inputs, each way with the cause it belongs to and what it does."""
    x, y = given["x"], given["y"]
    dtype = x.dtype
    with np.errstate(all="ignore"):
        times = rounded(widened(x) * widened(y), dtype)
        over = rounded(widened(x) / widened(y), dtype)
        if name == "multiply_add":
            yield "fused multiply-add", "rounded once", fused(x, y, given["z"])
            yield "fused multiply-add", "rounded twice", sum_rounded(widened(times), widened(given["z"]), dtype)
        elif name == "divide":
            inverse = rounded(1.0 / widened(y), dtype)
            yield "reciprocal", "divided", over
            yield "reciprocal", "multiplied by the reciprocal", rounded(widened(x) * widened(inverse), dtype)
        else:
            yield None, "", times if name == "multiply" else sum_rounded(widened(x), widened(y), dtype)

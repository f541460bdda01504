"""Two arrays, element by element: how each differs, by how many steps, and which is the first that matters."""

from __future__ import annotations

from collections.abc import Collection
from typing import get_args

import numpy as np
import numpy.typing as npt

from altgrad.parity.floats import (
    Array,
    bits_of,
    hex_bits,
    is_float,
    is_infinite,
    is_nan,
    magnitudes,
    plain,
    ulps_between,
    widened,
)
from altgrad.parity.records import Element, Kind, TensorRecord

_KINDS: tuple[Kind, ...] = get_args(Kind)
_IN_STEPS: tuple[Kind, ...] = ("value", "infinity")
"""Kinds of differences that are so many steps wide."""


def compare_arrays(name: str, a: Array, b: Array, tolerance: int, ignore: Collection[Kind]) -> TensorRecord:
    """The record of two arrays of one name.

    Args:
        name: for the record.
        a: floats, integers or truth values.
        b: those of the other side.
        tolerance: in steps; of use where both are finite.
        ignore: kinds of differences that do not count.
    """
    record = TensorRecord(name, (a.dtype.name, b.dtype.name), (a.shape, b.shape), a.size, tolerance_ulps=tolerance)
    if a.shape != b.shape:
        return record.with_problem("shape")
    if a.dtype != b.dtype and ("dtype" not in ignore or _no_dtype_holds_both(a, b)):
        return record.with_problem("dtype")
    if a.dtype != b.dtype:
        a, b = _in_one_dtype(a, b)
    places = np.flatnonzero(bits_of(a) != bits_of(b))
    if not places.size:
        return record
    one, other = a.reshape(-1)[places], b.reshape(-1)[places]
    kinds = _kinds(one, other)
    counted = ~_is_any(kinds, ignore)
    ulps = ulps_between(one, other) if is_float(one.dtype) else np.zeros(one.shape, np.uint64)
    measured = counted & _is_any(kinds, _IN_STEPS)
    beyond = counted & ((ulps > tolerance) | ~_is_any(kinds, ("value",)))
    shown = np.flatnonzero(beyond if np.any(beyond) else counted)
    first = None if not shown.size else int(shown[0])
    counts = np.bincount(kinds[counted], minlength=len(_KINDS)).tolist()
    return record.with_differences(
        differing=int(np.count_nonzero(counted)),
        beyond=int(np.count_nonzero(beyond)),
        largest_ulps=int(ulps[measured].max()) if np.any(measured) else None,
        kinds={kind: count for kind, count in zip(_KINDS, counts, strict=True) if count},
        first=None
        if first is None
        else _element(one[first], other[first], _KINDS[kinds[first]], int(ulps[first]), places[first], a.shape),
    )


def _no_dtype_holds_both(a: Array, b: Array) -> bool:
    """Whether there are integers from 2^63 on, of which the other dtype has none."""
    return any(x.dtype == np.uint64 and bool(np.any(x > np.uint64(2**63 - 1))) for x in (a, b))


def _in_one_dtype(a: Array, b: Array) -> tuple[Array, Array]:
    """Both as float64, which holds every float of theirs, or as int64."""
    if is_float(a.dtype) or is_float(b.dtype):
        return widened(a), widened(b)
    return a.astype(np.int64), b.astype(np.int64)


def _kinds(a: Array, b: Array) -> npt.NDArray[np.uint8]:
    """What sort of difference each of the differing elements is, as a place in the list of kinds."""
    if not is_float(a.dtype):
        return np.full(a.shape, _KINDS.index("integer"), np.uint8)
    kinds = np.full(a.shape, _KINDS.index("value"), np.uint8)
    kinds[(magnitudes(a) == 0) & (magnitudes(b) == 0)] = _KINDS.index("signed zero")
    kinds[is_infinite(a) | is_infinite(b)] = _KINDS.index("infinity")
    kinds[is_nan(a) | is_nan(b)] = _KINDS.index("nan")
    kinds[is_nan(a) & is_nan(b)] = _KINDS.index("nan payload")
    return kinds


def _is_any(kinds: npt.NDArray[np.uint8], names: Collection[Kind]) -> npt.NDArray[np.bool_]:
    return np.isin(kinds, [_KINDS.index(name) for name in names])


def _element(a: np.generic, b: np.generic, kind: Kind, ulps: int, place: int, shape: tuple[int, ...]) -> Element:
    return Element(
        index=tuple(int(each) for each in np.unravel_index(place, shape)),
        kind=kind,
        ulps=ulps if kind in _IN_STEPS else None,
        values=(plain(a), plain(b)),
        bits=(hex_bits(a), hex_bits(b)),
    )

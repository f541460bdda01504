"""The ways of a cast to a format: where ties go, what overflow becomes, whether subnormals are kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product

import ml_dtypes
import numpy as np
import numpy.typing as npt

from altgrad.parity.cause import Cause, CauseName
from altgrad.parity.exact import Float64, rounded
from altgrad.parity.floats import Array, widened
from altgrad.parity.ways import Way, cause_by_ways
from altgrad_core.formats import Format
from altgrad_core.vector_inputs import beyond_max

_MOST_BITS = 16


def cause_in_cast(a: Array, b: Array, x: Array, format: Format) -> Cause | None:
    """The cause in the result of a cast, None for formats that have no table of codes: unsigned or beyond 16 bits.

    Args:
        a: the differing elements of a side, values of the format in any dtype.
        b: those of the other.
        x: what was cast, at the same places.
        format: to which.
    """
    if not format.is_signed or format.bits > _MOST_BITS:
        return None
    return cause_by_ways(a, b, cast_ways(widened(x), format, a.dtype))


def cast_ways(x: Float64, format: Format, dtype: np.dtype) -> Iterator[Way]:
    """The ways of a cast, each with the whole array that it gives, in a dtype."""
    steps = _roundings(np.abs(x), format)
    grid = np.append(format.code_book()[: format.max_code + 1], np.inf)
    for (rounding, tie, step), (overflow, beyond), (kept, least) in product(
        steps, _overflows(x, format), _floors(format, dtype)
    ):
        magnitude = np.where(step > format.max_code, beyond, grid[step])
        magnitude = np.where(magnitude < least, 0.0, magnitude)
        negative = np.signbit(x) & ((magnitude != 0) | format.has_negative_zero)
        signed = np.where(np.isnan(x), np.nan, np.where(negative, -magnitude, magnitude))
        aspects: dict[CauseName, str] = {
            "saturation": overflow,
            "flushed subnormals": kept,
            "tie rule": tie,
            "rounding mode": rounding,
        }
        yield Way(aspects, rounded(signed, dtype))


def _roundings(magnitude: Float64, format: Format) -> list[tuple[str, str, npt.NDArray[np.intp]]]:
    """How to round, where ties go, and which place on the grid each element comes to; max_code + 1 is beyond it."""
    grid = np.append(format.code_book()[: format.max_code + 1], beyond_max(format))
    finite = np.minimum(np.where(np.isnan(magnitude), 0.0, magnitude), grid[-1])  # all from there on overflow
    below = np.minimum(np.searchsorted(grid, finite, "right") - 1, format.max_code + 1)
    above = np.minimum(below + 1, format.max_code + 1)
    between = grid[below] + grid[above]
    is_tie = (2 * finite == between) & (above > below)
    nearest = np.where(2 * finite > between, above, below)
    is_odd = below % 2 == 1
    ties: Mapping[str, npt.NDArray[np.bool_]] = {
        "sent ties to the even code": is_odd,
        "sent ties away from zero": np.ones_like(is_odd),
        "sent ties toward zero": np.zeros_like(is_odd),
        "sent ties to the odd code": ~is_odd,
    }
    found = [("to nearest", tie, np.where(is_tie, np.where(up, above, below), nearest)) for tie, up in ties.items()]
    return [*found, ("toward zero", "sent ties toward zero", below)]


def _overflows(x: Float64, format: Format) -> list[tuple[str, Float64]]:
    """What overflow becomes, and as which magnitude."""
    largest = format.max_representable_value
    native = format.overflow_value
    ways = [("saturated, infinities too", np.full_like(x, largest))]
    if native != largest:
        ways.append((f"made overflow {'NaN' if np.isnan(native) else 'inf'}", np.full_like(x, native)))
    return [*ways, ("saturated, infinities kept", np.where(np.isinf(x), np.inf, largest))]


def _floors(format: Format, dtype: np.dtype) -> list[tuple[str, float]]:
    """What becomes of small results, and the smallest magnitude that is kept."""
    of_dtype = float(ml_dtypes.finfo(dtype).smallest_normal)
    floors = [("kept subnormals", 0.0), (f"flushed subnormals of {dtype}", of_dtype)]
    return [*floors, ("flushed subnormals of the format", format.min_normal)] if format.min_normal else floors

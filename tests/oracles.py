"""What the tests of core share: the formats to try, inputs worth trying, and how gfloat spells our formats."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from gfloat import FormatInfo
from gfloat.types import Domain

from altgrad_core.formats import FORMAT_REGISTRY, Format

DISTINCT = tuple(dict.fromkeys(known for known in FORMAT_REGISTRY.values() if known.bits <= 16))
"""The registry's formats that have a code book, each under the first of its names."""

small_formats = pytest.mark.parametrize("format", DISTINCT, ids=str)


def gfloat_info(format: Format) -> FormatInfo:
    """The same format for gfloat. Its fixed point has bias 1, for it counts subnormals from 2^(1-bias)."""
    ieee = format.has_inf and format.has_negative_zero
    one_nan_on_top = format.has_nan and (format.has_negative_zero or not format.is_signed)
    return FormatInfo(
        format.name,
        k=format.bits,
        precision=format.mantissa_bits + 1,
        bias=format.bias if format.exponent_bits else 1,
        is_signed=format.is_signed,
        domain=Domain.Extended if format.has_inf else Domain.Finite,
        has_nz=format.has_negative_zero,
        num_high_nans=2**format.mantissa_bits - 1 if ieee else int(one_nan_on_top),
        has_subnormals=format.is_signed,
        is_twos_complement=False,
    )


def boundaries(format: Format, most: int = 130) -> npt.NDArray[np.float64]:
    """Code values, midpoints and the edge of overflow, each with its float64 neighbours, of both signs.

    Of formats with more than ``most`` non-negative codes it takes some, the smallest and the largest among them.
    """
    grid = format.code_book()[: format.max_code + 1]
    chosen = np.unique(
        np.concatenate([np.arange(8), np.linspace(0, grid.size - 2, most), np.arange(-9, -1) % grid.size])
    )
    chosen = chosen[chosen < grid.size - 1].astype(int)
    step = math.ldexp(*format.finite_parts(format.max_code + 1)) - grid[-1]
    edge = grid[-1] + step * np.array([-1, -0.5, 0, 0.25, 0.5, 0.75, 1, 1.5, 2, 8])
    below = grid[1] * np.array([0.25, 0.5, 0.75])
    points = np.concatenate([[0.0], grid[chosen], (grid[chosen] + grid[chosen + 1]) / 2, edge[edge > 0], below])
    points = np.unique(np.concatenate([points, np.nextafter(points, 0), np.nextafter(points, math.inf)]))
    return np.concatenate([points, -points, [math.inf, -math.inf, math.nan]])


def same(ours: float | npt.NDArray[np.float64], theirs: float | npt.NDArray[np.float64]) -> bool:
    """Whether two results are equal, the sign of zero included; all NaN are one."""
    left, right = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    nan = np.isnan(left)
    return bool(
        np.array_equal(nan, np.isnan(right))
        and np.array_equal(left[~nan], right[~nan])
        and np.array_equal(np.signbit(left[~nan]), np.signbit(right[~nan]))
    )

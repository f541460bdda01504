"""Which inputs tell a right cast from a wrong one: the boundaries of a format, and random bits."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from altgrad_core.formats import Format

_SIGN = np.uint32(0x8000_0000)
_LARGE = 3e38
_SPECIAL_BITS = np.array(
    [
        *(0, 1, 2, 3, 0x1234, 0x3F_FFFF, 0x40_0000, 0x40_0001, 0x7F_FFFE, 0x7F_FFFF, 0x80_0000, 0x80_0001),
        *(0x7F7F_FFFE, 0x7F7F_FFFF, 0x7F80_0000),  # the largest finite float32, and infinity
        *(0x7F80_0001, 0x7FBF_FFFF, 0x7FC0_0000, 0x7FC0_0001, 0x7FFF_FFFF),  # NaN, signalling and quiet
    ],
    np.uint32,
)
"""Magnitudes as bits: zero, subnormals of float32 and what surrounds 2^-126, its largest values, infinity, NaN."""


def input_bits(format: Format, *, random_inputs: int, seed: int) -> npt.NDArray[np.uint32]:
    """Inputs for a cast to a format, as float32 bits: each once, in ascending order.

    Every value of the format, every midpoint of two neighbours, where overflow begins, each with the float32 before
    and after it; zeros, infinities, NaNs, float32 subnormals; all of these with both signs. Then ``random_inputs``
    bit patterns out of all 2^32, and as many whose magnitude lies in the format's own range.

    Args:
        format: of at most 16 bits.
        random_inputs: how many of either kind of random patterns.
        seed: of the random patterns.

    >>> from altgrad_core.formats import parse
    >>> bits = input_bits(parse("E2M1"), random_inputs=0, seed=0)
    >>> bits.size, {0x7F800000, 0x80000000} <= set(bits.tolist())
    (148, True)
    """
    book = format.code_book()
    grid = book[: format.max_code + 1]
    following = np.append(grid[1:], beyond_max(format))
    edge = following[-1] * np.array([0.5, 1.0, 1.25, 2.0])
    points = np.concatenate([grid, (grid + following) / 2, edge])
    points = points[points <= np.finfo(np.float32).max]
    # A point between two float32 subnormals is rounded to one of them, which is an input like any other.
    near = points.astype(np.float32).view(np.uint32)
    around = np.concatenate([np.maximum(near, 1) - 1, near, near + 1, _SPECIAL_BITS])
    generator = np.random.default_rng(seed)
    anywhere = generator.integers(0, 2**32, random_inputs, dtype=np.uint32)
    reach = np.array([grid[grid > 0][0] / 4, min(format.max_representable_value * 4, _LARGE)], np.float32)
    lowest, highest = reach.view(np.uint32).tolist()
    within = generator.integers(lowest, highest, random_inputs, dtype=np.uint32, endpoint=True)
    within |= generator.integers(0, 2, random_inputs, dtype=np.uint32) << 31
    return np.unique(np.concatenate([around, around | _SIGN, anywhere, within]))


def beyond_max(format: Format) -> float:
    """What the code after the largest finite one would be worth, were it not special: overflow begins half way there.

    >>> from altgrad_core.formats import parse
    >>> beyond_max(parse("E4M3")), beyond_max(parse("E0M7"))
    (480.0, 1.0)
    """
    return math.ldexp(*format.finite_parts(format.max_code + 1))


def fraction_of_quantum(value: float, format: Format) -> Fraction:
    """How far a finite value lies from its neighbour towards zero, in quanta: 0 to less than 1.

    >>> from altgrad_core.formats import parse
    >>> fraction_of_quantum(1.0625, parse("E5M2"))
    Fraction(1, 4)
    """
    magnitude = abs(Fraction(value))
    if magnitude == 0:
        return Fraction(0)
    exponent = max(math.frexp(abs(value))[1] - 1, format.min_exponent)
    return magnitude / Fraction(2) ** (exponent - format.mantissa_bits) % 1

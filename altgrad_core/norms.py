"""The Euclidean norm by exact arithmetic: how torch rounds it where a float64 sum cannot tell, and what tests compare.

The square of a float32 has at most 48 bits, so a sum of squares is an integer multiple of 2^-298. Squares are summed
apart for each exponent, where no bit is lost, and put together here as one integer. Inside a jitted function there are
no such integers: ``altgrad_jax/norms.py`` comes to the same float32 by sums of slices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from altgrad_core.errors import InputError
from altgrad_core.scalars import as_real

NOT_MEASURED = -1.0
"""What ``total_norm`` reads where no norm was taken, since no norm is negative."""

EXPONENTS = 255
"""How many exponent fields finite float32 have; subnormals belong to field 1."""

LIMB_BITS = 24
"""Squares of 24-bit significands are summed in two limbs of so many bits, each in an int64: for up to 2^38 elements."""

SQUARE_EXPONENT = -298
"""The square of the smallest float32 is two to this."""

FLOAT64_ROUNDOFF = 2.0**-53
"""The most by which one float64 operation is off, relative to its result."""

ROUNDS_TO_NORMAL = 2.0**-126 * (1 - 2.0**-25)
"""The smallest real number that 24 significant bits round to 2^-126, and not to something below.

What a clip coefficient brings below it becomes zero: a CPU that flushes does that by itself, a GPU has to be told."""

_FLOAT32_MAX = (2**24 - 1) * 2**104
_SIGNIFICAND_BITS = 24
_SMALLEST_EXPONENT = -149


def check_norm_type(norm_type: float) -> float:
    """Return an order of a norm that is a positive number or inf.

    Raises:
        InputError: for anything else.
    """
    if not as_real(norm_type) > 0:
        raise InputError(f"norm_type is {norm_type!r}; expected a positive number, such as 2.0, or inf")
    return as_real(norm_type)


def norm_of_exponent_sums(low: Sequence[int], high: Sequence[int]) -> float:
    """The correctly rounded norm from sums of squares of significands, one for each exponent field.

    Args:
        low: for each field from 0 to 254, the sum of the lowest 24 bits of the squares of its significands.
        high: likewise, of the bits above.

    Returns:
        The norm, rounded to float32 (to nearest, ties to even), at most float32's maximum.

    >>> low, high = [0] * 255, [0] * 255
    >>> low[1] = 3**2 + 4**2  # the subnormals 3 and 4 times 2^-149
    >>> norm_of_exponent_sums(low, high) == 5 * 2.0**-149
    True
    """
    total = 0
    for field, (lower, upper) in enumerate(zip(low, high, strict=True)):
        total += (int(lower) + (int(upper) << LIMB_BITS)) << 2 * max(field - 1, 0)
    return round_root(total, SQUARE_EXPONENT)


def round_root(total: int, exponent: int) -> float:
    """The float32 nearest to ``sqrt(total * 2^exponent)``, ties to even, at most float32's maximum.

    Args:
        total: at least 0.
        exponent: even.

    Returns:
        The root, exact in float64.

    >>> round_root(2, 0)
    1.4142135381698608
    """
    if total == 0:
        return 0.0
    # Enough bits below the point that what is cut off can only matter by being there.
    raised = max(0, 2 * (_SIGNIFICAND_BITS + 2) - total.bit_length() + 1) // 2 + 1
    root = math.isqrt(total << 2 * raised)
    inexact = root * root != total << 2 * raised
    lowest = exponent // 2 - raised
    quantum = max(root.bit_length() + lowest - _SIGNIFICAND_BITS, _SMALLEST_EXPONENT)
    dropped = quantum - lowest
    steps = root >> dropped
    rest = 2 * (root - (steps << dropped)) + inexact
    half = 1 << dropped
    steps += rest > half or (rest == half and steps % 2 == 1)
    return float(min(steps << max(quantum, 0), _FLOAT32_MAX)) * 2.0 ** min(quantum, 0)

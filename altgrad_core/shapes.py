"""Shapes of arrays of either framework."""

from __future__ import annotations

from collections.abc import Sequence


def broadcasts_within(shape: Sequence[int], other: Sequence[int]) -> bool:
    """Whether an array of one shape broadcasts to another without enlarging that.

    Args:
        shape: of what is broadcast; sizes may be symbolic, as in what is compiled or exported for any.
        other: of what it is broadcast to.

    >>> [broadcasts_within(shape, (3, 4)) for shape in ((), (4,), (3, 1), (3, 4), (3,), (1, 3, 4))]
    [True, True, True, True, False, False]
    """
    pairs = zip(shape[::-1], other[::-1], strict=False)
    return len(shape) <= len(other) and all(size == 1 or size == length for size, length in pairs)

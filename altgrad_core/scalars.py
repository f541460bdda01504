"""What counts as a number where a user gives one: Python's, NumPy's, or any other that says it is one; no bool."""

from __future__ import annotations

import math
import numbers
from typing import TypeGuard


def as_real(value: object) -> float:
    """A real number as a float: NaN for what is none or beyond a float, so that no comparison lets it through.

    >>> import numpy as np
    >>> [as_real(value) for value in (1, np.float32(0.5), np.int64(2))]
    [1.0, 0.5, 2.0]
    >>> [as_real(value) for value in (True, np.True_, "1", None, 1j, 10**400)]
    [nan, nan, nan, nan, nan, nan]
    """
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan


def is_integer(value: object) -> TypeGuard[int]:
    """Whether a value is of an integer type.

    >>> import numpy as np
    >>> [is_integer(value) for value in (1, np.int64(1), True, 1.0, "1")]
    [True, True, False, False, False]
    """
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)

"""Ways to compute one thing: each side is held against every way, and the cause is in what their ways differ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from altgrad.parity.cause import Cause, CauseName
from altgrad.parity.floats import Array, bits_of, is_float, is_nan


@dataclass(frozen=True)
class Way:
    """A way to compute a tensor.

    Attributes:
        aspects: under the name of each cause that this way has a part in, what it does there; the same names in every
            way of an operation, the likeliest cause first.
        value: what comes out.
    """

    aspects: Mapping[CauseName, str]
    value: Array


def cause_by_ways(a: Array, b: Array, ways: Iterable[Way]) -> Cause | None:
    """The cause by which two tensors differ, None unless each of them is, in every bit, what some way gives.

    Where several pairs of ways fit, the pair that differs in the fewest aspects counts, and of those in the aspect that
    is named first; others that would do as well are the alternatives.

    Args:
        a: the differing elements, of any shape.
        b: the same of the other side.
        ways: what could have been done.
    """
    tried = list(ways)
    fits_a = [way for way in tried if same_values(a, way.value)]
    fits_b = [way for way in tried if same_values(b, way.value)]
    pairs = [(_apart(one, other), one, other) for one, other in product(fits_a, fits_b)]
    if not pairs:
        return None
    likely = list(tried[0].aspects)
    names, one, other = min(pairs, key=lambda pair: (len(pair[0]), [likely.index(name) for name in pair[0]]))
    if not names:
        return None
    as_short = dict.fromkeys(found[0] for found, *_ in pairs if len(found) == 1 and found != names)
    return Cause(names, (_told(one, names), _told(other, names)), a.size, tuple(as_short) if len(names) == 1 else ())


def same_values(a: Array, b: Array) -> bool:
    """Whether two arrays have the same dtype and bits, but for NaN, of which one is as good as another."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    same = bits_of(a) == bits_of(b)
    if is_float(a.dtype):
        same |= is_nan(a) & is_nan(b)
    return bool(np.all(same))


def _apart(one: Way, other: Way) -> tuple[CauseName, ...]:
    return tuple(name for name, did in one.aspects.items() if other.aspects[name] != did)


def _told(way: Way, names: Sequence[CauseName]) -> str:
    return ", ".join(way.aspects[name] for name in names)

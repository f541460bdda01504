"""The ways of clipping by the global norm: torch's rule, optax's, and either in float32 or float64."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from altgrad.parity.cause import Cause, CauseName
from altgrad.parity.exact import rounded
from altgrad.parity.floats import Array, widened
from altgrad.parity.ways import Way, cause_by_ways

_EPS = 1e-6
"""What torch's ``clip_grad_norm_`` adds to the norm; optax adds nothing."""
_FLOAT32 = np.dtype(np.float32)


def cause_in_coefficient(a: Array, b: Array, norm: Array, max_norm: float) -> Cause | None:
    """The cause in a coefficient ``min(1, max_norm / norm)``, float32 like its norm, elementwise."""
    return cause_by_ways(a, b, coefficient_ways(norm, max_norm))


def cause_in_clip(a: Array, b: Array, x: Array, norm: Array, max_norm: float) -> Cause | None:
    """The cause in clipped elements: ``x`` times a coefficient, or optax's ``(x / norm) * max_norm`` above max_norm."""
    return cause_by_ways(a, b, _clip_ways(x, norm, max_norm))


def coefficient_ways(norm: Array, max_norm: float) -> Iterator[Way]:
    """The ways of the coefficient, each a float32 array of the norm's shape."""
    single, limit = (rounded(each, _FLOAT32).astype(np.float32) for each in (widened(norm), np.array(max_norm)))
    for eps in (_EPS, 0.0):
        rule = f"divided by norm + {eps:g}" if eps else "divided by the norm"
        with np.errstate(all="ignore"):
            raised = single + np.float32(eps)
            ways = (
                ("in float64", "by quotient", rounded(max_norm / (widened(single) + eps), _FLOAT32)),
                ("in float32", "by quotient", limit / raised),
                ("in float32", "by reciprocal", (np.float32(1) / raised) * limit),
            )
        for precision, how, value in ways:
            aspects: dict[CauseName, str] = {
                "eps of the clip": rule,
                "reciprocal": how,
                "dtype promotion": precision,
            }
            yield Way(aspects, np.where(widened(value) < 1, value, np.float32(1)).astype(np.float32))


def _clip_ways(x: Array, norm: Array, max_norm: float) -> Iterator[Way]:
    for way in coefficient_ways(norm, max_norm):
        with np.errstate(all="ignore"):
            value = rounded(widened(x) * widened(way.value), x.dtype)
        yield Way({**way.aspects, "order of operations": "scaled by the coefficient"}, value)
    with np.errstate(all="ignore"):
        shrunk = rounded(widened(x) / widened(rounded(widened(norm), x.dtype)), x.dtype)
        value = np.where(widened(norm) < max_norm, x, rounded(widened(shrunk) * max_norm, x.dtype))
    aspects: dict[CauseName, str] = {
        "eps of the clip": "divided by the norm",
        "dtype promotion": f"in {x.dtype}",
        "reciprocal": "by quotient",
        "order of operations": "divided by the norm, then multiplied",
    }
    yield Way(aspects, value.astype(x.dtype))

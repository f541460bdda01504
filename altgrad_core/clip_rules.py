"""What a gradient's norm is clipped to, relative to a format: the rules that both frameworks share.

The first two rules need the format alone, and give their threshold here; the other two follow the gradients, and each
framework works them out from numbers that it keeps.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from altgrad_core.errors import InputError, check_choice
from altgrad_core.formats import Format, parse
from altgrad_core.scalars import as_real, is_integer
from altgrad_core.stability import REFERENCE_MAX, check_base_clip

ClipRule = Literal["max", "binades", "scaled_max", "quantile"]
"""What the threshold on the norm follows; each is ``base_clip`` times something (AltGrad rules).

``max``: the format's maximum over that of E5M2, 57344: narrow formats are clipped hard, E7M0 hardly ever. ``binades``:
the number of binades that the format spans over the 32 of E5M2: of the eight formats 7 (E0M7) to 127 (E7M0).
``scaled_max``: the maximum times the largest scale of the clipped tensors: with a base of 1 the norm at which not even
a single element could overflow. ``quantile``: a quantile of the last norms, the format aside: what is unusual now.
"""

CLIP_RULES: tuple[ClipRule, ...] = ("max", "binades", "scaled_max", "quantile")

REFERENCE_BINADES = 32
"""Binades that E5M2 spans, from 2^-16 to 2^15."""

NORMS_NEEDED = 8
"""Norms that the quantile rule has to have seen before it clips."""


def binades(format: str | Format) -> int:
    """How many powers of two lie within the range of a format, from its smallest positive value to its largest.

    >>> binades("E0M7"), binades("E5M2"), binades("E7M0")
    (7, 32, 127)
    """
    resolved = parse(format)
    return resolved.max_exponent - (resolved.min_exponent - resolved.mantissa_bits) + 1


def format_threshold(format: str | Format, base_clip: float = 1.0, rule: ClipRule = "max") -> float:
    """The threshold of a rule that needs the format alone: ``max`` or ``binades``.

    The base is rounded to float32, product and quotient are formed in float64 and the result is rounded once to
    float32. Beyond float32's range it is inf: nothing is clipped.

    Raises:
        UnknownFormatError: for an unknown format.
        ValueError: for a base that is not a positive finite number, or a rule that needs more than the format.

    >>> format_threshold("E7M0", rule="binades"), format_threshold("E5M2", 2.0)
    (3.96875, 2.0)
    """
    check_rule(rule)
    base = np.float64(np.float32(check_base_clip(base_clip)))
    if rule not in ("max", "binades"):
        raise InputError(f"the rule {rule!r} follows the gradients; expected max or binades, which need a format alone")
    measure, reference = (
        (parse(format).max_representable_value, REFERENCE_MAX)
        if rule == "max"
        else (binades(format), REFERENCE_BINADES)
    )
    with np.errstate(over="ignore"):
        return float(np.float32(base * measure / reference))


def check_rule(rule: str) -> None:
    """Refuse what is not one of :data:`CLIP_RULES`."""
    check_choice("clip rule", rule, CLIP_RULES)


def check_quantile(quantile: float | None, norm_window: int | None, rule: ClipRule) -> tuple[float, int]:
    """The quantile and the number of norms it is taken of, the median of 128 by default.

    Raises:
        InputError: for a quantile outside [0, 1], a window too short to clip by, or either with another rule.
    """
    for name, value in (("quantile", quantile), ("norm_window", norm_window)):
        if value is not None and rule != "quantile":
            raise InputError(f"{name}={value!r} would have no effect: the rule is {rule!r}, not 'quantile'")
    chosen, window = (0.5 if quantile is None else quantile), (128 if norm_window is None else norm_window)
    if not 0 <= as_real(chosen) <= 1:
        raise InputError(f"quantile is {chosen!r}; expected a fraction from 0.0 to 1.0, such as 0.5 for the median")
    if not is_integer(window) or window < NORMS_NEEDED:
        raise InputError(f"norm_window is {window!r}; expected an integer of at least {NORMS_NEEDED}")
    return float(chosen), int(window)


def quantile_index(count: int, quantile: float) -> int:
    """Which of ``count`` ordered norms is their quantile: the lower one where it lies between two.

    >>> [quantile_index(count, 0.5) for count in (1, 2, 3, 4)]
    [0, 0, 1, 1]
    """
    return math.floor(quantile * (count - 1))

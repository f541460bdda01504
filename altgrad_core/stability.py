"""Host-side rules that both frameworks share: the clip threshold and the emergency mantissa shift."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

import numpy as np

from altgrad_core.errors import InputError
from altgrad_core.formats import Format, UnknownFormatError, parse
from altgrad_core.scalars import as_real, is_integer

REFERENCE_MAX = 57344.0
"""Maximum of E5M2, the format in which a clip threshold equals its base."""

CLIP_EPSILON = 1e-6
"""What ``torch.nn.utils.clip_grad_norm_`` adds to the norm before it divides."""

_FLOAT32_MAX = float(np.finfo(np.float32).max)

FORMAT_FALLBACK: Mapping[str, str | None] = MappingProxyType(
    {
        "E7M0": "E5M2",
        "E6M1": "E5M2",
        "E5M2": None,
        "E4M3": "E5M2",
        "E3M4": "E5M2",
        "E2M5": "E3M4",
        "E1M6": "E3M4",
        "E0M7": "E3M4",
    }
)
"""Where a failing run goes: towards E5M2, which has nowhere to go (AltGrad rule)."""


def check_base_clip(base_clip: float) -> float:
    """Return a base threshold that is a positive finite number, as float32 too.

    Raises:
        ValueError: for anything else.
    """
    base = as_real(base_clip)
    if not (0 < base <= _FLOAT32_MAX and np.float32(base) > 0):
        raise InputError(f"base_clip is {base_clip!r}; expected a positive finite number, such as 1.0")
    return base


def check_rate(name: str, rate: float) -> float:
    """Return a rate that lies in [0, 1].

    Raises:
        ValueError: for a rate outside [0, 1] or NaN.
    """
    if not 0.0 <= as_real(rate) <= 1.0:
        raise InputError(f"{name} is {rate!r}; expected a fraction from 0.0 to 1.0")
    return float(rate)


def check_max_norm(max_norm: float) -> float:
    """Return a largest norm to let through that is at least 0; inf lets all through.

    Raises:
        ValueError: for a negative one or NaN.
    """
    if not as_real(max_norm) >= 0:
        raise InputError(f"max_norm is {max_norm!r}; expected a number of at least 0")
    return as_real(max_norm)


def check_epsilon(eps: float) -> float:
    """Return what is added to a norm: finite and at least 0.

    Raises:
        ValueError: for anything else.
    """
    if not 0 <= as_real(eps) < np.inf:
        raise InputError(f"eps is {eps!r}; expected a finite number of at least 0")
    return float(eps)


def clip_threshold(format: str | Format, base_clip: float = 1.0) -> float:
    """The partition-relative threshold: ``base_clip * max_representable_value / 57344`` (AltGrad rule).

    The base is rounded to float32, the product is formed in float64 and rounded once to float32, so that the result
    has the same bits here, under jit and in torch. Beyond float32's range it is inf: nothing is clipped.

    Args:
        format: a name or a :class:`~altgrad_core.formats.Format`.
        base_clip: threshold on the global norm that E5M2 would have; positive.

    Raises:
        UnknownFormatError: for an unknown name.
        ValueError: if ``base_clip`` is not a positive finite number.

    >>> clip_threshold("E5M2"), round(clip_threshold("E3M4"), 5)
    (1.0, 0.00216)
    """
    base = np.float64(np.float32(check_base_clip(base_clip)))
    with np.errstate(over="ignore"):
        return float(np.float32(base * parse(format).max_representable_value / REFERENCE_MAX))


class EmergencyMantissaShift:
    """Decides on the host when a failing run changes its format, and to which (AltGrad rule).

    A run fails when ``nan_patience`` batches in a row were NaN, or when the stall rate exceeds ``stall_threshold``.
    A valid batch resets the count of NaN batches, and so does a shift.

    Args:
        nan_patience: NaN batches in a row that trigger a shift; at least 1.
        stall_threshold: stall rate above which (not at which) a shift is triggered.

    Raises:
        ValueError: for values out of range.

    >>> shifter = EmergencyMantissaShift()
    >>> [shifter.check_and_shift("E7M0", has_nan=True, stall_rate=0.0) for _ in range(3)]
    [None, None, 'E5M2']
    """

    FORMAT_FALLBACK: ClassVar[Mapping[str, str | None]] = FORMAT_FALLBACK

    def __init__(self, nan_patience: int = 3, stall_threshold: float = 0.5) -> None:
        """Start with no NaN batch seen."""
        if not is_integer(nan_patience) or nan_patience < 1:
            raise InputError(f"nan_patience is {nan_patience!r}; expected an integer of at least 1")
        self.nan_patience = nan_patience
        self.stall_threshold = check_rate("stall_threshold", stall_threshold)
        self.consecutive_nans = 0

    def check_and_shift(self, current_format: str | Format, has_nan: bool, stall_rate: float) -> str | None:
        """Take one batch's observation and return the format to shift to, or None to stay.

        None is returned when nothing triggered and when the format has no fallback; :meth:`is_exhausted` tells the
        second case.

        Args:
            current_format: the format that the batch ran in, by any of its names or as it is.
            has_nan: whether the batch's loss or gradients were not finite.
            stall_rate: fraction of the non-zero updates that changed nothing, 0 to 1.

        Raises:
            ValueError: for a format without an entry in the fallback table, and for a stall rate outside [0, 1].
        """
        fallback = self.fallback(current_format)
        check_rate("stall_rate", stall_rate)
        self.consecutive_nans = self.consecutive_nans + 1 if has_nan else 0
        if self.consecutive_nans < self.nan_patience and not stall_rate > self.stall_threshold:
            return None
        self.consecutive_nans = 0
        return fallback

    def is_exhausted(self, current_format: str | Format) -> bool:
        """Whether the format has nowhere to fall back to.

        Raises:
            ValueError: for a format without an entry in the fallback table.
        """
        return self.fallback(current_format) is None

    def knows(self, format: str | Format) -> bool:
        """Whether the format is in the fallback table, by any of its names.

        >>> [EmergencyMantissaShift().knows(name) for name in ("E4M3", "float8_e4m3fn", "float32")]
        [True, True, False]
        """
        return self._entry(format) is not None

    def fallback(self, format: str | Format) -> str | None:
        """Where the fallback table leads from a format, by any of its names; None where it ends.

        Raises:
            ValueError: for a format without an entry in the table.

        >>> [EmergencyMantissaShift().fallback(name) for name in ("E7M0", "E5M2")]
        ['E5M2', None]
        """
        entry = self._entry(format)
        if entry is None:
            raise InputError(
                f"no fallback is known for format {str(format)!r}; the known ones are {', '.join(self.FORMAT_FALLBACK)}"
            )
        return self.FORMAT_FALLBACK[entry]

    def reset(self) -> None:
        """Forget the NaN batches seen so far."""
        self.consecutive_nans = 0

    def _entry(self, format: str | Format) -> str | None:
        """The name under which the table has the format."""
        try:
            known = parse(format)
        except UnknownFormatError:
            return None
        return next((name for name in self.FORMAT_FALLBACK if parse(name) == known), None)

"""What a controller can do to a run, as data, and the type of the functions that call for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field

from altgrad_core.events import EventKind
from altgrad_core.evidence import Evidence, RateName
from altgrad_core.formats import Rounding
from altgrad_core.scaling import ScaleRule
from altgrad_core.settings import Policy
from altgrad_core.stability import EmergencyMantissaShift


@dataclass(frozen=True)
class Remedy:
    """What a policy calls for: all of it data, so that no remedy compiles anything.

    One that names nothing to change says that something was called for and there is nothing left to try.

    Attributes:
        cause: why, in a word: ``nan``, ``stall``, ``overflow``, ...
        format: the format to shift to.
        rounding: how to round committed weights from here on.
        rollback: whether to go back to a snapshot.
        learning_rate: the factor on the learning rate from here on; 1.0 is the schedule itself.
        scales: where scales come from, from here on.
        numbers: the figures behind it.
        limits: rates and the limits that they reached. The same cause calls for the same kinds of remedy again only
            after each has fallen clearly below its limit; without any, at once.
    """

    cause: str
    format: str | None = None
    rounding: Rounding | None = None
    rollback: bool = False
    learning_rate: float | None = None
    scales: ScaleRule | None = None
    numbers: Mapping[str, float | str] = field(default_factory=dict)
    limits: Mapping[RateName, float] = field(default_factory=dict)

    @property
    def kinds(self) -> tuple[EventKind, ...]:
        """The kinds of event that it is logged as.

        >>> Remedy("nan", format="E5M2", rollback=True).kinds, Remedy("nan").kinds
        (('shift', 'rollback'), ('exhausted',))
        """
        wanted: dict[EventKind, bool] = {
            "shift": self.format is not None,
            "rounding": self.rounding is not None,
            "learning_rate": self.learning_rate is not None,
            "scales": self.scales is not None,
            "rollback": self.rollback,
        }
        return tuple(kind for kind, there in wanted.items() if there) or ("exhausted",)


Rule = Callable[[Evidence, Policy, EmergencyMantissaShift | None], Sequence[Remedy]]
"""A policy: from evidence, limits, and the rule of the shift (None where the format must stay), to remedies.

It must be pure: the same arguments give the same remedies, and the shifter is left as it is. Of the remedies the first
that may be heeded is; see :class:`altgrad_core.watch.Watch`.
"""


def shift_by_table(evidence: Evidence, shifter: EmergencyMantissaShift | None, stall_rate: float) -> Sequence[Remedy]:
    """What :class:`~altgrad_core.stability.EmergencyMantissaShift` says to the evidence (AltGrad rule).

    Args:
        evidence: its NaN count and format are looked at.
        shifter: the rule, with its patience, threshold and table; None calls for nothing.
        stall_rate: the stall rate to judge; 0 for none.

    Returns:
        A shift, the news that there is no format to fall back to, or nothing.

    >>> stuck = Evidence(9, "E5M2", finite=False, consecutive_nans=3)
    >>> shift_by_table(stuck, EmergencyMantissaShift(), stall_rate=0.0)[0].kinds
    ('exhausted',)
    """
    if shifter is None:
        return ()
    asked = copy(shifter)  # it counts: a policy must not
    asked.consecutive_nans = evidence.consecutive_nans - (not evidence.finite)
    target = asked.check_and_shift(evidence.format, not evidence.finite, stall_rate)
    if not evidence.finite and evidence.consecutive_nans >= shifter.nan_patience:
        return (Remedy("nan", target, numbers={"consecutive_nans": evidence.consecutive_nans}),)
    if stall_rate > shifter.stall_threshold:
        return (Remedy("stall", target, numbers={"stall_rate": stall_rate}),)
    return ()


def stall_threshold(shifter: EmergencyMantissaShift | None) -> float:
    """The stall rate above which a remedy is called for, also where none of the remedies is a shift."""
    return (shifter or EmergencyMantissaShift()).stall_threshold

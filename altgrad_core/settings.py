"""When a controller acts: which policy decides, over which windows, and within which limits."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from altgrad_core.errors import InputError
from altgrad_core.scalars import is_integer
from altgrad_core.stability import check_rate

if TYPE_CHECKING:
    from altgrad_core.remedies import Rule

PolicyName = Literal["by_cause", "relative_stall", "fallback_chain", "off"]
"""The policies that have a name; :mod:`altgrad_core.policies` says what each of them does."""

POLICY_NAMES: tuple[PolicyName, ...] = get_args(PolicyName)

SPIKE_FACTOR = 10.0
"""Multiple of the running median of raw norms above which one is a spike (AltGrad rule)."""

_COUNTS = (("window", 1), ("warmup", 0), ("cooldown", 0), ("runaway_patience", 1), ("rollback_patience", 1))
_RATES = (
    "overflow_limit",
    "worst_overflow_limit",
    "underflow_limit",
    "worst_underflow_limit",
    "saturation_limit",
    "release",
)
_NUMBERS: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    ("moving_share", lambda value: 0 <= value < math.inf, "a finite number of at least 0"),
    ("plateau", lambda value: value >= 0, "a number of at least 0"),
    ("runaway_margin", lambda value: value > 0, "a number above 0, or inf for no trigger"),
    ("spike_factor", lambda value: value > 1, "a number above 1, or inf for no trigger"),
    ("smallest_learning_rate", lambda value: 0 < value <= 1, "a positive finite number of at most 1"),
)


@dataclass(frozen=True)
class Policy:
    """When the controller acts. Rates are means over a window that starts anew after every decision.

    Attributes:
        rule: the policy, by name or as a function of :data:`~altgrad_core.remedies.Rule`'s kind.
        window: steps in a window; see :class:`~altgrad_core.evidence.Evidence` for which enter it.
        warmup: steps before the first decision on a rate.
        cooldown: steps after a decision in which no rate is judged.
        moving_share: ``relative_stall`` shifts where the share of updates that move is below this much of the
            baseline's.
        plateau: improvement of the mean loss from one window to the next, in nats, below which it is on a plateau.
        runaway_margin: nats above the running mean at which a loss counts as running away; inf for never.
        spike_factor: multiple of the running median above which a gradient norm is a spike; above 1, inf for none.
        runaway_patience: steps in a row with either before the run goes back to a snapshot.
        rollback_patience: non-finite steps in a row before it does; at once if parameters are not finite.
        recover_after: quiet steps before the format that the run began in is tried again; None for never.
        release: share of its limit that a rate must fall below before ``by_cause`` answers it with the same kind of
            remedy again: hysteresis.
        overflow_limit: overflow rate at and above which ``by_cause`` acts.
        worst_overflow_limit: the same, of the worst site.
        underflow_limit: underflow rate at and above which ``by_cause`` acts.
        worst_underflow_limit: the same, of the worst site.
        saturation_limit: share of updates stalled at ±max at and above which ``by_cause`` acts.
        smallest_learning_rate: the factor below which ``by_cause`` does not lower the learning rate; at most 1.

    Raises:
        InputError: for an unknown name and for values out of range.

    >>> Policy().rule, Policy("by_cause", window=10).cooldown
    ('by_cause', 50)
    """

    rule: PolicyName | Rule = "by_cause"
    window: int = 20
    warmup: int = 20
    cooldown: int = 50
    moving_share: float = 0.75
    plateau: float = 0.01
    runaway_margin: float = 0.3
    spike_factor: float = SPIKE_FACTOR
    runaway_patience: int = 3
    rollback_patience: int = 6
    recover_after: int | None = None
    release: float = 0.5
    overflow_limit: float = 0.01
    worst_overflow_limit: float = 0.1
    underflow_limit: float = 0.2
    worst_underflow_limit: float = 0.5
    saturation_limit: float = 0.2
    smallest_learning_rate: float = 0.125

    def __post_init__(self) -> None:
        """Refuse what could not work."""
        if not callable(self.rule):
            _check_rule_known(self.rule)
        for name, least in _COUNTS:
            object.__setattr__(self, name, check_count(name, getattr(self, name), least))
        for name in _RATES:
            check_rate(name, getattr(self, name))
        if self.recover_after is not None:
            object.__setattr__(self, "recover_after", check_count("recover_after", self.recover_after, 1))
        for name, allowed, expected in _NUMBERS:
            value = getattr(self, name)
            if not (isinstance(value, (int, float)) and allowed(value)):
                raise InputError(f"{name} is {value!r}; expected {expected}")


def check_count(name: str, value: int, least: int) -> int:
    """Return a number of steps that is at least ``least``.

    Raises:
        InputError: for anything else.
    """
    if not is_integer(value) or value < least:
        raise InputError(f"{name} is {value!r}; expected an integer of at least {least}")
    return int(value)


def check_factor(name: str, value: float) -> float:
    """Return a factor that is positive and finite.

    Raises:
        InputError: for anything else.
    """
    if not (isinstance(value, (int, float)) and 0 < value < math.inf):
        raise InputError(f"{name} is {value!r}; expected a positive finite number")
    return float(value)


def _check_rule_known(rule: object) -> None:
    if rule not in POLICY_NAMES:
        near = difflib.get_close_matches(str(rule), POLICY_NAMES, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise InputError(f"policy is {rule!r}; {hint}Known: {', '.join(POLICY_NAMES)}")

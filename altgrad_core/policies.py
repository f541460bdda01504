"""The policies of a controller: pure functions from evidence to the remedies they call for.

A policy keeps nothing between calls and changes nothing. When it may judge a rate, and which of its calls is heeded, is
decided in :mod:`altgrad_core.watch`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from altgrad_core.causes import by_cause as by_cause
from altgrad_core.evidence import Evidence
from altgrad_core.formats import parse
from altgrad_core.remedies import Remedy, Rule, shift_by_table, stall_threshold
from altgrad_core.settings import Policy, PolicyName, check_count
from altgrad_core.stability import EmergencyMantissaShift


def off(evidence: Evidence, policy: Policy, shifter: EmergencyMantissaShift | None) -> Sequence[Remedy]:
    """Shift after NaN batches in a row, by the fallback table, and judge no rate (AltGrad rule).

    >>> failing = Evidence(9, "E3M4", finite=False, consecutive_nans=3)
    >>> [call.format for call in off(failing, Policy("off"), EmergencyMantissaShift())]
    ['E5M2']
    """
    return shift_by_table(evidence, shifter, stall_rate=0.0)


def fallback_chain(evidence: Evidence, policy: Policy, shifter: EmergencyMantissaShift | None) -> Sequence[Remedy]:
    """:class:`~altgrad_core.stability.EmergencyMantissaShift` to the letter: NaN batches or any stall (AltGrad rule).

    >>> from altgrad_core.evidence import Reading
    >>> stalled = Evidence(9, "E3M4", window=Reading(1.0, stall=0.51))
    >>> [call.format for call in fallback_chain(stalled, Policy("fallback_chain"), EmergencyMantissaShift())]
    ['E5M2']
    """
    return shift_by_table(evidence, shifter, 0.0 if evidence.window is None else evidence.window.stall)


def relative_stall(evidence: Evidence, policy: Policy, shifter: EmergencyMantissaShift | None) -> Sequence[Remedy]:
    """Judge stalls of committed weights only: round them stochastically first, then shift with care (AltGrad rule).

    Weights that are rounded to nearest lose every update that stalls: above the shifter's threshold they are rounded
    stochastically, which keeps such updates on average. After that a stall calls for a shift by the fallback table only
    by the format's own baseline and on a plateau: the share of updates that move must have fallen below
    ``policy.moving_share`` of what it was in the format's first window, and the loss by less than ``policy.plateau``
    since the window before. NaN batches shift as in :func:`off`.

    >>> from altgrad_core.evidence import Reading
    >>> usual, now = Reading(1.0, stall=0.6), Reading(1.0, stall=0.9)
    >>> worse = Evidence(9, "E3M4", rounding="nearest_even", window=now, whole=True, previous=usual, baseline=usual)
    >>> [call.rounding for call in relative_stall(worse, Policy("relative_stall"), EmergencyMantissaShift())]
    ['stochastic']
    """
    window, previous, baseline = evidence.window, evidence.previous, evidence.baseline
    rounds_to_nearest = evidence.committed and evidence.rounding != "stochastic"
    if rounds_to_nearest and window and window.precision_stall > stall_threshold(shifter):
        return (Remedy("stall", rounding="stochastic", numbers={"stall_rate": window.stall}),)
    if not (evidence.committed and evidence.whole and window and previous and baseline):
        return shift_by_table(evidence, shifter, stall_rate=0.0)
    on_plateau = window.loss > previous.loss - policy.plateau
    has_risen = 1 - window.stall < policy.moving_share * (1 - baseline.stall)
    return shift_by_table(evidence, shifter, window.stall if on_plateau and has_risen else 0.0)


def recover(rule: Rule, after: int) -> Rule:
    """A policy that returns to the format the run began in, once ``after`` quiet steps have passed (AltGrad rule).

    A quiet step is a finite one in which ``rule`` called for nothing. The run returns no sooner than the cooldown is
    over and a full window has been judged. Each time that it then has to leave the format once more, it waits twice as
    long before it tries again.

    Args:
        rule: the policy that decides everything else.
        after: quiet steps before the first return; at least 1.

    Raises:
        InputError: if ``after`` is not a positive integer.

    >>> from altgrad_core.evidence import Reading
    >>> calm = Evidence(99, "E5M2", start_format="E4M3", window=Reading(1.0), quiet=50)
    >>> [call.format for call in recover(off, after=50)(calm, Policy("off"), EmergencyMantissaShift())]
    ['E4M3']
    """
    check_count("recover_after", after, 1)

    def recovering(evidence: Evidence, policy: Policy, shifter: EmergencyMantissaShift | None) -> Sequence[Remedy]:
        called = rule(evidence, policy, shifter)
        wait = after * 2**evidence.failed_returns
        away = parse(evidence.format) != parse(evidence.start_format)
        if called or shifter is None or not away or evidence.window is None or evidence.quiet < wait:
            return called
        numbers = {"quiet_steps": evidence.quiet, "failed_returns": evidence.failed_returns}
        return (Remedy("quiet", format=evidence.start_format, numbers=numbers),)

    return recovering


RULES: Mapping[PolicyName, Rule] = MappingProxyType(
    {"by_cause": by_cause, "relative_stall": relative_stall, "fallback_chain": fallback_chain, "off": off}
)
"""The policies by their names."""


def rule_of(policy: Policy) -> Rule:
    """The function that a policy decides with.

    >>> rule_of(Policy("off")) is off
    True
    """
    rule = policy.rule if callable(policy.rule) else RULES[policy.rule]
    return rule if policy.recover_after is None else recover(rule, policy.recover_after)

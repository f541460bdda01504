"""The policy that answers each cause with what is missing: scales, exponent bits, mantissa bits, another rounding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from altgrad_core.evidence import Evidence, RateName, Reading
from altgrad_core.formats import parse
from altgrad_core.ladder import with_more_precision, with_more_range
from altgrad_core.remedies import Remedy, shift_by_table, stall_threshold
from altgrad_core.scaling import ScaleRule
from altgrad_core.settings import Policy
from altgrad_core.stability import EmergencyMantissaShift

_STEP_DOWN = 0.5
"""A power of two, so that the lowered learning rate is exact."""


@dataclass(frozen=True)
class _Cause:
    """A cause that has reached its limits: its name, what is missing, and the rates with their limits."""

    name: Literal["overflow", "saturation", "stall", "underflow"]
    missing: Literal["range", "precision"]
    limits: Mapping[RateName, float]


def by_cause(evidence: Evidence, policy: Policy, shifter: EmergencyMantissaShift | None) -> Sequence[Remedy]:
    """Answer each cause with what is missing (AltGrad rule).

    Where scales can be changed, they come first, since they cost no bit: overflow and underflow under static scales ask
    for delayed ones, and overflow under these, which grows faster than the history knows whatever the format, for
    repaired ones. Then overflow, underflow, and committed weights that stall at ±max, ask for exponent bits; where no
    format has more, overflow halves the learning rate, down to ``policy.smallest_learning_rate``. A precision stall of
    committed weights asks for stochastic rounding, and then for mantissa bits. The format is the nearest of the eight
    with more of what is missing, or for a stall that of the fallback table if it has more mantissa bits still, but
    neither the one just left nor one that the table does not have. Of several causes what overflows or saturates comes
    first, and what costs no bit; then shifts for the others. NaN batches name no cause: they shift by that table.

    >>> hot = Evidence(9, "E4M3", window=Reading(1.0, overflow=0.02))
    >>> [(call.cause, call.format) for call in by_cause(hot, Policy("by_cause"), EmergencyMantissaShift())]
    [('overflow', 'E5M2')]
    """
    emergency = shift_by_table(evidence, shifter, stall_rate=0.0)
    if emergency or evidence.window is None:
        return emergency
    found = _causes(evidence.window, evidence.committed, policy, stall_threshold(shifter))
    remedies = (_remedy(cause, evidence, policy, shifter) for cause in found)
    return sorted((remedy for remedy in remedies if remedy is not None), key=_rank)


def _rank(remedy: Remedy) -> int:
    """First what is wrong, and what costs no bit; then the shifts for what is missing; last that nothing is left."""
    if remedy.kinds == ("exhausted",):
        return 2
    return 1 if remedy.cause in ("stall", "underflow") and remedy.format is not None else 0


def _causes(window: Reading, committed: bool, policy: Policy, stall_limit: float) -> Iterator[_Cause]:
    """The causes at work, the gravest first: what overflows is wrong, what stalls or underflows is missing."""
    overflow: dict[RateName, float] = {
        "overflow": policy.overflow_limit,
        "worst_overflow": policy.worst_overflow_limit,
    }
    underflow: dict[RateName, float] = {
        "underflow": policy.underflow_limit,
        "worst_underflow": policy.worst_underflow_limit,
    }
    if window.overflow >= policy.overflow_limit or window.worst_overflow >= policy.worst_overflow_limit:
        yield _Cause("overflow", "range", overflow)
    if committed and window.saturation >= policy.saturation_limit:
        yield _Cause("saturation", "range", {"saturation": policy.saturation_limit})
    if committed and window.precision_stall > stall_limit:  # above, not at: as the shifter has it
        yield _Cause("stall", "precision", {"precision_stall": stall_limit})
    if window.underflow >= policy.underflow_limit or window.worst_underflow >= policy.worst_underflow_limit:
        yield _Cause("underflow", "range", underflow)


def _remedy(cause: _Cause, evidence: Evidence, policy: Policy, shifter: EmergencyMantissaShift | None) -> Remedy | None:
    numbers = {f"{name}_rate": getattr(evidence.window, name) for name in cause.limits}
    if cause.name == "stall" and evidence.rounding != "stochastic":  # of committed weights: it is not None
        return Remedy(cause.name, rounding="stochastic", numbers=numbers, limits=cause.limits)
    scales = _better_scales(cause, evidence.scales)
    if scales is not None:
        return Remedy(cause.name, scales=scales, numbers=numbers)  # for good, so that it cannot be called for again
    if shifter is None:
        return None
    target = _target(cause, evidence, shifter)
    if target is not None:
        return Remedy(cause.name, format=target, numbers=numbers, limits=cause.limits)
    lower = None if evidence.learning_rate is None else evidence.learning_rate * _STEP_DOWN
    if cause.name == "overflow" and lower is not None and lower >= policy.smallest_learning_rate:
        return Remedy(cause.name, learning_rate=lower, numbers=numbers, limits=cause.limits)
    return Remedy(cause.name, numbers=numbers, limits=cause.limits)


def _target(cause: _Cause, evidence: Evidence, shifter: EmergencyMantissaShift) -> str | None:
    def allowed(name: str) -> bool:
        return name != evidence.left_format and shifter.knows(name)

    nearest = (with_more_range if cause.missing == "range" else with_more_precision)(evidence.format)
    if nearest is None or not allowed(nearest):
        return None
    # From E7M0 one bit is too little, and hysteresis lets no second shift follow until the rate has fallen.
    further = shifter.fallback(evidence.format) if cause.missing == "precision" else None
    if further is not None and allowed(further) and parse(further).mantissa_bits > parse(nearest).mantissa_bits:
        return further
    return nearest


def _better_scales(cause: _Cause, scales: ScaleRule | None) -> ScaleRule | None:
    if cause.name not in ("overflow", "underflow"):
        return None
    if scales == "static":
        return "delayed"
    return "repaired" if scales == "delayed" and cause.name == "overflow" else None

"""Windows, warm-up, cooldown and hysteresis: when a policy may judge a rate, and which of its calls is heeded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from altgrad_core.evidence import Evidence, Observation, Reading
from altgrad_core.formats import Rounding, parse
from altgrad_core.remedies import Remedy
from altgrad_core.scaling import ScaleRule
from altgrad_core.settings import Policy


@dataclass
class _Memory:
    """Plain numbers, so that they can be saved. The first five start anew after a decision."""

    recent: list[Reading] = field(default_factory=list)
    count: int = 0
    previous: Reading | None = None
    baseline: Reading | None = None
    quiet: int = 0
    nans: int = 0
    judge_from: int = 0
    ignore_through: int = -1
    last_decision: int | None = None
    left_format: str | None = None
    has_returned: bool = False
    failed_returns: int = 0
    spent: dict[str, dict[str, float]] = field(default_factory=dict)


class Watch:
    """Turns observations into evidence, and admits or holds back what a policy calls for on it.

    Args:
        policy: its windows, warm-up, cooldown and release.
        start_format: the format that the run begins in.
        layer: which layer is watched; empty for a whole run.
    """

    def __init__(self, policy: Policy, start_format: str, layer: str = "") -> None:
        self._policy = policy
        self._start_format = start_format
        self._layer = layer
        self._memory = _Memory(judge_from=policy.warmup)

    @property
    def has_shifted(self) -> bool:
        """Whether the format has ever changed, be it back again since."""
        return self._memory.left_format is not None or self._memory.has_returned

    def ignores(self, step: int) -> bool:
        """Whether a step was on its way when the last decision landed, so that it says nothing about it."""
        return step <= self._memory.ignore_through

    def take(
        self,
        seen: Observation,
        format: str,
        rounding: Rounding | None,
        learning_rate: float | None,
        scales: ScaleRule | None,
        *,
        doubted: bool = False,
    ) -> Evidence:
        """Take one observation.

        Args:
            seen: the numbers of a step.
            format: the format in force.
            rounding: of committed weights; None for float32 masters.
            learning_rate: the factor in force; None where it cannot be changed.
            scales: where scales come from; None where that cannot be changed.
            doubted: whether the step may be a fault that passes. Its rates then stay out of windows, as those of a step
                that is not finite do: one spike overflows enough to move a window's mean beyond any limit, and what is
                changed on a rate is changed for good.

        Returns:
            What a policy may judge.
        """
        memory = self._memory
        memory.nans = 0 if seen.finite else memory.nans + 1
        memory.quiet = memory.quiet + 1 if seen.finite else 0
        mean = self._mean_with(seen) if seen.finite and not doubted else None
        whole = mean is not None and memory.count % self._policy.window == 0
        evidence = Evidence(
            seen.step,
            format,
            start_format=self._start_format,
            left_format=memory.left_format,
            rounding=rounding,
            learning_rate=learning_rate,
            scales=scales,
            finite=seen.finite,
            consecutive_nans=memory.nans,
            window=mean if seen.step >= memory.judge_from else None,
            whole=whole,
            previous=memory.previous,
            baseline=memory.baseline,
            since_decision=None if memory.last_decision is None else seen.step - memory.last_decision,
            quiet=memory.quiet,
            failed_returns=memory.failed_returns,
            layer=self._layer,
        )
        if whole:
            memory.previous = mean
            memory.baseline = mean if memory.baseline is None else memory.baseline
        return evidence

    def admitted(self, calls: Sequence[Remedy]) -> Remedy | None:
        """The first remedy that is not held back by hysteresis; None where there is none."""
        memory = self._memory
        memory.quiet = 0 if calls else memory.quiet
        for call in calls:
            triggers = [f"{call.cause}:{kind}" for kind in call.kinds]
            if not any(trigger in memory.spent for trigger in triggers):
                levels: dict[str, float] = {rate: self._policy.release * limit for rate, limit in call.limits.items()}
                memory.spent |= {trigger: levels for trigger in triggers if levels}
                memory.nans = 0
                return call
        return None

    def start_anew(self, step: int, ignore_through: int) -> None:
        """Begin new windows and a cooldown after a decision.

        Args:
            step: the step that it was made on.
            ignore_through: the last step that had begun when it landed.
        """
        memory = self._memory
        fresh = _Memory()
        memory.recent, memory.count, memory.quiet = fresh.recent, fresh.count, fresh.quiet
        memory.previous, memory.baseline = fresh.previous, fresh.baseline
        memory.judge_from = max(self._policy.warmup, step + self._policy.cooldown)
        memory.ignore_through, memory.last_decision = ignore_through, step

    def note_shift(self, old: str, new: str) -> None:
        """Remember where a shift led from and to: back to where the run began, or away from there once more."""
        memory, start = self._memory, parse(self._start_format)
        returns = parse(new) == start
        memory.failed_returns += parse(old) == start and memory.has_returned
        memory.has_returned = memory.has_returned or returns
        # What was left may be shifted to again once the format that the run began in has been tried anew.
        memory.left_format = None if returns else old

    def saved(self) -> dict[str, Any]:
        """Everything it remembers, JSON-ready."""
        return asdict(self._memory)

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Take up what :meth:`saved` returned."""
        self._memory = memory = _Memory(**saved)
        memory.recent = [Reading(**each) for each in saved["recent"]]
        memory.previous, memory.baseline = _reading(saved["previous"]), _reading(saved["baseline"])
        memory.spent = dict(saved["spent"])

    def _mean_with(self, seen: Observation) -> Reading | None:
        """The mean over the window that a finite step completes, and the triggers that it sets free again."""
        memory = self._memory
        memory.recent = [*memory.recent, Reading.of(seen)][-self._policy.window :]
        memory.count += 1
        if len(memory.recent) < self._policy.window:
            return None
        mean = Reading.mean(memory.recent)
        memory.spent = {
            trigger: levels
            for trigger, levels in memory.spent.items()
            if any(getattr(mean, rate) >= level for rate, level in levels.items())
        }
        return mean


def _reading(saved: Mapping[str, float] | None) -> Reading | None:
    return None if saved is None else Reading(**saved)

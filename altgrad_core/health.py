"""Whether a run is poisoned, so that only a snapshot helps. Told apart from whether its format can carry it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from altgrad_core.clip_rules import NORMS_NEEDED
from altgrad_core.events import Event
from altgrad_core.evidence import Observation
from altgrad_core.settings import Policy

NORM_WINDOW = 32
"""Norms of past steps that a spike is told by."""

LOSSES_NEEDED = 8
"""Losses that the running mean starts from, as their median: one alone may be far from what is usual."""


@dataclass
class _Memory:
    """Plain numbers, so that they can be saved.

    The first losses are those seen before there is a mean; the norms are of steps that showed nothing, newest last.
    """

    nans: int = 0
    runaway: int = 0
    spikes: int = 0
    first_losses: list[float] = field(default_factory=list)
    mean_loss: float | None = None
    norms: list[float] = field(default_factory=list)


class Health:
    """Counts the signs of a poisoned run.

    Args:
        policy: its margins and patience.

    >>> health = Health(Policy(rollback_patience=2))
    >>> [health.judge(Observation(step, float("nan"), finite=False)) is not None for step in range(2)]
    [False, True]
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._memory = _Memory()

    @property
    def calm(self) -> bool:
        """Whether the last observation gave no reason to doubt the run."""
        return self._memory.nans == 0 and self._memory.runaway == 0 and self._memory.spikes == 0

    def judge(self, seen: Observation) -> Event | None:
        """Take one observation, and say whether the run should go back to a snapshot."""
        memory, policy = self._memory, self._policy
        memory.nans = 0 if seen.finite else memory.nans + 1
        memory.runaway = memory.runaway + 1 if seen.finite and self._runs_away(seen.loss) else 0
        usual = median(memory.norms) if len(memory.norms) >= NORMS_NEEDED else None
        # One spike is a bad batch. Several in a row are a bad weight: the loss may tell so much later, or never.
        spiking = seen.finite and usual is not None and seen.norm > policy.spike_factor * usual
        memory.spikes = memory.spikes + 1 if spiking else 0
        if seen.finite and 0 < seen.norm < math.inf and not spiking:
            memory.norms = [*memory.norms, seen.norm][-NORM_WINDOW:]
        if not seen.params_finite:
            return Event(seen.step, "rollback", "poisoned weights", {"loss": seen.loss})
        if memory.nans >= policy.rollback_patience:
            return Event(seen.step, "rollback", "nan", {"consecutive_nans": memory.nans})
        if memory.runaway >= policy.runaway_patience:
            return Event(seen.step, "rollback", "runaway loss", {"loss": seen.loss, "mean": memory.mean_loss or 0.0})
        if memory.spikes >= policy.runaway_patience:
            return Event(seen.step, "rollback", "norm spikes", {"norm": seen.norm, "median": usual or 0.0})
        return None

    def start_anew(self) -> None:
        """Forget everything, after the run went back.

        The loss of the snapshot may lie well above the mean since then: that would send the run back for ever.
        """
        self._memory = _Memory()

    def _runs_away(self, loss: float) -> bool:
        """Whether a finite loss lies above the running mean by more than the margin; if not, it enters the mean."""
        memory = self._memory
        if memory.mean_loss is None:
            # A mean that began with one low loss would send a run that has just gone back there once more, and one
            # that took in a spike would see nothing run away: hence several, and their median.
            memory.first_losses = [*memory.first_losses, loss]
            if len(memory.first_losses) == LOSSES_NEEDED:
                memory.mean_loss, memory.first_losses = median(memory.first_losses), []
            return False
        if loss > memory.mean_loss + self._policy.runaway_margin:
            return True
        memory.mean_loss = 0.9 * memory.mean_loss + 0.1 * loss
        return False

    def saved(self) -> dict[str, Any]:
        """Everything it remembers, JSON-ready."""
        return asdict(self._memory)

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Take up what :meth:`saved` returned."""
        self._memory = _Memory(**saved)

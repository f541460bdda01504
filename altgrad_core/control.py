"""The controller of a run, without a framework: observations in, decisions out, each with the events that say why."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

from altgrad_core.errors import InputError
from altgrad_core.events import Event, EventKind
from altgrad_core.evidence import Observation
from altgrad_core.formats import Rounding, parse
from altgrad_core.health import Health
from altgrad_core.policies import rule_of
from altgrad_core.remedies import Remedy, Rule
from altgrad_core.scaling import ScaleRule
from altgrad_core.settings import Policy, PolicyName, check_factor
from altgrad_core.stability import EmergencyMantissaShift
from altgrad_core.watch import Watch

DECISIONS: tuple[EventKind, ...] = ("shift", "rounding", "learning_rate", "scales", "rollback", "exhausted")
"""The kinds of event that a controller logs."""


@dataclass(frozen=True)
class Decision:
    """What to do to a run.

    Attributes:
        format: the format to shift to, or None.
        rounding: the rounding of committed weights to change to, or None.
        rollback: whether to go back to the oldest snapshot.
        events: the same as lines for the log, with what called for it.
        learning_rate: the factor on the learning rate to change to, or None.
        scales: where scales are to come from, or None for no change.
    """

    format: str | None = None
    rounding: Rounding | None = None
    rollback: bool = False
    events: tuple[Event, ...] = ()
    learning_rate: float | None = None
    scales: ScaleRule | None = None

    @property
    def acts(self) -> bool:
        """Whether the state has to change."""
        changes = (self.format, self.rounding, self.learning_rate, self.scales)
        return self.rollback or any(change is not None for change in changes)


class ControllerOptions(TypedDict, total=False):
    """What :class:`Controller` takes beside the format, for classes that hand it on."""

    policy: Policy | PolicyName | Rule | None
    shifter: EmergencyMantissaShift | None
    rounding: Rounding | None
    can_roll_back: bool
    learning_rate: float | None
    scales: ScaleRule | None


class Controller:
    """Keeps one run alive: changes its format, rounding, learning rate or scales, or sends it back to a snapshot.

    Whether the run is poisoned is judged by :class:`~altgrad_core.health.Health`, all else by the policy.

    Args:
        format: the format that the run starts in.
        policy: when to act: the settings, a policy's name, or a function of :data:`~altgrad_core.remedies.Rule`'s kind.
        shifter: the rule of the shift, with its patience and threshold; None for a run whose format must stay.
        rounding: how committed weights are rounded, or None for float32 masters.
        can_roll_back: whether snapshots are kept.
        learning_rate: the factor on the learning rate, or None where the run cannot change it.
        scales: where scales come from, or None where the run cannot change it.

    Raises:
        ValueError: if a shift is asked for in a format that has no entry in the fallback table, such as float32; for
            an unknown policy, and for a return to the first format in a run whose format must stay.

    >>> controller = Controller("E7M0", shifter=EmergencyMantissaShift(nan_patience=2))
    >>> [controller.observe(Observation(step, float("nan"), finite=False)).format for step in range(2)]
    [None, 'E5M2']
    """

    def __init__(
        self,
        format: str,
        *,
        policy: Policy | PolicyName | Rule | None = None,
        shifter: EmergencyMantissaShift | None = None,
        rounding: Rounding | None = None,
        can_roll_back: bool = False,
        learning_rate: float | None = None,
        scales: ScaleRule | None = None,
    ) -> None:
        self.format = str(parse(format))
        self.rounding = rounding
        self.learning_rate = learning_rate
        self.scales = scales
        self.policy = policy if isinstance(policy, Policy) else Policy() if policy is None else Policy(policy)
        self.shifter = shifter
        self.can_roll_back = can_roll_back
        self.events: list[Event] = []
        self._unread: deque[tuple[int, Callable[[], Mapping[str, float]]]] = deque()
        self._health = Health(self.policy)
        self._watch = Watch(self.policy, self.format)
        self._rule = rule_of(self.policy)
        self._check_shifter()

    def observe(self, seen: Observation, *, in_flight: int | None = None) -> Decision:
        """Take one step's observation and decide.

        Args:
            seen: the numbers of a step.
            in_flight: the last step that was already started when the decision lands; what it shows is not judged,
                since it ran before the decision.

        Returns:
            What to do; a decision that does not act is the usual one.

        Raises:
            InputError: if a policy of one's own calls for what the run cannot do.
        """
        if self._watch.ignores(seen.step):
            return Decision()
        back = self._health.judge(seen)
        evidence = self._watch.take(seen, self.format, self.rounding, self.learning_rate, self.scales)
        remedy = self._watch.admitted(self._rule(evidence, self.policy, self.shifter))
        events = (back,) if back is not None and self.can_roll_back else ()
        decision = Decision(rollback=bool(events), events=events)
        if remedy is not None:
            self._check_can_be_done(remedy)
            decision = Decision(
                remedy.format,
                remedy.rounding,
                decision.rollback or remedy.rollback,
                (*events, *self._told(remedy, seen)),
                remedy.learning_rate,
                remedy.scales,
            )
        if decision.events:
            ignore_through = in_flight if decision.acts and in_flight is not None else seen.step
            self._start_anew(decision, seen.step, ignore_through)
        return decision

    def observe_late(self, step: int, read: Callable[[], Mapping[str, float]]) -> Decision:
        """Take a step whose numbers are still being computed, and decide on those of the step before it.

        So nobody waits for a device: what a step showed is read once the next one is on its way.

        Args:
            step: its number.
            read: gives the numbers, under the names of :class:`~altgrad_core.evidence.Observation`, once they are due.

        Returns:
            What to do; nothing at the first step.
        """
        self._unread.append((step, read))
        return self._read(in_flight=step) if len(self._unread) > 1 else Decision()

    def observe_last(self) -> Decision:
        """Decide on the last step, whose numbers no further :meth:`observe_late` would read."""
        return self._read(in_flight=None) if self._unread else Decision()

    @property
    def calm(self) -> bool:
        """Whether the last observation gave no reason to doubt the run: the time to take a snapshot."""
        return self._health.calm

    def saved(self) -> dict[str, Any]:
        """Everything the controller remembers, as JSON-ready values (numbers that were not read yet excepted)."""
        return {
            "format": self.format,
            "rounding": self.rounding,
            "learning_rate": self.learning_rate,
            "scales": self.scales,
            "health": self._health.saved(),
            "watch": self._watch.saved(),
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Take up what :meth:`saved` returned."""
        self.format, self.rounding = saved["format"], saved["rounding"]
        self.learning_rate, self.scales = saved["learning_rate"], saved["scales"]
        self._health.restore(saved["health"])
        self._watch.restore(saved["watch"])

    def _read(self, in_flight: int | None) -> Decision:
        step, read = self._unread.popleft()
        return self.observe(Observation.of(step, read()), in_flight=in_flight)

    def _check_step_can_carry_out(self, roll_back: object) -> None:
        """Refuse what a loop that only writes formats and rolls back could not do, before it is decided."""
        if self.rounding is not None:
            raise InputError("step() cannot change how weights are rounded: use observe() and write what it decides")
        if self.learning_rate is not None:
            raise InputError("step() cannot change the learning rate: use observe() and write what it decides")
        if self.scales is not None:
            raise InputError("step() cannot change where scales come from: use observe() and write what it decides")
        if (roll_back is not None) != self.can_roll_back:
            raise InputError(
                f"can_roll_back is {self.can_roll_back} but roll_back is {roll_back!r}; give both or neither"
            )

    def _start_anew(self, decision: Decision, step: int, ignore_through: int) -> None:
        if decision.format is not None:
            self._watch.note_shift(self.format, decision.format)
        if decision.rollback:
            self._health.start_anew()
        self.format = decision.format or self.format
        self.rounding = decision.rounding or self.rounding
        self.learning_rate = decision.learning_rate or self.learning_rate
        self.scales = decision.scales or self.scales
        self._watch.start_anew(step, ignore_through)
        self.events.extend(decision.events)

    def _told(self, remedy: Remedy, seen: Observation) -> list[Event]:
        """The events of a remedy, each with where it leads from and to, and the sites of the rates that it answers."""
        sites = {f"{name}_site": site for name, site in seen.worst_sites.items() if f"{name}_rate" in remedy.numbers}
        ways: dict[EventKind, dict[str, float | str | None]] = {
            "shift": {"from": self.format, "to": remedy.format},
            "rounding": {"to": remedy.rounding},
            "learning_rate": {"from": self.learning_rate, "to": remedy.learning_rate},
            "scales": {"from": self.scales, "to": remedy.scales},
            "exhausted": {"from": self.format},
        }
        numbers = {kind: {name: end for name, end in way.items() if end is not None} for kind, way in ways.items()}
        told = {**remedy.numbers, **sites}
        return [Event(seen.step, kind, remedy.cause, {**told, **numbers.get(kind, {})}) for kind in remedy.kinds]

    def _check_can_be_done(self, remedy: Remedy) -> None:
        """Refuse what only a policy of one's own can call for: the named ones know what the run can do."""
        if remedy.format is not None:
            parse(remedy.format)
            self._check_has(self.shifter is not None, "another format", "a shifter")
        if remedy.rounding is not None:
            self._check_has(self.rounding is not None, "another rounding", "committed weights (rounding)")
        if remedy.learning_rate is not None:
            check_factor("the factor on the learning rate", remedy.learning_rate)
            there = self.learning_rate is not None
            self._check_has(there, "another learning rate", "a factor to change (learning_rate)")
        if remedy.scales is not None:
            self._check_has(self.scales is not None, "other scales", "scales to change (scales)")
        if remedy.rollback:
            self._check_has(self.can_roll_back, "a rollback", "snapshots (can_roll_back)")

    def _check_has(self, there: bool, wanted: str, needed: str) -> None:
        if not there:
            raise InputError(f"policy {self.policy.rule!r} calls for {wanted}; expected a run with {needed}")

    def _check_shifter(self) -> None:
        if self.shifter is None and self.policy.recover_after is not None:
            raise InputError(
                f"recover_after is {self.policy.recover_after} in a run whose format must stay; expected a shifter"
            )
        if self.shifter is not None and not self.shifter.knows(self.format):
            raise InputError(
                f"a {self.format} run cannot shift: it is not in the fallback table; expected one of "
                f"{', '.join(self.shifter.FORMAT_FALLBACK)}"
            )

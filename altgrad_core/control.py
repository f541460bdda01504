"""The controller of a run, without a framework: observations in, decisions out, each with the events that say why.

A run whose layers have formats of their own is judged layer by layer, by the same policy; what is not a format, such as
the learning rate, is the whole run's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypedDict, get_args

from altgrad_core.errors import InputError, check_choice
from altgrad_core.events import Event, EventKind, jsonable, unjsonable
from altgrad_core.evidence import Observation, read_by_observations
from altgrad_core.formats import ROUNDINGS, Rounding, parse
from altgrad_core.health import Health
from altgrad_core.parts import Part, parts_of
from altgrad_core.policies import rule_of
from altgrad_core.remedies import Remedy, Rule
from altgrad_core.scaling import ScaleRule
from altgrad_core.settings import Policy, PolicyName, check_factor
from altgrad_core.stability import EmergencyMantissaShift

DECISIONS: tuple[EventKind, ...] = ("shift", "rounding", "learning_rate", "scales", "rollback", "exhausted")
"""The kinds of event that a controller logs."""


@dataclass(frozen=True)
class Decision:
    """What to do to a run.

    Attributes:
        format: the format that the whole run shifts to, or None.
        rounding: the rounding of committed weights to change to, or None.
        rollback: whether to go back to the oldest snapshot.
        events: the same as lines for the log, with what called for it.
        learning_rate: the factor on the learning rate to change to, or None.
        scales: where scales are to come from, or None for no change.
        formats: the layers that shift, each with the format to shift to.
    """

    format: str | None = None
    rounding: Rounding | None = None
    rollback: bool = False
    events: tuple[Event, ...] = ()
    learning_rate: float | None = None
    scales: ScaleRule | None = None
    formats: Mapping[str, str] = field(default_factory=dict)

    @property
    def acts(self) -> bool:
        """Whether the state has to change."""
        return self.concerns_all or bool(self.formats)

    @property
    def concerns_all(self) -> bool:
        """Whether something changes for the whole run."""
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

    Whether the run is poisoned is judged by :class:`~altgrad_core.health.Health`, all else by the policy. Of a run in
    layers it judges each by its own rates (see :meth:`~altgrad_core.evidence.Observation.of`), and shifts it alone;
    NaN batches, which no layer can be told by, shift all of them.

    Args:
        format: the format that the run starts in, or a mapping from its layers to the format that each starts in.
        policy: when to act: the settings, a policy's name, or a function of :data:`~altgrad_core.remedies.Rule`'s kind.
        shifter: the rule of the shift, with its patience and threshold; None for a run whose format must stay.
        rounding: how committed weights are rounded, or None for float32 masters.
        can_roll_back: whether snapshots are kept.
        learning_rate: the factor on the learning rate, or None where the run cannot change it.
        scales: where scales come from, or None where the run cannot change it.

    Raises:
        ValueError: if a shift is asked for in a format that has no entry in the fallback table, such as float32; for
            an unknown policy, rounding or rule of scales, a factor that is not positive and finite, and for a return to
            the first format, or layers, in a run whose format must stay.

    >>> controller = Controller("E7M0", shifter=EmergencyMantissaShift(nan_patience=2))
    >>> [controller.observe(Observation(step, float("nan"), finite=False)).format for step in range(2)]
    [None, 'E5M2']
    >>> controller = Controller(
    ...     {"mlp": "E4M3", "logits": "E4M3"},
    ...     policy=Policy("by_cause", window=1, warmup=0),
    ...     shifter=EmergencyMantissaShift(),
    ... )
    >>> metrics = {"loss": 2.5, "finite": True, "mlp/overflow_rate": 0.0, "logits/overflow_rate": 0.25}
    >>> controller.observe(Observation.of(0, metrics)).formats
    {'logits': 'E5M2'}
    """

    def __init__(
        self,
        format: str | Mapping[str, str],
        *,
        policy: Policy | PolicyName | Rule | None = None,
        shifter: EmergencyMantissaShift | None = None,
        rounding: Rounding | None = None,
        can_roll_back: bool = False,
        learning_rate: float | None = None,
        scales: ScaleRule | None = None,
    ) -> None:
        _check_names(rounding, scales)
        self.rounding = rounding
        self.learning_rate = None if learning_rate is None else check_factor("learning_rate", learning_rate)
        self.scales = scales
        self.policy = policy if isinstance(policy, Policy) else Policy() if policy is None else Policy(policy)
        self.shifter = shifter
        self.can_roll_back = can_roll_back
        self.events: list[Event] = []
        self._unread: deque[tuple[int, Callable[[], Mapping[str, float | str]]]] = deque()
        self._health = Health(self.policy)
        self._parts = parts_of(format, self.policy)
        self._rule = rule_of(self.policy)
        self._check_shifter()

    @property
    def format(self) -> str:
        """The format in force; of a run in layers that with the smallest maximum, which thresholds for all follow."""
        return min((part.format for part in self._parts), key=lambda name: parse(name).max_representable_value)

    @property
    def formats(self) -> dict[str, str]:
        """The format in force in each layer; empty for a run that is not in layers."""
        return {part.layer: part.format for part in self._parts if part.layer}

    @property
    def has_shifted(self) -> bool:
        """Whether the format, or that of any layer, has ever changed, be it back again since."""
        return any(part.watch.has_shifted for part in self._parts)

    def observe(self, seen: Observation, *, in_flight: int | None = None) -> Decision:
        """Take one step's observation and decide.

        Args:
            seen: the numbers of a step.
            in_flight: the last step that was already started when the decision lands; what it shows is not judged,
                since it ran before the decision.

        Returns:
            What to do; a decision that does not act is the usual one.

        Raises:
            InputError: if a policy of one's own calls for what the run cannot do, and if nothing is shown of a layer.
        """
        watching = [part for part in self._parts if not part.watch.ignores(seen.step)]
        if not watching:
            return Decision()
        back = self._health.judge(seen)
        events = (back,) if back is not None and self.can_roll_back else ()
        decision = Decision(rollback=bool(events), events=events)
        # What lasts and cannot be gone back from is for the policy to judge.
        doubted = not self._health.calm and (self.can_roll_back or back is None)
        called = [(part, remedy) for part in watching if (remedy := self._called(part, seen, doubted)) is not None]
        for part, remedy in called:
            decision = self._joined(decision, part, remedy, seen)
        if decision.events:
            self._start_anew(decision, called, seen.step, in_flight)
        return decision

    def observe_late(self, step: int, read: Callable[[], Mapping[str, float | str]]) -> Decision:
        """Take a step whose numbers are still being computed, and decide on those of the step before it.

        So nobody waits for a device: what a step showed is read once the next one is on its way.

        Args:
            step: its number.
            read: gives the numbers, under the names of :class:`~altgrad_core.evidence.Observation`, once they are due.

        Returns:
            What to do; nothing at the first step.
        """
        self._unread.append((step, cache(read)))  # to save the controller asks for them, too
        return self._read(in_flight=step) if len(self._unread) > 1 else Decision()

    def observe_last(self) -> Decision:
        """Decide on the last step, whose numbers no further :meth:`observe_late` would read."""
        return self._read(in_flight=None) if self._unread else Decision()

    @property
    def calm(self) -> bool:
        """Whether the last observation gave no reason to doubt the run: the time to take a snapshot."""
        return self._health.calm

    def saved(self) -> dict[str, Any]:
        """Everything the controller remembers, as JSON-ready values, with its events and the step in flight.

        A loop that saves this and its state after a step, and restores both, decides as if it had never stopped: at the
        same steps. What :meth:`observe_late` was handed last is read for it, so that this waits until it is there.
        """
        in_flight = [[step, jsonable(read_by_observations(read()))] for step, read in self._unread]
        return self._remembered() | {"events": [event.to_json() for event in self.events], "in_flight": in_flight}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Take up what :meth:`saved` returned, in a controller that was made alike.

        What was saved before there were ``events`` and ``in_flight`` in it brings none back.
        """
        self._take_up(saved)
        self.events = [Event.from_json(line) for line in saved.get("events", ())]
        self._unread = deque((step, _given(numbers)) for step, numbers in saved.get("in_flight", ()))

    def _remembered(self) -> dict[str, Any]:
        """What decisions are made by, without what is in flight: nothing is waited for."""
        return {
            "rounding": self.rounding,
            "learning_rate": self.learning_rate,
            "scales": self.scales,
            "health": self._health.saved(),
            "formats": {part.layer: part.format for part in self._parts},
            "watches": {part.layer: part.watch.saved() for part in self._parts},
        }

    def _take_up(self, saved: Mapping[str, Any]) -> None:
        """Take up what :meth:`_remembered` returned."""
        self.rounding, self.learning_rate, self.scales = saved["rounding"], saved["learning_rate"], saved["scales"]
        self._health.restore(saved["health"])
        for part in self._parts:
            part.format = saved["formats"][part.layer]
            part.watch.restore(saved["watches"][part.layer])

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

    def _called(self, part: Part, seen: Observation, doubted: bool) -> Remedy | None:
        """What the policy calls for on what a step shows of a part, unless hysteresis holds it back."""
        shown = part.shown_in(seen)
        evidence = part.watch.take(shown, part.format, self.rounding, self.learning_rate, self.scales, doubted=doubted)
        remedy = part.watch.admitted(self._rule(evidence, self.policy, self.shifter))
        if remedy is not None:
            self._check_can_be_done(remedy)
        return remedy

    def _joined(self, decision: Decision, part: Part, remedy: Remedy, seen: Observation) -> Decision:
        """The decision with a remedy added to it. Of what concerns the whole run the first call counts."""
        settled: dict[EventKind, bool] = {
            "rounding": decision.rounding is not None,
            "learning_rate": decision.learning_rate is not None,
            "scales": decision.scales is not None,
            "rollback": decision.rollback,
        }
        kinds = [kind for kind in remedy.kinds if not settled.get(kind, False)]
        moved = {part.layer: remedy.format} if part.layer and remedy.format is not None else {}
        return Decision(
            None if part.layer else remedy.format,
            decision.rounding or remedy.rounding,
            decision.rollback or remedy.rollback,
            (*decision.events, *self._told(part, remedy, kinds, seen)),
            decision.learning_rate or remedy.learning_rate,
            decision.scales or remedy.scales,
            {**decision.formats, **moved},
        )

    def _start_anew(
        self, decision: Decision, called: Sequence[tuple[Part, Remedy]], step: int, in_flight: int | None
    ) -> None:
        """Put a decision into force. A layer's shift leaves the windows of the others as they are."""
        shifted = [part for part, remedy in called if remedy.format is not None]
        for part, remedy in called:
            if remedy.format is not None:
                part.watch.note_shift(part.format, remedy.format)
                part.format = remedy.format
        if decision.rollback:
            self._health.start_anew()
        self.rounding = decision.rounding or self.rounding
        self.learning_rate = decision.learning_rate or self.learning_rate
        self.scales = decision.scales or self.scales
        for part in self._parts if decision.concerns_all else [part for part, _ in called]:
            acts = decision.concerns_all or part in shifted
            part.watch.start_anew(step, in_flight if acts and in_flight is not None else step)
        self.events.extend(decision.events)

    def _told(self, part: Part, remedy: Remedy, kinds: Sequence[EventKind], seen: Observation) -> list[Event]:
        """The events of a remedy: of which layer, or at which sites of the run, and where each leads from and to."""
        worst = {} if part.layer else seen.worst_sites
        where = {f"{name}_site": site for name, site in worst.items() if f"{name}_rate" in remedy.numbers}
        if part.layer:
            where["layer"] = part.layer
        ways: dict[EventKind, dict[str, float | str | None]] = {
            "shift": {"from": part.format, "to": remedy.format},
            "rounding": {"to": remedy.rounding},
            "learning_rate": {"from": self.learning_rate, "to": remedy.learning_rate},
            "scales": {"from": self.scales, "to": remedy.scales},
            "exhausted": {"from": part.format},
        }
        numbers = {kind: {name: end for name, end in way.items() if end is not None} for kind, way in ways.items()}
        told = {**remedy.numbers, **where}
        return [Event(seen.step, kind, remedy.cause, {**told, **numbers.get(kind, {})}) for kind in kinds]

    def _check_can_be_done(self, remedy: Remedy) -> None:
        """Refuse what only a policy of one's own can call for: the named ones know what the run can do."""
        _check_names(remedy.rounding, remedy.scales)
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
        if self.shifter is None and self.formats:
            raise InputError(
                f"formats of {len(self.formats)} layers in a run whose formats must stay; expected a shifter, or one "
                "format for all"
            )
        unknown = [
            part.format for part in self._parts if self.shifter is not None and not self.shifter.knows(part.format)
        ]
        if self.shifter is not None and unknown:
            raise InputError(
                f"a {unknown[0]} run cannot shift: it is not in the fallback table; expected one of "
                f"{', '.join(self.shifter.FORMAT_FALLBACK)}"
            )


def _check_names(rounding: str | None, scales: str | None) -> None:
    if rounding is not None:
        check_choice("rounding", rounding, ROUNDINGS)
    if scales is not None:
        check_choice("rule of scales", scales, get_args(ScaleRule))


def _given(numbers: Mapping[str, float | str]) -> Callable[[], Mapping[str, float | str]]:
    """What hands out numbers that were saved."""
    known = {name: unjsonable(value) for name, value in numbers.items()}
    return lambda: known

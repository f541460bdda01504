"""Two trainings side by side: the first step and tensor where they part, each held against itself before."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Generic, TypeVar

from altgrad.parity.compare import check_ignored, compare_named
from altgrad.parity.environment import Environment
from altgrad.parity.leaves import Leaf, named_tensors
from altgrad.parity.records import Comparison, Kind
from altgrad.parity.runs import Difference, Lockstep, Run, StepRecord
from altgrad.parity.tolerances import Tolerance, Tolerances
from altgrad_core.errors import InputError
from altgrad_core.scalars import is_integer

State = TypeVar("State")
OtherState = TypeVar("OtherState")

Step = Callable[[State, int], tuple[State, Mapping[str, object]]]
"""From a state and the step's number, the next state and the tensors of the step by name, in the order they are made.

The tensors may be trees, and any of them :func:`altgrad.parity.made_by` an operation. The state is the step's own
business: what is not named is not compared.
"""

Make = Callable[[], tuple[State, Step[State]]]
"""Builds everything anew, so that two runs share nothing: the state before step 0, and the step."""


_Start = Callable[[str], Callable[[int], dict[str, Leaf]]]
"""Starts a side anew under a label; what it returns takes a step and names its tensors."""


def lockstep(
    make_a: Make[State],
    make_b: Make[OtherState],
    *,
    steps: int = 50,
    tolerance_ulps: Tolerance = 0,
    ignore: Collection[Kind] = (),
    labels: tuple[str, str] = ("a", "b"),
    repeat_steps: int | None = None,
) -> Lockstep:
    """Run two trainings side by side and stop at the first tensor that differs.

    First each side runs against itself, where every bit has to be the same; a side that does not repeat itself ends it.

    Args:
        make_a: returns ``(state, step)``, everything built anew; see :data:`Make` and :data:`Step`.
        make_b: the other side's, of any framework. Its tensors have the same names.
        steps: how many to run.
        tolerance_ulps: as in :func:`altgrad.parity.compare`, but a pattern need not match a tensor of every step; does
            not hold for a side against itself.
        ignore: likewise.
        labels: what the sides are called.
        repeat_steps: how many steps each side runs against itself; as many as ``steps`` by default, 0 for none.

    Returns:
        Steps run, steps identical, and the first difference with its cause.

    Raises:
        InputError: if a number of steps is out of range, ``make`` or ``step`` returns something else, a tensor cannot
            be compared, or if a tolerance's pattern has matched no tensor of any run: known once a side has run
            against itself, or at the end, if for fewer steps.

    >>> import numpy as np
    >>> def counting(by):
    ...     def step(count, k):
    ...         count = np.float32(count + by)
    ...         return count, {"count": count}
    ...
    ...     return lambda: (np.float32(0), step)
    >>> found = lockstep(counting(0.25), counting(0.25), steps=3)
    >>> found.passed, found.identical_steps
    (True, 3)
    >>> print(lockstep(counting(0.25), counting(0.5), steps=3))
    a against b: 0 of 1 steps identical; step 0: count differs in 1 of 1 elements, by up to 8,388,608 ulps; at [] 0.25
    (0x3e800000) against 0.5 (0x3f000000); cause: unknown
    """
    check_ignored(ignore)
    repeat_steps = steps if repeat_steps is None else repeat_steps
    for name, value, least in (("steps", steps, 1), ("repeat_steps", repeat_steps, 0)):
        if not is_integer(value) or value < least:
            raise InputError(f"{name} is {value!r}; expected a whole number of at least {least}")
    tolerances = Tolerances(tolerance_ulps)
    repeats: list[Run] = []
    # A side's own runs get to steps with tensors that a run which parts early never sees.
    starts = _starter(make_a, tolerances.note), _starter(make_b, tolerances.note)
    for label, start in zip(labels, starts, strict=True) if repeat_steps else ():
        repeats.append(_run(start, start, repeat_steps, Tolerances(0), (), (label, f"{label} again")))
        if not repeats[-1].passed:
            return Lockstep(tuple(repeats), None, Environment.here())
        if repeat_steps >= steps:  # every name has been seen: a misspelt pattern need not cost the other runs
            tolerances.check_matched()
    run = _run(*starts, steps, tolerances, ignore, labels)
    tolerances.check_matched("" if run.passed else f"; {run}")
    return Lockstep(tuple(repeats), run, Environment.here())


def _run(
    start_a: _Start,
    start_b: _Start,
    steps: int,
    tolerances: Tolerances,
    ignore: Collection[Kind],
    labels: tuple[str, str],
) -> Run:
    take_a, take_b = start_a(labels[0]), start_b(labels[1])
    identical, largest = 0, 0
    history: list[StepRecord] = []
    for step in range(steps):
        found = compare_named(take_a(step), take_b(step), tolerances=tolerances, ignore=ignore, labels=labels)
        history.append(StepRecord.of(found))
        identical += found.identical
        largest = max(largest, found.largest_ulps)
        difference = _difference(step, found)
        if difference is not None:
            return Run(
                labels, step + 1, identical, largest, difference, tolerances.given, tuple(ignore), tuple(history)
            )
    return Run(labels, steps, identical, largest, None, tolerances.given, tuple(ignore), tuple(history))


def _difference(step: int, found: Comparison) -> Difference | None:
    first = found.first_difference
    if found.passed or first is None or found.cause is None:
        return None
    return Difference(step, first, found.cause)


def _starter(make: Make[State], note: Callable[[Iterable[str]], None]) -> _Start:
    return lambda label: _Side(make, label, note).take


class _Side(Generic[State]):
    """One side's state and step, and who is told the names of its tensors."""

    def __init__(self, make: Make[State], label: str, note: Callable[[Iterable[str]], None]) -> None:
        made = make()
        if not isinstance(made, tuple) or len(made) != 2 or not callable(made[1]):
            raise InputError(f"make of {label} returned {made!r:.80}; expected a state and a step, (state, step)")
        self._state, self._step = made
        self._label, self._note = label, note

    def take(self, step: int) -> dict[str, Leaf]:
        """Take a step, and name its tensors."""
        taken = self._step(self._state, step)
        if not isinstance(taken, tuple) or len(taken) != 2 or not isinstance(taken[1], Mapping) or not taken[1]:
            raise InputError(
                f"step {step} of {self._label} returned {taken!r:.80}; expected (state, tensors by name), at least one"
            )
        self._state, named = taken
        tensors = named_tensors(named)
        if not tensors:
            raise InputError(f"step {step} of {self._label} returned {named!r:.80}, without a tensor; expected one")
        self._note(tensors)
        return tensors

"""What happens to a run, one line of JSON each: skips, open gates, shifts, rollbacks, and injected faults."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

EventKind = Literal["fault", "skip", "gate", "shift", "rounding", "learning_rate", "scales", "rollback", "exhausted"]
"""What can happen.

``fault``: one was injected. ``skip``: a step that was not finite was not taken. ``gate``: the clipper's gate was open.
``shift``: the format changed. ``rounding``: committed weights are rounded in another way from here on.
``learning_rate``: the learning rate is multiplied by another factor from here on. ``scales``: they come from elsewhere
from here on. ``rollback``: the run went back to a snapshot. ``exhausted``: a remedy was called for and there is none
left, such as no format to fall back to.
"""

EVENT_KINDS: tuple[EventKind, ...] = get_args(EventKind)
_NONFINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclass(frozen=True)
class Event:
    """Something that happened to a run.

    Attributes:
        step: the step whose numbers were the reason, from 0.
        kind: what happened.
        cause: why, in a word or two: ``nan``, ``stall``, ``overflow``, ...
        numbers: the figures behind it, and names such as the formats of a shift.

    >>> Event(3, "shift", "nan", {"from": "E7M0", "to": "E5M2"}).to_json()
    '{"step": 3, "kind": "shift", "cause": "nan", "from": "E7M0", "to": "E5M2"}'
    """

    step: int
    kind: EventKind
    cause: str
    numbers: Mapping[str, float | str] = field(default_factory=dict)

    def to_json(self) -> str:
        """One line of JSON, without the line break."""
        return json.dumps(
            {"step": self.step, "kind": self.kind, "cause": self.cause, **jsonable(self.numbers)}, allow_nan=False
        )

    @classmethod
    def from_json(cls, line: str) -> Event:
        """Read back what :meth:`to_json` wrote.

        Raises:
            ValueError: if the line is not an event.
        """
        fields = json.loads(line)
        if not isinstance(fields, dict) or fields.get("kind") not in EVENT_KINDS or "step" not in fields:
            raise ValueError(f"not an event: {line!r}")
        numbers = {key: unjsonable(value) for key, value in fields.items() if key not in ("step", "kind", "cause")}
        return cls(int(fields["step"]), fields["kind"], str(fields.get("cause", "")), numbers)


def jsonable(numbers: Mapping[str, float | str]) -> dict[str, float | str]:
    """Replace floats that JSON cannot say by the strings ``NaN``, ``Infinity`` and ``-Infinity``."""
    return {key: _spelled(value) for key, value in numbers.items()}


def unjsonable(value: float | str) -> float | str:
    """Undo :func:`jsonable` for one value."""
    return _NONFINITE.get(value, value) if isinstance(value, str) else value


def _spelled(value: float | str) -> float | str:
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")

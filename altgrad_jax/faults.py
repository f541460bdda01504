"""Faults on demand: NaN batches, loss spikes and poisoned weights, so that healing can be seen and tested."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from altgrad_core.errors import InputError
from altgrad_jax.state import Fault

FaultKind = Literal["nan", "spike", "weight"]

_SPEC = re.compile(r"(?P<kind>[a-z]+)@(?P<step>\d+)(?::(?P<argument>.+))?")
_EXAMPLES = (
    "nan@120:5 (five NaN batches), spike@200:1e4 (the loss times 1e4, once) or weight@150:nan (a weight set to NaN)"
)


class FaultError(InputError):
    """A fault that does not parse."""


@dataclass(frozen=True)
class Injection:
    """One fault to inject.

    Attributes:
        kind: ``nan``, ``spike`` or ``weight``.
        step: the first step it hits.
        steps: how many steps in a row.
        value: the factor on the loss, or the value of the weight.
    """

    kind: FaultKind
    step: int
    steps: int
    value: float

    @classmethod
    def parse(cls, spec: str) -> Injection:
        """Read ``kind@step`` or ``kind@step:argument``.

        Raises:
            FaultError: naming the spec and what was expected.

        >>> Injection.parse("nan@120:5").steps, Injection.parse("spike@200:1e4").value
        (5, 10000.0)
        """
        match = _SPEC.fullmatch(spec)
        if match is None or match["kind"] not in ("nan", "spike", "weight"):
            raise FaultError(f"cannot read the fault {spec!r}; expected {_EXAMPLES}")
        step, argument = int(match["step"]), match["argument"]
        if match["kind"] == "nan":
            if argument is not None and not (argument.isdecimal() and int(argument) > 0):
                raise FaultError(f"fault {spec!r}: {argument!r} is not a number of batches; expected {_EXAMPLES}")
            return cls("nan", step, int(argument or 1), math.nan)
        try:
            value = float(argument or ("1e4" if match["kind"] == "spike" else "nan"))
        except ValueError:
            raise FaultError(f"fault {spec!r}: {argument!r} is not a number; expected {_EXAMPLES}") from None
        return cls("spike" if match["kind"] == "spike" else "weight", step, 1, value)

    def hits(self, step: int) -> bool:
        """Whether the fault falls into a step."""
        return self.step <= step < self.step + self.steps


def fault_at(injections: Sequence[Injection], step: int) -> Fault:
    """The fault of a step; the neutral one where nothing was asked for. Of several on one step the last counts."""
    loss_factor, poison, weight = 1.0, False, 0.0
    for injection in injections:
        if injection.hits(step) and injection.kind == "weight":
            poison, weight = True, injection.value
        elif injection.hits(step):
            loss_factor = injection.value
    return Fault(loss_factor, poison, weight)


def check_faults(specs: Sequence[str], steps: int) -> tuple[Injection, ...]:
    """Parse all faults of a run of ``steps`` steps.

    Raises:
        FaultError: for one that does not parse or would never happen.
    """
    injections = tuple(Injection.parse(spec) for spec in specs)
    for spec, injection in zip(specs, injections, strict=True):
        if injection.step >= steps:
            raise FaultError(f"fault {spec!r} would never happen: the run has steps 0 to {steps - 1}")
    return injections

"""Faults on demand, from NaN batches to poisoned weights, so that healing can be seen and tested."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from altgrad_core.errors import InputError
from altgrad_jax.state import Fault

FaultKind = Literal["nan", "spike", "weight", "gradient", "zeros", "noise"]

_SPEC = re.compile(r"(?P<kind>[a-z]+)@(?P<step>\d+)(?::(?P<argument>.+))?")
_EXAMPLES = (
    "nan@120:5 (five NaN batches), spike@200:1e4 (the loss times 1e4, once), weight@150:nan (a weight set to NaN), "
    "gradient@150:inf (an element of a gradient set to inf), zeros@120:5 (five batches of nothing but token 0) or "
    "noise@120:5 (five batches of shuffled tokens)"
)
_VALUES: dict[FaultKind, float] = {"spike": 1e4, "weight": math.nan, "gradient": math.inf}
"""The kinds that happen once, with a value: what it is by default. The others happen in a number of batches."""


class FaultError(InputError):
    """A fault that does not parse."""


@dataclass(frozen=True)
class Injection:
    """One fault to inject.

    Attributes:
        kind: what breaks.
        step: the first step it hits.
        steps: how many steps in a row.
        value: the factor on the loss, or the value of the weight or the gradient's element; NaN for bad batches.
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
        kind = None if match is None else next((each for each in get_args(FaultKind) if each == match["kind"]), None)
        if match is None or kind is None:
            raise FaultError(f"cannot read the fault {spec!r}; expected {_EXAMPLES}")
        step, argument = int(match["step"]), match["argument"]
        if kind not in _VALUES:
            if argument is not None and not (argument.isdecimal() and int(argument) > 0):
                raise FaultError(f"fault {spec!r}: {argument!r} is not a number of batches; expected {_EXAMPLES}")
            return cls(kind, step, int(argument or 1), math.nan)
        try:
            return cls(kind, step, 1, float(argument or _VALUES[kind]))
        except ValueError:
            raise FaultError(f"fault {spec!r}: {argument!r} is not a number; expected {_EXAMPLES}") from None

    def hits(self, step: int) -> bool:
        """Whether the fault falls into a step."""
        return self.step <= step < self.step + self.steps


def fault_at(injections: Sequence[Injection], step: int) -> Fault:
    """The fault of a step; the neutral one where nothing was asked for. Of several of a kind the last counts."""
    fault = Fault()
    for injection in injections:
        if injection.hits(step) and injection.kind == "weight":
            fault = fault._replace(poison=True, weight=injection.value)
        elif injection.hits(step) and injection.kind == "gradient":
            fault = fault._replace(corrupt=True, gradient=injection.value)
        elif injection.hits(step) and injection.kind in ("nan", "spike"):
            fault = fault._replace(loss_factor=injection.value)
    return fault


def spoiled(tokens: npt.NDArray[np.int32], injections: Sequence[Injection], step: int) -> npt.NDArray[np.int32]:
    """The batch of a step as the faults leave it: as it is, all zeros, or shuffled.

    >>> spoiled(np.array([[5, 6]], np.int32), [Injection.parse("zeros@3")], 3).tolist()
    [[0, 0]]
    """
    for injection in injections:
        if injection.hits(step) and injection.kind == "zeros":
            tokens = np.zeros_like(tokens)
        elif injection.hits(step) and injection.kind == "noise":
            tokens = np.random.default_rng(step).permutation(tokens.reshape(-1)).reshape(tokens.shape)
    return tokens


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

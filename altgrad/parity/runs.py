"""What a lockstep finds, as values: of two runs, of where they part, of the whole."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from altgrad.parity.cause import Cause
from altgrad.parity.environment import Environment
from altgrad.parity.records import Comparison, Kind, TensorRecord
from altgrad.parity.tolerances import Tolerance


@dataclass(frozen=True)
class Difference:
    """Where two runs part.

    Attributes:
        step: the first step in which a tensor is beyond its tolerance, from 0.
        tensor: the first such tensor of the step.
        cause: why, if that can be told.
    """

    step: int
    tensor: TensorRecord
    cause: Cause

    def told(self, labels: tuple[str, str]) -> str:
        """In one line."""
        return f"step {self.step}: {self.tensor.name} {self.tensor.told(labels)}; cause: {self.cause.told(labels)}"

    def as_dict(self) -> dict[str, object]:
        """JSON-ready."""
        return {
            "step": self.step,
            "tensor": self.tensor.name,
            "ulps": self.tensor.largest_ulps,
            "cause": self.cause.name,
            "why": self.cause.as_dict(),
            "record": self.tensor.as_dict(),
        }


@dataclass(frozen=True)
class StepRecord:
    """How a step of two runs compares.

    Attributes:
        tensors: how many there are.
        identical: how many of them are the same in every bit.
        differing: how many elements differ, of all tensors.
        largest_ulps: the most steps between any two elements.
        first: the name of the first tensor that differs at all, None where none does.
    """

    tensors: int
    identical: int
    differing: int
    largest_ulps: int
    first: str | None

    @classmethod
    def of(cls, found: Comparison) -> StepRecord:
        """A comparison, counted."""
        first = found.first_difference
        return cls(
            len(found.tensors),
            sum(tensor.identical for tensor in found.tensors),
            sum(tensor.differing for tensor in found.tensors),
            found.largest_ulps,
            None if first is None else first.name,
        )


@dataclass(frozen=True)
class Run:
    """Two runs, compared step by step up to the first difference.

    Attributes:
        labels: what the two are called.
        steps: how many were run, that of the difference included.
        identical_steps: how many of them gave the same bits in every tensor.
        largest_ulps: the most steps that any two elements were apart.
        first_difference: where it was stopped; None where all steps passed.
        tolerance_ulps: what was allowed.
        ignored: which kinds of differences did not count.
        history: each step.
    """

    labels: tuple[str, str]
    steps: int
    identical_steps: int
    largest_ulps: int
    first_difference: Difference | None
    tolerance_ulps: Tolerance = 0
    ignored: tuple[Kind, ...] = ()
    history: tuple[StepRecord, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether no tensor was beyond its tolerance."""
        return self.first_difference is None

    def __str__(self) -> str:
        """In one line."""
        one, other = self.labels
        counted = f"{one} against {other}: {self.identical_steps} of {self.steps} steps identical"
        if self.first_difference is not None:
            return f"{counted}; {self.first_difference.told(self.labels)}"
        return counted if self.identical_steps == self.steps else f"{counted}, all within tolerance"

    def as_dict(self) -> dict[str, object]:
        """JSON-ready."""
        return {
            "labels": list(self.labels),
            "passed": self.passed,
            "steps": self.steps,
            "identical_steps": self.identical_steps,
            "largest_ulps": self.largest_ulps,
            "tolerance_ulps": self.tolerance_ulps if isinstance(self.tolerance_ulps, int) else {**self.tolerance_ulps},
            "ignored": list(self.ignored),
            "history": [asdict(each) for each in self.history],
            "first_difference": None if self.first_difference is None else self.first_difference.as_dict(),
        }


@dataclass(frozen=True)
class Lockstep:
    """What a lockstep found.

    Attributes:
        repeats: each side against a second run of itself; the last of them failed if there is no ``run``.
        run: one side against the other; None if one of them does not repeat itself, for then it says nothing.
        environment: where it ran.
    """

    repeats: tuple[Run, ...]
    run: Run | None
    environment: Environment

    @property
    def decisive(self) -> Run:
        """The run that the verdict comes from: of the two sides, or of the side that does not repeat itself."""
        return self.run or self.repeats[-1]

    @property
    def passed(self) -> bool:
        """Whether both sides repeat themselves, and stay together."""
        return self.run is not None and self.run.passed

    @property
    def steps(self) -> int:
        """How many steps the decisive run took."""
        return self.decisive.steps

    @property
    def identical_steps(self) -> int:
        """How many of them gave the same bits."""
        return self.decisive.identical_steps

    @property
    def first_difference(self) -> Difference | None:
        """Where the decisive run parted."""
        return self.decisive.first_difference

    def __str__(self) -> str:
        """In one line."""
        if self.run is None:
            return f"{self.decisive.labels[0]} does not repeat itself. {self.decisive}"
        return str(self.run)

    def as_dict(self) -> dict[str, object]:
        """JSON-ready."""
        return {
            **self.decisive.as_dict(),
            "passed": self.passed,
            "repeats": [repeat.as_dict() for repeat in self.repeats],
            "environment": self.environment.as_dict(),
        }

"""What a comparison finds, as values: of an element, of a tensor, of two trees."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from altgrad.parity.cause import Cause
from altgrad.parity.floats import spelled

Kind = Literal["value", "infinity", "nan", "nan payload", "signed zero", "integer", "dtype"]
"""How two elements differ.

``value``: two finite numbers. ``infinity``: inf against anything but NaN. ``nan``: NaN against a number. ``nan
payload``: NaN on both sides with other bits, the sign among them. ``signed zero``: 0 against -0. ``integer``: integers
or truth values. ``dtype``: that of the whole tensor.
"""

Problem = Literal["missing", "shape", "dtype"]
"""What keeps two tensors from being compared element by element."""


@dataclass(frozen=True)
class Element:
    """A place where two tensors differ.

    Attributes:
        index: of the element.
        kind: how it differs.
        ulps: representable steps between the two; None where they are not on one line.
        values: of both sides, exactly.
        bits: of both sides, in hexadecimal.
    """

    index: tuple[int, ...]
    kind: Kind
    ulps: int | None
    values: tuple[float | int | bool, float | int | bool]
    bits: tuple[str, str]

    def __str__(self) -> str:
        """In one line: where, and what both sides have."""
        one, other = (f"{spelled(value)} ({code})" for value, code in zip(self.values, self.bits, strict=True))
        return f"at {list(self.index)} {one} against {other}"

    def as_dict(self) -> dict[str, object]:
        """JSON-ready: NaN and infinities are strings."""
        return {
            "index": list(self.index),
            "kind": self.kind,
            "ulps": self.ulps,
            "values": [_jsonable(value) for value in self.values],
            "bits": list(self.bits),
        }


@dataclass(frozen=True)
class TensorRecord:
    """How a tensor of one tree compares with that of the same name in the other.

    Attributes:
        name: its path in the trees.
        dtypes: of both sides; None on a side that does not have it.
        shapes: likewise.
        elements: how many there are.
        differing: how many differ in any bit that counts.
        beyond: how many of those are beyond the tolerance.
        largest_ulps: the most steps between two elements; None where no two differ by steps.
        kinds: how many elements differ in which way.
        first: the first element beyond the tolerance, or if none is the first that differs.
        tolerance_ulps: the steps that it may be off.
        problem: why its elements were not compared; None if they were.
        nearest: for a missing tensor, what the other side has that reads most alike.
    """

    name: str
    dtypes: tuple[str | None, str | None]
    shapes: tuple[tuple[int, ...] | None, tuple[int, ...] | None]
    elements: int = 0
    differing: int = 0
    beyond: int = 0
    largest_ulps: int | None = None
    kinds: Mapping[Kind, int] = field(default_factory=dict)
    first: Element | None = None
    tolerance_ulps: int = 0
    problem: Problem | None = None
    nearest: str | None = None

    @property
    def identical(self) -> bool:
        """Whether every bit that counts is the same."""
        return self.problem is None and self.differing == 0

    @property
    def passed(self) -> bool:
        """Whether nothing is beyond the tolerance."""
        return self.problem is None and self.beyond == 0

    def with_problem(self, problem: Problem) -> TensorRecord:
        """The same, not compared for a reason."""
        return replace(self, problem=problem)

    def with_differences(
        self, *, differing: int, beyond: int, largest_ulps: int | None, kinds: Mapping[Kind, int], first: Element | None
    ) -> TensorRecord:
        """The same, with what was found."""
        return replace(
            self, differing=differing, beyond=beyond, largest_ulps=largest_ulps, kinds=dict(kinds), first=first
        )

    def told(self, labels: tuple[str, str]) -> str:
        """In one line, without the name."""
        if self.problem == "missing":
            lacks = labels[0 if self.dtypes[0] is None else 1]
            return f"is missing in {lacks}" + (f"; the nearest name there is {self.nearest!r}" if self.nearest else "")
        if self.problem is not None:
            ones, others = self.dtypes if self.problem == "dtype" else self.shapes
            return f"has another {self.problem}: {ones} in {labels[0]}, {others} in {labels[1]}"
        if self.first is None:
            return "is identical"
        ulps = "" if self.largest_ulps is None else f", by up to {self.largest_ulps:,} ulps"
        return f"differs in {self.differing:,} of {self.elements:,} elements{ulps}; {self.first}"

    def as_dict(self) -> dict[str, object]:
        """JSON-ready."""
        return {
            "name": self.name,
            "dtypes": list(self.dtypes),
            "shapes": [None if shape is None else list(shape) for shape in self.shapes],
            "elements": self.elements,
            "differing": self.differing,
            "beyond": self.beyond,
            "largest_ulps": self.largest_ulps,
            "kinds": dict(self.kinds),
            "first": None if self.first is None else self.first.as_dict(),
            "tolerance_ulps": self.tolerance_ulps,
            "problem": self.problem,
            "nearest": self.nearest,
        }


def first_difference(tensors: Sequence[TensorRecord]) -> TensorRecord | None:
    """The first tensor beyond its tolerance; where all pass, the first that differs at all."""
    failed = (tensor for tensor in tensors if not tensor.passed)
    differing = (tensor for tensor in tensors if not tensor.identical)
    return next(failed, None) or next(differing, None)


@dataclass(frozen=True)
class Comparison:
    """How two trees compare.

    Attributes:
        tensors: a record of each, in the order of the first tree.
        labels: what the sides are called.
        cause: why the first difference is there; None where there is none.
    """

    tensors: tuple[TensorRecord, ...]
    labels: tuple[str, str] = ("a", "b")
    cause: Cause | None = None

    @property
    def identical(self) -> bool:
        """Whether every tensor is on both sides, with the same dtype, shape and bits, but for what is ignored."""
        return all(tensor.identical for tensor in self.tensors)

    @property
    def passed(self) -> bool:
        """Whether nothing is beyond its tolerance."""
        return all(tensor.passed for tensor in self.tensors)

    @property
    def first_difference(self) -> TensorRecord | None:
        """The first tensor beyond its tolerance; where all pass, the first that differs at all."""
        return first_difference(self.tensors)

    @property
    def largest_ulps(self) -> int:
        """The most steps between any two elements."""
        return max((tensor.largest_ulps or 0 for tensor in self.tensors), default=0)

    def __str__(self) -> str:
        """In one line."""
        same = sum(tensor.identical for tensor in self.tensors)
        counted = f"{same} of {len(self.tensors)} tensors identical"
        first = self.first_difference
        if first is None:
            return counted
        verdict = "all within tolerance" if self.passed else f"{first.name or 'the tensor'} {first.told(self.labels)}"
        return f"{counted}; {verdict}"

    def as_dict(self) -> dict[str, object]:
        """JSON-ready."""
        first = self.first_difference
        return {
            "identical": self.identical,
            "passed": self.passed,
            "labels": list(self.labels),
            "first_difference": None if first is None else first.name,
            "cause": None if self.cause is None else self.cause.name,
            "tensors": [tensor.as_dict() for tensor in self.tensors],
        }


def _jsonable(value: float | int | bool) -> float | int | bool | str:
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")

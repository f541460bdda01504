"""For tests: assertions whose message is the first difference, and its cause where that can be told."""

from __future__ import annotations

from collections.abc import Collection

from altgrad.parity.compare import compare
from altgrad.parity.lockstep import Make, OtherState, State, lockstep
from altgrad.parity.records import Kind
from altgrad.parity.tolerances import Tolerance


def assert_identical(
    tree_a: object,
    tree_b: object,
    *,
    tolerance_ulps: Tolerance = 0,
    ignore: Collection[Kind] = (),
    labels: tuple[str, str] = ("a", "b"),
) -> None:
    """Assert that two trees are the same in every bit, or as near as was allowed.

    Args: as of :func:`altgrad.parity.compare`.

    Raises:
        AssertionError: naming the first tensor that differs, the first element, and the cause.
        InputError: as of :func:`altgrad.parity.compare`, also if there is nothing to compare.

    >>> import numpy as np
    >>> assert_identical({"w": np.float32([1, 0])}, {"w": np.float32([1, -0.0])})
    Traceback (most recent call last):
    AssertionError: 0 of 1 tensors identical; w differs in 1 of 2 elements; at [1] 0 (0x00000000) against -0
    (0x80000000); cause: signed zero: a has a zero; b has one of the other sign; explains the one element that differs,
    which may be chance
    """
    found = compare(tree_a, tree_b, tolerance_ulps=tolerance_ulps, ignore=ignore, labels=labels)
    if not found.passed:
        cause = "" if found.cause is None else f"; cause: {found.cause.told(labels)}"
        raise AssertionError(f"{found}{cause}")


def assert_in_lockstep(
    make_a: Make[State],
    make_b: Make[OtherState],
    *,
    steps: int = 50,
    tolerance_ulps: Tolerance = 0,
    ignore: Collection[Kind] = (),
    labels: tuple[str, str] = ("a", "b"),
    repeat_steps: int | None = None,
) -> None:
    """Assert that two trainings give the same tensors, step by step.

    Args: as of :func:`altgrad.parity.lockstep`.

    Raises:
        AssertionError: naming the first step and tensor that differ, and the cause.
    """
    found = lockstep(
        make_a,
        make_b,
        steps=steps,
        tolerance_ulps=tolerance_ulps,
        ignore=ignore,
        labels=labels,
        repeat_steps=repeat_steps,
    )
    if not found.passed:
        raise AssertionError(str(found))

"""Two trees of tensors, compared bit by bit: which differ, by how many steps, and where first."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import get_args

from altgrad.parity.cause import Cause
from altgrad.parity.causes import recognise
from altgrad.parity.elements import compare_arrays
from altgrad.parity.leaves import Leaf, named_tensors
from altgrad.parity.records import Comparison, Kind, TensorRecord, first_difference
from altgrad.parity.tolerances import Tolerance, Tolerances
from altgrad_core.errors import InputError, check_choice


def compare(
    tree_a: object,
    tree_b: object,
    *,
    tolerance_ulps: Tolerance = 0,
    ignore: Collection[Kind] = (),
    labels: tuple[str, str] = ("a", "b"),
) -> Comparison:
    """Compare every named tensor of two trees: dtype, shape, and each element's bits.

    Args:
        tree_a: mappings, sequences, dataclasses, modules and states of JAX arrays, torch tensors, NumPy arrays and
            numbers: see :func:`altgrad.parity.named_tensors`, which also says how they are named.
        tree_b: the same; its frameworks may be others.
        tolerance_ulps: how many representable steps floats may be apart. Never enough for NaN against a number,
            infinity against a finite one, 0 against -0, NaN of other bits, or integers.
        ignore: kinds of differences that do not count: ``signed zero``, ``nan payload`` (and sign), ``dtype`` (the
            values are then compared as float64, or as integers).
        labels: what the sides are called in what is printed.

    Returns:
        A record for each tensor, in the order of a, with those after them that only b has, and the cause of the first
        difference, if it can be told: see :func:`altgrad.parity.made_by`.

    Raises:
        InputError: if neither tree holds a tensor, for a leaf that is no tensor or has no values, a tolerance that is
            no whole number, is negative or whose pattern matches nothing, and an unknown kind.

    >>> import numpy as np
    >>> found = compare({"w": np.float32([1, 2])}, {"w": np.float32([1, 2 + 2**-22])})
    >>> found.identical, found.first_difference.name, found.first_difference.largest_ulps
    (False, 'w', 1)
    >>> compare({"w": np.float32(1)}, {"w": np.float32(1)}).passed
    True
    """
    check_ignored(ignore)
    tolerances = Tolerances(tolerance_ulps)
    a, b = named_tensors(tree_a), named_tensors(tree_b)
    if not a and not b:
        raise InputError(
            f"there is nothing to compare: neither {labels[0]}, a {type(tree_a).__name__}, nor {labels[1]}, a "
            f"{type(tree_b).__name__}, holds a tensor; expected at least one"
        )
    tolerances.note([*a, *b])
    tolerances.check_matched()
    return compare_named(a, b, tolerances=tolerances, ignore=ignore, labels=labels)


def check_ignored(kinds: Collection[Kind]) -> None:
    """Refuse kinds of differences that there are not.

    Raises:
        InputError: naming the nearest one.
    """
    if isinstance(kinds, str):
        raise InputError(f"ignore is {kinds!r}; expected kinds of differences in a tuple, such as ('nan payload',)")
    for kind in kinds:
        check_choice("kind of difference", kind, get_args(Kind))


def compare_named(
    a: Mapping[str, Leaf],
    b: Mapping[str, Leaf],
    *,
    tolerances: Tolerances,
    ignore: Collection[Kind],
    labels: tuple[str, str],
) -> Comparison:
    """:func:`compare` for tensors that have been named already, where patterns may match others than these."""
    records = [
        compare_arrays(name, a[name].array, b[name].array, tolerances.of(name), ignore)
        if name in a and name in b
        else _missing(name, a, b)
        for name in dict.fromkeys((*a, *b))
    ]
    return Comparison(tuple(records), labels, _cause(first_difference(records), a, b))


def _cause(first: TensorRecord | None, a: Mapping[str, Leaf], b: Mapping[str, Leaf]) -> Cause | None:
    if first is None:
        return None
    if first.problem == "missing":
        return Cause(("missing",))
    return recognise(a[first.name], b[first.name])


def _missing(name: str, a: Mapping[str, Leaf], b: Mapping[str, Leaf]) -> TensorRecord:
    there, elsewhere = (a[name], b) if name in a else (b[name], a)
    # A name that both sides have is nobody's misspelling.
    candidates = [each for each in elsewhere if each not in (a if name in a else b)] or list(elsewhere)
    near = get_close_matches(name, candidates, n=1, cutoff=0.5)
    dtype, shape = there.array.dtype.name, there.array.shape
    return TensorRecord(
        name,
        dtypes=(dtype, None) if name in a else (None, dtype),
        shapes=(shape, None) if name in a else (None, shape),
        problem="missing",
        nearest=near[0] if near else None,
    )

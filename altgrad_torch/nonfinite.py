"""Gradients that hold an infinity or NaN: who is the culprit, and what becomes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from altgrad_core.nonfinite import NO_CULPRIT, culprit_message
from altgrad_torch.shards import local, over_shards


class Culprit(NamedTuple):
    """The first gradient that is not finite.

    Attributes:
        name: its parameter's name, or its place among what was looked through; None for none.
        count: how many elements of all gradients are not finite.
    """

    name: str | None
    count: int

    @classmethod
    def none(cls) -> Culprit:
        """Nobody, or not looked."""
        return cls(None, 0)


def nonfinite_counts(gradients: Sequence[Tensor]) -> list[int]:
    """How many elements of each gradient are not finite; of DTensors over all shards. Reads from the device once."""
    counts = [(~part.isfinite()).sum() for part in map(local, gradients)]
    return over_shards(counts, gradients, "sum").tolist()


def find_culprit(gradients: Sequence[Tensor], names: Sequence[str] | None = None) -> Culprit:
    """Look through gradients for what is not finite: one pass.

    >>> find_culprit([torch.ones(2), torch.tensor([torch.nan, 1.0, torch.inf])], ["a", "b"])
    Culprit(name='b', count=2)
    """
    counts = nonfinite_counts(gradients)
    first = next((index for index, count in enumerate(counts) if count), NO_CULPRIT)
    if first == NO_CULPRIT:
        return Culprit.none()
    return Culprit(str(first) if names is None else names[first], sum(counts))


def raise_for(gradients: Sequence[Tensor], names: Sequence[str]) -> NoReturn:
    """Raise for the first gradient that is not finite.

    Raises:
        FloatingPointError: naming it.
    """
    counts = nonfinite_counts(gradients)
    bad = [index for index, count in enumerate(counts) if count]
    size = gradients[bad[0]].numel()
    raise FloatingPointError(culprit_message(names[bad[0]], counts[bad[0]], size, len(bad) - 1))


@torch.no_grad()
def zero_nonfinite_(gradients: Sequence[Tensor]) -> None:
    """Make zero, in place, what is not finite."""
    for part in map(local, gradients):
        part.masked_fill_(~part.isfinite(), 0.0)

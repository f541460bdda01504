"""Which snapshots of a run are kept and which is gone back to, whatever they are snapshots of."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic, Literal, TypeVar, get_args

from altgrad_core.errors import InputError
from altgrad_core.scalars import is_integer
from altgrad_core.settings import check_count

Moments = Literal["kept", "reset"]
"""What a rollback does to an optimizer's moments: bring back those of the snapshot, or have them start anew."""

Where = Literal["device", "host"]
"""Where snapshots lie: beside what they are of, or in the memory of the host."""

Copy = TypeVar("Copy")
"""A copy of a state, whatever it consists of."""


class LastGood(Generic[Copy]):
    """The last copies of a state that turned out to be good. Only references move; what is kept is never changed.

    Args:
        start: the copy that stands for all until better ones are pushed.
        keep: how many to keep.

    Raises:
        InputError: if ``keep`` is not a positive integer.

    >>> kept = LastGood("start", keep=2)
    >>> for step in (1, 2, 3):
    ...     kept.push(f"step {step}", lambda: True)
    >>> kept.go_back(), kept.go_back(1)
    ('step 2', 'step 2')
    """

    def __init__(self, start: Copy, keep: int) -> None:
        self._copies = deque([start] * check_count("keep", keep, 1), maxlen=keep)
        self._unread: tuple[Copy, Callable[[], bool]] | None = None

    def push(self, copy: Copy, good: Callable[[], bool]) -> None:
        """Keep a copy as the newest, if it is good; the oldest is dropped.

        Args:
            copy: of the state now.
            good: whether it is, asked when the next copy is pushed or one is gone back to: by then it is known.
        """
        self.settle()
        self._unread = (copy, good)

    def go_back(self, back: int | None = None) -> Copy:
        """The copy to go back to, which then stands for all newer ones as well.

        Args:
            back: how many copies to go back: 1 for the newest; the oldest by default.

        Raises:
            InputError: for more than are kept.
        """
        check_back(back, len(self._copies))
        self.settle()
        place = 0 if back is None else len(self._copies) - back
        chosen = self._copies[place]
        for newer in range(place, len(self._copies)):
            self._copies[newer] = chosen
        return chosen

    def settle(self) -> Copy | None:
        """Decide on the copy that was pushed last, as the next push would.

        Returns:
            The copy that is no longer kept, for its memory to be written again; None if there is none.

        >>> kept = LastGood("start", keep=1)
        >>> kept.push("step 1", lambda: False)
        >>> kept.settle(), kept.settle()
        ('step 1', None)
        """
        if self._unread is None:
            return None
        (copy, good), self._unread = self._unread, None
        if not good():
            return copy
        dropped = self._copies[0]
        self._copies.append(copy)
        return None if any(each is dropped for each in self._copies) else dropped


def check_back(back: int | None, keep: int) -> None:
    """Check a number of snapshots to go back; None stands for all of them.

    Raises:
        InputError: if it is no integer from 1 to ``keep``.
    """
    if back is not None and (not is_integer(back) or not 1 <= back <= keep):
        raise InputError(f"back is {back!r}; expected 1, the newest snapshot, to {keep}, the oldest kept")


def check_moments(moments: str) -> None:
    """Check what a rollback should do to an optimizer's moments.

    Raises:
        InputError: for an unknown word.
    """
    if moments not in get_args(Moments):
        raise InputError(f"moments is {moments!r}; expected 'kept' or 'reset'")


def check_where(where: str) -> None:
    """Check where snapshots should lie.

    Raises:
        InputError: for an unknown word.
    """
    if where not in get_args(Where):
        raise InputError(f"where is {where!r}; expected 'device' or 'host'")

"""How far apart tensors may be, by name, and which patterns of names turned out to be of no tensor."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches

from altgrad_core.errors import InputError
from altgrad_core.scalars import is_integer

Tolerance = int | Mapping[str, int]
"""Steps that tensors may be apart: one number for all, or regular expressions of whole names with one each.

Of a mapping the first that matches counts, and what none matches has to be the same in every bit.
"""


class Tolerances:
    """A tolerance, checked, for names that come one after another: not every step has every tensor.

    Args:
        tolerance: see :data:`Tolerance`.

    Attributes:
        given: the same, in Python's integers.

    Raises:
        InputError: for what is no whole number of steps, or no regular expression.

    >>> tolerances = Tolerances({"mu.*": 2, ".*": 1})
    >>> tolerances.of("mu.w"), tolerances.of("w")
    (2, 1)
    """

    def __init__(self, tolerance: Tolerance) -> None:
        self.given: Tolerance
        if isinstance(tolerance, Mapping):
            self.given = {
                pattern: _steps(f"tolerance_ulps of {pattern!r}", each) for pattern, each in tolerance.items()
            }
            self._others = 0
        else:
            self.given = self._others = _steps("tolerance_ulps", tolerance)
        self._ulps = self.given if isinstance(self.given, Mapping) else {}
        self._expressions = {pattern: _compiled(pattern) for pattern in self._ulps}
        self._unmatched = dict.fromkeys(self._expressions)
        self._by_name: dict[str, int] = {}

    def of(self, name: str) -> int:
        """The steps that a tensor may be off."""
        if name not in self._by_name:
            matching = [each for each, expression in self._expressions.items() if expression.fullmatch(name)]
            for pattern in matching:
                self._unmatched.pop(pattern, None)
            self._by_name[name] = self._ulps[matching[0]] if matching else self._others
        return self._by_name[name]

    def note(self, names: Iterable[str]) -> None:
        """Count names as matched that are not compared now."""
        for name in names:
            self.of(name)

    def check_matched(self, but: str = "") -> None:
        """Refuse a pattern that none of the names so far matches: it is misspelt.

        Args:
            but: what to say besides.

        Raises:
            InputError: naming the nearest name.
        """
        for pattern in self._unmatched:
            near = get_close_matches(pattern, self._by_name, n=1, cutoff=0.5)
            nearest = f"; the nearest is {near[0]!r}" if near else ""
            raise InputError(f"tolerance_ulps has {pattern!r}, which matches no tensor{nearest}{but}")


def _steps(what: str, ulps: object) -> int:
    if not is_integer(ulps) or ulps < 0:
        raise InputError(f"{what} is {ulps!r}; expected a whole number of steps, 0 or more")
    return int(ulps)


def _compiled(pattern: str) -> re.Pattern[str]:
    if not isinstance(pattern, str):
        raise InputError(f"tolerance_ulps has {pattern!r}; expected regular expressions of names")
    try:
        return re.compile(pattern)
    except re.error as error:
        raise InputError(f"tolerance_ulps has {pattern!r}, which is no regular expression: {error}") from None

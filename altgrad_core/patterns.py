"""Rules by name: which pattern a parameter's path falls under. The first full match counts, in both frameworks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from altgrad_core.errors import InputError


def group_by_pattern(paths: Sequence[str], patterns: Sequence[str]) -> Mapping[str, tuple[int, ...]]:
    """The positions of the paths that fall under each pattern; each path under the first that matches all of it.

    Args:
        paths: such as ``blocks/0/attn/kernel`` or ``blocks.0.attn.weight``.
        patterns: regular expressions.

    Raises:
        InputError: for a pattern that is none or matches nothing, and for a path that none matches.

    >>> dict(group_by_pattern(["attn/q", "mlp/up"], ["attn/.*", ".*"]))
    {'attn/.*': (0,), '.*': (1,)}
    """
    compiled = {pattern: compiled_pattern(pattern) for pattern in patterns}
    groups: dict[str, list[int]] = {pattern: [] for pattern in patterns}
    for position, path in enumerate(paths):
        first = next((pattern for pattern, found in compiled.items() if found.fullmatch(path)), None)
        if first is None:
            raise InputError(
                f"no rule matches {path!r}; {_for_below(path, patterns)}expected one of {', '.join(patterns)} to, or a "
                "last rule '.*'"
            )
        groups[first].append(position)
    for pattern, positions in groups.items():
        if not positions:
            raise InputError(f"the rule {pattern!r} matches nothing that an earlier one did not: {_listed(paths)}")
    return {pattern: tuple(positions) for pattern, positions in groups.items()}


def _for_below(path: str, patterns: Sequence[str]) -> str:
    """A hint for who named a part of the model, as in a tree, and not a pattern of the whole paths below it."""
    above = next((each for each in patterns if path.startswith(each) and path[len(each) :][:1] in ("/", ".")), None)
    if above is None:
        return ""
    below = f"{above}/.*" if path[len(above)] == "/" else f"{above}\\..*"
    return f"a rule matches whole paths: did you mean {below!r}? "


def compiled_pattern(pattern: str) -> re.Pattern[str]:
    """A pattern, compiled (``re`` keeps it).

    Raises:
        InputError: for one that is no regular expression.
    """
    try:
        return re.compile(pattern)
    except (re.error, TypeError) as error:
        raise InputError(f"the rule {pattern!r} is no regular expression: {error}") from None


def _listed(paths: Sequence[str]) -> str:
    shown = ", ".join(paths[:6])
    return f"the paths are {shown}" + (f" and {len(paths) - 6} more" if len(paths) > 6 else "")

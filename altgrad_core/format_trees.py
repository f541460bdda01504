"""Formats for parts of a model: by rules, or as a tree, where a format is that of all parameters below its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TypeAlias, TypeVar

from altgrad_core.errors import InputError
from altgrad_core.patterns import compiled_pattern, group_by_pattern

Named = TypeVar("Named")
"""Whatever names a format."""

FormatTree: TypeAlias = (
    "Named | Mapping[str, FormatTree[Named]] | list[FormatTree[Named]] | tuple[FormatTree[Named], ...]"
)
"""One format for all, or formats by rules, or a tree of formats."""

Positions = Callable[[Sequence[str]], Mapping[str, tuple[int, ...]]]
"""Tells which of the paths belong to each group."""


def formats_of_groups(formats: FormatTree[Named], separator: str) -> tuple[dict[str, Named], Positions]:
    """The formats of groups by the groups' names, and what tells their members.

    A mapping with another container in it, a list or a tuple is a tree: the names are the places of formats, as
    :func:`group_by_prefix` takes them. Any other mapping is of rules, and the names are those of
    :func:`~altgrad_core.patterns.group_by_pattern`.

    Args:
        formats: by rules or as a tree.
        separator: between the names of a path.

    Raises:
        InputError: if there is no format, if two have one place, or if a rule is no regular expression.

    >>> formats, positions = formats_of_groups({"attn": {"q": "E3M4"}, "mlp": ["E5M2", "E4M3"]}, "/")
    >>> formats
    {'attn/q': 'E3M4', 'mlp/0': 'E5M2', 'mlp/1': 'E4M3'}
    >>> dict(positions(["attn/q", "mlp/0/b", "mlp/0/w", "mlp/1"]))
    {'attn/q': (0,), 'mlp/0': (1, 2), 'mlp/1': (3,)}
    >>> formats, positions = formats_of_groups({"attn/.*": "E3M4", ".*": "E5M2"}, "/")
    >>> dict(positions(["attn/q", "mlp/0/b", "mlp/0/w"]))
    {'attn/.*': (0,), '.*': (1, 2)}
    """
    named: dict[str, Named] = {}
    for path, each in _leaves(formats, ()):
        name = separator.join(path)
        if name in named:
            raise InputError(f"the tree of formats has two for {name!r}; expected one")
        named[name] = each
    if not named:
        raise InputError("there are no rules, and no formats in a tree; expected at least one, such as {'.*': 'E5M2'}")
    inner = formats.values() if isinstance(formats, Mapping) else [formats]
    if any(isinstance(each, (Mapping, list, tuple)) for each in inner):
        return named, partial(group_by_prefix, prefixes=list(named), separator=separator)
    for pattern in named:
        compiled_pattern(pattern)
    return named, partial(group_by_pattern, patterns=list(named))


def _leaves(tree: FormatTree[Named], path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Named]]:
    if isinstance(tree, Mapping):
        for key, inner in tree.items():
            yield from _leaves(inner, (*path, str(key)))
    elif isinstance(tree, (list, tuple)):
        for index, inner in enumerate(tree):
            yield from _leaves(inner, (*path, str(index)))
    else:
        yield path, tree


def group_by_prefix(paths: Sequence[str], prefixes: Sequence[str], separator: str) -> Mapping[str, tuple[int, ...]]:
    """The positions of the paths that are at or below each prefix; each path under the first.

    Args:
        paths: such as ``blocks/0/attn/kernel`` or ``blocks.0.attn.weight``.
        prefixes: such as ``blocks/0``.
        separator: between the names of a path.

    Raises:
        InputError: for a prefix that nothing is below, and for a path that is below none.

    >>> dict(group_by_prefix(["attn/q", "attn/k", "mlp/up"], ["attn", "mlp/up"], "/"))
    {'attn': (0, 1), 'mlp/up': (2,)}
    """
    groups: dict[str, list[int]] = {prefix: [] for prefix in prefixes}
    for position, path in enumerate(paths):
        first = next((each for each in prefixes if f"{path}{separator}".startswith(f"{each}{separator}")), None)
        if first is None:
            raise InputError(f"the tree of formats has none for {path!r}; it has those of {_listed(prefixes)}")
        groups[first].append(position)
    for prefix, positions in groups.items():
        if not positions:
            raise InputError(
                f"the tree of formats has one for {prefix!r}, where no parameter is; expected names (not patterns) of "
                f"the paths, which are {_listed(paths)}"
            )
    return {prefix: tuple(positions) for prefix, positions in groups.items()}


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:6])
    return f"{shown} and {len(names) - 6} more" if len(names) > 6 else shown

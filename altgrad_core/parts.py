"""The parts of a run whose formats change apart: its layers, or all of it as one."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace

from altgrad_core.errors import InputError
from altgrad_core.evidence import Observation
from altgrad_core.formats import parse
from altgrad_core.settings import Policy
from altgrad_core.watch import Watch


@dataclass
class Part:
    """A part of a run, with the format in force.

    Attributes:
        layer: its name; empty for a whole run.
        format: the name of its format.
        watch: over its rates.
    """

    layer: str
    format: str
    watch: Watch

    def shown_in(self, seen: Observation) -> Observation:
        """What a step showed of it.

        Raises:
            InputError: if it showed nothing.
        """
        if not self.layer:
            return seen
        if self.layer not in seen.layers:
            near = difflib.get_close_matches(self.layer, seen.layers, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(
                f"step {seen.step} shows nothing of layer {self.layer!r}: expected a rate such as "
                f"'{self.layer}/overflow_rate' among its metrics{hint}"
            )
        return replace(seen.layers[self.layer], step=seen.step, loss=seen.loss, finite=seen.finite)


def parts_of(format: str | Mapping[str, str], policy: Policy) -> tuple[Part, ...]:
    """One part in a format, or the layers of a mapping, each in its own.

    Raises:
        UnknownFormatError: for an unknown format.
        InputError: for a mapping without layers, or with one that has no name.

    >>> [(part.layer, part.format) for part in parts_of({"mlp": "E4M3", "logits": "E5M2"}, Policy())]
    [('mlp', 'E4M3'), ('logits', 'E5M2')]
    """
    if isinstance(format, Mapping) and not all(format.keys() or [""]):
        raise InputError(f"layers are {list(format)}; expected at least one, and a name for each")
    formats = format if isinstance(format, Mapping) else {"": format}
    named = {layer: str(parse(each)) for layer, each in formats.items()}
    return tuple(Part(layer, each, Watch(policy, each, layer)) for layer, each in named.items())

"""What became of each layer of a model, as a table."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class LayerRow:
    """A layer that can be cast.

    Attributes:
        path: where it is in the model.
        kind: what it is, such as ``Linear``.
        parameters: how many numbers it holds.
        formats: those of activations, weights and gradients; None where nothing is cast.
        scaling: where the scales come from, in words.
        accumulate: how its products are summed; empty where nothing is cast.
        rule: the pattern of the rule that decided; None if none did.
    """

    path: str
    kind: str
    parameters: int
    formats: tuple[str | None, str | None, str | None]
    scaling: str
    accumulate: str
    rule: str | None


@dataclass(frozen=True)
class Summary:
    """The layers of a model with their formats. Prints as a table, by ``rich``.

    Attributes:
        rows: the layers.

    >>> row = LayerRow("mlp/up", "Linear", 64, ("E4M3", "E4M3", "E5M2"), "delayed 16", "native", "mlp/.*")
    >>> print(Summary((row,)))
    layer         kind    activ.  weights  grad.  scales      rule
    ────────────────────────────────────────────────────────────────
    mlp/up        Linear  E4M3    E4M3     E5M2   delayed 16  mlp/.*
    """

    rows: Sequence[LayerRow]

    def __rich__(self) -> Table:
        """The table, for ``rich.print``."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True)
        table.add_column("layer", no_wrap=True, min_width=12)
        table.add_column("kind", no_wrap=True, min_width=6, max_width=13)
        for name, width in (("activ.", 6), ("weights", 7), ("grad.", 5), ("scales", 10)):
            table.add_column(name, no_wrap=True, min_width=width)
        table.add_column("rule", no_wrap=True, overflow="ellipsis")
        for row in self.rows:
            scales = f"{row.scaling}, exact" if row.accumulate == "exact" else row.scaling
            cells = (row.path, row.kind, *(each or "-" for each in row.formats), scales, row.rule or "-")
            table.add_row(*(Text(cell) for cell in cells))
        return table

    def __str__(self) -> str:
        """The table as text."""
        from rich.console import Console

        console = Console(file=io.StringIO(), width=200, color_system=None)
        console.print(self)
        assert isinstance(console.file, io.StringIO)
        return "\n".join(line.rstrip() for line in console.file.getvalue().strip("\n").splitlines() if line.strip())

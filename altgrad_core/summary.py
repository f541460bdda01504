"""What became of each layer of a model, as a table."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from altgrad_core.rules import OPERANDS

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
    layer    kind     parameters   activations   weights   gradients   scaling      products   rule
    ─────────────────────────────────────────────────────────────────────────────────────────────────
    mlp/up   Linear           64   E4M3          E4M3      E5M2        delayed 16   native     mlp/.*
    """

    rows: Sequence[LayerRow]

    def __rich__(self) -> Table:
        """The table, for ``rich.print``."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for name in ("layer", "kind"):
            table.add_column(name, overflow="fold")
        table.add_column("parameters", justify="right")
        for name in (*OPERANDS, "scaling", "products", "rule"):
            table.add_column(name, overflow="fold")
        for row in self.rows:
            formats = [each or "-" for each in row.formats]
            cells = (row.path, row.kind, f"{row.parameters:,}", *formats, row.scaling, row.accumulate, row.rule or "-")
            table.add_row(*(Text(cell) for cell in cells))
        return table

    def __str__(self) -> str:
        """The table as text."""
        from rich.console import Console

        console = Console(file=io.StringIO(), width=200, color_system=None)
        console.print(self)
        assert isinstance(console.file, io.StringIO)
        return "\n".join(line.rstrip() for line in console.file.getvalue().strip("\n").splitlines() if line.strip())

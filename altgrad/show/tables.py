"""Tables that cut nothing."""

from __future__ import annotations

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

_LEAST_TEXT = 12
"""Characters to which a column of text may shrink."""


class WholeTable(Table):
    """A table that cuts nothing, however narrow the terminal: columns with ``no_wrap``, of numbers, keep their width.

    Text wraps; where that would break words the columns move together first; and what still does not fit goes beyond
    the end of the line, which rich would cut unless printed with ``crop=False``.
    """

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render as wide as needed."""
        unbroken = least = 0
        for column in self.columns:
            texts = [str(text) for text in (column.header, *column.cells)]
            words = texts if column.no_wrap else " ".join(texts).split()
            longest = max(map(cell_len, words), default=0)
            column.min_width = longest if column.no_wrap else min(longest, _LEAST_TEXT)
            column.overflow = "fold"
            unbroken, least = unbroken + longest, least + column.min_width
        if unbroken + self._gaps > options.max_width:
            self.padding = 0
        yield from super().__rich_console__(console, options.update_width(max(options.max_width, least + self._gaps)))

    @property
    def _gaps(self) -> int:
        """What lies between the columns: their padding and a separator."""
        _, right, _, left = self.padding
        return (len(self.columns) - 1) * (left + right + 1)

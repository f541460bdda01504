"""Where a format's values lie, drawn in the terminal: one row a format, on a common log2 axis."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from rich.text import Text

from altgrad.story import positive_values
from altgrad_core.formats import Format

_BARS = " ▁▂▃▄▅▆▇█"
_MOST_BITS = 16
_LEAST_WIDTH = 20


def plot(formats: list[Format], width: int, height: int = 1) -> Text:
    """Draw how densely the positive values lie, over log2 of the value.

    Each column is a slice of the axis, and its bar says how many values lie in it: the tallest bar of a format is its
    densest slice. Formats of more than 16 bits are left out. With ``height`` beyond 1 it is one format that is drawn.

    Args:
        formats: what to draw.
        width: of the terminal, in characters.
        height: of a format's bars, in lines.
    """
    drawn = [known for known in formats if known.bits <= _MOST_BITS]
    if not drawn:
        return Text(f"nothing to draw: only formats of at most {_MOST_BITS} bits are drawn", style="dim")
    label = max(len(str(known)) for known in drawn) + 1
    exponents = [_exponents(known) for known in drawn]
    low = math.floor(min(found[0] for found in exponents))
    high = math.floor(max(found[-1] for found in exponents)) + 1
    scale = _Scale.fitting(low, high, max(width - label - 1, _LEAST_WIDTH))
    text = Text(no_wrap=True, overflow="ignore")
    for known, found in zip(drawn, exponents, strict=True):
        counts = np.bincount(scale.column_of(found), minlength=scale.columns)
        *above, lowest = _bars(counts, height)
        for line in above:
            text.append(" " * label).append(f"{line}\n", style="cyan")
        text.append(f"{known!s:>{label - 1}} ", style="bold").append(f"{lowest}\n", style="cyan")
        if height > 1:
            scale_note = f"tallest bar: {counts.max()} of {positive_values(known):,} values\n"
            text.append_text(_axis(scale, label)).append(f"\n{' ' * label}{scale_note}", style="dim")
    return text if height > 1 else text.append_text(_axis(scale, label))


@dataclass(frozen=True)
class _Scale:
    """A log2 axis with a whole number of columns to a binade, or of binades to a column, lest the bars flicker."""

    low: int
    high: int
    per_binade: int
    per_column: int

    @classmethod
    def fitting(cls, low: int, high: int, width: int) -> _Scale:
        binades = high - low
        return cls(low, high, max(width // binades, 1), max(-(-binades // width), 1))

    @property
    def columns(self) -> int:
        return -(-(self.high - self.low) * self.per_binade // self.per_column)

    def column_of(self, exponents: npt.NDArray[np.float64]) -> npt.NDArray[np.intp]:
        # A hair, for the logarithm of a value just above a column's edge may come out below it.
        return np.floor((exponents - self.low) * self.per_binade / self.per_column + 1e-9).astype(np.intp)


def _exponents(format: Format) -> npt.NDArray[np.float64]:
    values = format.code_book()[: format.max_code + 1]
    return np.log2(values[values > 0])


def _bars(counts: npt.NDArray[np.intp], height: int) -> list[str]:
    """Bars of eighths of a line, the highest line first; a slice with any value in it shows at least one eighth."""
    eighths = np.ceil(counts / counts.max() * 8 * height).astype(int)
    return ["".join(_BARS[int(np.clip(n - 8 * k, 0, 8))] for n in eighths) for k in reversed(range(height))]


def _axis(scale: _Scale, label: int) -> Text:
    """A ruler with a mark and a label at every few powers of two."""
    widest = max(len(f"2^{scale.low}"), len(f"2^{scale.high}")) + 2
    steps = (1, 2, 4, 8, 16, 32, 64)
    every = next((n for n in steps if n * scale.per_binade >= widest * scale.per_column), 128)
    ruler, labels = ["─"] * (scale.columns + 1), [" "] * (scale.columns + 1)
    for exponent in range(-(-scale.low // every) * every, scale.high + 1, every):
        column = min((exponent - scale.low) * scale.per_binade // scale.per_column, scale.columns)
        ruler[column] = "┴"
        written = "1" if exponent == 0 else f"2^{exponent}"
        start = min(max(column - len(written) // 2, 0), scale.columns + 1 - len(written))
        if "".join(labels[max(start - 1, 0) : start + len(written)]).isspace():
            labels[start : start + len(written)] = written
    margin = " " * label
    return Text(f"{margin}{''.join(ruler)}\n{margin}{''.join(labels).rstrip()}", style="dim")

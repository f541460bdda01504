"""The registry of formats as a table."""

from __future__ import annotations

from itertools import groupby

from rich import box

from altgrad.libraries import dtype_names
from altgrad.numbers import write_number
from altgrad.show.tables import WholeTable
from altgrad.story import other_names, positive_values, specials
from altgrad_core.formats import Format

_WIDE, _MEDIUM = 140, 88
"""Columns from which on the table shows dtypes and counts in columns of their own; and the number of bits."""

_EQUALS, _SPECIALS, _SPLIT = 79, 65, 50
"""Columns from which on it says what a format equals; its specials; and its split of the bits, with the subnormals."""


def registry_table(formats: list[Format], width: int) -> WholeTable:
    """Formats, a row each; what a narrow terminal leaves out is in each format's own story."""
    is_wide, padding = width >= _WIDE, (0, int(width >= _MEDIUM), 0, 0)
    table = WholeTable(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", show_edge=False, padding=padding)
    table.add_column("format", style="bold cyan", no_wrap=True)
    if width >= _MEDIUM:
        table.add_column("bits", justify="right", no_wrap=True)
    if width >= _SPLIT:
        table.add_column("E/M/bias" if is_wide else "E/M/b", no_wrap=True)
    if width >= _SPECIALS:
        table.add_column("specials", no_wrap=True)
    table.add_column("max", justify="right", no_wrap=True)
    table.add_column("min normal" if is_wide else "normal", justify="right", no_wrap=True)
    if width >= _SPLIT:
        table.add_column("min subnormal" if is_wide else "subn.", justify="right", no_wrap=True)
    if is_wide:
        table.add_column("values > 0", justify="right", no_wrap=True)
        table.add_column("NumPy dtype", no_wrap=True)
    if width >= _EQUALS:
        table.add_column("equals", style="dim")
    for _, group in groupby(formats, _family):
        for known in group:
            table.add_row(*_row(known, width))
        table.add_section()
    return table


def _row(format: Format, width: int) -> list[str]:
    is_wide, dtypes = width >= _WIDE, dtype_names(format)
    equal = [name for name in other_names(format) if not (is_wide and name in dtypes[:1])]
    maximum = write_number(format.max_representable_value)
    return [
        str(format),
        *([str(format.bits)] if width >= _MEDIUM else []),
        *([f"{format.exponent_bits}/{format.mantissa_bits}/{format.bias}"] if width >= _SPLIT else []),
        *([specials(format)] if width >= _SPECIALS else []),
        maximum if len(maximum) < 10 else f"{format.max_representable_value:.2e}",
        _or_dash(format.min_normal if format.is_signed else format.to_real(0)),
        *([_or_dash(format.smallest_subnormal)] if width >= _SPLIT else []),
        *([f"{positive_values(format):,}", dtypes[0] if dtypes else "-"] if is_wide else []),
        *([", ".join(equal)] if width >= _EQUALS else []),
    ]


def _or_dash(value: float | None) -> str:
    return "-" if value is None else write_number(value, 5)


def _family(format: Format) -> str:
    """What belongs together: the eight splits, controls, the dtypes of ml_dtypes, P3109."""
    name = str(format)
    if name.startswith("binary8"):
        return "P3109"
    return "dtype" if name.startswith(("float8", "float6", "float4")) else "split" if name[0] == "E" else "control"

"""What a file of packed tensors holds, as a table."""

from __future__ import annotations

import math
from pathlib import Path

from rich import box
from rich.console import Console
from rich.text import Text

from altgrad.show.tables import WholeTable
from altgrad_core.packed_files import Header, TensorEntry, check_is_file, read_header, unreadable
from altgrad_core.packing import PackedLayout, numpy_dtype
from altgrad_core.scaling import PerBlock, PerTensor

_MEDIUM = 100
"""Columns from which on the table says what the tensors were."""


def header_of(path: Path) -> Header:
    """What a file says of itself; the tensors are not read.

    Raises:
        InputError: for a file that is not whole, is of another kind or version, or contradicts itself.
        OSError: if the file cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    check_is_file(path)
    try:
        with safe_open(path, framework="np") as opened:
            return read_header(path, opened)
    except SafetensorError as error:
        raise unreadable(path, error) from None


def print_header(header: Header, console: Console) -> None:
    """Print a row for each tensor, the sums, and the metadata."""
    console.print(_table(header, console.width), highlight=False, crop=False)
    bytes_now = sum(entry.nbytes for entry in header.tensors.values())
    bytes_before = sum(map(_bytes_before, header.tensors.values()))
    packed = sum(entry.layout is not None for entry in header.tensors.values())
    smaller = f", {bytes_before / bytes_now:.2f}x smaller than unpacked" if bytes_now else ""
    said = f"\n{len(header.tensors):,} tensors, {packed:,} of them packed: {bytes_now:,} bytes{smaller}"
    console.print(Text(said), soft_wrap=True)
    for key, value in sorted(header.metadata.items()):
        console.print(Text(f"{key}: {value}"), soft_wrap=True)


def _table(header: Header, width: int) -> WholeTable:
    is_medium = width >= _MEDIUM
    table = WholeTable(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", show_edge=False)
    table.add_column("tensor", style="bold cyan")
    table.add_column("shape")
    if is_medium:
        table.add_column("was", no_wrap=True)
    table.add_column("format")
    table.add_column("scales")
    table.add_column("bytes", justify="right", no_wrap=True)
    table.add_column("smaller", justify="right", no_wrap=True)
    for name, entry in header.tensors.items():
        table.add_row(*(Text(cell) for cell in _row(name, entry, is_medium)))
    return table


def _row(name: str, entry: TensorEntry, is_medium: bool) -> list[str]:
    layout, before = entry.layout, _bytes_before(entry)
    return [
        name,
        "x".join(map(str, entry.shape)) or "scalar",
        *([entry.dtype] if is_medium else []),
        entry.dtype if layout is None else str(layout.format),
        "-" if layout is None else _scales(layout),
        f"{entry.nbytes:,}",
        "-" if layout is None or not before else f"{before / entry.nbytes:.2f}x",
    ]


def _scales(layout: PackedLayout) -> str:
    granularity = layout.granularity
    if isinstance(granularity, PerTensor):
        share = "tensor"
    elif isinstance(granularity, PerBlock):
        share = f"block{granularity.size}, axis {granularity.axis}"
    else:
        share = f"channel, axes {granularity.axes}"
    return f"{layout.scale_kind} / {share}"


def _bytes_before(entry: TensorEntry) -> int:
    return math.prod(entry.shape) * numpy_dtype(entry.dtype).itemsize

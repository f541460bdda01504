"""The page of what other libraries' casts cost and get wrong: a table, a chart, and every number beside it."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

Row = dict[str, Any]
"""What was measured of one way of casting."""

_NOTES = {
    "lax.reduce_precision": "keeps the top exponent for inf and NaN, so of the eight only E5M2 is whole; StableHLO "
    "specifies that what falls below the normal numbers underflows to zero",
    "fp8_ops.qdq": "with a scale of 1",
    "numerics.convert_to": "Qwix's cast without its scale",
    "round_ndarray": "sat=True for the formats without NaN",
    "Chop": "keeps the top exponent for inf and NaN and takes no bias, so of the eight only E5M2 is whole; beyond max "
    "it returns 65536, which E5M2 does not have, for 61440, and 0 from 65536 up to 131072",
    "Chopf": "two's complement fixed point",
    "Tensor.to": "saturates in E4M3 (since PyTorch 2.12), not in E5M2",
    "_f32_to_floatx_unpacked": "a prototype, and its inverse; its comments exclude inf and NaN",
    "float_quantize": "has neither inf nor NaN; does not say how it breaks ties",
    "fixed_point_quantize": "symmetric=True; does not say how it breaks ties",
    "_quantize_elemwise_core": 'what its own 8-bit formats (E4M3, E5M2 and int8) are cast by, with round="even", '
    "saturate_normals=True and our maximum; not on PyPI, and a version that ends in two.files means these functions of "
    "mx/elemwise_ops.py and mx/formats.py at that commit alone, not the installed package",
}

_COLUMNS = (
    "library",
    "function",
    "arrays",
    "million elements/s",
    "AltGrad, times as fast",
    "formats it lacks",
    "wrong within range",
    "beyond max, inf, NaN: not as AltGrad",
    "of all: not as documented",
)


def _cells(row: Row) -> list[str]:
    counts = list(row["formats"].values())
    who = [f"{row['library']} {row['version']}".strip(), row["call"], row["framework"]]
    lacks = " ".join(row["lacks"]) or "none"
    if row["status"] != "run":
        return [*who, row["status"], "", lacks, "", "", ""]
    wrong = {kind: sum(count["wrong"][kind] for count in counts) for kind in counts[0]["wrong"]}
    kinds = ", ".join(f"{number} {kind}" for kind, number in wrong.items() if number)
    total = f"{sum(wrong.values())} of {sum(count['within_range'] for count in counts)}"
    beyond = [str(sum(count[name] for count in counts)) for name in ("beyond_differs", "beyond_not_as_documented")]
    return [*who, *_speeds(counts), lacks, f"{total}: {kinds}" if kinds else total, *beyond]


def _speeds(counts: Sequence[Row]) -> list[str]:
    if "elements_per_second" not in counts[0]:
        return ["not timed", ""]
    ratios = [count["altgrad_times_as_fast"] for count in counts]
    span = f"{min(ratios):.2f}" if len(ratios) == 1 else f"{min(ratios):.2f} to {max(ratios):.2f}"
    return [f"{np.median([count['elements_per_second'] for count in counts]) / 1e6:.0f}", span]


def show(rows: Iterable[Row]) -> None:
    table = Table(title="Casts to 8-bit floats and back", title_justify="left", show_lines=True)
    for column in _COLUMNS:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*_cells(row))
    Console().print(table)


_PAGE = """# AltGrad beside its peers

Written by `python -m benchmarks.peers --write`; `peers.json` beside this page has every number by format.

{table}

![chart](peers.svg)

- **million elements/s**: {elements} normally distributed float32 values, cast to the format and back to float32, in
  the peer's own framework (jitted in JAX, eager in PyTorch): the median over rounds, and of that the
  median over the formats.
- **AltGrad, times as fast**: AltGrad's cast of the same array, in turn with the peer's in one run: the median of the
  ratios round by round, smallest and largest over the formats. NumPy's arrays it casts by way of JAX and back. Its own
  rows race it against itself and show the noise.
- **formats it lacks**: of the eight, those of which it cannot return every finite value with the parameters it has.
  E3M4 here has bias 1, E0M7 is fixed point; scaling by hand around a cast is not counted.
- **wrong within range**: of a boundary set, the inputs that round to a finite value of the format but not in the peer's
  hands. Right is to nearest, ties to the even code, with the sign of zero kept. The set: every value of the grid, every
  midpoint, float32 subnormals, the two float32 neighbours of each, with both signs. Each wrong input is of the first
  kind that fits: only the *sign of zero* is lost; *on ties*, exactly between two values; *among subnormals* of the
  format; *elsewhere*. Without mantissa bits (E7M0) no tie has an even mantissa: AltGrad, gfloat and torchao take the
  even code, IEEE 754 would take the larger magnitude, as QPyTorch and microxcaling do.
- **beyond max, inf, NaN: not as AltGrad**: inputs of the set that do not round to a finite value, where the result
  differs from AltGrad's default: inf if the format has it, else NaN if it has that, else the maximum, and NaN for NaN.
  These are conventions, not errors (`overflow="saturate"` is AltGrad's other one). **Not as documented** counts those
  that are not what the peer's documentation or comments say either, with NaN for NaN where they say nothing.

{notes}

## The first example of each kind

The last column is what the exact reference gives or, beyond max, what the peer documents.

{examples}

## Measured on

{environments}
"""


def page(rows: Sequence[Row]) -> str:
    notes = dict.fromkeys(
        f"- {row['library']}, `{row['call']}`: {_NOTES[row['call']]}." for row in rows if row["call"] in _NOTES
    )
    examples = [
        [f"{row['library']}, `{row['call']}`, {row['framework']}", name, *case.values()]
        for row in rows
        for name, count in row["formats"].items()
        for case in count["examples"]
    ]
    done = [row for row in rows if row["status"] == "run"]
    return _PAGE.format(
        table=_markdown(_COLUMNS, map(_cells, rows)),
        elements=" or ".join(sorted({f"{row['elements']:,}" for row in done if row["elements"]})) or "(not timed)",
        notes="\n".join(notes),
        examples=_markdown(("library", "format", "kind", "input", "result", "right"), examples),
        environments="\n".join(f"- {each}" for each in dict.fromkeys(row["environment"] for row in done)),
    )


def _markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (columns, ["---"] * len(columns), *rows))


def write(rows: Sequence[Row], folder: Path) -> None:
    """Write ``peers.json``, ``peers.md`` and, where matplotlib is installed, the chart."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "peers.json").write_text(json.dumps(rows, indent=1) + "\n")
    (folder / "peers.md").write_text(page(rows))
    if importlib.util.find_spec("matplotlib") and (ratios := _ratios(rows)):
        draw(ratios, folder / "peers.svg")


_COLOURS = {"JAX": "#2f6fb0", "PyTorch": "#d0702a", "NumPy": "#6b8e3d"}


def _ratios(rows: Iterable[Row]) -> dict[tuple[str, str], list[float]]:
    """Of what was timed, by peer and framework: how many times as fast AltGrad is, format by format."""
    return {
        (f"{row['library']}, {row['call']}", row["framework"]): [
            count["altgrad_times_as_fast"] for count in row["formats"].values()
        ]
        for row in rows
        if row["status"] == "run" and all("altgrad_times_as_fast" in count for count in row["formats"].values())
    }


def draw(ratios: Mapping[tuple[str, str], Sequence[float]], path: Path) -> None:
    """How many times as fast AltGrad is: a bar from the smallest to the largest ratio over the formats."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(8, 0.3 * len(ratios) + 1), layout="constrained")
    axes = figure.subplots()
    for place, ((_, framework), values) in enumerate(ratios.items()):
        low, high = min(values), max(values)
        axes.plot([low, high], [place, place], "o-", color=_COLOURS[framework], markersize=4, linewidth=3)
        text = f"{low:.3g}" if len(values) == 1 else f"{low:.3g} to {high:.3g}"
        axes.annotate(text, (high, place), xytext=(7, 0), textcoords="offset points", va="center", fontsize=7)
    axes.axvline(1, color="#c23b22", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlim(0.7, 2 * max(max(values) for values in ratios.values()))
    axes.set_xticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100"])
    axes.set_yticks(range(len(ratios)), [who for who, _ in ratios])
    axes.invert_yaxis()
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("times as fast as the peer, 2^20 float32 to a format and back", fontsize=8)
    handles = [Line2D([], [], color=colour, linewidth=3, label=name) for name, colour in _COLOURS.items()]
    axes.legend(handles=handles, fontsize=7, loc="lower right", frameon=False)
    figure.savefig(path, metadata={"Date": None})

"""A page of measurements for the docs: one Markdown table and one chart for each comparison."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from benchmarks.timing import Comparison, in_figures

DOCS = Path(__file__).parents[1] / "docs" / "benchmarks"


def write_page(
    name: str, title: str, comparisons: Sequence[Comparison], packages: Sequence[str], beside: str = ""
) -> Path:
    """Write ``docs/benchmarks/<name>.md`` and ``<name>.svg``, which name the machine and what is ``beside`` it."""
    on = ", ".join(filter(None, (beside, machine(packages))))
    DOCS.mkdir(parents=True, exist_ok=True)
    lines = [f"# {title}", "", f"Written by `python -m benchmarks.{name} --write` on {on}.", ""]
    lines += [
        "Speeds are medians of ratios, round by round, within one run; more is faster.",
        "",
        f"![chart]({name}.svg)",
    ]
    for each in comparisons:
        lines += [
            "",
            f"## {each.title}",
            "",
            f"| | median ms | speed against {each.reference} | wanted |",
            "|---|---|---|---|",
        ]
        for row, milliseconds, ratio, wanted in each.rows():
            goal = "" if wanted is None else f"{wanted:.2f}"
            lines.append(f"| {row} | {milliseconds:.3f} | {in_figures(ratio)} | {goal} |")
    page = DOCS / f"{name}.md"
    page.write_text("\n".join(lines) + "\n")
    _draw(comparisons, DOCS / f"{name}.svg")
    return page


def machine(packages: Sequence[str]) -> str:
    names = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, {versions}"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def _draw(comparisons: Sequence[Comparison], path: Path) -> None:
    """Bars for the speeds, a mark where a speed is wanted."""
    from matplotlib.figure import Figure

    heights = [len(each.timings) + 1.6 for each in comparisons]
    figure = Figure(figsize=(8, 0.27 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(comparisons), 1, height_ratios=heights, squeeze=False)[:, 0]
    for panel, each in zip(panels, comparisons, strict=True):
        rows = each.rows()
        names, speeds = [row[0] for row in rows], [row[2] for row in rows]
        colours = ["#8a8f98" if name == each.reference else "#2f6fb0" for name in names]
        bars = panel.barh(names, speeds, color=colours, height=0.7)
        panel.bar_label(bars, [in_figures(speed) for speed in speeds], padding=3, fontsize=7)
        goals = [(index, row[3]) for index, row in enumerate(rows) if row[3] is not None]
        panel.plot(
            [goal for _, goal in goals], [index for index, _ in goals], "|", color="#c23b22", markersize=9, mew=2
        )
        panel.invert_yaxis()
        panel.set_title(each.title, loc="left", fontsize=9)
        panel.tick_params(labelsize=7)
        panel.set_xlim(0, max(*speeds, *(goal for _, goal in goals), 1.0) * 1.15)
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("speed against the grey bar; red: wanted", fontsize=8)
    figure.savefig(path, metadata={"Date": None})

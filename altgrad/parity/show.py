"""Comparisons and lockstep runs, printed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from altgrad.parity.environment import Environment
from altgrad.parity.records import Comparison, TensorRecord
from altgrad.parity.runs import Difference, Lockstep, Run
from altgrad.show.tables import WholeTable

_MOST_ROWS = 40


def comparison_table(found: Comparison) -> RenderableType:
    """A row for each tensor, those that differ first if there are too many for all."""
    shown = _most_telling(found.tensors)
    table = _table("tensor", "dtype", "shape", "differing", "ulps", "first difference")
    for tensor in shown:
        table.add_row(*map(Text, _cells(tensor, found.labels)), style="" if tensor.identical else "bold")
    parts: list[RenderableType] = [table]
    if len(shown) < len(found.tensors):
        parts.append(Text(f"and {len(found.tensors) - len(shown)} more", style="dim"))
    if found.cause is not None:
        parts.append(Text(f"cause: {found.cause.told(found.labels)}"))
    return Group(*parts)


def lockstep_report(found: Lockstep, about: str = "") -> RenderableType:
    """The verdict first, then what was run, every run, the first difference, and where it ran."""
    style = "bold green" if found.passed else "bold red"
    parts: list[RenderableType] = [Text(verdict(found), style=style)]
    parts += [Text(about, style="dim")] if about else []
    parts += [Text(), _runs(found)]
    if found.first_difference is not None:
        parts += [_titled("First difference"), _facts(difference_facts(found.first_difference, found.decisive.labels))]
    return Group(*parts, _titled("Environment"), _facts(environment_facts(found.environment)))


def print_lockstep(found: Lockstep, console: Console, about: str = "") -> None:
    """Print a lockstep's report."""
    console.print(lockstep_report(found, about), highlight=False, crop=False)


def verdict(found: Lockstep) -> str:
    """What a lockstep found, in a sentence."""
    one, other = found.decisive.labels
    first = found.first_difference
    if found.run is None:
        return f"{one} does not repeat itself, so nothing was compared: does its make build everything anew?"
    if first is not None:
        return f"{one} and {other} part at step {first.step}, in {first.tensor.name}: {first.cause.name}"
    if found.identical_steps == found.steps:
        but_for = f"but for {' and '.join(found.run.ignored)}" if found.run.ignored else "every bit"
        return f"{one} and {other} are identical in {_steps(found.steps)}, {but_for}"
    return f"{one} and {other} are within tolerance in {_steps(found.steps)}, {found.identical_steps} of them identical"


def _steps(count: int) -> str:
    return f"{count} step{'s' * (count != 1)}"


def _runs(found: Lockstep) -> WholeTable:
    table = _table("run", "steps", "identical", "most ulps", "")
    for run in (*found.repeats, *([found.run] if found.run else [])):
        counts = (f"{run.steps:,}", f"{run.identical_steps:,}", f"{run.largest_ulps:,}")
        table.add_row(Text(" against ".join(run.labels)), *counts, _mark(run))
    return table


def outcome(run: Run) -> str:
    """What became of a run, in a word or two."""
    if not run.passed:
        return "differs"
    return "identical" if run.identical_steps == run.steps else "within tolerance"


def _mark(run: Run) -> Text:
    return Text(outcome(run), style="green" if run.passed else "bold red")


def difference_facts(first: Difference, labels: tuple[str, str]) -> dict[str, str]:
    """Where two runs part, and why, by topic."""
    tensor = first.tensor
    facts = {"where": f"step {first.step}, {tensor.name}"}
    if tensor.first is None:
        facts["what"] = tensor.told(labels)
    else:
        ulps = "" if tensor.largest_ulps is None else f", by up to {tensor.largest_ulps:,} ulps"
        facts["what"] = f"{tensor.differing:,} of {tensor.elements:,} {tensor.dtypes[0]} elements{ulps}"
        facts["kinds"] = ", ".join(f"{count:,} by {kind}" for kind, count in tensor.kinds.items())
        facts["first"] = str(tensor.first)
    return facts | {"cause": first.cause.told(labels)}


def environment_facts(here: Environment) -> dict[str, str]:
    """Where a comparison ran, by topic."""
    return {
        "versions": ", ".join([f"Python {here.python}", *(" ".join(pair) for pair in here.versions.items())]),
        "machine": f"{here.system}, {here.processor}, {here.cores} cores",
        "instructions": ", ".join(here.instruction_sets) or "unknown",
        "threads": ", ".join(f"{name} {count}" for name, count in here.threads.items()) or "unknown",
        "settings": ", ".join(f"{name}={value}" for name, value in here.settings.items()) or "none",
    }


def _facts(facts: Mapping[str, str]) -> Table:
    """Topics and facts in two columns; as :class:`Text`, for rich takes brackets in a plain string for markup."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for topic, fact in facts.items():
        grid.add_row(topic, Text(fact))
    return grid


def _most_telling(tensors: Sequence[TensorRecord]) -> Sequence[TensorRecord]:
    if len(tensors) <= _MOST_ROWS:
        return tensors
    return sorted(tensors, key=lambda tensor: tensor.identical)[:_MOST_ROWS]


def _cells(tensor: TensorRecord, labels: tuple[str, str]) -> tuple[str, ...]:
    name = tensor.name or "(the tensor)"
    dtype = " / ".join(dict.fromkeys(each or "-" for each in tensor.dtypes))
    shape = " / ".join(dict.fromkeys("-" if each is None else str(list(each)) for each in tensor.shapes))
    if tensor.problem is not None:
        return name, dtype, shape, "", "", tensor.told(labels)
    ulps = "" if tensor.largest_ulps is None else f"{tensor.largest_ulps:,}"
    first = "" if tensor.first is None else str(tensor.first)
    return name, dtype, shape, f"{tensor.differing:,} of {tensor.elements:,}", ulps, first


def _table(*columns: str) -> WholeTable:
    table = WholeTable(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="dim")
    for name in columns:
        is_number = name in ("differing", "ulps", "steps", "identical", "most ulps")
        table.add_column(name, justify="right" if is_number else "left", no_wrap=is_number)
    return table


def _titled(title: str) -> Text:
    return Text(f"\n{title}", style="bold")

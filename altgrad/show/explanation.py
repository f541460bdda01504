"""The cast of one value, printed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from altgrad.explain import Candidate, Explanation, Outcome
from altgrad.libraries import installed_version
from altgrad.numbers import code_fields, code_hex, write_decimal, write_number
from altgrad.show.tables import WholeTable
from altgrad_core.formats import Format
from altgrad_core.vectors import float32_bits

_MOST_BITS_IN_BINARY = 16


def print_explanation(told: Explanation, console: Console) -> None:
    """Print an explanation: the answer first, then the input, the candidates, the reason, and what others do."""
    for part in parts(told):
        console.print(part, highlight=False, crop=False)


def parts(told: Explanation) -> Iterator[RenderableType]:
    """The parts of an explanation, in the order in which they are read."""
    yield _headline(told)
    yield Text(told.reason)
    yield _input(told)
    if told.candidates:
        yield _titled("Candidates", _candidates(told))
    if told.overflows and told.by_policy is not None:
        yield _titled("By overflow policy", _policies(told))
    yield _titled("Conventions", _conventions(told))


def _titled(title: str, body: RenderableType) -> RenderableType:
    return Group(Text(f"\n{title}", style="bold"), body)


def _table() -> WholeTable:
    return WholeTable(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="dim")


def _headline(told: Explanation) -> Text:
    modes = f"{told.rounding}, {told.overflow}"
    if told.result is None:
        ends = " or ".join(write_number(candidate.value) for candidate in told.candidates)
        return Text.assemble((f"{told.number.text} in {told.format} is {ends}", "bold cyan"), (f"   {modes}", "dim"))
    value = write_number(told.result.value)
    return Text.assemble((f"{told.number.text} in {told.format} is {value}", "bold cyan"), (f"   {modes}", "dim"))


def _input(told: Explanation) -> Table:
    number = told.number
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row()
    table.add_row("read as", f"a {number.kind}")
    bits = f"0x{number.bits:08x}"
    if number.is_rounded and math.isfinite(number.value):
        table.add_row("float32", f"{bits}: {number.text} is not a float32, the nearest one is")
        table.add_row("", write_decimal(number.value))
    elif number.is_rounded:
        table.add_row("float32", f"{bits}: {number.text} is beyond float32's range")
    else:
        table.add_row("float32", f"{bits}, exact" if number.exact is not None else bits)
    if told.result is not None:
        table.add_row("result", _outcome(told.result, told.format))
    return table


def _outcome(outcome: Outcome, format: Format) -> str:
    if math.isinf(outcome.value) and not format.has_inf:
        return f"{write_number(outcome.value)}   float32 0x{outcome.bits:08x}, encoded as max: {_code(outcome, format)}"
    return f"{write_number(outcome.value)}   float32 0x{outcome.bits:08x}, code {_code(outcome, format)}"


def _code(outcome: Outcome, format: Format) -> str:
    if format.bits > _MOST_BITS_IN_BINARY:
        return code_hex(outcome.code, format)
    return f"{code_hex(outcome.code, format)} = {code_fields(outcome.code, format)}"


def _candidates(told: Explanation) -> WholeTable:
    table = _table()
    binary = ("binary",) if told.format.bits <= _MOST_BITS_IN_BINARY else ()
    for name in ("", "value", "code", *binary, "distance", "of the gap"):
        table.add_column(name, justify="left" if name in ("", "binary") else "right", no_wrap=True)
    for candidate in told.candidates:
        won = candidate is told.winner
        table.add_row("->" if won else "", *_candidate_row(candidate, told.format), style="bold" if won else "")
    return table


def _candidate_row(candidate: Candidate, format: Format) -> tuple[str, ...]:
    code = "none" if candidate.code is None else code_hex(candidate.code, format)
    binary = (_binary(candidate.code, format),) if format.bits <= _MOST_BITS_IN_BINARY else ()
    share = f"{float(candidate.share):.6g}" if candidate.share != Fraction(1, 2) else "1/2"
    return write_number(candidate.value), code, *binary, _distance(candidate.distance), share


def _binary(code: int | None, format: Format) -> str:
    return "an overflow" if code is None else f"{code_fields(code, format)}  {'odd' if code & 1 else 'even'}"


def _distance(distance: Fraction) -> str:
    exact = write_number(distance)
    return exact if len(exact) <= 10 else f"~{float(distance):.6g}"


def _policies(told: Explanation) -> WholeTable:
    table = _table()
    table.add_column("policy", no_wrap=True)
    table.add_column("result")
    for policy, outcome in (told.by_policy or {}).items():
        chosen = policy == told.overflow
        table.add_row(policy, _outcome(outcome, told.format), style="bold" if chosen else "")
    return table


def _conventions(told: Explanation) -> WholeTable:
    table = _table()
    table.add_column("library", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("float32", no_wrap=True)
    table.add_column("how", style="dim")
    ours = told.result
    if ours is None:
        table.add_row("altgrad", "?", "", "depends on the random bits", style="bold")
    else:
        table.add_row("altgrad", write_number(ours.value), f"0x{ours.bits:08x}", "", style="bold")
    for answer in told.others:
        version = installed_version(answer.library)
        name = f"{answer.library} {version}" if version else answer.library
        if answer.value is None:
            table.add_row(name, "-", "", answer.how)
            continue
        differs = ours is not None and _differs(answer.value, ours.value)
        mark = Text("differs: ", style="bold yellow") if differs else Text()
        shown = write_number(answer.value)
        table.add_row(name, shown, f"0x{float32_bits(answer.value):08x}", mark.append(answer.how, style="dim"))
    return table


def _differs(one: float, other: float) -> bool:
    if math.isnan(one) or math.isnan(other):
        return math.isnan(one) != math.isnan(other)
    return one != other or math.copysign(1, one) != math.copysign(1, other)

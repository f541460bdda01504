"""Everything about one format, printed."""

from __future__ import annotations

import math
from collections.abc import Iterator

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from altgrad.libraries import dtype_names
from altgrad.numbers import code_fields, code_hex, write_number
from altgrad.show.tables import WholeTable
from altgrad.story import Binade, binades, in_words, multiples, namesakes, other_names, positive_values, specials
from altgrad_core.formats import OVERFLOWS, Format
from altgrad_core.reference import round_to_format
from altgrad_core.stability import FORMAT_FALLBACK, clip_threshold
from altgrad_core.vector_inputs import beyond_max

_MOST_BINADES = 20
_LADDER_BITS = 8
_LADDER_END = 16
"""Codes that the ladder of a format of more than 8 bits shows at either end; and the most it shows in a row."""

_LONG_CELL, _SHORT_CELL = 9, 7
"""Characters up to which values are written as decimals: where half of the longest row fits, and where not."""


def story(format: Format, width: int) -> Iterator[RenderableType]:
    """The parts of a format's story, in the order in which they are read."""
    yield Text(in_words(format))
    yield _facts(format)
    yield _titled("Spacing", _spacing(format))
    yield _titled("Overflow", _overflow(format))
    yield _titled("Values" if format.bits <= _LADDER_BITS else "Values, both ends", _ladder(format, width))


def _titled(title: str, body: RenderableType) -> RenderableType:
    return Group(Text(f"\n{title}", style="bold"), body)


def _plain_table(*columns: str) -> WholeTable:
    table = WholeTable(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="dim")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _facts(format: Format) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row()
    for name, said in _fact_rows(format):
        table.add_row(name, said)
    return table


def _fact_rows(format: Format) -> Iterator[tuple[str, str]]:
    yield "layout", _layout(format)
    yield "largest", _with_code(format, format.max_code)
    if format.min_normal is not None and format.is_signed:
        yield "smallest normal", _with_code(format, 1 << format.mantissa_bits)
    if format.smallest_subnormal is not None:
        yield "smallest subnormal", _with_code(format, 1)
    elif not format.is_signed:
        yield "smallest", _with_code(format, 0)
    yield "positive values", f"{positive_values(format):,}"
    yield "special codes", _special_codes(format)
    equal = [*other_names(format), *([] if format.spelling == str(format) else [format.spelling])]
    if equal:
        yield "equals", ", ".join(equal)
    if dtypes := dtype_names(format):
        yield "dtype", f"{dtypes[0]} of {'NumPy' if dtypes[0] in ('float16', 'float32') else 'ml_dtypes'}"
    if scaled := multiples(format):
        said = [f"{name} is {write_number(ratio)} x {format}" for name, ratio in scaled]
        yield "up to a scale", f"{'; '.join(said)}, on every code"
    if others := namesakes(format):
        yield (
            "not to be taken for",
            "; ".join(
                f"{other} (bias {other.bias}, specials: {specials(other)}, max "
                f"{write_number(other.max_representable_value)})"
                for other in others
            ),
        )
    yield "clip threshold", f"{clip_threshold(format):.6g} x the base threshold, which is E5M2's"
    if str(format) in FORMAT_FALLBACK:
        yield "a failing run goes to", FORMAT_FALLBACK[str(format)] or "nothing: this is the last resort"


def _layout(format: Format) -> str:
    letters = "s" * format.is_signed, "e" * format.exponent_bits, "m" * format.mantissa_bits
    return f"{' '.join(filter(None, letters))}   (bit {format.bits - 1} to bit 0)"


def _with_code(format: Format, code: int) -> str:
    value = math.ldexp(*format.finite_parts(code))
    exact = write_number(value, 12)
    about = f" = {value:.6g}" if "2^" in exact else ""
    return f"{exact}{about}   code {code_hex(code, format)}, {code_fields(code, format)}"


def _special_codes(format: Format) -> str:
    if format.nan_code is None:
        return "none"
    sign = format.sign_mask
    said: list[str] = []
    if format.inf_code is not None:
        said.append(f"±inf {code_hex(format.inf_code, format)} {code_hex(format.inf_code | sign, format)}")
    count = format.magnitude_mask - (format.inf_code or format.max_code)
    if not format.has_negative_zero:
        said.append(f"NaN {code_hex(format.nan_code, format)}")
    elif count == 1:
        said.append(f"NaN {code_hex(format.magnitude_mask, format)} {code_hex(format.magnitude_mask | sign, format)}")
    else:
        first, last = format.magnitude_mask - count + 1, format.magnitude_mask
        both = ", ".join(f"{code_hex(first | s, format)} to {code_hex(last | s, format)}" for s in (0, sign))
        said.append(f"NaN {both} (as a result {code_hex(format.nan_code, format)})")
    return "; ".join(said)


def _spacing(format: Format) -> WholeTable:
    # The codes of float32 are too long for a terminal, and nobody looks them up.
    columns = 6 if format.bits <= _LADDER_BITS * 2 else 5
    table = _plain_table(*("from", "to", "step", "step / from", "values", "codes")[:columns])
    found = binades(format)
    shown = [*found[:6], None, *found[-6:]] if len(found) > _MOST_BINADES else found
    for binade in shown:
        if binade is None:
            table.add_row("...", f"{len(found) - 12} more", "...", style="dim")
        else:
            table.add_row(*_binade_row(binade, format)[:columns], style="dim" if binade.is_subnormal else "")
    if any(binade.is_subnormal for binade in found):
        table.caption = "first row: subnormals, all with the same step" if format.exponent_bits else None
        table.caption_justify = "left"
    return table


def _binade_row(binade: Binade, format: Format) -> tuple[str, ...]:
    codes = code_hex(binade.first, format)
    return (
        write_number(binade.low),
        write_number(binade.high),
        write_number(binade.step),
        f"{binade.relative_step * 100:.3g}%",
        f"{binade.last - binade.first + 1:,}",
        codes if binade.first == binade.last else f"{codes} to {code_hex(binade.last, format)}",
    )


def _overflow(format: Format) -> RenderableType:
    """What becomes of what is too large, by policy; and from where on it is."""
    table = _plain_table("policy", "finite, too large", "+inf")
    maximum = format.max_representable_value
    for policy in OVERFLOWS:
        finite = round_to_format(2 * beyond_max(format), format, overflow=policy)
        table.add_row(policy, write_number(finite), write_number(round_to_format(math.inf, format, overflow=policy)))
    edge = (maximum + beyond_max(format)) / 2
    verdict = "still rounds to max, whose code is even" if format.max_code % 2 == 0 else "is too large already"
    if edge > 3.4028235e38:
        return table
    note = f"Too large to nearest even: beyond {write_number(edge, 12)}, which {verdict}."
    return Group(table, Text(note, style="dim"))


def _ladder(format: Format, width: int) -> RenderableType:
    """All codes without their sign, in rows like a hex dump's: the row's first code, then a value for each."""
    last = format.magnitude_mask
    label = len(code_hex(last, format))
    for digits, gap in ((_LONG_CELL, 2), (_SHORT_CELL, 2), (_SHORT_CELL, 1)):
        cells = {code: _cell(format, code, digits) for code in _ladder_codes(format)}
        widest = max(map(len, cells.values())) + gap
        columns = min(1 << max(((width - label) // widest).bit_length() - 1, 0), _LADDER_END)
        if columns >= _LADDER_END // 2:
            break
    text = Text(no_wrap=True, overflow="ignore")
    digits = len(f"{columns - 1:x}")
    text.append(" " * label + "".join(f"{f'+{k:0{digits}x}':>{widest}}" for k in range(columns)) + "\n", style="dim")
    previous = -columns
    for start in sorted(code for code in cells if code % columns == 0):
        if start - previous > columns:
            text.append(f"{'...':>{label}}\n", style="dim")
        text.append(code_hex(start, format), style="dim")
        row = "".join(f"{cells[code]:>{widest}}" for code in range(start, start + columns) if code in cells)
        text.append(f"{row}\n")
        previous = start
    text.rstrip()
    return text


def _ladder_codes(format: Format) -> list[int]:
    last = format.magnitude_mask
    if format.bits <= _LADDER_BITS:
        return list(range(last + 1))
    around_max = format.max_code + 1 - format.max_code % _LADDER_END - 1
    return [*range(_LADDER_END), *range(around_max, around_max + _LADDER_END)]


def _cell(format: Format, code: int, digits: int) -> str:
    return write_number(format.to_real(code), digits)


def print_story(format: Format, console: Console) -> None:
    """Print a format's story, its name first."""
    console.print(Text(str(format), style="bold cyan"))
    for part in story(format, console.width):
        console.print(part, highlight=False, crop=False)

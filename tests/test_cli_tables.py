"""Tables that cut nothing: what they do where there is no room."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich import box
from rich.console import Console, RenderableType

from altgrad.parity.compare import compare
from altgrad.parity.show import comparison_table
from altgrad.replay import Replay
from altgrad.replay import _table as decisions
from altgrad.show.tables import WholeTable
from altgrad_core.events import Event


def printed(part: RenderableType, width: int) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width).print(part, crop=False)
    return [line.rstrip() for line in out.getvalue().splitlines()]


def table(*cells: str) -> WholeTable:
    made = WholeTable(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, show_header=False)
    for cell in cells:
        made.add_column("", no_wrap=cell[0].isdigit())
    made.add_row(*cells)
    return made


@pytest.mark.parametrize(
    ("width", "lines"),
    [
        (40, ["0.9921875   some words of text   57344"]),
        (30, ["0.9921875   some words   57344", "            of text"]),
        (22, ["0.9921875 some   57344", "          words", "          of", "          text"]),
        (5, ["0.9921875 some  57344", "          words", "          of", "          text"]),
    ],
)
def test_first_text_wraps_then_columns_move_together(width: int, lines: list[str]) -> None:
    assert printed(table("0.9921875", "some words of text", "57344"), width) == lines


def test_words_break_late() -> None:
    assert printed(table("1", "transformer.weight", "2"), 24) == ["1 transformer.weight 2"]
    assert printed(table("1", "transformer.weight", "2"), 8) == ["1 transformer. 2", "  weight"]


@pytest.mark.parametrize("width", [20, 40, 80])
def test_comparisons_are_whole(width: int) -> None:
    one, other = {"layer.w": np.arange(2e5, dtype=np.float32)}, {"layer.w": np.zeros(200_000, np.float32)}
    lines = printed(comparison_table(compare(one, other, labels=("jax", "torch"))), width)
    assert any("199,999 of 200,000" in line for line in lines)
    assert "…" not in "".join(lines)


@pytest.mark.parametrize("width", [20, 40, 80])
def test_decisions_are_whole(width: int) -> None:
    event = Event(123_456, "shift", "stall", {"stall_rate": 0.123456})
    lines = printed(decisions(Replay(1, (event,), (event,), None)), width)
    assert any("123456" in line for line in lines)
    assert any("0.1235" in line for line in lines)
    assert "…" not in "".join(lines)

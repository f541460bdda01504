"""Casts in torch against a plain multiply, eager and compiled, in one run; both write a new tensor."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from altgrad_core.formats import EIGHT, Rounding
from altgrad_torch import FormatParams, cast_counts, encode, hash_bits, quantize, quantize_blocks
from benchmarks.page import write_page
from benchmarks.timing import Comparison, side_by_side

_SIZES = {"2^24 elements": 2**24, "2^18 elements, in cache": 2**18}
_ROUNDS = 25


def main() -> None:
    for comparison in comparisons():
        comparison.show()


def comparisons() -> Iterator[Comparison]:
    """One after the other, measured when asked for."""
    generator = torch.Generator().manual_seed(0)
    for label, size in _SIZES.items():
        x = torch.randn(size, generator=generator)
        yield _eager(x, label)
        yield _compiled(x, label)
        yield from _counts(x, label)


def _eager(x: Tensor, label: str) -> Comparison:
    contestants: dict[str, Callable[[], object]] = {"x * c": lambda: x * 1.5}
    for name in EIGHT:
        contestants[name] = _to(x, name)
    contestants["bf16"] = _to(x, "bf16")
    contestants["E5M2, toward zero"] = _to(x, "E5M2", "toward_zero")
    drawn = hash_bits(tuple(x.shape), seed=0)
    contestants["E4M3, stochastic, given bits"] = lambda: quantize(x, "E4M3", rounding="stochastic", random_bits=drawn)
    contestants["E4M3 in blocks of 32"] = lambda: quantize_blocks(x, "E4M3")
    contestants["encode to E4M3"] = lambda: encode(x, "E4M3")
    contestants["to(float8_e5m2)"] = lambda: x.to(torch.float8_e5m2).to(torch.float32)
    timings = side_by_side(contestants, _ROUNDS)
    wanted = (*EIGHT, "bf16", "E4M3 in blocks of 32")
    return Comparison(f"Eager, {label}", "x * c", timings, dict.fromkeys(wanted, 0.25))


def _to(x: Tensor, name: str, rounding: Rounding = "nearest_even") -> Callable[[], object]:
    return lambda: quantize(x, name, rounding=rounding)


def _compiled(x: Tensor, label: str) -> Comparison:
    """The format as data: one program for all of them."""
    factor = torch.tensor(1.5)
    multiply = torch.compile(lambda x, c: x * c, fullgraph=True, dynamic=False)
    cast = torch.compile(lambda x, params: quantize(x, params), fullgraph=True, dynamic=False)
    hashed = torch.compile(
        lambda x, params, step: quantize(
            x, params, rounding="stochastic", random_bits=hash_bits(tuple(x.shape), 0, step)
        ),
        fullgraph=True,
        dynamic=False,
    )
    contestants: dict[str, Callable[[], object]] = {"x * c": lambda: multiply(x, factor)}
    for name in (*EIGHT, "bf16"):
        contestants[name] = _by_data(cast, x, FormatParams.from_format(name))
    step, e4m3 = torch.tensor(1), FormatParams.from_format("E4M3")
    contestants["E4M3, stochastic by hash"] = lambda: hashed(x, e4m3, step)
    timings = side_by_side(contestants, _ROUNDS)
    return Comparison(f"Compiled, {label}", "x * c", timings, dict.fromkeys(EIGHT, 0.85))


def _by_data(cast: Callable[[Tensor, FormatParams], Tensor], x: Tensor, params: FormatParams) -> Callable[[], object]:
    return lambda: cast(x, params)


def _counts(x: Tensor, label: str) -> Iterator[Comparison]:
    """On one thread and on as many as torch takes."""
    usual, half = torch.get_num_threads(), x.to(torch.bfloat16)
    scales = torch.full_like(x, 0.5)
    contestants: dict[str, Callable[[], object]] = {
        "x.sum()": x.sum,
        "counts": lambda: cast_counts(x, "E5M2"),
        "under a scale by which some vanish": lambda: cast_counts(x, "E5M2", scale=2.0**10),
        "of bfloat16": lambda: cast_counts(half, "E5M2"),
        "under a scale for each element": lambda: cast_counts(x, "E5M2", scale=scales),
    }
    for threads in dict.fromkeys((1, usual)):
        torch.set_num_threads(threads)
        timings = side_by_side(contestants, _ROUNDS)
        yield Comparison(f"Counts, {label}, threads: {threads}", "x.sum()", timings)
    torch.set_num_threads(usual)


if __name__ == "__main__":
    measured = list(comparisons())
    for measurement in measured:
        measurement.show()
    if "--write" in sys.argv[1:]:
        print(write_page("casting_torch", "What a cast costs in torch", measured, ["torch"]))

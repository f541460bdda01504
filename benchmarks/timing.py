"""Side by side: every contestant in turn, again and again, so that a machine that changes speed changes all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import numpy as np
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Timing:
    """Seconds of the counted rounds of one contestant."""

    seconds: np.ndarray

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    def speed_against(self, reference: Timing) -> float:
        """How fast, with the reference as 1: the median of the ratios round by round."""
        return float(np.median(reference.seconds / self.seconds))


def side_by_side(contestants: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 3) -> dict[str, Timing]:
    """Time zero-argument functions in turn; what they return is waited for."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds + warmup):
        for name, function in contestants.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            seconds[name].append(time.perf_counter() - start)
    return {name: Timing(np.array(values[warmup:])) for name, values in seconds.items()}


def show(title: str, timings: Mapping[str, Timing], reference: str, unit: str = "speed against") -> None:
    table = Table(title=title, title_justify="left")
    table.add_column("")
    table.add_column("median ms", justify="right")
    table.add_column(f"{unit} {reference}", justify="right")
    for name, timing in timings.items():
        ratio = timing.speed_against(timings[reference])
        table.add_row(name, f"{timing.median * 1e3:.3f}", f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.4f}")
    Console().print(table)

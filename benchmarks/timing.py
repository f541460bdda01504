"""Side by side: every contestant in turn, again and again, so that a machine that changes speed changes all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
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


@dataclass(frozen=True)
class Comparison:
    """Contestants that ran side by side.

    Attributes:
        title: what was compared.
        reference: the contestant whose speed is 1.
        timings: by contestant.
        wanted: the speed that a contestant is to reach, where one is set.
    """

    title: str
    reference: str
    timings: Mapping[str, Timing]
    wanted: Mapping[str, float] = field(default_factory=dict)

    def rows(self) -> list[tuple[str, float, float, float | None]]:
        """Name, median milliseconds, speed against the reference, wanted speed."""
        first = self.timings[self.reference]
        return [
            (name, timing.median * 1e3, timing.speed_against(first), self.wanted.get(name))
            for name, timing in self.timings.items()
        ]

    def show(self) -> None:
        """Print it."""
        table = Table(title=self.title, title_justify="left")
        table.add_column("")
        for heading in ("median ms", f"speed against {self.reference}", "wanted"):
            table.add_column(heading, justify="right")
        for name, milliseconds, ratio, wanted in self.rows():
            table.add_row(name, f"{milliseconds:.3f}", in_figures(ratio), "" if wanted is None else f"{wanted:.2f}")
        Console().print(table)


def in_figures(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.4f}"


class Donated:
    """A function applied to its own result over and over, its argument donated."""

    def __init__(self, function: Callable[..., jax.Array], start: jax.typing.ArrayLike, *rest: object) -> None:
        self._function, self._rest = jax.jit(function, donate_argnums=0), rest
        self._value = jnp.array(start)

    def __call__(self) -> jax.Array:
        self._value = self._function(self._value, *self._rest)
        return self._value


def side_by_side(
    contestants: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int = 3,
    before: Callable[[], object] = lambda: None,
) -> dict[str, Timing]:
    """Time zero-argument functions in turn; what they return is waited for. ``before`` each goes what is not timed."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds + warmup):
        for name, function in contestants.items():
            before()
            start = time.perf_counter()
            jax.block_until_ready(function())
            seconds[name].append(time.perf_counter() - start)
    return {name: Timing(np.array(values[warmup:])) for name, values in seconds.items()}


def show(title: str, timings: Mapping[str, Timing], reference: str) -> None:
    Comparison(title, reference, timings).show()

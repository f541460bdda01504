"""What a process that has just started takes to import the core, and to the first result of a cast.

``python -m benchmarks.cold [--write]``. Each is a process of its own, its end included; the figures hold for files that
lie in the system's cache.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial

from benchmarks.page import write_page
from benchmarks.timing import Comparison, side_by_side

_ROUNDS = 11
_JAX = "import jax, jax.numpy as jnp; x = jnp.ones(1000)"
_TORCH = "import torch; x = torch.ones(1000)"
CORE = {
    "python": "pass",
    "numpy": "import numpy",
    "altgrad_core": "import altgrad_core.formats, altgrad_core.reference",
}
IN_JAX = {
    "x * c, under jit": f"{_JAX}; print(jax.jit(lambda x: x * 0.3)(x)[0])",
    "quantize": f"{_JAX}; from altgrad_jax import quantize; print(quantize(x, 'E4M3')[0])",
    "quantize, under jit": f"{_JAX}; from altgrad_jax import quantize\n"
    "print(jax.jit(quantize, static_argnums=1)(x, 'E4M3')[0])",
}
IN_TORCH = {
    "x * c": f"{_TORCH}; print((x * 0.3)[0])",
    "quantize": f"{_TORCH}; from altgrad_torch import quantize; print(quantize(x, 'E4M3')[0])",
}


def _run(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def _side_by_side(title: str, programs: Mapping[str, str]) -> Comparison:
    contestants: dict[str, Callable[[], None]] = {name: partial(_run, code) for name, code in programs.items()}
    return Comparison(title, next(iter(programs)), side_by_side(contestants, _ROUNDS))


def comparisons() -> Iterator[Comparison]:
    yield _side_by_side("Importing the core", CORE)
    yield _side_by_side("The first result in JAX", IN_JAX)
    yield _side_by_side("The first result in torch", IN_TORCH)


if __name__ == "__main__":
    measured = list(comparisons())
    for measurement in measured:
        measurement.show()
    if "--write" in sys.argv[1:]:
        print(write_page("cold", "What a cold start takes", measured, ["jax", "torch"]))

"""Sums that are exact, rounded once, against XLA's float32: products, a convolution, and the step of a twin.

``python -m benchmarks.exact [--write]``. Operands lie on the grid of a format, under the scale of their own amax. One
float64 dot is enough for those of E0M7 to E4M3; what of the others mixes magnitudes enough is cut into slices.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from altgrad_core.formats import EIGHT
from altgrad_core.twins import MLPShape, Recipe
from altgrad_jax import FormatParams, exact_matmul
from altgrad_jax.nn.convolution import exact_convolution
from altgrad_jax.twins import make
from altgrad_jax.twins.products import own_scale_cast
from benchmarks.page import write_page
from benchmarks.timing import Comparison, side_by_side

_FLOAT32 = "float32"
_ONE_DOT = ("E0M7", "E1M6", "E2M5", "E3M4", "E4M3")
_WANTED = dict.fromkeys(_ONE_DOT, 1 / 4)
_SIZE = 512
_IMAGES, _KERNEL = (8, 32, 32, 32), (3, 3, 32, 32)
_MLP = MLPShape((784, 512, 512, 10), batch=64)
_AXES = ("NHWC", "HWIO", "NHWC")

Contestants = dict[str, Callable[[], object]]


def on_grid(name: str, *shape: int) -> jax.Array:
    x = jnp.asarray(np.random.default_rng(0).standard_normal(shape).astype(np.float32))
    return own_scale_cast(x, FormatParams.from_format(name))


def comparisons() -> Iterator[Comparison]:
    yield Comparison(f"Products of two {_SIZE} x {_SIZE} matrices", _FLOAT32, side_by_side(_products(), 15), _WANTED)
    yield Comparison(f"Convolution of {_IMAGES} with {_KERNEL}", _FLOAT32, side_by_side(_convolutions(), 15))
    title = f"SGD step of an MLP {'-'.join(map(str, _MLP.sizes))}, batch {_MLP.batch}"
    yield Comparison(title, _FLOAT32, side_by_side(_steps(), 15), _WANTED)


def _products() -> Contestants:
    plain, exact = jax.jit(jnp.matmul), jax.jit(exact_matmul)
    found: Contestants = {_FLOAT32: partial(plain, *(on_grid("float32", _SIZE, _SIZE),) * 2)}
    for name in EIGHT:
        found[name] = partial(exact, *(on_grid(name, _SIZE, _SIZE),) * 2)
    return found | {"float32, exact": partial(exact, *(on_grid("float32", _SIZE, _SIZE),) * 2)}


def _convolutions() -> Contestants:
    plain, exact = (
        jax.jit(partial(convolve, window_strides=(1, 1), padding="SAME", dimension_numbers=_AXES))
        for convolve in (lax.conv_general_dilated, exact_convolution)
    )
    operands = on_grid("E4M3", *_IMAGES), on_grid("E4M3", *_KERNEL)
    return {_FLOAT32: partial(plain, *operands), "E4M3": partial(exact, *operands)}


def _steps() -> Contestants:
    recipes = {_FLOAT32: Recipe("float32", accumulate="native"), "E5M2, native": Recipe("E5M2", accumulate="native")}
    recipes |= {name: Recipe(name) for name in EIGHT}
    return {name: _Training(recipe) for name, recipe in recipes.items()}


class _Training:
    """Always the first step, so that what has to be cut into slices does not change."""

    def __init__(self, recipe: Recipe) -> None:
        self._state, self._step = make(_MLP, recipe, _MLP.initial_weights(0), _MLP.batches(0))

    def __call__(self) -> object:
        return self._step(self._state, 0)


def main() -> None:
    for comparison in comparisons():
        comparison.show()


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        print(write_page("exact", "What exact sums cost", list(comparisons()), ["jax"]))
    else:
        main()

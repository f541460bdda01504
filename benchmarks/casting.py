"""Casts and counts against a plain multiply, XLA's own casts, ml_dtypes and gfloat, all in one run.

Arrays are donated: without that, beyond about 32 MB, page faults are what is measured.
"""

from __future__ import annotations

import gfloat
import gfloat.formats
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from altgrad_jax.casting import FormatParams, cast
from altgrad_jax.statistics import observe
from benchmarks.timing import show, side_by_side

_SIZES = {"2^24 elements, donated": 2**24, "2^18 elements, in cache": 2**18}
_SLOW_ELEMENTS = 2**18


class _Donated:
    """A function applied to its own result over and over, its argument donated."""

    def __init__(self, function, start: np.ndarray, *rest: object) -> None:
        self._function, self._rest = jax.jit(function, donate_argnums=0), rest
        self._value = jnp.asarray(start)

    def __call__(self) -> jax.Array:
        self._value = self._function(self._value, *self._rest)
        return self._value


def main() -> None:
    rng = np.random.default_rng(0)
    for label, size in _SIZES.items():
        x = rng.standard_normal(size).astype(np.float32)
        contestants = {"x * c": _Donated(lambda x, c: x * c, x, jnp.float32(1))}
        for name in ("E0M7", "E3M4", "E4M3", "E5M2", "E7M0"):
            params = FormatParams.from_format(name, overflow="saturate")
            contestants[f"cast to {name}"] = _Donated(cast, x, params)
        integer = FormatParams.from_format("E5M2", overflow="saturate", path="integer")
        contestants["cast to E5M2, integer path"] = _Donated(cast, x, integer)
        contestants["cast to bf16, integer path"] = _Donated(cast, x, FormatParams.from_format("bf16"))
        contestants["astype(float8_e5m2).astype(float32)"] = _Donated(
            lambda x: x.astype(jnp.float8_e5m2).astype(jnp.float32), x
        )
        show(f"Casts, {label}", side_by_side(contestants, rounds=15), "x * c")
        _counts(x, label)
    _against_libraries(rng.standard_normal(_SLOW_ELEMENTS).astype(np.float32))


def _counts(x: np.ndarray, label: str) -> None:
    params, array = FormatParams.from_format("E5M2"), jnp.asarray(x)
    total, counted = jax.jit(jnp.sum), jax.jit(lambda x, p: observe(x, p))
    contestants = {"jnp.sum": lambda: total(array), "counts and amax": lambda: counted(array, params)}
    show(f"Counts, {label}", side_by_side(contestants, rounds=15), "jnp.sum")


def _against_libraries(x: np.ndarray) -> None:
    params, array = FormatParams.from_format("E5M2", overflow="saturate"), jnp.asarray(x)
    info = gfloat.formats.format_info_ocp_e5m2
    ours, theirs = jax.jit(cast), jax.jit(lambda x: gfloat.round_ndarray(info, x, sat=True))
    contestants = {
        "cast to E5M2": lambda: ours(array, params),
        "gfloat.round_ndarray, jitted": lambda: theirs(array),
        "gfloat.round_ndarray in NumPy": lambda: gfloat.round_ndarray(info, x, sat=True),
        "ml_dtypes in NumPy": lambda: x.astype(ml_dtypes.float8_e5m2).astype(np.float32),
    }
    show("Other libraries, 2^18 elements", side_by_side(contestants, rounds=7, warmup=1), "cast to E5M2")

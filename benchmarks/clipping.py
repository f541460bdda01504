"""The exact norm and the gated clip against optax's and torch's, on gradients of GPT-2's shapes, in one run.

JAX's are donated, and doubled at every call, so that a clip to their norm always has something to clip.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

import altgrad_torch
from altgrad_jax.clipping import partition_relative_clip
from altgrad_jax.norms import global_norm
from benchmarks.page import write_page
from benchmarks.timing import Comparison, side_by_side

Gradients = list[jax.Array]

_ROUNDS = 11


def gpt2_shapes() -> list[tuple[int, ...]]:
    """Of the 148 parameters of GPT-2 (124 million)."""
    block = [(768,), (768,), (768, 2304), (2304,), (768, 768), (768,), (768,), (768,), (768, 3072), (3072,)]
    return [(50257, 768), (1024, 768), *[*block, (3072, 768), (768,)] * 12, (768,), (768,)]


def main() -> None:
    for comparison in comparisons():
        comparison.show()


def comparisons() -> Iterator[Comparison]:
    """One after the other, measured when asked for."""
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape, np.float32) for shape in gpt2_shapes()]
    yield _norms(arrays)
    yield _gates(arrays)
    yield _clips(arrays)
    yield from _torch(arrays)


class Stepped:
    """An update applied to its own result over and over, gradients and state donated."""

    def __init__(
        self, tx: optax.GradientTransformation, arrays: list[np.ndarray], factor: float, **extra: float
    ) -> None:
        update = optax.with_extra_args_support(tx).update
        self._step = jax.jit(
            lambda g, s, c, extra: update([leaf * c for leaf in g] if factor != 1 else g, s, **extra),
            donate_argnums=(0, 1),
        )
        self._grads: Gradients = [jnp.asarray(each) for each in arrays]
        self._state = tx.init(self._grads)
        self._factor, self._extra = jnp.float32(factor), {key: jnp.float32(value) for key, value in extra.items()}

    def __call__(self) -> Gradients:
        self._grads, self._state = self._step(self._grads, self._state, self._factor, self._extra)
        return self._grads


def _norms(arrays: list[np.ndarray]) -> Comparison:
    grads = [jnp.asarray(each) for each in arrays]
    sums = jax.jit(lambda g: sum(jnp.sum(leaf) for leaf in g))
    theirs, ours = jax.jit(optax.tree.norm), jax.jit(global_norm)
    contestants: dict[str, Callable[[], object]] = {
        "optax.tree.norm": lambda: theirs(grads),
        "global_norm": lambda: ours(grads),
        "a sum": lambda: sums(grads),
    }
    wanted = {"global_norm": 1 / 2.2}
    return Comparison("The norm", "optax.tree.norm", side_by_side(contestants, _ROUNDS), wanted)


def _gates(arrays: list[np.ndarray]) -> Comparison:
    grads = [jnp.asarray(each) for each in arrays]
    norm, sums = jax.jit(global_norm), jax.jit(lambda g: sum(jnp.sum(leaf) for leaf in g))
    contestants: dict[str, Callable[[], object]] = {
        "global_norm": lambda: norm(grads),
        "a sum": lambda: sums(grads),
        "gate shut, rate given": Stepped(partition_relative_clip("E5M2"), arrays, 1.0, overflow_rate=0.0),
        "gate shut, rate measured": Stepped(partition_relative_clip("E5M2"), arrays, 1.0),
    }
    return Comparison("The gate", "global_norm", side_by_side(contestants, _ROUNDS), {"gate shut, rate given": 10.0})


def _clips(arrays: list[np.ndarray]) -> Comparison:
    contestants: dict[str, Callable[[], object]] = {
        "optax.clip_by_global_norm": Stepped(optax.clip_by_global_norm(1.0), arrays, 2.0),
        "gate open, rate given": Stepped(partition_relative_clip("E5M2"), arrays, 2.0, overflow_rate=0.5),
    }
    timings = side_by_side(contestants, _ROUNDS)
    wanted = {"gate open, rate given": 1 / 1.5}
    return Comparison("The clip, triggered", "optax.clip_by_global_norm", timings, wanted)


def _torch(arrays: list[np.ndarray]) -> Iterator[Comparison]:
    """On one thread and on as many as torch takes: its own clip multiplies on all of them, and sums on one."""
    usual = torch.get_num_threads()
    for threads in dict.fromkeys((1, usual)):
        torch.set_num_threads(threads)
        yield _torch_clips(arrays, f"torch, threads: {threads}")
    torch.set_num_threads(usual)


def _torch_clips(arrays: list[np.ndarray], title: str) -> Comparison:
    parameters = [torch.nn.Parameter(torch.zeros(each.shape)) for each in arrays]
    for parameter, each in zip(parameters, arrays, strict=True):
        parameter.grad = torch.from_numpy(each.copy())
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    clipper = altgrad_torch.PartitionRelativeClipper("E5M2")

    def counted() -> None:
        counts = [altgrad_torch.cast_counts(gradient, "E5M2").totals for gradient in gradients]
        clipper.clip_if_needed(parameters, altgrad_torch.CastCounts(torch.stack(counts)).pooled().overflow_rate)

    def measured() -> None:
        clipper.clip_if_needed(parameters, altgrad_torch.overflow_rate(gradients, "E5M2"))

    theirs = "clip_grad_norm_, foreach"
    contestants: dict[str, Callable[[], object]] = {
        theirs: lambda: torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True),
        "gate open, rate given": lambda: clipper.clip_if_needed(parameters, 0.5),
        "gate shut, rate given": lambda: clipper.clip_if_needed(parameters, 0.0),
        "gate shut, rate measured": measured,
        "gate shut, all counts taken": counted,
        "a read for the maximum": lambda: [gradient.amax() for gradient in gradients],
        "get_total_norm": lambda: torch.nn.utils.get_total_norm(gradients, foreach=True),
        "global_norm": lambda: altgrad_torch.global_norm(gradients),
    }
    # Doubled before each call and not within it, gradients clipped to a norm of 1 are to be clipped again.
    timings = side_by_side(contestants, _ROUNDS, before=lambda: torch._foreach_mul_(gradients, 2.0))
    return Comparison(title, theirs, timings, {"gate open, rate given": 1 / 1.5, "gate shut, rate given": 10.0})


if __name__ == "__main__":
    measured = list(comparisons())
    for measurement in measured:
        measurement.show()
    if "--write" in sys.argv[1:]:
        print(write_page("clipping", "What clipping costs", measured, ["jax", "optax", "torch"]))

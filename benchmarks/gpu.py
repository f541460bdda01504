"""Casts, codes, counts and norms on an NVIDIA GPU, in JAX and in torch, against a copy of the same memory, in one run.

A copy is ``x * c`` written over ``x``: as many bytes read and written as a cast needs, at the speed of the memory.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from torch import Tensor

import altgrad_torch
from altgrad_core.formats import EIGHT
from altgrad_jax import CodeParams, FormatParams, decode, encode, observe
from altgrad_jax.clipping import partition_relative_clip
from altgrad_jax.norms import global_norm
from benchmarks.casting import cast_contestants
from benchmarks.clipping import Stepped, gpt2_shapes
from benchmarks.page import write_page
from benchmarks.timing import Comparison, side_by_side

_SIZE, _LABEL = 2**28, "2^28 elements"
_ROUNDS = 15
_COPY = 0.85
"""The share of the speed of a copy that is wanted of whatever reads as much and writes as much."""


def main() -> None:
    if jax.default_backend() != "gpu" or not torch.cuda.is_available():
        sys.exit(f"this benchmark needs a GPU in both frameworks; JAX has {jax.default_backend()!r}")
    measured = []
    for comparison in comparisons():
        comparison.show()
        measured.append(comparison)
    if "--write" in sys.argv[1:]:
        on = f"one {torch.cuda.get_device_name()}"
        print(write_page("gpu", "What a cast costs on a GPU", measured, ["jax", "torch"], on))


def comparisons() -> Iterator[Comparison]:
    """One after the other, measured when asked for. Each frees its memory before the next."""
    yield _casts()
    yield _codes()
    yield _counts()
    yield _norms()
    yield _clips()
    torch.set_default_device("cuda")
    yield _torch_compiled()
    yield _torch_eager()
    yield _torch_norms()


def _casts() -> Comparison:
    contestants = cast_contestants(jax.random.normal(jax.random.key(0), (_SIZE,)))
    ours = [name for name in contestants if name not in ("x * c", "astype(float8_e5m2)")]
    wanted = dict.fromkeys(ours, _COPY)
    return Comparison(f"JAX: casts, {_LABEL}, donated", "x * c", side_by_side(contestants, _ROUNDS), wanted)


def _codes() -> Comparison:
    array, params = jax.random.normal(jax.random.key(0), (_SIZE,)), CodeParams.from_format("E5M2")
    shift = jax.jit(lambda x: (jax.lax.bitcast_convert_type(x, jnp.uint32) >> 24).astype(jnp.uint8))
    of, values = jax.jit(encode), jax.jit(decode)
    codes = of(array, params)
    contestants = {
        "shift to uint8": lambda: shift(array),
        "encode": lambda: of(array, params),
        "decode": lambda: values(codes, params),
    }
    wanted = {"encode": _COPY, "decode": _COPY}
    return Comparison(f"JAX: codes, {_LABEL}", "shift to uint8", side_by_side(contestants, _ROUNDS), wanted)


def _counts() -> Comparison:
    array, params = jax.random.normal(jax.random.key(0), (_SIZE,)), FormatParams.from_format("E5M2")
    total, counted = jax.jit(jnp.sum), jax.jit(observe)
    contestants = {"jnp.sum": lambda: total(array), "counts and amax": lambda: counted(array, params)}
    timings = side_by_side(contestants, _ROUNDS)
    return Comparison(f"JAX: counts, {_LABEL}", "jnp.sum", timings, {"counts and amax": 0.9})


def _norms() -> Comparison:
    tree = [jax.random.normal(jax.random.key(0), (_SIZE,))]
    sums, theirs, ours = jax.jit(lambda g: jnp.sum(g[0])), jax.jit(optax.tree.norm), jax.jit(global_norm)
    contestants = {
        "jnp.sum": lambda: sums(tree),
        "optax.tree.norm": lambda: theirs(tree),
        "global_norm": lambda: ours(tree),
    }
    timings = side_by_side(contestants, _ROUNDS)
    return Comparison(f"JAX: the norm, {_LABEL}", "jnp.sum", timings, {"global_norm": _COPY})


def _clips() -> Comparison:
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape, np.float32) for shape in gpt2_shapes()]
    contestants: dict[str, Callable[[], object]] = {
        "optax.clip_by_global_norm": Stepped(optax.clip_by_global_norm(1.0), arrays, 2.0),
        "gate open, rate given": Stepped(partition_relative_clip("E5M2"), arrays, 2.0, overflow_rate=0.5),
        "gate shut, rate measured": Stepped(partition_relative_clip("E5M2"), arrays, 1.0),
        "gate shut, rate given": Stepped(partition_relative_clip("E5M2"), arrays, 1.0, overflow_rate=0.0),
    }
    timings = side_by_side(contestants, _ROUNDS)
    wanted = {"gate open, rate given": 1 / 1.5}
    return Comparison("JAX: the clip, GPT-2's shapes", "optax.clip_by_global_norm", timings, wanted)


def _torch_compiled() -> Comparison:
    x, factor = torch.randn(_SIZE), torch.tensor(1.5)
    multiply, by_data = (
        torch.compile(lambda x, c: x * c),
        torch.compile(lambda x, params: altgrad_torch.quantize(x, params)),
    )
    hashed = torch.compile(
        lambda x, params, step: altgrad_torch.quantize(
            x,
            params,
            rounding="stochastic",
            random_bits=altgrad_torch.hash_bits(tuple(x.shape), 0, step, device="cuda"),
        )
    )
    contestants: dict[str, Callable[[], object]] = {"x * c": _waited(lambda: multiply(x, factor))}
    for name in (*EIGHT, "bf16"):
        contestants[name] = _by_data(by_data, x, altgrad_torch.FormatParams.from_format(name))
    step, e4m3 = torch.tensor(1), altgrad_torch.FormatParams.from_format("E4M3")
    contestants["E4M3, stochastic by hash"] = _waited(lambda: hashed(x, e4m3, step))
    wanted = dict.fromkeys(list(contestants)[1:], _COPY)
    return Comparison(f"torch, compiled, {_LABEL}", "x * c", side_by_side(contestants, _ROUNDS), wanted)


def _torch_eager() -> Comparison:
    x = torch.randn(_SIZE)
    contestants: dict[str, Callable[[], object]] = {
        "x * c": _waited(lambda: x * 1.5),
        "E5M2": _waited(lambda: altgrad_torch.quantize(x, "E5M2")),
        "E7M0": _waited(lambda: altgrad_torch.quantize(x, "E7M0")),
        "E4M3 in blocks of 32": _waited(lambda: altgrad_torch.quantize_blocks(x, "E4M3")),
        "encode to E4M3": _waited(lambda: altgrad_torch.encode(x, "E4M3")),
        "counts": _waited(lambda: altgrad_torch.cast_counts(x, "E5M2")),
        "to(float8_e5m2)": _waited(lambda: x.to(torch.float8_e5m2).to(torch.float32)),
    }
    return Comparison(f"torch, eager, {_LABEL}", "x * c", side_by_side(contestants, _ROUNDS))


def _torch_norms() -> Comparison:
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in gpt2_shapes()]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    clipper = altgrad_torch.PartitionRelativeClipper("E5M2")
    theirs = "clip_grad_norm_, foreach"
    contestants: dict[str, Callable[[], object]] = {
        theirs: _waited(lambda: torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)),
        "gate open, rate given": _waited(lambda: clipper.clip_if_needed(parameters, 0.5)),
        "gate shut, rate given": _waited(lambda: clipper.clip_if_needed(parameters, 0.0)),
        "get_total_norm": _waited(lambda: torch.nn.utils.get_total_norm(gradients, foreach=True)),
        "global_norm": _waited(lambda: altgrad_torch.global_norm(gradients)),
    }
    timings = side_by_side(contestants, _ROUNDS, before=lambda: torch._foreach_mul_(gradients, 2.0))
    return Comparison("torch: the clip, GPT-2's shapes", theirs, timings, {"gate open, rate given": 1 / 1.5})


def _by_data(
    function: Callable[[Tensor, altgrad_torch.FormatParams], Tensor], x: Tensor, params: altgrad_torch.FormatParams
) -> Callable[[], object]:
    return _waited(lambda: function(x, params))


def _waited(function: Callable[[], object]) -> Callable[[], None]:
    """What a GPU was given to do is done when this returns."""

    def done() -> None:
        function()
        torch.cuda.synchronize()

    return done


if __name__ == "__main__":
    main()

"""A training step of a user's Flax NNX model with every layer cast and recorded, against the plain model.

``python -m benchmarks.layers [--write]``. The model is a decoder of Flax's own layers; Qwix casts the same model, where
it is installed, and Flax's own fp8 operations the same decoder in Linen, where they are hooks. What it takes to trace
and compile a step is in the last table.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from rich.console import Console
from rich.table import Table

from altgrad_jax.nn import CastVariable, Rule, quantize_model, recording
from benchmarks import layers_linen
from benchmarks.page import write_page
from benchmarks.shapes import SHAPES, Shape
from benchmarks.timing import Comparison, side_by_side

_WANTED = {64: 1 / 1.10, 512: 1 / 1.05}


class Block(nnx.Module):
    def __init__(self, shape: Shape, rngs: nnx.Rngs) -> None:
        self.norms = nnx.List([nnx.RMSNorm(shape.width, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(shape.heads, shape.width, use_bias=False, decode=False, rngs=rngs)
        self.up = nnx.Linear(shape.width, 4 * shape.width, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(4 * shape.width, shape.width, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        mask = nnx.make_causal_mask(x[..., 0])
        x = x + self.attention(self.norms[0](x), mask=mask)
        return x + self.down(nnx.relu(self.up(self.norms[1](x))))


class Decoder(nnx.Module):
    def __init__(self, shape: Shape, rngs: nnx.Rngs) -> None:
        self.tokens = nnx.Embed(shape.vocabulary, shape.width, rngs=rngs)
        self.places = nnx.Embed(shape.length, shape.width, rngs=rngs)
        self.blocks = nnx.List([Block(shape, rngs) for _ in range(shape.layers)])
        self.head = nnx.Linear(shape.width, shape.vocabulary, use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.tokens(tokens) + self.places(jnp.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def loss_of(model: Decoder, tokens: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(model(tokens[:, :-1]), tokens[:, 1:]).mean()


class Training:
    """A model and its jitted step, everything donated."""

    def __init__(self, model: nnx.Module, tokens: jax.Array, *, recorded: bool) -> None:
        tx = optax.adamw(3e-4)
        graph, params, casts, rest = nnx.split(model, nnx.Param, CastVariable, ...)

        def step(carried: tuple[nnx.State, nnx.State, nnx.State, optax.OptState]) -> tuple[object, jax.Array]:
            params, casts, rest, opt_state = carried
            model = nnx.merge(graph, params, casts, rest)
            if recorded:
                with recording(model) as seen:
                    loss, gradients = nnx.value_and_grad(loss_of)(model, tokens)
                shown = loss, seen.gradients.overflow_rate, seen.all.overflow_rate
            else:
                shown, gradients = nnx.value_and_grad(loss_of)(model, tokens)
            _, params, casts, rest = nnx.split(model, nnx.Param, CastVariable, ...)
            updates, opt_state = tx.update(gradients, opt_state, params)
            return (optax.apply_updates(params, updates), casts, rest, opt_state), shown

        # Copies, because donated arrays must not be shared.
        self.carried = jax.tree.map(jnp.copy, (params, casts, rest, tx.init(params)))
        self.step = jax.jit(step, donate_argnums=0)

    def __call__(self) -> object:
        self.carried, shown = self.step(self.carried)
        return self.carried, shown

    def compiling(self) -> dict[str, float]:
        """CPU seconds to trace, lower and compile the step anew."""
        times = [time.process_time()]
        traced = self.step.trace(self.carried)
        times.append(time.process_time())
        lowered = traced.lower()
        times.append(time.process_time())
        lowered.compile()
        times.append(time.process_time())
        return dict(zip(("trace", "lower", "compile"), (b - a for a, b in itertools.pairwise(times)), strict=True))


def models(shape: Shape, tokens: jax.Array) -> dict[str, Callable[[], Training]]:
    plain = Decoder(shape, nnx.Rngs(0))
    rules = [Rule(".*", "E4M3", gradients="E5M2")]
    cast = partial(quantize_model, plain, rules)
    made: dict[str, Callable[[], Training]] = {
        "plain float32": lambda: Training(plain, tokens, recorded=False),
        "cast": lambda: Training(cast(), tokens, recorded=False),
        "cast and recorded": lambda: Training(cast(), tokens, recorded=True),
    }
    if find_spec("qwix") is not None:
        made["Qwix, float8 by absmax"] = lambda: Training(_by_qwix(plain, tokens), tokens, recorded=False)
    return made


def _by_qwix(plain: Decoder, tokens: jax.Array) -> nnx.Module:
    import qwix

    rule = qwix.QtRule(
        module_path=".*",
        weight_qtype=jnp.float8_e4m3fn,
        act_qtype=jnp.float8_e4m3fn,
        bwd_qtype=jnp.float8_e5m2,
        disable_channelwise_axes=True,
    )
    return qwix.quantize_model(nnx.clone(plain), qwix.QtProvider([rule]), tokens[:, :-1])


def comparisons() -> Iterator[Comparison]:
    for shape in SHAPES:
        tokens = shape.tokens()
        trainings = {name: make() for name, make in models(shape, tokens).items()}
        timings = side_by_side(trainings, rounds=60)
        yield Comparison(str(shape), "plain float32", timings, {"cast and recorded": _WANTED[shape.width]})
    for shape in SHAPES:
        yield layers_linen.comparison(shape)


def compile_times() -> Mapping[str, Mapping[str, float]]:
    """Of a step of the first shape, each from an empty cache of this process."""
    shape, found = SHAPES[0], {}
    tokens = shape.tokens()
    jax.config.update("jax_enable_compilation_cache", False)
    for name, make in models(shape, tokens).items():
        jax.clear_caches()
        found[name] = make().compiling()
    return found


def main() -> None:
    for comparison in comparisons():
        comparison.show()
    table = Table(title="CPU seconds to make a step", title_justify="left")
    for heading in ("", "trace", "lower", "compile", "all"):
        table.add_column(heading, justify="right")
    for name, times in compile_times().items():
        table.add_row(name, *(f"{each:.2f}" for each in (*times.values(), sum(times.values()))))
    Console().print(table)


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        print(write_page("layers", "What layers by rules cost", list(comparisons()), ["jax", "flax"]))
    else:
        main()

"""A transformer of Flax NNX, written for float32, trained in 8-bit formats that a list of rules names.

Run: python examples/transformer_nnx.py
"""

import jax
import jax.numpy as jnp
import optax
import rich
from flax import nnx

from altgrad_jax import partition_relative_clip
from altgrad_jax.nn import Rule, quantize_model, recording, set_formats, summary

SYMBOLS, LENGTH, WIDTH = 16, 12, 32


class Block(nnx.Module):
    """As anyone would write it: nothing in here knows of formats."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norms = nnx.List([nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(4, WIDTH, decode=False, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norms[0](x))
        return x + self.down(nnx.gelu(self.up(self.norms[1](x))))


class Sorter(nnx.Module):
    """Puts the symbols of a sequence into their order."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.symbols = nnx.Embed(SYMBOLS, WIDTH, rngs=rngs)
        self.places = nnx.Embed(LENGTH, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])
        self.head = nnx.Linear(WIDTH, SYMBOLS, rngs=rngs)

    def __call__(self, sequence: jax.Array) -> jax.Array:
        x = self.symbols(sequence) + self.places(jnp.arange(LENGTH))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def loss_of(model: Sorter, sequence: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(model(sequence), jnp.sort(sequence, axis=-1)).mean()


@nnx.jit
def train_step(model: Sorter, optimizer: nnx.Optimizer, sequence: jax.Array) -> tuple[jax.Array, jax.Array]:
    with recording(model) as seen:
        loss, gradients = nnx.value_and_grad(loss_of)(model, sequence)
    rate = seen.gradients.overflow_rate
    optimizer.update(model, gradients, overflow_rate=rate)
    return loss, rate


def main() -> None:
    rules = [
        Rule("head|places", None),
        Rule("symbols", "E3M4"),
        Rule(".*", weights="E4M3", gradients="E5M2"),
    ]
    model = quantize_model(Sorter(nnx.Rngs(0)), rules)
    rich.print(summary(model))
    tx = optax.chain(partition_relative_clip("E5M2"), optax.adam(3e-3))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for step in range(150):
        sequence = jax.random.randint(jax.random.key(step), (32, LENGTH), 0, SYMBOLS)
        if step == 100:
            set_formats(model, {"blocks/1/.*": "E3M4"})  # data: nothing is compiled again
        loss, rate = train_step(model, optimizer, sequence)
        if step % 30 == 0 or step == 149:
            print(f"step {step}: loss {loss:.3f}, {rate:.2%} of the gradients overflow")


if __name__ == "__main__":
    main()

"""A convolutional network of Flax Linen, written for float32, trained in 8-bit formats that a list of rules names.

Run: python examples/cnn_linen.py
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from altgrad_jax import partition_relative_clip
from altgrad_jax.nn import Rule, quantize_model, record_casts, set_formats, summary

# Five rows of three bits each.
GLYPHS = ("75557", "26227", "71747", "71717", "55711", "74717", "74757", "71122", "75757", "75717")
SIZE, STEPS = 12, 80


class CNN(nn.Module):
    """As anyone would write it: nothing in here knows of formats."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(8, (3, 3))(images))
        x = nn.avg_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Conv(16, (3, 3))(x))
        x = nn.avg_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Dense(32, name="hidden")(x.reshape(x.shape[0], -1)))
        return nn.Dense(10, name="digits")(x)


model = quantize_model(
    CNN(),
    [
        Rule("Conv_0|digits", None),
        Rule(".*", weights="E4M3", gradients="E5M2"),
    ],
)
tx = optax.chain(partition_relative_clip("E5M2"), optax.adam(1e-2))


def batch_of(step: int, size: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Digits of twice the size of their glyphs, anywhere in the image, under noise."""
    random = np.random.default_rng(step)
    images, digits = 0.2 * random.normal(size=(size, SIZE, SIZE, 1)), random.integers(10, size=size)
    for image, digit in zip(images, digits, strict=True):
        glyph = np.kron([[int(row) >> bit & 1 for bit in (2, 1, 0)] for row in GLYPHS[digit]], np.ones((2, 2)))
        y, x = random.integers(SIZE - glyph.shape[0] + 1), random.integers(SIZE - glyph.shape[1] + 1)
        image[y : y + glyph.shape[0], x : x + glyph.shape[1], 0] += glyph
    return images.astype(np.float32), digits


@partial(jax.jit, donate_argnums=0)
def train_step(state: dict[str, Any], images: jax.Array, digits: jax.Array) -> tuple[dict[str, Any], jax.Array]:
    params, casts = state["params"], state["casts"]

    def loss_of(params: dict[str, Any]) -> jax.Array:
        logits = model.apply({"params": params, "casts": casts}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, digits).mean()

    with record_casts(casts) as seen:
        loss, grads = jax.value_and_grad(loss_of)(params)
    updates, opt_state = tx.update(grads, state["opt_state"], params, overflow_rate=seen.gradients.overflow_rate)
    return {"params": optax.apply_updates(params, updates), "casts": seen.updated(casts), "opt_state": opt_state}, loss


def main() -> None:
    images, digits = batch_of(0)
    variables = jax.jit(model.init)(jax.random.key(0, impl="rbg"), images)  # which compiles sooner than threefry
    print(summary(model, variables, images))
    state = {**variables, "opt_state": tx.init(variables["params"])}
    for step in range(STEPS):
        if step == 60:
            state = set_formats(state, {"Conv_1": "E3M4"})  # data: nothing is compiled again
        images, digits = batch_of(step)
        state, loss = train_step(state, images, digits)
        if step % 20 == 0 or step == STEPS - 1:
            print(f"step {step}: loss {loss:.3f}")
    plain = CNN().apply({"params": state["params"]}, images)  # the same parameters, in float32
    print(f"without casts {jnp.mean(plain.argmax(-1) == digits):.0%} are right")


if __name__ == "__main__":
    main()

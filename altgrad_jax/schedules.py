"""The learning rate's course as data, so that runs that differ in it share one compiled step."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

_LAST_SHARE = 0.1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Schedule:
    """Linear warm-up to a peak, then a cosine down to a tenth of it.

    The course is that of ``optax.warmup_cosine_decay_schedule(peak / warmup, peak, warmup, steps, peak / 10)``, whose
    numbers have to be constants. Here they are leaves of a pytree: Python numbers, or scalars of a traced program.

    Attributes:
        steps: when the cosine has ended; warm-up included.
        learning_rate: the peak.
        warmup: steps of warm-up; 0 for none.

    >>> schedule = Schedule(steps=100, learning_rate=0.5, warmup=10)
    >>> [round(float(schedule(count)), 3) for count in (0, 5, 10, 55, 100, 200)]
    [0.05, 0.275, 0.5, 0.275, 0.05, 0.05]
    """

    steps: jax.typing.ArrayLike = 300
    learning_rate: jax.typing.ArrayLike = 3e-3
    warmup: jax.typing.ArrayLike = 20

    def on_device(self) -> Schedule:
        """The same with float32 scalars for numbers."""
        return jax.tree.map(jnp.float32, self)

    def __call__(self, count: jax.typing.ArrayLike) -> jax.Array:
        """The learning rate of the update after ``count`` others: float32, of the shape of ``count``."""
        done, warmup = jnp.float32(count), jnp.float32(self.warmup)
        first = 1 / jnp.maximum(warmup, 1)
        risen = first + (1 - first) * done / jnp.maximum(warmup, 1)
        fallen = jnp.minimum((done - warmup) / jnp.maximum(jnp.float32(self.steps) - warmup, 1), 1)
        decayed = _LAST_SHARE + (1 - _LAST_SHARE) * 0.5 * (1 + jnp.cos(jnp.pi * fallen))
        return jnp.float32(self.learning_rate) * jnp.where(done < warmup, risen, decayed)

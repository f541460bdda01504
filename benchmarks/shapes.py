"""The decoders whose steps are timed."""

from __future__ import annotations

from dataclasses import dataclass

import jax


@dataclass(frozen=True)
class Shape:
    batch: int
    length: int
    width: int
    layers: int = 2
    heads: int = 4
    vocabulary: int = 65

    def __str__(self) -> str:
        return f"{self.layers} layers of {self.width}, {self.batch} x {self.length} tokens"

    def tokens(self) -> jax.Array:
        """A batch, and for each place the token that follows: int32 of shape ``(batch, length + 1)``."""
        return jax.random.randint(jax.random.key(0), (self.batch, self.length + 1), 0, self.vocabulary)


SHAPES = (Shape(8, 32, 64), Shape(16, 64, 64), Shape(4, 64, 512, heads=8))

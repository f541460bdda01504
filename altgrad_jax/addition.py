"""Casts to nearest even by one addition, from scalars that are worked out once: only what each element needs is left.

One float32 addition of a power of two rounds to nearest even: its exponent is the quantum's raised by 23. It depends on
the element, so that XLA, which would delete ``(x + c) - c`` for a constant c, keeps both operations; and it stays above
the smallest quantum, so that the format's subnormals round in the same way.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from altgrad_core.formats import OVERFLOWS, CastPath
from altgrad_jax.params import Edges, FormatParams, replaced_from

_SIGN = np.int32(-(2**31))
_MAGNITUDE = np.int32(0x7FFFFFFF)
_INF = np.int32(0x7F800000)
_NAN = np.int32(0x7FC00000)
_IMPLICIT_ONE = np.int32(1 << 23)
_ONE = np.int32(127 << 23)
_TO_THE_MIDDLE = np.int32(64 << 23)
_NATIVE = OVERFLOWS.index("native")

BY_ADDITION: tuple[CastPath, ...] = ("fast", "wide")
"""The paths that cast so."""
FIXED = ("parity_shift", "replacement", "zero_sign")
"""What of an :class:`Addition` is the same under every scale."""


class Addition(NamedTuple):
    """What a cast by addition needs of its grid: int32, of the shape of the params.

    Attributes:
        parity_shift: by how far the bits of a binade's power of two are shifted, to add the parity of its number where
            that decides ties: it does where there are no mantissa bits, elsewhere all bits are shifted out.
        replacement: bits of what stands for overflow, inf or NaN; where that is the maximum nothing is replaced by it.
        zero_sign: the sign bit where the format has -0, else 0.
        maximum: bits of the largest magnitude.
        lowest: bits of the power of two that the lowest binade begins with; on the wide path as it is for what is below
            one, and is moved up.
        raised_by: what is added to the bits of a binade's power of two, to reach the power that rounds.
        replaced_from: the smallest magnitude that is replaced, by NaN if it is one, else by ``replacement``.
        lowest_from_one: on the wide path ``lowest`` for what is one or more, and is moved down; None on the fast one.
        vanishes_to: on the wide path the largest magnitude that becomes zero; None on the fast one.
    """

    parity_shift: jax.Array
    replacement: jax.Array
    zero_sign: jax.Array
    maximum: jax.Array
    lowest: jax.Array
    raised_by: jax.Array
    replaced_from: jax.Array
    lowest_from_one: jax.Array | None = None
    vanishes_to: jax.Array | None = None

    @classmethod
    def of(cls, params: FormatParams, limits: Edges) -> Addition:
        """What a cast to a grid needs.

        Args:
            params: of one of the paths :data:`BY_ADDITION`.
            limits: where the grid ends.
        """
        has_mantissa = params.mantissa_bits > 0
        lowest = params.min_exponent + 127
        # An odd power of two takes a tie up, an even one down: to the even of two codes that are exponents alone.
        parity = jnp.where(has_mantissa, 0, lowest & 1)
        fast = cls(
            parity_shift=jnp.where(has_mantissa, np.int32(31), np.int32(23)),
            replacement=jnp.where(params.overflow == _NATIVE, jnp.maximum(params.native_overflow, _INF), _INF),
            zero_sign=jnp.where(params.negative_zero, _SIGN, np.int32(0)),
            maximum=_bits(params.max_value),
            lowest=lowest << 23,
            raised_by=((23 - params.mantissa_bits) << 23) + parity,
            replaced_from=replaced_from(params, limits),
        )
        if params.path == "fast":
            return fast
        # Beyond the middle by more than a significand all of a binade lies below half a quantum, however much beyond.
        raised, lowered = jnp.minimum(lowest + 64, 217) << 23, jnp.maximum(lowest - 64, 0) << 23
        return fast._replace(lowest=raised, lowest_from_one=lowered, vanishes_to=limits.vanishes_to)

    @classmethod
    def put_together(cls, fixed: Iterable[jax.Array], moving: Iterable[jax.Array], limits: Edges) -> Addition:
        """From :attr:`fixed` and :attr:`moving`."""
        parts = cls(*fixed, *moving)
        return parts if parts.lowest_from_one is None else parts._replace(vanishes_to=limits.vanishes_to)

    @property
    def fixed(self) -> tuple[jax.Array, ...]:
        """What every scale leaves as it is, in the order of :data:`FIXED`."""
        return self.parity_shift, self.replacement, self.zero_sign

    @property
    def moving(self) -> tuple[jax.Array, ...]:
        """What a scale changes, but for the limits."""
        return tuple(each for each in self[len(FIXED) : -1] if each is not None)

    def cast(self, x: jax.Array) -> jax.Array:
        """float32 rounded to the grid: float32 of the shape that ``x`` and these broadcast to."""
        if self.maximum.ndim:
            x, *numbers = jnp.broadcast_arrays(x, *jax.tree.leaves(self))
            self = Addition(*numbers)
        bits = _bits(x)
        magnitude = lax.bitwise_and(bits, _MAGNITUDE)
        rounded = self._rounded(lax.min(magnitude, self.maximum))
        special = _choose(lax.gt(magnitude, _INF), _NAN, self.replacement)
        result = _choose(lax.ge(magnitude, self.replaced_from), special, rounded)
        return _float(lax.bitwise_or(result, self._signs(rounded, bits)))

    def cast_finite(self, x: jax.Array) -> jax.Array:
        """Finite values, which saturate whatever the format says of overflow: fewer operations."""
        bits = _bits(x)
        rounded = self._rounded(lax.min(lax.bitwise_and(bits, _MAGNITUDE), self.maximum))
        return _float(lax.bitwise_or(rounded, self._signs(rounded, bits)))

    def _rounded(self, bounded: jax.Array) -> jax.Array:
        """Bits of magnitudes of at most the maximum, rounded."""
        if self.lowest_from_one is None or self.vanishes_to is None:
            return self._by_addition(bounded, self.lowest)
        # In the middle of float32's range there is room for any grid. What rounds to nothing is told by a comparison of
        # bits, which sees subnormals as they are; of those only what rounds up to 2^-126 is left.
        below_one = lax.lt(bounded, _ONE)
        shift = _choose(below_one, _TO_THE_MIDDLE, -_TO_THE_MIDDLE)
        lowest = _choose(below_one, self.lowest, self.lowest_from_one)
        moved = lax.sub(self._by_addition(lax.add(bounded, shift), lowest), shift)
        vanishes = lax.le(bounded, self.vanishes_to)
        return _choose(vanishes, np.int32(0), lax.max(moved, _IMPLICIT_ONE))

    def _by_addition(self, bits: jax.Array, lowest: jax.Array) -> jax.Array:
        binade = lax.max(lax.bitwise_and(bits, _INF), lowest)
        parity = lax.shift_right_logical(binade, self.parity_shift)
        power = _float(lax.add(lax.add(binade, self.raised_by), parity))
        return _bits(lax.sub(lax.add(_float(bits), power), power))

    def _signs(self, rounded: jax.Array, bits: jax.Array) -> jax.Array:
        """The sign bits of results: where the format has no -0 those that are zero have none."""
        # Said by a condition on the format: XLA splits the loop by it, and where there is -0 nothing is left to do.
        of_zero = _choose(lax.eq(self.zero_sign, np.int32(0)), np.int32(0), _SIGN)
        return lax.bitwise_and(bits, _choose(lax.lt(rounded, _IMPLICIT_ONE), of_zero, _SIGN))


def _choose(condition: jax.Array, left: jax.Array | np.int32, right: jax.Array | np.int32) -> jax.Array:
    """``jnp.where`` of int32, of which JAX makes one operation where this may be done, not a function to call."""
    apart = [
        lax.full_like(condition, each, jnp.int32) if np.ndim(each) < condition.ndim else each for each in (left, right)
    ]
    return lax.select(condition, *apart)


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.int32)


def _float(bits: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(bits, jnp.float32)

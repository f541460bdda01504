"""Attention whose two products are cast: the scores of queries and keys, and the mix of values."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx

from altgrad_core.errors import InputError
from altgrad_jax.nn.hooks import ProductCasts


@dataclass(frozen=True)
class AttentionCasts:
    """The casts of attention. Both operands of both products are activations; neither holds weights.

    Attributes:
        scores: of queries (in the place of ``activations``) and keys (of ``weights``), both cast as activations are.
        mix: of attention weights and values, likewise.
    """

    scores: ProductCasts
    mix: ProductCasts

    def dot_product_attention(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        bias: jax.Array | None = None,
        mask: jax.Array | None = None,
        *,
        is_causal: bool = False,
        module: nnx.Module | None = None,
        broadcast_dropout: bool = True,
        dropout_rng: jax.Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: jnp.dtype | None = None,
        precision: jax.lax.PrecisionLike = None,
    ) -> jax.Array:
        """``nnx.dot_product_attention`` of cast operands: the ``attention_fn`` of NNX MultiHeadAttention.

        Args:
            query: ``(..., queries, heads, size)``.
            key: ``(..., keys, heads, size)``; fewer heads are shared by groups of the query's.
            value: ``(..., keys, heads, size)``, likewise.
            bias: added to the scores.
            mask: where False, a query does not see a key.
            is_causal: whether a query sees only keys up to its own place.
            module: must be None: attention weights are not sown.
            broadcast_dropout: see ``nnx.dot_product_attention``, as for all that follow.
            dropout_rng: of dropout.
            dropout_rate: of dropout.
            deterministic: without dropout.
            dtype: of the computation.
            precision: of products that accumulate natively.

        Returns:
            ``(..., queries, heads, size)``.

        Raises:
            InputError: if attention weights are to be sown, or heads cannot be shared evenly.
        """
        if module is not None:
            raise InputError("sow_weights=True cannot be honoured by cast attention; expected False")
        groups, rest = divmod(query.shape[-2], key.shape[-2])
        if rest:
            raise InputError(f"{query.shape[-2]} heads of queries cannot share {key.shape[-2]} of keys evenly")
        key, value = (jnp.repeat(each, groups, axis=-2) if groups > 1 else each for each in (key, value))
        if is_causal:
            causal = jnp.tril(jnp.ones((query.shape[-3], key.shape[-3]), bool))
            mask = causal if mask is None else causal & mask.astype(bool)
        return self.linen_attention(
            query,
            key,
            value,
            bias=bias,
            mask=mask,
            broadcast_dropout=broadcast_dropout,
            dropout_rng=dropout_rng,
            dropout_rate=dropout_rate,
            deterministic=deterministic,
            dtype=dtype,
            precision=precision,
        )

    def linen_attention(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        *,
        precision: jax.lax.PrecisionLike = None,
        **options: Any,  # of linen.dot_product_attention
    ) -> jax.Array:
        """``linen.dot_product_attention`` of cast operands, which has no other hooks for its products in ``options``.

        Args:
            query: ``(..., queries, heads, size)``.
            key: ``(..., keys, heads, size)``.
            value: likewise.
            precision: of products that accumulate natively.
            **options: the others of ``linen.dot_product_attention``.

        Returns:
            ``(..., queries, heads, size)``.
        """
        return linen.dot_product_attention(
            query,
            key,
            value,
            qk_attn_weights_einsum=partial(self.scores.einsum, precision=precision),
            attn_weights_value_einsum=partial(self.mix.einsum, precision=precision),
            **options,
        )

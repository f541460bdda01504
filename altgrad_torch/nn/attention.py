"""Attention whose projections, scores and mixtures of values are cast.

torch's own module hands all its parameters to one function, its output projection's among them, and in eval mode to
one kernel; here every product is made where it can be cast, and the output projection is called as the layer it is.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from altgrad_core.errors import InputError
from altgrad_torch.nn.accumulate import exact_product
from altgrad_torch.nn.geometry import Geometry
from altgrad_torch.nn.layers import QuantizedLayer, exact_linear, plus_bias
from altgrad_torch.nn.products import cast_gradient, cast_operand, quantized_product

_SCORES = ("query_activations", "key_activations", "score_gradients")
_MIXTURE = ("probability_activations", "value_activations", "mixture_gradients")


class QuantizedMultiheadAttention(QuantizedLayer, nn.MultiheadAttention):
    """:class:`torch.nn.MultiheadAttention` with cast operands and gradients.

    One site casts what is projected, one all projections' weights, one their gradients. In the two products of
    attention itself both operands are cast as activations are. The output projection is a layer of its own.
    """

    plain = nn.MultiheadAttention
    weight_names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")

    def geometries(self) -> dict[str, Geometry]:
        """The axes of what is cast, by the names of the sites."""
        outputs = 3 * self.embed_dim if self._qkv_same_embed_dim else self.embed_dim
        geometries = {
            "activations": Geometry("activations", None, self.embed_dim, -1),
            "weights": Geometry("weights", -2, outputs, -1, 2),
            "gradients": Geometry("gradients", None, self.embed_dim, -1),
        }
        for left, right, gradient in (_SCORES, _MIXTURE):
            geometries[left] = Geometry("activations", None, 0, -1)
            geometries[right] = Geometry("activations", None, 0, -1 if left == _SCORES[0] else -2)
            geometries[gradient] = Geometry("gradients", None, 0, -1)
        return geometries

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As the plain layer's; see there. Of nested tensors there is no product to cast."""
        if query.is_nested or key.is_nested or value.is_nested:
            raise InputError("a nested tensor has no product to cast; expected a padded one, with a mask")
        if is_causal and attn_mask is None:
            raise InputError("is_causal is a hint about attn_mask, which is missing; expected both")
        is_batched = query.dim() == 3
        query, key, value = self._batch_first(query, key, value)
        if not is_batched and key_padding_mask is not None:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        mask = self._mask(attn_mask, key_padding_mask, query)
        q, k, v = self._heads(query, key, value)
        mixed, weights = self._attend(q, k, v, mask, need_weights)
        mixed = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not is_batched:
            return mixed.squeeze(0), None if weights is None else weights.squeeze(0)
        return (mixed if self.batch_first else mixed.transpose(0, 1)), weights

    def _batch_first(self, *inputs: Tensor) -> list[Tensor]:
        """Inputs with the axes batch, position, feature. What was one tensor stays one."""
        if inputs[0].dim() == 2:
            seen = {id(each): each.unsqueeze(0) for each in inputs}
        elif self.batch_first:
            return list(inputs)
        else:
            seen = {id(each): each.transpose(0, 1) for each in inputs}
        return [seen[id(each)] for each in inputs]

    def _heads(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Queries, keys and values: ``(batch, head, position, feature)``."""
        q, k, v = self._projected(query, key, value)
        batch = q.shape[0]
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (
                torch.cat([each, bias.to(each.dtype).expand(batch, 1, -1)], 1)
                for each, bias in ((k, self.bias_k), (v, self.bias_v))
            )
        if self.add_zero_attn:
            k, v = (F.pad(each, (0, 0, 0, 1)) for each in (k, v))
        return [each.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for each in (q, k, v)]

    def _projected(self, *inputs: Tensor) -> list[Tensor]:
        multiply = exact_linear if self.is_exact else F.linear
        site_of_weights, site_of_gradient = self.site("weights"), self.site("gradients")
        weights = [cast_operand(weight, site_of_weights) for weight in self.weights()]
        biases = [None] * 3 if self.in_proj_bias is None else list(self.in_proj_bias.chunk(3))
        if len(weights) == 1 and len({id(each) for each in inputs}) == 1:
            x = cast_operand(inputs[0], self.site("activations"))
            product = cast_gradient(multiply(x, weights[0]), site_of_gradient)
            return list(plus_bias(product, self.in_proj_bias).chunk(3, -1))
        if len(weights) == 1:
            weights = list(weights[0].chunk(3))
        cast = {id(each): each for each in inputs}
        cast = {name: cast_operand(each, self.site("activations")) for name, each in cast.items()}
        products = (multiply(cast[id(each)], weight) for each, weight in zip(inputs, weights, strict=True))
        gradients_cast = (cast_gradient(product, site_of_gradient) for product in products)
        return [plus_bias(product, bias) for product, bias in zip(gradients_cast, biases, strict=True)]

    def _mask(self, attention: Tensor | None, padding: Tensor | None, query: Tensor) -> Tensor | None:
        """What is added to the scores: of a shape that broadcasts to ``(batch, head, query, key)``."""
        added = []
        if attention is not None:
            attention = _as_addend(attention, query.dtype)
            batched = attention.dim() == 3
            added.append(attention.unflatten(0, (query.shape[0], self.num_heads)) if batched else attention[None, None])
        if padding is not None:
            added.append(_as_addend(padding, query.dtype)[:, None, None, :])
        if not added:
            return None
        mask = added[0] if len(added) == 1 else added[0] + added[1]
        return F.pad(mask, (0, (self.bias_k is not None) + self.add_zero_attn))

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The mixture of values that each query attends to, and by which weights if they are asked for."""
        scores_sites, mixture_sites = self.sites(*_SCORES), self.sites(*_MIXTURE)
        dropout = self.dropout if self.training else 0.0
        if not need_weights and not self.is_exact and not any((*scores_sites, *mixture_sites)):
            return F.scaled_dot_product_attention(q, k, v, mask, dropout), None
        multiply = exact_product if self.is_exact else torch.matmul
        scaled = q * math.sqrt(1.0 / self.head_dim)
        scores = quantized_product(lambda q, k: multiply(q, k.mT), scaled, k, scores_sites)
        weights = _softmax(scores, mask, keep_nan=need_weights)
        if dropout > 0.0:
            weights = F.dropout(weights, dropout)
        mixed = quantized_product(multiply, weights, v, mixture_sites)
        return mixed, weights if need_weights else None


def _as_addend(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as torch's functions take it, where True forbids, as a number to add."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf) if mask.dtype == torch.bool else mask


def _softmax(scores: Tensor, mask: Tensor | None, keep_nan: bool) -> Tensor:
    """Softmax along the keys. Where all are forbidden NaN, or zeros, as in torch with weights and without."""
    if mask is None:
        return scores.softmax(-1)
    scores = scores + mask.to(scores.dtype)
    if keep_nan:
        return scores.softmax(-1)
    forbidden = (scores == -math.inf).all(-1, keepdim=True)
    return scores.masked_fill(forbidden, 0.0).softmax(-1).masked_fill(forbidden, 0.0)

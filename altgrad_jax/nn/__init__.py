"""Layers of Flax, and any ``dot_general``, with operands and gradients cast to a format."""

from altgrad_core.rules import SAME as SAME
from altgrad_core.rules import Each as Each
from altgrad_core.rules import Rule as Rule
from altgrad_core.rules import UnusedRuleWarning as UnusedRuleWarning
from altgrad_core.summary import LayerRow as LayerRow
from altgrad_core.summary import Summary as Summary
from altgrad_jax.nn.accumulate import exact_product as exact_product
from altgrad_jax.nn.cast_state import CastState as CastState
from altgrad_jax.nn.convolution import exact_convolution as exact_convolution
from altgrad_jax.nn.hooks import ProductCasts as ProductCasts
from altgrad_jax.nn.hooks import quantized_dot_general as quantized_dot_general
from altgrad_jax.nn.hooks import quantized_product as quantized_product
from altgrad_jax.nn.linen_models import Quantized as Quantized
from altgrad_jax.nn.models import dequantize_model as dequantize_model
from altgrad_jax.nn.models import quantize_model as quantize_model
from altgrad_jax.nn.models import recording as recording
from altgrad_jax.nn.models import set_formats as set_formats
from altgrad_jax.nn.models import summary as summary
from altgrad_jax.nn.nnx_products import CastVariable as CastVariable
from altgrad_jax.nn.packed import pack as pack
from altgrad_jax.nn.packed import unpack as unpack
from altgrad_jax.nn.seen import Seen as Seen
from altgrad_jax.nn.seen import not_recording as not_recording
from altgrad_jax.nn.seen import record_casts as record_casts

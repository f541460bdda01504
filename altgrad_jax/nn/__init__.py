"""Products of Flax layers with their operands, and the gradients that flow back, cast to a format."""

from altgrad_jax.nn.accumulate import exact_product as exact_product
from altgrad_jax.nn.products import quantized_dot_general as quantized_dot_general

"""Products and layers of modules whose operands, and the gradients that flow back, are on the grid of a format."""

from altgrad_torch.nn.accumulate import exact_product as exact_product

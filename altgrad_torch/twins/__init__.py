"""A training whose every bit is that of its twin in JAX, with exact accumulation."""

from altgrad_torch.twins.training import make as make

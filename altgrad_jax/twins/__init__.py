"""A training whose every bit is that of its twin in torch, with exact accumulation."""

from altgrad_jax.twins.training import make as make

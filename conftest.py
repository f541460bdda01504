"""Set-up for all tests, the doctests in the packages included."""

import os

# Before anything imports jax: the promises are about bits, and a CPU is what every machine has.
# JAX_PLATFORMS=cuda in the environment still wins.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from hypothesis import settings

# The first call of a jitted function compiles, so the time of one example says nothing.
settings.register_profile("dev", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")

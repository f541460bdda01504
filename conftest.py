"""Set-up for all tests, the doctests in the packages included."""

import os
import tempfile
from pathlib import Path

# Before anything imports jax: the promises are about bits, and a CPU is what every machine has.
# JAX_PLATFORMS=cuda in the environment still wins.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# What one test has compiled another need not: a folder for this run, shared by its workers and their subprocesses.
_RUN = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"altgrad-tests-{_RUN}"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

from hypothesis import settings

# The first call of a jitted function compiles, so the time of one example says nothing.
settings.register_profile("dev", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")

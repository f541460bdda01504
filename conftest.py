"""Set-up for all tests, the doctests in the packages included."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest
from hypothesis import settings

# Before anything imports jax: the promises are about bits, and a CPU is what every machine has.
# JAX_PLATFORMS=cuda in the environment still wins.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Where the tests make torch's tensors; JAX_PLATFORMS says the same for JAX (docs/gpu.md).
if os.environ.get("ALTGRAD_TORCH_DEVICE"):
    import torch

    torch.set_default_device(os.environ["ALTGRAD_TORCH_DEVICE"])

# As many workers as cores: more threads would wait for each other, which costs torch half of the time here.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# What one test has compiled another need not: a folder for this run, which its workers and their subprocesses inherit.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="altgrad-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

# The first call of a jitted function compiles, so the time of one example says nothing.
settings.register_profile("dev", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")

# The files that take longest, longest first: two workers then end at about the same time.
_LONGEST_FIRST = (
    "test_twins.py",
    "test_nn_models.py",
    "test_clipping.py",
    "test_nn_linen.py",
    "test_checkpoint.py",
    "test_clip_rules.py",
    "test_job.py",
    "test_replay.py",
    "test_training.py",
    "test_torch_casting.py",
    "test_distribution_jax.py",
)


@pytest.fixture(scope="module")
def keys_that_compile_soon() -> Iterator[None]:
    """For files that make many small models: each shape of random weights is a program, which threefry makes long."""
    import jax

    with jax.default_prng_impl("rbg"):
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(_LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))

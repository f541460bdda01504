"""The course of the learning rate, against optax's, whose numbers are constants."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from altgrad_jax.schedules import Schedule

COUNTS = 128
traced = jax.jit(lambda schedule, counts: schedule(counts))


@given(
    steps=st.integers(1, 100),
    learning_rate=st.floats(1e-6, 10.0),
    warmup=st.integers(0, 40),
)
@example(steps=1, learning_rate=1.0, warmup=0)
@example(steps=1, learning_rate=1.0, warmup=40)
@example(steps=1, learning_rate=8.973719166623537, warmup=25)
def test_is_warmup_and_cosine_as_of_optax(steps: int, learning_rate: float, warmup: int) -> None:
    """To within float32's rounding: of the rate in float64, and of the peak in optax, which starts from that."""
    counts = np.arange(COUNTS)
    rising = 1 / max(warmup, 1) + (1 - 1 / max(warmup, 1)) * counts / max(warmup, 1)
    passed = np.minimum((counts - warmup) / max(steps - warmup, 1), 1)
    share = np.where(counts < warmup, rising, 0.1 + 0.9 * (1 + np.cos(np.pi * passed)) / 2)
    theirs = optax.warmup_cosine_decay_schedule(
        learning_rate / max(warmup, 1), learning_rate, warmup, max(steps, warmup + 1), learning_rate / 10
    )
    course = traced(Schedule(steps, learning_rate, warmup).on_device(), counts)
    assert course.dtype == jnp.float32
    np.testing.assert_allclose(course, learning_rate * share, rtol=1e-6)
    np.testing.assert_allclose(course, theirs(counts), rtol=0, atol=1e-6 * learning_rate)


@pytest.mark.parametrize("number", [2.0, 0.5, 2.0**-10])
def test_a_power_of_two_scales_it_exactly(number: float) -> None:
    one, other = (Schedule(60, rate, 3).on_device() for rate in (3e-3, 3e-3 * number))
    np.testing.assert_array_equal(traced(one, np.arange(COUNTS)) * number, traced(other, np.arange(COUNTS)))

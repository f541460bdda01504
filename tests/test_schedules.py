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
def test_is_optax_warmup_cosine(steps: int, learning_rate: float, warmup: int) -> None:
    counts = np.arange(COUNTS)
    theirs = optax.warmup_cosine_decay_schedule(
        learning_rate / max(warmup, 1), learning_rate, warmup, max(steps, warmup + 1), learning_rate / 10
    )
    course = traced(Schedule(steps, learning_rate, warmup).on_device(), counts)
    assert course.dtype == jnp.float32
    np.testing.assert_allclose(course, theirs(counts), rtol=2e-6)


@pytest.mark.parametrize("number", [2.0, 0.5, 2.0**-10])
def test_a_power_of_two_scales_it_exactly(number: float) -> None:
    one, other = (Schedule(60, rate, 3).on_device() for rate in (3e-3, 3e-3 * number))
    np.testing.assert_array_equal(traced(one, np.arange(COUNTS)) * number, traced(other, np.arange(COUNTS)))

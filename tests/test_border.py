"""The border around what is computed once: whom it marks, and that every transform takes it for the identity it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from altgrad_jax.nn.border import as_one_value


def doubled(x: jax.Array) -> jax.Array:
    return jnp.where(x > 0, 2 * x, x)


def bordered(x: jax.Array) -> jax.Array:
    return as_one_value(doubled, x)


@pytest.mark.parametrize(
    ("platforms", "marked"), [(("cpu",), True), (("cuda",), False), (("cpu", "cuda"), False), (("tpu",), False)]
)
def test_calls_are_marked_for_a_cpu_alone(platforms: tuple[str, ...], marked: bool) -> None:
    """Of several platforms all would have it, and what others than CPUs make of such a call nobody knows."""
    text = export.export(jax.jit(bordered), platforms=platforms)(jnp.ones(4)).mlir_module()
    assert ("inlineable" in text) == marked


def test_what_was_said_of_a_call_before_stays() -> None:
    from jax.experimental.xla_metadata import set_xla_metadata

    with set_xla_metadata(of_the_user="yes"):
        text = jax.jit(bordered).lower(jnp.ones(4)).as_text()
    line = next(line for line in text.splitlines() if "call @doubled" in line)
    assert 'inlineable = "false"' in line
    assert 'of_the_user = "yes"' in line


def test_transforms_see_the_function_alone() -> None:
    x = jnp.array([[1.0, -1.0], [3.0, 0.5]])
    np.testing.assert_array_equal(bordered(x), doubled(x))
    np.testing.assert_array_equal(jax.vmap(bordered, in_axes=1, out_axes=1)(x), doubled(x))
    np.testing.assert_array_equal(jax.jacfwd(bordered)(x[0]), jnp.diag(jnp.array([2.0, 1.0])))
    np.testing.assert_array_equal(jax.jacrev(bordered)(x[0]), jnp.diag(jnp.array([2.0, 1.0])))
    np.testing.assert_array_equal(
        jax.hessian(lambda x: jnp.sum(bordered(x) ** 2))(x[0]), jnp.diag(jnp.array([8.0, 2.0]))
    )
    np.testing.assert_array_equal(jax.grad(jax.checkpoint(lambda x: jnp.sum(bordered(x))))(x[0]), jnp.array([2.0, 1.0]))

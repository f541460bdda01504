"""Gradients of exact products: what Python's fractions have, in both frameworks, and along any axes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax import lax

import altgrad_jax.nn
import altgrad_torch.nn
from altgrad_core.formats import EIGHT
from parity_tests.support import TORCH_DEVICE
from tests.exact_sums import mixed, product_of, same_bits

MATMUL = (((1,), (0,)), ((), ()))


def gradients_in_jax(a: np.ndarray, b: np.ndarray, gradient: np.ndarray) -> tuple[jax.Array, ...]:
    product, pull = jax.vjp(lambda a, b: altgrad_jax.nn.exact_product(a, b, MATMUL), jnp.asarray(a), jnp.asarray(b))
    return product, *pull(jnp.asarray(gradient))


def gradients_in_torch(a: np.ndarray, b: np.ndarray, gradient: np.ndarray) -> tuple[torch.Tensor, ...]:
    operands = [torch.tensor(x, device=TORCH_DEVICE, requires_grad=True) for x in (a, b)]
    product = altgrad_torch.nn.exact_product(*operands)
    product.backward(torch.tensor(gradient, device=TORCH_DEVICE))
    return tuple(x.detach().cpu() for x in (product, *(each.grad for each in operands if each.grad is not None)))


@pytest.mark.parametrize("name", EIGHT)
def test_gradients_are_exact_sums(name: str) -> None:
    a, b = mixed(name, (6, 8, 4), 3)
    gradient = mixed(name, (6, 4, 2), 4)[0]
    wanted = product_of(a, b), product_of(gradient, b.T), product_of(a.T, gradient)
    for of_jax, of_torch, exact in zip(
        gradients_in_jax(a, b, gradient), gradients_in_torch(a, b, gradient), wanted, strict=True
    ):
        same_bits(of_jax, exact)
        same_bits(of_torch, exact)


@pytest.mark.parametrize(
    ("shapes", "dimensions"),
    [
        (((3, 2, 4), (4, 5, 2)), (((2,), (0,)), ((1,), (2,)))),
        pytest.param(((5, 3, 4), (4, 6, 5)), (((0, 2), (2, 0)), ((), ())), marks=pytest.mark.exhaustive),
        pytest.param(((4,), (4,)), (((0,), (0,)), ((), ())), marks=pytest.mark.exhaustive),
    ],
)
def test_the_axes_of_lax(
    shapes: tuple[tuple[int, ...], tuple[int, ...]], dimensions: altgrad_jax.exact.DotDimensionNumbers
) -> None:
    """Small integers, whose products every accumulation has right: all that can go wrong is where they go."""
    draw = np.random.default_rng(0)
    a, b = (jnp.asarray(draw.integers(-4, 5, shape), jnp.float32) for shape in shapes)
    wanted, pull_wanted = jax.vjp(lambda a, b: lax.dot_general(a, b, dimensions), a, b)
    product, pull = jax.vjp(lambda a, b: altgrad_jax.nn.exact_product(a, b, dimensions), a, b)
    gradient = jnp.asarray(draw.integers(-4, 5, wanted.shape), jnp.float32)
    same_bits(product, wanted)
    for got, expected in zip(pull(gradient), pull_wanted(gradient), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_batches_in_torch() -> None:
    """Stacked matrices, and a batch of rows times one weight."""
    draw = np.random.default_rng(1)
    for shape_a, shape_b in (((2, 3, 4), (2, 4, 5)), ((2, 3, 4), (4, 5))):
        a, b = (
            torch.tensor(draw.integers(-4, 5, s), dtype=torch.float32, requires_grad=True) for s in (shape_a, shape_b)
        )
        a.requires_grad_(), b.requires_grad_()
        gradient = torch.tensor(draw.integers(-4, 5, (2, 3, 5)), dtype=torch.float32)
        wanted = torch.autograd.grad(a @ b, (a, b), gradient)
        got = torch.autograd.grad(altgrad_torch.nn.exact_product(a, b), (a, b), gradient)
        for one, other in zip(got, wanted, strict=True):
            assert torch.equal(one, other)


def test_dtypes_are_kept() -> None:
    a, b = jnp.ones((6, 8), jnp.bfloat16), jnp.ones((8, 4), jnp.bfloat16)
    product, pull = jax.vjp(lambda a, b: altgrad_jax.nn.exact_product(a, b, MATMUL), a, b)
    assert product.dtype == jnp.bfloat16
    assert {each.dtype for each in pull(product)} == {jnp.dtype(jnp.bfloat16)}
    assert altgrad_jax.nn.exact_product(a, b, MATMUL, preferred_element_type=jnp.float32).dtype == jnp.float32
    x = torch.ones(2, 3, dtype=torch.bfloat16, requires_grad=True)
    altgrad_torch.nn.exact_product(x, torch.ones(3, 2)).sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16


def test_out_sharding_is_honoured() -> None:
    mesh = jax.make_mesh((1,), ("rows",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        wanted = jax.sharding.NamedSharding(mesh, jax.P("rows", None))
        product = altgrad_jax.nn.exact_product(jnp.ones((6, 8)), jnp.ones((8, 4)), MATMUL, out_sharding=wanted)
    assert product.sharding.spec == jax.P("rows", None)


def test_shapes_that_do_not_match_are_named() -> None:
    with pytest.raises(ValueError, match=r"shapes \(2, 3, 4\) and \(3, 4, 5\)"):
        altgrad_torch.nn.exact_product(torch.ones(2, 3, 4), torch.ones(3, 4, 5))
    with pytest.raises(ValueError, match="the operands have shapes"):
        altgrad_jax.nn.exact_product(jnp.ones((2, 3)), jnp.ones((4, 2)), MATMUL)


def test_gradients_of_gradients() -> None:
    """Of the sum of squares of a product, which no float64 dot of these operands holds."""
    a, b = mixed("E7M0", (6, 8, 4), 5)
    a, b = a * np.float32(2.0**-40), b * np.float32(2.0**-40)

    def of_jax(a: jax.Array) -> jax.Array:
        product, pull = jax.vjp(lambda a: altgrad_jax.nn.exact_product(a, jnp.asarray(b), MATMUL), a)
        return pull(product)[0]

    _, pull = jax.vjp(of_jax, jnp.asarray(a))
    x = torch.tensor(a, requires_grad=True)
    product = altgrad_torch.nn.exact_product(x, torch.tensor(b))
    (first,) = torch.autograd.grad(product, x, product, create_graph=True)
    (second,) = torch.autograd.grad(first, x, torch.ones_like(first))
    inner = product_of(np.ones_like(a), b)
    same_bits(pull(jnp.ones_like(a))[0], product_of(inner, b.T))
    same_bits(second, product_of(inner, b.T))

"""Norms: correctly rounded on exact ties and next to them, in both frameworks, and of every order."""

import math
import random
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec

import altgrad_torch
from altgrad_core.errors import InputError
from altgrad_core.norms import check_norm_type, norm_of_exponent_sums, round_root
from altgrad_jax import clip_by_global_norm, global_norm
from altgrad_jax.norms import _rounded_exactly, norm_of
from altgrad_torch.norms import norm_of as torch_norm_of

Single = npt.NDArray[np.float32]

FLOAT32_MAX = float(np.finfo(np.float32).max)
SIZE = 64
NORM = jax.jit(global_norm)


def nearest_float32(total: Fraction) -> np.float32:
    """The float32 nearest to the root of a fraction, ties to even, found by comparing squares of midpoints."""
    guess = np.float32(min(math.sqrt(total), FLOAT32_MAX))
    below, above = np.nextafter(guess, np.float32(0)), np.nextafter(guess, np.float32(FLOAT32_MAX))
    is_odd = bool(guess.view(np.uint32) & 1)
    up = ((Fraction(float(guess)) + Fraction(float(above))) / 2) ** 2
    down = ((Fraction(float(guess)) + Fraction(float(below))) / 2) ** 2
    if above > guess and (total > up or (total == up and is_odd)):
        return above
    return below if guess > 0 and (total < down or (total == down and is_odd)) else guess


def sum_of_squares(x: Single) -> Fraction:
    return sum((Fraction(float(each)) ** 2 for each in x), Fraction(0))


def ties(count: int) -> list[Single]:
    """Tensors whose norm lies exactly half way between two float32, or next to it by the least that there is."""
    draw, made = random.Random(0), []
    while len(made) < count:
        middle = 2 * (draw.getrandbits(23) | 1 << 23) + 1
        rest, parts = middle * middle, []
        while rest:
            parts.append(min(math.isqrt(rest), 2**24 - 1))
            rest -= parts[-1] ** 2
        x = np.zeros(SIZE, np.float32)
        x[: len(parts)] = np.ldexp(np.array(parts, np.float64), draw.choice([-149, -120, 0, 60, 100]))
        x[-1] = draw.choice([0.0, 0.0, 2.0**-149])
        made.append(draw.choice([1, -1]) * x)
    return made


def assert_norm_is(x: Single, expected: np.float32) -> None:
    in_jax, in_torch = np.asarray(NORM([jnp.asarray(x)])), altgrad_torch.global_norm(torch.from_numpy(x)).numpy()
    for actual in (in_jax, in_torch):
        assert actual.view(np.uint32) == expected.view(np.uint32), f"{actual!r}, not {expected!r}"


def test_exact_ties_go_to_even() -> None:
    """A float64 sum cannot tell: these take the exact one."""
    for x in ties(60):
        assert_norm_is(x, nearest_float32(sum_of_squares(x)))


def test_a_known_tie_that_a_float64_sum_gets_wrong() -> None:
    x = np.array([1.0] + [1.1036377e16] * 36, np.float32)
    assert_norm_is(np.pad(x, (0, SIZE - len(x))), nearest_float32(sum_of_squares(x)))


ROUNDED_EXACTLY = jax.jit(_rounded_exactly, static_argnums=1)


@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e19, 1e-42])
def test_the_exact_sum_over_several_leaves(scale: float) -> None:
    draw = np.random.default_rng(0)
    leaves = [(draw.standard_normal(size) * scale).astype(np.float32) for size in (3, 2**16 + 5)]
    right = nearest_float32(sum((sum_of_squares(leaf) for leaf in leaves), Fraction(0)))
    with jax.enable_x64(True):
        assert int(ROUNDED_EXACTLY([jnp.asarray(leaf) for leaf in leaves], None)) == int(right.view(np.int32))


def any_magnitudes(draw: np.random.Generator) -> Single:
    """Of all binades, of a few, of the smallest numbers there are, or hardly any."""
    bits = draw.integers(0, 0x7F800000, SIZE).astype(np.uint32).view(np.float32)
    few = np.ldexp(draw.standard_normal(SIZE), draw.integers(-149, 120)).astype(np.float32)
    smallest = (draw.integers(0, 9, SIZE) * 2.0**-149).astype(np.float32)
    return [bits, few, smallest, np.where(np.arange(SIZE) < 2, bits, 0)][draw.integers(4)]


def test_the_exact_sum_of_whatever_there_is() -> None:
    draw = np.random.default_rng(3)
    with jax.enable_x64(True):
        for x in (any_magnitudes(draw) for _ in range(300)):
            expected = nearest_float32(sum_of_squares(x))
            assert int(ROUNDED_EXACTLY([jnp.asarray(x)], None)) == int(expected.view(np.int32)), x


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_by_the_exact_sum(dtype: str) -> None:
    leaf = jnp.asarray(np.random.default_rng(1).standard_normal(5000), dtype)
    expected = nearest_float32(sum_of_squares(np.asarray(leaf.astype(jnp.float32))))
    assert np.asarray(NORM([leaf])).view(np.uint32) == expected.view(np.uint32)
    with jax.enable_x64(True):
        assert int(_rounded_exactly([leaf], None)) == int(expected.view(np.int32))


@given(st.integers(0, 2**600), st.integers(-150, 0))
def test_roots_are_rounded_once(total: int, half_exponent: int) -> None:
    value = Fraction(total) * Fraction(4) ** half_exponent
    if value < 10**300:
        assert round_root(total, 2 * half_exponent) == float(nearest_float32(value))
    else:
        assert round_root(total, 2 * half_exponent) == FLOAT32_MAX


def test_exponent_sums_of_nothing() -> None:
    assert norm_of_exponent_sums([0] * 255, [0] * 255) == 0.0


@pytest.mark.parametrize("flush", [False, True])
def test_torch_counts_subnormals_even_where_the_processor_flushes_them(flush: bool) -> None:
    x = np.random.default_rng(2).integers(1, 2**23, SIZE).astype(np.uint32).view(np.float32)
    expected = nearest_float32(sum_of_squares(x))
    torch.set_flush_denormal(flush)
    try:
        actual = altgrad_torch.norms.euclidean_norm([torch.from_numpy(x)])
    finally:
        torch.set_flush_denormal(False)
    assert actual == float(expected)


# ---- other orders


LEAVES = [np.array([3.0, -4.0, 0.0], np.float32), np.array([[1e-45, 2.5]], np.float32)]
ORDERS: dict[float, float] = {
    1.0: 3 + 4 + 2.5,
    3.0: (27 + 64 + 2.5**3) ** (1 / 3),
    0.5: (math.sqrt(3) + 2 + math.sqrt(2.5) + math.sqrt(2.0**-149)) ** 2,
    math.inf: 4.0,
}


@pytest.mark.parametrize("order", ORDERS)
def test_orders(order: float) -> None:
    expected = np.float32(ORDERS[order])
    in_jax = jax.jit(lambda leaves: norm_of(leaves, order).single)([jnp.asarray(leaf) for leaf in LEAVES])
    assert float(in_jax) == torch_norm_of([torch.from_numpy(leaf) for leaf in LEAVES], order) == float(expected)


ENDS = [
    (1.0, [0.0, 0.0], 0.0),
    (3.0, [0.0, 0.0], 0.0),
    (math.inf, [0.0, 0.0], 0.0),
    (1.0, [3e38, 3e38], FLOAT32_MAX),
    (3.0, [1e38, 1e38], float(np.float32(float(np.float32(1e38)) * 2 ** (1 / 3)))),
    (math.inf, [3e38, -3e38], float(np.float32(3e38))),
    *((order, [1.0, np.inf], math.inf) for order in (1.0, 3.0, math.inf)),
    *((order, [np.nan, np.inf], math.nan) for order in (1.0, 3.0, math.inf)),
]


@pytest.mark.parametrize(("order", "values", "expected"), ENDS)
def test_orders_at_the_ends(order: float, values: list[float], expected: float) -> None:
    """Nothing overflows but what is infinite, and NaN shows."""
    x = np.array(values, np.float32)
    in_jax, in_torch = float(norm_of([jnp.asarray(x)], order).single), torch_norm_of([torch.from_numpy(x)], order)
    np.testing.assert_array_equal([in_jax, in_torch], [expected, expected])


def test_clipping_by_other_orders() -> None:
    grads = {"w": jnp.array([3.0, -4.0])}
    for order, norm in ((1.0, 7.0), (math.inf, 4.0)):
        tx = clip_by_global_norm(1.0, 0.0, norm_type=order)
        updates, state = jax.jit(tx.update)(grads, tx.init(grads))
        assert float(state.total_norm) == norm
        np.testing.assert_array_equal(updates["w"], grads["w"] * np.float32(1 / norm))
        parameter = torch.nn.Parameter(torch.zeros(2))
        parameter.grad = torch.tensor([3.0, -4.0])
        assert float(altgrad_torch.clip_grad_norm_([parameter], 1.0, order)) == norm


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, True, "2"])
def test_bad_orders(bad: Any) -> None:
    with pytest.raises(InputError, match="norm_type is"):
        check_norm_type(bad)
    with pytest.raises(InputError, match="norm_type is"):
        clip_by_global_norm(1.0, norm_type=bad)


# ---- parts of a larger tree


def test_over_a_mapped_axis() -> None:
    """Each place holds a part: the norm is that of the whole, also where only the exact sum can tell."""
    mesh = Mesh(np.array(jax.devices()[:1]), ("parts",))
    for x in (np.random.default_rng(3).standard_normal(64).astype(np.float32), ties(1)[0]):
        whole = NORM([jnp.asarray(x)])
        by_vmap = jax.vmap(lambda part: global_norm([part], axis_name="parts"), axis_name="parts")
        np.testing.assert_array_equal(by_vmap(jnp.asarray(x).reshape(4, 16)), np.full(4, whole))
        by_shards = jax.jit(
            jax.shard_map(
                lambda part: global_norm([part], axis_name="parts"),
                mesh=mesh,
                in_specs=PartitionSpec("parts"),
                out_specs=PartitionSpec(),
            )
        )
        np.testing.assert_array_equal(by_shards(jnp.asarray(x)), whole)


# ---- derivatives


def formula(x: npt.NDArray[np.float64], order: float) -> npt.NDArray[np.float64]:
    """The gradient of the norm of order p, in float64."""
    if math.isinf(order):
        return np.sign(x) * (np.abs(x) == np.abs(x).max())
    norm = (np.abs(x) ** order).sum() ** (1 / order)
    return np.sign(x) * (np.abs(x) / norm) ** (order - 1)


def norm_of_order(order: float) -> Callable[[Any], jax.Array]:
    return lambda tree: norm_of(jax.tree.leaves(tree), order).single


@pytest.mark.parametrize("order", [2.0, 1.0, 1.5, 3.0, 0.5, math.inf])
def test_gradients_are_those_of_the_formula(order: float) -> None:
    x = np.random.default_rng(4).standard_normal(SIZE).astype(np.float32)
    x[3] *= 9
    expected, norm = formula(x.astype(np.float64), order), norm_of_order(order)
    tree = {"a": jnp.asarray(x[:16].reshape(4, 4)), "b": jnp.asarray(x[16:]), "none": None}
    in_reverse = jax.jit(jax.grad(norm))(tree)
    np.testing.assert_allclose(np.concatenate([in_reverse["a"].ravel(), in_reverse["b"]]), expected, 2e-6)
    _, forward = jax.jvp(norm, (jnp.asarray(x),), (jnp.cos(jnp.asarray(x)),))
    np.testing.assert_allclose(forward, expected @ np.cos(x.astype(np.float64)), 2e-6)


@pytest.mark.parametrize("order", [2.0, 1.0, 1.5, 0.5, math.inf])
def test_where_there_is_no_derivative_it_is_a_finite_subgradient(order: float) -> None:
    norm = norm_of_order(order)
    np.testing.assert_array_equal(jax.grad(norm)(jnp.zeros(2)), [0, 0])
    np.testing.assert_array_equal(jax.grad(norm)(jnp.array([0.0, -2.0])), [0, -1])
    assert np.all(np.isfinite(jax.hessian(norm)(jnp.array([0.0, -2.0, 1.0]))))
    np.testing.assert_array_equal(jax.hessian(norm)(jnp.zeros(2)), np.zeros((2, 2)))


def test_equal_magnitudes_share_the_gradient_of_the_largest() -> None:
    tree = [jnp.array([4.0, 1.0]), jnp.array([-4.0])]
    np.testing.assert_array_equal(np.concatenate(jax.grad(norm_of_order(math.inf))(tree)), [0.5, 0, -0.5])


@pytest.mark.parametrize("scale", [2.0**-146, 2.0**-126, 2.0**-100, 2.0**100, 2.0**125])
def test_gradients_of_what_is_tiny_or_huge(scale: float) -> None:
    x = jnp.asarray(np.array([3 * scale, 4 * scale], np.float32))
    for wrap in (jax.grad, lambda f: jax.jit(jax.grad(f))):
        np.testing.assert_allclose(wrap(global_norm)(x), [0.6, 0.8], 1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gradients_of_half_precision(dtype: str) -> None:
    gradient = jax.grad(global_norm)(jnp.array([3.0, 4.0], dtype))
    np.testing.assert_array_equal(gradient, jnp.array([0.6, 0.8], dtype))


def test_gradients_of_norms_that_are_not_finite() -> None:
    for bad in (np.inf, np.nan):
        x = jnp.array([1.0, bad])
        np.testing.assert_array_equal(jax.grad(global_norm)(x), jax.grad(optax.tree.norm)(x))


def test_a_gradient_penalty() -> None:
    """A norm of gradients, differentiated."""

    def penalty(x: dict[str, jax.Array], norm: Callable[[Any], jax.Array]) -> jax.Array:
        return (norm(jax.grad(lambda y: jnp.sum(y["w"] ** 3))(x)) - 1) ** 2

    x = {"w": jnp.array([3.0, 4.0])}
    expected = jax.grad(penalty)(x, optax.tree.norm)["w"]
    np.testing.assert_allclose(jax.grad(penalty)(x, global_norm)["w"], expected, 1e-6)


ORDERS_OF_AUTODIFF: dict[str, Callable[[Any], Any]] = {
    "vmap of grad": lambda f: jax.vmap(jax.grad(f)),
    "grad of vmap": lambda f: jax.grad(lambda x: jnp.sum(jax.vmap(f)(x))),
    "remat": lambda f: jax.grad(jax.checkpoint(f)),
    "scan": lambda f: jax.grad(lambda x: jax.lax.scan(lambda total, row: (total + f(row), None), jnp.float32(0), x)[0]),
    "forward over reverse": lambda f: jax.vmap(jax.jacfwd(jax.jacrev(f))),
    "reverse over forward": lambda f: jax.vmap(jax.jacrev(jax.jacfwd(f))),
    "reverse over reverse": lambda f: jax.vmap(jax.jacrev(jax.jacrev(f))),
    "third": lambda f: jax.vmap(jax.jacfwd(jax.hessian(f))),
}


@pytest.mark.parametrize("name", ORDERS_OF_AUTODIFF)
def test_derivatives_are_those_of_optax(name: str) -> None:
    x = jnp.asarray(np.random.default_rng(5).standard_normal((3, 4)), jnp.float32)
    derive = ORDERS_OF_AUTODIFF[name]
    np.testing.assert_allclose(jax.jit(derive(global_norm))(x), derive(optax.tree.norm)(x), 1e-5, 1e-6)


def test_gradients_of_float64_leaves() -> None:
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(6).standard_normal(5))
        for derive in (jax.grad, jax.hessian):
            actual = derive(global_norm)(x)
            assert actual.dtype == jnp.float64
            np.testing.assert_allclose(actual, derive(optax.tree.norm)(x), 1e-6)


def test_gradients_over_a_mapped_axis() -> None:
    """As JAX has them of a sum over the axis: over all places."""
    x = jnp.asarray(np.random.default_rng(7).standard_normal((4, 3)), jnp.float32)

    def plain(part: jax.Array) -> jax.Array:
        return jnp.sqrt(jax.lax.psum(jnp.sum(part**2), "parts"))

    def ours(part: jax.Array) -> jax.Array:
        return global_norm(part, axis_name="parts")

    for of in (
        lambda f: jax.grad(lambda x: jnp.sum(jax.vmap(f, axis_name="parts")(x)))(x),
        lambda f: jax.vmap(jax.grad(f), axis_name="parts")(x),
    ):
        np.testing.assert_allclose(of(ours), of(plain), 1e-6)
    mesh = Mesh(np.array(jax.devices()[:1]), ("parts",))
    by_shards = jax.shard_map(ours, mesh=mesh, in_specs=PartitionSpec("parts"), out_specs=PartitionSpec())
    np.testing.assert_allclose(jax.jit(jax.grad(by_shards))(x), jax.grad(optax.tree.norm)(x), 1e-6)

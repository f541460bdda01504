"""The quantised product as a stand-in for ``lax.dot_general``: in Flax's hooks, in dtypes, in gradients."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from altgrad_jax import FormatParams, Static, quantize
from altgrad_jax.nn import Each, Rule, quantize_model, quantized_dot_general, quantized_product
from altgrad_jax.nn.products import GRADIENT, LHS, RHS, Grid, dot_general_on, empty_record, read_record
from altgrad_jax.statistics import CastCounts, amax_of_tallies

_MATMUL = (((1,), (0,)), ((), ()))


def _operands() -> tuple[jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(0))
    return jax.random.normal(keys[0], (5, 7)), jax.random.normal(keys[1], (7, 3))


def test_operands_and_gradient_are_cast_where_they_enter():
    lhs, rhs = _operands()
    dot = quantized_dot_general("E3M4", "E5M2", scaling=Each(Static(0.25), Static(2.0), Static(8.0)))
    out, pullback = jax.vjp(lambda a, b: dot(a, b, _MATMUL), lhs, rhs)
    q_lhs, q_rhs = quantize(lhs, "E3M4", scale=0.25), quantize(rhs, "E3M4", scale=2.0)
    np.testing.assert_array_equal(out, q_lhs @ q_rhs)
    gradient = jax.random.normal(jax.random.key(1), out.shape) * 100
    d_lhs, d_rhs = pullback(gradient)
    q_gradient = quantize(gradient, "E5M2", scale=8.0)
    np.testing.assert_allclose(d_lhs, q_gradient @ q_rhs.T, rtol=1e-6)
    np.testing.assert_allclose(d_rhs, q_lhs.T @ q_gradient, rtol=1e-6)


@jax.jit
def _recorded(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    record = empty_record(1)
    grids = Grid.of(FormatParams.from_format("E3M4"), jnp.ones(3))
    dot = dot_general_on((grids.at(LHS), grids.at(RHS), grids.at(GRADIENT)), record[0])
    jax.grad(lambda a: jnp.sum(1000 * dot(a, rhs, _MATMUL)))(lhs)
    return read_record(record)


def test_the_record_holds_what_the_casts_saw():
    lhs, rhs = _operands()
    tallies = _recorded(lhs, rhs)
    assert tallies.shape == (1, 3, 6)
    np.testing.assert_array_equal(
        amax_of_tallies(tallies)[0], jnp.stack([jnp.max(jnp.abs(lhs)), jnp.max(jnp.abs(rhs)), jnp.float32(1000)])
    )
    counts = CastCounts.of_tallies(tallies).as_integers()
    assert counts["elements"] == [[lhs.size, rhs.size, 15]]
    assert counts["overflow"][0][GRADIENT] == 15  # 1000 is beyond E3M4's 124
    assert counts["overflow"][0][LHS] == counts["overflow"][0][RHS] == 0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_dtypes_are_kept(dtype):
    lhs, rhs = (operand.astype(dtype) for operand in _operands())
    dot = quantized_dot_general("E4M3", scaling=Static(1.0))
    out, pullback = jax.vjp(lambda a, b: dot(a, b, _MATMUL), lhs, rhs)
    assert out.dtype == dtype
    assert [each.dtype for each in pullback(out)] == [dtype, dtype]
    assert dot(lhs, rhs, _MATMUL, preferred_element_type=jnp.float32).dtype == jnp.float32


def test_it_fits_the_hooks_of_flax():
    x = _operands()[0]
    dense = nn.Dense(4, use_bias=False, dot_general=quantized_dot_general("E5M2", scaling=Static(1.0)))
    variables = dense.init(jax.random.key(0), x)
    expected = quantize(x, "E5M2") @ quantize(variables["params"]["kernel"], "E5M2")
    np.testing.assert_array_equal(dense.apply(variables, x), expected)
    linear = nnx.Linear(
        7, 4, use_bias=False, dot_general=quantized_dot_general("E5M2", scaling=Static(1.0)), rngs=nnx.Rngs(0)
    )
    np.testing.assert_array_equal(linear(x), quantize(x, "E5M2") @ quantize(linear.kernel[...], "E5M2"))


@pytest.mark.parametrize("accumulate", ["native", "exact"])
def test_it_fits_the_hooks_of_einsum_and_convolution(accumulate):
    """As rules put it there, forward and backward."""
    options = {"scaling": Static(1.0), "accumulate": accumulate}
    product, rule = quantized_product("E3M4", "E5M2", **options), Rule(".*", "E3M4", gradients="E5M2", **options)
    x = jax.random.normal(jax.random.key(1), (2, 6, 3))
    for kind, arguments, hook in (
        (nnx.Einsum, ("bti,io->bto", (3, 4)), {"einsum_op": product.einsum}),
        (nnx.Conv, (3, 4, (3,)), {"conv_general_dilated": product.conv_general_dilated}),
        (nnx.Linear, (3, 4), {"dot_general": product.dot_general}),
    ):
        hooked, plain = kind(*arguments, **hook, rngs=nnx.Rngs(0)), kind(*arguments, rngs=nnx.Rngs(0))
        gradients = [
            nnx.jit(nnx.grad(lambda layer, x: (layer(x) ** 2).sum(), argnums=(0, 1)))(layer, x)
            for layer in (hooked, quantize_model(plain, [rule]))
        ]
        found, expected = ([nnx.state(of_layer, nnx.Param), of_x] for of_layer, of_x in gradients)
        for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
            np.testing.assert_array_equal(one, other)
    conv = nn.Conv(4, (3,), conv_general_dilated=product.conv_general_dilated, use_bias=False)
    variables = conv.init(jax.random.key(0), x)
    plain = nn.Conv(4, (3,), use_bias=False)
    kernel = quantize(variables["params"]["kernel"], "E3M4")
    expected = plain.apply({"params": {"kernel": kernel}}, quantize(x, "E3M4"))
    np.testing.assert_allclose(conv.apply(variables, x), expected, rtol=1e-6, atol=1e-6)


def test_stochastic_params_are_refused():
    with pytest.raises(ValueError, match="expected another, or quantize_model"):
        quantized_dot_general(FormatParams.from_format("E5M2", rounding="stochastic"))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the border is for XLA's CPU backend")
def test_each_cast_is_compiled_once_on_a_cpu() -> None:
    """Both consumers of a cast operand read its result, instead of casting again behind their transposes."""

    def both_products(lhs: jax.Array, rhs: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.grad(lambda a, b: jnp.sum(jnp.sin(dot(jnp.tanh(a), b, _MATMUL))), (0, 1))(lhs, rhs)

    dot = quantized_dot_general("E3M4", scaling=Static(1.0))
    compiled = jax.jit(both_products).lower(jnp.ones((64, 32)), jnp.ones((32, 16))).compile().as_text()
    assert compiled.count(" or(") == 3  # the last operation of a cast brings the sign back
    assert compiled.count(" tanh(") == 1

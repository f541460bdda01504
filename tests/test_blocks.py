"""Blocks that share a scale, in JAX. What their values are is tested in parity_tests/test_scaling.py."""

from __future__ import annotations

import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from altgrad_core.errors import InputError
from altgrad_jax import (
    CodeParams,
    FormatParams,
    PerBlock,
    block_scales,
    decode_blocks,
    encode_blocks,
    quantize,
    quantize_blocks,
    spread,
)

NORMAL = jnp.asarray(np.random.default_rng(0).normal(size=(6, 70)), jnp.float32)


@pytest.mark.parametrize("rule", ["mx", "fit"])
def test_a_block_is_a_tensor_of_its_own(rule: str) -> None:
    got = quantize_blocks(NORMAL, "E4M3", block=32, rule=rule)
    scales = block_scales(NORMAL, "E4M3", block=32, rule=rule)
    assert scales.shape == (6, 3)
    wide = spread(scales, NORMAL.shape, PerBlock(32))
    np.testing.assert_array_equal(got, quantize(NORMAL, "E4M3", scale=wide, overflow="saturate"))


def test_the_two_rules() -> None:
    """E4M3 ends at 1.75 x 2^8: MX saturates what lies above in its binade, ours doubles the scale for it."""
    x = jnp.array([1.75, 1.0, 1.76, 1.0])
    assert block_scales(x, "E4M3", block=2).tolist() == [2.0**-8, 2.0**-8]
    assert block_scales(x, "E4M3", block=2, rule="fit").tolist() == [2.0**-8, 2.0**-7]
    assert quantize_blocks(jnp.array([1.99]), "E4M3").tolist() == [1.75]
    assert quantize_blocks(jnp.array([1.99]), "E4M3", rule="fit").tolist() == [2.0]


def test_zeros() -> None:
    x = jnp.array([0.0, -0.0, 0.0, 1e-40])
    got = quantize_blocks(x, "E5M2", block=2)
    assert got.tolist() == [0.0, 0.0, 0.0, 0.0]
    assert np.signbit(got).tolist() == [False, True, False, False]
    assert block_scales(x, "E5M2", block=2).tolist() == [1.0, 1.0]
    codes, scales = encode_blocks(x, "E5M2", block=2)
    assert codes.tolist() == [0, 128, 0, 0]
    assert scales.tolist() == [127, 127]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("format", "code"), [("E5M2", 0x7E), ("E4M3", 0x7F), ("E3M4", 0)])
def test_nan_and_infinities_take_their_block_with_them(bad: float, format: str, code: int) -> None:
    x = jnp.array([1.0, bad, 1.0, 2.0])
    assert np.isnan(quantize_blocks(x, format, block=2)).tolist() == [True, True, False, False]
    codes, scales = encode_blocks(x, format, block=2)
    assert scales[0] == 255
    assert codes[:2].tolist() == [code, code]
    assert np.isnan(decode_blocks(codes, scales, format, block=2)).tolist() == [True, True, False, False]


def test_scales_that_only_others_write() -> None:
    """E8M0 goes from 2^-127 on; ours keep away from both ends."""
    codes, scales = jnp.array([0x7E, 0x08, 0x80], jnp.uint8), jnp.array([0, 0, 0], jnp.uint8)
    got = decode_blocks(codes, scales, "E4M3", block=1)
    assert got.tolist() == [448 * 2.0**-127, 0.0, 0.0]
    assert np.signbit(got).tolist() == [False, False, True]
    assert decode_blocks(codes[:1], jnp.array([254], jnp.uint8), "E4M3").tolist() == [math.inf]
    assert decode_blocks(codes[1:2], jnp.array([254], jnp.uint8), "E4M3").tolist() == [2.0**121]


def test_format_as_data_compiles_once() -> None:
    @jax.jit
    @chex.assert_max_traces(n=1)
    def go(x: jax.Array, params: FormatParams) -> jax.Array:
        return quantize_blocks(x, params)

    for name in ("E3M4", "E4M3", "E5M2", "E7M0"):
        np.testing.assert_array_equal(go(NORMAL, FormatParams.from_format(name)), quantize_blocks(NORMAL, name))


def test_codes_of_a_format_as_data_compile_once() -> None:
    @jax.jit
    @chex.assert_max_traces(n=1)
    def go(x: jax.Array, code: CodeParams) -> tuple[jax.Array, jax.Array, jax.Array]:
        codes, scales = encode_blocks(x, code)
        return codes, scales, decode_blocks(codes, scales, code)

    for name in ("E3M4", "E4M3", "E5M2", "E7M0"):
        expected = (*encode_blocks(NORMAL, name), quantize_blocks(NORMAL, name))
        for left, right in zip(go(NORMAL, CodeParams.from_format(name)), expected, strict=True):
            np.testing.assert_array_equal(left, right)
    toward_zero = CodeParams.from_format("E4M3", rounding="toward_zero")
    np.testing.assert_array_equal(
        encode_blocks(NORMAL, toward_zero)[0], encode_blocks(NORMAL, "E4M3", rounding="toward_zero")[0]
    )
    with pytest.raises(InputError, match="without a sign"):
        encode_blocks(NORMAL, CodeParams.from_format("float8_e8m0fnu"))
    with pytest.raises(InputError, match=r"rounding='toward_zero'.* would have no effect"):
        encode_blocks(NORMAL, toward_zero, rounding="toward_zero")


def test_other_paths() -> None:
    by_name = quantize_blocks(NORMAL, "E4M3")
    for path in ("wide", "integer"):
        np.testing.assert_array_equal(quantize_blocks(NORMAL, FormatParams.from_format("E4M3", path=path)), by_name)
    np.testing.assert_array_equal(quantize_blocks(NORMAL, "float32"), NORMAL)
    np.testing.assert_array_equal(quantize_blocks(NORMAL, "bf16"), quantize(NORMAL, "bf16"))


def test_under_transformations() -> None:
    expected = quantize_blocks(NORMAL, "E3M4", block=16)
    go = jax.jit(lambda x: quantize_blocks(x, "E3M4", block=16))
    np.testing.assert_array_equal(go(NORMAL), expected)
    np.testing.assert_array_equal(jax.vmap(go)(NORMAL), expected)
    np.testing.assert_array_equal(jax.lax.map(go, NORMAL), expected)
    params = FormatParams.stack([FormatParams.from_format(name) for name in ("E3M4", "E4M3")])
    both = jax.vmap(lambda p: quantize_blocks(NORMAL, p, block=16))(params)
    np.testing.assert_array_equal(both[0], expected)
    np.testing.assert_array_equal(both[1], quantize_blocks(NORMAL, "E4M3", block=16))
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        np.testing.assert_array_equal(go(NORMAL), expected)
        encode_blocks(NORMAL, "E3M4", block=16)


def test_gradients_pass_straight_through() -> None:
    weight = jnp.arange(NORMAL.size, dtype=jnp.float32).reshape(NORMAL.shape)
    gradient = jax.grad(lambda x: jnp.sum(weight * quantize_blocks(x, "E4M3")))(NORMAL)
    np.testing.assert_array_equal(gradient, weight)
    _, tangent = jax.jvp(lambda x: quantize_blocks(x, "E4M3"), (NORMAL,), (weight,))
    np.testing.assert_array_equal(tangent, weight)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 40)])
def test_nothing(shape: tuple[int, ...]) -> None:
    x = jnp.zeros(shape)
    assert quantize_blocks(x, "E4M3").shape == shape
    codes, scales = encode_blocks(x, "E4M3")
    assert decode_blocks(codes, scales, "E4M3").shape == shape


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"block": 0}, "block size is 0; expected an integer of at least 1"),
        ({"block": 2.5}, "block size is 2.5"),
        ({"axis": 2}, "axis 2 is out of range for an array of 2 axes; expected -2 to 1"),
        ({"rule": "mxx"}, "unknown block rule 'mxx'; did you mean 'mx'"),
        ({"rounding": "up"}, "unknown rounding 'up'"),
        (
            {"rounding": "stochastic", "random_bits": jnp.zeros(3, jnp.int32)},
            re.escape("shape (3,); expected that of x, (6, 70)"),
        ),
        ({"random_bits": jnp.zeros((6, 70), jnp.int32)}, "random_bits would have no effect"),
        ({"random_bits": jnp.zeros((6, 70), jnp.int32)}, "no effect"),
    ],
)
def test_bad_input(how: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_blocks(NORMAL, "E4M3", **how)


def test_bad_formats_and_scales() -> None:
    with pytest.raises(InputError, match="no sign"):
        quantize_blocks(NORMAL, "float8_e8m0fnu")
    with pytest.raises(InputError, match="without a sign"):
        quantize_blocks(NORMAL, FormatParams.from_format("float8_e8m0fnu"))
    with pytest.raises(InputError, match="32 bits"):
        encode_blocks(NORMAL, "float32")
    with pytest.raises(TypeError, match="int32"):
        quantize_blocks(jnp.arange(3), "E4M3")
    with pytest.raises(InputError, match="a scalar has none"):
        quantize_blocks(jnp.float32(1), "E4M3")
    codes, scales = encode_blocks(NORMAL, "E4M3")
    with pytest.raises(
        InputError, match=re.escape("(6, 3) but codes of shape (6, 70) have 5 blocks of 16 along axis 1")
    ):
        decode_blocks(codes, scales, "E4M3", block=16)
    with pytest.raises(TypeError, match="uint8; got int32"):
        decode_blocks(codes, scales.astype(jnp.int32), "E4M3")

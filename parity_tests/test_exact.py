"""Exact products: JAX = torch = Python's fractions, in every bit, for all eight formats and any float32."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import altgrad_jax
import altgrad_torch
from parity_tests.support import TORCH_DEVICE
from tests.exact_sums import K, M, N, Single, hard_cases, in_place, mixed, product_of, same_bits

CASES = {name: (a, b) for name, a, b in hard_cases()}


def in_torch(a: Single, b: Single) -> Single:
    operands = (torch.tensor(x, device=TORCH_DEVICE) for x in (a, b))
    return altgrad_torch.exact_matmul(*operands).cpu().numpy()


def in_jax(a: Single, b: Single) -> Single:
    return np.asarray(altgrad_jax.exact_matmul(jnp.asarray(a), jnp.asarray(b)))


@pytest.mark.parametrize("case", CASES)
def test_both_are_the_exact_sum_rounded_once(case: str) -> None:
    wanted = product_of(*CASES[case])
    same_bits(in_jax(*CASES[case]), wanted)
    same_bits(in_torch(*CASES[case]), wanted)


@pytest.mark.parametrize("case", CASES)
def test_the_order_of_terms_does_not_matter(case: str) -> None:
    a, b = CASES[case]
    order = np.random.default_rng(1).permutation(a.shape[1])
    a_in_order, b_in_order = np.ascontiguousarray(a[:, order]), np.ascontiguousarray(b[order])
    same_bits(in_jax(a_in_order, b_in_order), in_jax(a, b))
    same_bits(in_torch(a_in_order, b_in_order), in_torch(a, b))


def near_and_far(seed: int, spread: int, bits: int, cancelled: int) -> tuple[Single, Single]:
    """Numbers of so many bits below the first, of magnitudes so far apart, some zero; so many terms cancel in a row."""
    draw = np.random.default_rng(seed)
    size = (N + M) * K
    values = draw.choice([-1, 0, 1], size, p=[0.45, 0.1, 0.45]) * draw.integers(2**bits, 2 ** (bits + 1), size)
    values = np.ldexp(values, draw.integers(-spread, spread + 1, size) - bits).astype(np.float32)
    a, b = values[: N * K].reshape(N, K), values[N * K :].reshape(K, M)
    a[0, K - cancelled :], b[K - cancelled :] = -a[0, :cancelled], b[:cancelled]
    return a, b


@settings(max_examples=60)
@given(
    operands=st.builds(
        near_and_far, st.integers(0, 2**32), st.integers(0, 90), st.integers(0, 23), st.integers(0, K // 2)
    )
)
def test_any_operands(operands: tuple[Single, Single]) -> None:
    wanted = product_of(*operands)
    same_bits(in_jax(*operands), wanted)
    same_bits(in_torch(*operands), wanted)


SPECIALS = {
    "inf and finite": [np.inf, 1.0, 2.0**-62],
    "both infinities": [np.inf, -np.inf, 1.0],
    "NaN": [np.nan, 1.0, 2.0**60],
    "negative NaN": [-np.nan, 1.0, 2.0**60],
}


@pytest.mark.parametrize("case", SPECIALS)
@pytest.mark.parametrize("rest", [1.0, 2.0**60], ids=["in one dot", "by slices"])
def test_what_is_not_finite(case: str, rest: float) -> None:
    """As in any matrix product, but for NaN, which is the canonical one; the other rows are exact."""
    rows = [SPECIALS[case], [1.0, 2.0, rest], [rest, 2.0**-60, -rest]]
    a, b = in_place([dict(enumerate(row)) for row in rows], [{0: 1.0, 1: 3.0, 2: 2.0}, {0: -1.0, 2: 2.0**-60}])
    with np.errstate(invalid="ignore"):
        wanted = (a.astype(np.float64) @ b.astype(np.float64)).astype(np.float32)
    wanted[np.isnan(wanted)] = np.nan
    wanted[1:] = product_of(a[1:], b)
    same_bits(in_jax(a, b), wanted)
    same_bits(in_torch(a, b), wanted)


@pytest.mark.parametrize("rest", [1.0, 2.0**100], ids=["in one dot", "by slices"])
def test_a_sum_that_is_zero_is_positive(rest: float) -> None:
    """And one that vanishes keeps its sign."""
    rows = [{0: -0.0}, {0: -1.0, 1: 1.0}, {0: 2.0**-100}, {0: -(2.0**-100)}, {2: rest}]
    a, b = in_place(rows, [dict.fromkeys(range(3), 2.0**-50), {0: -0.0}])
    wanted = np.zeros((N, M), np.float32)
    wanted[3, 0], wanted[4, 0] = -0.0, rest * 2.0**-50
    same_bits(in_jax(a, b), wanted)
    same_bits(in_torch(a, b), wanted)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype: str) -> None:
    a, b = mixed("E5M2", (N, K, M), 9)
    operands = (torch.tensor(x, device=TORCH_DEVICE).to(getattr(torch, dtype)) for x in (a, b))
    same_bits(altgrad_torch.exact_matmul(*operands).cpu(), product_of(a, b))
    same_bits(altgrad_jax.exact_matmul(*(jnp.asarray(x).astype(dtype) for x in (a, b))), product_of(a, b))

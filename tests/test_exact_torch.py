"""Exact products in torch: of batches and views, on any number of threads, and what they refuse."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from altgrad_core.errors import InputError
from altgrad_torch import exact_matmul
from tests.exact_sums import mixed, product_of, same_bits
from tests.threads import fixture_of_threads

threads = fixture_of_threads(1, 4)


@pytest.fixture(params=[False, True], ids=["as it is", "flushing"])
def flushing(request: pytest.FixtureRequest) -> Iterator[bool]:
    torch.set_flush_denormal(request.param)
    yield request.param
    torch.set_flush_denormal(False)


def test_on_any_number_of_threads(threads: int) -> None:
    a, b = mixed("E7M0", (5, 1500, 4), 0)
    same_bits(exact_matmul(torch.tensor(a), torch.tensor(b)), product_of(a, b))


def test_large_operands_in_pieces(threads: int) -> None:
    """More elements than are looked at in one go, and the smallest of them in the last."""
    a = torch.ones(3, 100_000)
    a[2, -1], a[2, -2] = 2.0**-60, 2.0**60
    got = exact_matmul(a, torch.ones(100_000, 1))
    same_bits(got[:, 0], np.array([1e5, 1e5, 2.0**60], np.float32))
    a[2, -2] = 2.0**-40
    a[2, :-2] = 0
    same_bits(exact_matmul(a, torch.ones(100_000, 1))[2, 0], np.float32(2.0**-40 + 2.0**-60))


@pytest.mark.parametrize("name", ["E4M3", "E5M2", "E7M0"])
def test_batches_broadcast(name: str) -> None:
    pairs = [mixed(name, (4, 6, 3), seed) for seed in range(3)]
    a, b = (np.stack(each) for each in zip(*pairs, strict=True))
    same_bits(exact_matmul(torch.tensor(a), torch.tensor(b)), np.stack([product_of(*pair) for pair in pairs]))
    every = exact_matmul(torch.tensor(a), torch.tensor(b[0]))
    same_bits(every, np.stack([product_of(each, b[0]) for each in a]))


def test_views_and_vectors() -> None:
    a, b = mixed("E7M0", (4, 12, 3), 3)
    wide = torch.tensor(np.repeat(a, 2, axis=1))[:, ::2]
    transposed = torch.tensor(b.T.copy()).T
    same_bits(exact_matmul(wide, transposed), product_of(a, b))
    same_bits(exact_matmul(wide[0], transposed[:, 0]), product_of(a, b)[0, 0])
    same_bits(exact_matmul(wide.expand(2, 4, 12), transposed), np.stack([product_of(a, b)] * 2))


SUBNORMALS = np.array([3, 5, 2**22 + 1, 2**31], np.uint32).view(np.float32)[None]
OTHERS = {
    other: np.array([[2.0**40], [-(2.0**40)], [2.0**40], [other]], np.float32) for other in (1.0, 2.0**60, 2.0**100)
}
WANTED = {other: product_of(SUBNORMALS, b) for other, b in OTHERS.items()}  # before anything is flushed


@pytest.mark.parametrize("other", OTHERS, ids=["one product", "two", "many"])
def test_subnormals_count_at_their_value(flushing: bool, other: float) -> None:
    same_bits(exact_matmul(torch.tensor(SUBNORMALS), torch.tensor(OTHERS[other])), WANTED[other])


def test_any_default_dtype() -> None:
    a, b = (torch.tensor(x) for x in mixed("E7M0", (4, 6, 3), 0))
    wanted = exact_matmul(a, b)
    torch.set_default_dtype(torch.float64)
    try:
        same_bits(exact_matmul(a, b), wanted)
    finally:
        torch.set_default_dtype(torch.float32)


def test_there_is_no_gradient_rule() -> None:
    a = torch.ones(2, 2, requires_grad=True)
    with pytest.raises(RuntimeError, match="have no gradient rule"):
        exact_matmul(a, a)
    with torch.no_grad():
        assert exact_matmul(a, a).tolist() == [[2.0, 2.0]] * 2


@pytest.mark.parametrize("dtype", [torch.int32, torch.float64, torch.float8_e4m3fn, torch.complex64, torch.bool])
def test_refuses_other_dtypes(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"takes float32, bfloat16 and float16, .* got {dtype}"):
        exact_matmul(torch.ones(2, 2), torch.ones(2, 2).to(dtype))


@pytest.mark.parametrize("shapes", [((2, 3), (2, 3)), ((), (2,)), ((3,), (2, 3))], ids=str)
def test_refuses_shapes_that_do_not_match(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(InputError, match=re.escape(f"shapes {shapes[0]} and {shapes[1]}; expected")):
        exact_matmul(*map(torch.ones, shapes))

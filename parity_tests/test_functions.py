"""Functions of networks that have the same bits in both frameworks, and the float32 steps that they are made of."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import pytest
import torch

import altgrad_jax.nn.functions as jax_functions
import altgrad_jax.rounded as jax_rounded
import altgrad_torch.nn.functions as torch_functions
import altgrad_torch.rounded as torch_rounded
from parity_tests.support import TORCH_DEVICE
from tests.exact_sums import nearest_float32, same_bits

Single = npt.NDArray[np.float32]


def to_torch(x: npt.NDArray[np.generic]) -> torch.Tensor:
    return torch.tensor(x, device=TORCH_DEVICE)


def draws(seed: int, *shape: int, spread: float = 4.0) -> Single:
    """Numbers of many magnitudes, of both signs."""
    draw = np.random.default_rng(seed)
    return (draw.normal(size=shape) * 2.0 ** draw.normal(0, spread, shape).clip(-120, 120)).astype(np.float32)


STEPS: dict[str, Callable[[Fraction, Fraction], Fraction]] = {
    "add": lambda x, y: x + y,
    "subtract": lambda x, y: x - y,
    "multiply": lambda x, y: x * y,
    "divide": lambda x, y: x / y,
}


@pytest.mark.parametrize("name", STEPS)
def test_steps_are_correctly_rounded(name: str) -> None:
    """Down to where results vanish."""
    exact = STEPS[name]
    operands = [draws(k, 4000, spread=45.0) for k in range(2)]
    operands = [np.where(np.abs(x) < 2.0**-126, np.float32(1), x) for x in operands]
    of_jax = jax.jit(getattr(jax_rounded, name))(*operands)
    of_torch = getattr(torch_rounded, name)(*map(to_torch, operands)).cpu()
    same_bits(of_jax, of_torch)
    wanted = [
        nearest_float32(exact(*map(Fraction, pair))) for pair in zip(*(x.tolist() for x in operands), strict=True)
    ]
    same_bits(of_jax, np.array(wanted, np.float32))


def test_roots_are_correctly_rounded() -> None:
    x = np.abs(draws(0, 100_000, spread=40.0))
    x = x[x >= 2.0**-126]
    of_jax, of_torch = jax.jit(jax_rounded.square_root)(x), torch_rounded.square_root(to_torch(x)).cpu()
    same_bits(of_jax, of_torch)
    # A float32 r is the nearest root of x where x lies between the squares of its midpoints, which float64 holds.
    root = np.asarray(of_jax)
    below, above = (
        (root.astype(np.float64) + np.nextafter(root, np.float32(end)).astype(np.float64)) / 2 for end in (0, np.inf)
    )
    assert np.all((below**2 < x) & (x < above**2))


def test_a_step_is_rounded_before_the_next() -> None:
    """Nothing is fused, and no rounding is left out, where one step follows the other in a program."""
    x, y, z = (draws(k, 10_000) for k in range(3))

    def chain(steps: object, x: object, y: object, z: object) -> object:
        return steps.subtract(steps.divide(steps.add(steps.multiply(x, y), z), y), steps.square_root(abs(z)))

    of_jax = jax.jit(lambda *operands: chain(jax_rounded, *operands))(x, y, z)
    same_bits(of_jax, chain(torch_rounded, *map(to_torch, (x, y, z))).cpu())
    same_bits(of_jax, (x * y + z) / y - np.sqrt(np.abs(z)))


def test_sums() -> None:
    x, y = draws(0, 7, 5), draws(1, 7, 5)
    for of_torch, of_jax, wanted in (
        (torch_rounded.exact_sum(to_torch(x)), jax_rounded.exact_sum(x), zip(*x.tolist(), strict=True)),
        (
            torch_rounded.exact_sum_of_products(to_torch(x), to_torch(y)),
            jax_rounded.exact_sum_of_products(x, y),
            zip(*(x.astype(np.float64) * y).tolist(), strict=True),
        ),
    ):
        exact = [nearest_float32(sum(map(Fraction, column), Fraction(0))) for column in wanted]
        same_bits(of_jax, np.array(exact, np.float32))
        same_bits(of_torch.cpu(), of_jax)
    rows = draws(2, 1000, 77, spread=1.0)
    of_jax = jax.jit(jax_rounded.sum_of_last)(rows)
    same_bits(of_jax, torch_rounded.sum_of_last(to_torch(rows)).cpu())
    np.testing.assert_allclose(of_jax, rows.astype(np.float64).sum(-1, keepdims=True), rtol=1e-6, atol=1e-6)


class Case(NamedTuple):
    """A function of a row or more, by name, with operands, and what it is in float64."""

    name: str
    operands: tuple[npt.NDArray[np.generic], ...]
    constants: tuple[npt.NDArray[np.generic] | float, ...]
    plain: Callable[..., torch.Tensor]


TOKENS = np.random.default_rng(0).integers(0, 11, (6, 5))
CAUSAL = np.tril(np.ones((9, 9), bool))
CASES = (
    Case("plus", (draws(1, 6, 5), draws(2, 6, 5)), (), torch.add),
    Case("add_bias", (draws(3, 6, 5), draws(4, 5)), (), torch.add),
    Case("gained", (draws(5, 6, 5), draws(6, 5)), (), torch.mul),
    Case("scaled", (draws(7, 6, 5),), (12**-0.5,), torch.mul),
    Case("relu", (draws(8, 6, 5),), (), torch.relu),
    Case("gelu", (draws(13, 600, 5, spread=1.0),), (), lambda x: torch.nn.functional.gelu(x, approximate="tanh")),
    Case("embed", (draws(9, 11, 4),), (TOKENS,), lambda table, at: table[at]),
    Case("rms_norm", (draws(10, 40, 24),), (1e-5,), lambda x, e: x * (x * x).mean(-1, keepdim=True).add(e).rsqrt()),
    Case(
        "softmax", (draws(11, 50, 9, 9, spread=1.0),), (CAUSAL,),
        lambda x, mask: x.masked_fill(~mask, -torch.inf).softmax(-1),
    ),
    Case(
        "cross_entropy", (draws(12, 6, 5, 11, spread=1.0),), (TOKENS,),
        lambda x, at: torch.nn.functional.cross_entropy(x.flatten(0, 1), at.flatten()),
    ),
)  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_functions(case: Case) -> None:
    """The same bits, forward and backward, and the numbers that float64 has."""

    def constants(array: Callable[[npt.NDArray[np.generic]], object]) -> list[object]:
        return [array(x) if isinstance(x, np.ndarray) else x for x in case.constants]

    def of_jax(gradient: jax.Array | None, *operands: jax.Array) -> tuple[jax.Array, ...]:
        function = getattr(jax_functions, case.name)
        value, pull = jax.vjp(lambda *operands: function(*operands, *constants(jnp.asarray)), *operands)
        return value, *(() if gradient is None else pull(gradient))

    def of_torch(function: Callable[..., torch.Tensor], dtype: torch.dtype, gradient: Single) -> list[torch.Tensor]:
        operands = [to_torch(x).to(dtype).requires_grad_() for x in case.operands]
        value = function(*operands, *constants(to_torch))
        value.backward(to_torch(gradient).to(dtype))
        return [value.detach().cpu(), *(x.grad.cpu() for x in operands if x.grad is not None)]

    shape = jax.eval_shape(lambda *operands: of_jax(None, *operands)[0], *case.operands).shape
    gradient = draws(99, *shape, spread=1.0).reshape(shape)
    in_jax = jax.jit(of_jax)(gradient, *case.operands)
    in_torch = of_torch(getattr(torch_functions, case.name), torch.float32, gradient)
    in_float64 = of_torch(case.plain, torch.float64, gradient)
    for one, other, exact in zip(in_jax, in_torch, in_float64, strict=True):
        same_bits(one, other)
        # Eight roundings to float32 at most follow each other, of what may cancel down from the largest.
        np.testing.assert_allclose(one, exact, rtol=2.0**-21, atol=2.0**-21 * float(exact.abs().max()))


def test_gelu_is_as_exact_as_it_says() -> None:
    """Held against float64, where what is asked is off by less than 2^-44: 88, the largest of |v|, times a few ulps.

    ``u`` bounds the error of each rounding. ``v`` takes four (constants, square, sum, product), the gate's logarithm
    changes by ``1 - gate`` of what ``v`` does, and exponential, sum, quotient and product are rounded after it. What
    vanishes below 2^-126 comes on top. Of the derivative, gate + x v' gate (1 - gate), likewise.
    """
    grid = np.linspace(-12, 12, 240_001).astype(np.float32)
    x = np.unique(np.concatenate([grid, draws(0, 20_000, spread=1.0), draws(1, 20_000, spread=40.0)]))
    x = x[np.abs(x) >= 2.0**-126]
    value, pull = jax.vjp(jax.jit(jax_functions.gelu), x)
    of_torch = to_torch(x).requires_grad_()
    torch_functions.gelu(of_torch).sum().backward()
    (derivative,), u, least = pull(jnp.ones_like(value)), 2.0**-24, 2.0**-126
    same_bits(value, torch_functions.gelu(to_torch(x)).cpu())
    same_bits(derivative, of_torch.grad.cpu())

    wide = x.astype(np.float64)
    near = wide.clip(-12, 12)  # beyond, gate and derivative are 0 or 1 in float32
    slope, cubic = np.sqrt(8 / np.pi), 0.044715 * np.sqrt(8 / np.pi)
    v, v_slope = near * (slope + cubic * near**2), slope + 3 * cubic * near**2
    gate, rest = 1 / (1 + np.exp(-v)), 1 / (1 + np.exp(v))
    bound = (4 * np.abs(v) * rest + 5) * u * np.abs(wide * gate) + (1 + np.abs(wide)) * least
    assert np.all(np.abs(np.asarray(value, np.float64) - wide * gate) <= bound)
    rise = near * v_slope * gate * rest
    bound = gate * (4 * np.abs(v) * rest + 4) + np.abs(rise) * (4 * np.abs(v) + 14) + np.abs(gate + rise)
    bound = bound * u + (1 + np.abs(near * v_slope)) * least
    assert np.all(np.abs(np.asarray(derivative, np.float64) - (gate + rise)) <= bound)

    ulps = np.abs(np.asarray(value, np.float64) - wide * gate) / np.spacing(np.abs(value)).astype(np.float64)
    for above, most in ((-1, 3), (-3, 13), (-5, 31)):
        assert ulps[x > above].max() <= most


def test_gelu_at_its_ends() -> None:
    x = np.float32([np.inf, 3e38, -3e38, 0.0, -0.0, 1e-40, np.nan, -np.inf])
    value, pull = jax.vjp(jax_functions.gelu, x)
    of_torch = to_torch(x).requires_grad_()
    torch_functions.gelu(of_torch).sum().backward()
    for found in (value, torch_functions.gelu(to_torch(x)).cpu()):
        same_bits(found[:6], np.float32([np.inf, 3e38, -0.0, 0.0, -0.0, 0.0]))
        assert np.isnan(np.asarray(found[6:])).all()
    for found in (pull(jnp.ones_like(value))[0], of_torch.grad.cpu()):
        np.testing.assert_array_equal(found, np.float32([1, 1, 0, 0.5, 0.5, 0.5, np.nan, 0]))


@pytest.mark.exhaustive
@pytest.mark.parametrize(("name", "first", "last"), [("exponential", -104.0, 0.0), ("logarithm", 1.0, 2.0**24)])
def test_every_float32_that_occurs(name: str, first: float, last: float) -> None:
    """Exponentials of what is at most zero, and logarithms of sums of them: the same float32 in both frameworks."""
    ends = sorted(int(np.float32(abs(x)).view(np.uint32)) for x in (first, last))
    sign = np.uint32(2**31 if first < 0 else 0)
    of_jax = jax.jit(getattr(jax_rounded, name))
    for start in range(ends[0], ends[1] + 1, 2**24):
        bits = np.arange(start, min(start + 2**24, ends[1] + 1), dtype=np.uint32)
        x = (bits | sign).view(np.float32)
        same_bits(of_jax(x), getattr(torch_rounded, name)(to_torch(x)).cpu())

"""float32 arithmetic with the same bits in both frameworks: each step through float64, rounded once, zero below 2^-126.

torch's float32 roots are off by an ulp, its reductions take an order of their own, and it keeps subnormals. What is
proved here:

- ``add``, ``subtract``, ``multiply``, ``divide``, ``square_root``: no result of 24-bit operands lies within 2^-49 of a
  place where float32 rounds, unless it is there (Figueroa, "When is double rounding innocuous?", 1995), so a float64
  result that is off by an ulp or two is rounded to the same float32, the nearest one.
- ``sum_of_last``: its float64 additions are made in an order that is written down, two halves at a time, of terms that
  float64 holds. No framework's reduction has a part in it.
- ``exact_sum``: the exact sum, rounded once, in any order.

``exponential`` and ``logarithm`` are not: two float64 libraries that differ in the last bit round to two float32 once
in some 2^28 inputs. There are but 2^32 of them, and a test goes through all that can occur.

``altgrad_jax/rounded.py`` does the same.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from altgrad_core.norms import ROUNDS_TO_NORMAL
from altgrad_torch.exact import exact_matmul


def add(x: Tensor, y: Tensor) -> Tensor:
    """``x + y`` of float32 that broadcast against each other.

    >>> add(torch.tensor(1.0), torch.tensor(2.0**-25)).item()
    1.0
    """
    return _single(x.double() + y.double())


def subtract(x: Tensor, y: Tensor) -> Tensor:
    """``x - y`` of float32 that broadcast against each other.

    >>> subtract(torch.tensor(3.0), torch.tensor(2.0)).item()
    1.0
    """
    return _single(x.double() - y.double())


def multiply(x: Tensor, y: Tensor) -> Tensor:
    """``x * y`` of float32 that broadcast against each other.

    >>> multiply(torch.tensor(2.0**-100), torch.tensor(2.0**-27)).item()
    0.0
    """
    return _single(x.double() * y.double())


def divide(x: Tensor, y: Tensor) -> Tensor:
    """``x / y`` of float32 that broadcast against each other.

    >>> divide(torch.tensor(1.0), torch.tensor(3.0)).item()
    0.3333333432674408
    """
    return _single(x.double() / y.double())


def square_root(x: Tensor) -> Tensor:
    """The root of float32.

    >>> square_root(torch.tensor(2.0)).item()
    1.4142135381698608
    """
    return _single(x.double().sqrt())


def exponential(x: Tensor) -> Tensor:
    """``e^x`` of float32.

    >>> exponential(torch.tensor(1.0)).item()
    2.7182817459106445
    """
    return _single(x.double().exp())


def logarithm(x: Tensor) -> Tensor:
    """The natural logarithm of float32.

    >>> logarithm(torch.tensor(10.0)).item()
    2.3025851249694824
    """
    return _single(x.double().log())


def multiply_add(x: Tensor, y: Tensor, z: Tensor, w: Tensor) -> Tensor:
    """``x * y + z * w`` of float32 that broadcast against each other, the same whether or not it is fused.

    Both products are exact in float64. Their sum is rounded there and again to float32, in both frameworks alike.

    >>> multiply_add(*map(torch.tensor, (3.0, 0.5, 2.0, 2.0))).item()
    5.5
    """
    return _single(x.double() * y.double() + z.double() * w.double())


def sum_of_last(x: Tensor, y: Tensor | None = None) -> Tensor:
    """The sum over the last axis, of ``x`` or of ``x * y``, in float64 by halves, rounded once.

    Args:
        x: float32 of shape ``(..., n)``.
        y: likewise, or nothing.

    Returns:
        float32 of shape ``(..., 1)``.

    >>> sum_of_last(torch.tensor([[1.0, 2.0, 3.0]])).tolist()
    [[6.0]]
    """
    return _single(_by_halves(x.double() if y is None else x.double() * y.double()))


def exact_sum(x: Tensor) -> Tensor:
    """The exact sum over all axes but the last, rounded once.

    Args:
        x: float32 of shape ``(..., n)``.

    Returns:
        float32 of shape ``(n,)``.

    >>> exact_sum(torch.tensor([[2.0**64], [1.0], [-(2.0**64)]])).tolist()
    [1.0]
    """
    rows = x.reshape(-1, x.shape[-1])
    return exact_matmul(rows.new_ones(len(rows)), rows)


def exact_sum_of_products(x: Tensor, y: Tensor) -> Tensor:
    """The exact sum of ``x * y`` over all axes but the last, rounded once.

    Args:
        x: float32 of shape ``(..., n)``.
        y: likewise.

    Returns:
        float32 of shape ``(n,)``.

    >>> exact_sum_of_products(torch.tensor([[2.0], [3.0]]), torch.tensor([[5.0], [7.0]])).tolist()
    [31.0]
    """
    columns, others = (each.reshape(-1, each.shape[-1]).T for each in (x, y))
    return exact_matmul(columns[:, None, :], others[:, :, None]).reshape(-1)


def _single(wide: Tensor) -> Tensor:
    single = wide.float()
    return torch.where(wide.abs() < ROUNDS_TO_NORMAL, torch.zeros_like(single).copysign(single), single)


def _by_halves(x: Tensor) -> Tensor:
    while x.shape[-1] > 1:
        half = -(-x.shape[-1] // 2)
        x = x[..., :half] + pad(x[..., half:], (0, 2 * half - x.shape[-1]))
    return x

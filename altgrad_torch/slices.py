"""Sums of products that one float64 product does not hold: of slices of the operands, until the rounding is certain.

Each product of two slices is a sum of integers that float64 holds, in whatever order; :mod:`altgrad_core.exact` says
how operands are cut. ``altgrad_jax/slices.py`` does the same.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from altgrad_core.exact import bits_until_rounded, largest_rest

_BELOW_FLOAT32 = 29
"""Bits of a float64 significand that float32 does not have."""


class Sliced(NamedTuple):
    """An operand that is cut into slices.

    Attributes:
        values: float64; what is not finite is zero.
        exponent: the lowest slice counts in units of two to this.
        count: how many slices there are.
        bits: of a slice.
    """

    values: Tensor
    exponent: int
    count: int
    bits: int

    def slice(self, k: int) -> Tensor:
        """The bits of a slice, the lowest being slice 0, as integers with the sign of the element."""
        scaled = self.values * 2.0 ** (-self.exponent - self.bits * k)
        if k == self.count - 1:
            return scaled.trunc_()
        above = (scaled * 2.0**-self.bits).trunc_()
        return scaled.trunc_().sub_(above.mul_(2.0**self.bits))


def sum_of_two(left: Sliced, right: Sliced) -> Tensor:
    """The sum where one operand is whole and the other in two, rounded to odd: it rounds on as the exact one would."""
    exponent = left.exponent + right.exponent
    high = torch.matmul(left.slice(left.count - 1), right.slice(right.count - 1)).mul_(2.0 ** (exponent + left.bits))
    low = torch.matmul(left.slice(0), right.slice(0)).mul_(2.0**exponent)
    # Knuth's sum: what the float64 sum lacks, exact itself.
    total = high + low
    of_low = total - high
    error = (low - of_low).add_(high.sub_(total - of_low))
    odd = total.view(torch.int64) - ((error < 0) != (total < 0)).to(torch.int64) | 1
    return torch.where(error == 0, total, odd.view(torch.float64))


class _Sum(NamedTuple):
    """A sum of digits that arrive from the highest to the lowest; int64 and float64, of the shape of the result.

    Attributes:
        rest: the digits so far, as one integer; once a midpoint is chosen, by how much they lie above that.
        midpoint: half way between the two float32 around the sum, or zero as long as that is not settled.
        last: the sum of the products of the last place.
        before_last: that of the place before it.
    """

    rest: Tensor
    midpoint: Tensor
    last: Tensor
    before_last: Tensor


def sum_of_many(left: Sliced, right: Sliced) -> Tensor:
    """The exact sum, or a float64 that rounds to the same float32."""
    exponent, slice_bits = left.exponent + right.exponent, left.bits
    # A sum without terms is zero, however many digits there are.
    has_terms = torch.matmul((left.values != 0).to(torch.float32), (right.values != 0).to(torch.float32)) > 0
    nothing = torch.zeros_like(has_terms, dtype=torch.int64)
    total = _Sum(nothing, torch.zeros_like(has_terms, dtype=torch.float64), nothing, nothing)
    for place in range(left.count + right.count - 2, -3, -1):
        is_decided = (total.midpoint != 0) & (total.rest.abs() > largest_rest(slice_bits))
        if not (has_terms & ~is_decided).any():
            break
        # The products of a place reach into the two above it, so that the digit two places above is now known.
        worth = 2.0 ** (exponent + slice_bits * (place + 2))
        total = _with_digit(total, _products_of_place(left, right, place, nothing), worth, slice_bits)
    whole = total.rest.to(torch.float64) * 2.0**exponent
    nudged = total.midpoint + total.rest.sign() * total.midpoint.abs() * 2.0**-40
    return torch.where(total.midpoint == 0, whole, nudged)


def _products_of_place(left: Sliced, right: Sliced, place: int, nothing: Tensor) -> Tensor:
    """The sum of the products of all pairs of slices whose numbers add up to a place; int64."""
    first, last = max(place - right.count + 1, 0), min(place, left.count - 1)
    products = (torch.matmul(left.slice(k), right.slice(place - k)) for k in range(first, last + 1))
    return sum((each.to(torch.int64) for each in products), nothing)


def _with_digit(total: _Sum, products: Tensor, worth: float, slice_bits: int) -> _Sum:
    """A sum with the next digit, worth so much: what the products of three places leave in that one."""
    mask, settled = (1 << slice_bits) - 1, 1 << bits_until_rounded(slice_bits)
    digit = (products >> (2 * slice_bits)) + ((total.last >> slice_bits) & mask) + (total.before_last & mask)
    # Beyond that the sign is settled, and all that is asked of the rest.
    rest = (total.rest.clamp(-settled, settled) << slice_bits) + digit
    choose = (total.midpoint == 0) & (rest.abs() >= settled)
    bits = rest.to(torch.float64).view(torch.int64)
    # Where the conversion rounds up to the next float32, the sum is below the midpoint after that: as right.
    midpoint = (bits >> _BELOW_FLOAT32 << _BELOW_FLOAT32 | 1 << (_BELOW_FLOAT32 - 1)).view(torch.float64)
    return _Sum(
        torch.where(choose, rest - midpoint.to(torch.int64), rest),
        torch.where(choose, midpoint * worth, total.midpoint),
        products,
        total.last,
    )

"""Matrix products that are the exact sum, rounded once to float32: the same bits in any order, anywhere.

One float64 product where its bits suffice, else products of slices of the operands; :mod:`altgrad_core.exact` says how
many. ``altgrad_jax/exact.py`` does the same.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from altgrad_core.errors import InputError
from altgrad_core.exact import LOWEST_EXPONENT, bits_of_spans, cut_of
from altgrad_core.norms import ROUNDS_TO_NORMAL
from altgrad_torch.cpu import CHUNK_OF_ONE_THREAD
from altgrad_torch.shards import refuse_sharded
from altgrad_torch.slices import Sliced, sum_of_many, sum_of_two

_SIGN = -(2**31)
_MAGNITUDE = 0x7FFFFFFF
_IMPLICIT_ONE = 1 << 23
_INF = 0x7F800000
_MIN_EXPONENT = -126


def exact_matmul(a: Tensor, b: Tensor) -> Tensor:
    """The matrix product, each element the exact sum rounded once to float32, to nearest, ties to even.

    It depends neither on the order of the sum nor on threads, and has the bits of :func:`altgrad_jax.exact_matmul`. It
    takes one float64 product where the operands' bits allow, as found at run time: always for operands on the
    grids of E0M7 to E4M3 and sums of up to 2^17 terms. A sum beyond float32 is inf; one below 2^-126 is zero and keeps
    its sign; one that is exactly zero is +0, whatever the signs of its terms. Infinities and NaN give what they would
    give in any matrix product, as the one canonical NaN.

    There is no gradient rule: what an operand's gradient is rounded to is up to the caller's ``autograd.Function``.
    Reads numbers back from the device.

    Args:
        a: float32, bfloat16 or float16, of any values, subnormals included; of a shape that ``torch.matmul`` takes.
        b: likewise, on the same device.

    Returns:
        float32, of the shape of ``a @ b``.

    Raises:
        TypeError: for operands of other dtypes, float64 among them.
        ValueError: for shapes that do not match, sums of more than 2^30 terms, and DTensors.
        RuntimeError: if a gradient would be asked for.

    >>> a = torch.tensor([[2.0**64, 1.0, -(2.0**64)]])
    >>> exact_matmul(a, torch.ones(3, 1)).tolist()
    [[1.0]]
    """
    a, b = _operand(a), _operand(b)
    if a.ndim == 0 or b.ndim == 0 or a.shape[-1] != b.shape[0 if b.ndim == 1 else -2]:
        shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
        raise InputError(f"the operands have shapes {shapes}; expected (..., n, k) and (..., k, m)")
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        raise RuntimeError("exact products have no gradient rule; expected to be called in a torch.autograd.Function")
    length = a.shape[-1]
    left, right = _span(a), _span(b)
    if left.bits + right.bits <= bits_of_spans(length):
        return _rounded(torch.matmul(_wide(a, left), _wide(b, right)), left, right)
    return _by_slices(length, a, b, left, right)


def _operand(x: Tensor) -> Tensor:
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(
            f"exact_matmul takes float32, bfloat16 and float16, whose products float64 holds; got {x.dtype}"
        )
    refuse_sharded(x, "exact_matmul")
    return x.to(torch.float32)


class _Span(NamedTuple):
    """Where the bits of an operand lie.

    Attributes:
        exponent: every finite element is a multiple of two to this.
        bits: how many bits there are from there to the highest; none if all elements are zero.
        is_finite: whether all elements are.
    """

    exponent: int
    bits: int
    is_finite: bool = True


def _span(x: Tensor) -> _Span:
    if not x.numel():
        return _Span(0, 0)
    pieces = x.reshape(-1).view(torch.int32).split(CHUNK_OF_ONE_THREAD if x.device.type == "cpu" else x.numel())
    lowest, highest = torch.stack([_ends(piece) for piece in pieces]).amin(0).tolist()
    largest = -highest - 1
    if largest >= _INF + _SIGN:
        return _span(torch.where(x.isfinite(), x, 0.0))._replace(is_finite=False)
    exponent = ((lowest - _SIGN) >> 23) - 127 - 150
    return _Span(exponent, max(((largest - _SIGN) >> 23) - 126 - exponent, 0))


def _ends(bits: Tensor) -> Tensor:
    """Of float32 by their bits: int32 of shape ``(2,)``, the least exponent of a lowest bit, and the largest magnitude.

    Both in the place of a float32's exponent, and negative if they are small; of the magnitude all bits flipped.
    """
    magnitude = bits | _SIGN
    # The bit above a fraction is always set. What is left of an integer's bits is a power of two: exact as a float32.
    lowest_bit = magnitude | _IMPLICIT_ONE
    lowest_bit &= -lowest_bit
    place = lowest_bit.to(torch.float32).view(torch.int32)
    place += magnitude & (_SIGN | _INF)
    # Zero has no bits: less one it becomes the largest int32, and nothing else becomes more than its place.
    return torch.stack([torch.maximum(place, magnitude - 1).min(), ~magnitude.max()])


def _wide(x: Tensor, span: _Span) -> Tensor:
    """float32 as float64; subnormals from their bits, lest ``torch.set_flush_denormal`` makes zeros of them."""
    if span.exponent >= _MIN_EXPONENT:
        return x.to(torch.float64)
    bits = x.view(torch.int32)
    magnitude = bits & _MAGNITUDE
    subnormal = torch.where(bits < 0, -magnitude, magnitude).to(torch.float64) * 2.0**LOWEST_EXPONENT
    return torch.where(magnitude < _IMPLICIT_ONE, subnormal, x.to(torch.float64))


def _rounded(total: Tensor, left: _Span, right: _Span) -> Tensor:
    """float64 rounded to float32 by the library's rules: no subnormals, one NaN, no negative zero but from those."""
    single = total.to(torch.float32).add_(0.0)
    # What is not zero is no less than the lowest bits' product, so that mostly nobody has to look.
    if left.exponent + right.exponent >= _MIN_EXPONENT and left.is_finite and right.is_finite:
        return single
    vanishes = total.abs() < ROUNDS_TO_NORMAL
    single = single.masked_fill(vanishes, 0.0).masked_fill(vanishes & (total < 0), -0.0)
    return single.masked_fill(total.isnan(), math.nan)


def _by_slices(length: int, a: Tensor, b: Tensor, left: _Span, right: _Span) -> Tensor:
    """As many products as it takes, each an integer that float64 holds, added up until the rounding is certain."""
    cut = cut_of(left.bits, right.bits, length)
    add_up = sum_of_two if cut.left * cut.right == 2 else sum_of_many
    total = add_up(
        Sliced(_finite(a, left), left.exponent, cut.left, cut.bits),
        Sliced(_finite(b, right), right.exponent, cut.right, cut.bits),
    )
    if not (left.is_finite and right.is_finite):
        total = _with_specials(total, _wide(a, left), _wide(b, right))
    return _rounded(total, left, right)


def _finite(x: Tensor, span: _Span) -> Tensor:
    return _wide(x, span) if span.is_finite else torch.where(x.isfinite(), _wide(x, span), 0.0)


def _with_specials(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Sums of finite elements, and what infinities and NaN make of the others: signs tell as much as values do."""
    special = torch.matmul(*(torch.where(x.isfinite(), x.sign(), x) for x in (a, b)))
    return torch.where(special.isfinite(), total, special)

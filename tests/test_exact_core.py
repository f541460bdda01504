"""How operands are cut: every dot is an integer that float64 holds, whatever the spans and the length."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from altgrad_core.errors import InputError
from altgrad_core.exact import (
    FLOAT64_BITS,
    MAX_LENGTH,
    bits_of_length,
    bits_of_spans,
    bits_until_rounded,
    cut_of,
    largest_rest,
)
from altgrad_core.formats import EIGHT
from tests.exact_sums import finite_codes

SPANS = (1, 5, 8, 13, 17, 18, 21, 22, 23, 24, 25, 26, 27, 32, 33, 44, 52, 53, 54, 65, 66, 100, 127, 128, 200, 277)
LENGTHS = (0, 1, 2, 3, 64, 512, 513, 1000, 2**17, 2**24, 2**29 + 1, MAX_LENGTH)


def span(values: np.ndarray) -> int:
    """Bits from the lowest that is set to the highest, by Python's fractions of two."""
    lowest = min(-(float(x).as_integer_ratio()[1].bit_length() - 1) for x in values if x % 1)
    return math.frexp(np.abs(values).max())[1] - lowest


@pytest.mark.parametrize("length", LENGTHS)
def test_sums_of_a_place_fit_float64(length: int) -> None:
    for left, right in itertools.product(SPANS, SPANS):
        if left + right <= bits_of_spans(length):
            continue
        cut = cut_of(left, right, length)
        widths = [each if count == 1 else cut.bits for each, count in ((left, cut.left), (right, cut.right))]
        assert cut.left * cut.bits >= left or cut.left == 1
        assert cut.right * cut.bits >= right or cut.right == 1
        pairs = min(cut.left, cut.right)
        # K pairs of products below 2^a * 2^b each.
        assert max(length, 1) * pairs * ((1 << widths[0]) - 1) * ((1 << widths[1]) - 1) < 2**FLOAT64_BITS


@pytest.mark.parametrize("bits", sorted({cut_of(a, b, k).bits for a in SPANS for b in SPANS for k in LENGTHS}))
def test_what_is_yet_to_come_reaches_no_other_midpoint(bits: int) -> None:
    quarter_step = 2 ** (bits_until_rounded(bits) - 25)
    assert largest_rest(bits) < quarter_step
    # The digits below one, at their most: two full ones and the top of a third, in each place.
    digit = 2 * (2**bits - 1) + 2 ** (FLOAT64_BITS - 2 * bits)
    assert digit / (2**bits - 1) <= largest_rest(bits)
    # One place more is an int64, from what the sign of a rest is clipped to.
    assert (2 ** bits_until_rounded(bits) << bits) + digit < 2**63


def test_arrays_are_cut_as_integers_are() -> None:
    left, right = np.meshgrid(SPANS, SPANS)
    whole = cut_of(left, right, 512, np.where)
    for at in np.ndindex(left.shape):
        assert tuple(each[at] for each in whole) == tuple(cut_of(int(left[at]), int(right[at]), 512))


def test_formats_that_need_one_dot() -> None:
    """Up to 2^17 terms in either operand's format; E5M2, E6M1 and E7M0 only if their values are not all there."""
    spans = {name: span(finite_codes(name)) for name in EIGHT}
    assert spans == {"E0M7": 7, "E1M6": 7, "E2M5": 8, "E3M4": 11, "E4M3": 18, "E5M2": 32, "E6M1": 64, "E7M0": 127}
    narrow = list(spans.values())[:5]
    assert all(a + b <= bits_of_spans(2**17) for a in narrow for b in narrow)


def test_more_terms_than_there_may_be() -> None:
    with pytest.raises(InputError, match=r"have 1073741825 elements; expected 2\^30 at most"):
        bits_of_length(2**30 + 1)

"""Sums of products as Python's fractions have them, rounded once to float32, and operands that are hard to add up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from altgrad_core.formats import EIGHT, parse

Single = npt.NDArray[np.float32]

N, K, M = 20, 40, 2
"""Most cases have this shape, of a and b alike: JAX compiles each shape."""

_TOO_LARGE = Fraction(2**128 - 2**103)
"""Half way from float32's maximum to what would come next: a tie that goes up."""


def nearest_float32(exact: Fraction) -> np.float32:
    """To nearest, ties to even, of 24 significant bits; zero with the sign kept below 2^-126, inf beyond float32."""
    magnitude = abs(exact)
    if magnitude == 0:
        return np.float32(0)
    sign = np.float32(-1 if exact < 0 else 1)
    if magnitude >= _TOO_LARGE:
        return sign * np.float32(np.inf)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    quantum = Fraction(2) ** (exponent - 23 if magnitude >= Fraction(2) ** exponent else exponent - 24)
    rounded = round(magnitude / quantum) * quantum  # Fraction rounds ties to even
    return sign * np.float32(0 if rounded < Fraction(2) ** -126 else float(rounded))


def product_of(a: npt.NDArray[np.floating], b: npt.NDArray[np.floating]) -> Single:
    """The matrix product of two finite matrices."""
    rows, columns = ([[Fraction(float(x)) for x in line] for line in lines] for lines in (a, b.T))
    sums = [[sum((x * y for x, y in zip(row, column, strict=True)), Fraction(0)) for column in columns] for row in rows]
    return np.array([[nearest_float32(each) for each in line] for line in sums], np.float32).reshape(len(a), b.shape[1])


def same_bits(got: object, wanted: object) -> None:
    """Whether all bits are the same."""
    got, wanted = (np.asarray(x) for x in (got, wanted))
    assert got.dtype == wanted.dtype == np.float32
    np.testing.assert_array_equal(got.view(np.uint32), wanted.view(np.uint32))


def finite_codes(name: str) -> Single:
    """Every finite value of a format."""
    values = parse(name).code_book()
    return values[np.isfinite(values)].astype(np.float32)


def mixed(name: str, shape: tuple[int, int, int], seed: int) -> tuple[Single, Single]:
    """Operands of all codes of a format; large terms cancel in one sum, and a row and a column are zero."""
    n, k, m = shape
    draw, codes = np.random.default_rng(seed), finite_codes(name)
    a, b = draw.choice(codes, (n, k)), draw.choice(codes, (k, m))
    half = k // 2
    # All that is left of the first row times the first column is the last term, which is as small as there is.
    a[0, half : 2 * half], b[half : 2 * half, 0] = -a[0, :half], b[:half, 0]
    a[0, k - k % 2 :], b[k - k % 2 :, 0] = np.abs(codes[codes != 0]).min(), np.abs(codes[codes != 0]).min()
    a[1], b[:, 1] = 0, 0
    return a, b


def in_place(rows: Sequence[Mapping[int, float]], columns: Sequence[Mapping[int, float]]) -> tuple[Single, Single]:
    """Operands of the shape that most cases share, from what is in them by its place along the sum."""
    a, b = np.zeros((N, K), np.float32), np.zeros((K, M), np.float32)
    for lines, given in ((a, rows), (b.T, columns)):
        for line, values in zip(lines, given, strict=False):
            line[list(values)] = list(values.values())
    return a, b


def ties() -> tuple[Single, Single]:
    """Rows whose sums lie half way between two float32, and next to it by the least that two E7M0 can add."""
    tie, last, large = {0: 2.0**30, 1: 2.0**6}, K - 1, {3: 2.0**64, 4: -(2.0**64)}
    rows = [
        tie,
        {**tie, 2: 2.0**7},
        {**tie, last: 2.0**-62},
        {**tie, last: -(2.0**-62)},
        {**tie, 2: 2.0**7, last: 2.0**-62},
        {**tie, 2: 2.0**7, last: -(2.0**-62)},
        {0: 2.0**30, 1: -(2.0**5)},
        {0: 2.0**30, 1: -(2.0**5), last: 2.0**-62},
        {0: 2.0**30, 1: -(2.0**5), last: -(2.0**-62)},
        {**large, **tie, last: 2.0**-62},
        {**large, last: -(2.0**-62)},
        {3: 2.0**-62, 4: -(2.0**-62)},
    ]
    ones = dict.fromkeys(range(last), 1.0)
    return in_place(
        rows, [{**ones, last: 2.0**-62}, {k: one * 2.0**64 for k, one in ones.items()} | {last: -(2.0**-62)}]
    )


def ties_in_two() -> tuple[Single, Single]:
    """Sums next to a tie by less than float64 can tell, of operands of which one is cut in two."""
    tie, last = {0: 2.0**30, 1: 2.0**6}, K - 1
    rows = [
        {**line, last: rest * 2.0**-20}
        for line in (tie, {**tie, 2: 2.0**7}, {0: 2.0**30, 1: -(2.0**5)}, {k: -x for k, x in tie.items()})
        for rest in (1, -1, 0)
    ]
    ones = dict.fromkeys(range(last), 1.0)
    return in_place(rows, [{**ones, last: 2.0**-18}, {**ones, last: -(2.0**-18)}])


def ends() -> tuple[Single, Single]:
    """Sums at the edge of overflow and of 2^-126, and next to it, of both signs."""
    rows = [
        {0: 2.0**64},
        {0: 2.0**64, 1: -(2.0**40)},
        {0: 2.0**64, 1: -(2.0**39)},
        {0: 2.0**64, 1: -(2.0**39), 2: -(2.0**-62)},
        {0: 2.0**64, 1: -(2.0**39), 2: 2.0**-62},
        {3: 2.0**-63},
        {3: 2.0**-63, 4: -(2.0**-63)},
        {3: 2.0**-63, 4: -(2.0**-88)},
        {3: 2.0**-63, 4: -(2.0**-88), 5: -(2.0**-100)},
        {3: 2.0**-63, 4: -(2.0**-88), 5: 2.0**-100},
    ]
    column = dict.fromkeys(range(3), 2.0**64) | dict.fromkeys(range(3, K), 2.0**-63)
    return in_place(rows, [column, {k: -value for k, value in column.items()}])


def any_finite(seed: int) -> tuple[Single, Single]:
    """Any float32 but infinities and NaN, subnormals too."""
    bits = np.random.default_rng(seed).integers(0, 2**32, (N + M) * K, dtype=np.uint32)
    values = np.where((bits & 0x7F80_0000) == 0x7F80_0000, 1, bits).astype(np.uint32).view(np.float32)
    return values[: N * K].reshape(N, K), values[N * K :].reshape(K, M)


def hard_cases() -> Iterator[tuple[str, Single, Single]]:
    """Names and operands, of few shapes, since JAX compiles each of them."""
    for seed, name in enumerate(EIGHT):
        yield f"{name} mixed", *mixed(name, (N, K, M), seed)
    for seed, name in enumerate(("E4M3", "E5M2", "E7M0")):
        yield f"{name} long", *mixed(name, (2, 1025, 2), seed)
        yield f"{name} one term", *mixed(name, (2, 1, 2), seed)
        a, b = mixed("E4M3", (N, K, M), seed)[0], mixed(name, (N, K, M), seed)[1]
        yield f"E4M3 with {name}", a, b * np.float32(2.0**-40)
    yield "ties", *ties()
    yield "ties in two", *ties_in_two()
    yield "ends", *ends()
    yield "no terms", np.ones((2, 0), np.float32), np.ones((0, 2), np.float32)
    yield "any float32", *any_finite(0)
    yield "subnormals", np.full((N, K), 2.0**-149, np.float32), np.full((K, M), 2.0**100, np.float32)

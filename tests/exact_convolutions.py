"""Convolutions and their gradients as Python's fractions have them, from the definition, rounded once to float32."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from altgrad_core.convolution import Sweep
from tests.exact_sums import Single, finite_codes, nearest_float32


class Case(NamedTuple):
    """A convolution of ``(batch, inputs, *sizes)`` by ``(outputs, inputs / groups, *sizes)``."""

    x: tuple[int, ...]
    kernel: tuple[int, ...]
    sweeps: tuple[Sweep, ...]
    groups: int = 1

    @property
    def out(self) -> tuple[int, ...]:
        """The shape of the result."""
        sizes = zip(self.sweeps, self.x[2:], self.kernel[2:], strict=True)
        lengths = (
            (size - 1) * sweep.dilation + 1 + sweep.before + sweep.after - (kernel - 1) * sweep.spacing - 1
            for sweep, size, kernel in sizes
        )
        strides = (sweep.stride for sweep in self.sweeps)
        return (
            self.x[0],
            self.kernel[0],
            *(length // stride + 1 for length, stride in zip(lengths, strides, strict=True)),
        )


CASES = {
    "1d": Case((2, 4, 7), (6, 2, 3), (Sweep(2, 1, 2, 1, 2),), 2),
    "2d, of which a stride leaves some": Case((2, 3, 6, 4), (2, 3, 3, 2), (Sweep(2, 0, 0), Sweep(3, 1, 0))),
    "2d, dilated": Case((1, 2, 3, 4), (2, 2, 2, 2), (Sweep(1, 2, 1, 3), Sweep(2, 0, 3, 1, 3))),
    "2d, cut off": Case((1, 2, 5, 5), (2, 2, 2, 1), (Sweep(1, -1, 2), Sweep(1, 3, -2))),
    "3d of each channel": Case((1, 2, 3, 2, 3), (4, 1, 2, 2, 1), (Sweep(1, 1, 0), Sweep(), Sweep(2)), 2),
}


def meetings(case: Case) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    """The places in result, input and kernel of all products that are summed."""
    batch, outputs, *lengths = case.out
    inputs, sizes = case.kernel[1], case.kernel[2:]
    for n, o, c in itertools.product(range(batch), range(outputs), range(inputs)):
        channel = o // (outputs // case.groups) * inputs + c
        for p, k in itertools.product(np.ndindex(*lengths), np.ndindex(*sizes)):
            spots = [
                divmod(place * sweep.stride + tap * sweep.spacing - sweep.before, sweep.dilation)
                for sweep, place, tap in zip(case.sweeps, p, k, strict=True)
            ]
            at = [spot for spot, _ in spots]
            is_inside = all(0 <= spot < size for spot, size in zip(at, case.x[2:], strict=True))
            if is_inside and not any(rest for _, rest in spots):
                yield (n, o, *p), (n, channel, *at), (o, c, *k)


def convolutions_of(case: Case, x: Single, kernel: Single, gradient: Single) -> tuple[Single, Single, Single]:
    """The result, and the gradients of input and kernel."""
    exact = [[Fraction(float(each)) for each in array.flat] for array in (gradient, x, kernel)]
    shapes = case.out, case.x, case.kernel
    sums = [[Fraction(0)] * int(np.prod(shape)) for shape in shapes]
    for places in meetings(case):
        flat = [int(np.ravel_multi_index(place, shape)) for place, shape in zip(places, shapes, strict=True)]
        of_gradient, of_x, of_kernel = (values[at] for values, at in zip(exact, flat, strict=True))
        products = of_x * of_kernel, of_gradient * of_kernel, of_gradient * of_x
        for total, at, product in zip(sums, flat, products, strict=True):
            total[at] += product
    rounded = (np.array([nearest_float32(each) for each in total], np.float32) for total in sums)
    result, of_x, of_kernel = (array.reshape(shape) for array, shape in zip(rounded, shapes, strict=True))
    return result, of_x, of_kernel


def operands(case: Case, name: str, seed: int) -> tuple[Single, Single, Single]:
    """Input, kernel and gradient of all codes of a format, or any float32, whose terms cancel but for a few."""
    draw = np.random.default_rng(seed)
    x, kernel, gradient = (_drawn(draw, name, shape) for shape in (case.x, case.kernel, case.out))
    pairs = case.kernel[1] // 2 * 2
    kernel[:, 1:pairs:2] = -kernel[:, :pairs:2]
    pairs = case.x[1] // 2 * 2
    x[:, 1:pairs:2] = x[:, :pairs:2]
    flat = x.reshape(-1)
    flat[:: 3 + seed] = draw.choice(flat, flat[:: 3 + seed].size)
    return x, kernel, gradient


def _drawn(draw: np.random.Generator, name: str, shape: Sequence[int]) -> Single:
    if name != "float32":
        return draw.choice(finite_codes(name), tuple(shape))
    bits = draw.integers(0, 2**32, tuple(shape), dtype=np.uint32)
    return np.where((bits & 0x7F80_0000) == 0x7F80_0000, 1, bits).astype(np.uint32).view(np.float32)

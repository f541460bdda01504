"""How the kernel of a convolution goes over its input, and those of its gradients, which are convolutions, too."""

from __future__ import annotations

from dataclasses import dataclass

from altgrad_core.errors import InputError


@dataclass(frozen=True)
class Sweep:
    """How a kernel goes over one axis of what it is convolved with.

    Element ``p`` of the result is the sum over ``k`` of ``kernel[k] * padded[p * stride + k * spacing]``. The kernel is
    not flipped, as usual in neural networks.

    Attributes:
        stride: steps of the kernel from one element of the result to the next.
        before: zeros before the input; negative if elements are cut off.
        after: zeros after it, likewise.
        dilation: from one element of the input to the next; between them are zeros.
        spacing: from one element of the kernel to the next.
    """

    stride: int = 1
    before: int = 0
    after: int = 0
    dilation: int = 1
    spacing: int = 1

    def length(self, size: int, kernel: int) -> int:
        """That of the result.

        Raises:
            InputError: for a kernel that does not fit.

        >>> Sweep(stride=2, before=1, after=1).length(6, 3)
        3
        """
        padded, window = spread(size, self.dilation) + self.before + self.after, spread(kernel, self.spacing)
        if not 0 < window <= padded:
            raise InputError(f"a kernel of length {window} goes over {padded} elements; expected 1 to {padded}")
        return (padded - window) // self.stride + 1

    def to_input(self, size: int, kernel: int) -> Sweep:
        """How the flipped kernel goes over the gradient of the result, to give that of the input."""
        before = spread(kernel, self.spacing) - 1 - self.before
        after = spread(size, self.dilation) - spread(self.length(size, kernel), self.stride) + self.before
        return Sweep(self.dilation, before, after, self.stride, self.spacing)

    def to_kernel(self, size: int, kernel: int) -> Sweep:
        """How the gradient of the result goes over the input, to give that of the kernel."""
        after = spread(self.length(size, kernel), self.stride) - spread(size, self.dilation)
        after += spread(kernel, self.spacing) - self.before - 1
        return Sweep(self.spacing, self.before, after, self.dilation, self.stride)


def spread(size: int, dilation: int) -> int:
    """The length of ``size`` elements that are so far apart.

    >>> spread(3, 2)
    5
    """
    return (size - 1) * dilation + 1 if size else 0

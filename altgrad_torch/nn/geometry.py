"""Which axes of a layer's operands its channels and blocks lie along."""

from __future__ import annotations

from typing import NamedTuple

from altgrad_core.errors import InputError
from altgrad_core.rules import CastSpec, Operand
from altgrad_core.scaling import PerBlock, PerChannel, PerTensor, checked_axes, checked_axis
from altgrad_torch.nn.sites import Placement


class Geometry(NamedTuple):
    """The axes of one operand, counted from the last, since batches may have any number before them.

    Attributes:
        operand: which it is.
        channel: the axis of outputs (of weights) or features (of activations and gradients); None if it has none.
        channels: its length.
        summed: the axis that the product sums over, along which blocks lie; None if it sums over none.
        ndim: how many axes there are; None if it depends on the batch.
    """

    operand: Operand
    channel: int | None
    channels: int
    summed: int | None
    ndim: int | None = None

    def placement(self, spec: CastSpec, seed: int, where: str) -> Placement:
        """Where scales lie.

        Args:
            spec: how the operand is cast.
            seed: of random bits.
            where: the layer, for messages.

        Raises:
            InputError: for a granularity that the operand cannot have.
        """
        granularity = spec.granularity
        if isinstance(granularity, PerTensor):
            return Placement(self.operand, seed=seed)
        if isinstance(granularity, PerBlock):
            axis = self.summed if granularity.axis == -1 else granularity.axis
            if axis is None:
                raise InputError(f"{where} sums over no axis of its {self.operand}, so it has no blocks; {_EXPECTED}")
            if self.ndim is not None:
                axis = checked_axis(axis, self.ndim) - self.ndim
            return Placement(self.operand, PerBlock(granularity.size, axis), seed=seed)
        if granularity == "channel" or self._is_channel(granularity):
            if self.channel is None:
                raise InputError(
                    f"{where} cannot scale its {self.operand} by channel: several of its products share "
                    f"them; expected 'tensor', 'block<size>', or None as their format"
                )
            shape = (self.channels, *(1 for _ in range(-self.channel - 1)))
            return Placement(self.operand, PerChannel(self.channel), shape, seed)
        return Placement(self.operand, granularity, seed=seed)

    def _is_channel(self, granularity: PerChannel) -> bool:
        axes = granularity.axes if self.ndim is None else checked_axes(granularity.axes, self.ndim)
        listed = (axes,) if isinstance(axes, int) else tuple(axes)
        return listed == (self.channel if self.ndim is None or self.channel is None else self.channel + self.ndim,)


_EXPECTED = "expected 'tensor' or 'channel'"

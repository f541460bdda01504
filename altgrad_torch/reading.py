"""Numbers on their way from a device to the host, which are read later without waiting for what was started since."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Reading:
    """Copies numbers to the host without waiting, and hands them out once they are there.

    On a GPU they go to pinned memory, with a mark in the stream behind them: reading waits for that mark and for
    nothing that was started after it.

    Args:
        values: tensors of one element, on one device or on the CPU, and plain numbers.

    >>> Reading({"loss": torch.tensor(0.5), "finite": True}).read()
    {'loss': 0.5, 'finite': 1.0}
    """

    def __init__(self, values: Mapping[str, Tensor | float | bool]) -> None:
        self._numbers = {name: float(value) for name, value in values.items() if not isinstance(value, Tensor)}
        tensors = {name: value.detach().reshape(()) for name, value in values.items() if isinstance(value, Tensor)}
        self._order, self._names = tuple(values), tuple(tensors)
        self._copies, self._arrived = _sent([value.to(torch.float64) for value in tensors.values()])

    def read(self) -> dict[str, float]:
        """The numbers by their names, in the order given."""
        if self._arrived is not None:
            self._arrived.synchronize()
        found = self._numbers | dict(zip(self._names, self._copies.tolist(), strict=True))
        return {name: found[name] for name in self._order}


def _sent(scalars: list[Tensor]) -> tuple[Tensor, torch.cuda.Event | None]:
    elsewhere = {each.device for each in scalars if each.device.type != "cpu"}
    if not elsewhere:
        # Stacking copies: what the loop does to its tensors afterwards does not show.
        return torch.stack(scalars) if scalars else torch.empty(0), None
    device = elsewhere.pop()
    stacked = torch.stack([each.to(device, non_blocking=True) for each in scalars])
    if device.type != "cuda":
        return stacked, None
    copies = torch.empty(stacked.shape, dtype=stacked.dtype, device="cpu", pin_memory=True)
    copies.copy_(stacked, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(device))
    return copies, arrived

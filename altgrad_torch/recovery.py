"""What keeps a run alive: steps that a NaN cannot poison, weights stored on the grid, moments that start anew.

``altgrad_jax/recovery.py`` says the same thing as pure functions; weights on the grid have the same bits. Snapshots are
in ``keeper.py``.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from altgrad_core.errors import InputError
from altgrad_core.formats import Format, Overflow, Rounding
from altgrad_torch.casting import as_grid, quantize
from altgrad_torch.hashing import hash_bits
from altgrad_torch.params import FormatParams
from altgrad_torch.scaling import amax, power_of_two_scale
from altgrad_torch.shards import local, over_shards


def _entries(tensor: Tensor) -> Tensor:
    """What a sparse tensor holds; any other as it is."""
    if tensor.layout == torch.strided:
        return tensor
    return tensor._values() if tensor.layout == torch.sparse_coo else tensor.values()


@torch.no_grad()
def all_finite(tensors: torch.nn.Module | Iterable[Tensor]) -> Tensor:
    """Whether no floating-point or complex tensor holds an infinity or NaN: bool scalar, True where there is none.

    Nothing is read from the device.

    Args:
        tensors: a module, for its parameters, or tensors; of DTensors all shards count, of sparse ones what they hold.

    >>> bool(all_finite([torch.tensor([1.0, torch.nan])])), bool(all_finite(torch.nn.Linear(2, 1)))
    (False, True)
    """
    listed = list(tensors.parameters() if isinstance(tensors, torch.nn.Module) else tensors)
    inexact = [_entries(each.detach()) for each in listed if each.is_floating_point() or each.is_complex()]
    if not inexact:
        return torch.tensor(True)
    return over_shards([(~local(each).isfinite()).any().to(torch.int32) for each in inexact], inexact, "sum").sum() == 0


@torch.no_grad()
def commit_(
    parameters: torch.nn.Module | Iterable[Tensor],
    format: str | Format | FormatParams,
    *,
    rounding: Rounding = "nearest_even",
    overflow: Overflow = "saturate_finite",
    seed: int | None = None,
    step: int = 0,
) -> None:
    """Store weights on the grid of a format, in place: each tensor under the power-of-two scale of its own amax.

    A cast to the same format under the same rule leaves committed weights as they are. Scales end at 2^100; what is too
    large for that becomes what ``overflow`` says.

    Args:
        parameters: a module, for all its parameters, or those to store: float32 tensors.
        format: the grid.
        rounding: see :data:`altgrad_core.formats.Rounding`.
        overflow: what becomes of infinities and of what no scale brings down; see
            :data:`altgrad_core.formats.Overflow`.
        seed: for stochastic rounding, an integer from 0 to 2^32 - 1. Random bits come from
            :func:`~altgrad_torch.hashing.hash_bits`, with a seed of its own for each tensor: word k of
            ``hash_bits((tensors,), seed, step)`` for the k-th.
        step: likewise, of the training; another step draws other bits.

    Raises:
        InputError: for a seed that is missing, without effect or out of range, and whatever
            :func:`altgrad_torch.casting.quantize` refuses.

    >>> weight = torch.tensor([1.0, 1.1])
    >>> commit_([weight], "E5M2")
    >>> weight.tolist()
    [1.0, 1.0]
    """
    grid = as_grid(format)
    maximum = grid.max_value if isinstance(grid, FormatParams) else grid.max_representable_value
    listed = list(parameters.parameters() if isinstance(parameters, torch.nn.Module) else parameters)
    if (seed is None) == (rounding == "stochastic"):
        expected = "a seed" if rounding == "stochastic" else "none: it would have no effect"
        raise InputError(f"seed is {seed!r} with rounding={rounding!r}; expected {expected}")
    seeds = [None] * len(listed) if seed is None else hash_bits((len(listed),), seed, step)
    rounded = [
        quantize(
            parameter,
            grid,
            scale=power_of_two_scale(amax(parameter), maximum),
            rounding=rounding,
            overflow=overflow,
            random_bits=None if own is None else hash_bits(parameter.shape, own, step, device=parameter.device),
        )
        for parameter, own in zip(listed, seeds, strict=True)
    ]
    for parameter, on_grid in zip(listed, rounded, strict=True):
        parameter.copy_(on_grid)


class SkipNonfinite:
    """Skips steps whose gradients hold an infinity or NaN: parameters, moments and counts stay as they were.

    Unlike a gradient scaler's it also tells how many were skipped. With ``torch.amp.GradScaler`` call
    ``scaler.unscale_(optimizer)``, then :meth:`step` in place of ``scaler.step``, then ``scaler.update()``.

    Args:
        optimizer: what to wrap. A fused one (``fused=True``) is told on the device, and the host does not wait; with
            any other, the host reads one number to know whether to call it.

    Attributes:
        finite: bool scalar, whether the last step was finite.
        consecutive: int32 scalar, non-finite steps in a row up to the last one.
        skipped: int32 scalar, all non-finite steps so far.

    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> skipping = SkipNonfinite(torch.optim.SGD([weight], lr=1.0))
    >>> weight.grad = torch.tensor([torch.inf, 1.0])
    >>> bool(skipping.step()), weight.tolist(), int(skipping.skipped)
    (False, [1.0, 1.0], 1)
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.finite = torch.tensor(True)
        self.consecutive, self.skipped = torch.tensor(0, dtype=torch.int32), torch.tensor(0, dtype=torch.int32)

    @torch.no_grad()
    def step(self) -> Tensor:
        """Take the optimizer's step if all gradients are finite.

        Returns:
            Whether it was taken: bool scalar on the device of the gradients.
        """
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self.finite = all_finite(parameter.grad for parameter in parameters if parameter.grad is not None)
        missed = (~self.finite).to(torch.int32)
        self.consecutive = (self.consecutive.to(missed.device) + 1) * missed
        self.skipped = self.skipped.to(missed.device) + missed
        if getattr(self.optimizer, "_step_supports_amp_scaling", False):
            self._step_on_device(missed)
        elif self.finite:
            self.optimizer.step()
        return self.finite

    def state_dict(self) -> dict[str, int]:
        """The counts, as plain numbers: for a checkpoint. The optimizer has a state of its own."""
        return {"consecutive": int(self.consecutive), "skipped": int(self.skipped)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take up what :meth:`state_dict` returned."""
        self.consecutive = torch.tensor(state["consecutive"], dtype=torch.int32)
        self.skipped = torch.tensor(state["skipped"], dtype=torch.int32)
        self.finite = torch.tensor(state["consecutive"] == 0)

    def _step_on_device(self, missed: Tensor) -> None:
        """As gradient scalers do: a fused optimizer looks for these two attributes, and leaves all as it was."""
        told: dict[str, Tensor | None] = {"grad_scale": None, "found_inf": missed.to(torch.float32)}
        for name, value in told.items():
            setattr(self.optimizer, name, value)
        try:
            self.optimizer.step()
        finally:
            for name in told:
                delattr(self.optimizer, name)


def reset_moments_(optimizer: torch.optim.Optimizer) -> None:
    """Have an optimizer's moments start anew, and with them its step counts, which correct their bias.

    Schedules and learning rates, which torch keeps apart from that, go on.

    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> optimizer = torch.optim.Adam([weight])
    >>> weight.sum().backward()
    >>> optimizer.step()
    >>> reset_moments_(optimizer)
    >>> len(optimizer.state)
    0
    """
    optimizer.state.clear()

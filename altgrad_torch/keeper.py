"""Snapshots for a loop of one's own: when to take one, where they lie, and how to come back to one, in place.

``altgrad_jax/keeper.py`` says the same thing for states that are values.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from altgrad_core.errors import InputError
from altgrad_core.settings import check_count
from altgrad_core.snapshots import LastGood, Moments, Where, check_moments, check_where
from altgrad_torch.reading import Reading
from altgrad_torch.recovery import reset_moments_
from altgrad_torch.shards import is_sharded


class Stateful(Protocol):
    """Whatever can say its state and take it up again, such as a clipper or a gradient scaler."""

    def state_dict(self) -> dict[str, Any]:
        """The state."""
        ...

    def load_state_dict(self, state_dict: Any, /) -> object:
        """Take it up."""
        ...


class SnapshotKeeper:
    """Keeps the last good states of a model, its optimizer and what goes with them, and brings one back in place.

    Of a module, parameters and buffers are kept; of an optimizer, what it holds for each parameter, moments and step
    counts; of anything else, what its ``state_dict`` says. Parameters stay the objects they are, so that optimizers and
    hooks go on. Learning rates are left as they are. Leave out what has to go on: schedulers, the step number, and with
    it the batches, so that the run does not meet the same batch again.

    Args:
        holders: modules, optimizers, and whatever else has ``state_dict`` and ``load_state_dict``. Their state now
            stands for all snapshots until better ones are taken.
        every: steps between snapshots, at least 1.
        keep: how many to keep, at least 1; for a while there is one more, which is not known to be good yet.
        where: ``device``, beside the tensors, or ``host`` (pinned memory, copied to while a GPU works on).

    Raises:
        InputError: for values out of range, and for sharded tensors with ``where="host"``.

    >>> model = torch.nn.Linear(1, 1)
    >>> keeper = SnapshotKeeper(model, every=10)
    >>> for step in range(1, 41):
    ...     _ = model.bias.data.fill_(step)
    ...     keeper.offer(step, good=step != 40)
    >>> keeper.roll_back()
    >>> model.bias.item()
    20.0
    """

    def __init__(
        self,
        *holders: torch.nn.Module | Optimizer | Stateful,
        every: int = 50,
        keep: int = 2,
        where: Where = "device",
    ) -> None:
        self.every = check_count("every", every, 1)
        check_count("keep", keep, 1)
        check_where(where)
        self._holders, self._where = holders, where
        self._kept = LastGood(self._copied(), keep)

    def offer(self, step: int, good: bool | Tensor = True) -> None:
        """Take a snapshot if ``step`` is a multiple of ``every``. Call it after each step; it reads nothing.

        Args:
            step: its number.
            good: whether to keep it: its loss was finite, its parameters are (:func:`altgrad_torch.all_finite`), and
                the loss is not running away (:attr:`altgrad_torch.FormatController.calm`). A bool, or a bool scalar
                that is still being computed.
        """
        if step % self.every == 0 and good is not False:
            reading = Reading({"good": good})
            self._kept.push(self._copied(self._kept.settle()), lambda: bool(reading.read()["good"]))

    def roll_back(self, back: int | None = None, *, moments: Moments = "kept") -> None:
        """Go back to a snapshot, which then stands for all newer ones as well.

        Args:
            back: how many snapshots to go back: 1 for the newest; the oldest by default.
            moments: ``kept`` brings back what optimizers held then, ``reset`` has it start anew.

        Raises:
            InputError: for ``back`` beyond what is kept, an unknown word, and a module whose tensors have changed their
                names or shapes.
        """
        check_moments(moments)
        for holder, copy in zip(self._holders, self._kept.go_back(back), strict=True):
            if not isinstance(holder, Optimizer):
                _restore(holder, copy)
            elif moments == "kept":
                _restore_optimizer(holder, copy)
            else:
                reset_moments_(holder)

    def _copied(self, spare: list[Any] | None = None) -> list[Any]:
        """Copies of all states, in the memory of copies that are no longer kept where there are any."""
        spares = [None] * len(self._holders) if spare is None else spare
        return [_copy_of(holder, self._where, old) for holder, old in zip(self._holders, spares, strict=True)]


def _tensors(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: each.detach() for name, each in chain(module.named_parameters(), module.named_buffers())}


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _copy_of(holder: torch.nn.Module | Optimizer | Stateful, where: Where, spare: Any) -> Any:
    if isinstance(holder, torch.nn.Module):
        return {name: _copy(each, where, (spare or {}).get(name)) for name, each in _tensors(holder).items()}
    if isinstance(holder, Optimizer):
        states = [holder.state.get(parameter, {}) for parameter in _parameters(holder)]
        spares = spare if spare and len(spare) == len(states) else [{}] * len(states)
        return [_copy_of_state(state, where, old) for state, old in zip(states, spares, strict=True)]
    return deepcopy(holder.state_dict())


def _copy_of_state(
    state: Mapping[str, Any], where: Where, spare: Mapping[str, tuple[Any, Any]]
) -> dict[str, tuple[Any, Any]]:
    """What an optimizer holds for a parameter, and on which devices."""
    return {
        name: (_copy(each, where, spare.get(name, (None,))[0]), getattr(each, "device", None))
        for name, each in state.items()
    }


@torch.no_grad()
def _copy(value: Any, where: Where, spare: Any) -> Any:
    if not isinstance(value, Tensor):
        return deepcopy(value)
    if where == "device" or value.device.type == "cpu":
        # New memory costs a page fault every 4 KiB: of 48 MB in one tensor, six times what the copy does.
        return spare.copy_(value) if _holds(spare, value, value.device) else value.detach().clone()
    if is_sharded(value):
        raise InputError("where is 'host', which does not hold sharded tensors; expected 'device'")
    if not _holds(spare, value, torch.device("cpu")):
        spare = torch.empty(value.shape, dtype=value.dtype, device="cpu", pin_memory=value.device.type == "cuda")
    return spare.copy_(value.detach(), non_blocking=True)


def _holds(spare: Any, value: Tensor, device: torch.device) -> bool:
    """Whether a copy on this device fits into memory that is to spare."""
    if not isinstance(spare, Tensor) or is_sharded(spare) or is_sharded(value):
        return False
    return (spare.shape, spare.dtype, spare.device) == (value.shape, value.dtype, device)


@torch.no_grad()
def _restore(holder: torch.nn.Module | Stateful, copy: Any) -> None:
    if not isinstance(holder, torch.nn.Module):
        holder.load_state_dict(deepcopy(copy))
        return
    tensors = _tensors(holder)
    now, then = ({name: tuple(each.shape) for name, each in tree.items()} for tree in (tensors, copy))
    if now != then:
        raise InputError(f"the module holds {now}; expected what it held when the snapshot was taken, {then}")
    for name, each in tensors.items():
        each.copy_(copy[name], non_blocking=True)


@torch.no_grad()
def _restore_optimizer(optimizer: Optimizer, copy: list[dict[str, tuple[Any, Any]]]) -> None:
    parameters = _parameters(optimizer)
    if len(parameters) != len(copy):
        raise InputError(f"the optimizer has {len(parameters)} parameters; expected {len(copy)}, as in the snapshot")
    for parameter, kept in zip(parameters, copy, strict=True):
        now = optimizer.state[parameter]
        for name in [name for name in now if name not in kept]:
            del now[name]
        for name, (value, device) in kept.items():
            if not isinstance(value, Tensor):
                now[name] = deepcopy(value)
            elif name in now:
                now[name].copy_(value, non_blocking=True)
            else:
                now[name] = value.to(device, copy=True)

"""The host-side controller in a torch loop: reads metrics a step late, decides, and writes formats where they are held.

What it decides, and why, is :mod:`altgrad_core.control`'s. A GPU is never waited for: the metrics of step k are read
while step k+1 runs, so a decision lands one step late. ``altgrad_jax/control.py`` says the same thing for states that
are values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from altgrad_core.control import Controller
from altgrad_core.control import Decision as Decision
from altgrad_core.errors import InputError
from altgrad_core.evidence import Observation as Observation
from altgrad_core.evidence import read_by_observations
from altgrad_core.formats import Format, parse
from altgrad_core.settings import Policy as Policy
from altgrad_core.stability import EmergencyMantissaShift as EmergencyMantissaShift
from altgrad_torch.codes import CodeParams
from altgrad_torch.params import FormatParams
from altgrad_torch.reading import Reading

_PARAMS = (FormatParams, CodeParams)


def set_format(holders: Iterable[object], format: str | Format) -> None:
    """Write another format into everything that holds one, in place.

    What compiled code takes as :class:`~altgrad_torch.params.FormatParams` or
    :class:`~altgrad_torch.codes.CodeParams` stays on its path, so that nothing is compiled again.

    Args:
        holders: params, alone or among others; whatever has a method ``set_format``, as a clipper has, or an attribute
            ``format``, such as a stall detector; and modules, of which each submodule that has either is written to. An
            attribute may be a name, a :class:`~altgrad_core.formats.Format` or params, and stays so.
        format: the format.

    Raises:
        UnknownFormatError: for an unknown name.
        InputError: for no holder, for one that is not in a list and no params, for a holder that holds no format, and
            for params of a path that cannot serve the new one.

    >>> from altgrad_torch.statistics import BitStallDetector
    >>> detector, params = BitStallDetector("E7M0"), FormatParams.from_format("E7M0")
    >>> set_format([detector, params], "E5M2")
    >>> str(detector.format), float(params.max_value)
    ('E5M2', 57344.0)
    """
    listed = _listed(holders)
    if not listed:
        raise InputError("there are no holders to write a format into; expected at least one, such as [clipper]")
    _write_into(listed, parse(format))


def _listed(holders: Iterable[object]) -> list[object]:
    if isinstance(holders, _PARAMS):
        return [holders]
    # A Sequential can be iterated over, but what it holds itself would be passed over.
    if isinstance(holders, (torch.nn.Module, str)) or not isinstance(holders, Iterable):
        raise InputError(f"holders are a {type(holders).__name__}; expected them in a list, also where there is one")
    return list(holders)


def _write_into(holders: Iterable[object], format: Format) -> None:
    for holder in holders:
        parts = list(holder.modules()) if isinstance(holder, torch.nn.Module) else [holder]
        written = [_write(part, format) for part in parts]
        if not any(written):
            raise InputError(f"a {type(holder).__name__} holds no format; expected params, or something with a format")


def _write(holder: Any, format: Format) -> bool:
    """Write a format into whatever holds one; whether it does."""
    held = holder if isinstance(holder, _PARAMS) else None
    if held is None and hasattr(holder, "set_format"):
        holder.set_format(format)
        return True
    held = getattr(holder, "format", None) if held is None else held
    if isinstance(held, _PARAMS):
        held.set_(format)
    elif isinstance(held, (str, Format)):
        holder.format = str(format) if isinstance(held, str) else format
    else:
        return False
    return True


class FormatController(Controller):
    """Keeps one run alive: shifts its format, changes its rounding, or sends it back to a snapshot.

    It is made as :class:`altgrad_core.control.Controller` is. In a loop of your own :meth:`step` reads late, decides
    and writes formats, while :meth:`observe` only decides. The format in force is :attr:`format`. Given a mapping from
    layers to formats it moves each alone, by rates of its own.

    >>> from altgrad_torch.clipping import PartitionRelativeClipper
    >>> clipper = PartitionRelativeClipper("E7M0")
    >>> nan = {"loss": torch.tensor(torch.nan), "finite": torch.tensor(False)}
    >>> controller = FormatController("E7M0", policy="off", shifter=EmergencyMantissaShift(nan_patience=2))
    >>> for step in range(3):
    ...     decision = controller.step(step, nan, [clipper])
    >>> str(clipper.format)
    'E5M2'
    """

    def step(
        self,
        step: int,
        metrics: Mapping[str, Tensor | float | bool | str],
        holders: Iterable[object] = (),
        roll_back: Callable[[], object] | None = None,
        *,
        layers: Mapping[str, Iterable[object]] | None = None,
    ) -> Decision:
        """Hand over the metrics of a step that was just started; decide on those of the step before.

        Args:
            step: its number.
            metrics: ``loss`` and ``finite``; if there are, ``params_finite``, the gradients' ``norm`` and rates under
                the names of :class:`~altgrad_core.evidence.Observation`, of layers as ``mlp/overflow_rate``: tensors of
                one element, on one device or on the CPU, or numbers. Other names are passed over.
            holders: what the format is written into; see :func:`set_format`.
            roll_back: takes the run back to a snapshot, as :meth:`altgrad_torch.SnapshotKeeper.roll_back` does; goes
                with ``can_roll_back``.
            layers: what the formats of the layers are written into, for a controller of layers; ``holders`` then hold
                what follows :attr:`format`, such as a clipper.

        Returns:
            What was decided, and carried out already.

        Raises:
            InputError: if the controller may decide what this cannot carry out, for a metric that is no single number,
                and for holders that are not in a list or the like.
        """
        self._check_step_can_carry_out(roll_back)
        everywhere, of_layers = _listed(holders), self._checked_layers(layers)
        read = read_by_observations(metrics)
        sites = {name: value for name, value in read.items() if isinstance(value, str)}
        reading = Reading({name: value for name, value in read.items() if name not in sites})
        decision = self.observe_late(step, lambda: reading.read() | sites)
        return self._carried_out(decision, everywhere, roll_back, of_layers)

    def drain(
        self,
        holders: Iterable[object] = (),
        roll_back: Callable[[], object] | None = None,
        *,
        layers: Mapping[str, Iterable[object]] | None = None,
    ) -> Decision:
        """Decide on the last step, whose metrics no further :meth:`step` would read."""
        self._check_step_can_carry_out(roll_back)
        everywhere, of_layers = _listed(holders), self._checked_layers(layers)
        return self._carried_out(self.observe_last(), everywhere, roll_back, of_layers)

    def _checked_layers(self, layers: Mapping[str, Iterable[object]] | None) -> dict[str, list[object]]:
        if set(layers or {}) != set(self.formats):
            given, expected = (", ".join(names) or "none" for names in (layers or {}, self.formats))
            raise InputError(f"layers are {given}; expected those of the controller: {expected}")
        return {layer: _listed(held) for layer, held in (layers or {}).items()}

    def _carried_out(
        self,
        decision: Decision,
        holders: Iterable[object],
        roll_back: Callable[[], object] | None,
        layers: Mapping[str, Iterable[object]],
    ) -> Decision:
        if decision.rollback and roll_back is not None:
            roll_back()
        # A snapshot may be older than a shift. Before the first there is none to write: groups of a clipper may have
        # formats of their own.
        if decision.acts and self.has_shifted:
            _write_into(holders, parse(self.format))
            for layer, held in layers.items():
                _write_into(held, parse(self.formats[layer]))
        return decision

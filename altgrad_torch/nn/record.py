"""What the casts of a model did in a step: counted, and entered in the histories that scales follow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

from altgrad_core.errors import InputError, check_choice
from altgrad_core.rules import OPERANDS, Operand
from altgrad_torch.nn.model import quantized_layers
from altgrad_torch.nn.sites import Site, Tally, update_all
from altgrad_torch.statistics import CastCounts


class Seen:
    """What the casts of a model did since recording began; see :func:`recording`.

    Attributes:
        sites: every site by layer and name.
    """

    def __init__(self, sites: Mapping[tuple[str, str], Site]) -> None:
        self.sites = sites
        self.is_discarded = False
        self._tallies: dict[tuple[str, str], Tally] = {}
        for key, site in sites.items():
            site.tally = self._tallies[key] = Tally(site.placement.scales, site.grid.device)

    @property
    def layers(self) -> list[str]:
        """Paths of the layers that cast."""
        return list(dict.fromkeys(layer for layer, _ in self.sites))

    @property
    def activations(self) -> CastCounts:
        """Counts of all activations together."""
        return self._pooled(None, "activations")

    @property
    def weights(self) -> CastCounts:
        """Counts of all weights together."""
        return self._pooled(None, "weights")

    @property
    def gradients(self) -> CastCounts:
        """Counts of all gradients together, whose ``overflow_rate`` a clipper asks for."""
        return self._pooled(None, "gradients")

    def counts(self, layer: str, operand: Operand) -> CastCounts:
        """Counts of one operand of one layer; zeros if it casts none.

        Raises:
            InputError: for a layer that casts nothing, or an unknown operand.
        """
        check_choice("layer", layer, self.layers)
        check_choice("operand", operand, OPERANDS)
        return self._pooled(layer, operand)

    def discard(self) -> None:
        """Leave histories as they are when recording ends, as after a step that is skipped."""
        self.is_discarded = True

    def begin_anew(self) -> None:
        """Let histories begin with what was seen, where anything was."""
        for key, site in self.sites.items():
            tally = self._tallies[key]
            if bool(tally.totals[0] > 0) and bool(tally.amax.isfinite().all()):
                site.begin_anew(tally.amax)

    def _pooled(self, layer: str | None, operand: Operand) -> CastCounts:
        chosen = [
            self._tallies[key].totals
            for key, site in self.sites.items()
            if site.placement.operand == operand and layer in (None, key[0])
        ]
        return CastCounts(torch.stack(chosen)).pooled() if chosen else CastCounts.zeros()

    def _add_up(self, group: dist.ProcessGroup) -> None:
        tallies = list(self._tallies.values())
        totals = torch.stack([tally.totals for tally in tallies])
        # Of a maximum with NaN processes need not agree; an infinity is refused like one.
        amaxes = torch.cat([tally.amax.reshape(-1) for tally in tallies]).nan_to_num(torch.inf, torch.inf)
        dist.all_reduce(totals, dist.ReduceOp.SUM, group)
        dist.all_reduce(amaxes, dist.ReduceOp.MAX, group)
        parts = amaxes.split([tally.amax.numel() for tally in tallies])
        for tally, total, amax in zip(tallies, totals, parts, strict=True):
            tally.totals.copy_(total)
            tally.amax.copy_(amax.reshape(tally.amax.shape))


@contextmanager
def recording(model: nn.Module, *, group: dist.ProcessGroup | None = None) -> Iterator[Seen]:
    """Record one step: count what its casts do and, at its end, let the scales follow what they saw.

    Put it around the forward and backward passes of a step, of as many micro-batches as there are: counts add up, and
    of largest magnitudes the largest counts. What a checkpoint computes again in the backward pass is not counted
    again. Outside of it nothing is measured, and scales stand still. Counts may be read inside and afterwards.

    Where an amax is not finite the newest one before stands again. After an exception histories stay as they were.

    A backward pass that comes later than the recording of its forward pass is refused, and so is what computes under a
    transform of ``torch.func`` meanwhile. Code compiled by ``torch.compile`` cannot tell: there a backward pass that
    comes too late enters the counts, and no history. A copy of the model is not recorded; other models are, apart.

    Args:
        model: quantised.
        group: processes whose counts are to be added up, and which are to share scales; every one of them has to
            record. Without it ``DistributedDataParallel`` gives all of them the scales of the first, as it does with
            any buffer.

    Raises:
        InputError: if the model casts nothing, or is recorded already; in a pass that cannot be recorded as above.

    >>> from altgrad_core.rules import Rule
    >>> from altgrad_torch.nn.model import quantize_model
    >>> model = quantize_model(nn.Linear(4, 2), [Rule(".*", "E4M3")])
    >>> with recording(model) as seen:
    ...     model(torch.full((3, 4), 1e4)).sum().backward()
    >>> seen.activations.as_integers()["overflow"], float(seen.gradients.overflow_rate)
    (12, 0.0)
    >>> with recording(model) as seen:
    ...     model(torch.full((3, 4), 1e4)).sum().backward()
    >>> seen.activations.as_integers()["overflow"]
    0
    """
    sites = _sites_of(model)
    seen = Seen(sites)
    try:
        yield seen
        if group is not None:
            seen._add_up(group)
        if not seen.is_discarded:
            update_all(sites.values())
    finally:
        for site in sites.values():
            site.tally = None


def calibrate(model: nn.Module, run: Callable[[], object], *, passes: int = 2) -> None:
    """Find scales for a model before its first step.

    Each pass is recorded, and histories begin anew with what it saw; the next pass sees what casts under those scales
    let through. Gradients of parameters are put back; what else ``run`` changes, such as running means, stays changed.

    Args:
        model: quantised.
        run: a forward pass on one or more batches and, for the scales of gradients, a backward pass.
        passes: how often it is run.

    Raises:
        InputError: if the model casts nothing or is recorded already, or for less than one pass.

    >>> from altgrad_core.rules import Rule
    >>> from altgrad_torch.nn.model import quantize_model
    >>> model = quantize_model(nn.Linear(4, 2), [Rule(".*", "E4M3")])
    >>> calibrate(model, lambda: model(torch.full((3, 4), 1e4)).sum().backward())
    >>> float(model.casts["activations"].scale)
    32.0
    """
    if passes < 1:
        raise InputError(f"passes={passes}; expected at least 1")
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    try:
        for _ in range(passes):
            for parameter in gradients:
                parameter.grad = None
            with recording(model) as seen:
                run()
                seen.discard()
            seen.begin_anew()
    finally:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient


def _sites_of(model: nn.Module) -> dict[tuple[str, str], Site]:
    sites = {
        (path, name): site
        for path, layer in quantized_layers(model)
        for name, site in layer.casts.items()
        if isinstance(site, Site)
    }
    if not sites:
        raise InputError("the model casts nothing; expected one that quantize_model changed")
    if any(site.tally is not None for site in sites.values()):
        raise InputError("the model is recorded already; expected one recording at a time")
    return sites

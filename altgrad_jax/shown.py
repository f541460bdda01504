"""What a step showed of every run, as the host reads it: numbers of the run, and rates at each of its sites."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from altgrad_jax.nn.products import GRADIENT

_WORST = {"worst_overflow": "overflow_rate", "worst_underflow": "underflow_rate", "worst_stall": "stall_rate"}


@dataclass(frozen=True)
class Shown:
    """The metrics of a step.

    Attributes:
        metrics: arrays of shape ``(runs,)`` by the names of :class:`~altgrad_jax.state.StepMetrics`' scalars; and
            ``worst_overflow_rate``, ``worst_underflow_rate`` and ``worst_stall_rate``, of the gradient cast or weight
            with most, with the places of their sites as ``worst_overflow_site`` and so on.
        rates: arrays of shape ``(runs, sites)`` by the names of :class:`~altgrad_core.evidence.Observation`: of the
            gradient cast, of the operand with more, and of the weight, 0 where there is none.
        sites: the names of the sites.
    """

    metrics: Mapping[str, npt.NDArray]
    rates: Mapping[str, npt.NDArray]
    sites: tuple[str, ...]

    @classmethod
    def of(cls, raw: Mapping[str, npt.NDArray], sites: Sequence[str], sites_of_weights: Sequence[int]) -> Shown:
        """Find what is worst. Here and not in the step, where a small reduction is three more programs to compile.

        Args:
            raw: :class:`~altgrad_jax.state.StepMetrics`, each with a leading axis of runs.
            sites: the names of the sites.
            sites_of_weights: the site of each weight that stalls are counted for.
        """
        rates = {}
        for kind in ("overflow", "underflow"):
            casts = raw[f"{kind}_rates"]
            rates |= {f"{kind}_rate": casts[..., GRADIENT], f"operand_{kind}_rate": casts[..., :GRADIENT].max(-1)}
        for kind in ("stall", "saturation"):
            rates[f"{kind}_rate"] = np.zeros_like(rates["overflow_rate"])
            rates[f"{kind}_rate"][:, list(sites_of_weights)] = raw[f"{kind}_rates"]
        metrics = {name: values for name, values in raw.items() if values.ndim == 1}
        for name, rate in _WORST.items():
            metrics |= {f"{name}_rate": rates[rate].max(axis=1), f"{name}_site": rates[rate].argmax(axis=1)}
        return cls(metrics, rates, tuple(sites))

    def numbers(self, run: int, layers: Collection[str] = ()) -> dict[str, float | str]:
        """The metrics of one run, sites by their names.

        Args:
            run: its place.
            layers: sites whose rates are wanted as well, as ``logits/overflow_rate`` and so on.
        """
        numbers = {name: values[run].item() for name, values in self.metrics.items()}
        named = {name: self.sites[value] if name.endswith("_site") else value for name, value in numbers.items()}
        at_sites = {
            f"{site}/{name}": values[run, at].item()
            for at, site in enumerate(self.sites)
            if site in layers
            for name, values in self.rates.items()
        }
        return named | at_sites

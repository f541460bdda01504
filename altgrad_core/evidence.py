"""What a controller decides on: what one step showed, and what is known of a run at one moment. All of it immutable."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from operator import attrgetter
from statistics import fmean
from typing import Any, Literal, get_args

import numpy as np

from altgrad_core.errors import InputError
from altgrad_core.formats import Rounding
from altgrad_core.scaling import ScaleRule

RateName = Literal[
    "overflow",
    "worst_overflow",
    "underflow",
    "worst_underflow",
    "stall",
    "worst_stall",
    "saturation",
    "precision_stall",
]
"""A rate of a :class:`Reading`, by its attribute."""

WorstName = Literal["worst_overflow", "worst_underflow", "worst_stall"]
"""A rate of one site, that with most."""

WORST_NAMES: tuple[WorstName, ...] = get_args(WorstName)


@dataclass(frozen=True)
class Observation:
    """What the host sees of a step. Rates are fractions, 0 where nobody counted.

    Attributes:
        step: which one.
        loss: training loss.
        finite: whether loss and gradients were.
        params_finite: whether the parameters were, after it.
        norm: global norm of the raw gradients; 0 or less where nobody measured it.
        stall_rate: of its update.
        saturation_rate: the part of it that stalled at ±max.
        worst_stall_rate: of the tensor with most.
        overflow_rate: of the gradient casts, pooled.
        operand_overflow_rate: of the operand casts, pooled.
        worst_overflow_rate: of the cast with most.
        underflow_rate: of the gradient casts, pooled.
        operand_underflow_rate: of the operand casts, pooled.
        worst_underflow_rate: of the cast with most.
        worst_sites: where the worst rates are, by what they are rates of; empty where nobody looked.
        layers: the same with the rates of one layer alone, by the layers' names; empty where nobody looked.
    """

    step: int
    loss: float
    finite: bool
    params_finite: bool = True
    norm: float = 0.0
    stall_rate: float = 0.0
    saturation_rate: float = 0.0
    worst_stall_rate: float = 0.0
    overflow_rate: float = 0.0
    operand_overflow_rate: float = 0.0
    worst_overflow_rate: float = 0.0
    underflow_rate: float = 0.0
    operand_underflow_rate: float = 0.0
    worst_underflow_rate: float = 0.0
    worst_sites: Mapping[WorstName, str] = field(default_factory=dict)
    layers: Mapping[str, Observation] = field(default_factory=dict)

    @classmethod
    def of(cls, step: int, metrics: Mapping[str, float | bool | str]) -> Observation:
        """Take an observation out of a step's metrics, whose names are those of the attributes.

        Args:
            step: which step.
            metrics: ``loss`` and ``finite``, and whichever else there is, the worst sites as ``worst_overflow_site``
                and so on, the rates of a layer as ``mlp/overflow_rate`` and so on; other names are passed over.

        Raises:
            KeyError: without ``loss`` or ``finite``.

        >>> Observation.of(3, {"loss": 2.5, "finite": 1.0, "overflow_rate": 0.25, "applied": 1.0}).overflow_rate
        0.25
        >>> Observation.of(3, {"loss": 2.5, "finite": 1.0, "mlp/stall_rate": 0.5}).layers["mlp"].stall_rate
        0.5
        """
        flags = {"finite": bool(metrics["finite"]), "params_finite": bool(metrics.get("params_finite", True))}
        numbers = {name: float(metrics[name]) for name in _NUMBERS if name in metrics}
        sites = {name: str(metrics[f"{name}_site"]) for name in WORST_NAMES if f"{name}_site" in metrics}
        seen = cls(step, float(metrics["loss"]), **flags)
        layers = {layer: replace(seen, **rates) for layer, rates in _rates_of_layers(metrics).items()}
        return replace(seen, **numbers, worst_sites=sites, layers=layers)


def read_by_observations(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a step's metrics that :meth:`Observation.of` reads, checked while it is known where they came from.

    Args:
        metrics: by name: numbers, and arrays or tensors of one element, which may still be computed: only their shape
            is looked at. Of a worst site, its name.

    Returns:
        The same, with floats for what is on the host already.

    Raises:
        InputError: for one that is no single number.

    >>> read_by_observations({"loss": np.float32(2.5), "finite": True, "norms": np.ones(3)})
    {'loss': 2.5, 'finite': 1.0}
    """
    return {name: _single(name, value) for name, value in metrics.items() if _is_read(name)}


def _is_read(name: str) -> bool:
    layer, _, rate = name.rpartition("/")
    return name in _READ or bool(layer and rate in _RATES)


def _single(name: str, value: Any) -> Any:
    if name in _SITES and isinstance(value, str):
        return str(value)
    shape = tuple(getattr(value, "shape", ()))
    if math.prod(shape) != 1:
        raise InputError(f"metric {name!r} has the shape {shape}; expected one number for the step")
    held = value.item() if isinstance(value, (np.ndarray, np.generic)) else value
    if isinstance(held, (bool, int, float)):
        return float(held)
    if not hasattr(held, "shape"):
        raise InputError(f"metric {name!r} is {value!r}; expected one number for the step")
    return held


def _rates_of_layers(metrics: Mapping[str, float | bool | str]) -> dict[str, dict[str, float]]:
    rates: dict[str, dict[str, float]] = {}
    for key, value in metrics.items():
        layer, _, name = key.rpartition("/")
        if layer and name in _RATES:
            rates.setdefault(layer, {})[name] = float(value)
    return rates


_RATES = tuple(each.name for each in fields(Observation) if each.name.endswith("_rate"))
_NUMBERS = ("norm", *_RATES)
_SITES = tuple(f"{name}_site" for name in WORST_NAMES)
_READ = frozenset(("loss", "finite", "params_finite", *_NUMBERS, *_SITES))


@dataclass(frozen=True)
class Reading:
    """The loss and the rates of one finite step, or their means over a window of such steps.

    Attributes:
        loss: training loss.
        overflow: of operands or of gradients, whichever overflow more.
        worst_overflow: of the cast with most.
        underflow: of operands or of gradients, whichever underflow more.
        worst_underflow: of the cast with most.
        stall: non-zero updates that changed nothing.
        worst_stall: of the tensor with most.
        saturation: the part of ``stall`` at ±max.
    """

    loss: float
    overflow: float = 0.0
    worst_overflow: float = 0.0
    underflow: float = 0.0
    worst_underflow: float = 0.0
    stall: float = 0.0
    worst_stall: float = 0.0
    saturation: float = 0.0

    @property
    def precision_stall(self) -> float:
        """The part of ``stall`` that was too small for the grid."""
        return max(self.stall - self.saturation, 0.0)

    @classmethod
    def of(cls, seen: Observation) -> Reading:
        """What a step showed; no rate of a worst site lies below the pooled one."""
        overflow = max(seen.overflow_rate, seen.operand_overflow_rate)
        underflow = max(seen.underflow_rate, seen.operand_underflow_rate)
        return cls(
            seen.loss,
            overflow,
            max(overflow, seen.worst_overflow_rate),
            underflow,
            max(underflow, seen.worst_underflow_rate),
            seen.stall_rate,
            max(seen.stall_rate, seen.worst_stall_rate),
            seen.saturation_rate,
        )

    @classmethod
    def mean(cls, readings: Sequence[Reading]) -> Reading:
        """The mean of each number over at least one reading, whatever their order.

        >>> Reading.mean([Reading(2.0, stall=0.5), Reading(3.0, stall=1.0)]).stall
        0.75
        """
        return cls(*map(fmean, zip(*map(_numbers_of, readings), strict=True)))


_numbers_of = attrgetter(*(each.name for each in fields(Reading)))


@dataclass(frozen=True)
class Evidence:
    """What a policy sees of a run, or of one layer, at one step.

    Attributes:
        step: the last step observed.
        format: the format in force.
        start_format: the format that the run began in.
        left_format: the format that the last shift left; None before the first.
        rounding: how committed weights are rounded; None for float32 masters.
        learning_rate: the factor on the learning rate in force; None where it cannot be changed.
        scales: where scales come from; None where that cannot be changed.
        finite: whether the step was.
        consecutive_nans: steps in a row that were not finite, up to this one and since the last decision on such steps.
        window: means over the last window of finite steps, less those with a spike of the norm or a loss that runs
            away, which may pass. None at such a step and at one that is not finite, while the window is not full, and
            while warm-up or a cooldown lasts: then no rate is to be judged.
        whole: whether windows that do not overlap end here, so that ``previous`` and ``baseline`` compare with it.
        previous: the whole window before this one; None before there is one.
        baseline: the first whole window since the last decision: what is usual in this format.
        since_decision: steps since the last decision; None before the first.
        quiet: finite steps in a row, since the last decision, in which nothing was called for.
        failed_returns: how often the run came back to the format it began in and had to leave it again.
        layer: which layer formats and rates are of; empty for the whole run.
    """

    step: int
    format: str
    start_format: str = ""
    left_format: str | None = None
    rounding: Rounding | None = None
    learning_rate: float | None = None
    scales: ScaleRule | None = None
    finite: bool = True
    consecutive_nans: int = 0
    window: Reading | None = None
    whole: bool = False
    previous: Reading | None = None
    baseline: Reading | None = None
    since_decision: int | None = None
    quiet: int = 0
    failed_returns: int = 0
    layer: str = ""

    @property
    def committed(self) -> bool:
        """Whether weights are stored on the format's grid."""
        return self.rounding is not None

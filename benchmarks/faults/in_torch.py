"""The matrix in torch: a loop of one's own on altgrad_torch's pieces, a perceptron that reads the next character."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from altgrad_core.events import Event
from altgrad_core.formats import parse
from altgrad_jax.data import Corpus, load_corpus
from altgrad_jax.faults import check_faults, fault_at, spoiled
from altgrad_torch import (
    BitStallDetector,
    CastCounts,
    Delayed,
    EmergencyMantissaShift,
    FormatController,
    PartitionRelativeClipper,
    SkipNonfinite,
    SnapshotKeeper,
    all_finite,
    amax,
    commit_,
    global_norm,
    observe,
    power_of_two_scale,
    quantize,
    set_format,
)
from benchmarks.faults.cases import STALLED, Case, Outcome
from benchmarks.faults.in_jax import injections


@dataclass(frozen=True)
class Size:
    """How large the runs are."""

    steps: int = 240
    batch: int = 256
    context: int = 8
    embedding: int = 16
    width: int = 64
    learning_rate: float = 1e-2
    snapshot_every: int = 10


class Perceptron(torch.nn.Module):
    """Characters to an embedding, a hidden layer and logits; every operand of a product is cast."""

    def __init__(self, format: str, vocabulary: int, size: Size) -> None:
        super().__init__()
        self.format = format
        self.embedding = torch.nn.Embedding(vocabulary, size.embedding)
        self.hidden = torch.nn.Linear(size.context * size.embedding, size.width)
        self.logits = torch.nn.Linear(size.width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens).flatten(1)
        x = torch.relu(functional.linear(self._cast(x), self._cast(self.hidden.weight), self.hidden.bias))
        return functional.linear(self._cast(x), self._cast(self.logits.weight), self.logits.bias)

    def weights(self) -> list[Tensor]:
        """What may be stored on the grid."""
        return [self.hidden.weight, self.logits.weight]

    def _cast(self, x: Tensor) -> Tensor:
        scale = power_of_two_scale(amax(x), parse(self.format).max_representable_value)
        return quantize(x, self.format, scale=scale, overflow="saturate_finite")


class GradientScales:
    """Delayed scales of the gradients, against which overflow is counted; a keeper can bring them back."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._delayed = Delayed(16)
        self._histories = {name: self._delayed.init() for name, _ in model.named_parameters()}
        self._seen: dict[str, Tensor] = {}

    def overflow_rate(self, model: torch.nn.Module, format: str) -> Tensor:
        """Elements that overflow over elements, of all gradients; of those without a history none does."""
        most, counts = parse(format).max_representable_value, CastCounts.zeros()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                history = self._histories[name]
                scale = self._delayed.scale(1.0, most, history)
                counted, self._seen[name] = observe(parameter.grad, format, scale=scale)
                counts = counts + counted if history.any() else counts
        return counts.overflow_rate

    def update(self) -> None:
        """Enter the amaxes of the gradients that were counted last."""
        for name, seen in self._seen.items():
            self._histories[name] = self._delayed.update(self._histories[name], seen)

    def state_dict(self) -> dict[str, Tensor]:
        """All histories."""
        return dict(self._histories)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take them up."""
        self._histories = dict(state)


def outcomes(cases: Sequence[Case], size: Size) -> dict[Case, Outcome]:
    """Train all cases, one after another."""
    corpus = load_corpus(None, size.context)
    return {case: train(case, corpus, size) for case in cases}


def train(case: Case, corpus: Corpus, size: Size) -> Outcome:
    """Train one case: the order of a step is that of the JAX job."""
    torch.manual_seed(case.seed)
    model = Perceptron(case.format, len(corpus.vocabulary), size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, size) * case.learning_rate)
    clipper, skipping, scales = PartitionRelativeClipper(case.format), SkipNonfinite(optimizer), GradientScales(model)
    detector = BitStallDetector(case.format)
    committed, rounding = case.storage == "committed", "nearest_even" if case.fault == STALLED else "stochastic"
    controller = FormatController(
        case.format,
        shifter=EmergencyMantissaShift() if case.on else None,
        rounding=rounding if case.on and committed else None,
        can_roll_back=case.on,
    )
    keeper = SnapshotKeeper(model, optimizer, scales, every=size.snapshot_every, keep=2)
    faults = check_faults(injections(case, size.steps), size.steps)
    noted: list[Event] = []

    def carry_out(decision: Any) -> None:
        nonlocal rounding
        if decision.rollback:
            keeper.roll_back()
        if decision.format is not None:
            set_format([model, clipper, detector], decision.format)
        rounding = decision.rounding or rounding

    for step in range(size.steps):
        fault = fault_at(faults, step)
        if fault.poison:
            model.hidden.weight.data[0, 0] = float(fault.weight)
        tokens = spoiled(corpus.batch(case.seed, step, size.batch, size.context), faults, step)
        loss = _loss(model, tokens) * float(fault.loss_factor)
        optimizer.zero_grad()
        loss.backward()
        if fault.corrupt and model.hidden.weight.grad is not None:
            model.hidden.weight.grad[0, 0] = float(fault.gradient)
        norm = global_norm([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
        finite = bool(loss.isfinite() & norm.isfinite())
        rate = scales.overflow_rate(model, model.format)
        opened = case.on and finite and clipper.clip_if_needed(model, rate)
        with detector.watch(model.weights() if committed else []):
            if case.on:
                skipping.step()
            else:
                optimizer.step()
        schedule.step()
        if finite and not opened:
            scales.update()
        if committed:
            draws: dict[str, Any] = {"seed": case.seed, "step": step} if rounding == "stochastic" else {}
            commit_(model.weights(), model.format, rounding=rounding, **draws)
        sound = finite and bool(all_finite(model))
        if case.on and not finite:
            noted.append(Event(step, "skip", "nan"))
        if opened:
            noted.append(Event(step, "gate", "overflow"))
        seen = {
            "loss": float(loss.detach()),
            "finite": finite,
            "params_finite": bool(all_finite(model)),
            "norm": float(norm),
            "stall_rate": detector.stall_rate,
            "saturation_rate": float(detector.counts.saturation_rate),
            "overflow_rate": float(rate),
        }
        if case.on:
            carry_out(controller.observe_late(step, lambda seen=seen: seen))
            keeper.offer(step, sound and controller.calm)
    carry_out(controller.observe_last())
    with torch.no_grad():
        held_out = corpus.validation_batches(8, 4 * size.batch, size.context)
        losses = [float(_loss(model, batch)) for batch in held_out]
    events = sorted((*noted, *controller.events), key=lambda event: event.step)
    return Outcome(float(np.mean(losses)), tuple(events))


def _loss(model: Perceptron, tokens: npt.NDArray[np.int32]) -> Tensor:
    drawn = torch.from_numpy(tokens.astype(np.int64))
    return functional.cross_entropy(model(drawn[:, :-1]), drawn[:, -1])


def _rate(step: int, size: Size) -> float:
    """Twenty steps of warm-up, then a cosine down to a tenth."""
    done = min(max(step - 20, 0) / max(size.steps - 20, 1), 1.0)
    return size.learning_rate * min((step + 1) / 20, 1.0) * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))

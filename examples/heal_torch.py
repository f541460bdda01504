"""Somebody's own torch loop that heals itself: it clips, skips, shifts its format and goes back to a snapshot."""

import torch

from altgrad_torch import (
    EmergencyMantissaShift,
    FormatController,
    PartitionRelativeClipper,
    SkipNonfinite,
    SnapshotKeeper,
    all_finite,
    cast_counts,
    global_norm,
    quantize,
)

FORMAT, STEPS = "E4M3", 160
NAN_BATCHES, POISONED_AT = range(60, 63), 110


class MLP(torch.nn.Module):
    """Two layers whose operands are cast to a format, which the controller may change."""

    def __init__(self):
        super().__init__()
        self.format = FORMAT
        self.hidden, self.out = torch.nn.Linear(8, 32), torch.nn.Linear(32, 1)

    def forward(self, x):
        for layer in (self.hidden, self.out):
            x = torch.nn.functional.linear(quantize(x, self.format), quantize(layer.weight, self.format), layer.bias)
            x = torch.relu(x) if layer is self.hidden else x
        return x


def main() -> None:
    torch.manual_seed(0)
    model = MLP()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    clipper, skipping = PartitionRelativeClipper(FORMAT), SkipNonfinite(optimizer)
    keeper = SnapshotKeeper(model, optimizer, every=10, keep=2)
    controller = FormatController(FORMAT, shifter=EmergencyMantissaShift(nan_patience=3), can_roll_back=True)
    for step in range(STEPS):
        batch = torch.randn(64, 8)
        target = batch.sum(-1, keepdim=True)
        if step in NAN_BATCHES:
            batch[0, 0] = float("nan")
        if step == POISONED_AT:
            model.hidden.weight.data[0, 0] = float("inf")
        loss = (model(batch) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        norm = global_norm([p.grad for p in model.parameters()])
        overflow_rate = max(float(cast_counts(p.grad, controller.format).overflow_rate) for p in model.parameters())
        clipper.clip_if_needed(model, overflow_rate)
        finite = skipping.step() & loss.isfinite()
        metrics = {"loss": loss, "finite": finite, "params_finite": all_finite(model), "norm": norm}
        controller.step(step, metrics, holders=[model, clipper], roll_back=keeper.roll_back)
        keeper.offer(step, finite & metrics["params_finite"] & controller.calm)
    controller.drain(holders=[model, clipper], roll_back=keeper.roll_back)
    print(f"final loss {loss.item():.4f} in {controller.format}")
    for event in controller.events:
        print(event.to_json())


if __name__ == "__main__":
    main()

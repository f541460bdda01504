"""The torch counterpart: clip when the overflow rate calls for it, watch the real update, shift the format."""

import torch

from altgrad_torch import BitStallDetector, EmergencyMantissaShift, PartitionRelativeClipper, overflow_rate, quantize

STEPS = 60


def main() -> None:
    torch.manual_seed(0)
    current = "E7M0"
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    clipper, detector, shifter = PartitionRelativeClipper(current), BitStallDetector(current), EmergencyMantissaShift()
    for step in range(STEPS):
        batch = torch.randn(64, 8)
        if 20 <= step < 23:
            batch[0, 0] = float("nan")
        loss = (model(quantize(batch, current)) - batch.sum(-1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        finite = bool(loss.isfinite())
        if finite:
            rate = overflow_rate([p.grad for p in model.parameters()], current)
            clipper.clip_if_needed(model, overflow_rate=rate)
            with detector.watch(model):
                optimizer.step()
        # Without a step there is no stall to judge; the literal rule would also shift on any stall above one half.
        shifted = shifter.check_and_shift(current, has_nan=not finite, stall_rate=0.0)
        if shifted is not None:
            print(f"step {step}: shift {current} -> {shifted}")
            current, clipper, detector = shifted, PartitionRelativeClipper(shifted), BitStallDetector(shifted)
    print(f"final loss {loss.item():.4f} in {current}; stall rate of the last update {detector.stall_rate:.2f}")


if __name__ == "__main__":
    main()

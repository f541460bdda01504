"""A small ResNet whose convolutions compute in eight bits, the first and the last layer apart."""

import torch
from torch import nn

from altgrad_torch.nn import Rule, quantize_model, recording, summary

STEPS, CLASSES = 20, 4


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.norm1(self.conv1(x)).relu()
        return (self.norm2(self.conv2(out)) + self.shortcut(x)).relu()


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.stages = nn.Sequential(Residual(8, 8, 1), Residual(8, 16, 2), Residual(16, 32, 2))
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.stages(self.stem(x).relu()).mean((2, 3)))


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Stripes in one of four directions, under noise."""
    labels = torch.randint(CLASSES, (32,))
    angles, phases = labels * (torch.pi / CLASSES), torch.rand(32) * 6.28
    y, x = torch.meshgrid(torch.arange(12.0), torch.arange(12.0), indexing="ij")
    along = x * angles.cos()[:, None, None] + y * angles.sin()[:, None, None]
    return ((along * 1.5 + phases[:, None, None]).sin() + 0.3 * torch.randn(32, 12, 12))[:, None], labels


def main() -> None:
    torch.manual_seed(0)
    model = ResNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    quantize_model(model, [Rule("stem|head", None), Rule("stages/.*", "E4M3", gradients="E5M2")])
    losses = []
    for _ in range(STEPS):
        images, labels = batch()
        optimizer.zero_grad()
        with recording(model) as seen:
            loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(summary(model))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    print(f"activations that overflowed in the last step: {float(seen.activations.overflow_rate):.2%}")


if __name__ == "__main__":
    main()

"""torch's own nn.TransformerEncoder, taken as it is, with every product in eight bits: which symbol comes next?"""

import torch
from torch import nn

from altgrad_torch import PartitionRelativeClipper
from altgrad_torch.nn import Rule, quantize_model, recording, summary

STEPS, SYMBOLS, LENGTH, WIDTH = 40, 16, 12, 32


class NextSymbol(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(SYMBOLS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, nhead=4, dim_feedforward=64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2)
        self.head = nn.Linear(WIDTH, SYMBOLS)

    def forward(self, symbols: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
        return self.head(self.encoder(self.embed(symbols) + self.place.weight, mask=mask, is_causal=True))


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences that go up by a step of their own."""
    start, stride = torch.randint(SYMBOLS, (32, 1)), torch.randint(1, 4, (32, 1))
    symbols = (start + stride * torch.arange(LENGTH + 1)) % SYMBOLS
    return symbols[:, :-1], symbols[:, 1:]


def main() -> None:
    torch.manual_seed(0)
    model = NextSymbol()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    quantize_model(
        model,
        [
            Rule("head|place", None),
            Rule("embed", "E4M3", gradients="E5M2"),
            Rule("encoder/.*", "E4M3", gradients="E5M2"),
        ],
    )
    clipper, losses = PartitionRelativeClipper("E5M2"), []
    for _ in range(STEPS):
        symbols, following = batch()
        optimizer.zero_grad()
        with recording(model) as seen:
            loss = nn.functional.cross_entropy(model(symbols).flatten(0, 1), following.flatten())
            loss.backward()
        clipper.clip_if_needed(model, overflow_rate=float(seen.gradients.overflow_rate))
        optimizer.step()
        losses.append(loss.item())
    print(summary(model))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    print(f"gradients that became zero in the last step: {float(seen.gradients.underflow_rate):.2%}")


if __name__ == "__main__":
    main()

"""Swap the attention of a vision transformer in the middle of its training: nothing else changes.

    python examples/vit_replace.py

The model is torch's own nn.TransformerEncoder over patches. It learns to tell discs, squares, rings
and crosses apart; `attnfast.replace(model)` then puts attnfast's layer in place of torch's, with
the same parameters. Logits before and after agree, both are timed, and training goes on.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

import attnfast

SHAPES = ("disc", "square", "ring", "cross")
SIDE, PATCH, WIDTH = 32, 4, 64


class ViT(nn.Module):
    """Patches to classes."""

    def __init__(self, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, PATCH, PATCH)
        self.positions = nn.Parameter(0.1 * torch.randn((SIDE // PATCH) ** 2, WIDTH))
        options = {"dropout": 0.0, "batch_first": True, "norm_first": True}
        layer = nn.TransformerEncoderLayer(WIDTH, heads, 2 * WIDTH, **options)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.out = nn.Linear(WIDTH, len(SHAPES))

    def forward(self, images: Tensor) -> Tensor:
        """[B, 1, 32, 32] images: [B, 4] logits."""
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions  # [B, 64, E]
        return self.out(self.encoder(x).mean(1))


def pictures(count: int, device: str) -> tuple[Tensor, Tensor]:
    """Noisy pictures of one shape each, anywhere and of any size, and which shape it is."""
    kind = torch.randint(len(SHAPES), (count,), device=device)
    size = 6 + 4 * torch.rand(count, 1, 1, device=device)
    places = torch.arange(SIDE, device=device) - SIDE / 2
    x, y = (places + 6 * torch.rand(2, count, 1, device=device) - 3).abs()  # [B, 32]
    x, y = x[:, None], y[:, :, None]
    radius, farther, nearer = torch.hypot(x, y), torch.maximum(x, y), torch.minimum(x, y)
    disc, square = radius <= size, farther <= size
    ring, cross = disc & (radius > 0.6 * size), square & (nearer <= 0.25 * size)
    drawn = torch.stack([disc, square, ring, cross])
    images = drawn[kind, torch.arange(count, device=device)].float()[:, None]
    return images + 0.1 * torch.randn_like(images), kind


def train(model: ViT, optimizer: torch.optim.Optimizer, steps: int, device: str) -> list[float]:
    """Losses of so many steps."""
    losses = []
    for _ in range(steps):
        images, kind = pictures(32, device)
        loss = nn.functional.cross_entropy(model.train()(images), kind)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def timed(model: ViT, images: Tensor, repeats: int = 3) -> float:
    """Milliseconds of a forward and a backward pass, the fastest of a few."""
    spent = []
    for _ in range(repeats):
        start = time.perf_counter()
        model(images).square().mean().backward()
        if images.is_cuda:
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - start)
    return 1e3 * min(spent)


def main(steps: int = 200) -> dict[str, object]:
    """Train, replace, compare, train on; returns what is printed."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = ViT().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    test, truth = pictures(128, device)
    first = train(model, optimizer, steps // 2, device)
    with torch.no_grad():
        stock = model.eval()(test)
    stock_ms = timed(model.train(), test)

    report = attnfast.replace(model)  # prints what it did; the optimiser keeps its parameters
    with torch.no_grad():
        ours = model.eval()(test)
    difference = (stock - ours).abs().max().item()
    ours_ms = timed(model.train(), test)
    print(f"largest difference of any logit: {difference:.1e}")
    print(
        f"forward and backward of 128 pictures: torch {stock_ms:.0f} ms, attnfast {ours_ms:.0f} ms"
    )

    then = train(model, optimizer, steps - steps // 2, device)
    with torch.no_grad():
        right = (model.eval()(test).argmax(1) == truth).float().mean().item()
    start, middle, end = (sum(x) / len(x) for x in (first[:10], first[-10:], then[-10:]))
    print(f"loss {start:.2f}, {middle:.2f} when replaced, {end:.2f}; {right:.0%} right")
    attnfast.restore(model)  # torch's own modules again, the training stays
    return {"report": report, "difference": difference, "losses": first + then, "right": right}


if __name__ == "__main__":
    main()

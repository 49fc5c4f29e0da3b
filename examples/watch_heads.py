"""Watch what attention heads learn: statistics from the same pass, without the matrix of weights.

    python examples/watch_heads.py

A small transformer reads 12 random tokens twice. In the second reading it can know what comes next:
the token 11 places back. While it learns, `breadth` (keys a query attends to) falls, `focus` (the
largest weight) rises and `reach` (the mean distance) goes to 11. A second training has a floor
under the entropy, which is differentiable and so keeps heads from collapsing onto single keys.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import attnfast

VOCABULARY, HALF, WIDTH, HEADS = 24, 12, 64, 4
SHOWN = ("breadth", "focus", "reach")
FLOOR = 1.0  # nats


class Reader(nn.Module):
    """One layer of causal attention, whose statistics are kept, and a feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(2 * HALF, WIDTH)
        self.attention = attnfast.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.attention.collect_stats = True  # may be switched at any time
        self.feed = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU())
        self.out = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T] tokens: [B, T, V] logits of the next."""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        y, _ = self.attention(x, x, x, is_causal=True, need_weights=False)
        x = x + y
        return self.out(x + self.feed(x))


def second_reading(stats: attnfast.AttentionStats) -> dict[str, Tensor]:
    """Means per head [H] over the queries that can know what comes next."""
    return {name: getattr(stats, name)[..., HALF:].mean((0, 2)).detach().cpu() for name in SHOWN}


def train(steps: int, floor: float, device: str) -> tuple[Reader, list[float], list[dict]]:
    """The model, its losses, and the statistics now and then."""
    torch.manual_seed(0)
    model = Reader().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    losses, looks = [], []
    for step in range(1, steps + 1):
        half = torch.randint(VOCABULARY, (64, HALF), device=device)
        tokens = torch.cat([half, half], 1)
        logits = model(tokens)[:, HALF:-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, HALF + 1 :].flatten())
        stats = model.attention.stats
        entropy = stats.entropy[..., HALF:]  # [B, H, HALF]
        penalty = (floor - entropy).clamp(min=0).square().mean()
        optimizer.zero_grad()
        (loss + penalty).backward()  # both through the same fused backward
        optimizer.step()
        losses.append(loss.item())
        if step == 1 or step % max(1, steps // 5) == 0:
            looks.append(second_reading(stats))
            shown = "  ".join(
                f"{name} " + " ".join(f"{value:5.2f}" for value in heads.tolist())
                for name, heads in looks[-1].items()
            )
            print(f"step {step:4}: loss {losses[-1]:.3f}  {shown}")
    return model, losses, looks


@torch.no_grad()
def difference(model: Reader, device: str) -> float:
    """How far breadth is from that of the whole matrix of weights, which is made here only."""
    half = torch.randint(VOCABULARY, (8, HALF), device=device)
    tokens = torch.cat([half, half], 1)
    x = model.tokens(tokens) + model.positions.weight
    later = torch.ones(2 * HALF, 2 * HALF, dtype=torch.bool, device=device).triu(1)
    stock = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).to(device)
    stock.load_state_dict(model.attention.state_dict())
    _, weights = stock(x, x, x, attn_mask=later, average_attn_weights=False)  # [B, H, T, T]
    breadth = torch.special.entr(weights).sum(-1).exp()
    model(tokens)
    return (model.attention.stats.breadth - breadth).abs().max().item()


def main(steps: int = 100) -> dict[str, object]:
    """Train without and with the floor; returns what is printed."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"four heads each: {', '.join(SHOWN)}")
    model, losses, looks = train(steps, 0.0, device)
    apart = difference(model, device)
    print(f"breadth is that of torch's weights to {apart:.1e}")
    print(f"the same with a floor of {FLOOR:g} nats under the entropy:")
    _, floored_losses, floored = train(steps, FLOOR, device)
    return {
        "apart": apart,
        "losses": (losses, floored_losses),
        "looks": (looks, floored),
    }


if __name__ == "__main__":
    main()

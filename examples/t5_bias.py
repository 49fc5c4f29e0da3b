"""A trainable relative position bias as T5 has it (arXiv:1910.10683), its gradient from the kernel.

    python examples/t5_bias.py

The model knows nothing of positions but the bias: one number per head and bucket of distances. It
has to tell, at every place, which token stood three places before. The output and the gradient of
the bias are first compared with those of torch's own attention.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import attnfast

VOCABULARY, LENGTH, BACK = 16, 64, 3
BUCKETS, FARTHEST = 16, 64


class T5Attention(nn.Module):
    """Causal self-attention over x [B, T, E] whose only notion of order is a bias per distance."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.by_bucket = nn.Embedding(BUCKETS, heads)
        nn.init.zeros_(self.by_bucket.weight)

    def bias(self, T: int) -> Tensor:
        """[H, T, T], broadcast over the batch by the kernel and never copied."""
        places = torch.arange(T, device=self.by_bucket.weight.device)
        return self.by_bucket(bucket(places[:, None] - places)).permute(2, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, E] in and out; T5 does not scale its scores."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(x).chunk(3, -1)
        )
        y = attnfast.attention(q, k, v, bias=self.bias(x.shape[1]), causal=True, scale=1.0)
        return self.out(y.transpose(1, 2).flatten(2))


def bucket(distance: Tensor) -> Tensor:
    """Distances into the past: one bucket each for the nearest, wider and wider ones beyond."""
    near = BUCKETS // 2
    distance = distance.clamp(min=0)
    share = (distance.clamp(min=1) / near).log() / math.log(FARTHEST / near)
    far = near + (share * (BUCKETS - near)).long()
    return torch.where(distance < near, distance, far.clamp(max=BUCKETS - 1))


def differences(layer: T5Attention, device: str) -> dict[str, float]:
    """How far output and the bias's gradient are from those of torch's own attention."""
    q, k, v = torch.randn(3, 4, layer.heads, LENGTH, 16, device=device)
    later = torch.ones(LENGTH, LENGTH, dtype=torch.bool, device=device).triu(1)
    bias = torch.randn(layer.heads, LENGTH, LENGTH, device=device, requires_grad=True)
    ours = attnfast.attention(q, k, v, bias=bias, causal=True, scale=1.0)
    masked = bias.masked_fill(later, -torch.inf)
    stock = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=masked, scale=1.0)
    upstream = torch.randn_like(ours)
    mine, theirs = (torch.autograd.grad(out, bias, upstream)[0] for out in (ours, stock))
    return {
        "output": (ours - stock).abs().max().item(),
        "bias's gradient": (mine - theirs).abs().max().item(),
    }


def main(steps: int = 150) -> dict[str, object]:
    """Compare, train, and show what the bias has learned; returns what is printed."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    layer = T5Attention(64, 4).to(device)
    apart = differences(layer, device)
    for name, value in apart.items():
        print(f"{name}: at most {value:.1e} from torch's own attention")

    embedding, head = nn.Embedding(VOCABULARY, 64), nn.Linear(64, VOCABULARY)
    model = nn.Sequential(embedding, layer, head).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for step in range(1, steps + 1):
        tokens = torch.randint(VOCABULARY, (32, LENGTH), device=device)
        logits = model(tokens)[:, BACK:]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, :-BACK].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % max(1, steps // 5) == 0:
            print(
                f"step {step:4}: loss {loss.item():.3f}, of {math.log(VOCABULARY):.3f} by guessing"
            )
    learned = layer.by_bucket.weight.detach().T  # [H, buckets]
    print("bias by distance, a row per head:")
    for row in learned[:, : BUCKETS // 2].tolist():
        print("  " + " ".join(f"{value:6.2f}" for value in row))
    return {"apart": apart, "losses": losses, "bias": learned.cpu()}


if __name__ == "__main__":
    main()

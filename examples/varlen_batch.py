"""A batch of sequences of different lengths, one after another: no time goes into padding.

    python examples/varlen_batch.py

The same transformer block, with the same weights, reads the batch twice: padded to the longest
sequence with torch's own attention and a mask, and packed with `attnfast.varlen_attention`. Outputs
and gradients agree; both are timed, forward and backward.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

import attnfast

WIDTH, HEADS = 128, 4


class Packed:
    """Sequences [n, E] of different lengths n as the rows of one tensor."""

    def __init__(self, sequences: list[Tensor]) -> None:
        self.rows = torch.cat(sequences)  # [total, E]
        lengths = [len(sequence) for sequence in sequences]
        ends = torch.tensor([0, *lengths]).cumsum(0)
        self.ends = ends.to(self.rows.device, torch.int32)  # where each begins, and the last ends
        self.lengths, self.longest = lengths, max(lengths)


class Block(nn.Module):
    """Causal attention and a feed-forward layer; every linear layer sees rows, packed or padded."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.feed = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def packed(self, batch: Packed) -> Tensor:
        """[total, E]."""
        x = batch.rows
        q, k, v = self.qkv(x).view(len(x), 3, HEADS, -1).unbind(1)  # [total, H, D]
        ends, longest = batch.ends, batch.longest
        y = attnfast.varlen_attention(q, k, v, ends, ends, longest, longest, causal=True)
        x = x + self.out(y.flatten(1))
        return x + self.feed(x)

    def padded(self, x: Tensor, real: Tensor) -> Tensor:
        """[B, L, E], of which the rows `real` [B, L] count."""
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)  # [B, H, L, D]
        earlier = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        mask = real[:, None, None, :] & earlier
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.feed(x)


def step(block: Block, out: Tensor) -> list[Tensor]:
    """The gradients of all parameters."""
    block.zero_grad()
    out.square().sum().backward()
    return [parameter.grad.clone() for parameter in block.parameters()]


def timed(run: object, device: str, repeats: int = 3) -> float:
    """Milliseconds, the fastest of a few."""
    spent = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - start)
    return 1e3 * min(spent)


def main(sequences: int = 32, longest: int = 512) -> dict[str, object]:
    """Compare and time; returns what is printed."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    # Few long and many short, as texts are.
    lengths = (longest * torch.rand(sequences).square()).long().clamp(min=1).tolist()
    lengths[0] = longest
    texts = [torch.randn(n, WIDTH, device=device) for n in lengths]
    block = Block().to(device)
    batch = Packed(texts)
    x = nn.utils.rnn.pad_sequence(texts, batch_first=True)  # [B, L, E]
    places = torch.arange(longest, device=device)
    real = places < torch.tensor(lengths, device=device)[:, None]  # [B, L]
    padding = 1 - sum(lengths) / real.numel()
    print(f"{sequences} sequences, {sum(lengths)} tokens; padded, {padding:.0%} would be padding")

    ours, stock = block.packed(batch), block.padded(x, real)[real]
    difference = (ours - stock).abs().max().item()
    pairs = zip(step(block, ours), step(block, stock), strict=True)
    apart = max(((a - b).norm() / b.norm()).item() for a, b in pairs)
    print(f"outputs differ by {difference:.1e} at most, gradients by {apart:.1e} of their size")

    packed_ms = timed(lambda: step(block, block.packed(batch)), device)
    padded_ms = timed(lambda: step(block, block.padded(x, real)[real]), device)
    print(f"forward and backward: padded {padded_ms:.0f} ms, packed {packed_ms:.0f} ms")
    return {"difference": difference, "apart": apart, "ms": (padded_ms, packed_ms)}


if __name__ == "__main__":
    main()

"""Train a small GPT on the characters of Python's own reference, then let it write.

    python examples/train_gpt.py
    python examples/train_gpt.py --steps 2000

Causal attention and dropout are computed in one kernel, forward and backward; writing goes token by
token over a key-value cache.
"""

from __future__ import annotations

import argparse
import time
from pydoc_data.topics import topics  # half a million characters that every Python brings

import torch
from torch import Tensor, nn

import attnfast

CONTEXT, BATCH = 96, 16


class Block(nn.Module):
    """Attention and a feed-forward layer, each behind its norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attention = attnfast.MultiheadAttention(width, heads, dropout=0.1, batch_first=True)
        wide = 4 * width
        self.feed = nn.Sequential(nn.Linear(width, wide), nn.GELU(), nn.Linear(wide, width))

    def forward(self, x: Tensor, cache: attnfast.KVCache | None) -> Tensor:
        """[B, T, E] in and out; with a cache, T tokens that follow those read before."""
        y = self.norms[0](x)
        x = x + self.attention(y, y, y, is_causal=True, need_weights=False, kv_cache=cache)[0]
        return x + self.feed(self.norms[1](x))


class GPT(nn.Module):
    """Characters to the logits of the next one."""

    def __init__(self, vocabulary: int, width: int = 96, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.characters = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(CONTEXT, width)
        nn.init.normal_(self.positions.weight, std=0.1)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, vocabulary))

    def forward(self, tokens: Tensor, caches: list[attnfast.KVCache] | None = None) -> Tensor:
        """[B, T] tokens: [B, T, V] logits."""
        start = caches[0].length if caches else 0
        x = self.characters(tokens) + self.positions.weight[start : start + tokens.shape[1]]
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks), strict=True):
            x = block(x, cache)
        return self.out(x)


def batch_of(text: Tensor) -> tuple[Tensor, Tensor]:
    """[B, T] stretches of the text, and the same one character later."""
    starts = torch.randint(len(text) - CONTEXT - 1, (BATCH, 1), device=text.device)
    stretches = text[starts + torch.arange(CONTEXT + 1, device=text.device)]
    return stretches[:, :-1], stretches[:, 1:]


def loss_of(model: GPT, text: Tensor) -> Tensor:
    """The mean cross entropy of a character in a fresh batch."""
    tokens, following = batch_of(text)
    return nn.functional.cross_entropy(model(tokens).flatten(0, 1), following.flatten())


@torch.inference_mode()
def write(model: GPT, prompt: Tensor, length: int, temperature: float = 0.7) -> Tensor:
    """Go on from a prompt [T], each new character at the cost of one; at temperature 0 the best."""
    caches = [attnfast.KVCache(CONTEXT) for _ in model.blocks]
    told = new = prompt
    while len(told) < length:
        x = model.eval()(new[None], caches)[0, -1:]  # [1, V]
        new = (x / temperature).softmax(-1).multinomial(1)[0] if temperature else x.argmax(-1)
        told = torch.cat([told, new])
    return told


def main(steps: int = 250) -> dict[str, object]:
    """Train and write; returns what is printed."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    text = "\n".join(topics.values())
    letters = sorted(set(text))
    number = {letter: i for i, letter in enumerate(letters)}
    tokens = torch.tensor([number[letter] for letter in text], device=device)
    train, held_out = tokens.tensor_split([len(tokens) * 9 // 10])
    model = GPT(len(letters)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses, start = [], time.perf_counter()
    for step in range(1, steps + 1):
        loss = loss_of(model.train(), train)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % max(1, steps // 5) == 0:
            rate = step * BATCH * CONTEXT / (time.perf_counter() - start)
            print(f"step {step:5}: loss {losses[-1]:.2f}, {rate:,.0f} characters/s")
    with torch.inference_mode():
        after = sum(loss_of(model.eval(), held_out).item() for _ in range(10)) / 10
    written = write(model, torch.tensor([number[x] for x in "The "], device=device), CONTEXT)
    told = "".join(letters[i] for i in written.tolist())
    print(f"held out: loss {after:.2f}\n{told}")
    return {"losses": losses, "held_out": after, "written": told}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=250)
    main(**vars(parser.parse_args()))

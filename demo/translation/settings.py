"""What decides a training run: two runs with equal settings and data give equal losses."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from demo.translation.model import Translator

PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class Settings:
    """The model's shape and how it is trained; the names are those of the options."""

    width: int = 128
    heads: int = 4
    layers: int = 2  # of the encoder, and of the decoder
    feedforward: int = 512
    dropout: float = 0.1
    rate: float = 4e-3  # the highest learning rate, at the end of the warm-up
    warm_up: int = 100  # steps
    weight_decay: float = 0.01
    batch_tokens: int = 2048  # padded positions of a batch, source and target together
    seed: int = 0
    precision: str = "fp32"

    def as_dict(self) -> dict[str, Any]:
        """By name, for files."""
        return dataclasses.asdict(self)

    def build(self, vocabulary: int) -> Translator:
        """The model with its first weights, which the seed decides; on the CPU, as torch has it."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return Translator(
                vocabulary, self.width, self.heads, self.layers, self.feedforward, self.dropout
            )

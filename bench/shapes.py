"""The grid: which problems are timed, and how much work each of them is."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch

PASSES = ("forward", "forward+backward")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# B, H, T, S, D
ATTENTION = {
    "full": (
        (1, 8, 128, 128, 64),
        (32, 8, 64, 64, 64),
        (8, 12, 512, 512, 64),
        (2, 16, 1024, 1024, 64),
        (1, 16, 4096, 4096, 64),
        (1, 16, 4096, 4096, 128),
    ),
    "quick": ((1, 2, 64, 64, 64), (2, 3, 33, 33, 40)),
}

# name, B, T, E, H
LAYERS = {
    "full": (
        ("BERT-base", 8, 128, 768, 12),
        ("ViT-B/16", 8, 197, 768, 12),
        ("MiniLM", 32, 64, 384, 12),  # of the search demo
        ("translation", 64, 32, 256, 8),  # of the translation demo
        ("small", 4, 32, 128, 4),
    ),
    "quick": (("tiny", 2, 16, 64, 4),),
}

ENCODER_LAYERS = 2


class AttentionCase(NamedTuple):
    """One row of the attention suite: sizes as in the README's glossary, and what is computed."""

    B: int
    H: int
    T: int
    S: int
    D: int
    dtype: str
    causal: bool
    work: str  # one of PASSES

    def __str__(self) -> str:
        """The test's id: ``1x8x128x64-causal-float32-forward``."""
        length = self.T if self.T == self.S else f"{self.T}:{self.S}"
        reach = "causal" if self.causal else "full"
        return f"{self.B}x{self.H}x{length}x{self.D}-{reach}-{self.dtype}-{self.work}"

    @property
    def flop(self) -> float:
        """4 B H T S D for a forward pass, half of it if causal, 3.5 times with the backward pass.

        The backward pass has five matrix products, one of them the scores again, the forward two.
        """
        forward = 4 * self.B * self.H * self.T * self.S * self.D * (0.5 if self.causal else 1)
        return forward * (3.5 if self.work == "forward+backward" else 1)

    def describe(self) -> dict[str, Any]:
        """The case as a row of results holds it."""
        return {"suite": "attention", "case": self._asdict(), "flop": self.flop}


class LayerCase(NamedTuple):
    """One row of the module suite: self-attention of ``x`` (B, T, E) by a whole layer."""

    layer: str
    B: int
    T: int
    E: int
    H: int
    dtype: str  # of the parameters too
    mode: str  # "eval": forward without gradients; "train": forward and backward
    weights: bool  # need_weights, averaged over heads
    padding: bool  # a key_padding_mask

    def __str__(self) -> str:
        """The test's id: ``BERT-base-8x128x768-12-float32-train-weights-padding``."""
        options = [name for name in ("weights", "padding") if getattr(self, name)] or ["plain"]
        sizes = f"{self.B}x{self.T}x{self.E}-{self.H}"
        return "-".join([self.layer, sizes, self.dtype, self.mode, *options])

    @property
    def flop(self) -> float:
        """The projections, 8 B T E^2, and the attention, 4 B T T E; 3 and 3.5 times in training."""
        projections = 8 * self.B * self.T * self.E**2
        core = 4 * self.B * self.T**2 * self.E
        return 3 * projections + 3.5 * core if self.mode == "train" else projections + core

    def describe(self) -> dict[str, Any]:
        """The case as a row of results holds it."""
        return {"suite": "module", "case": self._asdict(), "flop": float(self.flop)}


class EncoderCase(NamedTuple):
    """One row of the encoder suite: ``nn.TransformerEncoder`` of ``ENCODER_LAYERS`` layers.

    Feed-forward width 4E, GELU, without dropout, so that results can be compared.
    """

    layer: str
    B: int
    T: int
    E: int
    H: int
    dtype: str  # "bfloat16": autocast in a step, bf16 parameters in inference
    mode: str  # "inference", or "step": forward, backward and AdamW
    padding: bool

    def __str__(self) -> str:
        """The test's id: ``BERT-base-8x128x768-12-float32-step-padding``."""
        sizes = f"{self.B}x{self.T}x{self.E}-{self.H}"
        return "-".join(
            [self.layer, sizes, self.dtype, self.mode, "padding" if self.padding else "plain"]
        )

    @property
    def flop(self) -> float:
        """Per layer 24 B T E^2 for linears, 4 B T T E for attention; 3 and 3.5 times in a step."""
        linears = 24 * self.B * self.T * self.E**2
        core = 4 * self.B * self.T**2 * self.E
        one = 3 * linears + 3.5 * core if self.mode == "step" else linears + core
        return float(ENCODER_LAYERS * one)

    def describe(self) -> dict[str, Any]:
        """The case as a row of results holds it."""
        return {"suite": "encoder", "case": self._asdict(), "flop": self.flop}


Case = AttentionCase | LayerCase | EncoderCase


def padding_mask(B: int, T: int) -> torch.Tensor:
    """(B, T), True = padding: a quarter of the batch, the first sequence full, the last half."""
    lengths = torch.linspace(T, T // 2, B).long()
    return torch.arange(T) >= lengths[:, None]


def attention_cases(suite: str) -> list[AttentionCase]:
    """The attention suite, "full" or "quick"."""
    grid = itertools.product(DTYPES, PASSES, ATTENTION[suite], (False, True))
    return [AttentionCase(*shape, dtype, causal, work) for dtype, work, shape, causal in grid]


def layer_cases(suite: str) -> list[LayerCase]:
    """The module suite, "full" or "quick"; weights in fp32 only."""
    grid = itertools.product(DTYPES, LAYERS[suite], ("eval", "train"), (False, True), (False, True))
    return [
        LayerCase(*layer, dtype, mode, weights, padding)
        for dtype, layer, mode, weights, padding in grid
        if dtype == "float32" or not weights
    ]


def encoder_cases(suite: str) -> list[EncoderCase]:
    """The encoder suite, "full" or "quick"."""
    grid = itertools.product(DTYPES, LAYERS[suite], ("inference", "step"), (False, True))
    return [EncoderCase(*layer, dtype, mode, padding) for dtype, layer, mode, padding in grid]

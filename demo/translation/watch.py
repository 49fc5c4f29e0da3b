"""How broadly and how sharply each layer and head looks, over a few sentences, during training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

import attnfast
from demo.translation.batches import Batch, collate
from demo.translation.model import Translator
from demo.translation.tokens import PAD, Example

MEASURES = ("breadth", "focus", "max_logit")
SENTENCES = 32


class Look(NamedTuple):
    """The measures at one step of the training, each by kind of attention: fp32 [layers, H]."""

    step: int
    breadth: dict[str, Tensor]  # keys a token effectively attends to, mean over tokens
    focus: dict[str, Tensor]  # the largest weight a token gives, mean over tokens
    max_logit: dict[str, Tensor]  # the largest score of any token


def probe(examples: Sequence[Example]) -> Batch:
    """The sentences that are watched: the same ones at every step, whatever is trained on."""
    return collate(examples[:SENTENCES])


def watch(model: Translator, batch: Batch, step: int) -> Look:
    """Measure all layers and heads in the one pass that computes their output.

    Args:
        model: whose attention modules are attnfast's. Left in the mode it was in; nothing is
            drawn from the generators.
        batch: on the model's device. Padding asks no questions: its rows are left out.
        step: how many steps the model has been trained for.
    """
    real = {"encoder": batch.source != PAD, "decoder": batch.target != PAD}
    real["cross"] = real["decoder"]
    measured: dict[str, dict[str, Tensor]] = {name: {} for name in MEASURES}
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), statistics(model):
            model(*batch)
            for kind, modules in model.attentions().items():
                rows = [_heads(module.stats, real[kind]) for module in modules]  # type: ignore[arg-type]
                for name in MEASURES:
                    measured[name][kind] = torch.stack([row[name] for row in rows]).cpu()
    finally:
        model.train(was_training)
    return Look(step, **measured)


@contextmanager
def statistics(model: Translator) -> Iterator[None]:
    """Have every attention module keep its `attnfast.AttentionStats` meanwhile."""
    modules = [module for layers in model.attentions().values() for module in layers]
    for module in modules:
        module.collect_stats = True  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in modules:
            module.collect_stats = False  # type: ignore[assignment]
            module.stats = None  # type: ignore[assignment]


def _heads(stats: attnfast.AttentionStats, real: Tensor) -> dict[str, Tensor]:
    """Over the queries [B, T] that are real: each measure [H]."""
    rows = real[:, None, :].to(stats.lse.device)  # [B, 1, T]
    means = {
        name: torch.where(rows, getattr(stats, name), 0).sum((0, 2)) / rows.sum()
        for name in ("breadth", "focus")
    }
    return {**means, "max_logit": stats.max_logit.masked_fill(~rows, -torch.inf).amax((0, 2))}

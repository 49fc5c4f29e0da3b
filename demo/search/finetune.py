"""Fine-tuning the encoder to tell which module a docstring belongs to."""

from __future__ import annotations

import copy
import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from sklearn.metrics import classification_report
from torch import Tensor, nn
from tqdm import tqdm

from demo import budget
from demo.measure import now
from demo.search.corpus import Document
from demo.search.encoder import EMBED_DIM, Batch, SentenceEncoder, length_sorted, pad

FEWEST = 15  # docstrings that a module needs to be a class
HELD_OUT = 0.25
PEAK_RATE, HEAD_RATE, WEIGHT_DECAY, WARM_UP = 2e-4, 2e-3, 0.01, 0.1
POOL = 8  # batches that are sorted by length together, so that little of a batch is padding


class Split(NamedTuple):
    """The labelled texts: indices into the corpus."""

    modules: list[str]  # the classes, by name
    labels: dict[int, int]  # text -> class
    train: list[int]
    test: list[int]


def split_by_module(documents: Sequence[Document], seed: int) -> Split | None:
    """The modules with enough docstrings, a quarter of each held out; None with fewer than two."""
    members = defaultdict(list)
    for index, document in enumerate(documents):
        if document.module:
            members[document.module].append(index)
    modules = sorted(name for name, indices in members.items() if len(indices) >= FEWEST)
    if len(modules) < 2:
        return None
    labels, train, test = {}, [], []
    draw = random.Random(seed)
    for label, name in enumerate(modules):
        indices = draw.sample(members[name], len(members[name]))
        cut = round(len(indices) * HELD_OUT)
        test += indices[:cut]
        train += indices[cut:]
        labels.update(dict.fromkeys(indices, label))
    return Split(modules, labels, sorted(train), sorted(test))


class Classifier(nn.Module):
    """A linear layer over the sentence embedding."""

    def __init__(self, encoder: SentenceEncoder, classes: int, dropout: float) -> None:
        super().__init__()
        self.encoder = encoder
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(EMBED_DIM, classes)

    def forward(self, tokens: Tensor, padding: Tensor) -> Tensor:
        """Logits (B, classes) for tokens and padding (B, L)."""
        pooled = self.encoder(tokens, padding) * EMBED_DIM**0.5  # features of size about one
        logits: Tensor = self.head(self.dropout(pooled))
        return logits


def parameter_groups(model: Classifier) -> list[dict[str, Any]]:
    """AdamW's groups: no weight decay on biases and norms, a higher rate for the new head."""
    encoder, head = list(model.encoder.parameters()), list(model.head.parameters())
    groups = []
    for parameters, rate in ((encoder, PEAK_RATE), (head, HEAD_RATE)):
        for decay in (WEIGHT_DECAY, 0.0):
            chosen = [p for p in parameters if (p.ndim >= 2) == (decay > 0)]
            groups.append({"params": chosen, "lr": rate, "weight_decay": decay})
    return groups


def warm_up_and_decay(steps: int) -> Callable[[int], float]:
    """The rate's factor: linear from zero to one over the first tenth, then linear to zero."""
    rising = max(1, round(steps * WARM_UP))
    return lambda step: min((step + 1) / rising, (steps - step) / max(1, steps - rising))


def epochs(
    ids: Sequence[Sequence[int]], train: Sequence[int], size: int, steps: int, seed: int
) -> list[list[int]]:
    """The texts of each step: shuffled epochs, neighbours in length sharing a batch."""
    draw = random.Random(seed)
    batches: list[list[int]] = []
    while len(batches) < steps:
        order = draw.sample(train, len(train))
        for start in range(0, len(order), size * POOL):
            pool = sorted(order[start : start + size * POOL], key=lambda i: len(ids[i]))
            parts = [pool[i : i + size] for i in range(0, len(pool), size)]
            batches += draw.sample(parts, len(parts))
    return batches[:steps]


class Outcome(NamedTuple):
    """What fine-tuning one model gave."""

    losses: list[float]  # of each step, in training mode
    seconds: float  # all steps: forward, backward and optimiser
    held_out_before: float  # loss on held-out texts, without dropout
    held_out_after: float
    report: dict[str, Any]  # sklearn's classification_report


def fine_tune(
    encoders: Mapping[str, SentenceEncoder],
    ids: Sequence[Sequence[int]],
    split: Split,
    *,
    steps: int | None,
    batch_size: int,
    max_tokens: int,
    dropout: float,
    seed: int,
    device: torch.device,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Outcome]:
    """Fine-tune copies of the encoders on the same batches, taking turns step by step.

    Each step of each model starts from the same seed. Dropout masks differ all the same: the two
    draw from the generator in different ways.

    Args:
        encoders: by name; left as they are.
        ids: token ids of the corpus.
        split: labels, training and held-out texts.
        steps: optimiser steps; None for as many as fit a minute, measured before the first one.
        batch_size: texts a step.
        max_tokens: texts are cut off here.
        dropout: the probability before the head; the encoders bring their own.
        seed: of the head, the order of texts, the dropout.
        device: where the encoders are.
        tell: called with a line that says which number of steps was chosen, and why.
    """
    started = now(device)
    ids = [text[:max_tokens] for text in ids]
    labels = {i: torch.tensor(label) for i, label in split.labels.items()}
    torch.manual_seed(seed)
    head = nn.Linear(EMBED_DIM, len(split.modules)).to(device)
    models = {}
    for name, encoder in encoders.items():
        model = Classifier(copy.deepcopy(encoder), len(split.modules), dropout).to(device)
        model.head.load_state_dict(head.state_dict())
        models[name] = model
    held_out = list(length_sorted([ids[i] for i in split.test], 4096))
    truth = torch.stack([labels[i] for i in split.test])

    evaluation = now(device)
    before = {name: _predict(model, held_out, truth, device)[1] for name, model in models.items()}
    evaluation = now(device) - evaluation
    if steps is None:
        each = _step_seconds(models, ids, labels, split.train, batch_size, seed, device)
        left = budget.TUNING - (now(device) - started) - evaluation
        steps = budget.steps_that_fit(left, each, budget.TUNED)
        tell(chosen(steps, each, left))
    order = epochs(ids, split.train, batch_size, steps, seed)
    losses, seconds = _train(models, ids, labels, order, seed, device)
    outcomes = {}
    for name, model in models.items():
        predicted, after = _predict(model, held_out, truth, device)
        report = classification_report(
            truth.numpy(),
            predicted.numpy(),
            labels=range(len(split.modules)),
            target_names=split.modules,
            output_dict=True,
            zero_division=0.0,
        )
        outcomes[name] = Outcome(losses[name], seconds[name], before[name], after, report)
    return outcomes


def chosen(steps: int, each: float, left: float) -> str:
    """One line: the number of steps and why."""
    return (
        f"{steps} steps, from {budget.TUNED.least} to {budget.TUNED.most}: one of both models takes"
        f" {each:.2f} s here, and {left:.0f} s of a minute are left for them (--steps)"
    )


def _step_seconds(
    models: Mapping[str, Classifier],
    ids: Sequence[Sequence[int]],
    labels: Mapping[int, Tensor],
    train: Sequence[int],
    size: int,
    seed: int,
    device: torch.device,
) -> float:
    """Seconds that a step of mean length takes all models, timed on copies that are thrown away.

    Training itself is left as it would be: each of its steps seeds the generators anew.
    """
    order = epochs(ids, train, size, -(-len(train) // size), seed)
    positions = [len(texts) * max(len(ids[i]) for i in texts) for texts in order]  # padded
    mean = sum(positions) / len(positions)
    middling = min(range(len(order)), key=lambda i: abs(positions[i] - mean))
    batch = pad(ids, order[middling]).to(device)
    target = torch.stack([labels[i] for i in order[middling]]).to(device)
    seconds = 0.0
    for model in models.values():
        model = copy.deepcopy(model)
        optimiser = torch.optim.AdamW(parameter_groups(model))
        small = Batch(batch.indices[:2], batch.tokens[:2], batch.padding[:2])
        _step(model, optimiser, small, target[:2])  # first uses of memory and kernels
        start = now(device)
        _step(model, optimiser, batch, target)
        seconds += now(device) - start
    return seconds * mean / positions[middling]


def _train(
    models: Mapping[str, Classifier],
    ids: Sequence[Sequence[int]],
    labels: Mapping[int, Tensor],
    order: Sequence[list[int]],
    seed: int,
    device: torch.device,
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """A step of every model for each batch of `order`; losses and seconds, by the model's name."""
    optimisers, schedules = {}, {}
    for name, model in models.items():
        optimisers[name] = torch.optim.AdamW(parameter_groups(model))
        factor = warm_up_and_decay(len(order))
        schedules[name] = torch.optim.lr_scheduler.LambdaLR(optimisers[name], factor)
    losses: dict[str, list[float]] = {name: [] for name in models}
    seconds = dict.fromkeys(models, 0.0)
    with tqdm(order, desc="fine-tuning twice", unit=" steps", mininterval=0.5) as bar:
        for step, indices in enumerate(bar):
            batch = pad(ids, indices).to(device)
            target = torch.stack([labels[i] for i in indices]).to(device)
            for name in list(models)[:: 1 if step % 2 == 0 else -1]:
                torch.manual_seed(seed + step)
                start = now(device)
                loss = _step(models[name], optimisers[name], batch, target)
                seconds[name] += now(device) - start
                schedules[name].step()
                losses[name].append(loss)
            bar.set_postfix({name: f"{values[-1]:.3f}" for name, values in losses.items()})
    return losses, seconds


def _step(
    model: Classifier, optimiser: torch.optim.Optimizer, batch: Batch, target: Tensor
) -> float:
    """One optimiser step; returns the loss."""
    model.train()
    loss = nn.functional.cross_entropy(model(batch.tokens, batch.padding), target)
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    return loss.item()


def _predict(
    model: Classifier, batches: Sequence[Batch], truth: Tensor, device: torch.device
) -> tuple[Tensor, float]:
    """Predicted classes of the held-out texts and the mean loss, in eval mode."""
    model.eval()
    logits = torch.empty(len(truth), model.head.out_features)
    with torch.inference_mode():
        for batch in batches:
            logits[batch.indices] = model(*batch.to(device)[1:]).cpu()
    return logits.argmax(-1), nn.functional.cross_entropy(logits, truth).item()

"""Batches of pairs of similar length, in an order that depends on the seed and the step alone."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Sampler

from demo.translation.tokens import PAD, START, Example

POOL = 50  # batches' worth of pairs that are sorted by length together


class Batch(NamedTuple):
    """Padded token ids; the decoder reads START and the target but END, to tell the target."""

    source: Tensor  # int64 [B, S]
    decoder_input: Tensor  # int64 [B, T]
    target: Tensor  # int64 [B, T]

    @property
    def tokens(self) -> int:
        """The tokens that are no padding, both sides."""
        return int((self.source != PAD).sum() + (self.target != PAD).sum())

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        return Batch(*(x.to(device) for x in self))


def pad(rows: Sequence[Sequence[int]]) -> Tensor:
    """int64 [B, L], PAD behind the shorter rows."""
    return pad_sequence([torch.tensor(row) for row in rows], True, PAD)


def collate(examples: Sequence[Example]) -> Batch:
    """A batch of these pairs, in this order."""
    target = pad([example.target for example in examples])
    starts = torch.full((len(examples), 1), START)
    source = pad([example.source for example in examples])
    return Batch(source, torch.cat([starts, target[:, :-1]], 1), target)


def buckets(lengths: Sequence[tuple[int, int]], order: Sequence[int], size: int) -> list[list[int]]:
    """Cut pairs, taken by length, into batches of at most `size` padded positions, or of one pair.

    Args:
        lengths: of every pair's source and target.
        order: the pairs, by index; those of equal length stay in this order.
        size: rows times the longest source and the longest target, together.
    """
    batches: list[list[int]] = []
    longest = (0, 0)
    for index in sorted(order, key=lambda i: (max(lengths[i]), sum(lengths[i]))):
        source, target = lengths[index]
        grown = (max(longest[0], source), max(longest[1], target))
        if not batches or (len(batches[-1]) + 1) * sum(grown) > size:
            batches.append([])
            grown = (source, target)
        batches[-1].append(index)
        longest = grown
    return batches


class LengthBuckets(Sampler[list[int]]):
    """Endless shuffled epochs of batches; pairs of similar length share one.

    Args:
        examples: the pairs to learn from.
        size: positions of a padded batch, source and target together.
        seed: the same seed gives the same batches.
        start: how many of the first batches to leave out, so that a run can go on.
    """

    def __init__(self, examples: Sequence[Example], size: int, seed: int, start: int = 0) -> None:
        self.lengths = [(len(example.source), len(example.target)) for example in examples]
        self.size = size
        self.seed = seed
        self.start = start

    def epoch(self, number: int) -> list[list[int]]:
        """The batches of one epoch: every pair once."""
        draw = random.Random(f"{self.seed} {number}")
        order = draw.sample(range(len(self.lengths)), len(self.lengths))
        mean = sum(map(sum, self.lengths)) / len(self.lengths)
        pool = max(1, round(POOL * self.size / mean))
        batches = []
        for start in range(0, len(order), pool):
            batches += buckets(self.lengths, order[start : start + pool], self.size)
        return draw.sample(batches, len(batches))

    def __iter__(self) -> Iterator[list[int]]:
        skip, number = self.start, 0
        while True:
            batches = self.epoch(number)
            yield from batches[skip:]
            skip = max(0, skip - len(batches))
            number += 1


def training_batches(examples: Sequence[Example], size: int, seed: int, start: int) -> DataLoader:
    """Endless batches from number `start` on; drawing them leaves all global generators alone."""
    return DataLoader(
        examples,  # type: ignore[arg-type]
        batch_sampler=LengthBuckets(examples, size, seed, start),
        collate_fn=collate,
        generator=torch.Generator(),  # else an epoch's start would draw from torch's
    )


def in_order(examples: Sequence[Example], size: int) -> Iterator[tuple[list[int], Batch]]:
    """Every pair once, by length: the indices of each batch and the batch."""
    lengths = [(len(example.source), len(example.target)) for example in examples]
    for indices in buckets(lengths, range(len(examples)), size):
        yield indices, collate([examples[i] for i in indices])

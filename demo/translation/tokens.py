"""Texts as numbers: a byte-pair encoding learned from the pairs themselves."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from demo.command import UsageError
from demo.translation.pairs import Pair, Split

PAD, START, END = 0, 1, 2
SPECIAL = ["<pad>", "<s>", "</s>"]
ALPHABET = 256  # every byte is a token, so that no text is unknown


class Example(NamedTuple):
    """Token ids of a pair, each side ending in END."""

    source: list[int]
    target: list[int]


class Data(NamedTuple):
    """What a model learns from and is measured on."""

    tokenizer: Tokenizer
    train: list[Example]
    held_out: list[Example]
    texts: list[Pair]  # the held-out pairs as they are written

    @property
    def fingerprint(self) -> str:
        """The same for the same token ids in the same order."""
        told = json.dumps([self.tokenizer.to_str(), self.train, self.held_out])
        return hashlib.sha256(told.encode()).hexdigest()


def learn_tokenizer(pairs: Sequence[Pair], vocabulary: int) -> Tokenizer:
    """A byte-level BPE of both languages together (arXiv:1508.07909).

    Args:
        pairs: the texts to learn from.
        vocabulary: the largest number of tokens, the bytes and three special ones included.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for pair in pairs for text in pair), trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text, END after them; special tokens spelled out in a text are plain text."""
    tokenizer.encode_special_tokens = True
    return [[*encoding.ids, END] for encoding in tokenizer.encode_batch(list(texts))]


def pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """How each token reads, for pictures: a space before a word as "_", END as its name."""
    shown = []
    for index in ids:
        text = SPECIAL[index] if index < len(SPECIAL) else tokenizer.decode([index])
        shown.append("_" + text[1:] if text.startswith(" ") else text)
    return shown


def prepare(split: Split, vocabulary: int, max_tokens: int) -> Data:
    """Learn the tokens from the training pairs, and leave out pairs with too many of them.

    Raises:
        UsageError: nothing is left.
    """
    tokenizer = learn_tokenizer(split.train, vocabulary)

    def kept(pairs: Sequence[Pair], which: str) -> tuple[list[Example], list[Pair]]:
        sides = (encode(tokenizer, side) for side in zip(*pairs, strict=True))
        examples = [Example(*sides) for sides in zip(*sides, strict=True)]
        short = [i for i, e in enumerate(examples) if max(map(len, e)) <= max_tokens]
        if not short:
            shortest = min(max(map(len, e)) for e in examples)
            raise UsageError(
                f"--max-tokens: leaves no {which} pair, the shortest has {shortest} tokens,"
                f" got {max_tokens}"
            )
        return [examples[i] for i in short], [pairs[i] for i in short]

    train, _ = kept(split.train, "training")
    held_out, texts = kept(split.held_out, "held-out")
    return Data(tokenizer, train, held_out, texts)


def save_data(data: Data, path: Path) -> None:
    """Write all of it for another process."""
    plain = [[tuple(pair) for pair in pairs] for pairs in data[1:]]
    torch.save((data.tokenizer.to_str(), *plain), path)


def load_data(path: Path) -> Data:
    """What `save_data` wrote."""
    tokenizer, train, held_out, texts = torch.load(path)
    return Data(
        Tokenizer.from_str(tokenizer),
        [Example(*example) for example in train],
        [Example(*example) for example in held_out],
        [Pair(*pair) for pair in texts],
    )

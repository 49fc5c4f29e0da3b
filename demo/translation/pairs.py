"""Pairs of texts: reading and writing them, and holding some out."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from demo.command import UsageError
from demo.files import read_text

HELD_OUT = 400  # texts, or a tenth where there are few


class Pair(NamedTuple):
    """A text and its translation."""

    source: str
    target: str


class Split(NamedTuple):
    """Pairs to learn from, and pairs that are only ever translated."""

    train: list[Pair]
    held_out: list[Pair]


def tidy(text: str) -> str:
    """The text on one line, words parted by one space."""
    return " ".join(text.split())


def read_pairs(path: Path, option: str = "--pairs") -> list[Pair]:
    """The pairs of a file: a line each, source and translation parted by a tab.

    Blank lines are skipped, columns after the second ignored.

    Args:
        path: the file.
        option: whose value it is, for errors.

    Raises:
        UsageError: the file cannot be read, is not UTF-8, is empty, or a line is no pair.
    """
    pairs = []
    for number, line in enumerate(read_text(path, option).split("\n"), 1):
        if not line.strip():
            continue
        columns = [tidy(column) for column in line.split("\t")]
        if len(columns) < 2 or not all(columns[:2]):
            told = "must be source, tab, translation"
            raise UsageError(f"{option}: line {number} of {path} {told}, got {line.strip()[:60]!r}")
        pairs.append(Pair(*columns[:2]))
    return pairs


def write_pairs(path: Path, pairs: Iterable[Pair]) -> None:
    """The file that `read_pairs` reads; the texts must be tidy."""
    lines = "".join(f"{source}\t{target}\n" for source, target in pairs)
    path.write_text(lines, encoding="utf-8")


def split_pairs(pairs: Sequence[Pair], seed: int) -> Split:
    """One translation of every text, and 400 of the texts (of few, a tenth) held out.

    Texts that differ only in case, punctuation and space count as one: the first is taken.

    Raises:
        UsageError: fewer than two texts.
    """
    texts: dict[str, Pair] = {}
    for pair in pairs:
        texts.setdefault(_key(pair.source), pair)
    if len(texts) < 2:
        raise UsageError(
            "too few pairs: at least 2 different texts are needed, one to learn from and one to"
            f" hold out, got {len(texts)}"
        )
    shuffled = list(texts.values())
    random.Random(seed).shuffle(shuffled)
    held_out = min(HELD_OUT, max(1, len(shuffled) // 10))
    return Split(shuffled[held_out:], shuffled[:held_out])


def _key(text: str) -> str:
    """What texts have in common that differ only in case, punctuation and space."""
    return "".join(filter(str.isalnum, text.casefold())) or text

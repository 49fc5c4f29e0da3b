"""A small, regular pair of languages for the tests of the translation demo, and its command."""

from __future__ import annotations

import itertools
import os
import random
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NEEDED = (
    "tokenizers",
    "safetensors",
    "sklearn",
    "matplotlib",
    "rich",
    "tqdm",
    "polib",
    "sacrebleu",
    "tensorboard",
)
ADJECTIVES = {"new": "neue", "old": "alte", "large": "große", "small": "kleine", "empty": "leere"}
NOUNS = {"file": "Datei", "page": "Seite", "group": "Gruppe", "list": "Liste", "line": "Zeile"}
VERBS = {"open": "öffnen", "close": "schließen", "save": "speichern", "print": "drucken"}
TAILS = {"": "", " at once": " sofort", " again and again": " immer und immer wieder"}
# A model that a test can train in a second.
TINY = ["--width=16", "--heads=2", "--layers=1", "--feedforward=32", "--batch-tokens=256"]
TINY += ["--vocabulary=320", "--warm-up=10", "--rate=0.01"]


def sentences() -> list[tuple[str, str]]:
    """300 different sentences and their translations, shuffled."""
    made = []
    for verb, adjective, noun, tail in itertools.product(VERBS, ADJECTIVES, NOUNS, TAILS):
        told = f"Die {ADJECTIVES[adjective]} {NOUNS[noun]}{TAILS[tail]} {VERBS[verb]}"
        made.append((f"{verb.capitalize()} the {adjective} {noun}{tail}", told))
    random.Random(0).shuffle(made)
    return made


def write_tsv(path: Path, rows: int | None = None) -> Path:
    """A file of the first of these sentences."""
    lines = (f"{source}\t{target}\n" for source, target in sentences()[:rows])
    path.write_text("".join(lines), encoding="utf-8")
    return path


def environment() -> dict[str, str]:
    """For the command in a process of its own."""
    paths = [str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "COLUMNS": "100"}


def command(*arguments: object) -> list[str]:
    """The command with one thread."""
    return [sys.executable, str(EXAMPLES / "translate"), "--threads=1", *map(str, arguments)]

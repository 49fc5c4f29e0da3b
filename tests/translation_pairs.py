"""A small, regular pair of languages for the translation demo's tests; its work in one process."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import demo_needs  # noqa: F401

from demo.translation import compare

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


def work_here(job: dict[str, Any], folder: Path) -> compare.Outcome:
    """In place of `compare._in_process`: the job in this process, which has its imports."""
    (folder / "job.json").write_text(json.dumps(job))
    assert compare.work(folder)
    return compare.Outcome(**json.loads((folder / "outcome.json").read_text()))

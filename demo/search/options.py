"""The search's options."""

from __future__ import annotations

from pathlib import Path

from demo.budget import EMBEDDING, LONGEST, SHORTEST, TUNED
from demo.options import OUT, Parser, add, add_run, number
from demo.search.encoder import LAYERS, POSITIONS

DESCRIPTION = """\
Semantic search over the docstrings of Python's standard library with a trained sentence encoder
(MiniLM, 6 layers of 12 heads), once with torch's attention and once with attnfast's. Prints the
hits side by side, the largest difference of any embedding, time, memory and attention's share;
draws where words look; fine-tunes both to tell modules apart."""
EPILOG = """\
without arguments: a few queries of its own, in three minutes; for example
  "how do I read a zip archive"              your question
  --no-train --modules zipfile,tarfile "open a compressed file"
  --texts notes.txt "who pays?"              your texts: one a line, or parted by blank lines

exit codes: 0 all well; 1 an embedding differs by more than 1e-5; 2 bad input; 130 interrupted"""


def parser() -> Parser:
    """Every option, in groups."""
    parser = Parser("demo.search", DESCRIPTION, EPILOG)
    parser.add_argument("query", nargs="*", help="what to look for; each argument is one query")
    what = parser.add_argument_group("what is searched")
    add(what, "--queries", Path, "FILE", "more queries, one a line")
    source = what.add_mutually_exclusive_group()
    add(
        source,
        "--texts",
        Path,
        "FILE",
        "search these texts (one a line, or parted by blank lines) instead of the standard"
        " library; they have no modules to tell apart, so nothing is fine-tuned",
    )
    told = "only these modules of the standard library"
    add(source, "--modules", lambda text: text.split(","), "A,B,...", told)
    add(what, "--top", number(1), "N", "hits", 5)
    how = add_run(parser)
    told = f"texts are cut off here (default: {LONGEST}, or as few as {SHORTEST} where embedding"
    told += f" would take longer than {EMBEDDING:.0f} s)"
    add(how, "--max-tokens", number(3, POSITIONS), "N", told)
    add(how, "--batch-tokens", number(1), "N", "positions of a padded batch", 4096)
    tuning = parser.add_argument_group("fine-tuning")
    tuning.add_argument("--no-train", action="store_true", help="leave it out")
    told = f"as many as fit a minute, from {TUNED.least} to {TUNED.most}"
    add(tuning, "--steps", number(1), "N", f"optimiser steps (default: {told})")
    add(tuning, "--batch-size", number(1), "N", "texts a step", 24)
    told = "texts are cut off here in fine-tuning"
    add(tuning, "--train-tokens", number(3, POSITIONS), "N", told, 64)
    add(tuning, "--seed", int, "N", "of the head, the order of texts, the dropout", 0)
    results = parser.add_argument_group("results")
    add(results, "--out", Path, "FOLDER", "for attention.png, losses.png and results.json", OUT)
    told = f"whose heads are drawn, 1 to {LAYERS}"
    add(results, "--layer", number(1, LAYERS), "N", told, 2)
    told = "whose words are drawn (default: the first query)"
    add(results, "--sentence", str, "TEXT", told)
    return parser

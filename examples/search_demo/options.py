"""The command line's options."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NoReturn

import torch

from search_demo.budget import EMBEDDING, LONGEST, SHORTEST
from search_demo.encoder import LAYERS, POSITIONS
from search_demo.errors import UsageError

DESCRIPTION = """\
Semantic search over the docstrings of Python's standard library with a trained sentence encoder
(MiniLM, 6 layers of 12 heads), once with torch's attention and once with attnfast's. Prints the
hits side by side, the largest difference of any embedding, time, memory and attention's share;
draws where words look; fine-tunes both to tell modules apart."""
EPILOG = """\
examples:
  search                                     a few queries of its own, in three minutes
  search "how do I read a zip archive"       your question
  search --no-train --modules zipfile,tarfile "open a compressed file"
  search --texts notes.txt "who pays?"       your texts: one a line, or parted by blank lines

exit codes: 0 all well; 1 an embedding differs by more than 1e-5; 2 bad input; 130 interrupted"""


class Parser(argparse.ArgumentParser):
    """Errors as one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage too."""
        raise UsageError(f"{message} (--help lists the options)")


def number(low: int, high: int | None = None) -> Any:
    """An argparse type: a whole number of at least `low`, at most `high`."""

    def parsed(text: str) -> int:
        value = int(text)
        if value < low or (high is not None and value > high):
            limits = f"at least {low}" if high is None else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"must be {limits}, got {text}")
        return value

    parsed.__name__ = "number"
    return parsed


def usable_device(name: str) -> torch.device:
    """A device that is there.

    Raises:
        UsageError: there is no such device, or it does not work.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device: {name!r} cannot be used: {reason}") from error
    return device


def parser() -> Parser:
    """Every option, in groups."""
    parser = Parser(
        prog="search",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("query", nargs="*", help="what to look for; each argument is one query")
    what = parser.add_argument_group("what is searched")
    what.add_argument("--queries", type=Path, metavar="FILE", help="more queries, one a line")
    source = what.add_mutually_exclusive_group()
    source.add_argument(
        "--texts",
        type=Path,
        metavar="FILE",
        help="search these texts (one a line, or parted by blank lines) instead of the standard"
        " library; they have no modules to tell apart, so nothing is fine-tuned",
    )
    source.add_argument(
        "--modules",
        type=lambda text: text.split(","),
        metavar="A,B,...",
        help="only these modules of the standard library",
    )
    what.add_argument("--top", type=number(1), default=5, metavar="N", help="hits (default 5)")
    how = parser.add_argument_group("how it runs")
    how.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default cpu)")
    how.add_argument(
        "--threads", type=number(1), metavar="N", help="CPU threads (default: torch's own choice)"
    )
    how.add_argument(
        "--max-tokens",
        type=number(3, POSITIONS),
        metavar="N",
        help=f"texts are cut off here (default: {LONGEST}, or as few as {SHORTEST} where embedding"
        f" would take longer than {EMBEDDING:.0f} s)",
    )
    how.add_argument(
        "--batch-tokens",
        type=number(1),
        default=4096,
        metavar="N",
        help="positions of a padded batch (default 4096)",
    )
    tuning = parser.add_argument_group("fine-tuning")
    tuning.add_argument("--no-train", action="store_true", help="leave it out")
    tuning.add_argument(
        "--steps",
        type=number(1),
        metavar="N",
        help="optimiser steps (default: as many as fit a minute, from 10 to 50)",
    )
    tuning.add_argument(
        "--batch-size", type=number(1), default=24, metavar="N", help="texts a step (default 24)"
    )
    tuning.add_argument(
        "--train-tokens",
        type=number(3, POSITIONS),
        default=64,
        metavar="N",
        help="texts are cut off here in fine-tuning (default 64)",
    )
    tuning.add_argument("--seed", type=int, default=0, metavar="N", help="default 0")
    results = parser.add_argument_group("results")
    results.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parents[1] / "out",
        metavar="FOLDER",
        help="for attention.png, losses.png and results.json (default examples/out)",
    )
    results.add_argument(
        "--layer",
        type=number(1, LAYERS),
        default=2,
        metavar="N",
        help=f"whose heads are drawn, 1 to {LAYERS} (default 2)",
    )
    results.add_argument(
        "--sentence", metavar="TEXT", help="whose words are drawn (default: the first query)"
    )
    return parser

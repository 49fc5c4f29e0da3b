"""The command line's options."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from search_demo.errors import UsageError
from search_demo.options import Parser, number

from translation.budget import FEWEST, FEWEST_COMPARED, MOST, MOST_COMPARED, RUN
from translation.catalogues import LOCALES
from translation.settings import PRECISIONS, Settings

COMMANDS = ("all", "compare", "train", "say")
OUT = Path(__file__).parents[1] / "out"
DESCRIPTION = """\
Trains a translation Transformer (nn.Transformer, attention replaced by attnfast's) on texts of
well-known programs and their translations, taken from the gettext catalogues of PyPI packages.

  all      compare, then train on, translate held-out texts and measure (default)
  compare  the same seed with torch's attention and with attnfast's, each in its own process
  train    attnfast's only, then translate held-out texts and measure
  say      translate TEXTs with the checkpoint in --out"""
EPILOG = """\
examples:
  translate                                  English to German, in seven minutes
  translate train --lang fr --steps 3000     longer, to French
  translate train --lang fr --steps 5000 --resume       go on from the checkpoint
  translate say "The file could not be opened."
  translate compare --precision bf16
  translate --pairs mine.tsv                 your pairs: source, tab, translation

exit codes: 0 all well; 1 the comparison fails; 2 bad input; 130 interrupted, checkpoint saved"""


def real(low: float, high: float = math.inf, *, open_low: bool = False) -> Any:
    """An argparse type: a number of at least `low` (or above it), at most `high`."""

    def parsed(text: str) -> float:
        value = float(text)
        if not (low <= value <= high) or (open_low and value == low):
            least = f"above {low:g}" if open_low else f"at least {low:g}"
            limits = least if high == math.inf else f"{least}, at most {high:g}"
            raise argparse.ArgumentTypeError(f"must be {limits}, got {text}")
        return value

    parsed.__name__ = "number"
    return parsed


def parser() -> Parser:
    """Every option, in groups."""
    parser = Parser(
        prog="translate",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", nargs="?", choices=COMMANDS, default="all", metavar="COMMAND")
    parser.add_argument("text", nargs="*", metavar="TEXT", help="for say: what to translate")
    _add_data(parser)
    _add_training(parser)
    _add_run(parser)
    _add_results(parser)
    return parser


def _add_data(parser: Parser) -> None:
    group = parser.add_argument_group("what is learned")
    group.add_argument(
        "--lang", default="de", metavar="LANG", help=f"{', '.join(LOCALES)} (default de)"
    )
    group.add_argument(
        "--pairs",
        type=Path,
        metavar="FILE.tsv",
        help="your own pairs instead, a line each: source, tab, translation",
    )
    group.add_argument(
        "--cache",
        type=Path,
        default=OUT / "catalogues",
        metavar="FOLDER",
        help="where the pairs of the catalogues are kept (default examples/out/catalogues)",
    )
    group.add_argument(
        "--vocabulary",
        type=number(300),
        default=6000,
        metavar="N",
        help="tokens of the byte-pair encoding, at most (default 6000)",
    )
    group.add_argument(
        "--max-tokens",
        type=number(2),
        default=64,
        metavar="N",
        help="pairs with more on a side are left out (default 64)",
    )


def _add_training(parser: Parser) -> None:
    default = Settings()
    group = parser.add_argument_group("the model and its training")

    def add(name: str, kind: Any, metavar: str, told: str) -> None:
        value = getattr(default, name.replace("-", "_"))
        group.add_argument(
            f"--{name}", type=kind, default=value, metavar=metavar, help=f"{told} (default {value})"
        )

    add("width", number(2), "E", "features of a token")
    add("heads", number(1), "H", "attention heads")
    add("layers", number(1), "N", "of the encoder, and of the decoder")
    add("feedforward", number(1), "N", "features inside a feed-forward block")
    add("dropout", real(0, 1), "P", "everywhere, in the attention kernel too")
    add("rate", real(0, open_low=True), "R", "the highest learning rate")
    add("warm-up", number(1), "N", "steps until the rate is highest")
    add("weight-decay", real(0), "W", "AdamW's, on matrices")
    add("batch-tokens", number(2), "N", "positions of a padded batch, both sides together")
    add("seed", int, "N", "of the weights, the order of the data, the dropout")
    group.add_argument(
        "--precision", choices=PRECISIONS, default="fp32", help="bf16 is autocast (default fp32)"
    )
    group.add_argument(
        "--steps",
        type=number(1),
        metavar="N",
        help=f"of the training (default: as many as fit {RUN / 60:.0f} minutes, from {FEWEST} to"
        f" {MOST}; with --resume as before)",
    )


def _add_run(parser: Parser) -> None:
    group = parser.add_argument_group("how it runs")
    group.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default cpu)")
    group.add_argument(
        "--threads", type=number(1), metavar="N", help="CPU threads (default: torch's own choice)"
    )
    group.add_argument(
        "--exact-steps",
        type=number(1),
        default=50,
        metavar="N",
        help="of the comparison without dropout (default 50)",
    )
    group.add_argument(
        "--compare-steps",
        type=number(1),
        metavar="N",
        help="of the comparison with dropout, at most --steps (default: by time, from"
        f" {FEWEST_COMPARED} to {MOST_COMPARED})",
    )
    group.add_argument(
        "--resume",
        nargs="?",
        type=Path,
        const=True,
        metavar="FILE",
        help="go on from this checkpoint (default: the one in --out), without comparing",
    )
    group.add_argument(
        "--save-every",
        type=number(0),
        default=200,
        metavar="N",
        help="steps between checkpoints, 0: only at the end and on Ctrl-C (default 200)",
    )


def _add_results(parser: Parser) -> None:
    group = parser.add_argument_group("results")
    group.add_argument(
        "--out",
        type=Path,
        default=OUT / "translation",
        metavar="FOLDER",
        help="for checkpoint.pt, pictures and results.json (default examples/out/translation)",
    )
    group.add_argument("--logdir", type=Path, metavar="FOLDER", help="log for TensorBoard there")
    group.add_argument(
        "--watch-every",
        type=number(1),
        default=25,
        metavar="N",
        help="steps between two looks at breadth, focus and max logit (default 25)",
    )
    group.add_argument(
        "--beam", type=number(1), default=4, metavar="K", help="hypotheses of a beam (default 4)"
    )
    group.add_argument(
        "--sentence",
        metavar="TEXT",
        help="whose cross-attention is drawn (default: held out)",
    )


def settings_of(options: argparse.Namespace) -> Settings:
    """The settings that the options give.

    Raises:
        UsageError: options that do not go together, or an unknown language.
    """
    if options.lang not in LOCALES:
        raise UsageError(f"--lang: must be one of {', '.join(LOCALES)}, got {options.lang!r}")
    if options.width % options.heads or options.width % 2:
        raise UsageError(
            f"--width: must be even and a multiple of --heads {options.heads}, got {options.width}"
        )
    if options.text and options.command != "say":
        raise UsageError(f"TEXT: only say takes texts, got {options.text[0]!r}")
    if options.command == "say" and not any(text.strip() for text in options.text):
        raise UsageError("say: needs a TEXT to translate")
    if options.command == "compare" and options.resume:
        raise UsageError("--resume: compare always starts afresh")
    names = Settings().as_dict()
    return Settings(**{name: getattr(options, name) for name in names})

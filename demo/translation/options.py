"""The translation's options."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from demo.budget import COMPARED, RUN, TRAINED
from demo.command import UsageError
from demo.options import OUT, Parser, add, add_run, number, real
from demo.translation.catalogues import LOCALES
from demo.translation.settings import PRECISIONS, Settings

COMMANDS = ("all", "compare", "train", "say")
DESCRIPTION = """\
Trains a translation Transformer (nn.Transformer, attention replaced by attnfast's) on texts of
well-known programs and their translations, taken from the gettext catalogues of PyPI packages.

  all      compare, then train on, translate held-out texts and measure (default)
  compare  the same seed with torch's attention and with attnfast's, each in its own process
  train    attnfast's only, then translate held-out texts and measure
  say      translate TEXTs with the checkpoint in --out"""
EPILOG = """\
without arguments: English to German, in seven minutes; for example
  train --lang fr --steps 3000               longer, to French
  train --lang fr --steps 5000 --resume      go on from the checkpoint
  say "The file could not be opened."
  compare --precision bf16
  --pairs mine.tsv                           your pairs: source, tab, translation

exit codes: 0 all well; 1 the comparison fails; 2 bad input; 130 interrupted, checkpoint saved"""


def parser() -> Parser:
    """Every option, in groups."""
    parser = Parser("demo.translation", DESCRIPTION, EPILOG)
    parser.add_argument("command", nargs="?", choices=COMMANDS, default="all", metavar="COMMAND")
    parser.add_argument("text", nargs="*", metavar="TEXT", help="for say: what to translate")
    data = parser.add_argument_group("what is learned")
    add(data, "--lang", str, "LANG", ", ".join(LOCALES), "de")
    told = "your own pairs instead, a line each: source, tab, translation"
    add(data, "--pairs", Path, "FILE.tsv", told)
    told = "where the pairs of the catalogues are kept"
    add(data, "--cache", Path, "FOLDER", told, OUT / "catalogues")
    add(data, "--vocabulary", number(300), "N", "tokens of the byte-pair encoding, at most", 6000)
    add(data, "--max-tokens", number(2), "N", "pairs with more on a side are left out", 64)
    _add_training(parser.add_argument_group("the model and its training"))
    _add_run(add_run(parser))
    results = parser.add_argument_group("results")
    told = "for checkpoint.pt, pictures and results.json"
    add(results, "--out", Path, "FOLDER", told, OUT / "translation")
    add(results, "--logdir", Path, "FOLDER", "log for TensorBoard there")
    told = "steps between two looks at breadth, focus and max logit"
    add(results, "--watch-every", number(1), "N", told, 25)
    add(results, "--beam", number(1), "K", "hypotheses of a beam", 4)
    add(results, "--sentence", str, "TEXT", "whose cross-attention is drawn (default: held out)")
    return parser


def _add_training(group: Any) -> None:
    for name, kind, metavar, told in (
        ("width", number(2), "E", "features of a token"),
        ("heads", number(1), "H", "attention heads"),
        ("layers", number(1), "N", "of the encoder, and of the decoder"),
        ("feedforward", number(1), "N", "features inside a feed-forward block"),
        ("dropout", real(0, 1), "P", "everywhere, in the attention kernel too"),
        ("rate", real(0, open_low=True), "R", "the highest learning rate"),
        ("warm_up", number(1), "N", "steps until the rate is highest"),
        ("weight_decay", real(0), "W", "AdamW's, on matrices"),
        ("batch_tokens", number(2), "N", "positions of a padded batch, both sides together"),
        ("seed", int, "N", "of the weights, the order of the data, the dropout"),
    ):
        option = f"--{name.replace('_', '-')}"
        add(group, option, kind, metavar, told, getattr(Settings(), name))
    group.add_argument(
        "--precision", choices=PRECISIONS, default="fp32", help="bf16 is autocast (default fp32)"
    )
    fitting = f"as many as fit {RUN / 60:.0f} minutes, from {TRAINED.least} to {TRAINED.most}"
    told = f"of the training (default: {fitting}; with --resume as before)"
    add(group, "--steps", number(1), "N", told)


def _add_run(group: Any) -> None:
    add(group, "--exact-steps", number(1), "N", "of the comparison without dropout", 50)
    told = "of the comparison with dropout, at most --steps (default: by time, from"
    told += f" {COMPARED.least} to {COMPARED.most})"
    add(group, "--compare-steps", number(1), "N", told)
    told = "go on from this checkpoint (default: the one in --out), without comparing"
    add(group, "--resume", Path, "FILE", told, nargs="?", const=True)
    told = "steps between checkpoints, 0: only at the end and on Ctrl-C"
    add(group, "--save-every", number(0), "N", told, 200)


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

"""A training whose attention goes wrong, plain and steered; `python -m demo.collapse --help`.

The translation Transformer of `demo.translation`, at a rate far above its own: as it is, with
`attnfast.lens.BalanceLoss`, and with `attnfast.lens.QKClip`, from the same seed and data.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import attnfast
from attnfast import lens
from demo.command import guarded
from demo.files import output_folder, write_json
from demo.measure import now
from demo.options import OUT, Parser, add, add_run, number, real, set_up
from demo.report import console, heading, plain, show, table, versions
from demo.translation.batches import Batch
from demo.translation.catalogues import cached_pairs
from demo.translation.pairs import read_pairs, split_pairs
from demo.translation.settings import Settings
from demo.translation.tokens import Data, prepare
from demo.translation.train import Trainer

DESCRIPTION = """\
Trains the demo's translation Transformer three times at a learning rate at which its attention goes
wrong: as it is, with attnfast.lens.BalanceLoss, and with attnfast.lens.QKClip. Prints losses,
entropy and the largest logit side by side and writes them as JSON."""
BATCH = 512  # padded positions
LOOKS = 10  # steps between two looks at the heads
LAST = 20  # steps whose mean is the final loss
ROWS = 8  # of the table of losses


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return guarded("collapse", lambda: run(arguments))


def run(arguments: Sequence[str] | None) -> int:
    """Train three times, print and write.

    Raises:
        UsageError: bad input.
    """
    options = parser().parse_args(arguments)
    device, folder = set_up(options), output_folder(options.out)
    began = now(device)
    settings = Settings(
        rate=options.rate, warm_up=options.warm_up, seed=options.seed, batch_tokens=BATCH
    )
    own = options.pairs
    pairs = cached_pairs("de", options.cache) if own is None else read_pairs(own)
    data = prepare(split_pairs(pairs, settings.seed), 6000, 64)
    out = console()
    plain(out, versions(device))
    told = (
        f"rate {settings.rate:g} after {settings.warm_up} steps; the demo's is {Settings().rate:g}"
    )
    plain(out, f"{len(data.train):,} pairs, {options.steps} steps each; {told}")
    made = {
        name: train(data, settings, options, name) for name in ("plain", "BalanceLoss", "QKClip")
    }
    heading(out, "The same training, plain and steered")
    show_runs(out, made, options.steps)
    given = {name: getattr(options, name) for name in ("steps", "floor", "weight", "limit")}
    described = {"settings": settings.as_dict(), **given, "versions": versions(device)}
    write_json(folder / "collapse.json", {**described, "runs": made})
    plain(out, f"{folder / 'collapse.json'}; {now(device) - began:.0f} s in all")
    return 0


def parser() -> Parser:
    """Every option."""
    made = Parser("demo.collapse", DESCRIPTION, "")
    add(made, "--pairs", Path, "FILE.tsv", "your own pairs, a line each: source, tab, translation")
    add(made, "--cache", Path, "FOLDER", "where the catalogues' pairs are kept", OUT / "catalogues")
    add(made, "--steps", number(2 * LOOKS), "N", "of each training", 200)
    add(made, "--rate", real(0, open_low=True), "R", "the highest learning rate", 0.03)
    add(made, "--warm-up", number(1), "N", "steps until the rate is highest", 20)
    add(made, "--seed", int, "N", "of weights, data and dropout", 0)
    add(made, "--floor", real(0, 1), "F", "of BalanceLoss, as a share of the largest entropy", 0.3)
    add(made, "--weight", real(0), "W", "of BalanceLoss", 1.0)
    add(made, "--limit", real(0, open_low=True), "L", "of QKClip", 100.0)
    add(made, "--out", Path, "FOLDER", "for collapse.json", OUT / "collapse")
    add_run(made)
    return made


class Steered(Trainer):
    """Adds the loss of a balance, if there is one, and keeps the losses without it."""

    balance: lens.BalanceLoss | None = None

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.kept: list[float] = []

    def _loss(self, batch: Batch) -> Tensor:
        loss = super()._loss(batch)
        if torch.is_grad_enabled():
            self.kept.append(loss.item())
        return loss if self.balance is None else loss + self.balance()


def train(data: Data, settings: Settings, options: argparse.Namespace, name: str) -> dict[str, Any]:
    """Train once; what came of it."""
    model = settings.build(data.tokenizer.get_vocab_size()).to(options.device)
    attnfast.replace(model, verbose=False)
    torch.manual_seed(settings.seed)
    trainer = Steered(model, data, settings)
    looks: list[dict[str, float]] = []
    clipped = 0

    def count(*_: Any) -> None:
        nonlocal clipped
        clipped += sum(int((factors < 1).sum()) for factors in clip.factors.values())

    with contextlib.ExitStack() as stack:
        monitor = lens.Monitor(model, every=LOOKS, out=Rows(looks), floor=0, limit=float("inf"))
        stack.enter_context(monitor)
        if name == "BalanceLoss":
            given = {"floor": options.floor, "unit": "share", "weight": options.weight}
            trainer.balance = stack.enter_context(lens.BalanceLoss(model, **given))
        elif name == "QKClip":
            clip = stack.enter_context(lens.QKClip(model, options.limit).attach(trainer.optimiser))
            trainer.optimiser.register_step_post_hook(count)
        trainer.train(options.steps, save=lambda: None, label=name)
    return {
        "losses": trainer.kept,
        "held_out": trainer.held_out_loss(),
        "seconds": trainer.seconds,
        "looks": looks,
        "heads_clipped": clipped,
    }


class Rows:
    """Takes a monitor's looks: of all heads the least and mean entropy, and the largest logit."""

    def __init__(self, looks: list[dict[str, float]]) -> None:
        self.looks = looks

    def log(self, row: dict[str, float]) -> None:
        """One look."""
        entropy = [x for name, x in row.items() if name.startswith("entropy/")]
        logits = [x for name, x in row.items() if name.startswith("max_logit/")]
        found = {"least_entropy": min(entropy), "mean_entropy": statistics.mean(entropy)}
        self.looks.append({"step": row["lens/step"], **found, "max_logit": max(logits)})


def show_runs(out: Console, made: dict[str, dict[str, Any]], steps: int) -> None:
    """Print losses and what the heads did, a column for each run."""
    columns = table("", *made)
    for begin, end in spans(steps):
        means = (statistics.mean(found["losses"][begin:end]) for found in made.values())
        columns.add_row(f"loss, steps {begin + 1} to {end}", *(f"{x:.3f}" for x in means))
    last = (statistics.mean(found["losses"][-LAST:]) for found in made.values())
    columns.add_row(f"loss, last {LAST} steps", *(f"{x:.3f}" for x in last))
    columns.add_row("loss, held out", *(f"{found['held_out']:.3f}" for found in made.values()))
    for name, told in (
        ("least_entropy", "entropy of the sharpest head, nats"),
        ("mean_entropy", "mean entropy, nats"),
        ("max_logit", "largest logit"),
    ):
        for when, place in (("first", 0), ("last", -1)):
            values = (found["looks"][place][name] for found in made.values())
            columns.add_row(f"{told}, {when} look", *(f"{x:.3g}" for x in values))
    largest = (max(look["max_logit"] for look in found["looks"]) for found in made.values())
    columns.add_row("largest logit of all looks", *(f"{x:.3g}" for x in largest))
    columns.add_row("heads clipped, all steps", *(f"{x['heads_clipped']}" for x in made.values()))
    medians = (statistics.median(found["seconds"]) * 1e3 for found in made.values())
    columns.add_row("a step, ms (median)", *(f"{x:.0f}" for x in medians))
    show(out, columns)


def spans(steps: int) -> Iterator[tuple[int, int]]:
    """The steps in so many stretches."""
    length = -(-steps // ROWS)
    for begin in range(0, steps, length):
        yield begin, min(begin + length, steps)


if __name__ == "__main__":
    sys.exit(main())

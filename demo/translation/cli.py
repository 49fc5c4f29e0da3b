"""The command: what it does, in order."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from tokenizers import Tokenizer

import attnfast
from demo import budget
from demo.command import guarded
from demo.files import output_folder, write_json
from demo.measure import ATTNFAST, TORCH, now
from demo.options import set_up
from demo.picture import draw_losses
from demo.report import console, heading, plain, versions
from demo.translation import checkpoint, metrics, report
from demo.translation.catalogues import cached_pairs
from demo.translation.compare import LAST, UNTIMED, Comparison, compare_dropout, compare_exact
from demo.translation.decode import translate
from demo.translation.interrupt import Interrupted
from demo.translation.look import cross_attention
from demo.translation.model import Translator
from demo.translation.options import parser, settings_of
from demo.translation.pairs import read_pairs, split_pairs
from demo.translation.picture import draw_cross_attention, draw_habits
from demo.translation.report import Decoded
from demo.translation.settings import Settings
from demo.translation.tokens import Data, encode, pieces, prepare
from demo.translation.train import Trainer

CHECKPOINT = "checkpoint.pt"
SHOWN = 8  # translations
SMOOTHED = 20  # steps, in the picture of the losses
UNCACHED = 100  # texts that are translated again without the cache
LONGEST_SENTENCE = 20  # tokens that still make a readable map


class Job(NamedTuple):
    """What the options ask for, loaded."""

    options: argparse.Namespace
    settings: Settings
    device: torch.device
    folder: Path  # for results
    data: Data
    started: float  # by time.perf_counter

    @property
    def elapsed(self) -> float:
        """Seconds since the run began."""
        return time.perf_counter() - self.started


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""

    def command() -> int:
        options = parser().parse_args(arguments)
        return say(options) if options.command == "say" else run(options)

    return guarded("translate", command)


def run(options: argparse.Namespace) -> int:
    """Everything but `say`, in the order in which it is printed.

    Raises:
        UsageError: bad input.
    """
    started = time.perf_counter()
    settings = settings_of(options)
    device = set_up(options)
    folder = output_folder(options.out)
    resumed = None
    path = _checkpoint(options, folder)
    if options.resume:
        resumed = checkpoint.read(path, device)
    job = Job(options, settings, device, folder, _data(options, settings), started)
    if resumed is not None:
        checkpoint.check(resumed, path, settings, job.data)
    out = console()
    described = _describe(job)
    plain(out, described)
    results: dict[str, Any] = {"described": described, "settings": settings.as_dict()}

    compared: dict[str, Comparison] = {}
    if options.command != "train" and resumed is None:
        compared = _compare(out, job)
        results["comparison"] = {
            name: {**c._asdict(), "outcomes": {k: o._asdict() for k, o in c.outcomes.items()}}
            for name, c in compared.items()
        }
        if options.command == "all":
            resumed = checkpoint.read(job.folder / CHECKPOINT, device)
    if options.command != "compare":
        trainer = _trainer(job, resumed)
        heading(out, "Training")
        trainer.goal, why = _steps(job, trainer)
        plain(out, f"{trainer.goal} steps, {why}")
        _train_to(job, trainer, trainer.goal)
        results |= _measure(out, job, trainer)
        losses = {ATTNFAST: trainer.losses}
        if compared:
            losses = {TORCH: compared["dropout"].outcomes[TORCH].losses, **losses}
        title = "The training loss comes down to {}"
        draw_losses(
            job.folder / "losses.png", losses, "loss of a token, with dropout", title, SMOOTHED
        )
        plain(out, str(job.folder / "losses.png"))
    write_json(job.folder / "results.json", results)
    heading(out, f"done in {time.perf_counter() - started:.0f} s")
    failed = [name for name, comparison in compared.items() if not comparison.agree]
    for name in failed:
        c = compared[name]
        told = f"{name}: torch and attnfast are apart by {c.difference:.1e} > {c.tolerance:g}"
        print(f"translate: {told}", file=sys.stderr)
    return 1 if failed else 0


def say(options: argparse.Namespace) -> int:
    """Translate the texts given with a checkpoint's model.

    Raises:
        UsageError: no text, or no such checkpoint.
    """
    settings_of(options)
    device = set_up(options)
    state = checkpoint.read(_checkpoint(options, options.out), device)
    model = Settings(**state["settings"]).build(state["vocabulary"]).to(device)
    model.load_state_dict(state["model"])
    attnfast.replace(model, verbose=False)
    tokenizer = Tokenizer.from_str(state["tokenizer"])
    texts = [text for text in options.text if text.strip()]
    for ids in translate(model, encode(tokenizer, texts), options.beam):
        print(tokenizer.decode(ids))
    return 0


def _checkpoint(options: argparse.Namespace, folder: Path) -> Path:
    """The file that --resume names, or the one in --out."""
    return options.resume if isinstance(options.resume, Path) else folder / CHECKPOINT


def _data(options: argparse.Namespace, settings: Settings) -> Data:
    """The pairs as tokens, some of them held out."""
    if options.pairs is not None:
        pairs = read_pairs(options.pairs)
    else:
        pairs = cached_pairs(options.lang, options.cache)
    return prepare(split_pairs(pairs, settings.seed), options.vocabulary, options.max_tokens)


def _describe(job: Job) -> str:
    """What runs on what."""
    data, settings = job.data, job.settings
    model = settings.build(data.tokenizer.get_vocab_size())
    parameters = sum(p.numel() for p in model.parameters())
    tokens = sum(len(e.source) + len(e.target) for e in data.train)
    pairs = job.options.pairs or f"en-{job.options.lang}"
    return (
        f"{versions(job.device)}, {settings.precision}\n"
        f"{pairs}: {len(data.train):,} pairs to learn from, {tokens:,} tokens;"
        f" {len(data.held_out)} held out\n"
        f"{settings.layers} + {settings.layers} layers of {settings.heads} heads, width"
        f" {settings.width}, {data.tokenizer.get_vocab_size():,} tokens, {parameters:,} parameters"
    )


def _compare(out: Console, job: Job) -> dict[str, Comparison]:
    """Train twice without and twice with dropout, and print what came of it."""
    options = job.options
    steps = options.exact_steps
    heading(out, f"The same training twice, without dropout, {steps} steps")
    exact = compare_exact(job.data, job.settings, steps, job.device)
    report.comparison(out, exact, "the losses of every step")
    each = max(outcome.step_seconds for outcome in exact.outcomes.values())
    steps = options.compare_steps or budget.compared_steps(job.elapsed, each)
    steps = min(steps, options.steps or steps)
    heading(out, f"The same training twice, dropout {job.settings.dropout:g}, {steps} steps")
    ours: dict[str, Any] = {}
    if options.command == "all":  # whose training goes on afterwards
        ours["checkpoint"] = str(job.folder / CHECKPOINT)
        ours["goal"] = options.steps
        ours["watch_every"] = options.watch_every
    if options.logdir is not None:
        ours |= {"logdir": str(options.logdir), "watch_every": options.watch_every}
    dropout = compare_dropout(job.data, job.settings, steps, job.device, **ours)
    told = f"the final losses, of the last {LAST} steps and held out"
    report.comparison(out, dropout, told)
    plain(out, "memory: what training adds to the process with its model and data at its highest")
    return {"exact": exact, "dropout": dropout}


def _trainer(job: Job, resumed: dict[str, Any] | None) -> Trainer:
    """A model with our attention, at its start or where the checkpoint left it."""
    model = job.settings.build(job.data.tokenizer.get_vocab_size()).to(job.device)
    attnfast.replace(model, verbose=False)
    torch.manual_seed(job.settings.seed)
    options = job.options
    trainer = Trainer(model, job.data, job.settings, options.watch_every, options.logdir)
    if resumed is not None:
        checkpoint.restore(resumed, trainer)
    return trainer


def _steps(job: Job, trainer: Trainer) -> tuple[int, str]:
    """How many steps to train in all, and why so many.

    Raises:
        Interrupted: by Ctrl-C in the first steps, which are timed; the checkpoint is saved.
    """
    if job.options.steps is not None:
        return job.options.steps, "as asked"
    if trainer.goal is not None:
        return trainer.goal, "as decided when this training began"
    if trainer.steps < budget.FIRST:
        _train_to(job, trainer, budget.FIRST)
    each = statistics.median(trainer.seconds[UNTIMED:])
    return budget.training_steps(trainer.steps, job.elapsed, each), (
        f"from {budget.TRAINED.least} to {budget.TRAINED.most}: one takes {each:.2f} s here,"
        f" {job.elapsed:.0f} s of {budget.RUN:.0f} are over, and measuring takes"
        f" {budget.MEASURING * each:.0f} s (--steps)"
    )


def _train_to(job: Job, trainer: Trainer, steps: int) -> None:
    """Train until so many steps are done.

    Raises:
        Interrupted: by Ctrl-C; the checkpoint is saved.
    """
    path = job.folder / CHECKPOINT
    save, save_every = lambda: checkpoint.save(trainer, path), job.options.save_every
    if not trainer.train(steps, save=save, save_every=save_every):
        raise Interrupted(trainer.steps, path)


def _measure(out: Console, job: Job, trainer: Trainer) -> dict[str, Any]:
    """Losses, attention, scores and translations of the trained model, printed and for a file."""
    data, model = job.data, trainer.model
    held_out = trainer.held_out_loss()
    first, last = (sum(x) / len(x) for x in (trainer.losses[:LAST], trainer.losses[-LAST:]))
    seconds = sum(trainer.seconds)
    plain(
        out,
        f"loss: first {LAST} steps {first:.3f}, last {LAST} {last:.3f}, held out {held_out:.3f};"
        f" {seconds:.0f} s, {sum(trainer.tokens) / seconds:,.0f} tokens/s",
    )
    report.habits(out, trainer.looks)
    draw_habits(job.folder / "habits.png", trainer.looks)
    plain(out, str(job.folder / "habits.png"))

    heading(out, f"Translating {len(data.held_out)} held-out texts")
    tokens = metrics.token_scores(model, data, job.settings.batch_tokens)
    report.token_scores(out, tokens)
    decoded, uncached = _decode(job, trainer)
    out.print()
    report.text_scores(out, decoded)
    plain(
        out,
        f"greedy, {uncached.texts} texts: {uncached.cached_seconds:.1f} s with the key-value cache,"
        f" {uncached.seconds:.1f} s without; {uncached.same} translations the same",
    )
    out.print()
    rows = range(min(SHOWN, len(data.texts)))
    texts = {name: found.texts for name, found in decoded.items()}
    report.translations(out, data.texts, texts, rows)

    heading(out, "Where the translation looks")
    plain(out, str(_draw_sentence(job, trainer)))
    return {
        "losses": trainer.losses,
        "held_out": held_out,
        "seconds": trainer.seconds,
        "looks": [_listed(look._asdict()) for look in trainer.looks],
        "tokens": tokens._asdict(),
        "decoded": {
            name: {"scores": d.scores._asdict(), "seconds": d.seconds, "texts": d.texts}
            for name, d in decoded.items()
        },
        "uncached": uncached._asdict(),
    }


class Uncached(NamedTuple):
    """Greedy decoding by the whole decoder at every token, against the key-value cache."""

    texts: int
    cached_seconds: float
    seconds: float
    same: int  # translations


def _decode(job: Job, trainer: Trainer) -> tuple[dict[str, Decoded], Uncached]:
    """The held-out texts translated greedily and by beam search; and greedily without a cache."""
    data, model, beam = job.data, trainer.model, job.options.beam
    sources = [example.source for example in data.held_out]
    references = [pair.target for pair in data.texts]
    ways = {"greedy": 1, f"beam of {beam}": beam}
    decoded = {}
    for name, width in ways.items():
        started = now(job.device)
        ids = translate(model, sources, width, label=name)
        seconds = now(job.device) - started
        texts = data.tokenizer.decode_batch(ids)
        scores = metrics.text_scores(texts, references, job.options.lang)
        decoded[name] = Decoded(texts, scores, seconds)
    return decoded, _without_cache(model, sources[:UNCACHED], job.device)


def _without_cache(
    model: Translator, sources: Sequence[Sequence[int]], device: torch.device
) -> Uncached:
    """The same texts greedily with and without the cache."""
    found, seconds = {}, {}
    for cached in (True, False):
        started = now(device)
        label = f"greedy {'with' if cached else 'without'} cache"
        found[cached] = translate(model, sources, 1, cached=cached, label=label)
        seconds[cached] = now(device) - started
    same = sum(map(list.__eq__, found[True], found[False]))
    return Uncached(len(sources), seconds[True], seconds[False], same)


def _draw_sentence(job: Job, trainer: Trainer) -> Path:
    """Save the last layer's maps of one sentence and its own translation; returns the path."""
    data, model = job.data, trainer.model
    if job.options.sentence:
        source = encode(data.tokenizer, [job.options.sentence])[0]
    else:
        wanted = min(LONGEST_SENTENCE, 12)
        source = min((e.source for e in data.held_out), key=lambda ids: abs(len(ids) - wanted))
    source = source[:LONGEST_SENTENCE]
    target = translate(model, [source], job.options.beam)[0][:LONGEST_SENTENCE]
    maps, told = cross_attention(model, source, target)
    path = job.folder / "cross_attention.png"
    layer = len(maps) - 1
    names = pieces(data.tokenizer, source), pieces(data.tokenizer, told)
    draw_cross_attention(path, maps[layer], *names, layer)
    return path


def _listed(value: Any) -> Any:
    """Tensors as lists, for JSON."""
    if isinstance(value, dict):
        return {name: _listed(part) for name, part in value.items()}
    return value.tolist() if isinstance(value, torch.Tensor) else value

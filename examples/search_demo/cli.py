"""The command line: what it takes, what it does, in order."""

from __future__ import annotations

import argparse
import copy
import json
import platform
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

import attnfast
from attnfast import replace
from search_demo import report
from search_demo.corpus import Document, collect_stdlib, read_queries, read_texts
from search_demo.encoder import (
    LAYERS,
    POSITIONS,
    Batch,
    SentenceEncoder,
    length_sorted,
    load_encoder,
    load_tokenizer,
    pad,
)
from search_demo.errors import UsageError
from search_demo.files import output_folder, written_whole
from search_demo.finetune import Outcome, fine_tune, split_by_module
from search_demo.look import AttentionWatch, sentence_maps
from search_demo.measure import ATTNFAST, TORCH, attention_share, embed
from search_demo.memory import peak_memory
from search_demo.picture import draw_attention, draw_losses

QUERIES = (
    "how do I read a zip archive",
    "parse the arguments of a command line",
    "run another program and catch what it prints",
    "the middle value of a list of numbers",
    "wait for many network connections at once",
)
TOLERANCE = 1e-5
PROFILED = 5  # batches, spread over all lengths
DROPOUT = 0.1
LONGEST_SENTENCE = 24  # tokens that still make a readable map

DESCRIPTION = """\
Semantic search over the docstrings of Python's standard library with a trained sentence encoder
(MiniLM, 6 layers of 12 heads), once with torch's attention and once with attnfast's. Prints the
hits side by side, the largest difference of any embedding, time, memory and attention's share;
draws where words look; fine-tunes both to tell modules apart."""
EPILOG = """\
examples:
  search                                     a few queries of its own, about four minutes
  search "how do I read a zip archive"       your question
  search --no-train --modules zipfile,tarfile "open a compressed file"
  search --texts notes.txt "who pays?"       your texts: one a line, or parted by blank lines

exit codes: 0 all well; 1 an embedding differs by more than 1e-5; 2 bad input; 130 interrupted"""


class Parser(argparse.ArgumentParser):
    """Errors as one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage too."""
        raise UsageError(f"{message} (--help lists the options)")


def _number(low: int, high: int | None = None) -> Any:
    """An argparse type: a whole number of at least `low`, at most `high`."""

    def number(text: str) -> int:
        value = int(text)
        if value < low or (high is not None and value > high):
            limits = f"at least {low}" if high is None else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"must be {limits}, got {text}")
        return value

    number.__name__ = "number"
    return number


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
    what.add_argument("--top", type=_number(1), default=5, metavar="N", help="hits (default 5)")
    how = parser.add_argument_group("how it runs")
    how.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default cpu)")
    how.add_argument(
        "--threads", type=_number(1), metavar="N", help="CPU threads (default: torch's own choice)"
    )
    how.add_argument(
        "--max-tokens",
        type=_number(3, POSITIONS),
        default=256,
        metavar="N",
        help="texts are cut off here (default 256)",
    )
    how.add_argument(
        "--batch-tokens",
        type=_number(1),
        default=4096,
        metavar="N",
        help="positions of a padded batch (default 4096)",
    )
    tuning = parser.add_argument_group("fine-tuning")
    tuning.add_argument("--no-train", action="store_true", help="leave it out")
    tuning.add_argument(
        "--steps", type=_number(1), default=50, metavar="N", help="optimiser steps (default 50)"
    )
    tuning.add_argument(
        "--batch-size", type=_number(1), default=24, metavar="N", help="texts a step (default 24)"
    )
    tuning.add_argument(
        "--train-tokens",
        type=_number(3, POSITIONS),
        default=96,
        metavar="N",
        help="texts are cut off here in fine-tuning (default 96)",
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
        type=_number(1, LAYERS),
        default=2,
        metavar="N",
        help=f"whose heads are drawn, 1 to {LAYERS} (default 2)",
    )
    results.add_argument(
        "--sentence", metavar="TEXT", help="whose words are drawn (default: the first query)"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    try:
        return run(parser().parse_args(arguments))
    except UsageError as error:
        print(f"search: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nsearch: interrupted", file=sys.stderr)
        return 130


def run(options: argparse.Namespace) -> int:
    """Everything, in the order in which it is printed.

    Raises:
        UsageError: bad input.
    """
    started = time.perf_counter()
    warnings.filterwarnings("ignore", "The PyTorch API of nested tensors")
    device = _device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    queries = list(options.query) + (read_queries(options.queries) if options.queries else [])
    if any(not query.strip() for query in queries):
        raise UsageError("a query is empty")
    queries = queries or list(QUERIES)
    documents = read_texts(options.texts) if options.texts else None
    folder = output_folder(options.out)
    stock = load_encoder(DROPOUT)
    tokenizer = load_tokenizer(options.max_tokens)
    documents = documents or collect_stdlib(options.modules)

    out = report.console()
    ours = copy.deepcopy(stock)
    replace(ours)
    models = {TORCH: stock.to(device), ATTNFAST: ours.to(device)}
    texts = [document.text for document in documents] + queries
    ids = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    batches = list(length_sorted(ids, options.batch_tokens))
    described = _describe(device, documents, ids, batches)
    report.plain(out, described)

    with AttentionWatch(ours) as watch:
        embeddings, seconds = embed(models, batches, device, watch)
    explained = _explain_layer(models[ATTNFAST], batches[len(batches) // 2], device, options.layer)
    every = max(1, len(batches) // PROFILED)
    shares = {
        name: attention_share(model, batches[every // 2 :: every], device)
        for name, model in models.items()
    }
    memory = {name: peak_memory(name, batches[-2:], device) for name in models}

    report.heading(out, "Hits (cosine similarity, name)")
    answers = {}
    for row, query in enumerate(queries, len(documents)):
        scores = {name: x[: len(documents)] @ x[row] for name, x in embeddings.items()}
        report.hits(out, query, scores, documents, options.top)
        answers[query] = _answers(scores, documents, options.top)
    difference = (embeddings[TORCH] - embeddings[ATTNFAST]).abs().max().item()
    report.heading(out, "The same answers")
    agree = difference <= TOLERANCE  # False for NaN
    verdict = "within" if agree else "MORE THAN"
    report.plain(out, f"largest difference of any embedding: {difference:.1e}, {verdict} 1e-5")
    report.heading(out, f"What it costs, {torch.get_num_threads()} threads")
    report.costs(out, seconds, memory, shares)
    report.heading(out, f"explain() of layer {options.layer}, one batch")
    report.plain(out, explained)

    sentence = options.sentence or queries[0]
    encoding = tokenizer.encode(sentence)
    length = min(len(encoding.ids), LONGEST_SENTENCE)
    one = pad([encoding.ids[:length]], [0]).to(device)
    maps = sentence_maps(models[ATTNFAST], one)[options.layer - 1]
    picture = folder / "attention.png"
    draw_attention(
        picture, maps, encoding.tokens[:length], options.layer - 1, watch.breadth, watch.focus
    )
    report.heading(out, "Where the words look")
    report.plain(out, str(picture))

    results = {
        "described": described,
        "difference": difference,
        "hits": answers,
        "seconds": seconds,
        "peak_bytes": memory,
        "attention_share": {name: share._asdict() for name, share in shares.items()},
        "breadth": watch.breadth.tolist(),
        "focus": watch.focus.tolist(),
    }
    outcomes = None if options.no_train else _fine_tune(options, models, documents, ids, device)
    if outcomes:
        report.heading(out, "Fine-tuning: which module is a docstring from?")
        report.losses(out, outcomes)
        out.print()
        report.classification(out, outcomes)
        losses = folder / "losses.png"
        draw_losses(losses, {name: outcome.losses for name, outcome in outcomes.items()})
        report.plain(out, str(losses))
        results["fine_tuning"] = {name: o._asdict() for name, o in outcomes.items()}
    elif not options.no_train:
        report.heading(out, "Fine-tuning: left out, too few modules with enough docstrings")
    with written_whole(folder / "results.json") as temporary:
        temporary.write_text(json.dumps(results, indent=1))
    report.heading(out, f"done in {time.perf_counter() - started:.0f} s")
    if not agree:
        print(f"search: the embeddings differ by {difference:.1e} > 1e-5", file=sys.stderr)
    return 0 if agree else 1


def _device(name: str) -> torch.device:
    """A device that is there."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device: {name!r} cannot be used: {reason}") from error
    return device


def _describe(
    device: torch.device,
    documents: Sequence[Document],
    ids: Sequence[Sequence[int]],
    batches: Sequence[Batch],
) -> str:
    """What runs on what."""
    tokens, padded = sum(map(len, ids)), sum(batch.tokens.numel() for batch in batches)
    versions = f"attnfast {attnfast.__version__}, torch {torch.__version__}"
    return (
        f"{versions}, Python {platform.python_version()}, {device},"
        f" {torch.get_num_threads()} threads\n"
        f"{len(documents):,} texts and {len(ids) - len(documents)} queries,"
        f" {tokens:,} tokens in {len(batches)} batches, {1 - tokens / padded:.1%} padding"
    )


def _explain_layer(model: SentenceEncoder, batch: Batch, device: torch.device, layer: int) -> str:
    """What `attnfast.explain` says about one layer's attention over a batch."""
    batch = batch.to(device)
    with torch.inference_mode(), AttentionWatch(model) as watch:
        model(batch.tokens, batch.padding)
        q, k, mask = watch.layer_call(layer - 1, batch.padding)
        return attnfast.explain(q, k, k, mask=mask)


def _answers(
    scores: dict[str, Tensor], documents: Sequence[Document], top: int
) -> dict[str, list[tuple[str, float]]]:
    """The best texts' names and scores, by model."""
    answers = {}
    for name, values in scores.items():
        best = values.topk(min(top, len(documents)))
        answers[name] = [
            (documents[i].name, score)
            for score, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
    return answers


def _fine_tune(
    options: argparse.Namespace,
    models: dict[str, SentenceEncoder],
    documents: Sequence[Document],
    ids: Sequence[Sequence[int]],
    device: torch.device,
) -> dict[str, Outcome] | None:
    """Both models' outcomes; None where the texts have no modules to tell apart."""
    split = split_by_module(documents, options.seed)
    if split is None:
        return None
    return fine_tune(
        models,
        ids,
        split,
        steps=options.steps,
        batch_size=options.batch_size,
        max_tokens=options.train_tokens,
        dropout=DROPOUT,
        seed=options.seed,
        device=device,
    )

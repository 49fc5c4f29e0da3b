"""The command: what it does, in order."""

from __future__ import annotations

import argparse
import copy
import sys
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from tokenizers import Tokenizer
from torch import Tensor

import attnfast
from attnfast import replace
from demo import budget
from demo.command import UsageError, guarded
from demo.files import output_folder, write_json
from demo.measure import ATTNFAST, TORCH
from demo.options import set_up
from demo.picture import draw_losses
from demo.report import console, heading, plain, versions
from demo.search import report
from demo.search.corpus import Document, collect_stdlib, read_queries, read_texts
from demo.search.encoder import (
    Batch,
    SentenceEncoder,
    length_sorted,
    load_encoder,
    load_tokenizer,
    pad,
)
from demo.search.finetune import Outcome, fine_tune, split_by_module
from demo.search.look import AttentionWatch, sentence_maps
from demo.search.measure import Share, attention_share, embed, token_seconds
from demo.search.memory import peak_memory
from demo.search.options import parser
from demo.search.picture import draw_attention
from demo.search.report import Hit

QUERIES = (
    "how do I read a zip archive",
    "make a temporary folder that is deleted afterwards",
    "cache the results of a slow function",
    "the middle value of a list of numbers",
    "find files whose names match a pattern",
)
TOLERANCE = 1e-5
PROFILED, PART = 5, 4  # batches, spread over all lengths; the fourth part of their texts
LARGEST = 2  # batches whose memory is measured
MEASURED = f"""\
Time: both in one process, taking turns batch by batch; gathering statistics is not counted.
Shares: torch.profiler over 1/{PART} of {PROFILED} batches of all lengths, torch on its fast path.
Memory: what the {LARGEST} longest batches add, each model in a fresh process."""
DROPOUT = 0.1
SMOOTHED = 7  # steps, in the picture of the losses
LONGEST_SENTENCE = 24  # tokens that still make a readable map


class Job(NamedTuple):
    """What the options ask for, loaded."""

    device: torch.device
    folder: Path  # for results
    documents: list[Document]
    queries: list[str]
    tokenizer: Tokenizer
    ids: list[list[int]]  # of the documents, then of the queries
    batches: list[Batch]
    models: dict[str, SentenceEncoder]
    cut: str  # why texts are cut off where they are; empty where that was asked for


class Comparison(NamedTuple):
    """What embedding everything with both models gave; each by the model's name."""

    embeddings: dict[str, Tensor]  # (documents and queries, E)
    seconds: dict[str, float]
    shares: dict[str, Share]
    memory: dict[str, int | None]
    watch: AttentionWatch

    @property
    def difference(self) -> float:
        """The largest difference of any embedding."""
        return (self.embeddings[TORCH] - self.embeddings[ATTNFAST]).abs().max().item()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return guarded("search", lambda: run(parser().parse_args(arguments)))


def run(options: argparse.Namespace) -> int:
    """Everything, in the order in which it is printed.

    Raises:
        UsageError: bad input.
    """
    started = time.perf_counter()
    warnings.filterwarnings("ignore", "The PyTorch API of nested tensors")
    job = _prepare(options)
    out = console()
    described = _describe(job)
    plain(out, described)

    comparison = _compare(job)
    heading(out, "Hits (cosine similarity, name)")
    hits = _answer(out, job, comparison, options.top)
    difference = comparison.difference
    agree = difference <= TOLERANCE  # False for NaN
    heading(out, "The same answers")
    verdict = "within" if agree else "MORE THAN"
    plain(out, f"largest difference of any embedding: {difference:.1e}, {verdict} 1e-5")
    heading(out, f"What it costs, {torch.get_num_threads()} threads")
    report.costs(out, comparison.seconds, comparison.memory, comparison.shares)
    plain(out, MEASURED)
    heading(out, f"explain() of layer {options.layer}, one batch")
    plain(out, _explain_layer(job, options.layer - 1))
    heading(out, "Where the words look")
    sentence = options.sentence or job.queries[0]
    plain(out, str(_draw(job, comparison, sentence, options.layer - 1)))

    outcomes = None
    if not options.no_train:
        heading(out, "Fine-tuning: which module is a docstring from?")
        outcomes = _fine_tune(options, job, out)
        _report_fine_tuning(out, job.folder, outcomes)
    results = {
        "described": described,
        "difference": difference,
        "hits": hits,
        "seconds": comparison.seconds,
        "peak_bytes": comparison.memory,
        "attention_share": {name: share._asdict() for name, share in comparison.shares.items()},
        "breadth": comparison.watch.breadth.tolist(),
        "focus": comparison.watch.focus.tolist(),
        "fine_tuning": {name: o._asdict() for name, o in (outcomes or {}).items()},
    }
    write_json(job.folder / "results.json", results)
    heading(out, f"done in {time.perf_counter() - started:.0f} s")
    if not agree:
        print(f"search: the embeddings differ by {difference:.1e} > 1e-5", file=sys.stderr)
    return 0 if agree else 1


def _prepare(options: argparse.Namespace) -> Job:
    """Check what was given, cheap things first, and load what is needed."""
    device = set_up(options)
    queries = list(options.query) + (read_queries(options.queries) if options.queries else [])
    if any(not query.strip() for query in queries):
        raise UsageError("a query is empty")
    queries = queries or list(QUERIES)
    documents = read_texts(options.texts) if options.texts else None
    folder = output_folder(options.out)
    stock = load_encoder(DROPOUT)
    tokenizer = load_tokenizer(options.max_tokens or budget.LONGEST)
    documents = documents or collect_stdlib(options.modules)

    ours = copy.deepcopy(stock)
    replace(ours, verbose=False)
    models = {TORCH: stock.to(device), ATTNFAST: ours.to(device)}
    texts = [document.text for document in documents] + queries
    ids = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    cut = ""
    if options.max_tokens is None:
        each = token_seconds(models, ids, device) * budget.STATISTICS
        longest = budget.longest_that_fits(list(map(len, ids)), budget.EMBEDDING, each)
        tokenizer.enable_truncation(longest)
        ids = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
        cut = _why_cut(longest, sum(map(len, ids)) * each)
    batches = list(length_sorted(ids, options.batch_tokens))
    return Job(device, folder, documents, queries, tokenizer, ids, batches, models, cut)


def _why_cut(longest: int, seconds: float) -> str:
    """One line: after how many tokens texts are cut off, and why."""
    return (
        f"texts are cut off after {longest} tokens, from {budget.SHORTEST} to {budget.LONGEST}:"
        f" embedding twice takes about {seconds:.0f} s then, at most {budget.EMBEDDING:.0f} are"
        " meant (--max-tokens)"
    )


def _describe(job: Job) -> str:
    """What runs on what."""
    tokens = sum(map(len, job.ids))
    padded = sum(batch.tokens.numel() for batch in job.batches)
    return (
        f"{versions(job.device)}\n"
        f"{len(job.documents):,} texts and {len(job.queries)} queries,"
        f" {tokens:,} tokens in {len(job.batches)} batches, {1 - tokens / padded:.1%} padding"
        + (f"\n{job.cut}" if job.cut else "")
    )


def _compare(job: Job) -> Comparison:
    """Embed everything with both models, then measure where time and memory go."""
    with AttentionWatch(job.models[ATTNFAST]) as watch:
        embeddings, seconds = embed(job.models, job.batches, job.device, watch)
    every = -(-len(job.batches) // PROFILED)
    sample = [_part(batch) for batch in job.batches[every // 2 :: every]]
    shares = {
        name: attention_share(model, sample, job.device) for name, model in job.models.items()
    }
    largest = job.batches[-LARGEST:]
    with ThreadPoolExecutor() as pool:  # the processes share the machine, but no memory
        peaks = pool.map(lambda name: peak_memory(name, largest, job.device), job.models)
        memory = dict(zip(job.models, peaks, strict=True))
    return Comparison(embeddings, seconds, shares, memory, watch)


def _part(batch: Batch) -> Batch:
    """The longest of a batch's texts: enough to see how the time divides."""
    rows = slice(-max(1, len(batch.indices) // PART), None)
    return Batch(batch.indices[rows], batch.tokens[rows], batch.padding[rows])


def _answer(
    out: Console, job: Job, comparison: Comparison, top: int
) -> dict[str, dict[str, list[tuple[str, float]]]]:
    """Print every query's hits; returns names and scores by query and model."""
    answers = {}
    documents = len(job.documents)
    for row, query in enumerate(job.queries, documents):
        found = {}
        for name, x in comparison.embeddings.items():
            best = (x[:documents] @ x[row]).topk(min(top, documents))
            ranked = zip(best.values.tolist(), best.indices.tolist(), strict=True)
            found[name] = [Hit(job.documents[index], score) for score, index in ranked]
        report.hits(out, query, found)
        answers[query] = {
            name: [(hit.document.name, hit.score) for hit in ranked]
            for name, ranked in found.items()
        }
    return answers


def _explain_layer(job: Job, layer: int) -> str:
    """What `attnfast.explain` says about one layer's attention over a middling batch."""
    batch = job.batches[len(job.batches) // 2].to(job.device)
    model = job.models[ATTNFAST]
    with torch.inference_mode(), AttentionWatch(model) as watch:
        model(batch.tokens, batch.padding)
        q, k, mask = watch.layer_call(layer, batch.padding)
        return attnfast.explain(q, k, k, mask=mask)


def _draw(job: Job, comparison: Comparison, sentence: str, layer: int) -> Path:
    """Save the picture of one sentence's maps; returns its path."""
    encoding = job.tokenizer.encode(sentence)
    length = min(len(encoding.ids), LONGEST_SENTENCE)
    batch = pad([encoding.ids[:length]], [0]).to(job.device)
    maps = sentence_maps(job.models[ATTNFAST], batch)[layer]
    path = job.folder / "attention.png"
    watch = comparison.watch
    draw_attention(path, maps, encoding.tokens[:length], layer, watch.breadth, watch.focus)
    return path


def _fine_tune(options: argparse.Namespace, job: Job, out: Console) -> dict[str, Outcome] | None:
    """Both models' outcomes; None where the texts have no modules to tell apart."""
    split = split_by_module(job.documents, options.seed)
    if split is None:
        return None
    return fine_tune(
        job.models,
        job.ids,
        split,
        steps=options.steps,
        batch_size=options.batch_size,
        max_tokens=options.train_tokens,
        dropout=DROPOUT,
        seed=options.seed,
        device=job.device,
        tell=partial(plain, out),
    )


def _report_fine_tuning(out: Console, folder: Path, outcomes: dict[str, Outcome] | None) -> None:
    """Print losses and the classification reports, and save the picture of the losses."""
    if outcomes is None:
        plain(out, "left out: too few modules with enough docstrings")
        return
    report.losses(out, outcomes)
    out.print()
    report.classification(out, outcomes)
    path = folder / "losses.png"
    losses = {name: outcome.losses for name, outcome in outcomes.items()}
    title = "Telling modules apart: the training loss ends at {}"
    draw_losses(path, losses, "training loss", title, SMOOTHED)
    plain(out, str(path))

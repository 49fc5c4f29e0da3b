"""What the command prints: tables of hits, of costs, of fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from search_demo.corpus import Document
from search_demo.finetune import Outcome
from search_demo.measure import ATTNFAST, TORCH, Share

WIDTH = 118  # of tables where the output is no terminal
WIDEST_NAME = 46
GAP = 2  # between columns
INDENT = (0, 0, 0, 2)


def console() -> Console:
    """A console on standard output, wide enough for tables side by side in a log file too."""
    terminal = Console(highlight=False)
    return terminal if terminal.is_terminal else Console(highlight=False, width=WIDTH)


def heading(out: Console, text: str) -> None:
    """A line that opens a part of the report."""
    out.print()
    out.print(Text(text, style="bold"))


def plain(out: Console, text: str) -> None:
    """Indented text, taken literally."""
    out.print(Padding(Text(text), INDENT, expand=False))


class Hit(NamedTuple):
    """One text that a query found."""

    document: Document
    score: float  # cosine similarity


def hits(out: Console, query: str, found: Mapping[str, Sequence[Hit]]) -> None:
    """The best texts for one query, each model's in a column of its own."""
    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="dim")
    columns, room = [], out.width - INDENT[3]
    for name, ranked in found.items():
        cells = [_cut(f"{hit.score:.3f} {hit.document.name}", WIDEST_NAME) for hit in ranked]
        room -= max(map(len, cells)) + GAP
        columns.append(cells)
        table.add_column(name, no_wrap=True)
    ranks = zip(*found.values(), strict=True)
    headlines = [" | ".join({hit.document.headline: None for hit in rank}) for rank in ranks]
    columns.append([_cut(headline, max(room, 1)) for headline in headlines])
    table.add_column("says", no_wrap=True, style="dim")
    for row in zip(*columns, strict=True):
        table.add_row(*map(Text, row))
    out.print()
    out.print(Text(query, style="bold cyan"))
    out.print(Padding(table, INDENT, expand=False))


def _cut(text: str, width: int) -> str:
    """`text` in at most `width` characters."""
    return text if len(text) <= width else text[: width - 1] + "…"


def costs(
    out: Console,
    seconds: Mapping[str, float],
    memory: Mapping[str, int | None],
    shares: Mapping[str, Share],
) -> None:
    """Time, peak memory and attention's share of the time, model by model."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    table.add_column("")
    for name in seconds:
        table.add_column(name, justify="right")
    table.add_column("torch / attnfast", justify="right")

    def ratio(values: Mapping[str, float]) -> str:
        return f"{values[TORCH] / values[ATTNFAST]:.2f}" if values[ATTNFAST] > 0 else "-"

    def row(label: str, cells: Mapping[str, str], last: str) -> None:
        table.add_row(label, *cells.values(), last)

    row("embedding, s", {name: f"{value:.2f}" for name, value in seconds.items()}, ratio(seconds))
    for label, part in (
        ("  attention with its projections, s", [share.attention for share in shares.values()]),
        ("  attention alone, s", [share.core for share in shares.values()]),
    ):
        spent = {name: seconds[name] * share for name, share in zip(seconds, part, strict=True)}
        cells = {name: f"{value:.2f}" for name, value in spent.items()}
        row(label, cells, ratio(spent))
    for label, part in (
        ("  attention with its projections, share", [share.attention for share in shares.values()]),
        ("  attention alone, share", [share.core for share in shares.values()]),
    ):
        row(label, dict(zip(seconds, (f"{share:.0%}" for share in part), strict=True)), "")
    known = {name: value / 2**20 for name, value in memory.items() if value is not None}
    if len(known) == len(memory):
        cells = {name: f"{value:.0f}" for name, value in known.items()}
        row("peak memory beyond the model, MiB", cells, ratio(known))
    out.print(Padding(table, INDENT, expand=False))


def losses(out: Console, outcomes: Mapping[str, Outcome], rows: int = 10) -> None:
    """Training losses side by side, averaged over stretches of steps, and held-out ones."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    table.add_column("loss")
    for name in outcomes:
        table.add_column(name, justify="right")

    def row(label: str, values: Sequence[float]) -> None:
        table.add_row(label, *(f"{value:.4f}" for value in values))

    steps = len(next(iter(outcomes.values())).losses)
    stretch = max(1, -(-steps // rows))
    row("held out, before", [outcome.held_out_before for outcome in outcomes.values()])
    for start in range(0, steps, stretch):
        stop = min(start + stretch, steps)
        label = f"steps {start + 1} to {stop}" if stop - start > 1 else f"step {stop}"
        row(label, [sum(o.losses[start:stop]) / (stop - start) for o in outcomes.values()])
    row("held out, after", [outcome.held_out_after for outcome in outcomes.values()])
    spent = {name: outcome.seconds for name, outcome in outcomes.items()}
    table.add_row("seconds a step", *(f"{value / steps:.3f}" for value in spent.values()))
    out.print(Padding(table, INDENT, expand=False))
    faster = spent[TORCH] / spent[ATTNFAST]
    plain(out, f"torch / attnfast, a whole step with its optimiser: {faster:.2f}")


def classification(out: Console, outcomes: Mapping[str, Outcome]) -> None:
    """The classification report of both models, class by class."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("held-out docstrings of")
    table.add_column("texts", justify="right")
    for name in outcomes:
        for measure in ("precision", "recall", "F1"):
            table.add_column(f"{name}\n{measure}", justify="right")
    reports = [outcome.report for outcome in outcomes.values()]
    measures = ("precision", "recall", "f1-score")
    for label, first in reports[0].items():
        if label == "accuracy":
            continue
        values = [f"{report[label][m]:.2f}" for report in reports for m in measures]
        style = "bold" if label.endswith("avg") else None
        table.add_row(label, f"{first['support']:.0f}", *values, style=style)
    out.print(Padding(table, INDENT, expand=False))
    told = ", ".join(
        f"{name} {outcome.report['accuracy']:.1%}" for name, outcome in outcomes.items()
    )
    plain(out, f"accuracy: {told}")

"""What the command prints: tables of hits, of costs, of fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from demo.report import INDENT, add_compared, add_memory, plain, ratio, show, stretches, table
from demo.search.corpus import Document
from demo.search.finetune import Outcome
from demo.search.measure import Share

WIDEST_NAME = 46
GAP = 2  # between columns


class Hit(NamedTuple):
    """One text that a query found."""

    document: Document
    score: float  # cosine similarity


def hits(out: Console, query: str, found: Mapping[str, Sequence[Hit]]) -> None:
    """The best texts for one query, each model's in a column of its own."""
    made = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="dim")
    columns, room = [], out.width - INDENT[3]
    for name, ranked in found.items():
        cells = [_cut(f"{hit.score:.3f} {hit.document.name}", WIDEST_NAME) for hit in ranked]
        room -= max(map(len, cells)) + GAP
        columns.append(cells)
        made.add_column(name, no_wrap=True)
    ranks = zip(*found.values(), strict=True)
    headlines = [" | ".join({hit.document.headline: None for hit in rank}) for rank in ranks]
    columns.append([_cut(headline, max(room, 1)) for headline in headlines])
    made.add_column("says", no_wrap=True, style="dim")
    for row in zip(*columns, strict=True):
        made.add_row(*map(Text, row))
    out.print()
    out.print(Text(query, style="bold cyan"))
    show(out, made)


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
    made = table("", *seconds, "torch / attnfast")
    parts = {
        "attention with its projections": {name: s.attention for name, s in shares.items()},
        "attention alone": {name: s.core for name, s in shares.items()},
    }
    add_compared(made, "embedding, s", seconds, ".2f")
    for label, part in parts.items():
        spent = {name: seconds[name] * share for name, share in part.items()}
        add_compared(made, f"  {label}, s", spent, ".2f")
    for label, part in parts.items():
        made.add_row(f"  {label}, share", *(f"{share:.0%}" for share in part.values()), "")
    add_memory(made, "peak memory beyond the model, MiB", memory)
    show(out, made)


def losses(out: Console, outcomes: Mapping[str, Outcome], rows: int = 10) -> None:
    """Training losses side by side, averaged over stretches of steps, and held-out ones."""
    made = table("loss", *outcomes)
    made.add_row("held out, before", *(f"{o.held_out_before:.4f}" for o in outcomes.values()))
    for label, means in stretches({name: o.losses for name, o in outcomes.items()}, rows):
        made.add_row(label, *means)
    made.add_row("held out, after", *(f"{o.held_out_after:.4f}" for o in outcomes.values()))
    spent = {name: outcome.seconds / len(outcome.losses) for name, outcome in outcomes.items()}
    made.add_row("seconds a step", *(f"{value:.3f}" for value in spent.values()))
    show(out, made)
    plain(out, f"torch / attnfast, a whole step with its optimiser: {ratio(spent)}")


def classification(out: Console, outcomes: Mapping[str, Outcome]) -> None:
    """The classification report of both models, class by class."""
    scores = [
        f"{name}\n{measure}" for name in outcomes for measure in ("precision", "recall", "F1")
    ]
    made = table("held-out docstrings of", "texts", *scores, gap=2)
    reports = [outcome.report for outcome in outcomes.values()]
    measures = ("precision", "recall", "f1-score")
    for label, first in reports[0].items():
        if label == "accuracy":
            continue
        values = [f"{report[label][m]:.2f}" for report in reports for m in measures]
        style = "bold" if label.endswith("avg") else None
        made.add_row(label, f"{first['support']:.0f}", *values, style=style)
    show(out, made)
    told = ", ".join(
        f"{name} {outcome.report['accuracy']:.1%}" for name, outcome in outcomes.items()
    )
    plain(out, f"accuracy: {told}")

"""What the command prints: tables of the comparison, of scores, of attention, and translations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from search_demo.measure import ATTNFAST, TORCH
from search_demo.report import INDENT, plain

from translation.compare import Comparison
from translation.metrics import TextScores, TokenScores
from translation.pairs import Pair
from translation.watch import Look

ROWS = 8  # of a table of losses


class Decoded(NamedTuple):
    """How the held-out texts were translated once."""

    texts: list[str]
    scores: TextScores
    seconds: float


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    return table


def _show(out: Console, table: Table) -> None:
    out.print(Padding(table, INDENT, expand=False))


def comparison(out: Console, compared: Comparison, told: str) -> None:
    """Losses side by side, the verdict, and what a step costs."""
    outcomes = compared.outcomes
    table = _table("", *outcomes, "torch / attnfast")
    steps = len(outcomes[TORCH].losses)
    stretch = -(-steps // ROWS)
    for start in range(0, steps, stretch):
        stop = min(start + stretch, steps)
        label = f"loss, steps {start + 1} to {stop}" if stop - start > 1 else f"loss, step {stop}"
        means = (sum(o.losses[start:stop]) / (stop - start) for o in outcomes.values())
        table.add_row(label, *(f"{mean:.4f}" for mean in means))
    table.add_row("loss, held out", *(f"{o.held_out:.4f}" for o in outcomes.values()))
    seconds = {name: o.step_seconds for name, o in outcomes.items()}
    rates = {name: o.tokens_per_second for name, o in outcomes.items()}
    ratio = f"{seconds[TORCH] / seconds[ATTNFAST]:.2f}"
    table.add_row("a step, ms (median)", *(f"{s * 1e3:.0f}" for s in seconds.values()), ratio)
    ratio = f"{rates[TORCH] / rates[ATTNFAST]:.2f}"
    table.add_row("tokens/s", *(f"{rate:,.0f}" for rate in rates.values()), ratio)
    peaks = {name: o.peak_bytes for name, o in outcomes.items()}
    known = {name: value / 2**20 for name, value in peaks.items() if value is not None}
    if len(known) == len(peaks):
        ratio = f"{known[TORCH] / known[ATTNFAST]:.2f}" if known[ATTNFAST] > 0 else "-"
        cells = (f"{value:.0f}" for value in known.values())
        table.add_row("peak memory of training, MiB", *cells, ratio)
    _show(out, table)
    verdict = "within" if compared.agree else "MORE THAN"
    plain(out, f"{told}: apart by {compared.difference:.1e}, {verdict} {compared.tolerance:g}")


def token_scores(out: Console, scores: TokenScores) -> None:
    """Precision, recall and F1 of the next token."""
    table = _table("next token, held out", "precision", "recall", "F1")
    for average in scores.precision:
        values = (scores.precision[average], scores.recall[average], scores.f1[average])
        table.add_row(f"{average} mean over tokens", *(f"{value:.3f}" for value in values))
    _show(out, table)
    plain(out, f"accuracy {scores.accuracy:.1%} of {scores.count:,} tokens")


def text_scores(out: Console, decoded: Mapping[str, Decoded]) -> None:
    """BLEU and chrF of each way to search, and how long it took."""
    table = _table("held-out texts", "BLEU", "chrF", "seconds")
    for name, found in decoded.items():
        scores = found.scores
        table.add_row(name, f"{scores.bleu:.1f}", f"{scores.chrf:.1f}", f"{found.seconds:.1f}")
    _show(out, table)
    scores = next(iter(decoded.values())).scores
    plain(out, f"BLEU {scores.bleu_signature}")
    plain(out, f"chrF {scores.chrf_signature}")


def translations(
    out: Console, pairs: Sequence[Pair], texts: Mapping[str, Sequence[str]], rows: Sequence[int]
) -> None:
    """Some of the translations below their sources."""
    width = max(map(len, ("reference", *texts)))
    for row in rows:
        out.print(Padding(Text(pairs[row].source, style="bold"), INDENT, expand=False))
        for name, told in texts.items():
            plain(out, f"{name:{width}}  {told[row]}")
        plain(out, f"{'reference':{width}}  {pairs[row].target}")


def habits(out: Console, looks: Sequence[Look]) -> None:
    """Breadth, focus and max logit of every layer, first and last, over its heads."""
    table = _table("attention", "breadth", "focus", "max logit")

    def range_of(values: Sequence[float], form: str) -> str:
        return f"{min(values):{form}}..{max(values):{form}}"

    for look in (looks[0], looks[-1]):
        for kind, layers in look.breadth.items():
            for layer in range(len(layers)):
                table.add_row(
                    f"step {look.step}, {kind} layer {layer + 1}",
                    range_of(layers[layer].tolist(), ".1f"),
                    range_of(look.focus[kind][layer].tolist(), ".2f"),
                    range_of(look.max_logit[kind][layer].tolist(), ".1f"),
                )
    _show(out, table)
    plain(out, "smallest and largest of the layer's heads, over the same sentences each time")

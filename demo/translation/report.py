"""What the command prints: tables of the comparison, of scores, of attention, and translations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from demo.report import INDENT, add_compared, add_memory, plain, show, stretches, table
from demo.translation.compare import Comparison
from demo.translation.metrics import TextScores, TokenScores
from demo.translation.pairs import Pair
from demo.translation.watch import Look

ROWS = 8  # of a table of losses


class Decoded(NamedTuple):
    """How the held-out texts were translated once."""

    texts: list[str]
    scores: TextScores
    seconds: float


def comparison(out: Console, compared: Comparison, told: str) -> None:
    """Losses side by side, the verdict, and what a step costs."""
    outcomes = compared.outcomes
    made = table("", *outcomes, "torch / attnfast")
    for label, means in stretches({name: o.losses for name, o in outcomes.items()}, ROWS):
        made.add_row(f"loss, {label}", *means)
    made.add_row("loss, held out", *(f"{o.held_out:.4f}" for o in outcomes.values()))
    milliseconds = {name: o.step_seconds * 1e3 for name, o in outcomes.items()}
    add_compared(made, "a step, ms (median)", milliseconds, ".0f")
    rates = {name: o.tokens_per_second for name, o in outcomes.items()}
    add_compared(made, "tokens/s", rates, ",.0f")
    peaks = {name: o.peak_bytes for name, o in outcomes.items()}
    add_memory(made, "peak memory of training, MiB", peaks)
    show(out, made)
    verdict = "within" if compared.agree else "MORE THAN"
    plain(out, f"{told}: apart by {compared.difference:.1e}, {verdict} {compared.tolerance:g}")


def token_scores(out: Console, scores: TokenScores) -> None:
    """Precision, recall and F1 of the next token."""
    made = table("next token, held out", "precision", "recall", "F1")
    for average in scores.precision:
        values = (scores.precision[average], scores.recall[average], scores.f1[average])
        made.add_row(f"{average} mean over tokens", *(f"{value:.3f}" for value in values))
    show(out, made)
    plain(out, f"accuracy {scores.accuracy:.1%} of {scores.count:,} tokens")


def text_scores(out: Console, decoded: Mapping[str, Decoded]) -> None:
    """BLEU and chrF of each way to search, and how long it took."""
    made = table("held-out texts", "BLEU", "chrF", "seconds")
    for name, found in decoded.items():
        scores = found.scores
        made.add_row(name, f"{scores.bleu:.1f}", f"{scores.chrf:.1f}", f"{found.seconds:.1f}")
    show(out, made)
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
    made = table("attention", "breadth", "focus", "max logit")

    def range_of(values: Sequence[float], form: str) -> str:
        return f"{min(values):{form}}..{max(values):{form}}"

    for look in (looks[0], looks[-1]):
        for kind, layers in look.breadth.items():
            for layer in range(len(layers)):
                made.add_row(
                    f"step {look.step}, {kind} layer {layer + 1}",
                    range_of(layers[layer].tolist(), ".1f"),
                    range_of(look.focus[kind][layer].tolist(), ".2f"),
                    range_of(look.max_logit[kind][layer].tolist(), ".1f"),
                )
    show(out, made)
    plain(out, "smallest and largest of the layer's heads, over the same sentences each time")

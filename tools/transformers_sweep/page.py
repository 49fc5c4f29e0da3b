"""docs/transformers.md, from the data alone."""

from __future__ import annotations

import collections
import textwrap

from .table import ROOT, Row

PAGE = ROOT / "docs" / "transformers.md"
KNOWN: dict[str, str] = {  # architectures that differ from eager, and why
    "mask2former": "Masks are outputs cut at a half, so that gradients change with rounding:"
    " eager's are 1.2e-2 from those in float64, these 1.1e-3."
}
TOLD = {  # what models say, in words
    "KeyError: 'attnfast'": "Its code looks the name up among attention classes of its own.",
}
HEAD = """# Architectures of transformers

Every architecture of the installed transformers, tiny and with random weights, by eager attention
and by `attn_implementation="attnfast"`: loaded with it and switched to it, without padding and
padded on either side, outputs, weights (`output_attentions`) and gradients of all parameters; and
generation of 6 tokens from prompts padded on the left, with dynamic and static caches, sliding ones
where the model has them, and 3 beams. Windows are 4 of 10 tokens wide.

Made by `python -m tools.transformers_sweep`, with `--write` and then `--page`, out of
`docs/transformers.csv`, which names for each architecture the commit at which it was compared.
"""
OUTCOMES = {
    "equal": "equal",
    "fewer": "equal, some weights are not returned",
    "refused": "refused, with a reason",
    "wrong": "different",
    "not built": "not compared: no tiny model of them runs, or not in time",
    "not yet": "not compared yet",
}
MASKS = """
**Masks** are those of a batch padded on the left: by *structure*, as *bools* or eager's *floats*;
empty where no call had one, or where attention is the model's own. **Compared** lists what eager
attention can do of the above and what is then equal.
"""
SHORT = {
    "none": "no padding",
    "right": "right padding",
    "left": "left padding",
    "weights": "weights",
    "not all weights": "not all weights",
}


def text(rows: dict[str, Row]) -> str:
    """The page as Markdown."""
    counts = collections.Counter(row.outcome for row in rows.values())
    masks = collections.Counter(row.masks or "none" for row in rows.values() if row.calls)
    versions = ", ".join(sorted({row.transformers for row in rows.values()}))
    lines = [HEAD, f"transformers {versions} has {len(rows)} architectures.", ""]
    lines += _table(["architectures", "are"], [[str(counts[k]), v] for k, v in OUTCOMES.items()])
    lines += ["", "Of those whose attention attnfast computes, the masks are:", ""]
    lines += _table(
        ["architectures", "masks of padding"],
        [[str(n), kind] for kind, n in sorted(masks.items(), key=lambda x: (-x[1], x[0]))],
    )
    for outcome, title in OUTCOMES.items():
        chosen = [row for _, row in sorted(rows.items()) if row.outcome == outcome]
        if chosen:
            lines += ["", f"## {title.capitalize()}", ""]
            lines += [] if outcome not in ("equal", "fewer") else [MASKS.strip(), ""]
            if outcome == "not yet":
                lines += textwrap.wrap(", ".join(f"`{row.model_type}`" for row in chosen), 100)
            else:
                lines += _compared(chosen) if outcome in ("equal", "fewer") else _reasons(chosen)
    return "\n".join(lines) + "\n"


def _compared(rows: list[Row]) -> list[str]:
    cells = []
    for row in rows:
        ran = "; ".join(SHORT.get(one, one) for one in row.ran.split("; "))
        computes = f"{row.calls} calls" if row.calls else "its own code"
        if row.warned:
            computes += ", warned"
        cells.append([f"`{row.model_type}`", row.model, computes, row.masks, ran])
    return _table(["type", "model", "attention", "masks", "compared"], cells)


def _reasons(rows: list[Row]) -> list[str]:
    cells = []
    for row in rows:
        said = KNOWN.get(row.model_type) or TOLD.get(row.detail)
        cells.append([f"`{row.model_type}`", row.model, said or f"`{_plain(row.detail)}`"])
    return _table(["type", "model", "why"], cells)


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def _plain(detail: str) -> str:
    """What can stand between backquotes in a cell."""
    return detail.replace("|", "/").replace("`", "'")

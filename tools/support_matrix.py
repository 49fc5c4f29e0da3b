"""The README's support matrix, made from the dispatch table itself.

    python tools/support_matrix.py            print it
    python tools/support_matrix.py --write    put it into the README

Every cell is a backend's own answer to a call with that feature, in float32 or, where it does not
take that, in bfloat16. All backends must be available; the CUDA kernels answer whether or not they
were built.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from attnfast import backends
from attnfast.backends import cpu, cuda, reference, triton
from attnfast.call import Options

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- support:begin -->", "<!-- support:end -->"
PLAIN: dict[str, Any] = {
    "kind": "attention",
    "dtype": torch.float32,
    "B": 2,
    "H": 4,
    "H_kv": 4,
    "T": 64,
    "S": 64,
    "D": 64,
    "D_v": 64,
    "options": Options(scale=0.125),
}


def options(**changes: Any) -> dict[str, Any]:
    """A call with these options."""
    return {"options": PLAIN["options"]._replace(**changes)}


FEATURES: dict[str, list[dict[str, Any]]] = {
    "float32": [{"dtype": torch.float32}],
    "bfloat16, float16": [{"dtype": torch.bfloat16}, {"dtype": torch.float16}],
    "float64": [{"dtype": torch.float64}],
    "gradients": [{"requires_grad": True}],
    "D, D_v from 1 to 512, unequal too": [{"D": 1, "D_v": 512}, {"D": 512, "D_v": 1}],
    "D above 512": [{"D": 1024}],
    "grouped and multi-query heads": [{"H_kv": 2}, {"H_kv": 1}],
    "T = 1, S = 1, T > S": [{"T": 1}, {"S": 1}, {"T": 300}],
    "`mask`": [{"mask": True}],
    "`mask`, a `BlockMask`": [{"blocks": True}],
    "`indices`, with gradient": [{"indices": True, "requires_grad": True}],
    "`bias`, with gradient": [{"bias": torch.float32, "requires_grad": True}],
    "`causal`, `window`": [options(causal=True), options(window_left=9, window_right=3)],
    "`window`, one for each head": [{"windows": True, "requires_grad": True}],
    "`align`: corners, an offset, one per entry": [
        options(align_offset=5),
        options(align_bottom_right=True),
        {"align": True},
    ],
    "`softcap`": [options(softcap=30.0)],
    "`alibi_slopes`": [{"alibi": True}],
    "`sinks`, with gradient": [{"sinks": True, "requires_grad": True}],
    "`dropout_p`": [options(dropout_p=0.1)],
    '`return_stats`, `"received"`': [options(stats=1), options(stats=2)],
    '`return_weights`, `"mean"`': [options(weights=2), options(weights=1)],
    "`deterministic`": [options(deterministic=True)],
    "`varlen_attention`": [{"kind": "varlen", **options(max_seqlen_q=64, max_seqlen_k=64)}],
    "`decode_attention`": [{"kind": "decode", "T": 1}],
    "`decode_attention`, a tree's `mask`": [{"kind": "decode", "T": 8, "mask": True}],
    "`decode_attention`, paged": [{"kind": "decode", "T": 1, "page_size": 16}],
}


def matrix() -> str:
    """The table as Markdown, with the reasons of refusals below it.

    Raises:
        ValueError: A backend refuses even a plain call on this machine; one line.
    """
    columns = [
        (device, row, plain(device, row))
        for device, row in (
            ("cpu", cpu.ROW),
            ("cuda", triton.ROW),
            ("cuda", cuda.ROW),
            ("cpu", reference.ROW),
        )
    ]
    reasons: list[str] = []
    lines = []
    for feature, calls in FEATURES.items():
        cells = []
        for device, row, base in columns:
            refused = [row.unsupported(problem(device, base | call)) for call in calls]
            cells.append(cell([reason for reason in refused if reason], reasons))
        lines.append(f"| {feature} | {' | '.join(cells)} |")
    notes = [f"{i}. {reason}" for i, reason in enumerate(reasons, 1)]
    head = " | ".join(f"`{row.name}`" for _, row, _ in columns)
    return "\n".join([f"| | {head} |", "| --- |" + " --- |" * len(columns), *lines, "", *notes])


def plain(device: str, row: backends.Backend) -> dict[str, Any]:
    """What changes a plain call into one that the backend takes: its dtype, or nothing."""
    dtypes: tuple[dict[str, Any], ...] = ({}, {"dtype": torch.bfloat16})
    answers = [row.unsupported(problem(device, dtype)) for dtype in dtypes]
    if None not in answers:
        raise ValueError(f"support matrix: {row.name} is not available here: {answers[0]}")
    return dtypes[answers.index(None)]


def cell(refused: list[str], reasons: list[str]) -> str:
    """``yes``, or ``no`` with the numbers of its reasons, new ones added to the list."""
    if not refused:
        return "yes"
    reasons.extend(reason for reason in dict.fromkeys(refused) if reason not in reasons)
    numbers = sorted({reasons.index(reason) + 1 for reason in refused})
    return f"no ({', '.join(map(str, numbers))})"


def problem(device: str, changes: dict[str, Any]) -> backends.Problem:
    """A plain call with these changes, as backends see it."""
    return backends.Problem(device=torch.device(device), **(PLAIN | changes))


def filled(readme: str) -> str:
    """The README's text with the matrix of today."""
    before, _, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"support matrix: no line {BEGIN} followed by {END}")
    return f"{before}{BEGIN}\n{matrix()}\n{END}{after}"


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="put it into the README")
    try:
        if parser.parse_args(arguments).write:
            README.write_text(filled(README.read_text()))
        else:
            print(matrix())
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

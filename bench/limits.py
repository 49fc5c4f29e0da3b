"""The bars of the CPU: what rows have to reach of the machine's own limit, or beside their rivals.

A share is that of a row's limit, see `bench.ceilings`; a ratio the fastest rival's time over ours.
``python -m bench run --suite limits`` times the rows of all bars and prints what they reach.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from . import OURS, ROOT
from .grid import (
    AttentionCase,
    CallersCase,
    Case,
    DecodeCase,
    StatisticsCase,
    WatchedCase,
    encoder_cases,
    layer_cases,
)
from .pages import fill, provenance
from .results import Row, Run
from .tables import geometric_mean, table

LONG = ((2, 16, 1024), (1, 16, 4096), (1, 8, 8192))  # B, H, T
SHORT = ((8, 12, 50, 64), (8, 12, 128, 64), (8, 12, 197, 64), (512, 4, 64, 16))  # B, H, T, D
WATCHED = ((8, 512, 768, 12), (8, 128, 768, 12), (64, 32, 256, 8), (2, 2048, 768, 12))  # B, T, E, H
AT_ONCE = ((1, 4, 16, 32), (1, 8, 64, 64), (2, 8, 256, 64))  # B, H, T, D, of each caller
WORKS = ("forward", "forward+backward")


class Bar(NamedTuple):
    """What the least of some rows, or their geometric mean, has to reach."""

    name: str
    wanted: float
    measure: str  # "share" or "ratio"
    of: str  # "least" or "mean"
    cases: tuple[Case, ...]


def bars(kernel: str) -> list[Bar]:
    """The bars of a machine whose kernels are compiled for this instruction set."""

    def long(dtype: str, causal: bool, work: str, *head_dims: int) -> tuple[Case, ...]:
        shapes = itertools.product(LONG, head_dims)
        return tuple(AttentionCase(B, H, T, T, D, dtype, causal, work) for (B, H, T), D in shapes)

    found = []
    for dtype, short in (("float32", "fp32"), ("float16", "fp16")):  # fp16 is computed in fp32
        for work, full, causal in (("forward", 0.80, 0.72), ("forward+backward", 0.75, 0.68)):
            for reach, wanted, is_causal in (("full", full, False), ("causal", causal, True)):
                name = f"{short} {work}, {reach}, T >= 1024: of the FMA peak"
                rows = long(dtype, is_causal, work, *((64, 128) if short == "fp32" else (64,)))
                found.append(Bar(name, wanted, "share", "least", rows))
    if kernel == "amx":
        for name, wanted, work, dims in (
            ("bf16 forward, D 64, T >= 1024: of torch's best GEMM", 0.60, WORKS[0], (64,)),
            ("bf16 forward, D 128, T >= 1024: of torch's best GEMM", 0.75, WORKS[0], (128,)),
            ("bf16 with backward, T >= 1024: of torch's best GEMM", 0.55, WORKS[1], (64, 128)),
        ):
            both = (*long("bfloat16", False, work, *dims), *long("bfloat16", True, work, *dims))
            found.append(Bar(name, wanted, "share", "least", both))
    few = tuple(
        AttentionCase(B, H, T, T, D, dtype, False, work)
        for (B, H, T, D), dtype, work in itertools.product(SHORT, ("float32", "bfloat16"), WORKS)
    )
    for wanted, of in ((1.5, "mean"), (1.0, "least")):
        found.append(Bar("T = 50 to 197: times the fastest rival", wanted, "ratio", of, few))
    decoded = tuple(
        DecodeCase(B, 32, 32 // group, S, 128, dtype, False)
        for B, S, group, dtype in itertools.product(
            (1, 16), (4096, 65536), (1, 4, 8), ("float32", "bfloat16")
        )
    )
    decoded = tuple(case for case in decoded if case.bytes <= 1 << 31)
    found.append(Bar("decoding: of the bandwidth of copying", 0.85, "share", "least", decoded))
    at_once = tuple(
        CallersCase(B, H, T, T, D, "float32", False, work)
        for (B, H, T, D), work in itertools.product(AT_ONCE, WORKS)
    )
    found.append(Bar("8 Python threads at once: times torch.sdpa", 1.0, "ratio", "least", at_once))
    watched = tuple(
        StatisticsCase(1, 16, 2048, 2048, 64, dtype, True, work)
        for dtype, work in itertools.product(("float32", "bfloat16"), WORKS)
    )
    name = "with statistics: of the speed without"
    found.append(Bar(name, 1 / 1.06, "ratio", "least", watched))
    for layer, most in (("statistics", 1.06), ("shares", 1.15)):
        steps = tuple(WatchedCase(layer, *sizes, "float32", "step", False) for sizes in WATCHED)
        name = f"a training step with lens.observe, {layer}: of the speed without"
        found.append(Bar(name, 1 / most, "ratio", "least", steps))
    modules = (*layer_cases("full"), *encoder_cases("full"))
    found.append(Bar("layers and encoders: times torch's", 1.0, "ratio", "least", modules))
    long_ones = tuple(case for case in modules if case.T >= 512 and case.dtype == "float32")
    name = "layers and encoders, T >= 512, fp32: times torch's"
    found.append(Bar(name, 1.3, "ratio", "least", long_ones))
    return found


def cases(kernel: str) -> list[Case]:
    """The rows of all bars, each once."""
    return list(dict.fromkeys(case for bar in bars(kernel) for case in bar.cases))


def verdicts(kernel: str, rows: list[Row]) -> pd.DataFrame:
    """A line for each bar of which all rows were timed, or some of them."""
    timed = {row["id"]: row for row in rows}
    lines = []
    for bar in bars(kernel):
        found = [timed[str(case)] for case in bar.cases if str(case) in timed]
        values = [reached(row, bar.measure) for row in found]
        if not values:
            continue
        middle = [value[1] for value in values]
        least = min(range(len(values)), key=middle.__getitem__)
        measured = middle[least] if bar.of == "least" else geometric_mean(middle)
        low, _, high = values[least]
        lines.append(
            {
                "bar": f"{bar.name}, {bar.of}",
                "wanted": f"{bar.wanted:.2f}",
                "measured": f"{measured:.2f}",
                "spread": f"{low:.2f} to {high:.2f}" if bar.of == "least" else "",
                "rows": f"{len(values)} of {len(bar.cases)}",
                "least row": found[least]["id"],
                "met": "yes" if measured >= bar.wanted else "no",
            }
        )
    return pd.DataFrame(lines)


def reached(row: Row, measure: str) -> tuple[float, float, float]:
    """What a row reaches: by its outer quartiles, and in the middle by its median."""
    if measure == "ratio":
        low, high = row["ratio_quartiles"]
        return low, row["ratio"], high
    ours = row["contestants"][OURS]
    shares = [row["limit_s"] / ours[name] for name in ("q3_s", "median_s", "q1_s")]
    return shares[0], shares[1], shares[2]


def page(kernel: str, rows: list[Row]) -> str:
    """The verdicts as a Markdown table; nothing where no row is of a bar."""
    found = verdicts(kernel, rows)
    return "" if found.empty else table(found, text=True)


def write(run: Run, root: Path = ROOT) -> list[Path]:
    """Fill docs/cpu.md."""
    text = f"{provenance(run)}\n\n{page(run.facts['kernel'], run.rows)}"
    return [fill(root / "docs" / "cpu.md", text)]

"""Reading rows of results: names, groups, means, and tables in Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from . import OURS, SDPA, budget
from .grid import CORE, SUITES
from .results import Row, Run

DTYPE_NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
TITLES = {
    "forward": "attention, forward",
    "backward": "attention, backward",
    "forward+backward": "attention, forward and backward",
    "options": "attention with options",
    "decode": "decoding",
    "varlen": "packed sequences",
    "module": "MultiheadAttention",
    "encoder": "Transformer encoder",
}


def geometric_mean(values: Iterable[float]) -> float:
    """The exponential of the mean of the logarithms."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def groups(run: Run) -> dict[str, list[Row]]:
    """The rows that one geometric mean is taken over, by title: suite, dtype and kind of work."""
    found: dict[str, list[Row]] = {}
    several = len({row["backend"] for row in run.rows}) > 1
    for suite in SUITES:
        for row in run.rows:
            if row["suite"] == suite:
                case = row["case"]
                kind = case.get("mode") or (case["work"] if suite in ("options", "varlen") else "")
                parts = [TITLES[suite], DTYPE_NAMES[case["dtype"]], *([kind] if kind else [])]
                parts += [row["backend"] or "rivals"] if several else []
                found.setdefault(", ".join(parts), []).append(row)
    return found


def case_name(row: Row) -> str:
    """A row's case in a few words, without dtype and pass."""
    case = row["case"]
    if row["suite"] in ("module", "encoder"):
        options = [name for name in ("weights", "padding") if case.get(name)]
        name = f"{case['layer']} {case['B']}, {case['T']}, {case['E']}, {case['H']}"
        return ", ".join([name, *options])
    if row["suite"] == "decode":
        heads = case["H"] if case["H"] == case["H_kv"] else f"{case['H']}:{case['H_kv']}"
        end = ", paged" if case["paged"] else ""
        return f"{case['B']}, {heads}, {case['S']}, {case['D']}{end}"
    end = ", causal" if case["causal"] else ""
    if row["suite"] == "varlen":
        return f"{case['name']}: {len(case['lengths'])}, {case['H']}, {case['D']}{end}"
    length = case["T"] if case["T"] == case["S"] else f"{case['T']}:{case['S']}"
    option = f", {case['option']}" if case.get("option") else ""
    return f"{case['B']}, {case['H']}, {length}, {case['D']}{end}{option}"


def table(header: list[str], rows: list[list[str]], *, text: bool = False) -> str:
    """A Markdown table: the first column to the left, the others to the right unless ``text``."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: list[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        place = str.ljust if text else str.rjust
        aligned = [first[0].ljust(first[1]), *(place(cell, width) for cell, width in others)]
        return f"| {' | '.join(aligned)} |"

    end = "-" if text else ":"
    rule = ["-" * widths[0], *("-" * (width - 1) + end for width in widths[1:])]
    return "\n".join([line(header), line(rule), *map(line, rows)])


def milliseconds(contestant: dict[str, Any]) -> str:
    """A contestant's median with half of its interquartile range, in per cent of the median."""
    ms = contestant["median_s"] * 1e3
    digits = max(0, min(4, 2 - math.floor(math.log10(ms))))
    if contestant["rounds"] == 1:
        return f"{ms:.{digits}f}"
    spread = (contestant["q3_s"] - contestant["q1_s"]) / contestant["median_s"] / 2
    return f"{ms:.{digits}f} ±{spread:.0%}"


def rate(contestant: dict[str, Any]) -> str:
    """A contestant's GFLOP/s."""
    gflops = contestant["gflops"]
    return f"{gflops:.0f}" if gflops >= 10 else f"{gflops:.2g}"


def size(count: int | None) -> str:
    """Bytes as people write them; a dash where they are not known."""
    if count is None:
        return "-"
    for unit, step in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= step:
            return f"{count / step:.3g} {unit}"
    return f"{count} B"


def percent(share: float | None) -> str:
    """A share of the limit."""
    return "-" if share is None else f"{share:.0%}"


def compared(rows: Iterable[Row]) -> list[Row]:
    """Rows in which we and a rival were timed."""
    return [row for row in rows if row["ratio"] is not None]


def lost(rows: Iterable[Row]) -> list[Row]:
    """Rows in which a rival is faster, the worst first."""
    return sorted(
        (r for r in compared(rows) if r["ratio"] < 1), key=lambda row: float(row["ratio"])
    )


def summary_table(run: Run) -> str:
    """One line for each group: geometric mean and extremes of the ratios, and our share."""
    lines = []
    for title, rows in groups(run).items():
        ours = compared(rows)
        if not ours:
            continue
        slowest = min(ours, key=lambda row: float(row["ratio"]))
        shares = [row["contestants"][OURS].get("share") for row in ours]
        known = [share for share in shares if share]
        lines.append(
            [
                title,
                str(len(ours)),
                f"**{geometric_mean(row['ratio'] for row in ours):.2f}x**",
                f"{slowest['ratio']:.2f}x ({case_name(slowest)})",
                f"{max(row['ratio'] for row in ours):.2f}x",
                str(len(lost(ours))),
                percent(geometric_mean(known)) if known else "-",
            ]
        )
    header = [
        "times as fast as the fastest rival",
        "rows",
        "geometric mean",
        "least",
        "most",
        "slower in",
        "share of limit",
    ]
    return table(header, lines)


def core(run: Run) -> dict[tuple[str, str], list[tuple[float, Row]]]:
    """By dtype and work, torch's time over ours in each core row; of one call where only that is.

    The rival is `F.scaled_dot_product_attention` by its fused kernel, which is what it takes here.
    """
    found: dict[tuple[str, str], list[tuple[float, Row]]] = {}
    for row in run.rows:
        case, named = row["case"], row["contestants"]
        shape = tuple(case.get(name) for name in ("B", "H", "T", "S", "D"))
        if row["suite"] not in ("forward", "forward+backward") or shape not in CORE:
            continue
        if OURS in named and SDPA in named:
            ratio = float(named[SDPA]["median_s"]) / float(named[OURS]["median_s"])
            found.setdefault((case["dtype"], row["suite"]), []).append((ratio, row))
    return found


def core_table(run: Run) -> str:
    """The core shapes beside `F.scaled_dot_product_attention`: means and extremes."""
    lines = []
    for (dtype, work), rows in core(run).items():
        least, row = min(rows, key=lambda pair: pair[0])
        lines.append(
            [
                f"{DTYPE_NAMES[dtype]}, {work.replace('+', ' + ')}",
                f"{len(rows)} of {2 * len(CORE)}",
                f"**{geometric_mean(ratio for ratio, _ in rows):.2f}x**",
                f"{least:.2f}x ({case_name(row)})",
                f"{max(ratio for ratio, _ in rows):.2f}x",
            ]
        )
    header = ["core shapes beside torch's fused", "rows", "geometric mean", "least", "most"]
    return table(header, lines)


def left_out(run: Run) -> str:
    """Rows that the run had no time for."""
    names = budget.named(run.facts)
    if not names:
        return ""
    suites = {x["suite"]: sum(y["suite"] == x["suite"] for y in names) for x in names}
    counts = ", ".join(f"{count} of {suite}" for suite, count in suites.items())
    return f"Left out, for want of time: {len(names)} rows ({counts})."


def overview(run: Run) -> list[str]:
    """The last words of a run."""
    parts = [summary_table(run), core_table(run) if core(run) else "", left_out(run)]
    return [part for part in parts if part]


def detail_table(rows: list[Row]) -> str:
    """Every row of a group: medians with spread, ratio, rates, share of the limit, memory."""
    lines = []
    for row in rows:
        named = row["contestants"]
        rival = named[row["rival"]] if row["rival"] else None
        ours = named.get(OURS)
        spread = row["ratio_quartiles"] if ours and ours["rounds"] > 1 else None
        others = [
            f"{name} {contestant['median_s'] / (ours or rival)['median_s']:.2g}x"
            for name, contestant in sorted(named.items(), key=lambda item: item[1]["median_s"])
            if name not in (OURS, row["rival"])
        ]
        lines.append(
            [
                case_name(row),
                *(
                    "-" if x is None else milliseconds(x) + "*" * (name in row["once"])
                    for name, x in ((OURS, ours), (row["rival"], rival))
                ),
                row["rival"] or "-",
                "-" if row["ratio"] is None else f"{row['ratio']:.2f}x",
                f"{spread[0]:.2f} to {spread[1]:.2f}" if spread else "",
                rate(ours or rival),
                percent((ours or rival).get("share")),
                f"{size(ours.get('peak_bytes') if ours else None)} /"
                f" {size(rival.get('peak_bytes') if rival else None)}",
                str((ours or rival)["rounds"]),
                ", ".join(others) or "-",
            ]
        )
    header = [
        SIZES_OF[rows[0]["suite"]],
        "ours, ms",
        "rival, ms",
        "fastest rival",
        "ratio",
        "quartiles",
        "GFLOP/s",
        "of limit",
        "memory, ours / rival",
        "rounds",
        "others",
    ]
    return table(header, lines)


SIZES_OF = {
    **dict.fromkeys(("forward", "backward", "forward+backward", "options"), "B, H, L, D"),
    **dict.fromkeys(("module", "encoder"), "layer B, T, E, H"),
    "decode": "B, H:H_kv, S, D",
    "varlen": "B, H, D",
}

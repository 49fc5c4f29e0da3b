"""Tables of results in Markdown: every row, the means of suites, the core shapes beside torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pandas as pd

from . import OURS, SDPA
from .grid import CORE, DTYPE_NAMES, SUITES
from .results import Row, Run, case_name

TITLES = {
    "forward": "attention, forward",
    "backward": "attention, backward",
    "forward+backward": "attention, forward and backward",
    "options": "attention with options",
    "decode": "decoding",
    "varlen": "packed sequences",
    "sparse": "sparse attention",
    "module": "MultiheadAttention",
    "encoder": "Transformer encoder",
}
SIZES_OF = {  # what the numbers of a row's name are; else B, H, L, D
    "decode": "B, H:H_kv, S, D",
    "varlen": "B, H, D",
    "sparse": "pattern: H, L, D",
    "module": "layer B, T, E, H",
    "encoder": "layer B, T, E, H",
}


def frame(run: Run) -> pd.DataFrame:
    """A line per row, suite by suite; the rows of one ``group`` have one geometric mean."""
    several = len({row["backend"] for row in run.rows}) > 1
    lines = []
    for row in sorted(run.rows, key=lambda row: list(SUITES).index(row["suite"])):
        case, suite, named = row["case"], row["suite"], row["contestants"]
        worked = suite in ("options", "varlen", "sparse")
        kind = case.get("mode") or (case["work"] if worked else None)
        parts = [TITLES[suite], DTYPE_NAMES[case["dtype"]], kind]
        parts += [row["backend"] or "rivals"] if several else []
        lines.append(
            {
                "suite": suite,
                "dtype": DTYPE_NAMES[case["dtype"]],
                "group": ", ".join(filter(None, parts)),
                "name": case_name(row),
                "ratio": row["ratio"],
                "share": named.get(OURS, {}).get("share"),
                "row": row,
            }
        )
    return pd.DataFrame(lines).astype({"ratio": float, "share": float})


def core(lines: pd.DataFrame) -> pd.DataFrame:
    """The core rows of a `frame`, each beside `F.scaled_dot_product_attention` by its fused kernel.

    That is what torch takes by itself here.
    """

    def ratio(row: Row) -> float | None:
        case, named = row["case"], row["contestants"]
        shape = tuple(case.get(x) for x in ("B", "H", "T", "S", "D"))
        wanted = row["suite"] in ("forward", "forward+backward") and shape in CORE
        if not (wanted and OURS in named and SDPA in named):
            return None
        return float(named[SDPA]["median_s"] / named[OURS]["median_s"])

    group = lines["dtype"] + ", " + lines["suite"].str.replace("+", " + ")
    found = lines.assign(ratio=lines["row"].map(ratio).astype(float), group=group)
    return found.dropna(subset=["ratio"])


def geometric_mean(values: Iterable[float]) -> float:
    """The exponential of the mean of the logarithms."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def table(lines: pd.DataFrame, *, text: bool = False) -> str:
    """A Markdown table: the first column to the left, the others to the right unless ``text``."""
    cells = [[*map(str, line)] for line in (lines.columns, *lines.itertuples(index=False))]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]

    def written(line: list[str]) -> str:
        left = [text or i == 0 for i in range(len(line))]
        aligned = [
            cell.ljust(width) if at_left else cell.rjust(width)
            for cell, width, at_left in zip(line, widths, left, strict=True)
        ]
        return f"| {' | '.join(aligned)} |"

    end = "-" if text else ":"
    rule = ["-" * widths[0], *("-" * (width - 1) + end for width in widths[1:])]
    return "\n".join([written(cells[0]), written(rule), *map(written, cells[1:])])


def means(title: str, lines: pd.DataFrame) -> str:
    """One line for each group: geometric mean and extremes of the ratios, and our share."""
    found = []
    for group, rows in lines.dropna(subset=["ratio"]).groupby("group", sort=False):
        least, shares = rows.loc[rows["ratio"].idxmin()], rows["share"].dropna()
        found.append(
            {
                title: group,
                "rows": len(rows),
                "geometric mean": f"**{geometric_mean(rows['ratio']):.2f}x**",
                "least": f"{least['ratio']:.2f}x ({least['name']})",
                "most": f"{rows['ratio'].max():.2f}x",
                "slower in": (rows["ratio"] < 1).sum(),
                "share of limit": percent(geometric_mean(shares) if len(shares) else None),
            }
        )
    return table(pd.DataFrame(found)) if found else ""


def overview(run: Run) -> str:
    """The last words of a run."""
    lines = frame(run)
    parts = [
        means("times as fast as the fastest rival", lines),
        means("core shapes beside torch's fused", core(lines)),
    ]
    if left_out := run.facts.get("not_timed"):
        counts = pd.Series([x["suite"] for x in left_out]).value_counts(sort=False)
        names = ", ".join(f"{count} of {suite}" for suite, count in counts.items())
        parts.append(f"Left out, for want of time: {len(left_out)} rows ({names}).")
    return "\n\n".join(filter(None, parts))


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


def details(rows: Iterable[Row]) -> str:
    """Every row of a group: medians with spread, ratio, rates, share of the limit, memory."""
    return table(pd.DataFrame(map(_detail, rows)))


def _detail(row: Row) -> dict[str, str]:
    named = row["contestants"]
    ours, rival = named.get(OURS), named.get(row["rival"])
    shown = ours or rival
    spread = row["ratio_quartiles"] if ours and ours["rounds"] > 1 else None
    others = [
        f"{name} {contestant['median_s'] / shown['median_s']:.2g}x"
        for name, contestant in sorted(named.items(), key=lambda item: item[1]["median_s"])
        if name not in (OURS, row["rival"])
    ]
    times = [
        "-" if x is None else milliseconds(x) + "*" * (name in row["once"])
        for name, x in ((OURS, ours), (row["rival"], rival))
    ]
    memory = [size(x.get("peak_bytes") if x else None) for x in (ours, rival)]
    return {
        SIZES_OF.get(row["suite"], "B, H, L, D"): case_name(row),
        "ours, ms": times[0],
        "rival, ms": times[1],
        "fastest rival": row["rival"] or "-",
        "ratio": "-" if row["ratio"] is None else f"{row['ratio']:.2f}x",
        "quartiles": f"{spread[0]:.2f} to {spread[1]:.2f}" if spread else "",
        "GFLOP/s": rate(shown),
        "of limit": percent(shown.get("share")),
        "memory, ours / rival": " / ".join(memory),
        "rounds": str(shown["rounds"]),
        "others": ", ".join(others) or "-",
    }


def contestants(row: Row) -> str:
    """Everybody in one row, the fastest first, and who is absent."""
    named = row["contestants"]
    ours = named.get(OURS)
    lines = [
        {
            f"{case_name(row)}, {row['case']['dtype']}, {row['case']['work']}": name,
            "ms": milliseconds(one),
            "times ours": f"{one['median_s'] / ours['median_s']:.2f}" if ours else "-",
            "GFLOP/s": rate(one),
            "of limit": percent(one["share"]),
            "memory": size(one["peak_bytes"]),
            "rounds": one["rounds"],
        }
        for name, one in sorted(named.items(), key=lambda item: float(item[1]["median_s"]))
    ]
    absent = [f"  {name}: {reason}" for name, reason in row["absent"].items()]
    return "\n".join([table(pd.DataFrame(lines)), *absent])

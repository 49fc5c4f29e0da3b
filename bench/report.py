"""What a run of the benchmarks says: tables, geometric means, and where we lose.

    python -m bench.report FILE.json            print it
    python -m bench.report FILE.json --write    also put it into docs/performance.md and the README

FILE.json comes from ``pytest bench --benchmark-json=FILE.json``. Exit code 2, with one line, for a
file that cannot be read or that another version of the benchmarks wrote.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from . import OURS, ROOT, SCHEMA

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"

Row = dict[str, Any]


class Run(NamedTuple):
    """One file of results."""

    path: Path
    facts: dict[str, Any]  # machine, commit, date, settings, versions, instruction sets
    rows: list[Row]


class Group(NamedTuple):
    """Rows that one geometric mean is taken over."""

    title: str
    contains: Callable[[Row], bool]


def _attention(dtype: str, *works: str) -> Callable[[Row], bool]:
    return lambda row: (
        row["suite"] == "attention"
        and row["case"]["dtype"] == dtype
        and row["case"]["work"] in works
    )


def _layers(suite: str, mode: str, dtype: str) -> Callable[[Row], bool]:
    return lambda row: (
        row["suite"] == suite and row["case"]["mode"] == mode and row["case"]["dtype"] == dtype
    )


BOTH = ("forward", "forward+backward")
GROUPS = (
    Group("attention, fp32, forward", _attention("float32", "forward")),
    Group("attention, fp32, forward + backward", _attention("float32", "forward+backward")),
    Group("attention, fp32, both", _attention("float32", *BOTH)),
    Group("attention, bf16, forward", _attention("bfloat16", "forward")),
    Group("attention, bf16, forward + backward", _attention("bfloat16", "forward+backward")),
    Group("attention, bf16, both", _attention("bfloat16", *BOTH)),
    Group("MultiheadAttention, fp32, eval", _layers("module", "eval", "float32")),
    Group("MultiheadAttention, fp32, train", _layers("module", "train", "float32")),
    Group("MultiheadAttention, bf16, eval", _layers("module", "eval", "bfloat16")),
    Group("MultiheadAttention, bf16, train", _layers("module", "train", "bfloat16")),
    Group("encoder, fp32, inference", _layers("encoder", "inference", "float32")),
    Group("encoder, fp32, training step", _layers("encoder", "step", "float32")),
    Group("encoder, bf16, inference", _layers("encoder", "inference", "bfloat16")),
    Group("encoder, bf16, training step", _layers("encoder", "step", "bfloat16")),
)
DETAILED = tuple(group for group in GROUPS if not group.title.endswith("both"))


def load(path: Path) -> Run:
    """Read a file of results.

    Raises:
        ValueError: It cannot be read, holds no results, or is of another schema; one line.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"bench: cannot read {path}: {error}") from None
    ours = content.get("attnfast") if isinstance(content, dict) else None
    if not isinstance(ours, dict) or "schema" not in ours:
        raise ValueError(f"bench: {path} is not a result of this project's benchmarks")
    if ours["schema"] != SCHEMA:
        raise ValueError(f"bench: {path} has schema {ours['schema']}, this code reads {SCHEMA}")
    rows = [row["extra_info"] for row in content["benchmarks"] if "ratio" in row["extra_info"]]
    if not rows:
        raise ValueError(f"bench: {path} holds no finished row")
    facts = {key: content[f"{key}_info"] for key in ("machine", "commit")}
    return Run(path, {**ours, **facts, "date": content["datetime"][:10]}, rows)


def geometric_mean(values: Iterable[float]) -> float:
    """The exponential of the mean of the logarithms."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def case_name(row: Row) -> str:
    """A row's case in a few words, without dtype and pass."""
    case = row["case"]
    if row["suite"] != "attention":
        options = [name for name in ("weights", "padding") if case.get(name)]
        name = f"{case['layer']} {case['B']}, {case['T']}, {case['E']}, {case['H']}"
        return ", ".join([name, *options])
    length = case["T"] if case["T"] == case["S"] else f"{case['T']}:{case['S']}"
    sizes = f"{case['B']}, {case['H']}, {length}, {case['D']}"
    return sizes + (", causal" if case["causal"] else "")


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table with aligned columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: list[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        aligned = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        return f"| {' | '.join(aligned)} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(header), line(rule), *map(line, rows)])


def milliseconds(contestant: dict[str, float]) -> str:
    """A contestant's median with half of its interquartile range, in per cent of the median."""
    ms = contestant["median_s"] * 1e3
    digits = max(0, min(3, 2 - math.floor(math.log10(ms))))
    if contestant["rounds"] == 1:
        return f"{ms:.{digits}f}"
    spread = (contestant["q3_s"] - contestant["q1_s"]) / contestant["median_s"] / 2
    return f"{ms:.{digits}f} ±{spread:.0%}"


def rate(contestant: dict[str, float]) -> str:
    """A contestant's GFLOP/s."""
    gflops = contestant["gflops"]
    return f"{gflops:.0f}" if gflops >= 10 else f"{gflops:.1f}"


def summary_table(run: Run) -> str:
    """One line for each group: geometric mean and extremes of the ratios."""
    lines = []
    for group in GROUPS:
        rows = [row for row in run.rows if group.contains(row)]
        if not rows:
            continue
        slowest = min(rows, key=lambda row: float(row["ratio"]))
        lines.append(
            [
                group.title,
                str(len(rows)),
                f"**{geometric_mean(row['ratio'] for row in rows):.2f}x**",
                f"{slowest['ratio']:.2f}x ({case_name(slowest)})",
                f"{max(row['ratio'] for row in rows):.2f}x",
            ]
        )
    return table(["times as fast as torch", "rows", "geometric mean", "least", "most"], lines)


def detail_table(rows: list[Row]) -> str:
    """Every row of a group with both medians, spread, rates, ratio and rounds."""
    lines = []
    for row in rows:
        ours, rival = row["contestants"][OURS], row["contestants"][row["rival"]]
        low, high = row["ratio_quartiles"]
        rounds = str(ours["rounds"]) + ("*" if row["once"] else "")
        lines.append(
            [
                case_name(row),
                milliseconds(ours),
                milliseconds(rival),
                rate(ours),
                rate(rival),
                f"{row['ratio']:.2f}x",
                f"{low:.2f} to {high:.2f}" if ours["rounds"] > 1 else "",
                rounds,
            ]
        )
    sizes = "B, H, L, D" if rows[0]["suite"] == "attention" else "layer B, T, E, H"
    header = [sizes, "ours, ms", "torch, ms", "GFLOP/s", "torch's", "ratio", "quartiles", "rounds"]
    return table(header, lines)


def losses(run: Run) -> str:
    """Which rows are slower than the rival, and which cannot be told from it."""
    lost = sorted((row for row in run.rows if row["ratio"] < 1), key=lambda row: row["ratio"])
    if not lost:
        text = f"No row is slower than torch ({len(run.rows)} rows)."
    else:
        text = f"Slower than torch in {len(lost)} of {len(run.rows)} rows:\n\n"
        text += "\n".join(f"- {_in_full(row)}: {row['ratio']:.2f}x" for row in lost)
    level = [row for row in run.rows if row["ratio"] >= 1 and row["ratio_quartiles"][0] < 1]
    if level:
        text += "\n\nNot slower, but a quarter of the rounds or more were:\n\n"
        text += "\n".join(f"- {_in_full(row)}: {row['ratio']:.2f}x" for row in level)
    return text


def _in_full(row: Row) -> str:
    case = row["case"]
    how = case["work"] if row["suite"] == "attention" else case["mode"]
    return f"{row['suite']}, {case['dtype']}, {how}: {case_name(row)}"


def provenance(run: Run) -> str:
    """Where the figures come from, in one paragraph."""
    facts, versions = run.facts, run.facts["versions"]
    machine, settings = facts["machine"], facts["settings"]
    commit = (facts["commit"]["id"] or "unknown")[:12]
    dirty = " with uncommitted changes" if facts["commit"]["dirty"] else ""
    load = "" if facts["load"] is None else f"; load before the run {facts['load']}"
    quick = (
        ""
        if settings["suite"] == "full"
        else f" The {settings['suite']} suite: not for publication."
    )
    return (
        f"{machine['cpu']}, {machine['architecture']}, {machine['system']};"
        f" {settings['threads']} threads of {machine['cores']} cores{load}; our kernels:"
        f" {facts['kernel']}, torch's: {facts['torch_isa']}. attnfast {versions['attnfast']}"
        f" at commit {commit}{dirty} (kernel sources {facts['sources']}),"
        f" torch {versions['torch']}, Python {versions['python']}, {facts['date']}.{quick}"
    )


def report(run: Run) -> str:
    """The whole report, without a title, as Markdown that also reads well in a terminal."""
    sections = [provenance(run), summary_table(run), losses(run)]
    for group in DETAILED:
        rows = [row for row in run.rows if group.contains(row)]
        if rows:
            sections += [f"## {group.title}", detail_table(rows)]
    if any(row["once"] for row in run.rows):
        sections.append("\\* torch's call is so long that its first run stands for its time.")
    return "\n\n".join(sections)


METHOD = """\
## How it is measured

`make bench` repeats this on your machine. Each row runs ours and torch's in one process on the same
inputs. Their results are compared once, and a row whose results differ fails. Then they take turns,
one call each per round, for as many rounds as fit the row's time; the times shown are medians,
± half the interquartile range. The ratio is torch's median over ours; its quartiles are over the
rounds. "torch" is `F.scaled_dot_product_attention` with the kernel it picks itself, and
`nn.MultiheadAttention`, in eval with its fast path. Causal rows pass `is_causal=True`.

GFLOP/s: 4 B H L L D operations forward, half of that if causal, 3.5 times with the backward pass. A
layer adds 8 B T E E for its projections, 3 times in training, and a layer of an encoder 16 B T E E
more for its feed-forward part. All without dropout; "weights" are averaged over heads, "padding" is
a `key_padding_mask` that hides a quarter of the keys.

"encoder" is an `nn.TransformerEncoder` of two layers, stock and after `attnfast.replace`. A step is
forward, backward and AdamW, in bf16 under autocast. In inference torch takes its fast path, which
skips padding by nested tensors; bf16 there means bf16 parameters.
"""


def page(run: Run) -> str:
    """The text of docs/performance.md."""
    note = "<!-- Written by `python -m bench.report FILE.json --write`; not by hand. -->"
    return f"{note}\n\n# Speed\n\n{report(run)}\n\n{METHOD}"


def readme_block(run: Run) -> str:
    """The README's table: ratios by shape, then their geometric means."""
    columns = [group for group in DETAILED if group.title.startswith("attention")]
    ratios: dict[tuple[str, str], float] = {}
    for group in columns:
        for row in filter(group.contains, run.rows):
            ratios[case_name(row), group.title] = row["ratio"]
    shapes = list(dict.fromkeys(name for name, _ in ratios if not name.endswith(", causal")))
    lines = []
    for shape in shapes:
        cells = [
            " / ".join(
                f"{ratios[name, group.title]:.1f}" if (name, group.title) in ratios else "-"
                for name in (shape, f"{shape}, causal")
            )
            for group in columns
        ]
        lines.append([shape, *cells])
    header = ["B, H, L, D", *(group.title.removeprefix("attention, ") for group in columns)]
    return "\n\n".join(
        [
            BEGIN,
            "Times as fast as `F.scaled_dot_product_attention`, full / causal:",
            table(header, lines),
            summary_table(run),
            losses(run),
            f"{provenance(run)} Every row: [docs/performance.md](docs/performance.md).",
            END,
        ]
    )


def write(run: Run, root: Path) -> list[Path]:
    """Put the report into docs/performance.md and the README's block.

    Raises:
        ValueError: The run is not of the full suite, or the README has no block to fill; one line.
    """
    if run.facts["settings"]["suite"] != "full":
        raise ValueError(
            f"bench: {run.path} is not of the full suite, so it is not written to docs"
        )
    readme, performance = root / "README.md", root / "docs" / "performance.md"
    text = readme.read_text() if readme.exists() else ""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"bench: {readme} has no line {BEGIN} followed by {END}")
    readme.write_text(before + readme_block(run) + after)
    performance.parent.mkdir(exist_ok=True)
    performance.write_text(page(run))
    return [performance, readme]


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description=__doc__.split("\n")[0]
    )
    parser.add_argument("file", type=Path, help="from pytest bench --benchmark-json=FILE")
    parser.add_argument(
        "--write", action="store_true", help="also fill docs/performance.md and the README's block"
    )
    parser.add_argument(
        "--root", type=Path, default=ROOT, help="of the repository that --write fills"
    )
    options = parser.parse_args(arguments)
    try:
        run = load(options.file)
        print(report(run))
        if options.write:
            print("\nwrote", *write(run, options.root))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""One page of a visit's results, to be committed: which kernels are right, and how fast they are.

Written with what a machine with a GPU has; its plots need matplotlib, and are left out without.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from bench import OURS, results
from bench.grid import DTYPE_NAMES
from bench.results import Row, Run, case_name

NAME = "page.md"
MOST_FAILURES = 40


def write(out: Path, head: list[str], failures: list[str]) -> None:
    """Write ``page.md`` into a visit's folder, from the files there.

    Args:
        out: The folder.
        head: What the machine is, lines.
        failures: What failed, lines.
    """
    runs = [results.load(path) for path in sorted(out.glob("*.json"))]
    evidence = [row for run in runs if run.facts["kind"] == "evidence" for row in run.rows]
    timing = next((run for run in runs if run.facts["kind"] == "timing"), None)
    parts = [f"# {head[0]}", "\n".join(f"- {line}" for line in head[1:])]
    parts += ["## Which kernels are right", right(evidence)]
    if failures:
        shown = [f"- {line}" for line in failures[:MOST_FAILURES]]
        shown += [f"- and {len(failures) - len(shown)} more"] if len(failures) > len(shown) else []
        parts += [f"{len(failures)} failures:", "\n".join(shown)]
    parts += ["## How fast they are"]
    parts += ["No row was timed."] if timing is None else [fast(timing), *pictures(timing, out)]
    (out / NAME).write_text("\n\n".join(parts) + "\n")


def right(rows: Iterable[Row]) -> str:
    """The cases of each kernel, and the largest error as a share of the accuracy rule."""
    lines = [
        (
            f"{row['backend']} {row['kind']}",
            DTYPE_NAMES[row["dtype"]],
            row["architecture"],
            str(len(row["passed"])),
            str(len(row["failed"])),
            f"{row['worst']['margin']:.0%}, {row['worst']['result']}" if row["worst"] else "-",
        )
        for row in rows
    ]
    return _table(("kernel", "dtype", "ran as", "right", "wrong", "worst, of the rule"), lines)


def fast(run: Run) -> str:
    """Every row beside its fastest rival, and in how many of them we lose."""
    lines, lost, compared = [], 0, 0
    for row in run.rows:
        others = {who: x for who, x in row["contestants"].items() if who != OURS}
        rival = min(others, key=lambda who: others[who]["median_s"], default=None)
        ours = row["contestants"].get(OURS)
        if row["ratio"] is not None:
            compared, lost = compared + 1, lost + (row["ratio"] < 1)
        lines.append(
            (
                row["suite"],
                DTYPE_NAMES[row["case"]["dtype"]],
                case_name(row),
                f"{1e3 * ours['median_s']:.3g}" if ours else "-",
                f"{1e3 * others[rival]['median_s']:.3g}, {rival}" if rival else "-",
                "-" if row["ratio"] is None else f"{row['ratio']:.2f}x",
                f"{ours['share']:.0%}" if ours and ours.get("share") else "-",
            )
        )
    said = (
        f"Slower than the fastest rival in {lost} of {compared} rows. Medians of interleaved calls."
    )
    head = ("suite", "dtype", "case", "ours, ms", "fastest rival, ms", "times as fast", "of limit")
    return f"{said}\n\n{_table(head, lines)}"


def pictures(run: Run, out: Path) -> list[str]:
    """The plots of ``bench report``, drawn beside the page."""
    try:
        from bench import plots

        return [f"![{name}]({name})" for name in plots.draw(run, out)]
    except ImportError:
        return ["No plots: matplotlib is not installed here; `python -m bench report` draws them."]


def _table(head: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    rows = [head, tuple("---" for _ in head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)

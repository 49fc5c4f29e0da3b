"""The table of docs/evidence.md: which kernel was proven, compiled, run and timed where.

All of it is read from files: of evidence and of timings in ``bench/results``, and the tables of the
Triton kernels' compiler. What is older than the sources of its backend is called stale.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pandas as pd

from attnfast import dispatch
from bench import OURS, RESULTS, ROOT, environment, results
from bench.pages import fill
from bench.tables import table
from csrc.build import X86_ISAS

from . import compiled

KINDS = ("forward", "backward", "weights", "decode")
KINDS_OF = {"gluon": ("forward",)}  # backends that have not all of them
COLUMNS = ("proven", "compiled", "run on hardware", "timed")

Found = dict[tuple[str, str, str, str], list[results.Row]]  # backend, kind, column, where -> rows


class Line(NamedTuple):
    """A kernel and all that is known of it, in words; a dash for nothing."""

    backend: str
    kind: str
    proven: str
    compiled: str
    hardware: str
    timed: str


def lines(root: Path = RESULTS, tree: Path = ROOT) -> list[Line]:
    """Every kernel that there is.

    Args:
        root: Where the files lie.
        tree: The sources that staleness is judged by.

    Raises:
        ValueError: A file cannot be read; one line.
    """
    said: dict[tuple[str, str, str], list[str]] = {}
    proven: set[str] = set()  # instruction sets
    for run in results.found("evidence", root):
        groups: dict[tuple[str, str, str, str], list[results.Row]] = {}
        for row in run.rows:
            column = "run on hardware" if row["stage"] == "hardware" else "proven"
            where = row["architecture"] if row["stage"] == "hardware" else row["stage"]
            groups.setdefault((row["backend"], row["kind"], column, where), []).append(row)
        for (backend, kind, column, where), rows in groups.items():
            text = f"{where}: {_cases(rows)}{stale(backend, run, tree)}"
            said.setdefault((backend, kind, column), []).append(text)
            proven |= {where} if backend == "cpu" else set()
    for run in results.found("timing", root):
        for (backend, kind, where), count in _timed(run).items():
            text = f"{where}: {count} rows{stale(backend, run, tree)}"
            said.setdefault((backend, kind, "timed"), []).append(text)
    for (backend, kind), texts in compiled.read(tree).items():
        said[backend, kind, "compiled"] = texts
    if lacking := [isa for isa in X86_ISAS if isa not in proven]:
        for kind in KINDS:
            found = said.setdefault(("cpu", kind, "run on hardware"), [])
            found.append(f"not {', '.join(lacking)}")
    return [
        Line(backend, kind, *("; ".join(said.get((backend, kind, x), ["-"])) for x in COLUMNS))
        for backend in dispatch.NAMES
        if backend != "reference"
        for kind in KINDS_OF.get(backend, KINDS)
    ]


def _cases(rows: list[results.Row]) -> str:
    """How many cases of the tables passed, and the worst error, over all dtypes."""
    passed, failed = (sum(len(row[name]) for row in rows) for name in ("passed", "failed"))
    worst = [row["worst"]["margin"] for row in rows if row["worst"]]
    text = f"{passed} of {passed + failed} cases"
    return f"{text}, worst {max(worst):.0%}" if worst else text


def _timed(run: results.Run) -> dict[tuple[str, str, str], int]:
    """By backend, kind and architecture, how many rows of the grid were timed."""
    counts: dict[tuple[str, str, str], int] = {}
    for row in run.rows:
        case, backend = row["case"], row.get("backend")
        if backend is None or OURS not in row["contestants"]:
            continue
        both = "forward+backward" if case.get("mode") in ("train", "step") else "forward"
        kinds = ["decode"] if row["suite"] == "decode" else case.get("work", both).split("+")
        if case.get("weights") or "weights" in case.get("option", ""):
            kinds = [*kinds, "weights"]
        for kind in kinds:
            key = backend, kind, row["kernel"]
            counts[key] = counts.get(key, 0) + 1
    return counts


def stale(backend: str, run: results.Run, tree: Path) -> str:
    """Whether the kernels' sources have changed since."""
    return "" if run.facts["sources"] == environment.sources(backend, tree) else " (stale)"


def text(found: list[Line]) -> str:
    """The lines as a table."""
    cells = [(f"{line.backend} {line.kind}", *line[2:]) for line in found]
    return table(pd.DataFrame(cells, columns=["kernel", *COLUMNS]), text=True)


def sources(root: Path, tree: Path) -> str:
    """The files that the lines come from, with their commits."""
    cells = []
    for kind in ("evidence", "timing"):
        for run in results.found(kind, root):
            commit = (run.facts["commit"]["id"] or "unknown")[:9]
            dirty = "+" if run.facts["commit"]["dirty"] else ""
            name = f"{run.path.parent.name}/{run.path.name}"
            cells.append((name, run.facts["kernel"], f"{commit}{dirty}", run.facts["date"][:10]))
    for path in compiled.tables(tree):
        commit, date = compiled.when(path, tree)
        cells.append((path.name, f"Triton {path.stem}", commit, date))
    return table(pd.DataFrame(cells, columns=["file", "kernels", "commit", "date"]), text=True)


def write(root: Path) -> Path:
    """Fill docs/evidence.md."""
    folder = root / "bench" / "results"
    page = root / "docs" / "evidence.md"
    return fill(page, f"{text(lines(folder, root))}\n\n{sources(folder, root)}")

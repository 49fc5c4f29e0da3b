"""Write the tables of docs/triton.md from what tools/aot.py left in docs/triton-resources.

    python tools/aot_docs.py            write them
    python tools/aot_docs.py --check    exit code 1 if they are not as the files say

Triton is not needed.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = Path("docs") / "triton.md"
TABLES = Path("docs") / "triton-resources"
BEGIN, END = "<!-- tables: begin -->\n", "<!-- tables: end -->\n"
DTYPES = {"bfloat16": "bf16", "float32": "fp32"}
Row = dict[str, str]


def version(path: Path) -> tuple[int, ...]:
    """The Triton version that a table is of, to be compared."""
    return tuple(int(part) for part in path.stem.split("."))


def read(root: Path) -> dict[str, list[Row]]:
    """The tables by Triton's version, the newest first."""
    paths = sorted((root / TABLES).glob("*.csv"), key=version, reverse=True)
    return {path.stem: list(csv.DictReader(path.read_text().splitlines())) for path in paths}


def unique(rows: list[Row], column: str) -> list[str]:
    """A column's values, in the order of their first appearance."""
    return list(dict.fromkeys(row[column] for row in rows))


def markdown(header: list[str], lines: list[list[str]]) -> str:
    """A table."""
    rows = [header, ["---"] * len(header), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def cell(row: Row | None) -> str:
    """One kernel: tile, warps, registers, shared memory and, where there are any, spills."""
    if row is None:
        return "-"
    text = (
        f"{row['tile']}, {row['warps']} w, {row['registers']} r, {int(row['shared']) / 1024:.0f} KB"
    )
    return text if row["spills"] == "0" else f"{text}, spills {row['spills']}"


def is_default(row: Row) -> bool:
    """Whether it must not spill, see ``aot.faults``."""
    return row["variant"] in ("plain", "causal") and int(row["D"]) <= 128


def summary(tables: dict[str, list[Row]]) -> str:
    """By version and architecture, how much was compiled and how much of it spills."""
    lines = []
    for name, rows in tables.items():
        for arch in unique(rows, "arch"):
            own = [row for row in rows if row["arch"] == arch]
            narrow = [row for row in own if is_default(row)]
            spilling = [sum(row["spills"] != "0" for row in x) for x in (narrow, own)]
            lines.append(
                [
                    name,
                    arch,
                    str(len(own)),
                    f"{max(int(row['shared']) for row in own) / 1024:.0f} KB",
                    ", ".join(x for x in sorted(unique(own, "matrix")) if x),
                    f"{spilling[0]} of {len(narrow)}",
                    f"{spilling[1]} of {len(own)}",
                ]
            )
    header = ["Triton", "architecture", "kernels", "most shared memory", "matrix instructions"]
    return markdown([*header, "spill: plain, causal, D to 128", "spill: all"], lines)


def detail(rows: list[Row], variant: str) -> str:
    """Every kernel of one variant: a line for a pass, dtype and D, a column for an architecture."""
    rows = [row for row in rows if row["variant"] == variant]
    arches = unique(rows, "arch")
    found: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row["name"], row["dtype"], row["D"]), {})[row["arch"]] = row
    lines = [
        [f"{name}, {DTYPES.get(dtype, dtype)}, {D}", *(cell(own.get(arch)) for arch in arches)]
        for (name, dtype, D), own in found.items()
    ]
    return markdown(["pass, dtype, D", *arches], lines)


def text(root: Path = ROOT) -> str:
    """What stands between the marks."""
    tables = read(root)
    newest = next(iter(tables))
    parts = [summary(tables)]
    for variant in ("plain", "causal", "everything"):
        parts.append(f"Triton {newest}, {variant}:\n\n{detail(tables[newest], variant)}")
    return "\n" + "\n".join(parts) + "\n"


def main(
    arguments: list[str] | None = None,
    root: Path = ROOT,
    page: Path = PAGE,
    text: Callable[[Path], str] = text,
) -> int:
    """The command line, of any page whose tables a function makes; returns the exit code."""
    parser = argparse.ArgumentParser(description=f"Write the tables of {page}.")
    parser.add_argument("--check", action="store_true", help="write nothing")
    given = parser.parse_args(arguments)
    page = root / page
    before = page.read_text(encoding="utf-8")
    head, _, rest = before.partition(BEGIN)
    _, mark, tail = rest.partition(END)
    if not mark:
        print(f"{page} lacks the marks {BEGIN.strip()} and {END.strip()}", file=sys.stderr)
        return 2
    after = f"{head}{BEGIN}{text(root)}{END}{tail}"
    if given.check:
        print(f"{page} is {'current' if after == before else 'not what the tables say'}")
        return int(after != before)
    page.write_text(after, encoding="utf-8")
    print(f"wrote {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

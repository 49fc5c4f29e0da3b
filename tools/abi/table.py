"""The last result: its file, and its table in the documentation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .environments import Environment

DOCS = Path(__file__).resolve().parents[2] / "docs"
RESULT = "docs/abi.json"
PAGE = "docs/wheel.md"
BEGIN, END = "<!-- abi:begin -->", "<!-- abi:end -->"
HEAD = (
    "| Python | torch | stand-ins | accuracy rule | instructions | smoke tests | install | run |\n"
    "| --- | --- | ---: | --- | --- | --- | ---: | ---: |"
)


def line(row: Environment) -> str:
    """An environment, for people."""
    if row.outcome != "passed" and not row.run_s:
        return f"Python {row.python}, torch {row.torch}: {row.outcome}"
    return (
        f"Python {row.python}, torch {row.torch} ({row.stubs} CUDA libraries stood in for):"
        f" {row.outcome}: {row.accuracy} within the accuracy rule on {row.instruction_set},"
        f" {len(row.smoke)} smoke tests; install {row.install_s} s, run {row.run_s} s"
    )


def markdown(result: dict[str, Any]) -> str:
    """The table, with what was tested above it."""
    wheel = result["wheel"]
    lines = [
        f"`{wheel['name']}`, {wheel['bytes'] / 1e6:.2f} MB, SHA-256 `{wheel['sha256'][:16]}`,"
        f" of commit `{result['commit'][:12]}`, on {result['date']} ({result['machine']}).",
        "",
        HEAD,
    ]
    for row in result["environments"]:
        if row["outcome"] == "passed":
            cells = (row["accuracy"], row["instruction_set"], f"{len(row['smoke'])} passed")
            times = (f"{row['install_s']} s", f"{row['run_s']} s")
            cells = (row["python"], row["torch"], str(row["stubs"]), *cells, *times)
        else:
            cells = (row["python"], row["torch"], "", row["outcome"], "", "", "", "")
        lines.append(f"| {' | '.join(cells)} |")
    if "sdist" in result:
        sdist = result["sdist"]
        state = "holds the same files" if sdist["outcome"] == "passed" else sdist["outcome"]
        lines += [
            "",
            f"A wheel built from `{sdist['name']}` ({sdist['bytes'] / 1e6:.2f} MB):"
            f" {state} ({sdist['build_s']} s).",
        ]
    return "\n".join(lines)


def filled(page: str, result: dict[str, Any]) -> str:
    """The page's text with this result."""
    before, _, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"{PAGE}: no line {BEGIN} followed by {END}")
    return f"{before}{BEGIN}\n\n{markdown(result)}\n\n{END}{after}"


def write(result: dict[str, Any]) -> None:
    """Put the result into its file and its table into the page."""
    root = DOCS.parent
    page = root / PAGE
    (root / RESULT).write_text(json.dumps(result, indent=2) + "\n")
    page.write_text(filled(page.read_text(), result))

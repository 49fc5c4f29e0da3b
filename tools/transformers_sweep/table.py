"""What was found of each architecture: docs/transformers.csv, which only this sweep writes."""

from __future__ import annotations

import csv
import io
import subprocess
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "docs" / "transformers.csv"


class Row(NamedTuple):
    """One architecture.

    Attributes:
        model_type: Of its configuration.
        model: The class that was compared.
        transformers: The version.
        commit: At which attnfast was compared.
        outcome: As those that follow, see `compare.Verdict`.
    """

    model_type: str
    model: str
    transformers: str
    commit: str
    outcome: str
    warned: bool = False
    calls: int = 0
    masks: str = ""
    ran: str = ""
    detail: str = ""


def read(path: Path = DATA) -> dict[str, Row]:
    """The rows by model type."""
    if not path.exists():
        return {}
    rows = {}
    for given in csv.DictReader(io.StringIO(path.read_text())):
        text = {**given, "warned": given["warned"] == "yes", "calls": int(given["calls"])}
        rows[given["model_type"]] = Row(**text)  # type: ignore[arg-type]
    return rows


def write(rows: dict[str, Row], path: Path = DATA) -> None:
    """Put them into the file, by model type."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(Row._fields)
    for _, row in sorted(rows.items()):
        writer.writerow(row._replace(warned="yes" if row.warned else ""))  # type: ignore[arg-type]
    path.write_text(out.getvalue())


def commit() -> str:
    """The last commit that changed attnfast or the sweep, short."""
    command = [
        "git",
        "log",
        "-1",
        "--format=%h",
        "--",
        "attnfast",
        "csrc",
        "tools/transformers_sweep",
    ]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()

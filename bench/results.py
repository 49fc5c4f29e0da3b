"""Files of results: one schema, written and read here alone.

A file is a JSON object. Its head says where the results come from (``environment.facts``: kind,
date, device, machine, settings, versions, commit with its dirty flag, digest of the kernels'
sources). ``kind`` says what ``rows`` hold:

    timing      rows of `race.Race.row`, and ``ceilings``
    limits      the same, of the suite of that name alone
    evidence    rows of `tools.gpu.evidence.record`
    crosscheck  rows of `tools.gpu.crosscheck.run`
    scaling     points of `scaling.measure`
    distributed  ways and ranks of `distributed.measure`

They lie in ``bench/results/<device>/``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from . import RESULTS

SCHEMA = 2  # a reader refuses what it does not know
FACTS = ("kind", "date", "device", "machine", "settings", "versions", "kernel", "sources", "commit")
TIMED = ("id", "suite", "case", "contestants", "ratio")
FIELDS = {  # by kind, what readers need of a row
    "timing": TIMED,
    "limits": TIMED,
    "evidence": ("backend", "kind", "dtype", "architecture", "stage"),
    "crosscheck": ("id", "dtype", "failure", "margin"),
    "scaling": ("series", "seconds"),
    "distributed": ("ranks", "method", "layout", "work", "seconds", "peak_bytes", "sent_bytes"),
}

Row = dict[str, Any]


class Run(NamedTuple):
    """One file of results."""

    path: Path
    facts: dict[str, Any]
    rows: list[Row]


def save(path: Path, facts: dict[str, Any], rows: list[Row]) -> None:
    """Write a file of results, all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    content = {"schema": SCHEMA, **facts, "rows": rows}
    part.write_text(json.dumps(rounded(content), indent=1, allow_nan=False) + "\n")
    part.replace(path)


def rounded(x: Any) -> Any:
    """Numbers with six digits, which is more than any clock gives."""
    if isinstance(x, float):
        return float(f"{x:.6g}")
    if isinstance(x, dict):
        return {key: rounded(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [rounded(value) for value in x]
    return x


def load(path: Path, kind: str | None = None) -> Run:
    """Read a file of results, or one of pytest-benchmark that this project's suites wrote.

    Raises:
        ValueError: It cannot be read, is not complete, or of another schema or kind; one line.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"bench: cannot read {path}: {error}") from None
    if isinstance(content, dict) and isinstance(content.get("attnfast"), dict):
        found = [x.get("extra_info", {}) for x in content.get("benchmarks", [])]
        content = {**content["attnfast"], "rows": [row for row in found if "ratio" in row]}
    if not isinstance(content, dict) or "schema" not in content:
        raise ValueError(f"bench: {path} is not a result of this project's benchmarks")
    if content["schema"] != SCHEMA:
        raise ValueError(f"bench: {path} has schema {content['schema']}, this code reads {SCHEMA}")
    if kind is not None and content.get("kind") != kind:
        raise ValueError(f"bench: {path} holds {content.get('kind')} results, {kind} are needed")
    rows = content.pop("rows", None)
    if not rows:
        raise ValueError(f"bench: {path} holds no finished row")
    if (lacking := _lacking(content, rows)) is not None:
        raise ValueError(f"bench: {path} is not complete: no {lacking}")
    return Run(path, content, rows)


def _lacking(facts: dict[str, Any], rows: Any) -> str | None:
    """What a file does not tell of what all files tell, or None."""
    for name in FACTS:
        if name not in facts:
            return f"{name!r}"
    fields = FIELDS.get(facts["kind"])
    if fields is None:
        return f"kind of results called {facts['kind']!r}"
    for i, row in enumerate(rows if isinstance(rows, list) else [rows]):
        for name in fields:
            if not isinstance(row, dict) or name not in row:
                return f"{name!r} in row {i}"
    return None


def found(kind: str, root: Path = RESULTS) -> list[Run]:
    """All results of a kind in the folders of a directory, the newest first.

    Raises:
        ValueError: One of the files cannot be read; one line.
    """
    runs = [load(path) for path in sorted(root.glob("*/*.json"))]
    chosen = [run for run in runs if run.facts["kind"] == kind]
    return sorted(chosen, key=lambda run: str(run.facts["date"]), reverse=True)


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
    if row["suite"] == "sparse":
        heads = case["H"] if case["H"] == case["H_kv"] else f"{case['H']}:{case['H_kv']}"
        length = case["T"] if case["T"] == case["S"] else f"{case['T']}:{case['S']}"
        return f"{case['pattern']} {case['size']}: {heads}, {length}, {case['D']}"
    end = ", causal" if case["causal"] else ""
    if row["suite"] == "varlen":
        return f"{case['name']}: {len(case['lengths'])}, {case['H']}, {case['D']}{end}"
    length = case["T"] if case["T"] == case["S"] else f"{case['T']}:{case['S']}"
    option = f", {case['option']}" if case.get("option") else ""
    return f"{case['B']}, {case['H']}, {length}, {case['D']}{end}{option}"

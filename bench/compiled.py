"""What compilers said of the Triton kernels: the tables that ``tools/aot.py --write`` leaves.

Each row of a table has the fingerprint of the sources that it was compiled from, and is stale where
they have another now. Commit and date are those of the table's last change.
"""

from __future__ import annotations

import ast
import csv
import hashlib
from pathlib import Path
from typing import Any

from .environment import git

FOLDER = Path("docs") / "triton-resources"
KERNELS = {  # by their names in the tables, the backend and the kind of kernel of evidence
    "fwd": ("triton", "forward"),
    "rows": ("triton", "backward"),
    "dq": ("triton", "backward"),
    "dkdv": ("triton", "backward"),
    "dbias": ("triton", "backward"),
    "dsinks": ("triton", "backward"),
    "weights": ("triton", "weights"),
    "received": ("triton", "weights"),
    "decode": ("triton", "decode"),
    "combine": ("triton", "decode"),
    "gluon": ("gluon", "forward"),
}
# By the same names the file in kernels/, and what all of them are compiled from as well: as in
# tools/aot.py, which cannot be asked without Triton.
FILES = {
    **dict.fromkeys(("rows", "dq", "dkdv"), "attention_bwd"),
    **dict.fromkeys(("dbias", "dsinks"), "attention_bias"),
    **dict.fromkeys(("weights", "received"), "attention_weights"),
    **dict.fromkeys(("decode", "combine"), "attention_decode"),
    "fwd": "attention_fwd",
    "gluon": "attention_fwd_gluon",
}
SHARED = ("arguments", "dropout", "gradients", "head", "launch", "rows", "scores")
Key = tuple[str, str, str, str]  # backend, kind, dtype, architecture


def read(tree: Path) -> dict[Key, str]:
    """By kernel, how many variants were compiled, and the most that one of them needs.

    Args:
        tree: The repository.

    Raises:
        ValueError: A table cannot be read; one line.
    """
    found: dict[Key, str] = {}
    for path in sorted((tree / FOLDER).glob("*.csv")):
        groups: dict[Key, list[dict[str, Any]]] = {}
        try:
            for row in csv.DictReader(path.read_text().splitlines()):
                backend, kind = KERNELS[row["name"]]
                groups.setdefault((backend, kind, row["dtype"], row["arch"]), []).append(row)
            made = _when(path.relative_to(tree), tree)
            for key, rows in groups.items():
                text = f"{_most(rows)}, Triton {path.stem}, {made}{_stale(rows, tree)}"
                found[key] = f"{found[key]}; {text}" if key in found else text
        except (OSError, KeyError, ValueError) as error:
            raise ValueError(f"bench: cannot read {path}: {error!r}") from None
    return found


def _most(rows: list[dict[str, Any]]) -> str:
    registers, spills, shared = (
        max(int(row[name]) for row in rows) for name in ("registers", "spills", "shared")
    )
    return (
        f"{len(rows)} variants, up to {registers} registers, {spills} B spilled, {shared} B shared"
    )


def _when(path: Path, tree: Path) -> str:
    """The commit of a table and its date."""
    known = git("log", "-1", "--format=%H %cs", "--", path.as_posix(), tree=tree)
    if not known:
        return "unknown commit"
    commit, date = known.split()
    return f"{commit[:9]}, {date}"


def _stale(rows: list[dict[str, Any]], tree: Path) -> str:
    """How many of the variants were compiled from other sources."""
    count = sum(row["source"] != fingerprint(row["name"], tree) for row in rows)
    if count in (0, len(rows)):
        return " (stale)" if count else ""
    return f" ({count} of {len(rows)} stale)"


def fingerprint(name: str, tree: Path) -> str:
    """8 hex digits that change with the device code a kernel is compiled from."""
    lines = []
    for file in (FILES[name], *SHARED):
        lines += device_code((tree / "kernels" / f"{file}.py").read_text(encoding="utf-8"))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:8]


def device_code(source: str) -> list[str]:
    """As in tools/aot.py: jitted functions, their arguments' classes, constants, no comments."""
    lines = source.splitlines()
    kept = []
    for node in ast.parse(source).body:
        is_definition = isinstance(node, (ast.FunctionDef, ast.ClassDef))
        decorators = node.decorator_list if is_definition else []
        if not (decorators or isinstance(node, (ast.ClassDef, ast.Assign, ast.AnnAssign))):
            continue
        first = min(x.lineno for x in (node, *decorators))
        text = lines[first - 1 : node.end_lineno]
        if is_definition and ast.get_docstring(node) is not None:
            said = node.body[0]
            del text[said.lineno - first : said.end_lineno - first + 1]
        kept += [line.partition("  #")[0].rstrip() for line in text]
    return [line for line in kept if line and not line.lstrip().startswith("#")]

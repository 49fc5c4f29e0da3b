"""What compilers said of the Triton kernels: the tables that ``tools/aot.py --write`` leaves.

A table says nothing of when it was made: that is the commit that last changed it, and it is stale
where the kernels differ from that commit's.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from .environment import PYTHON_KERNELS, git

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
                text = f"{_most(rows)}, Triton {path.stem}, {made}"
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
    """The commit of a table, its date, and whether the kernels have changed since."""
    known = git("log", "-1", "--format=%H %cs", "--", path.as_posix(), tree=tree)
    if not known:
        return "unknown commit"
    commit, date = known.split()
    changed = git("diff", "--stat", commit, "--", *PYTHON_KERNELS, tree=tree)
    return f"{commit[:9]}, {date}{' (stale)' if changed else ''}"

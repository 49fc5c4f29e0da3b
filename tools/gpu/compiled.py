"""What compilers said of the Triton kernels: the tables that ``tools/aot.py --write`` leaves.

Each row of a table has the fingerprint of the sources that it was compiled from, and is stale where
they have another now. Commit and date are those of the table's last change.
"""

from __future__ import annotations

import csv
from pathlib import Path

from bench.environment import git
from tools.device_code import KERNELS, fingerprint

FOLDER = Path("docs") / "triton-resources"


def tables(tree: Path) -> list[Path]:
    """The tables of a repository, one for each version of Triton."""
    return sorted((tree / FOLDER).glob("*.csv"))


def read(tree: Path) -> dict[tuple[str, str], list[str]]:
    """By backend and kind of kernel, what each table says: variants, GPUs, spills, stale rows.

    Raises:
        ValueError: A table cannot be read; one line.
    """
    found: dict[tuple[str, str], list[str]] = {}
    for path in tables(tree):
        groups: dict[tuple[str, str], list[dict[str, str]]] = {}
        try:
            now = {name: fingerprint(name, tree / "kernels") for name in KERNELS}
            for row in csv.DictReader(path.read_text().splitlines()):
                _, *key = KERNELS[row["name"]]
                groups.setdefault((key[0], key[1]), []).append(row)
            for key, rows in groups.items():
                gpus = len({row["arch"] for row in rows})
                spilling = sum(int(row["spills"]) > 0 for row in rows)
                old = sum(row["source"] != now[row["name"]] for row in rows)
                text = f"Triton {path.stem}: {len(rows)} variants for {gpus} GPU{'s' * (gpus > 1)}"
                text += f", {spilling} spill" if spilling else ""
                text += " (stale)" if old == len(rows) else f" ({old} stale)" if old else ""
                found.setdefault(key, []).append(text)
        except (OSError, KeyError, ValueError) as error:
            raise ValueError(f"bench: cannot read {path}: {error!r}") from None
    return found


def when(path: Path, tree: Path) -> tuple[str, str]:
    """The commit of a table and its date."""
    known = git("log", "-1", "--format=%H %cs", "--", str(path.relative_to(tree)), tree=tree)
    if not known:
        return "unknown", "-"
    commit, date = known.split()
    return commit[:9], date

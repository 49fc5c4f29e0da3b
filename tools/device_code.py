"""What the Triton kernels are compiled from: which file each is in, and its fingerprint.

Those of ``tools/aot.py`` and of the evidence are one, so that both call the same rows stale.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable
from pathlib import Path

KERNELS = {  # by name in the tables: the file in kernels/, the backend, the kind of kernel
    "fwd": ("attention_fwd", "triton", "forward"),
    "ends": ("key_ends", "triton", "forward"),
    "rows": ("attention_bwd", "triton", "backward"),
    "dq": ("attention_bwd", "triton", "backward"),
    "dkdv": ("attention_bwd", "triton", "backward"),
    "dbias": ("attention_bias", "triton", "backward"),
    "dsinks": ("attention_bias", "triton", "backward"),
    "weights": ("attention_weights", "triton", "weights"),
    "received": ("attention_weights", "triton", "weights"),
    "cells": ("attention_pooled", "triton", "weights"),
    "distances": ("attention_pooled", "triton", "weights"),
    "decode": ("attention_decode", "triton", "decode"),
    "combine": ("attention_decode", "triton", "decode"),
    "gluon": ("attention_fwd_gluon", "gluon", "forward"),
    "indexed_fwd": ("attention_indexed_fwd", "triton", "forward"),
    "indexed_dq": ("attention_indexed_bwd", "triton", "backward"),
    "indexed_terms": ("attention_indexed_bwd", "triton", "backward"),
    "indexed_sums": ("attention_indexed_bwd", "triton", "backward"),
}
# Files that all of them are compiled from as well.
SHARED = ("arguments", "dropout", "gradients", "head", "rows", "scores")
INDEXED = ("indexed_lists", *SHARED)  # and those over chosen keys
BLOCKED = tuple(sorted((*SHARED, "blocks")))  # and all others, which take block masks


def fingerprint(name: str, folder: Path) -> str:
    """8 hex digits that change with the device code that a kernel is compiled from."""
    return digest(folder / f"{file}.py" for file in (KERNELS[name][0], *shared_by(name)))


def shared_by(name: str) -> tuple[str, ...]:
    """The files beside its own that a kernel is compiled from."""
    return INDEXED if name.startswith("indexed") else BLOCKED


def digest(paths: Iterable[Path]) -> str:
    """8 hex digits that change with the device code of some files."""
    lines = [line for path in paths for line in device_code(path.read_text(encoding="utf-8"))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:8]


def device_code(source: str) -> list[str]:
    """Jitted functions, the classes of their arguments and constants, without comments.

    What the host's functions hand to them shows in a table's numbers.
    """
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

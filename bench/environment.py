"""How a run is set up, and what is on record about the machine and the code it measured."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

import attnfast

from . import ROOT

MEASURED = ("attnfast", "bench/*.py", "csrc", "kernels", "setup.py")  # what the dirty flag watches


class Settings(NamedTuple):
    """What the environment variables ask for."""

    suite: str  # "full", or "quick": small shapes and one round, to see that everything works
    backend: str  # the backend of ours that is measured
    threads: int
    budget_s: float  # time for the rounds of one row
    most_rounds: int


def settings(environ: Mapping[str, str] = os.environ) -> Settings:
    """The settings of this run.

    Args:
        environ: Where to look up ``BENCH_QUICK`` (1: quick), ``BENCH_BACKEND`` (default cpu),
            ``BENCH_THREADS`` (default 2), ``BENCH_BUDGET`` (seconds a row, default 2).

    Raises:
        ValueError: A value makes no sense; one line that names it.
    """
    quick = environ.get("BENCH_QUICK", "0")
    if quick not in ("0", "1"):
        raise ValueError(f"bench: BENCH_QUICK must be 0 or 1, got {quick!r}")
    return Settings(
        suite="quick" if quick == "1" else "full",
        backend=environ.get("BENCH_BACKEND") or "cpu",
        threads=int(_positive(environ, "BENCH_THREADS", 2, int)),
        budget_s=_positive(environ, "BENCH_BUDGET", 2.0, float),
        most_rounds=1 if quick == "1" else 500,
    )


def _positive(environ: Mapping[str, str], name: str, default: float, kind: type) -> float:
    text = environ.get(name) or str(default)
    try:
        value = float(kind(text))
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ValueError(f"bench: {name} must be a positive {kind.__name__}, got {text!r}")
    return value


def unavailable(backend: str) -> str | None:
    """Why a backend cannot be measured here, in one line, or None."""
    x = torch.zeros(1, 1, 1, 8)
    try:
        attnfast.attention(x, x, x, backend=backend)
    except (RuntimeError, ValueError) as error:
        return " ".join(str(error).split())
    return None


def machine() -> dict[str, Any]:
    """The machine, as far as times depend on it; nothing that tells whose it is."""
    return {
        "cpu": _cpu_name(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "system": platform.system(),
    }


def load() -> float | None:
    """How many processes wanted a core in the last minute; None where nobody counts them."""
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None


def code(backend: str) -> dict[str, Any]:
    """What was measured: versions, instruction sets, and a digest of the kernels' sources."""
    return {
        "versions": {
            "attnfast": attnfast.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "kernel": torch.ops.attnfast.cpu_isa() if backend == "cpu" else backend,
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "sources": _sources_digest(),
    }


def commit() -> dict[str, Any]:
    """The commit, and whether the measured files differ from it; None without a repository."""
    head = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--", *MEASURED)
    return {"id": head, "dirty": None if changes is None else bool(changes)}


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _sources_digest() -> str:
    """The first 16 hex digits of the SHA-256 of csrc: names and contents, in the order of names."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.is_file():
            digest.update(f"{path.relative_to(ROOT).as_posix()}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _cpu_name() -> str:
    """The CPU's name, with family and model: the name alone may not tell the generation."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = {
        key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)
    }
    name = facts.get("model name") or platform.machine()
    if "cpu family" in facts and "model" in facts:
        name += f" (family {facts['cpu family']}, model {facts['model']})"
    return name

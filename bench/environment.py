"""How a run is set up, and what is on record about the machine and the code it measured."""

from __future__ import annotations

import argparse
import datetime
import hashlib
import os
import platform
import re
import subprocess
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

import attnfast
from attnfast import dispatch

from . import ROOT
from .grid import DTYPES, SIZES

MEASURED = ("attnfast", "bench/*.py", "csrc", "kernels", "setup.py")  # what the dirty flag watches
SOURCES = {  # what a backend's kernels are built from; those in Python all lie in one folder
    "cpu": ("csrc/params.h", "csrc/cpu", "csrc/bindings/cpu.cpp"),
    "cuda": ("csrc/params.h", "csrc/cuda", "csrc/bindings/cuda.cpp"),
    "reference": ("attnfast/reference.py",),
}
PYTHON_KERNELS = ("kernels",)
BUDGET_S = {"smoke": 0.0, "quick": 0.5, "full": 2.0, "gpu": 0.5}  # for the rounds of one row
MOST_ROUNDS = {"smoke": 1, "quick": 200, "full": 500, "gpu": 100}
MINUTES = {"quick": 9.5}  # for all suites; the other sizes take as long as they take


class Settings(NamedTuple):
    """What a run was asked for."""

    size: str  # one of grid.SIZES
    backend: str  # the backend of ours that is measured
    device: str  # "cpu" or "cuda"
    threads: int
    budget_s: float  # time for the rounds of one row
    most_rounds: int
    minutes: float | None = None  # that all suites of the grid would have; None is no limit


def settings(environ: Mapping[str, str] = os.environ, **given: Any) -> Settings:
    """The settings of this run.

    Args:
        environ: Where to look up ``BENCH_SIZE`` (default quick), ``BENCH_DEVICE`` (default cpu),
            ``BENCH_BACKEND`` (default: the first that serves the device), ``BENCH_THREADS``
            (default 2), ``BENCH_BUDGET`` (seconds a row), ``BENCH_ROUNDS`` (at most, of a row) and
            ``BENCH_MINUTES`` (for all suites), whose defaults depend on the size.
        given: Settings by name that win over the variables; None is not given.

    Raises:
        ValueError: A value makes no sense; one line that names it.
    """
    given = {name: value for name, value in given.items() if value is not None}
    size = given.get("size") or environ.get("BENCH_SIZE") or "quick"
    if size not in SIZES:
        raise ValueError(f"bench: BENCH_SIZE must be one of {', '.join(SIZES)}, got {size!r}")
    device = given.get("device") or environ.get("BENCH_DEVICE") or "cpu"
    if device not in ("cpu", "cuda"):
        raise ValueError(f"bench: BENCH_DEVICE must be cpu or cuda, got {device!r}")
    found = Settings(
        size=size,
        backend=environ.get("BENCH_BACKEND") or dispatch.backends_of(torch.device(device))[0].name,
        device=device,
        threads=_positive(environ, "BENCH_THREADS", 2, int),
        budget_s=_positive(environ, "BENCH_BUDGET", BUDGET_S[size], float),
        most_rounds=_positive(environ, "BENCH_ROUNDS", MOST_ROUNDS[size], int),
        minutes=_positive(environ, "BENCH_MINUTES", MINUTES.get(size), float),
    )
    return found._replace(**given)


def positive(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """The type of an argument of a command: a positive number."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be positive, got {text!r}")
        return value

    return parse


def available_settings(**given: Any) -> Settings:
    """`settings`, of a backend that runs here.

    Raises:
        ValueError: As `settings` says, or it does not; one line.
    """
    found = settings(**given)
    reason = unavailable(found.backend, found.device)
    if reason is not None:
        raise ValueError(f"bench: nothing to measure: {reason}")
    return found


def _positive(environ: Mapping[str, str], name: str, default: Any, kind: type) -> Any:
    text = environ.get(name)
    try:
        return positive(kind)(text) if text else default
    except argparse.ArgumentTypeError:
        raise ValueError(
            f"bench: {name} must be a positive {kind.__name__}, got {text!r}"
        ) from None


def unavailable(backend: str, device: str = "cpu") -> str | None:
    """Why a backend cannot be measured here, in one line, or None."""
    if device == "cuda" and not torch.cuda.is_available():
        return "no GPU that this torch can use"
    reason = ""
    for dtype in DTYPES.values():  # one that it takes is enough
        x = torch.zeros(1, 1, 1, 8, device=device, dtype=dtype)
        try:
            attnfast.attention(x, x, x, backend=backend)
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
        else:
            return None
    return reason


def architecture(backend: str, device: str = "cpu") -> str:
    """What a backend's code was compiled for: an instruction set, or ``sm_90``."""
    if device == "cuda":
        return "sm_{}{}".format(*torch.cuda.get_device_capability())
    if backend == "cpu":
        return str(torch.ops.attnfast.cpu_isa())
    return "none"


def device_name(device: str = "cpu") -> str:
    """The directory of a device's results, from its name: ``intel-xeon-processor-6-167``."""
    name = torch.cuda.get_device_name() if device == "cuda" else _cpu_name()
    name = re.sub(r"\((R|TM|r|tm)\)|\bfamily\b|\bmodel\b|\bCPU\b", "", name)
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def machine(device: str = "cpu") -> dict[str, Any]:
    """The machine, as far as times depend on it; nothing that tells whose it is."""
    facts: dict[str, Any] = {
        "cpu": _cpu_name(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "system": platform.system(),
    }
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        facts["gpu"] = {
            "name": gpu.name,
            "memory_bytes": gpu.total_memory,
            "multiprocessors": gpu.multi_processor_count,
            "capability": f"{gpu.major}.{gpu.minor}",
        }
    return facts


def memory_bytes(device: str = "cpu") -> int | None:
    """The memory of a device; None where nobody tells."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).total_memory)
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def load() -> float | None:
    """How many processes wanted a core in the last minute; None where nobody counts them."""
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None


def facts(kind: str, settings: Settings) -> dict[str, Any]:
    """The head of a file of results, beside its schema: where and from what they came."""
    return {
        "kind": kind,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(settings.device),
        "machine": machine(settings.device),
        "settings": settings._asdict(),
        "load": load(),
        "versions": versions(settings.device),
        "kernel": architecture(settings.backend, settings.device),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "sources": sources(settings.backend),
        "commit": commit(),
    }


def versions(device: str = "cpu") -> dict[str, str]:
    """Versions of what takes part."""
    found = {
        "attnfast": attnfast.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    for package in ("onnxruntime", "triton", "flash_attn", "xformers", "flashinfer"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if device == "cuda":
        found["cuda"] = torch.version.cuda or "none"
    return found


def commit() -> dict[str, Any]:
    """The commit, and whether the measured files differ from it; None without a repository."""
    head = git("rev-parse", "HEAD")
    changes = git("status", "--porcelain", "--", *MEASURED)
    return {"id": head, "dirty": None if changes is None else bool(changes)}


def git(*arguments: str, tree: Path = ROOT) -> str | None:
    """What git says of a tree; None without git, or a repository there."""
    command = ["git", "-C", str(tree), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def sources(backend: str, root: Path = ROOT) -> str:
    """16 hex digits that change with the backend's kernels: SHA-256 of their names and contents."""
    digest = hashlib.sha256()
    for path in sorted(_files(root, SOURCES.get(backend, PYTHON_KERNELS))):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _files(root: Path, names: tuple[str, ...]) -> set[Path]:
    found = set()
    for name in names:
        path = root / name
        inside = path.rglob("*") if path.is_dir() else [path]
        found |= {x for x in inside if x.is_file() and "__pycache__" not in x.parts}
    return found


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

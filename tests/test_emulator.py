"""A sample of the tests of the CUDA kernels, in a process that has the emulator loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = {
    "test_cuda.py": "",
    "test_cuda_large_scores.py": "causal",
    "test_cuda_bugs.py": "not real_kernels",
}


@pytest.mark.parametrize("file", FILES)
def test_sample(file: str, record_property: Any) -> None:
    if not (ROOT / "build" / "emulator" / "_emulator.so").exists():
        pytest.skip("the emulator of the CUDA kernels is not built: make emulator")
    environment = {"ATTNFAST_EMULATOR": "1", "ATTNFAST_EMULATOR_SAMPLE": "11"}
    process = subprocess.run(
        [sys.executable, "-m", "pytest", Path(__file__).with_name(file), "-q", "-k", FILES[file],
         "-p", "no:cacheprovider", "-p", "no:xdist"],
        env=os.environ | environment, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout[-6000:]

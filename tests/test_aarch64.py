"""The CPU kernels compiled for aarch64, run by qemu: `make aarch64` has every case, this a sample.

Of a set's emulated processor that set is the best: it has to be the one that is chosen.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from csrc import build

ROOT = Path(__file__).parent.parent
COMPILER = "aarch64-linux-gnu-g++"
PROGRAM = ROOT / "build" / "aarch64" / "recorded_cases"
PROCESSORS = {
    "neon": "cortex-a72",
    "neon_bf16": "max",  # whose vectors are of 512 bits
    "sve": "max,sve-default-vector-length=32",
}


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*map(str, command)], cwd=ROOT, env=os.environ | environment, capture_output=True,
        text=True, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def recorded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cases, and the program up to date."""
    if lacks := [tool for tool in (COMPILER, "qemu-aarch64") if shutil.which(tool) is None]:
        pytest.skip(f"this machine lacks {' and '.join(lacks)}")
    if not PROGRAM.exists():
        pytest.skip("the kernels are not built for aarch64: make aarch64")
    done = run(
        sys.executable, "setup.py", "-q", "build_recorded", CXX=COMPILER, ATTNFAST_ISAS="all"
    )
    assert done.returncode == 0, done.stderr
    file = tmp_path_factory.mktemp("recorded") / "cases"
    every = "1" if request.config.getoption("--every-case") else "60"
    done = run(sys.executable, "tests/record_cases.py", file, "--every", every)
    assert done.returncode == 0, done.stderr
    return file


def test_each_set_has_a_processor() -> None:
    assert list(PROCESSORS) == list(build.AARCH64_ISAS)


@pytest.mark.parametrize("isa", PROCESSORS)
def test_instruction_set(isa: str, recorded: Path, record_property: Any) -> None:
    libc = run(COMPILER, "-print-file-name=libc.so.6").stdout.strip()
    done = run(
        *("qemu-aarch64", "-cpu", PROCESSORS[isa], "-L", Path(libc).resolve().parent.parent),
        *(PROGRAM, recorded),
        ATTNFAST_CPU_ISA="",
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr
    verdict = done.stdout.strip().splitlines()[-1]
    record_property("isa", f"aarch64, by qemu: {verdict}")
    assert verdict.startswith(f"{isa} (of ")

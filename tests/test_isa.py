"""Every instruction set of the CPU backend, each in processes of its own.

The library reads ATTNFAST_CPU_ISA once. The set that this process uses is under test in all other
files; every other set that the machine runs is given the table, NaN, and decoding.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from attnfast import ops

# What each needs of the processor, by the names of /proc/cpuinfo.
NEEDS = {
    "amx": ("amx_bf16", "amx_tile", "avx512_bf16", "avx512f", "avx512bw", "avx512dq", "avx512vl"),
    "avx512_bf16": ("avx512_bf16", "avx512f", "avx512bw", "avx512dq", "avx512vl"),
    "avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl"),
    "avx2": ("avx2", "fma", "f16c"),
    "portable": (),
}
FILES = ("test_table.py", "test_numerics.py", "test_large_scores.py", "test_decode.py")
TESTS = "not test_reference and not test_public_reference"


def missing(isa: str) -> list[str]:
    """The processor's features that an instruction set needs and this machine lacks."""
    info = Path("/proc/cpuinfo")
    flags = set(re.findall(r"\w+", info.read_text())) if info.exists() else set()
    return [feature for feature in NEEDS[isa] if feature not in flags]


def test_the_library_runs_all_that_the_processor_has() -> None:
    runs = set(ops.cpu_isas()) - {"lanes16", "tiles16"}  # which sanitizer builds have
    assert runs == {isa for isa in NEEDS if not missing(isa)}
    assert ops.cpu_isa() in ops.cpu_isas()


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("isa", NEEDS)
def test_instruction_set(isa: str, file: str, record_property: Any) -> None:
    if lacks := missing(isa):
        record_property("isa", f"{isa}: not run, this machine lacks {', '.join(lacks)}")
        pytest.skip(f"this machine lacks {', '.join(lacks)}")
    if isa == ops.cpu_isa():
        record_property("isa", f"{isa}: ran, in this process")
        return
    tests = Path(__file__).parent
    process = subprocess.run(
        [sys.executable, "-m", "pytest", tests / file, "-q", "-k", TESTS,
         "-p", "no:cacheprovider", "-p", "no:xdist"],
        env=os.environ | {"ATTNFAST_CPU_ISA": isa},
        cwd=tests.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    verdict = process.stdout.strip().splitlines()[-1] if process.stdout else process.stderr
    record_property("isa", f"{isa}: {file} {verdict}")
    assert process.returncode == 0, process.stdout[-6000:]

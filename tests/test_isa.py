"""Every instruction set of the CPU backend, each in processes of its own.

The library reads ATTNFAST_CPU_ISA once. The set that this process uses is under test in all other
files; the others that the machine runs share the table, NaN, and decoding: each case is run on one
of them. All of a set: ``ATTNFAST_CPU_ISA=avx2 make test ARGS="--backend cpu tests/backends"``.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from attnfast import ops
from csrc import build

NAMES = ("table", "numerics", "large_scores", "decode", "pooled")
SETS = build.ISAS.get(platform.machine(), {"portable": build.Isa("", "")})
FILES = [f"tests/backends/test_{x}.py" for x in NAMES]


def missing(isa: str) -> list[str]:
    """The processor's features that an instruction set needs and this machine lacks."""
    info = Path("/proc/cpuinfo")
    flags = set(re.findall(r"\w+", info.read_text())) if info.exists() else set()
    up_to = list(SETS).index(isa) + 1  # each needs what those before it do
    needs = " ".join(row.needs for row in list(SETS.values())[:up_to])
    lacks = [feature for feature in needs.split() if feature not in flags]
    length = Path("/proc/sys/abi/sve_default_vector_length")  # in bytes
    if isa == "sve" and not lacks and int(length.read_text()) != 32:
        lacks.append("vectors of 256 bits")
    return lacks


def test_the_library_runs_all_that_the_processor_has() -> None:
    runs = set(ops.cpu_isas()) & set(SETS)  # sanitizer builds have others too
    assert runs == {isa for isa in SETS if not missing(isa)}
    assert ops.cpu_isa() in ops.cpu_isas()


@pytest.mark.parametrize("isa", SETS)
def test_instruction_set(isa: str, record_property: Any) -> None:
    if lacks := missing(isa):
        record_property("isa", f"{isa}: not run, this machine lacks {', '.join(lacks)}")
        pytest.skip(f"this machine lacks {', '.join(lacks)}")
    if isa == ops.cpu_isa():
        record_property("isa", f"{isa}: ran, in this process")
        return
    others = [name for name in ops.cpu_isas() if name != ops.cpu_isa()]
    part = f"{others.index(isa) + 1}/{len(others)}"
    process = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist",
         "-o", "timeout=300", "--backend", "cpu", "--part", part, "-k", "not test_reference",
         *FILES],
        env=os.environ | {"ATTNFAST_CPU_ISA": isa},
        cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    verdict = process.stdout.strip().splitlines()[-1] if process.stdout else process.stderr
    record_property("isa", f"{isa}: {verdict}")
    assert process.returncode == 0, process.stdout[-6000:]

"""Compiled kernels in a process of its own, which is told of it before it imports attnfast.

A sample of what `make test-ptx` runs: a call with gradients, decoding, and planted faults.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from csrc import build

from .machine import LIBRARY

pytestmark = pytest.mark.skipif(
    not LIBRARY.exists(), reason="the emulator, of which the machine is a part, is not built"
)
ROOT = Path(__file__).resolve().parents[2]
CALLS = "test_ptx.py::test_option[{0}-causal]", "test_ptx.py::test_decode[{0}-plain-paged]"
CUT = "test_numerics.py::test_huge_bias[{0}-bs-1e+30]"  # a block of keys that their end cuts
BLOCKS = "test_ptx.py::test_option[{0}-blocks_128]"
PLANTED = "test_ptx_planted.py::test_planted"
TRITON = {
    "80": (
        *CALLS,
        CUT,
        BLOCKS,
        f"{PLANTED}[triton-80-no barrier after copies]",
        f"{PLANTED}_in_a_launch",
    ),
    "90": (
        *CALLS,
        CUT,
        BLOCKS,
        f"{PLANTED}[triton-90-no proxy fence]",
        f"{PLANTED}[gluon-90-a map not fenced]",
    ),
}
CUDA = (*CALLS, f"{PLANTED}[cuda-80-no barrier after copies]")
FILES = (
    "attention_fwd.64",
    "attention_bwd.64",
    "attention_decode.64",
    "attention_decode_received.64",
    "decode_combine",
    "row_terms",
)


def run(backend: str, arch: str, tests: tuple[str, ...]) -> None:
    """All of them pass, and none is skipped."""
    chosen = [f"tests/backends/{test}".format(backend) for test in tests]
    options = ["-q", "-p", "no:cacheprovider", "-o", "timeout=300", "--backend", backend]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *chosen],
        cwd=ROOT,
        env=os.environ | {"ATTNFAST_PTX": arch},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed in " in done.stdout
    assert "skipped" not in done.stdout


@pytest.mark.parametrize("arch", TRITON)
def test_triton(arch: str) -> None:
    run("triton", arch, TRITON[arch])


def test_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = build.find_nvcc()
    if nvcc is None:
        pytest.skip("the CUDA kernels' PTX needs nvcc")
    monkeypatch.setenv("ATTNFAST_CUDA_ARCHS", "80")
    made = " ".join(str(build.PTX / "80" / f"{name}.ptx") for name in FILES)
    text = build.ptx_file(nvcc) + f"build {build.PTX / 'sample'}: phony {made}\n"
    build.run_ninja(build.PTX / "sample", text, "the PTX of the CUDA kernels")
    run("cuda", "80", CUDA)

"""Every case of the table, forward and all gradients, for the reference and every backend."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from accuracy import check, check_formulas, in_double, reference_results
from cases import CASES, Case, problem, refusal, run
from ptx import session

from attnfast import ops


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference(case: Case) -> None:
    """The specification in fp64 against formulas that were written apart from it."""
    wide = in_double(problem(case))
    check_formulas(reference_results(wide, torch.float64), wide)


@pytest.mark.reference(7)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(backend: str, case: Case) -> None:
    given = problem(case)
    check(run(given, backend), given)


REFUSED = {
    "cuda": {
        "takes bfloat16 and float16, got float32",
        "takes D and D_v up to 256, got 512",
        "takes no indices: Triton's and the CPU's kernels gather keys",
    },
}
TURING = "on a GPU of compute capability 7.5, got"
ON_TURING = {
    f"takes float16 only {TURING} bfloat16",
    f"has gradients for D and D_v up to 128 {TURING} 192",
    f"has gradients for D and D_v up to 128 {TURING} 256",
}


def test_what_is_refused_of_the_table(backend: str) -> None:
    """No other case is left out where a refused one is skipped."""
    expected = REFUSED.get(backend, set())
    if session.ARCH == "75":  # where Triton's are not run
        expected = expected | ON_TURING
    assert {refusal(problem(case), backend) for case in CASES} - {None} == expected


def test_instruction_set() -> None:
    """The kernels under test are those that ATTNFAST_CPU_ISA names, or the machine's best.

    That is the first that it runs, but for Intel's slow products of pairs of bf16.
    """
    info = Path("/proc/cpuinfo")
    processor = info.read_text() if info.exists() else ""
    slow = "GenuineIntel" in processor and "avx512_fp16" in processor
    best = next(isa for isa in ops.cpu_isas() if not (slow and isa == "avx512_bf16"))
    assert ops.cpu_isa() == os.environ.get("ATTNFAST_CPU_ISA", best)

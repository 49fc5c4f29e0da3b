"""Every case of the table, forward and all gradients, for the reference and the CPU backend."""

from __future__ import annotations

import os

import pytest
import torch
from accuracy import check, check_formulas, in_double, reference_results
from cases import CASES, Case, problem, run

from attnfast import ops


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference(case: Case) -> None:
    """The specification in fp64 against formulas that were written apart from it."""
    wide = in_double(problem(case))
    check_formulas(reference_results(wide, torch.float64), wide)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cpu(case: Case) -> None:
    given = problem(case)
    check(run(given, "cpu"), given)


@pytest.mark.parametrize("case", CASES[::7], ids=str)
def test_public_reference(case: Case) -> None:
    """The same functions with backend="reference", whose results have the same names and dtypes."""
    given = problem(case)
    check(run(given, "reference"), given)


def test_instruction_set() -> None:
    """The kernels under test are those that ATTNFAST_CPU_ISA names, or the machine's best."""
    assert ops.cpu_isa() == os.environ.get("ATTNFAST_CPU_ISA", ops.cpu_isas()[0])

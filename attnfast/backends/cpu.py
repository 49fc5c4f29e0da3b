"""The C++ kernels for CPUs: takes every call in the three fused dtypes."""

from __future__ import annotations

import functools

import torch

from .. import ops
from . import FUSED_DTYPES, Backend, Problem, other_dtype

MISSING = ops.MISSING


def unsupported(problem: Problem) -> str | None:
    """Why a problem is refused, or None."""
    return other_dtype(problem, FUSED_DTYPES) or MISSING


def details() -> str:
    """The instruction set, and the threads."""
    return f"{ops.cpu_isa()}, threads: {torch.get_num_threads()}"


ROW = Backend("cpu", unsupported, ops.CPU, functools.partial(ops.workspace, "cpu"), details)

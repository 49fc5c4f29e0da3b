"""The C++ kernels for CPUs: takes every call in the three fused dtypes."""

from __future__ import annotations

import torch

from .. import ops
from . import FUSED_DTYPES, HALF, Backend, Problem, dtype_name

MISSING = ops.MISSING


def unsupported(problem: Problem) -> str | None:
    """Why a problem is refused, or None."""
    if problem.dtype not in FUSED_DTYPES:
        return f"takes float32, bfloat16 and float16, got {dtype_name(problem.dtype)}"
    return MISSING


def workspace(problem: Problem) -> tuple[int, int]:
    """Tiles of up to 128 queries and 96 keys per thread; backward a head's dk, dv, k and v too."""
    threads, width = torch.get_num_threads(), problem.D + problem.D_v
    tiles = (128 + 96) * width + 2 * 96 * 32
    head = problem.S * width * (2 if problem.dtype in HALF else 1)
    row_sums = problem.B * problem.H * problem.T
    return 4 * threads * tiles, 4 * (threads * (2 * tiles + head) + row_sums)


def details() -> str:
    """The instruction set, and the threads."""
    return f"{ops.cpu_isa()}, threads: {torch.get_num_threads()}"


ROW = Backend("cpu", unsupported, ops.CPU, workspace, details)

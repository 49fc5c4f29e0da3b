"""The CUDA C++ kernels, compiled into the native library where there is an nvcc; or emulated."""

from __future__ import annotations

import torch

from .. import ops
from ..requirements import environment
from . import HALF, Backend, Problem, dtype_name, gpus

MAX_HEAD_DIM = 256
OLDEST, AMPERE = (7, 5), (8, 0)  # between them: no bf16 products, less shared memory
TURING_GRADIENTS = 128
IN_LIBRARY = torch._C._dispatch_has_kernel_for_dispatch_key("attnfast::cuda_fwd", "CUDA")

_unusable: dict[int, str | None] = {}  # by the GPU's index


def unsupported(problem: Problem) -> str | None:
    """The first reason that holds; whether the kernels are there at all comes last."""
    widest = max(problem.D, problem.D_v)
    if problem.dtype not in HALF:
        return f"takes bfloat16 and float16, got {dtype_name(problem.dtype)}"
    if widest > MAX_HEAD_DIM:
        return f"takes D and D_v up to {MAX_HEAD_DIM}, got {widest}"
    if problem.device.type == "cpu":
        return _too_much_for(problem, widest, emulated_capability()) or ops.EMULATOR_MISSING
    index = problem.device.index or 0
    reason = _too_much_for(problem, widest, gpus.capability(index))
    return reason or unusable(index)


def _too_much_for(problem: Problem, widest: int, found: tuple[int, int]) -> str | None:
    """What a GPU of that compute capability cannot do."""
    if found >= AMPERE:
        return None
    oldest, got = (".".join(map(str, x)) for x in (OLDEST, found))
    if found < OLDEST:
        return f"needs a GPU of compute capability {oldest} or later, got {got}"
    if problem.dtype == torch.bfloat16:
        return f"takes float16 only on a GPU of compute capability {got}, got bfloat16"
    if problem.requires_grad and widest > TURING_GRADIENTS:
        return (
            f"has gradients for D and D_v up to {TURING_GRADIENTS} on a GPU of compute"
            f" capability {got}, got {widest}"
        )
    return None


def emulated_capability() -> tuple[int, int]:
    """That of the GPU which the emulator plays, ``ATTNFAST_EMULATOR_ARCH``."""
    arch = environment("ATTNFAST_EMULATOR_ARCH", "75", "80", "86", "89", "90", "100", "120")
    major, minor = divmod(int(arch or "80"), 10)
    return major, minor


def unusable(index: int) -> str | None:
    """Why the driver or the GPU cannot run the kernels as they were built, or None."""
    if index not in _unusable:
        asked = IN_LIBRARY and torch.cuda.is_available()
        _unusable[index] = (torch.ops.attnfast.cuda_unusable(index) or None) if asked else None
    return _unusable[index]


# As torch.compiler.assume_constant_result does, which would import the compiler with this package.
unusable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def workspace(problem: Problem) -> tuple[int, int]:
    """Decoding, the sums of every split of the keys; backward, three numbers for each row."""
    rows = problem.B * problem.H * problem.T
    splits = min(-(-problem.S // 256), 64)
    return (4 * rows * splits * (problem.D_v + 2) if problem.kind == "decode" else 0), 12 * rows


def details() -> str:
    """Where the kernels run."""
    return "sm_75 and later" if ops.EMULATOR == "0" else "emulated"


ROW = Backend("cuda", unsupported, ops.CUDA, workspace, details)

"""The CUDA C++ kernels, compiled into the native library where there is an nvcc; or emulated."""

from __future__ import annotations

import functools

import torch

from .. import ops
from ..requirements import environment
from . import HALF, Backend, Problem, gpus, other_dtype, too_wide

MAX_HEAD_DIM = 256
OLDEST, AMPERE = (7, 5), (8, 0)  # between them: no bf16 products, less shared memory
TURING_GRADIENTS = 128
IN_LIBRARY = torch._C._dispatch_has_kernel_for_dispatch_key(f"{ops.NAMESPACE}::cuda_fwd", "CUDA")

_unusable: dict[int, str | None] = {}  # by the GPU's index; answers that last


def unsupported(problem: Problem) -> str | None:
    """The first reason that holds; whether the kernels are there at all comes last."""
    reason = other_dtype(problem, HALF) or too_wide(problem, MAX_HEAD_DIM)
    if reason is None and problem.indices:
        reason = "takes no indices: Triton's and the CPU's kernels gather keys"
    if reason is not None:
        return reason
    if problem.device.type == "cpu":
        return _too_much_for(problem, emulated_capability()) or ops.EMULATOR_MISSING
    index = problem.device.index or 0
    return _too_much_for(problem, gpus.capability(index)) or unusable(index)


def _too_much_for(problem: Problem, found: tuple[int, int]) -> str | None:
    """What a GPU of that compute capability cannot do."""
    if found >= AMPERE:
        return None
    if found < OLDEST:
        return gpus.too_old(found, OLDEST)
    got, widest = gpus.dotted(found), max(problem.D, problem.D_v)
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
    """Why the driver or the GPU cannot run the kernels as they were built, or None.

    Where CUDA cannot tell now (no memory to load a kernel, a graph being captured) the next call
    asks again. This one is taken: its launch says what is wrong, if it still is.
    """
    if index not in _unusable:
        asked = IN_LIBRARY and torch.cuda.is_available()
        try:
            reason = ops.RAW.cuda_unusable(index) if asked else ""
        except RuntimeError:
            return None
        _unusable[index] = reason or None
    return _unusable[index]


# As torch.compiler.assume_constant_result does, which would import the compiler with this package.
unusable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def details() -> str:
    """For which GPUs and drivers the kernels were built."""
    if ops.EMULATOR != "0":
        return "emulated"
    return ops.RAW.cuda_build() if IN_LIBRARY else "sm_75 and later"


ROW = Backend("cuda", unsupported, ops.CUDA, functools.partial(ops.workspace, "cuda"), details)

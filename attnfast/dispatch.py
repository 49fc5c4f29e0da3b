"""Which backend runs a call, and why: one ordered table per device.

``auto`` takes the first row that accepts. A backend joins by adding its row to the devices it
serves.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch

from . import ops, triton_backend
from .call import Options
from .requirements import checks_values, environment

NAMES = ("cpu", "triton", "gluon", "cuda", "reference")
HALF = (torch.bfloat16, torch.float16)
FUSED_DTYPES = (torch.float32, *HALF)


class Problem(NamedTuple):
    """What a backend needs to know of a call to accept or refuse it."""

    kind: str  # "attention", "varlen" or "decode"
    device: torch.device
    dtype: torch.dtype
    B: int  # varlen: the number of sequences
    H: int
    H_kv: int
    T: int  # varlen: all queries of all sequences
    S: int  # varlen: all keys; decode: the capacity of the cache
    D: int
    D_v: int
    options: Options
    mask: bool = False
    bias: torch.dtype | None = None
    alibi: bool = False
    sinks: bool = False
    align: bool = False  # one offset per batch entry
    page_size: int = 0  # decode: 0 is a contiguous cache
    requires_grad: bool = False


class Backend(NamedTuple):
    """One row of the table.

    Attributes:
        name: What ``backend=`` calls it.
        unsupported: The reason why a problem is refused, or None.
        ops: Its operators; None for the reference, which is plain PyTorch.
        workspace: Bytes that a call needs beside its inputs and outputs, forward and backward.
        details: What ``explain`` adds, the instruction set for example.
    """

    name: str
    unsupported: Callable[[Problem], str | None]
    ops: ops.Ops | None
    workspace: Callable[[Problem], tuple[int, int]]
    details: Callable[[], str]


def _cpu_unsupported(problem: Problem) -> str | None:
    if problem.dtype not in FUSED_DTYPES:
        return f"takes float32, bfloat16 and float16, got {dtype_name(problem.dtype)}"
    return NATIVE_MISSING


def _cpu_workspace(problem: Problem) -> tuple[int, int]:
    """Tiles of up to 128 queries and 96 keys per thread; backward a head's dk, dv, k and v too."""
    threads, width = torch.get_num_threads(), problem.D + problem.D_v
    tiles = (128 + 96) * width + 2 * 96 * 32
    head = problem.S * width * (2 if problem.dtype in HALF else 1)
    row_sums = problem.B * problem.H * problem.T
    return 4 * threads * tiles, 4 * (threads * (2 * tiles + head) + row_sums)


def _cuda_unsupported(problem: Problem) -> str | None:
    """The first reason that holds; whether the kernels are there at all comes last."""
    widest = max(problem.D, problem.D_v)
    if problem.dtype not in HALF:
        return f"takes bfloat16 and float16, got {dtype_name(problem.dtype)}"
    if widest > CUDA_MAX_HEAD_DIM:
        return f"takes D and D_v up to {CUDA_MAX_HEAD_DIM}, got {widest}"
    if problem.device.type == "cpu":
        return _gpu_refuses(problem, widest, _emulated_capability()) or EMULATOR_MISSING
    index = problem.device.index or 0
    reason = _gpu_refuses(problem, widest, triton_backend.capability(index))
    return reason or cuda_unusable(index)


def _gpu_refuses(problem: Problem, widest: int, found: tuple[int, int]) -> str | None:
    """What a GPU of that compute capability cannot do."""
    if found >= CUDA_AMPERE:
        return None
    oldest, got = (".".join(map(str, x)) for x in (CUDA_OLDEST, found))
    if found < CUDA_OLDEST:
        return f"needs a GPU of compute capability {oldest} or later, got {got}"
    if problem.dtype == torch.bfloat16:
        return f"takes float16 only on a GPU of compute capability {got}, got bfloat16"
    if problem.requires_grad and widest > CUDA_TURING_GRADIENTS:
        return (
            f"has gradients for D and D_v up to {CUDA_TURING_GRADIENTS} on a GPU of compute"
            f" capability {got}, got {widest}"
        )
    return None


def _emulated_capability() -> tuple[int, int]:
    """That of the GPU which the emulator plays, ``ATTNFAST_EMULATOR_ARCH``."""
    arch = environment("ATTNFAST_EMULATOR_ARCH", "75", "80", "86", "89", "90", "100", "120")
    major, minor = divmod(int(arch or "80"), 10)
    return major, minor


def cuda_unusable(index: int) -> str | None:
    """Why the driver or the GPU cannot run the kernels as they were built, or None."""
    if index not in _cuda_unusable:
        asked = IN_LIBRARY and torch.cuda.is_available()
        _cuda_unusable[index] = (torch.ops.attnfast.cuda_unusable(index) or None) if asked else None
    return _cuda_unusable[index]


# As torch.compiler.assume_constant_result does, which would import the compiler with this package.
cuda_unusable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _cuda_workspace(problem: Problem) -> tuple[int, int]:
    """Decoding, the sums of every split of the keys; backward, three numbers for each row."""
    rows = problem.B * problem.H * problem.T
    splits = min(-(-problem.S // 256), 64)
    return (4 * rows * splits * (problem.D_v + 2) if problem.kind == "decode" else 0), 12 * rows


def _reference_workspace(problem: Problem) -> tuple[int, int]:
    """All scores, in fp32 or better: four times in forward, and as often again in backward."""
    sequences = 1 if problem.kind == "varlen" else problem.B  # varlen: at most all rows in one
    scores = sequences * problem.H * problem.T * problem.S
    size = 8 if problem.dtype == torch.float64 else 4
    return 4 * scores * size, 8 * scores * size


CUDA_MAX_HEAD_DIM = 256
CUDA_OLDEST, CUDA_AMPERE = (7, 5), (8, 0)  # between them: no bf16 products, less shared memory
CUDA_TURING_GRADIENTS = 128
NATIVE_MISSING = ops.load()
EMULATOR_MISSING = ops.load_emulator()

CPU = Backend(
    "cpu",
    _cpu_unsupported,
    ops.CPU,
    _cpu_workspace,
    lambda: f"{ops.cpu_isa()}, threads: {torch.get_num_threads()}",
)
CUDA = Backend(
    "cuda",
    _cuda_unsupported,
    ops.CUDA,
    _cuda_workspace,
    lambda: "sm_75 and later" if ops.EMULATOR == "0" else "emulated",
)
TRITON = Backend(
    "triton",
    triton_backend.unsupported,
    triton_backend.OPS,
    triton_backend.workspace,
    triton_backend.details,
)
GLUON = Backend(
    "gluon",
    triton_backend.gluon_unsupported,
    triton_backend.GLUON_OPS,
    triton_backend.workspace,
    triton_backend.details,
)
REFERENCE = Backend(
    "reference",
    lambda problem: None,
    None,
    _reference_workspace,
    lambda: "plain PyTorch",
)

# The emulator of the CUDA kernels and Triton's interpreter come after the reference, which accepts
# everything: they serve CPU tensors only where they are named.
EMULATED: tuple[Backend, ...] = () if ops.EMULATOR == "0" else (CUDA,)
# The CUDA kernels, where they were built.
IN_LIBRARY = torch._C._dispatch_has_kernel_for_dispatch_key("attnfast::cuda_fwd", "CUDA")
COMPILED = (CUDA,) if IN_LIBRARY else ()

BACKENDS: dict[str, tuple[Backend, ...]] = {
    "cpu": (CPU, REFERENCE, TRITON, *EMULATED),
    "cuda": (TRITON, *COMPILED, REFERENCE, GLUON),
}
OTHER_DEVICES = (REFERENCE,)

# Why a row stands where it does: the rule, until measurements on a GPU say otherwise, is that the
# backend that takes more calls comes first.
REASONS: dict[str, dict[str, str]] = {
    "cpu": {
        "cpu": "compiled for CPUs, and takes every call in the three fused dtypes",
        "reference": "takes what all others refuse",
        "triton": "interpreted, for tests: only where it is named",
        "cuda": "emulated, for tests: only where it is named",
    },
    "cuda": {
        "triton": "takes the most: float32 too, and D up to 512; no GPU has yet measured that the"
        " CUDA kernels are faster",
        "cuda": "needs neither Triton nor a C compiler, and takes float16 on compute capability"
        " 7.5, which Triton's row refuses",
        "reference": "takes what all others refuse",
        "gluon": "experimental: only where it is named",
    },
}

_warned: set[str] = set()
_cuda_unusable: dict[int, str | None] = {}


def rows(device: torch.device) -> tuple[Backend, ...]:
    """The backends that serve a device, in the order in which ``auto`` tries them."""
    return BACKENDS.get(device.type, OTHER_DEVICES)


def place(device: torch.device, name: str) -> str:
    """Why the backend of that name stands where it does in a device's table."""
    return REASONS.get(device.type, {}).get(name, "the device has no other backend")


def select(problem: Problem, backend: str = "auto", *, function: str = "attention") -> Backend:
    """The backend that runs a problem.

    Args:
        problem: What is to be computed.
        backend: A backend's name, or "auto" for ``ATTNFAST_BACKEND`` if that is set, and else the
            first row of the device's table that accepts.
        function: Who asks, for messages.

    Raises:
        ValueError: There is no such backend; or a named one refuses the problem; or only the
            reference accepts it, on a device with kernels, and ``ATTNFAST_FALLBACK=error``. Without
            that variable such a fallback warns once per reason.
    """
    name, source = requested(backend)
    check_name(function, name, source)
    if name != "auto":
        reason = refusal(name, problem)
        if reason is not None:
            raise ValueError(f"{function}: {source} {name!r} cannot run this call: {reason}")
        return next(row for row in rows(problem.device) if row.name == name)
    for row in rows(problem.device):
        if row.unsupported(problem) is None:
            break
    if row is REFERENCE and not torch.compiler.is_compiling():
        _report_fallback(problem, function)
    return row


def requested(backend: str) -> tuple[str, str]:
    """The backend asked for, and by what: the argument, or else ``ATTNFAST_BACKEND``."""
    if isinstance(backend, str) and backend == "auto":
        return os.environ.get("ATTNFAST_BACKEND") or "auto", "ATTNFAST_BACKEND"
    return backend, "backend"


def check_name(function: str, name: object, source: str) -> None:
    """Raise unless there is a backend of that name, in this build or another."""
    if not isinstance(name, str):
        raise TypeError(f"{function}: {source} must be a str, got {type(name).__name__}")
    if name not in ("auto", *NAMES):
        raise ValueError(f"{function}: {source} must be one of {('auto', *NAMES)}, got {name!r}")


def refusal(name: str, problem: Problem) -> str | None:
    """Why the backend of that name does not run the problem, or None."""
    for row in rows(problem.device):
        if row.name == name:
            return row.unsupported(problem)
    if any(row.name == name for table in BACKENDS.values() for row in table):
        return f"does not run on {problem.device.type} tensors"
    return "not part of this build"


def wants_checks(row: Backend) -> bool:
    """Whether lengths and pages are to be checked before a backend is called.

    The reference indexes with them; the CUDA kernels clamp them, and raise under
    ``ATTNFAST_CHECK=1``, which waits for the device. Other backends check by themselves.
    """
    return row is REFERENCE or (row is CUDA and checks_values())


def raises_for_fallback() -> bool:
    """Whether ``ATTNFAST_FALLBACK`` asks for an error where only the reference accepts."""
    return environment("ATTNFAST_FALLBACK", "warn", "error") == "error"


def _report_fallback(problem: Problem, function: str) -> None:
    table = rows(problem.device)
    fused = table[: table.index(REFERENCE)]  # those after it run only where they are named
    if not fused or problem.dtype not in FUSED_DTYPES:
        return
    reason = "; ".join(f"{row.name}: {row.unsupported(problem)}" for row in fused)
    message = (
        f"{function}: no fused backend accepts this call, so the reference runs it: slowly,"
        f" and with all T x S scores in memory. {reason}"
    )
    if raises_for_fallback():
        raise ValueError(message)
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(message, RuntimeWarning, stacklevel=_frames_inside())


def _frames_inside() -> int:
    """How many frames up the first caller from outside this package is, as warn counts them."""
    frame = sys._getframe(1)
    level = 1
    while frame.f_back is not None and frame.f_globals.get("__package__") == __package__:
        frame = frame.f_back
        level += 1
    return level


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")

"""Which backend runs a call, and why: one ordered table per device.

``auto`` takes the first row that accepts. A backend joins by adding its row to the devices it
serves.
"""

from __future__ import annotations

import os
import sys
import warnings

import torch

from . import ops
from .backends import FUSED_DTYPES, Backend, Problem, cpu, cuda, gluon, gpus, reference, triton
from .requirements import checks_values, environment

NAMES = ("cpu", "triton", "gluon", "cuda", "reference")

# The emulator of the CUDA kernels and Triton's interpreter come after the reference, which accepts
# everything: they serve CPU tensors only where they are named.
EMULATED = () if ops.EMULATOR == "0" else (cuda.ROW,)
EXECUTED = (gluon.ROW,) if gpus.PTX else ()
COMPILED = (cuda.ROW,) if cuda.IN_LIBRARY else ()

BACKENDS: dict[str, tuple[Backend, ...]] = {
    "cpu": (cpu.ROW, reference.ROW, triton.ROW, *EMULATED, *EXECUTED),
    "cuda": (triton.ROW, *COMPILED, reference.ROW, gluon.ROW),
    "xpu": (triton.ROW, reference.ROW),
}
OTHER_DEVICES = (reference.ROW,)

# Why a row stands where it does: the rule, until measurements on a GPU say otherwise, is that the
# backend that takes more calls comes first.
REASONS: dict[str, dict[str, str]] = {
    "cpu": {
        "cpu": "compiled for CPUs, and takes every call in the three fused dtypes",
        "reference": "takes what all others refuse",
        "triton": "interpreted, for tests: only where it is named",
        "cuda": "emulated, for tests: only where it is named",
        "gluon": "experimental, for tests: only where it is named",
    },
    "cuda": {
        "triton": "takes the most: float32 too, and D up to 512; no GPU has yet measured that the"
        " CUDA kernels are faster",
        "cuda": "needs neither Triton nor a C compiler, and takes float16 on compute capability"
        " 7.5, which Triton's row refuses",
        "reference": "takes what all others refuse",
        "gluon": "experimental: only where it is named",
    },
    "xpu": {
        "triton": "compiled by Intel's Triton; no such GPU has run it yet",
        "reference": "takes what all others refuse",
    },
}

_warned: set[str] = set()


def backends_of(device: torch.device) -> tuple[Backend, ...]:
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
        return next(row for row in backends_of(problem.device) if row.name == name)
    for row in backends_of(problem.device):
        if row.unsupported(problem) is None:
            break
    if row is reference.ROW and not torch.compiler.is_compiling():
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
    for row in backends_of(problem.device):
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
    return row is reference.ROW or (row is cuda.ROW and checks_values())


def raises_for_fallback() -> bool:
    """Whether ``ATTNFAST_FALLBACK`` asks for an error where only the reference accepts."""
    return environment("ATTNFAST_FALLBACK", "warn", "error") == "error"


def _report_fallback(problem: Problem, function: str) -> None:
    table = backends_of(problem.device)
    fused = table[: table.index(reference.ROW)]  # those after it run only where they are named
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

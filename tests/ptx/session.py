"""What a process of pytest needs to execute the kernels' PTX, and who may run what of it.

``ATTNFAST_PTX`` names the architecture, 80 for sm_80; ``--backend`` the kernels.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from .driver import Driver

ARCH = os.environ.get("ATTNFAST_PTX", "")
BUILT = Path(__file__).resolve().parents[2] / "build" / "ptx"
FOLDER = BUILT / ARCH  # nvcc's
NO_PTX = f"no PTX of the CUDA kernels for sm_{ARCH}: `make ptx` has nvcc emit it"


def begin(backends: list[str]) -> None:
    """Have these backends take CPU tensors, and execute what their compilers emit."""
    # What torch.empty returns is NaN; the public switch imports torch's compiler.
    torch._C._set_deterministic_algorithms(True)
    if "cuda" in backends:
        os.environ |= {"ATTNFAST_EMULATOR": "1", "ATTNFAST_EMULATOR_ARCH": ARCH}
        import attnfast.ops

        if attnfast.ops.EMULATOR_MISSING is None:
            torch.ops.attnfast.emulator_ptx(str(FOLDER))
    if {"triton", "gluon"} & set(backends):
        os.environ.setdefault("TRITON_CACHE_DIR", str(BUILT / "triton"))
        from . import driver

        driver.install(int(ARCH))


def missing(backend: str) -> str | None:
    """Why a backend cannot run here, or None."""
    if backend == "triton" and ARCH == "75":
        return "Triton's kernels need sm_80"
    return NO_PTX if backend == "cuda" and not (FOLDER / "row_terms.ptx").exists() else None


def left_out(config: pytest.Config, backend: str, arch: str) -> str | None:
    """Why a test of one backend's kernels for one architecture is not run, or None."""
    if arch != ARCH:
        return f"is about the PTX for sm_{arch}"
    if backend not in (config.getoption("--backend") or []):
        return f"is about the {backend} kernels"
    return missing(backend)


def driver() -> Driver:
    """The stand-in that `begin` made Triton's driver."""
    from triton.runtime import driver

    return driver.active

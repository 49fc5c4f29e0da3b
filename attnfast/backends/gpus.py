"""What the GPUs' backends ask of a device."""

from __future__ import annotations

import torch

from ..requirements import environment

# Tests: the GPU that a machine which executes PTX plays for CPU tensors, "90" for sm_90; or "".
PTX = environment("ATTNFAST_PTX", "75", "80", "90")


def capability(index: int) -> tuple[int, int]:
    """An NVIDIA GPU's compute capability; of any other device more than enough."""
    if PTX:
        return int(PTX[0]), int(PTX[1])
    if torch.version.hip is not None or not torch.cuda.is_available():
        return (99, 0)
    found = torch.cuda.get_device_properties(index)  # a constant to torch.compile
    return found.major, found.minor


def too_old(found: tuple[int, int], oldest: tuple[int, int]) -> str | None:
    """Why a GPU of that compute capability is refused, or None."""
    if found >= oldest:
        return None
    return f"needs a GPU of compute capability {dotted(oldest)} or later, got {dotted(found)}"


def dotted(version: tuple[int, int]) -> str:
    """``8.0`` for ``(8, 0)``."""
    return ".".join(map(str, version))

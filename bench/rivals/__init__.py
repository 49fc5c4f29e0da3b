"""Who competes in the rows: a module for each kind of row, and for rivals that need more."""

from __future__ import annotations

import importlib

import torch


def lacking(package: str, device: torch.device, dtype: str) -> str | None:
    """Why a package's kernels for GPUs cannot be had for a row, or None."""
    try:
        importlib.import_module(package)
    except Exception as error:  # a package may fail to load in any way
        return f"not installed ({type(error).__name__})"
    fits = device.type == "cuda" and dtype != "float32"
    return None if fits else "takes bf16 and fp16 on a GPU"

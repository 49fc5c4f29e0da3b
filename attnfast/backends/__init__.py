"""The backends, a module each with its ``ROW`` of the table in dispatch.py, and what a row is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..call import Options
from ..ops import Ops

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
    indices: bool = False
    blocks: bool = False  # a block mask
    windows: bool = False  # one for each head
    pooled: bool = False  # its probabilities are to be pooled


class Backend(NamedTuple):
    """One row of the table.

    Attributes:
        name: What ``backend=`` calls it.
        unsupported: The reason why a problem is refused, or None.
        ops: Its operators; None for the reference, which is plain PyTorch.
        workspace: Bytes of scratch that kernels take for a call, forward and backward, from its
            tensors and options.
        details: What ``explain`` adds, the instruction set for example.
    """

    name: str
    unsupported: Callable[[Problem], str | None]
    ops: Ops | None
    workspace: Callable[[Any, Any], tuple[int, int]]
    details: Callable[[], str]


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def other_dtype(problem: Problem, taken: tuple[torch.dtype, ...]) -> str | None:
    """Why a backend of these dtypes refuses a problem, or None."""
    if problem.dtype in taken:
        return None
    *others, last = map(dtype_name, taken)
    return f"takes {', '.join(others)} and {last}, got {dtype_name(problem.dtype)}"


def no_pooling(problem: Problem) -> str | None:
    """Why a backend without ``NAME_pooled`` refuses a problem, or None."""
    return "has no kernel that pools probabilities" if problem.pooled else None


def too_wide(problem: Problem, most: int) -> str | None:
    """Why a backend of head dims up to this refuses a problem, or None."""
    widest = max(problem.D, problem.D_v)
    return f"takes D and D_v up to {most}, got {widest}" if widest > most else None

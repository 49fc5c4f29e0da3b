"""Plain PyTorch, for whatever all others refuse."""

from __future__ import annotations

import torch

from . import Backend, Problem


def workspace(problem: Problem) -> tuple[int, int]:
    """All scores, in fp32 or better: four times in forward, and as often again in backward."""
    sequences = 1 if problem.kind == "varlen" else problem.B  # varlen: at most all rows in one
    scores = sequences * problem.H * problem.T * problem.S
    size = 8 if problem.dtype == torch.float64 else 4
    return 4 * scores * size, 8 * scores * size


ROW = Backend("reference", lambda problem: None, None, workspace, lambda: "plain PyTorch")

"""Plain PyTorch, for whatever all others refuse."""

from __future__ import annotations

import math

import torch

from ..call import DecodeInputs, DecodeOptions, Inputs, Options
from . import Backend


def workspace(inputs: Inputs | DecodeInputs, options: Options | DecodeOptions) -> tuple[int, int]:
    """All scores, in fp32 or better: four times in forward, and as often again in backward."""
    q, k = inputs[:2]
    scores = math.prod(q.shape[:3]) * k.shape[2]  # varlen: at most all rows in one
    if isinstance(inputs, DecodeInputs) and inputs.page_table is not None:
        scores = math.prod(q.shape[:3]) * inputs.page_table.shape[1] * k.shape[1]
    size = 8 if q.dtype == torch.float64 else 4
    return 4 * scores * size, 8 * scores * size


ROW = Backend("reference", lambda problem: None, None, workspace, lambda: "plain PyTorch")

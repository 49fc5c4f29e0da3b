"""Torch's own BlockMask, of FlexAttention, as ours."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from .block_mask import BlockMask
from .block_patterns import SIZES
from .subclasses import is_a

_converted: weakref.WeakKeyDictionary[Any, BlockMask] = weakref.WeakKeyDictionary()


def is_block_mask(x: object) -> bool:
    """Whether x is a `BlockMask`, or ``torch.nn.attention.flex_attention``'s."""
    return type(x) is BlockMask or is_a(x, "torch.nn.attention.flex_attention", "BlockMask")


def from_flex(mask: Any) -> BlockMask:
    """Ours of torch's, made once for each: full blocks, and of partial ones what mask_mod allows.

    Blocks that torch's does not list are empty, whatever its function says of them.
    """
    found = _converted.get(mask)
    if found is None:
        found = _converted[mask] = _convert(mask)
    return found


def _convert(mask: Any) -> BlockMask:
    B, H, T, S = mask.shape
    rows, columns = mask.BLOCK_SIZE
    size = rows if rows == columns and rows in SIZES else max(SIZES)
    partial = _listed(mask.kv_num_blocks, mask.kv_indices)
    full = torch.zeros_like(partial)
    if mask.full_kv_num_blocks is not None:
        full = _listed(mask.full_kv_num_blocks, mask.full_kv_indices)

    def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        at = (b, h, q // rows, k // columns)
        answers: Tensor = full[at] | (partial[at] & mask.mask_mod(b, h, q, k))
        return answers

    return BlockMask.from_mask_mod(allowed, B, H, T, S, partial.device, size)


def _listed(counts: Tensor, blocks: Tensor) -> Tensor:
    """Which blocks of each row are among the first so many of its list, bool ``(B, H, R, C)``."""
    columns = blocks.shape[-1]
    there = torch.arange(columns, device=blocks.device) < counts[..., None]
    found = torch.zeros((*blocks.shape[:3], columns + 1), dtype=torch.bool, device=blocks.device)
    found.scatter_(3, torch.where(there, blocks, columns).long(), True)
    return found[..., :-1]

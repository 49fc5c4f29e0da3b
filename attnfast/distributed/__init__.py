"""Attention of sequences that are cut over the ranks of torch.distributed."""

from __future__ import annotations

from .context import context_parallel_attention
from .decode import context_parallel_decode
from .layout import shard, unshard

__all__ = ["context_parallel_attention", "context_parallel_decode", "shard", "unshard"]

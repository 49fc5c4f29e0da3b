"""Attention of sequences that are cut over the ranks of torch.distributed."""

from __future__ import annotations

from .context import context_parallel_attention, context_parallel_varlen_attention
from .decode import context_parallel_decode
from .layout import shard, unshard
from .parallel import HeadParallel, parallelize

__all__ = [
    "HeadParallel",
    "context_parallel_attention",
    "context_parallel_decode",
    "context_parallel_varlen_attention",
    "parallelize",
    "shard",
    "unshard",
]

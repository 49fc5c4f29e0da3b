"""Attention of whole sequences for some of the heads: all ranks exchange heads for rows, and back.

DeepSpeed-Ulysses (arXiv:2309.14509); with fewer key heads than ranks each goes to all that need it.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .collectives import AllToAll


class Heads(NamedTuple):
    """Which heads of the queries and of the keys every rank computes."""

    queries: list[list[int]]
    keys: list[list[int]]

    @classmethod
    @functools.lru_cache(maxsize=1 << 10)
    def over(cls, ranks: int, H: int, H_kv: int) -> Heads:
        """As evenly as whole heads go.

        A rank whose heads of queries do not share those of its keys evenly has one for each.
        """
        found, group = cls([], []), H // max(H_kv, 1)
        for rank in range(ranks):
            mine = list(range(H * rank // ranks, H * (rank + 1) // ranks))
            each = [h // group for h in mine]
            once = sorted(set(each))
            fits = once and [once[i * len(once) // len(mine)] for i in range(len(mine))] == each
            found.queries.append(mine)
            found.keys.append(once if fits and len(mine) % len(once) == 0 else each)
        return found


class Rows(NamedTuple):
    """The rows that the ranks of a group hold together."""

    group: dist.ProcessGroup
    each: int  # rows of a rank
    order: Tensor  # of every row of the whole, where it lies in the ranks' one after another

    def to_heads(self, x: Tensor, heads: list[list[int]]) -> Tensor:
        """``(B, H, rows, D)``, all heads of a shard, to ``(B, heads of this rank, T, D)``."""
        B, _, rows, D = x.shape
        mine, ranks = len(heads[dist.get_rank(self.group)]), len(heads)
        sent = x[:, [h for part in heads for h in part]].transpose(0, 1)
        counts = [len(part) for part in heads], [mine] * ranks
        received = AllToAll.apply(sent, *counts, self.group)
        by_rank = received.view(ranks, mine, B, rows, D).permute(2, 1, 0, 3, 4)
        whole: Tensor = by_rank.reshape(B, mine, ranks * rows, D)[:, :, self.order]
        return whole

    def to_rows(self, x: Tensor, heads: list[list[int]]) -> Tensor:
        """The way back: ``(B, heads of this rank, T, D)`` to ``(B, H, rows, D)``."""
        (B, mine, _, D), ranks = x.shape, len(heads)
        every = x.new_zeros((B, mine, ranks * self.each, D)).index_copy(2, self.order, x)
        by_rank = every.view(B, mine, ranks, self.each, D).permute(2, 1, 0, 3, 4)
        sent = by_rank.reshape(ranks * mine, B, self.each, D)
        counts = [mine] * ranks, [len(part) for part in heads]
        received: Tensor = AllToAll.apply(sent, *counts, self.group)
        return received.transpose(0, 1)

    def scores_to_heads(self, x: Tensor | None, heads: list[list[int]]) -> Tensor | None:
        """A mask or bias of a rank's queries, to that of all queries for the rank's heads.

        One for all heads goes to every rank as one head.
        """
        if x is None:
            return None
        boolean = x.dtype == torch.bool
        if x.shape[2] > 1 or self.each == 1:
            x = x.to(torch.uint8) if boolean else x
            x = self.to_heads(x, heads if x.shape[1] > 1 else [[0]] * len(heads))
        elif x.shape[1] > 1:
            x = x[:, heads[dist.get_rank(self.group)]]
        return x.to(torch.bool) if boolean else x

"""Attention of whole sequences for some of the heads: all ranks exchange heads for rows, and back.

DeepSpeed-Ulysses (arXiv:2309.14509); with fewer key heads than ranks each goes to all that need it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .collectives import AllToAll, Gather
from .layout import Layout


class Heads(NamedTuple):
    """Which heads of the queries and of the keys every rank computes."""

    queries: list[list[int]]
    keys: list[list[int]]

    @classmethod
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


def to_heads(x: Tensor, heads: list[list[int]], layout: Layout, group: dist.ProcessGroup) -> Tensor:
    """``(B, H, T / P, D)``, all heads of a shard, to ``(B, heads of this rank, T, D)``."""
    rank, (B, _, rows, D) = dist.get_rank(group), x.shape
    mine = len(heads[rank])
    sent = x[:, [h for part in heads for h in part]].transpose(0, 1)
    received: Tensor = AllToAll.apply(
        sent, [len(part) for part in heads], [mine] * layout.ranks, group
    )
    by_rank = received.view(layout.ranks, mine, B, rows, D).permute(2, 1, 0, 3, 4)
    return by_rank.reshape(B, mine, layout.ranks * rows, D)[:, :, layout.order(x.device)]


def to_rows(x: Tensor, heads: list[list[int]], layout: Layout, group: dist.ProcessGroup) -> Tensor:
    """The way back: ``(B, heads of this rank, T, D)`` to ``(B, H, T / P, D)``."""
    B, mine, _, D = x.shape
    every = x.new_zeros((B, mine, layout.ranks * layout.rows, D))
    every = every.index_copy(2, layout.order(x.device), x)
    by_rank = every.view(B, mine, layout.ranks, layout.rows, D).permute(2, 1, 0, 3, 4)
    sent = by_rank.reshape(layout.ranks * mine, B, layout.rows, D)
    received: Tensor = AllToAll.apply(
        sent, [mine] * layout.ranks, [len(part) for part in heads], group
    )
    return received.transpose(0, 1)


def scores_to_heads(
    x: Tensor | None, heads: list[list[int]], layout: Layout, group: dist.ProcessGroup
) -> Tensor | None:
    """A mask or bias of a rank's queries, to that of all queries for the rank's heads."""
    if x is None:
        return None
    boolean = x.dtype == torch.bool
    if x.shape[2] > 1 or layout.rows == 1:
        x = x.to(torch.uint8) if boolean else x
        x = to_heads(x, heads, layout, group) if x.shape[1] > 1 else Gather.apply(x, layout, group)
    elif x.shape[1] > 1:
        x = x[:, heads[dist.get_rank(group)]]
    return x.to(torch.bool) if boolean else x

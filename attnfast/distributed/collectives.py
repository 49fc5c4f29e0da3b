"""Collective operations of torch.distributed with their gradients, to any order."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import Function

from .layout import Layout, reduce_scatter


class Gather(Function):
    """A rank's shard of rows, dimension 2, to the rows of the whole sequence."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Layout, group: dist.ProcessGroup) -> Tensor:
        """Everything, on every rank."""
        ctx.given = layout, group
        return layout.joined(x, 2, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The sum over the ranks, of the rank's own rows."""
        return Scatter.apply(grads[0], *ctx.given), None, None


class Scatter(Function):
    """The sum over the ranks of what each has for the whole sequence, a rank's own rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Layout, group: dist.ProcessGroup) -> Tensor:
        """Summed in fp32, or wider."""
        ctx.given = layout, group
        rows = x.movedim(2, 0)
        wide = torch.promote_types(x.dtype, torch.float32)
        every = rows.new_zeros((layout.ranks * layout.rows, *rows.shape[1:]), dtype=wide)
        every[layout.order(x.device)] = rows.to(wide)
        mine = every.new_empty((layout.rows, *rows.shape[1:]))
        reduce_scatter(mine, every, group=group)
        return mine.to(x.dtype).movedim(0, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """All rows' gradients."""
        return Gather.apply(grads[0], *ctx.given), None, None


class AllToAll(Function):
    """Rows in dimension 0, so many to and from every rank."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, to: list[int], of: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        """What the others have for this rank."""
        ctx.given = of, to, group
        result = x.new_empty((sum(of), *x.shape[1:]))
        dist.all_to_all_single(result, x.contiguous(), of, to, group=group)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The way back."""
        return AllToAll.apply(grads[0], *ctx.given), None, None, None


class Shared(Function):
    """A tensor that all ranks have, and of whose gradient each finds a part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        """The same."""
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The sum over the ranks, in fp32 or wider."""
        return Summed.apply(grads[0], ctx.group), None


class Summed(Function):
    """The sum over the ranks, on every one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        """In fp32, or wider."""
        ctx.group = group
        total = x.to(torch.promote_types(x.dtype, torch.float32), copy=True)
        dist.all_reduce(total, group=group)
        return total.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """What every rank's part is given, which is the same."""
        return Shared.apply(grads[0], ctx.group), None

"""Which rows of a sequence every rank holds, and the ways between a whole sequence and a shard."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import Function

from ..requirements import choice, fail, integer

# By the names of torch 2.13, which warns of the older ones.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

PARTS = {"contiguous": 1, "zigzag": 2}  # chunks of a rank


class Chunk(NamedTuple):
    """Rows that follow one another in the sequence."""

    start: int  # in the sequence
    length: int
    row: int  # of the shard, where they begin

    def within(self, begin: int, end: int) -> Chunk:
        """What of them lies between two rows of the sequence, counted from the first of these."""
        start, stop = max(self.start, begin), min(self.start + self.length, end)
        return Chunk(start - begin, max(0, stop - start), self.row + start - self.start)


class Layout(NamedTuple):
    """A sequence cut over ranks.

    Chunks of one size, the last ones shorter or empty where the length does not divide. Zigzag
    gives a rank the chunks r and 2 P - 1 - r, so that all ranks have alike many causal scores.
    """

    ranks: int
    parts: int  # chunks of a rank
    size: int  # rows of a chunk
    length: int  # of the sequence

    @classmethod
    def of_sequence(cls, length: int, ranks: int, name: str) -> Layout:
        """The smallest chunks that hold a sequence."""
        parts = PARTS[name]
        return cls(ranks, parts, -(-length // (parts * ranks)), length)

    @property
    def rows(self) -> int:
        """Of a shard."""
        return self.parts * self.size

    def places(self, rank: int) -> list[Chunk]:
        """The chunks of a rank, as they lie in its shard, past the end of the sequence too."""
        numbers = (rank, 2 * self.ranks - 1 - rank)[: self.parts]
        return [Chunk(n * self.size, self.size, i * self.size) for i, n in enumerate(numbers)]

    def chunks(self, rank: int) -> list[Chunk]:
        """What of them the sequence fills."""
        cut = (
            (start, min(length, self.length - start), row)
            for start, length, row in self.places(rank)
        )
        return [Chunk(*chunk) for chunk in cut if chunk[1] > 0]

    def order(self, device: torch.device) -> Tensor:
        """Of every row of the sequence, where it lies in the shards one after another."""
        order = torch.empty(self.length, dtype=torch.int64)
        for rank in range(self.ranks):
            for start, length, row in self.chunks(rank):
                begin = rank * self.rows + row
                order[start : start + length] = torch.arange(begin, begin + length)
        return order.to(device)

    def merged(self, inner: int) -> Layout:
        """The same sequence over groups of ``inner`` ranks one after another."""
        return Layout(self.ranks // inner, self.parts, self.size * inner, self.length)

    def order_within(self, inner: int, group: int) -> Tensor:
        """Of every row of a merged group's shard, where it lies in its ranks' one after another."""
        order = torch.empty(self.rows * inner, dtype=torch.int64)
        for start, length, row in self.merged(inner).places(group):
            for rank in range(inner):
                for own in self.places(group * inner + rank):
                    if start <= own.start < start + length:
                        at, begin = row + own.start - start, rank * self.rows + own.row
                        order[at : at + self.size] = torch.arange(begin, begin + self.size)
        return order

    def cut(self, x: Tensor, dim: int, rank: int) -> Tensor:
        """A rank's shard of a whole tensor; zeros where the sequence has ended."""
        shape = list(x.shape)
        shape[dim] = self.rows
        shard = x.new_zeros(shape)
        for start, length, row in self.chunks(rank):
            shard.narrow(dim, row, length).copy_(x.narrow(dim, start, length))
        return shard

    def joined(self, shard: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        """The whole tensor, from all ranks' shards."""
        rows = shard.movedim(dim, 0).contiguous()
        every = rows.new_empty((self.ranks * self.rows, *rows.shape[1:]))
        all_gather(every, rows, group=group)
        return every[self.order(shard.device)].movedim(0, dim)


class Shard(Function):
    """Cut a tensor that all ranks have."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Layout, dim: int, group: dist.ProcessGroup) -> Tensor:
        """The rank's shard."""
        ctx.given = layout, dim, group
        return layout.cut(x, dim, dist.get_rank(group))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of all shards."""
        layout, dim, group = ctx.given
        return Unshard.apply(grads[0], layout, dim, group), None, None, None


class Unshard(Function):
    """Join the shards, so that all ranks have the tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Layout, dim: int, group: dist.ProcessGroup) -> Tensor:
        """The whole tensor."""
        ctx.given = layout, dim, group
        return layout.joined(x, dim, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of the rank's shard."""
        layout, dim, group = ctx.given
        return Shard.apply(grads[0], layout, dim, group), None, None, None


def shard(x: Tensor, mesh: Any, dim: int, layout: str = "zigzag") -> Tensor:
    """This rank's part of a tensor that all ranks have whole.

    Args:
        x: The whole tensor, the same on every rank.
        mesh: A DeviceMesh of one dimension or two, or a process group, of P ranks.
        dim: The dimension to cut, of size T.
        layout: "contiguous", or "zigzag": of 2 P chunks a rank has two, its own and the one as far
            from the other end, which balances causal attention.

    Returns:
        ``ceil(T / P)`` rows, in "zigzag" ``2 ceil(T / (2 P))``, zeros where the sequence has ended:
        the same number on every rank. The gradient is that of all shards, joined.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: There is no such dimension or layout.
    """
    group, dim, kind = _given("shard", x, mesh, dim, layout)
    sizes = Layout.of_sequence(x.shape[dim], dist.get_world_size(group), kind)
    result: Tensor = Shard.apply(x, sizes, dim, group)
    return result


def unshard(
    x: Tensor, mesh: Any, dim: int, layout: str = "zigzag", length: int | None = None
) -> Tensor:
    """The tensor of which every rank holds a part: what `shard` has cut.

    Args:
        x: This rank's part.
        mesh: As for `shard`.
        dim: The dimension that is cut.
        layout: As for `shard`.
        length: The size T of the whole tensor; by default all rows of all parts.

    Returns:
        The whole tensor, on every rank. Its gradient is taken to be the same on every rank, as that
        of DTensor's ``full_tensor`` is, and each keeps its own part.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: There is no such dimension or layout, or parts of that size do not make
            ``length`` rows.
    """
    group, dim, kind = _given("unshard", x, mesh, dim, layout)
    ranks, rows = dist.get_world_size(group), x.shape[dim]
    length = ranks * rows if length is None else integer("unshard", "length", length, low=0)
    sizes = Layout.of_sequence(length, ranks, kind)
    if sizes.rows != rows:
        fail("unshard", "x", f"{sizes.rows} rows of {sizes.length} over {ranks} ranks", rows)
    result: Tensor = Unshard.apply(x, sizes, dim, group)
    return result


def _given(
    function: str, x: Tensor, mesh: Any, dim: int, layout: str
) -> tuple[dist.ProcessGroup, int, str]:
    if not isinstance(x, Tensor):
        fail(function, "x", "a Tensor", type(x).__name__, TypeError)
    if not isinstance(dim, int) or not -x.dim() <= dim < x.dim():
        fail(function, "dim", f"a dimension of x, of {x.dim()}", dim)
    choice(function, "layout", layout, PARTS)
    return group_of(function, mesh), dim % x.dim(), layout


def group_of(function: str, mesh: Any) -> dist.ProcessGroup:
    """The process group of all ranks of a mesh, in its order, or that group itself."""
    if isinstance(mesh, dist.ProcessGroup):
        return mesh
    from torch.distributed.device_mesh import DeviceMesh

    if mesh is None:
        fail(function, "mesh", "a group of torch.distributed: see init_process_group", None)
    if not isinstance(mesh, DeviceMesh):
        fail(function, "mesh", "a DeviceMesh or a ProcessGroup", type(mesh).__name__, TypeError)
    if mesh.ndim > 2:
        fail(function, "mesh", "of one or two dimensions, mesh['cp'] for example", mesh.ndim)
    return mesh.get_group() if mesh.ndim == 1 else mesh._flatten().get_group()

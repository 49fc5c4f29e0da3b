"""The patterns that a `BlockMask` can be made of: documents, prefixes, strides, trees, graphs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .block_index import blocks_of
from .requirements import fail

if TYPE_CHECKING:
    from typing_extensions import Self

SIZES = (64, 128)

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Patterns(ABC):
    """The class methods of `BlockMask` that make one of something else than a function."""

    grid: tuple[int, int, int, int]
    device: torch.device

    @classmethod
    @abstractmethod
    def nothing(
        cls, shape: tuple[int, int, int, int], block_size: int, device: torch.device | str = "cpu"
    ) -> Self:
        """A mask by which no query attends any key."""

    @abstractmethod
    def _evaluated(self, mask_mod: MaskFunction, number: Tensor) -> Self:
        """A mask of what a function allows in some blocks."""

    @abstractmethod
    def _with_scores(self, b: Tensor, q: Tensor, k: Tensor) -> Self:
        """A mask of some scores."""

    @classmethod
    def from_mask(cls, mask: Tensor, block_size: int = 128) -> Self:
        """From a bool mask of two to four dimensions, ``(B|1, H|1, T, S)`` or its last ones.

        Args:
            mask: bool, True = attend, with all T and S.
            block_size: 64 or 128.

        Raises:
            TypeError: The mask is not a bool tensor.
            ValueError: It has another number of dimensions.
        """
        name = "BlockMask.from_mask"
        if not isinstance(mask, Tensor) or mask.dtype is not torch.bool:
            what = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            fail(name, "mask", "a bool Tensor, True = attend", what, TypeError)
        if not 2 <= mask.dim() <= 4:
            fail(name, "mask", "(B|1, H|1, T, S) or its last dimensions", tuple(mask.shape))
        mask = mask[(None,) * (4 - mask.dim())]
        B, H, T, S = mask.shape
        empty = cls.nothing(checked_shape(name, B, H, T, S, block_size), block_size, mask.device)
        return empty._evaluated(
            lambda b, h, q, k: mask[b, h, q, k], blocks_of(empty.grid, mask.device)
        )

    @classmethod
    def from_documents(cls, ids: Tensor, keys: Tensor | None = None, block_size: int = 128) -> Self:
        """Queries attend keys of their own document.

        Args:
            ids: int ``(T,)`` or ``(B, T)``: the document of each query; negative: of none, which
                attends nothing.
            keys: The same of the keys, ``(S,)`` or ``(B, S)``; default: ``ids``.
            block_size: 64 or 128.

        Raises:
            TypeError: Documents are not numbered by an int tensor.
            ValueError: There are numbers for different batch entries.
        """
        name = "BlockMask.from_documents"
        q, k = numbers(name, "ids", ids), numbers(name, "keys", ids if keys is None else keys)
        if q.shape[0] != k.shape[0]:
            fail(name, "keys", f"of {q.shape[0]} batch entries", k.shape[0])
        shape = checked_shape(name, q.shape[0], 1, q.shape[1], k.shape[1], block_size)
        empty = cls.nothing(shape, block_size, q.device)
        # Only where the ranges of two blocks' documents meet can they have one in common.
        (q_low, q_high), (k_low, k_high) = (ranges(x, block_size) for x in (q, k))
        meet = (q_low[:, :, None] <= k_high[:, None]) & (k_low[:, None] <= q_high[:, :, None])
        return empty._evaluated(
            lambda b, h, t, s: (q[b, t] == k[b, s]) & (q[b, t] >= 0), torch.where(meet.flatten())[0]
        )

    @classmethod
    def from_cu_seqlens(
        cls, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None = None, block_size: int = 128
    ) -> Self:
        """From where sequences begin that lie one after another, as `varlen_attention` takes them.

        Args:
            cu_seqlens_q: int ``(sequences + 1,)``: sequence i has the queries from element i to
                element i + 1.
            cu_seqlens_k: Its keys; default: the same.
            block_size: 64 or 128.

        Raises:
            ValueError: The elements do not begin at 0, decrease, or are of different number.
        """
        name = "BlockMask.from_cu_seqlens"
        q_ends = numbers(name, "cu_seqlens_q", cu_seqlens_q)[0]
        given = cu_seqlens_k if cu_seqlens_k is not None else cu_seqlens_q
        bounds = (q_ends, numbers(name, "cu_seqlens_k", given)[0])
        for side, ends in zip("qk", bounds, strict=True):
            if not len(ends) or ends[0] != 0 or bool((ends.diff() < 0).any()):
                fail(name, f"cu_seqlens_{side}", "0 and then ascending", ends.tolist())
        if len(bounds[0]) != len(bounds[1]):
            fail(name, "cu_seqlens_k", f"as long as cu_seqlens_q, {len(bounds[0])}", len(bounds[1]))
        q, k = (
            torch.repeat_interleave(torch.arange(len(ends) - 1, device=ends.device), ends.diff())
            for ends in bounds
        )
        return cls.from_documents(q, k, block_size)

    @classmethod
    def prefix(cls, lengths: Tensor, T: int, S: int, block_size: int = 128) -> Self:
        """A prefix that everybody attends, then causal: query t attends keys s < length or s <= t'.

        Args:
            lengths: int ``(B,)``: keys of each batch entry's prefix.
            T: Queries, the last of S positions: t' = t + S - T.
            S: Keys.
            block_size: 64 or 128.
        """
        name = "BlockMask.prefix"
        own = numbers(name, "lengths", lengths)[0]
        shape = checked_shape(name, len(own), 1, T, S, block_size)
        empty = cls.nothing(shape, block_size, own.device)
        return empty._evaluated(
            lambda b, h, q, k: (k < own[b]) | (k <= q + (S - T)), blocks_of(empty.grid, own.device)
        )

    @classmethod
    def strided(
        cls,
        T: int,
        S: int,
        stride: int,
        width: int = 1,
        device: torch.device | str = "cpu",
        block_size: int = 128,
    ) -> Self:
        """Each query attends ``width`` keys of every ``stride``, counted back from its own.

        Query t, at t' = t + S - T, attends key s if ``(t' - s) mod stride < width``, on either
        side: with causal the strided pattern of sparse Transformers (arXiv:1904.10509), with a
        window a dilated one (arXiv:2004.05150).

        Args:
            T: Queries, the last of S positions.
            S: Keys.
            stride: 1 or more.
            width: From 1 to ``stride``.
            device: Where the mask lies.
            block_size: 64 or 128.
        """
        name = "BlockMask.strided"
        shape = checked_shape(name, 1, 1, T, S, block_size)
        if type(stride) is not int or stride < 1:
            fail(name, "stride", "an int of 1 or more", stride)
        if type(width) is not int or not 1 <= width <= stride:
            fail(name, "width", f"an int from 1 to stride = {stride}", width)
        empty = cls.nothing(shape, block_size, device)
        return empty._evaluated(
            lambda b, h, q, k: (q + (S - T) - k) % stride < width,
            blocks_of(empty.grid, empty.device),
        )

    @classmethod
    def from_tree(cls, parents: Tensor, block_size: int = 64) -> Self:
        """Each node attends itself and its ancestors: drafts of speculative decoding.

        Args:
            parents: int ``(n,)`` or ``(B, n)``: the number of each node's parent, -1 of a root.
            block_size: 64 or 128.

        Raises:
            ValueError: A parent's number is out of range, or a node is its own ancestor.
        """
        name = "BlockMask.from_tree"
        given = numbers(name, "parents", parents)
        B, n = given.shape
        shape = checked_shape(name, B, 1, n, n, block_size)
        in_range(name, "parents", given, -1, n - 1)
        batch = torch.arange(B, device=given.device)[:, None].expand(B, n)
        node = torch.arange(n, device=given.device).expand(B, n)
        above = node
        edges: list[Tensor] = []
        while bool((above >= 0).any()):
            if len(edges) > n:
                fail(name, "parents", "a forest", "a node that is its own ancestor")
            there = above >= 0
            edges.append(torch.stack((batch[there], node[there], above[there])))
            above = torch.where(there, given.gather(1, above.clamp(min=0)), -1)
        every = torch.cat(edges, 1) if edges else given.new_empty((3, 0))
        return cls.nothing(shape, block_size, given.device)._with_scores(*every)

    @classmethod
    def from_graph(cls, edges: Any, T: int, S: int, block_size: int = 128) -> Self:
        """Query t attends key s where the graph has the edge (t, s): memory is that of the edges.

        Args:
            edges: int ``(2, edges)``, queries and keys; or a scipy sparse matrix of ``(T, S)``,
                whose entries other than 0 are edges.
            T: Queries.
            S: Keys.
            block_size: 64 or 128.

        Raises:
            ValueError: An edge is out of range, or the matrix is of another shape.
        """
        name = "BlockMask.from_graph"
        shape = checked_shape(name, 1, 1, T, S, block_size)
        if hasattr(edges, "tocoo"):
            if tuple(edges.shape) != (T, S):
                fail(name, "edges", f"(T, S) = ({T}, {S})", tuple(edges.shape))
            found = edges.tocoo()
            there = found.data != 0
            edges = torch.stack([torch.as_tensor(x[there]) for x in (found.row, found.col)])
        if not isinstance(edges, Tensor) or edges.dim() != 2 or edges.shape[0] != 2:
            got = tuple(edges.shape) if isinstance(edges, Tensor) else type(edges).__name__
            fail(name, "edges", "an int Tensor (2, edges) or a scipy sparse matrix", got)
        q, k = numbers(name, "edges", edges)
        in_range(name, "edges", q, 0, T - 1, " in queries")
        in_range(name, "edges", k, 0, S - 1, " in keys")
        return cls.nothing(shape, block_size, edges.device)._with_scores(torch.zeros_like(q), q, k)


def checked_shape(
    function: str, B: int | None, H: int | None, T: int, S: int, block_size: int
) -> tuple[int, int, int, int]:
    """The sizes of a mask."""
    if block_size not in SIZES:
        fail(function, "block_size", "64 or 128", block_size)
    B, H = 1 if B is None else B, 1 if H is None else H
    for name, size in (("B", B), ("H", H), ("T", T), ("S", S)):
        if type(size) is not int or size < 0:
            fail(function, name, "an int of 0 or more", size)
    return B, H, T, S


def numbers(function: str, name: str, x: Any) -> Tensor:
    """Whole numbers as int64, ``(B, n)``."""
    whole = isinstance(x, Tensor) and not x.is_floating_point() and not x.is_complex()
    if not whole or x.dtype is torch.bool or x.dim() not in (1, 2):
        got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        fail(function, name, "an int Tensor (n,) or (B, n)", got, TypeError)
    wide: Tensor = x.to(torch.int64)
    return wide[None] if wide.dim() == 1 else wide


def in_range(function: str, name: str, x: Tensor, low: int, high: int, what: str = "") -> None:
    """Check that numbers lie from ``low`` to ``high``."""
    outside = x[(x < low) | (x > high)]
    if len(outside):
        fail(function, name, f"from {low} to {high}{what}", int(outside[0]))


def ranges(ids: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The least and the largest number of each block of rows, ``(B, blocks)``."""
    short = -ids.shape[1] % size
    if short:
        ids = torch.cat((ids, ids[:, -1:].expand(-1, short)), 1)
    blocks = ids.view(len(ids), -1, size)
    if not blocks.shape[1]:
        return blocks.new_empty(blocks.shape[:2]), blocks.new_empty(blocks.shape[:2])
    return blocks.amin(2), blocks.amax(2)

"""Which blocks of queries and keys are attended: `BlockMask`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import block_index
from .block_index import FULL, blocks_of
from .block_patterns import MaskFunction, Patterns, checked_shape
from .requirements import fail

AT_ONCE = 1 << 22  # scores that a mask function is asked for at a time
SAMPLES = 64  # scores that it is asked for one by one, to compare
PICTURE = (32, 64)  # rows and columns of a printed mask, at most
SHADES = "·▒█"  # empty, partial, full


class BlockMask(Patterns):
    """A bool mask of ``(B|1, H|1, T, S)``, True = attend, in blocks: empty, full, or in part.

    Given to `attention` as ``mask``: empty blocks are not visited, and only those in part have
    memory, a bit for each score. The class methods make one; ``&``, ``|`` and ``~`` combine masks
    of one block size. A mask has no gradient, and is not changed once it is made.

    Attributes:
        shape: ``(B|1, H|1, T, S)``.
        block_size: Queries and keys of a block, 64 or 128; the last ones may be cut off, and have
            bits.
        starts: int32 ``(B|1, H|1, 2 R + 1 + 2 C + 1)``, with R rows and C columns of blocks: row
            i's full blocks begin at entry ``starts[..., 2 i]``, its partial ones at the next
            element, and end at the one after that; from element 2 R + 1 on the columns' likewise.
        index: int32 ``(4, entries)``: of the rows' entries the block of keys, ascending among the
            full and among the partial ones of a row, and its place in ``bits``, -1 where it is
            full; of the columns' entries the block of queries, and likewise.
        device: Where it lies.
        bits: int32 ``(partial blocks, block_size, block_size / 32)``: bit ``j % 32`` of word
            ``j // 32`` of row i tells whether the block's query i attends its key j.
    """

    def __init__(
        self, shape: tuple[int, int, int, int], block_size: int, ids: Tensor, bits: Tensor
    ) -> None:
        """From blocks by number; the class methods are for use.

        Args:
            shape: ``(B|1, H|1, T, S)``.
            block_size: 64 or 128.
            ids: int64 ``(entries,)``, ascending: twice a block's number, and 1 more if it is full.
            bits: Those of the others.
        """
        B, H, T, S = shape
        self.shape = shape
        self.block_size = block_size
        self.grid = (B, H, -(-T // block_size), -(-S // block_size))
        self.device = bits.device
        self._ids = ids
        self.bits = bits
        self.starts, self.index = block_index.indexed(self.grid, ids >> 1, self._slots)

    @classmethod
    def from_mask_mod(
        cls,
        mask_mod: MaskFunction,
        B: int | None,
        H: int | None,
        T: int,
        S: int,
        device: torch.device | str = "cpu",
        block_size: int = 128,
    ) -> BlockMask:
        """From a function of positions, as ``torch.nn.attention.flex_attention`` takes it.

        Args:
            mask_mod: ``mask_mod(b, h, q, k)`` of int64 tensors that broadcast against one another,
                bool where query q attends key k; elementwise. It is asked for some blocks at a
                time, never for T x S scores.
            B: Batch entries; None or 1: the mask is that of all of them.
            H: Heads, likewise.
            T: Queries.
            S: Keys.
            device: Where the mask lies, and the function's arguments.
            block_size: 64 or 128.

        Raises:
            TypeError: The function does not return a bool tensor.
            ValueError: A size is negative, or the function is not elementwise: it raises, or what
                it returns for a block differs from what it returns for single scores.
        """
        name = "BlockMask.from_mask_mod"
        if not callable(mask_mod):
            fail(name, "mask_mod", "a function", type(mask_mod).__name__, TypeError)
        empty = cls.nothing(checked_shape(name, B, H, T, S, block_size), block_size, device)
        found = empty._evaluated(mask_mod, blocks_of(empty.grid, empty.device))
        found._compare_one_by_one(mask_mod)
        return found

    @classmethod
    def nothing(
        cls, shape: tuple[int, int, int, int], block_size: int, device: torch.device | str = "cpu"
    ) -> BlockMask:
        """A mask of ``(B|1, H|1, T, S)`` by which no query attends any key."""
        ids = torch.empty(0, dtype=torch.int64, device=device)
        words = block_size // block_index.WORD
        bits = torch.empty((0, block_size, words), dtype=torch.int32, device=device)
        return cls(shape, block_size, ids, bits)

    def to(self, device: torch.device | str) -> BlockMask:
        """The same mask on another device."""
        return BlockMask(self.shape, self.block_size, self._ids.to(device), self.bits.to(device))

    @property
    def density(self) -> float:
        """Share of the blocks that are not empty, about that of the time without a mask."""
        return len(self._ids) / max(math.prod(self.grid), 1)

    def to_dense(self) -> Tensor:
        """The bool mask ``(B|1, H|1, T, S)``."""
        _, _, T, S = self.shape
        return block_index.dense(self.starts, self.index, self.bits, slice(0, T), S)

    def __and__(self, other: BlockMask) -> BlockMask:
        """What both attend."""
        a, b = self._together(other, "&")
        number = (a._ids >> 1)[torch.isin(a._ids >> 1, b._ids >> 1)]
        return a._replaced(number, a._bits_of(number) & b._bits_of(number))

    def __or__(self, other: BlockMask) -> BlockMask:
        """What either attends."""
        a, b = self._together(other, "|")
        number = torch.unique(torch.cat((a._ids, b._ids)) >> 1)
        return a._replaced(number, a._bits_of(number) | b._bits_of(number))

    def __invert__(self) -> BlockMask:
        """What is not attended."""
        number = blocks_of(self.grid, self.device)
        return self._replaced(number, ~self._bits_of(number))

    def __repr__(self) -> str:
        """Sizes, density, and the first head's picture."""
        shape = ", ".join(map(str, self.shape))
        head = f"BlockMask of ({shape}) in blocks of {self.block_size}"
        return f"{head}, {self.density:.1%} of them visited\n{self.picture()}"

    def picture(self, b: int = 0, h: int = 0) -> str:
        """One head's blocks as characters: ``·`` empty, ``▒`` in part, ``█`` full.

        At most 32 lines of 64; of larger masks a character is several blocks.
        """
        share = self.shares(b, h)
        lines = min(share.shape[0], PICTURE[0]), min(share.shape[1], PICTURE[1])
        if not all(lines):
            return ""
        shown = torch.nn.functional.adaptive_avg_pool2d(share[None], lines)[0]
        shades = (shown > 0).int() + (shown == 1).int()
        return "\n".join("".join(SHADES[x] for x in line) for line in shades.tolist())

    def plot(self, b: int = 0, h: int = 0, ax: Any = None) -> Any:
        """One head's blocks drawn by matplotlib, darker where more of a block is attended.

        Args:
            b: Batch entry.
            h: Head.
            ax: Axes to draw on; default: new ones.

        Returns:
            The axes.
        """
        if ax is None:
            from matplotlib import pyplot as plt

            _, ax = plt.subplots()
        _, _, T, S = self.shape
        ax.imshow(
            self.shares(b, h), cmap="Greys", vmin=0, vmax=1, extent=(0, S, T, 0), aspect="auto"
        )
        ax.set(xlabel="key", ylabel="query", title=f"{self.density:.1%} of the blocks visited")
        return ax

    def shares(self, b: int = 0, h: int = 0) -> Tensor:
        """How much of each block of a head is attended, float32 ``(rows, columns)`` on the CPU."""
        B, H, rows, columns = self.grid
        if not (-B <= b < B and -H <= h < H):
            fail("BlockMask", "b and h", f"below {B} and {H}", (b, h))
        begin = (b % B * H + h % H) * rows * columns
        number = (self._ids >> 1) - begin
        own = (number >= 0) & (number < rows * columns)
        number = number[own]
        inside = self._inside(number + begin)
        share = torch.zeros(rows * columns)
        share[number.cpu()] = (ones(self._bits_of(number + begin)) / ones(inside)).cpu()
        return share.view(rows, columns)

    @property
    def _slots(self) -> Tensor:
        """The place in `bits` of each block that is not empty; FULL where it has none."""
        partial = (self._ids & 1) == 0
        return torch.where(partial, torch.cumsum(partial, 0) - 1, FULL).to(torch.int32)

    def _inside(self, number: Tensor) -> Tensor:
        """The bits of blocks that are scores: all but those beyond the last query and key."""
        size, (_, _, T, S), (_, _, rows, columns) = self.block_size, self.shape, self.grid
        i, j = number // max(columns, 1) % max(rows, 1), number % max(columns, 1)
        rows_left = T - i[:, None] * size - torch.arange(size, device=self.device)
        first = torch.arange(0, size, block_index.WORD, device=self.device)
        keys = (S - j[:, None] * size - first).clamp(0, block_index.WORD)  # of each word
        words = block_index.as_int32((1 << keys) - 1)
        return words[:, None] * (rows_left > 0)[:, :, None]

    def _bits_of(self, number: Tensor) -> Tensor:
        """The bits of blocks by their numbers, also of those that are empty or full."""
        found = self.bits.new_zeros((len(number), *self.bits.shape[1:]))
        if not len(self._ids):
            return found
        at = torch.searchsorted(self._ids >> 1, number).clamp(max=len(self._ids) - 1)
        there, slot = (self._ids[at] >> 1) == number, self._slots[at]
        found[there & (slot == FULL)] = -1
        partial = there & (slot != FULL)
        found[partial] = self.bits[slot[partial]]
        return found & self._inside(number)

    def _replaced(self, number: Tensor, bits: Tensor) -> BlockMask:
        """A mask with these blocks, ascending, and no others."""
        bits = bits & self._inside(number)
        empty = (bits == 0).flatten(1).all(1)
        full = (bits == -1).flatten(1).all(1)
        ids = (number << 1 | full)[~empty]
        return BlockMask(self.shape, self.block_size, ids, bits[~empty & ~full])

    def _evaluated(self, mask_mod: MaskFunction, number: Tensor) -> BlockMask:
        """A mask of what a function allows in some blocks, ascending."""
        size = self.block_size
        _, H, rows, columns = self.grid
        place = torch.arange(size, device=self.device)
        ids, bits = [self._ids], [self.bits]
        for part in number.split(max(AT_ONCE // size**2, 1)):
            b, h = part // (H * rows * columns), part // (rows * columns) % H
            q = part // columns % rows * size
            k = part % columns * size
            # Beyond the last score the function is asked for the last one again.
            allowed = answers(
                mask_mod,
                b[:, None, None],
                h[:, None, None],
                (q[:, None] + place).clamp(max=self.shape[2] - 1)[:, :, None],
                (k[:, None] + place).clamp(max=self.shape[3] - 1)[:, None],
            )
            found = self._replaced(part, block_index.packed(allowed.expand(len(part), size, size)))
            ids.append(found._ids)
            bits.append(found.bits)
        return BlockMask(self.shape, size, torch.cat(ids), torch.cat(bits))

    def _compare_one_by_one(self, mask_mod: MaskFunction) -> None:
        """Whether a function says of single scores what it said of blocks."""
        if not math.prod(self.shape):
            return
        generator = torch.Generator().manual_seed(0)
        for _ in range(SAMPLES):
            b, h, q, k = (
                torch.randint(n, (), generator=generator).to(self.device) for n in self.shape
            )
            number = ((b * self.grid[1] + h) * self.grid[2] + q // self.block_size) * self.grid[3]
            bits = self._bits_of((number + k // self.block_size)[None])[0, q % self.block_size]
            word = bits[k % self.block_size // block_index.WORD]
            if bool(word >> k % block_index.WORD & 1) != bool(answers(mask_mod, b, h, q, k)):
                where = ", ".join(str(int(x)) for x in (b, h, q, k))
                got = f"another answer for (b, h, q, k) = ({where}) alone than in its block"
                fail("BlockMask.from_mask_mod", "mask_mod", "elementwise", got)

    def _with_scores(self, b: Tensor, q: Tensor, k: Tensor) -> BlockMask:
        """An empty mask and these scores, of whichever head; in memory of their number."""
        size, columns = self.block_size, self.grid[3]
        block = (b * self.grid[2] + q // size) * columns + k // size
        number, place = torch.unique(block, return_inverse=True)
        bit = torch.unique((place * size + q % size) * size + k % size)
        words = torch.zeros(
            len(number) * size * size // block_index.WORD, dtype=torch.int64, device=q.device
        )
        words.index_add_(0, bit // block_index.WORD, torch.ones_like(bit) << bit % block_index.WORD)
        bits = block_index.as_int32(words).view(-1, size, size // block_index.WORD)
        return self._replaced(number, bits)

    def _together(self, other: object, sign: str) -> tuple[BlockMask, BlockMask]:
        """Both masks, broadcast to the same batch entries and heads."""
        if not isinstance(other, BlockMask):
            fail("BlockMask", sign, "of two BlockMasks", type(other).__name__, TypeError)
        pairs = list(zip(self.shape[:2], other.shape[:2], strict=True))
        fits = all(x == y or 1 in (x, y) for x, y in pairs)
        if not fits or self.shape[2:] != other.shape[2:] or self.block_size != other.block_size:
            a, b = (f"{x.shape} in blocks of {x.block_size}" for x in (self, other))
            fail("BlockMask", sign, "of masks that broadcast, of one block size", f"{a} and {b}")
        B, H = (x if y == 1 else y for x, y in pairs)
        return self._expanded(B, H), other._expanded(B, H)

    def _expanded(self, B: int, H: int) -> BlockMask:
        """The same mask for so many batch entries and heads."""
        if self.shape[:2] == (B, H):
            return self
        blocks = math.prod(self.grid[2:])
        from_b = torch.arange(B, device=self.device).clamp(max=self.shape[0] - 1)
        from_h = torch.arange(H, device=self.device).clamp(max=self.shape[1] - 1)
        source = (from_b[:, None] * self.shape[1] + from_h).flatten()
        number = torch.arange(B * H * blocks, device=self.device)
        found = source[number // blocks] * blocks + number % blocks
        there = torch.isin(found, self._ids >> 1)
        empty = BlockMask.nothing((B, H, *self.shape[2:]), self.block_size, self.device)
        return empty._replaced(number[there], self._bits_of(found[there]))


def answers(mask_mod: MaskFunction, *positions: Tensor) -> Tensor:
    """What a mask function says, which has to be bool."""
    name = "BlockMask.from_mask_mod"
    try:
        found = mask_mod(*positions)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        requirement = "elementwise in int64 tensors (b, h, q, k) that broadcast"
        lines = str(error).splitlines() or [""]
        got = f"{type(error).__name__}: {lines[0]}"
        raise ValueError(f"{name}: mask_mod must be {requirement}, got {got}") from error
    if not isinstance(found, Tensor) or found.dtype is not torch.bool:
        got = str(found.dtype) if isinstance(found, Tensor) else type(found).__name__
        fail(name, "mask_mod", "a function to a bool Tensor", got, TypeError)
    try:
        torch.broadcast_shapes(found.shape, *(x.shape for x in positions))
    except RuntimeError:
        shape = tuple(torch.broadcast_shapes(*(x.shape for x in positions)))
        fail(name, "mask_mod", f"elementwise: {shape} positions have as many answers", found.shape)
    return found


def ones(bits: Tensor) -> Tensor:
    """How many bits of each block are set, float32 ``(n,)``."""
    return block_index.unpacked(bits).flatten(1).sum(1).float()

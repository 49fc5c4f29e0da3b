"""What a kernel's inner loop costs: instructions of a warp, from its SASS.

The loop is the innermost one with matrix products; of several, that with the most, the shortest of
those. Of its turns one is counted: the way through its branches that meets the most products, then
the most copies and values handed to other blocks, then the fewest instructions. That is a tile
whose positions need no test and whose neighbours exist.

A CUDA kernel's turn is counted for 64 x 64 scores, which are 2 D instructions `m16n8k16` for each
of the products that it makes of a tile (PRODUCTS): how many of them a turn has says how many scores
it is for. A Triton kernel's turn is for a tile of its program.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

# Products that a kernel makes of a tile of scores, by its name and the form that tells how many.
PRODUCTS = {
    "attention_fwd": 2,
    "attention_bwd_fused": 5,
    "attention_bwd_keys": 4,
    "attention_bwd_keys, dk": 3,
    "attention_bwd_keys, dv": 2,
    "attention_bwd_queries": 3,
}
# Classes of instructions by the beginnings of their names; all others are of integers.
CLASSES = {
    "mma": "HMMA HGMMA UTCHMMA",
    "ldmatrix": "LDSM",
    "copies": "LDGSTS LDGDEPBAR DEPBAR",
    "exchange": "LDS STS SHFL",
    "global": "LDG STG LD. ST. LDL STL ATOM RED",
    "mufu": "MUFU",
    "float": "FFMA FMUL FADD FMNMX FSEL FSETP F2F HADD2 HMUL2 HFMA2 I2F F2I DFMA DMUL DADD",
    "control": "BRA BSSY BSYNC BAR WARPSYNC EXIT CALL RET NOP YIELD BREAK VOTE MEMBAR",
}
NAMES = (*CLASSES, "integer", "total")

INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+((?:@!?U?P\w+ )?)(\S+)\s*(.*?);")
TARGET = re.compile(r"(0x[0-9a-f]+)")


class Instruction(NamedTuple):
    """One line of SASS."""

    address: int
    guarded: bool  # by a predicate
    name: str
    operands: str

    @property
    def target(self) -> int | None:
        """Where a branch, or the BSYNC of a BSSY, leads; None for others."""
        if not self.name.startswith(("BRA", "BSSY")) or self.name.startswith("BRA.DIV"):
            return None
        found = TARGET.findall(self.operands)
        return int(found[-1], 16) if found else None

    @property
    def group(self) -> str:
        """The class that it is of."""
        for group, beginnings in CLASSES.items():
            if self.name.startswith(tuple(beginnings.split())):
                return group
        return "integer"


def parsed(listing: list[str]) -> list[Instruction]:
    """The instructions among the lines of a function in cuobjdump's listing."""
    found = filter(None, map(INSTRUCTION.match, listing))
    return [Instruction(int(m[1], 16), bool(m[2]), m[3], m[4]) for m in found]


def per_tile(code: list[Instruction], products: int, head_dim: int) -> tuple[int, ...]:
    """Warp instructions for 64 x 64 scores, in the order of NAMES; () without such a loop."""
    found = turn(code)
    made = sum(map(is_product, found))
    return counts(found, products * 2 * head_dim / made) if made else ()


def counts(turn: list[Instruction], times: float) -> tuple[int, ...]:
    """The instructions of a turn, so many times, in the order of NAMES; () of none."""
    found = Counter(each.group for each in turn)
    found["total"] = len(turn)
    return tuple(round(found[name] * times) for name in NAMES) if turn else ()


def is_product(each: Instruction) -> bool:
    """Whether it multiplies matrices."""
    return each.group == "mma"


def is_wait(each: Instruction) -> bool:
    """Whether it waits for wgmma."""
    return each.name.startswith("WARPGROUP.DEPBAR")


def carries(each: Instruction) -> bool:
    """Whether it is an asynchronous copy, or hands values to other blocks or takes them."""
    return each.name.startswith("LDGSTS") or ".STRONG" in each.name


def turn(code: list[Instruction]) -> list[Instruction]:
    """The turn of the inner loop that is counted; [] without one."""
    index = {each.address: i for i, each in enumerate(code)}
    found: list[tuple[int, int, list[Instruction]]] = []
    for begin, end in sorted(loops(code, index), key=lambda loop: loop[1] - loop[0]):
        if any(begin <= first and last <= end for first, last, _ in found):
            continue  # goes round another
        way = cheapest_turn(code[begin : end + 1])
        if any(map(is_product, way)):
            found.append((begin, end, way))
    ways = [way for *_, way in found]
    return max(ways, key=lambda way: (sum(map(is_product, way)), -len(way)), default=[])


def loops(code: list[Instruction], index: dict[int, int]) -> Iterator[tuple[int, int]]:
    """Where loops begin and end: a branch back, and what it leads to."""
    for end, each in enumerate(code):
        if each.name.startswith("BRA") and each.target is not None:
            begin = index.get(each.target, end + 1)
            if begin <= end:
                yield begin, end


def cheapest_turn(loop: list[Instruction]) -> list[Instruction]:
    """The instructions of one turn, as the module's first lines say; [] of no loop."""
    blocks = basic_blocks(loop)
    first = {block[0].address: i for i, block in enumerate(blocks)}
    # From each block to the loop's end: products, what is carried, less instructions; and which.
    best: dict[int, tuple[tuple[int, int, int], list[Instruction]]] = {}
    for i in reversed(range(len(blocks))):
        ways = [best[j] for j in followers(blocks, i, first) if j in best and j > i]
        if not ways and i < len(blocks) - 1:
            continue  # leaves the loop
        (products, carried, length), rest = max(ways, default=((0, 0, 0), []), key=lambda w: w[0])
        block = blocks[i]
        value = (products + sum(map(is_product, block)), carried + sum(map(carries, block)))
        best[i] = ((*value, length - len(block)), block + rest)
    return best[0][1] if 0 in best else []


def basic_blocks(loop: list[Instruction]) -> list[list[Instruction]]:
    """The loop, cut behind every jump and before every jump's target."""
    targets = {each.target for each in loop}
    blocks: list[list[Instruction]] = []
    for each in loop:
        if not blocks or each.address in targets or ends_block(blocks[-1][-1]):
            blocks.append([])
        blocks[-1].append(each)
    return blocks


def ends_block(each: Instruction) -> bool:
    """Whether control may go elsewhere after an instruction."""
    jump = each.name.startswith("BRA") and each.target is not None
    return jump or each.name.startswith(("EXIT", "BSYNC", "BREAK"))


def followers(blocks: list[list[Instruction]], i: int, first: dict[int, int]) -> list[int]:
    """The blocks that control may come to after block i."""
    last = blocks[i][-1]
    following = [i + 1] if i + 1 < len(blocks) else []
    if last.name.startswith("BRA") and last.target is not None:
        conditional = last.guarded or bool(re.match(r"!?U?P\d", last.operands))
        to = [first[last.target]] if last.target in first else []
        return to + (following if conditional else [])
    if last.name.startswith("EXIT"):
        return following if last.guarded else []
    if last.name.startswith("BSYNC"):
        barrier = last.operands.split()[0]
        named = [
            each.target
            for block in blocks[: i + 1]
            for each in block
            if each.name.startswith("BSSY") and each.operands.split(",")[0] == barrier
        ]
        to = [first[named[-1]]] if named and named[-1] in first else following
        return to + (following if last.guarded else [])
    return following

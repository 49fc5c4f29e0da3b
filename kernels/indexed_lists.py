"""Lists of keys as the kernels walk them, and turned round: for each key the queries that list it.

Made by torch's own sorts, which give the same order every time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnfast.call import Inputs, Options
from attnfast.reference import positions

from .arguments import Call


class Lists(NamedTuple):
    """Of every query the keys that it attends, sorted; then S, which stands for none."""

    keys: Tensor  # (B, heads, T, K) int32
    counts: Tensor  # (B, heads, T) int32: all that follow are S
    heads: int  # 1, or one list for each key head
    K: int  # places of a list, of which the last is always none


class Listing(NamedTuple):
    """Of every key the places in the lists of some queries where it stands, by query."""

    order: Tensor  # (B, heads, rows * K) int32: places, those of key 0 first
    starts: Tensor  # (B, heads, S + 1) int32: where a key's places begin
    heads: int
    places: int  # rows * K


def sorted_lists(inputs: Inputs, options: Options) -> Lists:
    """Each key once, without those that are outside or that a query may not attend by position."""
    indices, S = inputs.indices, inputs.k.shape[2]
    assert indices is not None
    ahead = indices - positions(inputs, options)
    seen = (indices >= 0) & (indices < S)
    if options.causal:
        seen &= ahead <= 0
    if options.window_left >= 0:
        seen &= ahead >= -options.window_left
    if options.window_right >= 0:
        seen &= ahead <= options.window_right
    keys = torch.where(seen, indices, S).sort(-1).values
    kept = keys < S
    kept[..., 1:] &= keys[..., 1:] != keys[..., :-1]
    K = keys.shape[3]
    places = torch.where(kept, kept.cumsum(-1) - 1, K)
    keys = keys.new_full((*keys.shape[:3], K + 1), S).scatter(-1, places, keys)
    keys[..., K] = S  # where all went that was not kept
    counts = kept.sum(-1, dtype=torch.int32)
    return Lists(keys, counts, keys.shape[1], keys.shape[3])


def listing(lists: Lists, rows: slice, S: int) -> Listing:
    """Where each key stands in the lists of the queries ``rows``."""
    keys = lists.keys[:, :, rows].flatten(2)
    found, order = keys.sort(stable=True, dim=-1)
    every = torch.arange(S + 1, dtype=torch.int32, device=keys.device)
    every = every.expand(*keys.shape[:2], S + 1).contiguous()
    starts = torch.searchsorted(found, every, out_int32=True)
    return Listing(order.int(), starts, lists.heads, keys.shape[2])


def with_heads_in_rows(call: Call, *others: Tensor) -> Call:
    """The call for tiles whose rows are the heads of a group, of one query."""
    wide = any(x.stride(1) >= 1 << 22 for x in (call.x.q, *others))
    return call._replace(f=call.f._replace(FUSED=False, WIDE=wide))


@triton.jit
def query_of(p, BLOCK_M: tl.constexpr):
    """Batch entry, key head, query and first head within the group of this program."""
    blocks = tl.cdiv(p.group, BLOCK_M)
    pid = tl.program_id(0)
    block, query = pid % blocks, pid // blocks
    t, head = p.T - 1 - query % p.T, query // p.T
    H_kv = p.H // p.group
    return head // H_kv, head % H_kv, t, block * BLOCK_M


@triton.jit
def list_at(lists, b, h_kv, t, p):
    """Where the list of a query and a key head begins, and how many keys to walk."""
    at = (b.to(tl.int64) * lists.heads + tl.where(lists.heads > 1, h_kv, 0)) * p.T + t
    return lists.keys + at * lists.K, tl.load(lists.counts + at)


@triton.jit
def gather_rows(base, keys, stride, live, D, BLOCK: tl.constexpr):
    """[N, BLOCK]: the rows of these keys, zero past D and where they are not live."""
    dims = tl.arange(0, BLOCK)
    pointers = base + (keys.to(tl.int64)[:, None] * stride + dims[None, :])
    return tl.load(pointers, mask=live[:, None] & (dims < D)[None, :], other=0.0)

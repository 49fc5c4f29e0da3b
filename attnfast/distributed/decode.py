"""Decoding over a cache whose keys are cut over the ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import checks
from ..functional import attention, decode_attention
from ..requirements import fail, truth
from .layout import all_gather, group_of

FUNCTION = "context_parallel_decode"


def context_parallel_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    mesh: Any,
    *,
    page_table: Tensor | None = None,
    scale: float | None = None,
    window: tuple[int | None, int | None] | Tensor | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    return_lse: bool = False,
    return_received: bool = False,
    backend: str = "auto",
) -> Any:
    """`attnfast.decode_attention` over a cache of which every rank has an equal part.

    Rank r of P has the keys ``r S / P`` to ``(r + 1) S / P`` of every entry's S. Every rank attends
    its own, and all get the merged results (docs/math.md, section 7): the only thing that travels
    is out in fp32 and lse, once.

    Args:
        q: ``(B, H, T, D)``, the newest T queries, the same on every rank.
        k_cache: ``(B, H_kv, S / P, D)``, this rank's keys; or, with ``page_table``, its pages
            ``(pages, page, H_kv, D)``.
        v_cache: ``(B, H_kv, S / P, D_v)``, or pages.
        cache_seqlens: int32 ``(B,)``, the keys in the whole cache, the new ones included.
        mesh: see `context_parallel_attention`.
        page_table: int32 ``(B, n)``, the pages of this rank's ``n * page = S / P`` keys; with one
            query, without ``window`` and ``alibi_slopes``, which count from the cache's end.
        scale: see `attnfast.attention`, as for all that follow.
        window: see `attnfast.attention`.
        softcap: see `attnfast.attention`.
        alibi_slopes: see `attnfast.attention`.
        sinks: see `attnfast.attention`.
        bias: broadcastable to ``(B, H, T, S / P)``, of this rank's keys.
        return_lse: also return lse, float32 ``(B, H, T)``.
        return_received: refused: a rank's column sums are relative to its own keys.
        backend: see `attnfast.attention`.

    Returns:
        out ``(B, H, T, D_v)``, or (out, lse), the same bits on every rank.

    Raises:
        TypeError: An argument is of the wrong type or dtype.
        ValueError: An argument has the wrong shape, device or value, or requires a gradient.
    """
    return_lse = truth(FUNCTION, "return_lse", return_lse)
    if return_received is not False:
        requirement = "False: a rank's column sums are relative to its own keys"
        fail(FUNCTION, "return_received", requirement, return_received)
    group = group_of(FUNCTION, mesh)
    inputs, _ = checks.decode_call(
        FUNCTION,
        q,
        k_cache,
        v_cache,
        torch.zeros_like(cache_seqlens) if isinstance(cache_seqlens, Tensor) else cache_seqlens,
        page_table,
        window,
        (scale, softcap),
        alibi_slopes,
        sinks,
        bias,
        None,
    )
    by_position = window is not None or alibi_slopes is not None or q.shape[2] > 1
    if page_table is not None and by_position:
        requirement = "None with more than one query, window or alibi_slopes"
        fail(FUNCTION, "page_table", requirement, "one")
    own = inputs.k_cache.shape[2]
    if inputs.page_table is not None:
        own = inputs.page_table.shape[1] * inputs.k_cache.shape[1]
    most, begin = own * dist.get_world_size(group), own * dist.get_rank(group)
    lengths = cache_seqlens.to(torch.int32)
    if lengths.device.type == "cpu" and bool(((lengths < 0) | (lengths > most)).any()):
        fail(FUNCTION, "cache_seqlens", f"in [0, {most}]", cache_seqlens.tolist())
    given: dict[str, Any] = {"scale": scale, "softcap": softcap, "bias": bias, "backend": backend}
    with torch.no_grad():
        if by_position:
            out, lse = attention(
                q,
                k_cache,
                v_cache,
                causal=True,
                align=lengths - (q.shape[2] + begin),
                window=window,
                alibi_slopes=alibi_slopes,
                return_lse=True,
                **given,
            )
        else:
            here = (lengths - begin).clamp(0, own)
            out, lse = decode_attention(
                q, k_cache, v_cache, here, page_table=page_table, return_lse=True, **given
            )
        out, lse = merged(out, lse, sinks, group)
    return (out, lse) if return_lse else out


def merged(
    out: Tensor, lse: Tensor, sinks: Tensor | None, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Results over all ranks' keys, in the ranks' order on each of them."""
    own = torch.cat((out.to(lse.dtype), lse[..., None]), 3)
    every = own.new_empty((dist.get_world_size(group), *own.shape))
    all_gather(every.view(-1, *own.shape[1:]), own.contiguous(), group=group)
    outs, lses = every[..., :-1], every[..., -1]
    if sinks is not None:  # one more part, whose value is zero
        sink = sinks.to(lse.dtype)[None, None, :, None].expand_as(lses[:1])
        outs = torch.cat((outs, torch.zeros_like(outs[:1])))
        lses = torch.cat((lses, sink))
    whole = lses.logsumexp(0)
    share = torch.where(whole == -torch.inf, 0.0, (lses - whole).exp())
    used = torch.where(share[..., None] == 0.0, 0.0, outs)
    return (share[..., None] * used).sum(0).to(out.dtype), whole

"""Who competes in the decode rows: one new token per sequence over a cache, contiguous or paged."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import attnfast

from .. import OURS
from ..clock import Call, Results
from ..grid import DTYPES, PAGE, DecodeCase
from ..race import Entries
from . import lacking, onnx_runtime


def entries(
    case: DecodeCase, backend: str | None, device: torch.device, copies: int, *, full: bool
) -> Entries:
    """Us, and the fastest ways without us; the arguments are those of `attention.entries`.

    Every cache is full. Without us, pages are gathered first, where the package takes no pages.
    """
    made = [_calls(case, backend, device) for _ in range(copies)]
    absent = {}
    reason = onnx_runtime.missing(device)
    if reason or case.paged or case.dtype != "float32":
        absent["ONNX Runtime"] = reason or "is compared in float32, contiguous"
    if (reason := lacking("flash_attn", device, case.dtype)) is not None:
        absent["flash_attn"] = reason
    calls = {name: [one[name] for one in made] for name in made[0] if name not in absent}
    return Entries(calls, absent)


def _calls(case: DecodeCase, backend: str | None, device: torch.device) -> dict[str, Call]:
    B, H, H_kv, S, D = case[:5]
    dtype = DTYPES[case.dtype]
    q = torch.randn(B, H, 1, D, device=device).to(dtype)
    lengths = torch.full((B,), S, dtype=torch.int32, device=device)
    table: Tensor | None = None
    if case.paged:
        pages = -(-S // PAGE)
        table = torch.randperm(B * pages, device=device).view(B, pages).int()
        shape: tuple[int, ...] = (B * pages, PAGE, H_kv, D)
    else:
        shape = (B, H_kv, S, D)
    k, v = (torch.randn(shape, device=device).to(dtype) for _ in range(2))

    def contiguous(x: Tensor) -> Tensor:
        """(B, H_kv, S, D)."""
        if table is None:
            return x
        return x[table.long()].flatten(1, 2)[:, :S].transpose(1, 2)

    def ours() -> Results:
        out = attnfast.decode_attention(
            q, k, v, lengths, page_table=table, backend=backend or "auto"
        )
        return {"out": out}

    def sdpa() -> Results:
        grouped = H_kv != H
        return {
            "out": F.scaled_dot_product_attention(
                q, contiguous(k), contiguous(v), enable_gqa=grouped
            )
        }

    def eager() -> Results:
        keys, values = contiguous(k), contiguous(v)
        grouped = q.view(B, H_kv, H // H_kv, D)
        weights = ((grouped @ keys.transpose(-2, -1)) * D**-0.5).softmax(-1)
        return {"out": (weights @ values).view(B, H, 1, D)}

    def onnx() -> Results:
        return {"out": onnx_runtime.attention(q, k, v)}

    def flash() -> Results:
        from flash_attn import flash_attn_with_kvcache

        caches = (k, v) if table is not None else (k.transpose(1, 2), v.transpose(1, 2))
        out = flash_attn_with_kvcache(
            q.transpose(1, 2), *caches, cache_seqlens=lengths, block_table=table
        )
        return {"out": out.transpose(1, 2)}

    calls: dict[str, Call] = {
        OURS: ours,
        "torch.sdpa": sdpa,
        "ONNX Runtime": onnx,
        "flash_attn": flash,
        "eager": eager,
    }
    if backend is None:
        del calls[OURS]
    return calls

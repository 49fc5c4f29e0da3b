"""flash_attn and xformers as their documentation describes them, in plain PyTorch.

The migration guide puts a call of theirs beside one of ours. Theirs needs a GPU; these stand-ins
let the guide's code run as it is printed, and its claims be checked, on any machine. They are
written from the two packages' docstrings and share nothing with attnfast.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

INF = float("inf")


def dense(q: Tensor, k: Tensor, v: Tensor, scores_plus: Tensor, scale: float | None) -> Any:
    """(B, T, H, D) attention with terms added to the scores: the output and lse ``(B, H, T)``."""
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, 2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) * (scale or q.shape[-1] ** -0.5) + scores_plus
    p = scores.softmax(-1).nan_to_num(0.0)  # "if the row of the mask is all zero, the output is"
    return torch.einsum("bhts,bshd->bthd", p, v), scores.logsumexp(-1)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    assert dropout_p == 0.0
    assert softcap == 0.0
    T, S = q.shape[1], k.shape[1]
    distance = torch.arange(S) - (torch.arange(T)[:, None] + S - T)  # (T, S)
    left, right = window_size
    outside = torch.zeros(T, S, dtype=torch.bool)
    if causal:
        outside |= distance > 0
    if left >= 0:
        outside |= distance < -left
    if right >= 0:
        outside |= distance > right
    plus = torch.zeros(T, S).masked_fill(outside, -INF)
    if alibi_slopes is not None:
        plus = plus - alibi_slopes.reshape(-1, q.shape[2], 1, 1) * distance.abs()
    out, lse = dense(q, k, v, plus, softmax_scale)
    return (out, lse, None) if return_attn_probs else out


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    assert block_table is None
    assert not return_attn_probs
    parts = zip(
        q.split(cu_seqlens_q.diff().tolist()),
        k.split(cu_seqlens_k.diff().tolist()),
        v.split(cu_seqlens_k.diff().tolist()),
        strict=True,
    )
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    return torch.cat([flash_attn_func(*(x[None] for x in rows), *options)[0] for rows in parts])


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    cache_seqlens: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """Writes k and v behind the first ``cache_seqlens`` entries, then attends what is there."""
    assert cache_seqlens is not None
    outs = []
    for b, held in enumerate(cache_seqlens.tolist()):
        if block_table is None:
            keys, values = k_cache[b], v_cache[b]
        else:
            keys, values = (x[block_table[b].long()].flatten(0, 1) for x in (k_cache, v_cache))
        end = held
        if k is not None and v is not None:
            assert block_table is None
            end = held + k.shape[1]
            keys[held:end], values[held:end] = k[b], v[b]
        rows = (q[b : b + 1], keys[None, :end], values[None, :end])
        outs.append(flash_attn_func(*rows, 0.0, softmax_scale, causal, window_size))
    return torch.cat(outs)


class LowerTriangularMask:
    """Causal, aligned at the top left."""

    def materialize(self, shape: tuple[int, int]) -> Tensor:
        return torch.full(shape, -INF).triu(1)


class LowerTriangularFromBottomRightMask:
    """Causal, aligned at the bottom right."""

    def materialize(self, shape: tuple[int, int]) -> Tensor:
        T, S = shape
        return torch.full(shape, -INF).triu(1 + S - T)


class BlockDiagonalMask:
    """Each sequence attends to itself."""

    def __init__(self, q_seqlen: list[int], kv_seqlen: list[int]) -> None:
        self.q_seqlen, self.kv_seqlen = q_seqlen, kv_seqlen

    @classmethod
    def from_seqlens(
        cls, q_seqlen: list[int], kv_seqlen: list[int] | None = None
    ) -> BlockDiagonalMask:
        return cls(q_seqlen, kv_seqlen or q_seqlen)

    def materialize(self, shape: tuple[int, int]) -> Tensor:
        blocks = [torch.ones(n, m) for n, m in zip(self.q_seqlen, self.kv_seqlen, strict=True)]
        inside = torch.block_diag(*blocks).bool()
        assert inside.shape == shape
        return torch.zeros(shape).masked_fill(~inside, -INF)


def memory_efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    assert p == 0.0
    shape = (query.shape[1], key.shape[1])
    if attn_bias is None:
        attn_bias = torch.zeros(shape)
    elif not isinstance(attn_bias, Tensor):
        attn_bias = attn_bias.materialize(shape)
    out, _ = dense(query, key, value, attn_bias, scale)
    return out


@contextmanager
def importable(*modules: ModuleType) -> Iterator[None]:
    """Let these be imported; what is imported meanwhile stays (torch bears no second import)."""
    before = {module.__name__: sys.modules.get(module.__name__) for module in modules}
    sys.modules.update({module.__name__: module for module in modules})
    try:
        yield
    finally:
        for name, module in before.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module


def modules() -> tuple[ModuleType, ...]:
    """For ``import flash_attn`` and ``import xformers.ops``."""
    flash = ModuleType("flash_attn")
    flash.__dict__.update(
        flash_attn_func=flash_attn_func,
        flash_attn_varlen_func=flash_attn_varlen_func,
        flash_attn_with_kvcache=flash_attn_with_kvcache,
    )
    root, ops, fmha, bias = (
        ModuleType(f"xformers{name}") for name in ("", ".ops", ".ops.fmha", ".ops.fmha.attn_bias")
    )
    bias.__dict__.update(
        LowerTriangularMask=LowerTriangularMask,
        LowerTriangularFromBottomRightMask=LowerTriangularFromBottomRightMask,
        BlockDiagonalMask=BlockDiagonalMask,
    )
    ops.__dict__.update(
        memory_efficient_attention=memory_efficient_attention,
        LowerTriangularMask=LowerTriangularMask,
        fmha=fmha,
    )
    fmha.__dict__.update(attn_bias=bias)
    root.__dict__.update(ops=ops)
    return flash, root, ops, fmha, bias

"""What one call consists of: its tensors, its options, its results."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Inputs(NamedTuple):
    """Every tensor of a call, canonical: 4-D, checked, None where absent.

    Varlen calls have B = 1 here: q is ``(1, H, total_q, D)`` and the sequences lie one after
    another, ``cu_seqlens_q[i]`` to ``cu_seqlens_q[i + 1]``.
    """

    q: Tensor  # (B, H, T, D)
    k: Tensor  # (B, H_kv, S, D)
    v: Tensor  # (B, H_kv, S, D_v)
    mask: Tensor | None = None  # (B|1, H|1, T|1, S|1) bool, True = attend
    bias: Tensor | None = None  # (B|1, H|1, T|1, S|1) float
    alibi_slopes: Tensor | None = None  # (1|B, H) fp32
    sinks: Tensor | None = None  # (H,) float
    align: Tensor | None = None  # (B,) int32: t' = t + align[b]
    dropout_seed: Tensor | None = None  # (2,) int64: seed, offset
    cu_seqlens_q: Tensor | None = None  # (sequences + 1,) int32
    cu_seqlens_k: Tensor | None = None  # (sequences + 1,) int32


class Options(NamedTuple):
    """Every option of a call that is not a tensor."""

    scale: float
    causal: bool = False
    window_left: int = -1  # -1: unbounded
    window_right: int = -1  # -1: unbounded
    align_offset: int = 0  # t' = t + align_offset, plus S - T with align_bottom_right
    align_bottom_right: bool = False
    softcap: float = 0.0  # 0: none
    dropout_p: float = 0.0
    weights: int = 0  # 0 none, 1 averaged over heads, 2 per head
    stats: int = 0  # 0 none, 1 per query, 2 also received
    deterministic: bool = False
    max_seqlen_q: int = 0  # varlen only: the longest sequence
    max_seqlen_k: int = 0


class Outputs(NamedTuple):
    """What a backend's forward returns; None (or an empty tensor) where not asked for."""

    out: Tensor  # (B, H, T, D_v), the dtype and stride order of q
    lse: Tensor  # (B, H, T) fp32, natural log
    # (2, B, H, T) fp32, for the backward of the same backend, in its own units: a maximum m of the
    # row's scores and log l, apart, because m + log l would lose log l beside a large m
    norm: Tensor | None = None
    stats: Tensor | None = None  # (4, B, H, T) fp32: max_logit, entropy, reach, focus
    received: Tensor | None = None  # (B, H, S) fp32
    weights: Tensor | None = None  # (B, H, T, S) or (B, T, S), the dtype of q


class Gradients(NamedTuple):
    """What a backend's backward returns; dbias and dsinks None (or empty) where not wanted."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dbias: Tensor | None
    dsinks: Tensor | None

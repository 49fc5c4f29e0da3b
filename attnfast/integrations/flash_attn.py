"""flash-attn's two functions on our kernels, for code that was written for flash-attn.

As in::

    from attnfast.integrations.flash_attn import flash_attn_func, flash_attn_varlen_func

Their arguments are flash-attn's, in its order: heads come after rows, ``causal`` and
``window_size`` end at the bottom right, -1 is an unbounded side of the window, and a ``softcap`` of
0 is none. They run on whatever `attnfast.attention` runs on, in its dtypes. The tree that
``make hub`` builds offers them under these names to transformers.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..functional import attention, varlen_attention
from ..requirements import fail


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
    *,
    s_aux: Tensor | None = None,
) -> Tensor:
    """`attnfast.attention` as flash-attn calls it.

    Args:
        q: ``(B, T, H, D)``.
        k: ``(B, S, H_kv, D)``.
        v: ``(B, S, H_kv, D_v)``.
        dropout_p: probability with which a probability is dropped.
        softmax_scale: factor of the scores; default ``D ** -0.5``.
        causal: query t attends keys up to ``t + S - T``.
        window_size: keys to the left and to the right of that one; -1 is unbounded.
        softcap: c > 0: scores x become ``c * tanh(x / c)``; 0 is none.
        alibi_slopes: float32 ``(H,)`` or ``(B, H)``: adds ``-slope * abs(t + S - T - s)``.
        deterministic: True: bitwise the same every run. Otherwise as torch's own setting has it.
        return_attn_probs: must be False.
        s_aux: ``(H,)``, one more logit per head in the denominator (transformers' name of it).

    Returns:
        out ``(B, T, H, D_v)``.

    Raises:
        TypeError: as `attnfast.attention`.
        ValueError: as `attnfast.attention`; or ``return_attn_probs`` is True.
    """
    options = _options("flash_attn_func", window_size, softcap, deterministic, return_attn_probs)
    out: Tensor = attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        causal=causal,
        scale=softmax_scale,
        alibi_slopes=alibi_slopes,
        sinks=s_aux,
        dropout_p=dropout_p,
        **options,
    )
    return out.transpose(1, 2)


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
    *,
    s_aux: Tensor | None = None,
) -> Tensor:
    """`attnfast.varlen_attention` as flash-attn calls it.

    Args:
        q: ``(total_q, H, D)``.
        k: ``(total_k, H_kv, D)``.
        v: ``(total_k, H_kv, D_v)``.
        cu_seqlens_q: int32 ``(sequences + 1,)``: 0, then the sequences' ends.
        cu_seqlens_k: the same for the keys.
        max_seqlen_q: at least the longest sequence's number of queries.
        max_seqlen_k: at least the longest sequence's number of keys.
        dropout_p: as all that follow, see `flash_attn_func`; T and S are the sequence's own.
        softmax_scale: default ``D ** -0.5``.
        causal: see `flash_attn_func`.
        window_size: see `flash_attn_func`.
        softcap: see `flash_attn_func`.
        alibi_slopes: ``(H,)`` or ``(sequences, H)``.
        deterministic: see `flash_attn_func`.
        return_attn_probs: must be False.
        s_aux: see `flash_attn_func`.

    Returns:
        out ``(total_q, H, D_v)``.

    Raises:
        TypeError: as `attnfast.varlen_attention`.
        ValueError: as `attnfast.varlen_attention`; or ``return_attn_probs`` is True.
    """
    function = "flash_attn_varlen_func"
    options = _options(function, window_size, softcap, deterministic, return_attn_probs)
    out: Tensor = varlen_attention(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        causal=causal,
        scale=softmax_scale,
        alibi_slopes=alibi_slopes,
        sinks=s_aux,
        dropout_p=dropout_p,
        **options,
    )
    return out


def _options(
    function: str, window: tuple[int, int], softcap: float, deterministic: bool, probs: bool
) -> dict[str, Any]:
    """What flash-attn says otherwise than we do."""
    if probs:
        requirement = "False (attnfast.attention has return_lse and return_weights)"
        fail(function, "return_attn_probs", requirement, str(probs))
    if isinstance(window, Tensor):
        requirement = "(left, right): attnfast.attention's window takes a Tensor"
        fail(function, "window_size", requirement, "a Tensor", TypeError)
    left, right = (None if side == -1 else side for side in window)
    return {
        "window": None if left is right is None else (left, right),
        "softcap": softcap or None,
        "deterministic": deterministic or None,
        "align": "bottom_right",
    }

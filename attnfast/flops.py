"""Formulas for ``torch.utils.flop_counter``: the operators' matrix products.

They count as torch counts its own attention: 2 D for each pair of a query and a key, as often as
there are products, whatever causal, window and masks leave out. Lengths of sequences and caches
count where their values are known, else the longest that they may be.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import ops
from .call import Inputs, Options, backward_call, decode_call, forward_call, pooled_call


def register() -> None:
    """Give torch.utils.flop_counter the formula of every operator."""
    from torch.utils.flop_counter import register_flop_formula

    packets = ops.RAW
    for backend in ops.DEFINED:
        for kind, formula in FORMULAS.items():
            register_flop_formula(getattr(packets, f"{backend}_{kind}"), get_raw=True)(formula)
    register_flop_formula(packets.cpu_self_attention, get_raw=True)(self_attention)
    register_flop_formula(packets.cpu_self_attention_bwd, get_raw=True)(self_attention_backward)


def forward(*args: Any, out_val: Any = None) -> int:
    """Two products: q k^T and p v."""
    inputs, options = forward_call(args)
    return 2 * pairs(inputs, options) * (inputs.q.shape[3] + inputs.v.shape[3])


def backward(*args: Any, out_val: Any = None) -> int:
    """Five products: q k^T, ds k and ds^T q of size D; do v^T and p^T do of size D_v."""
    _, inputs, options = backward_call(args)
    return 2 * pairs(inputs, options) * (3 * inputs.q.shape[3] + 2 * inputs.v.shape[3])


def decode(*args: Any, out_val: Any = None) -> int:
    """Two products, with the keys in the cache."""
    (q, k_cache, v_cache, cache_seqlens, page_table, *_), _ = decode_call(args)
    B, H, T, D = q.shape
    S = k_cache.shape[2] if page_table is None else page_table.shape[1] * k_cache.shape[1]
    keys = sum(cache_seqlens.tolist()) if is_known(cache_seqlens) else B * S
    count: int = 2 * H * T * keys * (D + v_cache.shape[3])
    return count


def pooled(*args: Any, out_val: Any = None) -> int:
    """One product: q k^T."""
    inputs, options, _ = pooled_call(args)
    return 2 * pairs(inputs, options) * inputs.q.shape[3]


FORMULAS = {"fwd": forward, "bwd": backward, "decode": decode, "pooled": pooled}


def self_attention(packed: Tensor, heads: int, *args: Any, out_val: Any = None) -> int:
    """Two products of a layer's projection (B, T, 3 E) or (T, B, 3 E)."""
    batch_first = args[0]
    B, T = packed.shape[:2] if batch_first else (packed.shape[1], packed.shape[0])
    count: int = 4 * B * T * T * (packed.shape[2] // 3)
    return count


def self_attention_backward(*args: Any, out_val: Any = None) -> int:
    """Five products of the same size."""
    _, _, _, *forward = args
    return self_attention(*forward) // 2 * 5


def pairs(inputs: Inputs, options: Options) -> int:
    """Pairs of a query and a key, of all heads and sequences."""
    B, H, T, _ = inputs.q.shape
    q_ends, k_ends = inputs.cu_seqlens_q, inputs.cu_seqlens_k
    if inputs.indices is not None:
        return B * H * T * inputs.indices.shape[3]
    if q_ends is None or k_ends is None:
        return B * H * T * inputs.k.shape[2]
    if not (is_known(q_ends) and is_known(k_ends)):
        return H * (q_ends.shape[0] - 1) * options.max_seqlen_q * options.max_seqlen_k
    lengths = zip(q_ends.diff().tolist(), k_ends.diff().tolist(), strict=True)
    count: int = H * sum(T * S for T, S in lengths)
    return count


def is_known(x: Tensor) -> bool:
    """Whether a tensor has values: it is neither fake nor on the meta device."""
    return type(x) is Tensor and x.device.type != "meta"

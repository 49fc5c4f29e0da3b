"""Queries, keys and values of transformers' layers, in the calls that are not plain attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..functional import decode_attention, varlen_attention


def needs_gradients(*tensors: Tensor | None) -> bool:
    """Whether any of them does."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def whole(key: Tensor) -> Tensor:
    """The lengths of a cache that is full, int32 (B,)."""
    return torch.full((key.shape[0],), key.shape[2], dtype=torch.int32, device=key.device)


def gathers(
    query: Tensor, mask: Tensor | None, bias: Tensor | None, dropout: float, with_weights: bool
) -> bool:
    """Whether chosen keys are read alone, and not as a mask of all."""
    known = bias is None and (mask is None or mask.shape[1] == 1)
    return known and query.device.type == "cpu" and not (dropout or with_weights)


def attended(indices: Tensor, mask: Tensor | None) -> Tensor:
    """Chosen keys (B, T, K), and -1 for those that a mask (B|1, 1, T|1, S) does not allow."""
    if mask is None:
        return indices
    B, T, _ = indices.shape
    allowed = mask[:, 0].expand(B, T, -1).gather(-1, indices.long())
    return indices.masked_fill(~allowed, -1)


def decoded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    """(B, H, 1, D) of a step of generation -> (B, 1, H, D_v), by the kernel made for few rows."""
    if mask is not None:
        base = torch.zeros((), dtype=query.dtype, device=query.device) if bias is None else bias
        bias = torch.where(mask, base, -torch.inf)
    kept = {name: options[name] for name in ("window", "scale", "softcap", "sinks")}
    out: Tensor = decode_attention(query, key, value, lengths, bias=bias, **kept)
    return out.transpose(1, 2).contiguous()


def with_sinks(
    result: Any, sinks: Tensor | None, with_weights: bool
) -> tuple[Tensor, Tensor | None]:
    """Out and weights of attention, whose denominators also have a logit of each query."""
    if sinks is None:
        return result if with_weights else (result, None)
    out, lse, *weights = result
    share = torch.sigmoid(lse - sinks[..., 0])[..., None]  # [B, H, T, 1]
    out, *weights = ((x * share).to(x.dtype) for x in (out, *weights))
    return out, weights[0] if with_weights else None


def packed(
    query: Tensor, key: Tensor, value: Tensor, ends: dict[str, Any], options: dict[str, Any]
) -> Tensor:
    """(B, H, T, D) of sequences one after another -> (B, T, H, D_v).

    ``ends`` has ``cu_seq_lens_q``, and may have ``cu_seq_lens_k``, ``max_length_q`` and
    ``max_length_k``, over all rows, one after another.
    """
    B, _, T, _ = query.shape
    ends_q, longest_q = ends["cu_seq_lens_q"], ends.get("max_length_q")
    ends_k, longest_k = ends.get("cu_seq_lens_k"), ends.get("max_length_k")
    if ends_k is None:
        ends_k, longest_k = ends_q, longest_q
    out: Tensor = varlen_attention(
        query.transpose(1, 2).flatten(0, 1),
        key.transpose(1, 2).flatten(0, 1),
        value.transpose(1, 2).flatten(0, 1),
        ends_q,
        ends_k,
        int(ends_q.diff().max() if longest_q is None else longest_q),
        int(ends_k.diff().max() if longest_k is None else longest_k),
        **options | {"align": "bottom_right"},
    )
    return out.view(B, T, *out.shape[1:])

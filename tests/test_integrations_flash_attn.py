"""flash-attn's functions, beside what its documentation says of their arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attnfast
from attnfast.integrations.flash_attn import flash_attn_func, flash_attn_varlen_func

H, H_KV, D = 4, 2, 8
SLOPES, SINKS = torch.rand(H), torch.randn(H, dtype=torch.float64)
OPTIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "causal": {"causal": True},
    "window": {"window_size": (3, 1)},
    "unbounded on the left": {"window_size": (-1, 2)},
    "as transformers has windows": {"causal": True, "window_size": (3, 3)},
    "scale": {"softmax_scale": 0.1},
    "softcap": {"softcap": 2.0, "causal": True},
    "alibi": {"alibi_slopes": SLOPES},
    "sinks": {"s_aux": SINKS},
    "deterministic": {"deterministic": True},
}


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    s_aux: Tensor | None = None,
) -> Tensor:
    """(T, H, D) of one sequence, as flash-attn's docstrings have it."""
    k, v = (x.repeat_interleave(H // H_KV, 1) for x in (k, v))
    scores = torch.einsum("thd,shd->hts", q, k) * (softmax_scale or D**-0.5)
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    T, S = len(q), len(k)
    to_the_right = torch.arange(S) - (torch.arange(T)[:, None] + S - T)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes[:, None, None] * to_the_right.abs()
    left, right = window_size
    hidden = (to_the_right > 0) & causal
    hidden |= (to_the_right < -left) if left >= 0 else torch.tensor(False)
    hidden |= (to_the_right > right) if right >= 0 else torch.tensor(False)
    scores = scores.masked_fill(hidden, -torch.inf)
    if s_aux is not None:
        scores = torch.cat([scores, s_aux[:, None, None].expand(-1, T, 1)], -1)
    return torch.einsum("hts,shd->thd", scores.softmax(-1)[..., :S], v)


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, D, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_both_are_the_formula(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    B, T, S = 2, 9, 13
    q, k, v = rows(B, T, H), rows(B, S, H_KV), rows(B, S, H_KV)
    expected = torch.stack([dense(q[b], k[b], v[b], **options) for b in range(B)])
    ends = [torch.arange(B + 1, dtype=torch.int32) * length for length in (T, S)]
    packed = (x.flatten(0, 1) for x in (q, k, v))
    for out in (
        flash_attn_func(q, k, v, **options),
        flash_attn_varlen_func(*packed, *ends, T, S, **options).view_as(q),
    ):
        torch.testing.assert_close(out, expected)
        cotangent = torch.randn_like(out)
        got = torch.autograd.grad(out, (q, k, v), cotangent)
        wanted = torch.autograd.grad(expected, (q, k, v), cotangent, retain_graph=True)
        torch.testing.assert_close(got, wanted)


def test_sequences_of_other_lengths() -> None:
    torch.manual_seed(0)
    lengths_q, lengths_k = [3, 1, 5], [4, 6, 5]
    q, k, v = rows(sum(lengths_q), H), rows(sum(lengths_k), H_KV), rows(sum(lengths_k), H_KV)
    ends = [torch.tensor([0, *x], dtype=torch.int32).cumsum(0) for x in (lengths_q, lengths_k)]
    out = flash_attn_varlen_func(q, k, v, *ends, 5, 6, causal=True)
    parts = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
    torch.testing.assert_close(out, torch.cat([dense(*part, causal=True) for part in parts]))


def test_dropout_is_ours() -> None:
    q = rows(1, 6, H)
    torch.manual_seed(3)
    out = flash_attn_func(q, q, q, 0.5)
    torch.manual_seed(3)
    x = q.transpose(1, 2)
    torch.testing.assert_close(out, attnfast.attention(x, x, x, dropout_p=0.5).transpose(1, 2))
    assert not torch.equal(out, flash_attn_func(q, q, q))


def test_probabilities_are_refused() -> None:
    q = rows(1, 6, H)
    message = r"^flash_attn_func: return_attn_probs must be False \(.*return_weights\), got True$"
    with pytest.raises(ValueError, match=message):
        flash_attn_func(q, q, q, return_attn_probs=True)

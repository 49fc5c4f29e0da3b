"""`attention()` against `F.scaled_dot_product_attention`, on the same tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import attnfast

from . import OURS
from .environment import Settings
from .shapes import DTYPES, AttentionCase
from .timing import Call, Race


@pytest.mark.benchmark(group="attention", disable_gc=True)
def test_attention(attention_case: AttentionCase, race: Race, settings: Settings) -> None:
    B, H, T, S, D, dtype, causal, work = attention_case
    backward = work == "forward+backward"

    def tensor(length: int) -> Tensor:
        return torch.randn(B, H, length, D).to(DTYPES[dtype]).requires_grad_(backward)

    q, k, v = tensor(T), tensor(S), tensor(S)
    grad = torch.randn(B, H, T, D).to(DTYPES[dtype])

    def ours() -> Tensor:
        out: Tensor = attnfast.attention(q, k, v, causal=causal, backend=settings.backend)
        return out

    def sdpa() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    def call(function: Callable[[], Tensor]) -> Call:
        def forward() -> dict[str, Tensor]:
            return {"out": function()}

        def forward_backward() -> dict[str, Tensor]:
            out = function()
            dq, dk, dv = torch.autograd.grad(out, (q, k, v), grad)
            return {"out": out.detach(), "dq": dq, "dk": dk, "dv": dv}

        return forward_backward if backward else forward

    race(attention_case, {OURS: call(ours), "torch.sdpa": call(sdpa)})

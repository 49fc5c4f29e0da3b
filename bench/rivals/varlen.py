"""Who competes in the varlen rows: sequences of different lengths, packed one after another."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import attnfast

from .. import OURS
from ..clock import Call, Results
from ..grid import DTYPES, VarlenCase
from ..race import Entries
from . import lacking

PACKAGES = ("flash_attn", "xformers")


def entries(
    case: VarlenCase, backend: str | None, device: torch.device, copies: int, *, full: bool
) -> Entries:
    """Us, and the ways without us; the arguments are those of `attention.entries`.

    torch's: one call per sequence, one call on padded tensors, and jagged nested tensors; making
    those of the packed ones is part of the call, since the inputs are the same for everybody.
    """
    made = [_calls(case, backend, device) for _ in range(copies)]
    reasons = {name: lacking(name, device, case.dtype) for name in PACKAGES}
    absent = {name: reason for name, reason in reasons.items() if reason is not None}
    calls = {name: [one[name] for one in made] for name in made[0] if name not in absent}
    return Entries(calls, absent)


def _calls(case: VarlenCase, backend: str | None, device: torch.device) -> dict[str, Call]:
    total, longest = sum(case.lengths), max(case.lengths)
    dtype, causal = DTYPES[case.dtype], case.causal
    needs_grad = case.work == "forward+backward"
    q, k, v = (
        torch.randn(total, case.H, case.D, device=device).to(dtype).requires_grad_(needs_grad)
        for _ in range(3)
    )
    grad = torch.randn_like(q, requires_grad=False)
    lengths = torch.tensor(case.lengths, device=device)
    ends = F.pad(lengths.cumsum(0), (1, 0)).int()
    present = torch.arange(longest, device=device) < lengths[:, None]  # (B, longest)

    def ours() -> Tensor:
        out: Tensor = attnfast.varlen_attention(
            q, k, v, ends, ends, longest, longest, causal=causal, backend=backend or "auto"
        )
        return out

    def each() -> Tensor:
        outs = []
        for a, b, c in zip(*(x.split(case.lengths) for x in (q, k, v)), strict=True):
            heads = (x.transpose(0, 1)[None] for x in (a, b, c))
            outs.append(F.scaled_dot_product_attention(*heads, is_causal=causal)[0].transpose(0, 1))
        return torch.cat(outs)

    def padded() -> Tensor:
        wide = (
            pad_sequence(x.split(case.lengths), batch_first=True).transpose(1, 2) for x in (q, k, v)
        )
        mask = present[:, None, None]
        if causal:
            mask = mask & torch.ones(longest, longest, dtype=torch.bool, device=device).tril()
        out = F.scaled_dot_product_attention(*wide, attn_mask=mask)
        return out.transpose(1, 2)[present]

    def nested() -> Tensor:
        jagged = (
            torch.nested.nested_tensor_from_jagged(x, ends.long()).transpose(1, 2)
            for x in (q, k, v)
        )
        out = F.scaled_dot_product_attention(*jagged, is_causal=causal)
        return out.transpose(1, 2).values()

    def flash() -> Tensor:
        from flash_attn import flash_attn_varlen_func

        out: Tensor = flash_attn_varlen_func(q, k, v, ends, ends, longest, longest, causal=causal)
        return out

    def xformers() -> Tensor:
        from xformers import ops

        bias = ops.fmha.BlockDiagonalMask.from_seqlens(list(case.lengths))
        if causal:
            bias = bias.make_causal()
        out: Tensor = ops.memory_efficient_attention(q[None], k[None], v[None], attn_bias=bias)[0]
        return out

    functions = {
        OURS: ours,
        "torch.sdpa per sequence": each,
        "torch.sdpa padded": padded,
        "torch.sdpa nested": nested,
        "flash_attn": flash,
        "xformers": xformers,
    }
    if backend is None:
        del functions[OURS]

    def call(function: Callable[[], Tensor]) -> Call:
        def forward() -> Results:
            return {"out": function()}

        def both() -> Results:
            out = function()
            dq, dk, dv = torch.autograd.grad(out, (q, k, v), grad)
            return {"out": out.detach(), "dq": dq, "dk": dk, "dv": dv}

        return both if needs_grad else forward

    return {name: call(function) for name, function in functions.items()}

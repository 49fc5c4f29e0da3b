"""FlexAttention, compiled: the rival that takes any score modification."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..clock import Results
from ..grid import CORE, WINDOW, AttentionCase
from ..problem import Workload

NAME = "FlexAttention"
SMALL = 48  # keys, of smoke rows
QUICK = ("window", "softcap")  # options


def chosen(case: AttentionCase) -> bool:
    """Whether quick suites wait for it to be compiled for a row: few options and causal shapes."""
    if case.dtype != "float32":
        return False
    if case.S <= SMALL:
        return case.causal
    return (case.causal and case[:5] in CORE[2:4]) or case.option in QUICK


def absent(p: Workload) -> str | None:
    """What it does not compute."""
    option = p.case.option
    if p.q.device.type == "cpu" and p.leaves:
        return "has no backward pass on a CPU"
    if option in ("weights", "mean weights", "statistics", "dropout", "sinks"):
        return f"has no {option}"
    if p.case.D & (p.case.D - 1) and p.q.device.type == "cpu":
        return "D is no power of 2"
    return None


def forward(p: Workload) -> Results:
    """The row's result."""
    if NAME not in p.kept:
        p.kept[NAME] = _compile(p)
    return {"out": p.kept[NAME](p.q, p.k, p.v, enable_gqa=p.case.H_kv != p.case.H)}


_case: AttentionCase | None = None  # of the last row that was compiled


def _compile(p: Workload) -> Callable[..., Tensor]:
    """FlexAttention for one problem, with its mask and its change of scores."""
    from torch.nn.attention.flex_attention import flex_attention

    global _case
    if p.case != _case:
        torch._dynamo.reset()  # beyond eight variants it would run uncompiled
        _case = p.case
    function = torch.compile(flex_attention, dynamic=False)
    options: dict[str, Any] = {}
    if p.case.causal or p.mask is not None:
        options["block_mask"] = _block_mask(p)
    if p.softcap or p.bias is not None or p.slopes is not None:
        options["score_mod"] = _score_mod(p)

    def call(q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Tensor:
        out: Tensor = function(q, k, v, **options, **more)
        return out

    return call


def _block_mask(p: Workload) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    case, padding = p.case, p.mask
    left = WINDOW if case.option == "window" else case.S

    def allowed(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        if padding is not None:
            return padding[b, 0, 0, s]
        return (s <= t) & (s >= t - left)

    batch = None if padding is None else case.B
    return create_block_mask(allowed, batch, None, case.T, case.S, device=p.q.device.type)


def _score_mod(p: Workload) -> Callable[..., Tensor]:
    softcap, bias, slopes = p.softcap, p.bias, p.slopes

    def score(x: Tensor, b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        if softcap is not None:
            x = softcap * torch.tanh(x / softcap)
        if bias is not None:
            x = x + bias[0, h, t, s]
        if slopes is not None:
            x = x - slopes[h] * (t - s).abs()
        return x

    return score

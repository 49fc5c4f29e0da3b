"""Who competes in the sparse rows: us by blocks or chosen keys, torch by dense masks or blocks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import attnfast
from attnfast import BlockMask

from .. import OURS
from ..clock import Call, Results
from ..grid import DTYPES, SparseCase
from ..race import Entries

FLEX = "FlexAttention"
MOST_SCORES = 1 << 31  # elements of dense masks and scores beyond which nobody waits for them
CHOSEN = "chosen"


def entries(
    case: SparseCase, backend: str | None, device: torch.device, copies: int, *, full: bool
) -> Entries:
    """Us, and torch's ways; the arguments are those of `attention.entries`."""
    absent = {}
    trains = case.work == "forward+backward"
    if trains and device.type == "cpu":
        absent[FLEX] = "has no backward pass on a CPU"
    elif case.pattern == CHOSEN:
        absent[FLEX] = "visits every block"
    elif not (full or case.dtype == "float32"):
        absent[FLEX] = "is not waited for to be compiled"
    if case.H * case.T * case.S > MOST_SCORES:
        absent["torch.sdpa dense mask"] = "takes minutes"
    keys = _keys(case, device, FLEX not in absent)
    made = [_calls(case, backend, device, keys, absent) for _ in range(copies)]
    calls = {name: [one[name] for one in made] for name in made[0]}
    return Entries(calls, absent, compiled=(FLEX,))


def allowed(case: SparseCase, device: torch.device) -> Callable[..., Tensor]:
    """The row's mask as a function of positions."""
    size, shift = case.size, case.S - case.T
    if case.pattern == "window":
        return lambda b, h, q, k: (k <= q + shift) & (q + shift - k <= size)
    if case.pattern == "documents":
        ids = documents(case, device)
        return lambda b, h, q, k: ids[q] == ids[k]
    if case.pattern == "tree":
        over = BlockMask.from_tree(parents(case, device)).to_dense()[0, 0]
        return lambda b, h, q, k: (k < shift) | over[q, (k - shift).clamp(min=0)]
    share = size / 100  # of the blocks, at random
    blocks = torch.rand(-(-case.T // 128), -(-case.S // 128), device=device) < share
    return lambda b, h, q, k: blocks[q // 128, k // 128]


def documents(case: SparseCase, device: torch.device) -> Tensor:
    """Each token's document, of lengths between half the mean and one and a half."""
    lengths = torch.randint(case.size // 2, case.size * 3 // 2, (case.T,), device=device)
    return torch.repeat_interleave(torch.arange(case.T, device=device), lengths)[: case.T]


def parents(case: SparseCase, device: torch.device) -> Tensor:
    """A tree of T nodes, each with up to three children."""
    return (torch.arange(case.T, device=device) - 1).div(3, rounding_mode="floor")


class Keys(NamedTuple):
    """Which keys are attended, as each side takes it."""

    ours: dict[str, Any]
    dense: Tensor
    flex: Callable[..., Tensor] | None  # of q, k, v


def _keys(case: SparseCase, device: torch.device, with_flex: bool) -> Keys:
    if case.pattern == CHOSEN:
        scores = torch.rand(1, case.T, case.S, device=device)
        indices = scores.topk(case.size).indices.int()
        dense = torch.zeros(case.T, case.S, dtype=torch.bool, device=device)
        return Keys({"indices": indices}, dense.scatter_(1, indices[0].long(), True), None)
    mask_mod = allowed(case, device)
    mask = BlockMask.from_mask_mod(mask_mod, 1, 1, case.T, case.S, device)
    flex = _flex(mask_mod, case, device) if with_flex else None
    return Keys({"mask": mask}, mask.to_dense()[0, 0], flex)


def _calls(
    case: SparseCase,
    backend: str | None,
    device: torch.device,
    keys: Keys,
    absent: dict[str, str],
) -> dict[str, Call]:
    dtype, trains = DTYPES[case.dtype], case.work == "forward+backward"
    q, k, v = (
        torch.randn(1, heads, rows, case.D, device=device).to(dtype).requires_grad_(trains)
        for heads, rows in ((case.H, case.T), (case.H_kv, case.S), (case.H_kv, case.S))
    )
    grad = torch.randn_like(q, requires_grad=False)
    grouped = case.H_kv != case.H

    def ours() -> Tensor:
        out: Tensor = attnfast.attention(q, k, v, backend=backend or "auto", **keys.ours)
        return out

    def sdpa() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keys.dense, enable_gqa=grouped)

    def each() -> Tensor:
        lengths = torch.unique_consecutive(documents_of, return_counts=True)[1].tolist()
        parts = zip(*(x.split(lengths, 2) for x in (q, k, v)), strict=True)
        return torch.cat([F.scaled_dot_product_attention(*part) for part in parts], 2)

    functions = {OURS: ours, "torch.sdpa dense mask": sdpa}
    if case.pattern == "documents":
        documents_of = keys.dense.int().argmax(1)  # each document's first token
        functions["torch.sdpa per document"] = each
    if backend is None:
        del functions[OURS]
    if (flex := keys.flex) is not None:
        functions[FLEX] = lambda: flex(q, k, v, enable_gqa=grouped)

    def call(function: Callable[[], Tensor]) -> Call:
        def forward() -> Results:
            return {"out": function()}

        def both() -> Results:
            out = function()
            dq, dk, dv = torch.autograd.grad(out, (q, k, v), grad)
            return {"out": out.detach(), "dq": dq, "dk": dk, "dv": dv}

        return both if trains else forward

    return {name: call(function) for name, function in functions.items() if name not in absent}


def _flex(
    mask_mod: Callable[..., Tensor], case: SparseCase, device: torch.device
) -> Callable[..., Tensor]:
    """FlexAttention, compiled for the row."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()  # beyond eight variants it would run uncompiled
    mask = create_block_mask(mask_mod, None, None, case.T, case.S, device=device.type)
    function = torch.compile(flex_attention, dynamic=False)
    return functools.partial(function, block_mask=mask)

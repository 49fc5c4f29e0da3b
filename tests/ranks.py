"""Problems of the case table over ranks: cut, run by context parallel attention, joined again."""

from __future__ import annotations

from typing import Any

import torch
from accuracy import STATISTICS, Results
from cases import arguments_of
from dense import Trial
from torch import Tensor

from attnfast.distributed import context_parallel_attention, shard, unshard


def refusal(problem: Trial, method: str) -> str | None:
    """What of a problem no rank, or not this method, takes; None: nothing."""
    inputs, options = problem.inputs, problem.options
    if inputs.cu_seqlens_q is not None:
        return "sequences of different lengths"
    if inputs.block_starts is not None:
        return "a BlockMask"
    if abs(options.align_offset) > 2**28:
        return "align"
    if options.weights:
        return "weights"
    if options.stats == 2 and method in ("ring", "2d"):
        return "received"
    if inputs.indices is not None and method != "all_gather":
        return "indices"
    return None


def run(problem: Trial, group: Any, layout: str, method: str, **overrides: Any) -> Results:
    """All results of a problem, by name as `accuracy.differentiate` has them, on every rank."""
    inputs, options = problem.inputs, problem.options
    T, S = inputs.q.shape[2], inputs.k.shape[2]

    def cut(x: Tensor) -> Tensor:
        return shard(x, group, 2, layout)

    leaves = {name: cut(getattr(inputs, name)) for name in ("q", "k", "v")}
    mask, bias, indices = (getattr(inputs, n) for n in ("mask", "bias", "indices"))
    if bias is not None:
        leaves["bias"] = own_rows(bias, T, group, layout)
    if inputs.sinks is not None:
        leaves["sinks"] = inputs.sinks
    given = any(x is not None for x in problem.cotangents)
    leaves = {n: x.detach().clone().requires_grad_(given) for n, x in leaves.items()}
    arguments = arguments_of(inputs, options)
    arguments |= {
        "mask": None if mask is None else own_rows(mask, T, group, layout),
        "bias": leaves.get("bias"),
        "sinks": leaves.get("sinks"),
    }
    if indices is not None:
        given_lists = arguments["indices"]
        arguments["indices"] = shard(given_lists, group, given_lists.dim() - 2, layout)
    out, lse, *rest = context_parallel_attention(
        *(leaves[n] for n in "qkv"),
        group,
        layout=layout,
        method=method,
        lengths=(T, S),
        **arguments | overrides,
    )
    named: Results = {"out": out, "lse": lse}
    received = None
    if options.stats:
        named |= {n: getattr(rest[0], n) for n in STATISTICS}
        received = rest[0].received if options.stats == 2 else None
    results = {n: unshard(x.detach(), group, 2, layout, T) for n, x in named.items()}
    if received is not None:
        results["received"] = unshard(received, group, 2, layout, S)
    if given:
        cotangents = {n: g for n, g in problem.cotangents._asdict().items() if g is not None}
        gradients = torch.autograd.grad(
            [named[n] for n in cotangents],
            list(leaves.values()),
            [cut(g.to(named[n].dtype)) for n, g in cotangents.items()],
        )
        for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
            assert gradient.shape == leaf.shape
            whole = getattr(inputs, name)
            rows = {"k": S, "v": S}.get(name, T)
            if name != "sinks" and (name != "bias" or whole.shape[2] == T):
                gradient = unshard(gradient, group, 2, layout, rows)
            results["d" + name] = gradient
    return results


def own_rows(x: Tensor, T: int, group: Any, layout: str) -> Tensor:
    """Of a mask or bias the rank's rows, if it has a row for every query."""
    return x if x.shape[2] == 1 < T else shard(x, group, 2, layout)

"""Functions in many processes, and problems of the case table cut over them and joined again."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accuracy import STATISTICS, Results
from cases import arguments_of
from dense import Trial
from torch import Tensor

from attnfast.distributed import (
    context_parallel_attention,
    context_parallel_varlen_attention,
    shard,
    unshard,
)
from attnfast.distributed.cost import whole_sequences


def run_on(world: int, folder: Path, function: Callable[..., None], *arguments: Any) -> None:
    """A function in so many processes; raises what one of them raises."""
    given = (world, str(folder / "rendezvous"), function, arguments)
    torch.multiprocessing.spawn(_process, given, nprocs=world)


def _process(
    rank: int, world: int, rendezvous: str, function: Callable[..., None], arguments: Any
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=world)
    function(dist.group.WORLD, *arguments)
    # not by the interpreter's end, where a thread of gloo that still frees a tensor would abort
    os._exit(0)


def refusal(problem: Trial, method: str) -> str | None:
    """What of a problem no rank, or not this method, takes; None: nothing."""
    inputs, options = problem.inputs, problem.options
    if method != "all_to_all" and whole_sequences(inputs, options) is not None:
        return "whole sequences"
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
    varlen = inputs.cu_seqlens_q is not None

    def cut(x: Tensor) -> Tensor:
        return shard(x, group, 2, layout)

    def own_rows(x: Tensor) -> Tensor:
        """Of a mask or bias the rank's rows, if it has a row for every query."""
        shared = varlen or x.shape[2] == 1 < T  # of a varlen call by positions in its sequences
        return x if shared else cut(x)

    leaves = {name: cut(getattr(inputs, name)) for name in ("q", "k", "v")}
    mask, bias, indices = (getattr(inputs, n) for n in ("mask", "bias", "indices"))
    if bias is not None:
        leaves["bias"] = own_rows(bias)
    if inputs.sinks is not None:
        leaves["sinks"] = inputs.sinks
    given = any(x is not None for x in problem.cotangents)
    leaves = {n: x.detach().clone().requires_grad_(given) for n, x in leaves.items()}
    arguments = arguments_of(inputs, options)
    arguments |= {
        "mask": arguments["mask"] if mask is None else own_rows(mask),
        "bias": leaves.get("bias"),
        "sinks": leaves.get("sinks"),
    }
    if indices is not None:
        given_lists = arguments["indices"]
        arguments["indices"] = shard(given_lists, group, given_lists.dim() - 2, layout)
    function: Any = context_parallel_attention
    given_q, given_k, given_v = (leaves[n] for n in "qkv")
    if varlen:
        function = context_parallel_varlen_attention
        given_q, given_k, given_v = (x[0].transpose(0, 1) for x in (given_q, given_k, given_v))
        arguments |= {name: getattr(inputs, name) for name in ("cu_seqlens_q", "cu_seqlens_k")}
        arguments |= {name: getattr(options, name) for name in ("max_seqlen_q", "max_seqlen_k")}
    out, lse, *rest = function(
        given_q,
        given_k,
        given_v,
        mesh=group,
        layout=layout,
        method=method,
        lengths=(T, S),
        **arguments | overrides,
    )
    named: Results = {"out": out.transpose(0, 1) if varlen else out, "lse": lse}
    received = None
    if options.stats:
        named |= {n: getattr(rest[0], n) for n in STATISTICS}
        received = rest[0].received if options.stats == 2 else None
    if varlen:
        named = {n: x[None] for n, x in named.items()}
        received = None if received is None else received[None]
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
            if name != "sinks" and (name != "bias" or own_rows(whole) is not whole):
                gradient = unshard(gradient, group, 2, layout, rows)
            results["d" + name] = gradient
    return results

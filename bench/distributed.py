"""Attention over many processes: measured here, and what a model of its cost says of more.

The model: a step of the ring computes its scores at the machine's rate and merges what it found at
that of its memory; what the next step needs travels meanwhile, and if that takes longer it is
waited for. Heads that are exchanged for rows travel alone.
"""

from __future__ import annotations

import inspect
import itertools
import math
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from attnfast.distributed import context, context_parallel_attention
from attnfast.distributed.cost import sent

from . import ROOT
from .clock import HostClock
from .environment import Settings
from .pages import fill, provenance
from .results import Row, Run

B, H, H_KV, T, D = 1, 4, 4, 16384, 64
WORLDS, ROUNDS = (1, 2, 4), 5
CORES = 2  # of the machines that measure: more ranks share them
WAYS = tuple(itertools.product(("ring", "all_to_all", "all_gather"), ("zigzag", "contiguous")))
WORKS = ("forward", "forward+backward")
PASSES = {"forward": 1.0, "forward+backward": 3.5}  # products, as shares of the forward's


class Machine(NamedTuple):
    """What the model knows of a machine."""

    name: str
    rate: float  # of scores' products, FLOP/s
    back_rate: float  # the same of the backward pass
    near: float  # bytes/s of a rank to others of its node
    far: float  # to other nodes
    latency: float  # s, of a step
    memory: float  # bytes/s, of merging
    node: int  # ranks of a node


# Rates as FlashAttention-3 reaches them (arXiv:2407.08608), links and memory at 80%.
H200 = Machine("H200", 650e12, 500e12, 0.8 * 450e9, 0.8 * 50e9, 15e-6, 0.8 * 4.8e12, 8)
# Rates as the anchor's single GPU has them: 591.5 forwards, or 154.7 with backward, a second.
H800 = Machine("H800", 325e12, 288e12, 0.8 * 200e9, 0.8 * 50e9, 15e-6, 0.8 * 3.35e12, 8)


class Problem(NamedTuple):
    """A causal call over ranks."""

    T: int
    H: int
    H_kv: int
    D: int
    size: int  # bytes of a number

    def flop(self) -> float:
        """Of the forward."""
        return 4.0 * self.H * self.D * self.T**2 / 2

    def block(self, ranks: int) -> float:
        """Bytes of a rank's keys and values."""
        return 2.0 * self.T / ranks * self.H_kv * self.D * self.size


ANCHOR = Problem(8 * 8192, 32, 8, 128, 2)  # ring-flash-attention's README, Llama 3.1 8B
MILLION = Problem(1 << 20, 32, 8, 128, 2)


def predict(
    problem: Problem, ranks: int, method: str, layout: str, machine: Machine
) -> Iterator[float]:
    """Seconds of the forward, then of the backward."""
    inner = {"ring": 1, "all_to_all": ranks, "2d": min(machine.node, ranks)}[method]
    outer = ranks // inner
    link = machine.near if ranks <= machine.node else machine.far
    rows = problem.T / ranks * problem.D
    sums = (problem.H, problem.H + 2 * problem.H_kv)  # heads of out, and of dq, dk and dv
    passes = zip((machine.rate, machine.back_rate), (1.0, 2.5), (0.0, 4.0), sums, strict=True)
    for rate, times, more, heads in passes:
        merge = 3 * 4 * rows * heads / machine.memory if outer > 1 else 0.0  # read two, write one
        whole = problem.flop() * times / rate / ranks
        # Of causal scores a contiguous layout's last rank has twice its share, half at its own step
        steps = [whole / outer] * outer
        if layout == "contiguous" and outer > 1:
            steps = [whole / outer] + [2 * whole / outer] * (outer - 1)
        travels = problem.block(ranks) * (1 + more / problem.size) / link + machine.latency
        ring = sum(max(step + merge, travels) for step in steps[:-1]) + steps[-1] + merge
        exchanged = 0.0
        if inner > 1:
            of_heads = 2 * rows * problem.size * (problem.H + max(problem.H_kv, inner))
            of_heads *= (inner - 1) / inner
            away = 0.0 if inner <= machine.node else (inner - machine.node) / inner
            exchanged = of_heads * ((1 - away) / machine.near + away / machine.far)
            exchanged += 4 * machine.latency
        yield ring + exchanged


def predictions() -> Iterator[Row]:
    """Of a million tokens, and of what others have published."""
    grid = itertools.product((8, 64, 512), ("ring", "all_to_all", "2d"), ("zigzag", "contiguous"))
    for ranks, method, layout in grid:
        if (method == "all_to_all" and MILLION.H % ranks) or (method == "2d" and ranks <= 8):
            continue
        yield _predicted(MILLION, ranks, method, layout, H200)
    yield _predicted(ANCHOR, 8, "ring", "zigzag", H800)


def _predicted(problem: Problem, ranks: int, method: str, layout: str, machine: Machine) -> Row:
    forward, backward = predict(problem, ranks, method, layout, machine)
    ideal = problem.flop() / ranks / machine.rate
    both = ideal + 2.5 * problem.flop() / ranks / machine.back_rate
    return {
        "machine": machine.name, "ranks": ranks, "method": method, "layout": layout,
        "forward_s": forward, "both_s": forward + backward,
        "share": ideal / forward, "both_share": both / (forward + backward),
    }  # fmt: skip


def measure(settings: Settings) -> list[Row]:
    """Seconds, memory and bytes of a causal call for every number of ranks and way."""
    rows: list[Row] = []
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is freed is given back: no peak has it
    for world in WORLDS:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(_process, (world, folder), nprocs=world)
            found = [torch.load(f"{folder}/{rank}") for rank in range(world)]
        for i, row in enumerate(found[0]):
            ranks = [each[i] for each in found]
            most = {name: max(x[name] for x in ranks) for name in ("seconds", "peak_bytes")}
            counts = {name: max(x[name] for x in ranks) for name in ("sent_bytes", "said_bytes")}
            rows.append({**row, **most, **counts, "clock": "wall"})
    return rows


def _process(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=world)
    group, moved = dist.group.WORLD, _Moved()
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(B, heads, T // world, D, requires_grad=True) for heads in (H, H_KV, H_KV)
    )
    grad = torch.randn(B, H, T // world, D)
    rows = []
    for (method, layout), work in itertools.product(WAYS, WORKS):
        given = {"layout": layout, "method": method, "causal": True}
        bound = inspect.signature(context_parallel_attention).bind(q, k, v, group, **given)
        bound.apply_defaults()
        said = sent(context.plan(context.ATTENTION, dict(bound.arguments)).call, method)

        def call(work: str = work, given: Any = given) -> None:
            with torch.set_grad_enabled(work != "forward"):
                out = context_parallel_attention(q, k, v, group, **given)
            if work != "forward":
                torch.autograd.grad(out, (q, k, v), grad)

        dist.barrier()
        _, peak = HostClock(1).peak(call)
        moved.bytes, seconds = 0, []
        for _ in range(ROUNDS):
            dist.barrier()
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        rows.append({
            "ranks": world, "method": method, "layout": layout, "work": work,
            "seconds": statistics.median(seconds), "peak_bytes": peak,
            "sent_bytes": moved.bytes // ROUNDS,
            "said_bytes": said[0] if work == "forward" else sum(said),
        })  # fmt: skip
    torch.save(rows, f"{folder}/{rank}")
    dist.barrier()
    dist.destroy_process_group()


class _Moved:
    """Counts the bytes that torch.distributed is given to send to other ranks."""

    def __init__(self) -> None:
        self.bytes = 0
        sends, exchanges = dist.batch_isend_irecv, dist.all_to_all_single
        from attnfast.distributed import collectives, layout

        def batch(operations: list[Any]) -> Any:
            given = [x.tensor for x in operations if x.op is dist.isend]
            self.bytes += sum(x.numel() * x.element_size() for x in given)
            return sends(operations)

        def exchange(out: Any, x: Any, of: list[int], to: list[int], **more: Any) -> Any:
            others = sum(to) - to[dist.get_rank()]
            self.bytes += others * x[:1].numel() * x.element_size()
            return exchanges(out, x, of, to, **more)

        def gather(out: Any, x: Any, **more: Any) -> Any:
            self.bytes += (dist.get_world_size() - 1) * x.numel() * x.element_size()
            return gathers(out, x, **more)

        def scatter(out: Any, x: Any, **more: Any) -> Any:
            self.bytes += (dist.get_world_size() - 1) * out.numel() * out.element_size()
            return scatters(out, x, **more)

        gathers, scatters = layout.all_gather, collectives.reduce_scatter
        dist.batch_isend_irecv, dist.all_to_all_single = batch, exchange
        layout.all_gather, collectives.reduce_scatter = gather, scatter


def write(run: Run, root: Path = ROOT) -> list[Path]:
    """Fill docs/distributed.md."""
    whole = {x["work"]: x["seconds"] for x in run.rows if x["ranks"] == 1 and x["method"] == "ring"
             and x["layout"] == "zigzag"}  # fmt: skip
    lines = [provenance(run), "", f"B {B}, H {H}, T {T}, D {D}, fp32, causal; a thread a rank:", ""]
    lines += _table(
        (*("method", "layout", "pass", "ranks", "ms", "speed", "model"),
         *("MB a rank", "MB sent", "said")),
        (
            (
                x["method"], x["layout"], x["work"], x["ranks"], f"{1e3 * x['seconds']:.0f}",
                f"{whole[x['work']] / x['seconds']:.2f}x", _speed(x),
                f"{x['peak_bytes'] / 1e6:.1f}",
                f"{x['sent_bytes'] / 1e6:.2f}",
                "exact" if x["sent_bytes"] == x["said_bytes"] else f"{x['said_bytes'] / 1e6:.2f}",
            )
            for x in sorted(run.rows, key=_order)
        ),
    )  # fmt: skip
    *million, anchor = predictions()
    lines += ["", "What the model says of a million tokens, H 32, H_kv 8, D 128, bf16, causal:", ""]
    lines += _table(
        ("ranks", "method", "layout", "forward, ms", "both, ms", "of ideal", "of ideal, both"),
        (
            (
                x["ranks"], x["method"], x["layout"], f"{1e3 * x['forward_s']:.1f}",
                f"{1e3 * x['both_s']:.1f}", f"{x['share']:.0%}", f"{x['both_share']:.0%}",
            )
            for x in million
        ),
    )  # fmt: skip
    lines += [
        "",
        "And of ring-flash-attention's zigzag over 8 H800 with 8192 tokens each (H 32, H_kv 8,"
        " D 128), of which its authors measured 85% of ideal forward and 90% with backward:"
        f" {anchor['share']:.0%} and {anchor['both_share']:.0%}.",
    ]
    return [fill(root / "docs" / "distributed.md", "\n".join(lines))]


def _speed(x: Row) -> str:
    """The model's, of what is computed alone, for as many ranks as there are cores."""
    if x["ranks"] > CORES:
        return "-"
    alone = H200._replace(near=math.inf, far=math.inf, latency=0.0, memory=math.inf)
    method = "all_to_all" if x["method"] == "all_to_all" else "ring"
    last = 1 if x["work"] == "forward" else 2

    def seconds(ranks: int) -> float:
        problem = Problem(T, H, H_KV, D, 4)
        return sum(list(predict(problem, ranks, method, x["layout"], alone))[:last])

    return f"{seconds(1) / seconds(x['ranks']):.2f}x"


def _order(x: Row) -> tuple[Any, ...]:
    return x["method"] != "ring", x["method"], x["layout"] != "zigzag", x["work"], x["ranks"]


def _table(head: tuple[str, ...], rows: Any) -> list[str]:
    marks = ["---" if name in ("method", "layout", "pass") else "--:" for name in head]
    return [f"| {' | '.join(map(str, row))} |" for row in (head, marks, *rows)]

"""Who competes in the attention rows: us, PyTorch's ways, and packages where they are installed.

A contestant is a name, ``absent(problem)``, the reason why it cannot be had on this machine or does
not compute this row, or None, and ``forward(problem)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import attnfast

from .. import OURS
from ..clock import Call, Results
from ..grid import DROPOUT_P, WINDOW, AttentionCase
from ..problem import Workload, eager, pass_of, problem
from ..race import Entries
from . import flex, lacking, onnx_runtime

EAGER_LIMIT = 1 << 31  # bytes of scores beyond which nobody would compute them whole
QUICK_LIMIT = 1 << 26  # and beyond which the quick suites do not wait for it
PLAIN = "without statistics"
GPU_ONLY = (SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)


class Contestant(NamedTuple):
    """One way to compute a row."""

    name: str
    absent: Callable[[Workload], str | None]
    forward: Callable[[Workload], Results]


def ours(backend: str) -> Contestant:
    """Attnfast by one of its backends."""

    def forward(p: Workload) -> Results:
        option = p.case.option
        wanted: dict[str, Any] = {
            "weights": {"return_weights": True},
            "mean weights": {"return_weights": "mean"},
            "statistics": {"return_stats": True},
        }.get(option, {})
        result = attnfast.attention(
            p.q,
            p.k,
            p.v,
            mask=p.mask,
            bias=p.bias,
            causal=p.case.causal,
            window=(WINDOW, None) if option == "window" else None,
            softcap=p.softcap,
            alibi_slopes=p.slopes,
            sinks=p.sinks,
            dropout_p=p.dropout_p,
            backend=backend,
            **wanted,
        )
        if not wanted:
            return {"out": result}
        out, extra = result
        if option == "statistics":
            return {"out": out, "entropy": extra.entropy}
        return {"out": out, "weights": extra}

    return Contestant(OURS, lambda p: None, forward)


def sdpa(p: Workload) -> Results:
    """`F.scaled_dot_product_attention`, causal and window as the cheapest form it takes."""
    case = p.case
    mask: Tensor | None = p.dense_bias()
    causal = case.causal and case.option != "window" and p.mask is None and mask is None
    if mask is None and not causal:
        mask = p.dense_mask()
    out = F.scaled_dot_product_attention(
        p.q,
        p.k,
        p.v,
        attn_mask=mask,
        dropout_p=p.dropout_p,
        is_causal=causal,
        enable_gqa=case.H_kv != case.H,
    )
    return {"out": out}


def sdpa_unable(p: Workload) -> str | None:
    """What `F.scaled_dot_product_attention` has no argument for."""
    lacking = ("softcap", "sinks", "weights", "mean weights", "statistics")
    return f"has no {p.case.option}" if p.case.option in lacking else None


def forced(backend: SDPBackend) -> Contestant:
    """`F.scaled_dot_product_attention` by one of its kernels."""

    def forward(p: Workload) -> Results:
        with sdpa_kernel(backend):
            return sdpa(p)

    def absent(p: Workload) -> str | None:
        if backend in GPU_ONLY and p.q.device.type == "cpu":
            return "needs a GPU"
        if backend == SDPBackend.MATH and scores_bytes(p) > EAGER_LIMIT:
            return "would hold all scores"
        if p.case.option == "dropout" and not _drops(p):
            return "has no dropout"
        return sdpa_unable(p)

    def _drops(p: Workload) -> bool:
        small = problem(p.case._replace(B=1, H=1, work="forward"), p.q.device)
        small.dropout_p = DROPOUT_P
        try:
            forward(small)
        except RuntimeError:
            return False
        return True

    return Contestant(_name(backend), absent, forward)


def _name(backend: SDPBackend) -> str:
    return f"torch.sdpa {backend.name.lower().removesuffix('_attention')}"


MATH = _name(SDPBackend.MATH)


def scores_bytes(p: Workload) -> int:
    """The size of one (B, H, T, S) tensor."""
    case = p.case
    return case.B * case.H * case.T * case.S * p.q.element_size()


def eager_absent(p: Workload) -> str | None:
    """Nobody would."""
    return "would hold all scores" if scores_bytes(p) > EAGER_LIMIT else None


def package(name: str) -> Contestant:
    """A package's function on (B, T, H, D) tensors, where it is installed and has a GPU."""

    def absent(p: Workload) -> str | None:
        if p.case.option not in ("", "gqa"):
            return f"{p.case.option} is not compared"
        return lacking(name, p.q.device, p.case.dtype)

    def forward(p: Workload) -> Results:
        q, k, v = (x.transpose(1, 2) for x in (p.q, p.k, p.v))
        return {"out": PACKAGES[name](q, k, v, p.case.causal).transpose(1, 2)}

    return Contestant(name, absent, forward)


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    from flash_attn import flash_attn_func

    out: Tensor = flash_attn_func(q, k, v, causal=causal)
    return out


def _xformers(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    from xformers import ops

    bias = ops.LowerTriangularMask() if causal else None
    if k.shape[2] != q.shape[2]:
        groups = q.shape[2] // k.shape[2]
        k, v = (x.repeat_interleave(groups, 2) for x in (k, v))
    out: Tensor = ops.memory_efficient_attention(q, k, v, attn_bias=bias)
    return out


def _flashinfer(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    from flashinfer import single_prefill_with_kv_cache as prefill

    return torch.stack([prefill(a, b, c, causal=causal) for a, b, c in zip(q, k, v, strict=True)])


PACKAGES = {"flash_attn": _flash_attn, "xformers": _xformers, "flashinfer": _flashinfer}


def contestants(backend: str) -> tuple[Contestant, ...]:
    """Everybody, us first. An eager baseline is last."""
    return (
        ours(backend),
        forced(SDPBackend.FLASH_ATTENTION),
        forced(SDPBackend.CUDNN_ATTENTION),
        forced(SDPBackend.EFFICIENT_ATTENTION),
        forced(SDPBackend.MATH),
        Contestant(flex.NAME, flex.absent, flex.forward),
        Contestant("ONNX Runtime", onnx_runtime.absent, onnx_runtime.forward),
        *map(package, PACKAGES),
        Contestant("eager", eager_absent, eager),
    )


def _too_long(name: str, p: Workload) -> str | None:
    """Why the quick suites do without a contestant."""
    if name == flex.NAME and not flex.chosen(p.case):
        return "compiled for some rows of the quick suites only"
    if name in (MATH, "eager") and scores_bytes(p) > QUICK_LIMIT:
        return "holds all scores: in the full suites only"
    return None


def entries(
    case: AttentionCase, backend: str | None, device: torch.device, copies: int, *, full: bool
) -> Entries:
    """Who competes in a row of the attention suites.

    Args:
        case: The row.
        backend: Ours; None where there is none, and rivals compete among themselves.
        device: Of the tensors.
        copies: Of the inputs.
        full: Nobody is left out because he takes long.
    """
    problems = [problem(case, device) for _ in range(copies)]
    calls, absent = {}, {}
    for one in contestants(backend or "auto"):
        if one.name == OURS and backend is None:
            continue
        reason = one.absent(problems[0])
        if reason is None and not full:
            reason = _too_long(one.name, problems[0])
        if reason is None:
            calls[one.name] = [pass_of(p, one.forward) for p in problems]
        else:
            absent[one.name] = reason

    def ready() -> None:
        if case.option == "dropout":
            for p in problems:
                p.dropout_p = DROPOUT_P

    return Entries(calls, absent, ready, compiled=(flex.NAME,))


def statistics_entries(
    case: AttentionCase, backend: str | None, device: torch.device, copies: int, *, full: bool
) -> Entries:
    """Ours with statistics and ours without, on the same inputs; out alone has a gradient."""
    forward, plain = ours(backend or "auto").forward, AttentionCase(*case)
    calls: dict[str, list[Call]] = {OURS: [], PLAIN: []}
    for _ in range(copies):
        without = problem(plain, device)
        observed = replace(without, case=plain._replace(option="statistics"))
        calls[PLAIN].append(pass_of(without, forward))
        calls[OURS].append(_but_entropy(pass_of(observed, forward)))
    return Entries(calls, {})


def _but_entropy(call: Call) -> Call:
    return lambda: {name: x for name, x in call().items() if name != "entropy"}

"""Who competes where Python's threads call at once, each on tensors of its own: us and torch."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from .. import OURS
from ..clock import Call, Results
from ..grid import CallersCase
from ..problem import Workload, pass_of, problem
from ..race import Entries
from . import attention


def entries(
    case: CallersCase, backend: str | None, device: torch.device, copies: int, *, full: bool
) -> Entries:
    """Us, and `F.scaled_dot_product_attention`; the arguments are those of `attention.entries`."""
    pool = ThreadPoolExecutor(case.callers)
    forwards: dict[str, Callable[[Workload], Results]] = {"torch.sdpa": attention.sdpa}
    if backend is not None:
        forwards = {OURS: attention.ours(backend).forward, **forwards}
    calls: dict[str, list[Call]] = {name: [] for name in forwards}
    for _ in range(copies):
        problems = [problem(case, device) for _ in range(case.callers)]
        for name, forward in forwards.items():
            calls[name].append(_at_once(pool, case, [pass_of(p, forward) for p in problems]))
    return Entries(calls, {})


def _at_once(pool: ThreadPoolExecutor, case: CallersCase, calls: list[Call]) -> Call:
    """A call in which each thread makes its own so many times; the results of all, stacked."""

    def repeated(call: Call) -> Results:
        for _ in range(case.repeats - 1):
            call()
        return call()

    def at_once() -> dict[str, Tensor]:
        found: list[Any] = list(pool.map(repeated, calls))
        return {name: torch.stack([x[name].detach() for x in found]) for name in found[0]}

    return at_once

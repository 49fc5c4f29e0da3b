"""Sizes that a traced program leaves open until it runs ("unbacked": rows that a mask keeps).

Nothing may branch on them: a check passes unless it fails for certain, and kernels look again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def certain(condition: Any) -> bool:
    """Whether a condition on sizes holds, of open ones whether it does in any case."""
    if torch.compiler.is_compiling() or isinstance(condition, torch.SymBool):
        from torch.fx.experimental.symbolic_shapes import guard_or_false  # takes seconds to import

        return guard_or_false(condition)
    return bool(condition)


def assume_equal(a: Any, b: Any) -> None:
    """Have a program check when it runs that two sizes are equal, if one of them is open."""
    if not certain(a == b) and not certain(a != b):
        torch._check(a == b)


def assume_shape(x: Any, *sizes: Any) -> None:
    """`assume_equal` for each size of a tensor, if it is one of that rank; None may be anything."""
    if isinstance(x, Tensor) and x.dim() == len(sizes):
        for size, whole in zip(x.shape, sizes, strict=True):
            if whole is not None:
                assume_equal(size, whole)


def memory_order(x: Tensor) -> list[int]:
    """The first three dimensions by their strides, the largest first, equal ones as they come."""
    order = [0]  # by insertion: torch.compile does not sort by sizes that it traces
    for d in (1, 2):
        order.insert(sum(not certain(x.stride(before) < x.stride(d)) for before in order), d)
    return order

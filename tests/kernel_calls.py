"""How often our kernels run, whoever calls them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def kernel_calls(function: Callable[[], Any]) -> int:
    """How often the CPU backend's forward or decoding runs in one call of `function`."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    names = ("attnfast::cpu_fwd", "attnfast::cpu_decode")
    return sum(event.name in names for event in profile.events())

"""``torch.fx.symbolic_trace``: our layer is a leaf of a graph, as torch's own is.

fx decides about modules by the name of the file that their class comes from, and cannot see ours. A
call that is given a `torch.fx.Proxy` therefore becomes a node here, made by the tracer that the
proxy belongs to. (Of functions fx learns by ``__torch_function__``, see subclasses.py.)
"""

from __future__ import annotations

from typing import Any

import torch.fx
from torch import nn


def module_node(module: nn.Module, proxy: torch.fx.Proxy, args: Any, kwargs: Any) -> torch.fx.Proxy:
    """The node of a call of a module that is not traced through."""
    path = proxy.tracer.path_of_module(module)  # type: ignore[attr-defined]
    return proxy.tracer.create_proxy("call_module", path, args, kwargs)


def first_proxy(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.fx.Proxy | None:
    """The first argument that only stands for a value while a graph is traced, or None."""
    for x in args:
        if isinstance(x, torch.fx.Proxy):
            return x
    for x in kwargs.values():
        if isinstance(x, torch.fx.Proxy):
            return x
    return None

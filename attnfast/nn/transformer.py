"""``nn.TransformerEncoderLayer`` and ``nn.TransformerDecoderLayer`` around our attention.

`replace` makes layers of exactly torch's classes these: same modules, parameters and results, with
the products of the feed-forward part, two thirds of all in a layer, by `linear`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from .linear import linear
from .tracing import first_proxy, module_node


class _Leaf(nn.Module):
    """A module of a graph of ``torch.fx``, as torch's own layers are."""

    def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
        proxy = first_proxy(args, kwargs)
        if proxy is not None:
            return module_node(self, proxy, args, kwargs)
        return super()._call_impl(*args, **kwargs)


class TransformerEncoderLayer(_Leaf, nn.TransformerEncoderLayer):
    """Torch's layer, with the products of its feed-forward part by `linear`."""

    def _ff_block(self, x: Tensor) -> Tensor:
        out: Tensor = self.dropout2(_feed_forward(self, x))
        return out


class TransformerDecoderLayer(_Leaf, nn.TransformerDecoderLayer):
    """Torch's layer, with the products of its feed-forward part by `linear`."""

    def _ff_block(self, x: Tensor) -> Tensor:
        out: Tensor = self.dropout3(_feed_forward(self, x))
        return out


LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.TransformerEncoderLayer: TransformerEncoderLayer,
    nn.TransformerDecoderLayer: TransformerDecoderLayer,
}


def _feed_forward(layer: Any, x: Tensor) -> Tensor:
    hidden = layer.activation(_project(layer.linear1, x))  # (B, T, feed-forward width)
    return _project(layer.linear2, layer.dropout(hidden))


def _project(module: nn.Module, x: Tensor) -> Tensor:
    """``module(x)``, by `linear` where the module is torch's as torch made it."""
    if torch.compiler.is_compiling() or type(module) is not nn.Linear or not _is_untouched(module):
        y: Tensor = module(x)
        return y
    return linear(x, module.weight, module.bias)


def _is_untouched(module: nn.Module) -> bool:
    """Whether a call of a module is one of its class's ``forward``, and of nothing else."""
    return not (
        "forward" in vars(module)
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or torch_module._has_any_global_hook()
    )

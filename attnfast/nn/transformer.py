"""``nn.TransformerEncoderLayer`` and ``nn.TransformerDecoderLayer`` around our attention.

`replace` makes layers of exactly torch's classes these: same modules, parameters and results, with
the products of the feed-forward part, two thirds of all in a layer, by `linear`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from .. import watching
from .attention import HOOK, MultiheadAttention
from .linear import ProjectionLinear, is_watched, linear
from .tracing import first_proxy, module_node


class _Leaf(nn.Module):
    """A module of a graph of ``torch.fx``, as torch's own layers are."""

    def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
        proxy = first_proxy(args, kwargs)
        if proxy is not None:
            return module_node(self, proxy, args, kwargs)
        return super()._call_impl(*args, **kwargs)


class TransformerEncoderLayer(_Leaf, nn.TransformerEncoderLayer):
    """Torch's layer, with the products of its feed-forward part by `linear`.

    In inference on the CPU, where its modules are torch's and nobody watches, their functions are
    called one after another, as torch's own fast path does.
    """

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """What ``nn.TransformerEncoderLayer`` computes, with the same arguments."""
        if not _infers(self, src):
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        masks = _canonical(src, src_mask, src_key_padding_mask)
        if self.norm_first:
            x = _attended(self, _normed(self.norm1, src), *masks, is_causal).add_(src)
            return _inferred_feed_forward(self, _normed(self.norm2, x)).add_(x)
        x = _normed(self.norm1, _attended(self, src, *masks, is_causal).add_(src))
        return _normed(self.norm2, _inferred_feed_forward(self, x).add_(x))

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
        or module._forward_pre_hooks.keys() - {HOOK}
        or module._backward_hooks
        or module._backward_pre_hooks
        or torch_module._has_any_global_hook()
    )


# What an encoder layer's modules have to be, to be called without their ``__call__``.
_PARTS: dict[str, type[nn.Module]] = {
    "self_attn": MultiheadAttention,
    "norm1": nn.LayerNorm,
    "norm2": nn.LayerNorm,
    "linear1": nn.Linear,
    "linear2": nn.Linear,
    "dropout": nn.Dropout,
    "dropout1": nn.Dropout,
    "dropout2": nn.Dropout,
}
_ACTIVATIONS: dict[Any, str] = {F.relu: "relu", F.gelu: "gelu"}


def _infers(layer: Any, src: Any) -> bool:
    """Whether a call of an encoder layer may go the short way."""
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and type(src) is Tensor
        and src.is_cpu
        and not src.is_nested
        and not watching.now
        and not is_watched()
        and not torch._C._is_any_autocast_enabled()
        and any(layer.activation is known for known in _ACTIVATIONS)
        and all(_is_stock(layer._modules.get(name), kind) for name, kind in _PARTS.items())
        and _is_stock(layer.self_attn.out_proj, ProjectionLinear)  # its result is written over
    )


def _is_stock(module: Any, kind: type[nn.Module]) -> bool:
    return type(module) is kind and not module.training and _is_untouched(module)


def _canonical(
    src: Tensor, src_mask: Tensor | None, src_key_padding_mask: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Torch's masks as torch's layer hands them on: floats."""
    if src_key_padding_mask is not None:
        src_key_padding_mask = F._canonical_mask(
            src_key_padding_mask,
            "src_key_padding_mask",
            F._none_or_dtype(src_mask),
            "src_mask",
            src.dtype,
        )
    if src_mask is not None:
        src_mask = F._canonical_mask(src_mask, "src_mask", None, "", src.dtype, False)
    return src_mask, src_key_padding_mask


def _attended(
    layer: Any, x: Tensor, mask: Tensor | None, padding: Tensor | None, is_causal: bool
) -> Tensor:
    out, _ = layer.self_attn.forward(
        x, x, x, attn_mask=mask, key_padding_mask=padding, need_weights=False, is_causal=is_causal
    )
    attended: Tensor = out
    return attended


def _inferred_feed_forward(layer: Any, x: Tensor) -> Tensor:
    one, two = layer.linear1, layer.linear2
    hidden = linear(x, one.weight, one.bias, _ACTIVATIONS[layer.activation])
    return linear(hidden, two.weight, two.bias)


def _normed(norm: Any, x: Tensor) -> Tensor:
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)

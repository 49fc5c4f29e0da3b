"""Tensor subclasses, whose memory need not hold what they stand for.

Torch's ``CausalBias`` is taken as what it says; every other type that overrides
``__torch_function__`` is asked first, as torch asks it. Types that override
``__torch_dispatch__`` (DTensor, fake and functional tensors, quantised weights) get to see the
operators, so that no kernel ever reads their memory.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

PLAIN = (Tensor, nn.Parameter)  # types whose memory holds their values
LAZY = (nn.UninitializedParameter, nn.UninitializedBuffer)  # not even a shape yet


def overridden(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """What the arguments' ``__torch_function__``, or a mode's, makes of a call.

    Returns:
        NotImplemented where none has a say: the call then goes on.
    """
    arguments = arguments | arguments.pop("other", {})
    asked = tuple(x for x in arguments.values() if not is_causal_bias(x))
    if not has_torch_function(asked):
        return NotImplemented
    return handle_torch_function(function, asked, **arguments)


def is_causal_bias(x: object) -> bool:
    """Whether x is a ``torch.nn.attention.bias.CausalBias``, of which nothing lies in memory."""
    return is_a(x, "torch.nn.attention.bias", "CausalBias")


def is_dtensor(x: object) -> bool:
    """Whether x is a ``torch.distributed.tensor.DTensor``, cut over processes."""
    return is_a(x, "torch.distributed.tensor", "DTensor")


def is_lower_right(bias: Any) -> bool:
    """Whether a ``CausalBias`` is aligned to the last query and key, and not the first as well."""
    return bool(bias.seq_len_q != bias.seq_len_kv and bias.variant.name == "LOWER_RIGHT")


def refusal(x: Tensor) -> str | None:
    """What an argument must be instead of a tensor subclass that stands for more than values."""
    if is_causal_bias(x):
        return "a Tensor of values"
    if isinstance(x, LAZY):
        return "initialised"
    if is_a(x, "torch.masked.maskedtensor.core", "MaskedTensor"):
        return "a Tensor without a mask of its own (get_data() and get_mask() are two arguments)"
    return None


def is_a(x: object, module: str, name: str) -> bool:
    """Whether x is of a class that takes seconds to import: where nobody did, nobody has one."""
    found = sys.modules.get(module)
    return found is not None and bool(isinstance(x, getattr(found, name)))


def is_at_hand(x: Tensor) -> bool:
    """Whether a tensor's values and memory can be looked at now: no tracing, nothing in its way."""
    return (
        type(x) in PLAIN
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_tracing_state() is None
    )

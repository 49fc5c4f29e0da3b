"""``warm_up``: what the first call of its kind costs, paid before it matters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from .explain import bound_call


def warm_up(*args: Any, **kwargs: Any) -> None:
    """Run a call once and forget the results: the next one like it loads and compiles nothing.

    The first use of a kernel loads it (``backend="cuda"``) or compiles it, which takes seconds
    (``"triton"``, ``"gluon"``). While a ``torch.cuda.CUDAGraph`` is captured neither may happen,
    and a server's first request should not wait for it. ::

        attnfast.warm_up(q, k, v, causal=True)
        with torch.cuda.graph(graph):
            out = attnfast.attention(q, k, v, causal=True)

    Takes the arguments of `attention`, `varlen_attention` or `decode_attention`, and knows them
    apart as `explain` does. Tensors may hold anything: ``torch.empty`` of the right shape, dtype,
    strides and device will do, but those of the call itself leave no doubt, since the address of a
    tensor counts too (whether it is a multiple of 16 bytes). Where one requires a gradient, and
    gradients are enabled, backward runs too: for ``out``, and for it with all other results that
    were asked for. ``.grad`` and the states of random generators stay as they are.

    What has to be alike in the later call: the device, dtypes, sizes, strides, and which tensors
    and options there are; a graph needs all of that anyway. It takes the time and memory of the
    call, on the current stream.

    Raises:
        TypeError: As the function whose arguments these are.
        ValueError: As the function whose arguments these are.
        RuntimeError: A graph is being captured on the current stream: it is too late.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("warm_up: must be called before a graph is captured, not meanwhile")
    function, call = bound_call("warm_up", args, kwargs)
    leaves = []
    for name, x in call.arguments.items():
        if isinstance(x, Tensor) and x.requires_grad and not is_lazy(x):
            leaves.append(x.detach().requires_grad_())
            call.arguments[name] = leaves[-1]
    gpus = {x.get_device() for x in call.arguments.values() if isinstance(x, Tensor) and x.is_cuda}
    with torch.random.fork_rng(gpus):
        results = differentiable(function(*call.args, **call.kwargs))
    for wanted in (results[:1], results)[: len(results)]:
        upstream = list(map(torch.ones_like, wanted))
        torch.autograd.grad(wanted, leaves, upstream, retain_graph=True, allow_unused=True)


def differentiable(results: Any) -> list[Tensor]:
    """The tensors among a call's results that have a gradient, each once."""
    leaves = tree_leaves(results)  # statistics too
    return list({id(x): x for x in leaves if isinstance(x, Tensor) and x.requires_grad}.values())

"""``observe``: statistics of every head of a model while it runs, in O(layers x heads) memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from .. import watching
from ..call import Inputs, Options, Outputs
from ..requirements import fail
from ..requirements import integer as whole_number
from .running import Running
from .seen import STATISTICS, Seen


def observe(model: nn.Module, *, every: int = 1) -> AbstractContextManager[Seen]:
    """Collect statistics of all attention of ours that runs inside a model's forward.

    ``with lens.observe(model) as seen:`` train or evaluate as ever; then ``seen.table()``. It sees
    `attnfast.MultiheadAttention`, models of `attnfast.replace`, transformers with
    ``attn_implementation="attnfast"`` and callers of ``scaled_dot_product_attention`` while
    `attnfast.integrations.sdpa` is active. A layer is the innermost module that calls attention, by
    its name in the model; a second call within one forward is ``name#2``. Rows of padding do not
    count: queries without any key, and where T = S and a mask, or a bias of -inf, is the same for
    all queries, ``(B, 1, 1, S)``, those that it masks as keys. What activation checkpointing
    computes again, and decoding, are left out.

    Args:
        model: any module; nothing of it is changed but hooks, which are taken away at the end.
        every: look at the first of so many forwards of the model only.

    Returns:
        A context manager that gives a `Seen`, which fills meanwhile.

    Raises:
        TypeError: ``model`` is not a module, ``every`` no int.
        ValueError: ``every`` is less than 1.
        RuntimeError: on entering, another observation is going on.
    """
    if not isinstance(model, nn.Module):
        fail("observe", "model", "a torch.nn.Module", type(model).__name__, TypeError)
    return Observation(model, whole_number("observe", "every", every, low=1))


class Observation:
    """See `observe`."""

    def __init__(self, model: nn.Module, every: int) -> None:
        self.model, self.every, self.seen = model, every, Seen()
        self.forwards = 0  # of the model, begun so far
        self.inside: list[tuple[str, int]] = []  # modules that are running, and their calls
        self.hooks: list[Any] = []

    def __enter__(self) -> Seen:
        if watching.now is not None:
            raise RuntimeError("observe: another observation is going on")
        for name, module in self.model.named_modules():
            begin = functools.partial(self._begin, name)
            self.hooks += [
                module.register_forward_pre_hook(begin),
                module.register_forward_hook(self._end, always_call=True),
            ]
        watching.now = self
        return self.seen

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        watching.now = None
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()
        self.inside.clear()

    def _begin(self, name: str, module: nn.Module, args: Any) -> None:
        if name == "" and not recomputes():
            self.forwards += 1
        self.inside.append((name, 0))

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.inside:
            self.inside.pop()

    def run(
        self, compute: Callable[..., Outputs], inputs: Inputs, options: Options, *others: Any
    ) -> Outputs:
        """Compute a call, with statistics, and take them in."""
        if not self.inside or (self.forwards - 1) % self.every:
            return compute(inputs, options, *others)
        outputs = compute(inputs, options._replace(stats=max(options.stats, 1)), *others)
        if recomputes():  # with the same tensors saved
            return outputs
        name, calls = self.inside[-1]
        self.inside[-1] = name, calls + 1
        self._see(f"{name}#{calls + 1}" if calls else name, inputs, outputs)
        return outputs

    @torch.compiler.disable
    def _see(self, layer: str, inputs: Inputs, outputs: Outputs) -> None:
        assert outputs.stats is not None
        max_logit, entropy, reach, focus = outputs.stats.detach().unbind(0)
        real = (max_logit != -torch.inf) & real_queries(inputs)
        found = dict(
            zip(STATISTICS, (entropy.exp(), focus, reach, max_logit, entropy), strict=True)
        )
        rows = real.transpose(0, 1).flatten(1)
        for name, values in found.items():
            self.seen.add(layer, name, Running.of(values.transpose(0, 1).flatten(1), rows))


def real_queries(inputs: Inputs) -> Tensor:
    """Which queries are no padding, broadcastable to ``(B, H, T)``."""
    real, T = inputs.q.new_ones((), dtype=torch.bool), inputs.q.shape[2]
    for x in (inputs.mask, inputs.bias):
        if x is not None and x.shape[1:] == (1, 1, T) and inputs.k.shape[2] == T:
            real = real & (x if x.dtype == torch.bool else x != -torch.inf)[:, 0]
    return real


def recomputes() -> bool:
    """Whether the backward is running, in which activation checkpointing runs forwards again."""
    return torch._C._current_graph_task_id() != -1

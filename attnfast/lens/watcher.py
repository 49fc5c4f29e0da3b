"""Watchers: they are shown every call of attention of ours inside a model's forward."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import watching
from ..call import Inputs, Options, Outputs
from ..requirements import fail


class Call(NamedTuple):
    """A call of attention, with statistics."""

    layer: str  # the innermost module's name; a second call within one forward is name#2
    inputs: Inputs
    options: Options
    outputs: Outputs
    backend: str  # that was asked for
    compute: Callable[[Inputs, Options], Outputs]  # for more of the same, which nobody is shown

    @property
    def real(self) -> Tensor:
        """Which queries are no padding and have keys, bool (B, H, T)."""
        return self.statistics["max_logit"].isneginf().logical_not() & real_queries(self.inputs)

    @property
    def statistics(self) -> dict[str, Tensor]:
        """By name, each (B, H, T); the entropy with its gradient."""
        assert self.outputs.stats is not None
        names = "max_logit", "entropy", "reach", "focus"
        return dict(zip(names, self.outputs.stats.unbind(0), strict=True))


class Watcher:
    """Is shown the calls of a model from `start` to `stop`; any number may watch at once."""

    def __init__(self, function: str, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            fail(function, "model", "a torch.nn.Module", type(model).__name__, TypeError)
        self.model = model
        self.looking = False  # at the forward that runs, or ran last: its recomputation, too
        self.inside: list[tuple[str, int]] = []  # modules that are running, and their calls
        self.hooks: list[Any] = []

    def begins(self) -> bool:
        """Whether to look at a forward, which begins: the model's, or a part's called alone."""
        raise NotImplementedError

    def see(self, call: Call) -> None:
        """Take in a call."""
        raise NotImplementedError

    def ends(self) -> None:
        """A forward that was looked at has ended."""

    def recomputed(self, layer: str | None, inputs: Inputs) -> None:
        """Activation checkpointing runs a call again, in the backward; None: in no module."""

    def start(self) -> None:
        """Begin to watch; once is enough."""
        if self.hooks:
            return
        for name, module in self.model.named_modules():
            begin = functools.partial(self._begin, name)
            self.hooks += [
                module.register_forward_pre_hook(begin),
                module.register_forward_hook(self._end, always_call=True),
            ]
        watching.now = (*watching.now, self)

    def stop(self) -> None:
        """Watch no longer, and take the hooks away."""
        watching.now = tuple(watcher for watcher in watching.now if watcher is not self)
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()
        self.inside.clear()
        self.looking = False

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def run(
        self, compute: Callable[..., Outputs], inputs: Inputs, options: Options, *others: Any
    ) -> Outputs:
        """Compute a call, with statistics, and show it."""
        if not self.looking:
            return compute(inputs, options, *others)
        outputs = compute(inputs, options._replace(stats=max(options.stats, 1)), *others)
        again = functools.partial(_compute, compute, others)
        self._show(Call("", inputs, options, outputs, others[0], again))
        return outputs

    @torch.compiler.disable
    def _show(self, call: Call) -> None:
        layer = self._layer()
        if recomputes():
            self.recomputed(layer, call.inputs)
        elif layer is not None:
            self.see(call._replace(layer=layer))

    def _layer(self) -> str | None:
        """The name of a call that runs now; None outside of the model."""
        if not self.inside:
            return None
        name, calls = self.inside[-1]
        self.inside[-1] = name, calls + 1
        return f"{name}#{calls + 1}" if calls else name

    def _begin(self, name: str, module: nn.Module, args: Any) -> None:
        if not self.inside:
            self._outermost_begins()
        self.inside.append((name, 0))

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.inside:
            self.inside.pop()
        if not self.inside:
            self._outermost_ends()

    @torch.compiler.disable
    def _outermost_begins(self) -> None:
        if not recomputes():
            self.looking = self.begins()

    @torch.compiler.disable
    def _outermost_ends(self) -> None:
        if self.looking and not recomputes():
            self.ends()


def _compute(
    compute: Callable[..., Outputs], others: Any, inputs: Inputs, options: Options
) -> Outputs:
    return compute(inputs, options, *others)


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

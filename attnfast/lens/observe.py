"""``observe``: statistics of every head of a model while it runs, in O(layers x heads) memory."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from .. import watching
from ..requirements import integer as whole_number
from ..requirements import truth
from .running import Running
from .seen import STATISTICS, Seen
from .shares import Shares, token_name, tokens_of
from .watcher import Call, Watcher


def observe(
    model: nn.Module, *, every: int = 1, shares: bool = False, tokens: str | None = "input_ids"
) -> AbstractContextManager[Seen]:
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
        shares: also collect where the probability goes: to the query's own position, the one before
            and after, the first, and other positions of the same token; and by distance. It takes
            a second pass over the scores.
        tokens: the argument of the model's forward, by position or name, that has the tokens'
            numbers, ``(B, T)`` integers; for the share of the same token, which is NaN without.

    Returns:
        A context manager that gives a `Seen`, which fills meanwhile.

    Raises:
        TypeError: ``model`` is not a module, ``every`` no int, ``shares`` no bool, ``tokens`` no
            str.
        ValueError: ``every`` is less than 1.
        RuntimeError: on entering, another observation is going on.
    """
    with_shares = truth("observe", "shares", shares)
    number = whole_number("observe", "every", every, low=1)
    return Observation(model, number, with_shares, token_name(tokens))


class Observation(Watcher):
    """See `observe`."""

    def __init__(self, model: nn.Module, every: int, shares: bool, token_name: str | None) -> None:
        super().__init__("observe", model)
        self.every, self.shares, self.seen = every, shares, Seen()
        self.token_name = token_name
        self.tokens: Tensor | None = None  # of the forward that runs
        self.forwards = 0  # of the model, begun so far

    def __enter__(self) -> Seen:
        if any(isinstance(watcher, Observation) for watcher in watching.now):
            raise RuntimeError("observe: another observation is going on")
        self.start()
        if self.shares:
            self.hooks.append(
                self.model.register_forward_pre_hook(self._keep_tokens, with_kwargs=True)
            )
        return self.seen

    def begins(self) -> bool:
        """Every so many-th forward is looked at."""
        self.forwards += 1
        return (self.forwards - 1) % self.every == 0

    def see(self, call: Call) -> None:
        """Add the real rows of a call to those seen."""
        found = {name: x.detach() for name, x in call.statistics.items()}
        found["breadth"] = found["entropy"].exp()
        rows = call.real.transpose(0, 1).flatten(1)
        for name in STATISTICS:
            values = found[name].transpose(0, 1).flatten(1)
            self.seen.add(call.layer, name, Running.of(values, rows))
        if self.shares:
            self.seen.add_shares(call.layer, Shares.of(call, call.backend, self.tokens))

    def _keep_tokens(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.tokens = tokens_of(module, self.token_name, args, kwargs)

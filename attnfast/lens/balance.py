"""``BalanceLoss``: a term of the loss that keeps the entropy of heads within a band."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..call import Inputs
from ..requirements import choice, fail, integer, number
from .watcher import Call, Watcher

NAME = "BalanceLoss"
UNITS = {"nats": 0, "share": 1}
WIDTH = 8  # of heads whose scores are all zero: any that a kernel takes

Bound = float | Tensor | None
Schedule = Callable[[int], float] | tuple[int, int | None] | None


class BalanceLoss(Watcher):
    """An entropy floor and ceiling for every head, as a loss to add.

    A query whose entropy is outside of the band costs its distance to the band, in nats; inside,
    cost and gradient are 0. The loss is the mean over all real queries of all heads in all calls of
    attention of ours in the model's forward, times the weight. The entropy's gradient is a term of
    the fused backward, so it costs no further pass. Low entropy goes with training that breaks
    down (arXiv:2303.06296), entropy near the largest with heads that do not choose::

        balance = lens.BalanceLoss(model, floor=0.5, weight=0.01)
        with balance:
            for x, y in batches:
                loss = criterion(model(x), y) + balance()
                loss.backward()

    Layers are found, and padding is left out, as `observe` does, and both may watch at once, as
    may several losses. Forwards without gradients do not count. ``torch.compile`` works (attention
    ends a graph), and activation checkpointing with ``use_reentrant=False``.

    Args:
        model: any module; nothing of it is changed but hooks, which are taken away at the end.
        floor: the least entropy, a number or a tensor ``(H,)`` of one for each head.
        ceiling: the largest entropy, the same.
        unit: of floor and ceiling: "nats"; or "share", of log(n), the entropy of a query that
            looks evenly at all of the n keys that it may attend (by masks, biases of -inf, causal,
            windows and lengths): one band for short and long rows. It counts these keys by a
            further forward of heads of width 8.
        weight: what the loss is multiplied with.
        schedule: another factor: a function of the step; or a pair ``(warm_up, end)``, that rises
            to 1 in the first ``warm_up`` steps and falls to 0 between them and step ``end``, or
            stays, where it is None. A step is a call of this object; ``step``, the number of the
            next, may be set, as where a training goes on.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: neither floor nor ceiling, or a floor above the ceiling; another value that is
            out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        floor: Bound = None,
        ceiling: Bound = None,
        unit: str = "nats",
        weight: float = 1.0,
        schedule: Schedule = None,
    ) -> None:
        super().__init__(NAME, model)
        if floor is None and ceiling is None:
            fail(NAME, "floor or ceiling", "given", "neither")
        self.floor = checked_bound("floor", floor, -math.inf)
        self.ceiling = checked_bound("ceiling", ceiling, math.inf)
        if self.floor.shape != self.ceiling.shape and self.floor.dim() and self.ceiling.dim():
            sizes = f"{len(self.floor)} and {len(self.ceiling)}"
            fail(NAME, "floor and ceiling", "for the same number of heads", sizes)
        if (self.floor > self.ceiling).any():
            fail(NAME, "floor", "at most the ceiling", floor)
        self.shares = bool(choice(NAME, "unit", unit, UNITS))
        self.weight = number(NAME, "weight", weight, 0, math.inf, "of at least 0")
        self.schedule = checked_schedule(schedule)
        self.step = 0
        self.found: list[tuple[Tensor, Tensor, Tensor]] = []  # entropy, real rows, their unit
        self.without: set[str] = set()  # layers of this forward that ran without gradients

    def __enter__(self) -> BalanceLoss:
        self.start()
        return self

    def stop(self) -> None:
        """Watch no longer, and forget what was found."""
        super().stop()
        self.found.clear()

    def __call__(self) -> Tensor:
        """The loss of all forwards since the last call, fp32 (), which makes a step.

        Without gradients, as in an evaluation, it is 0 and no step.

        Raises:
            RuntimeError: No attention of ours ran since, with gradients.
        """
        if not torch.is_grad_enabled():
            first = next(self.model.parameters(), None)
            return torch.zeros((), device=None if first is None else first.device)
        if not self.found:
            raise RuntimeError(
                f"{NAME}: no attention of attnfast ran with gradients within the model since the"
                " last step, or nobody entered: with BalanceLoss(...) as balance"
            )
        costs = torch.stack([self._cost(*rows) for rows in self.found])
        queries = torch.stack([real.sum() for _, real, _ in self.found])
        self.found.clear()
        factor = self.weight * self.schedule(self.step)
        self.step += 1
        return factor * costs.sum() / queries.sum().clamp(min=1)

    def _cost(self, entropy: Tensor, real: Tensor, unit: Tensor) -> Tensor:
        """The sum over the real rows of a call of their distance to the band."""
        low, high = (
            torch.where(bound.isfinite(), bound * unit, bound)
            for bound in (x.to(entropy).view(-1, 1) for x in (self.floor, self.ceiling))
        )
        cost = torch.relu(low - entropy) + torch.relu(entropy - high)
        return torch.where(real, cost, 0).sum()

    def begins(self) -> bool:
        """Forwards with gradients are looked at."""
        self.without.clear()
        return torch.is_grad_enabled()

    def see(self, call: Call) -> None:
        """Keep the entropies of a call."""
        if torch._C._are_functorch_transforms_active():
            said = f"{NAME}: transforms of torch.func keep no loss beside their results"
            raise NotImplementedError(said)
        entropy, real = call.statistics["entropy"], call.real
        if not entropy.requires_grad:
            self.without.add(call.layer)
        for name in ("floor", "ceiling"):
            bound, H = getattr(self, name), entropy.shape[1]
            if bound.dim() and len(bound) != H:
                fail(NAME, name, f"a number or of (H,) = ({H},)", tuple(bound.shape))
        unit = log_keys(call).where(real, 0.0) if self.shares else entropy.new_ones(())
        self.found.append((entropy, real, unit))  # what a checkpoint saved stays what it was

    def recomputed(self, layer: str | None, inputs: Inputs) -> None:
        """Refuse checkpointing that ran the forward without gradients."""
        lost = self.without if layer is None else self.without & {layer}
        if lost and (inputs.q.requires_grad or inputs.k.requires_grad):
            raise RuntimeError(
                f"{NAME}: checkpoint(..., use_reentrant=True) runs the forward of {min(lost)!r}"
                " without gradients, so that its entropy has none: use_reentrant=False"
            )


def log_keys(call: Call) -> Tensor:
    """log(how many keys a query may attend), (B, H, T): lse of scores that are all zero."""
    given = call.inputs
    with torch.no_grad():
        q, k, v = (x.new_zeros(*x.shape[:3], WIDTH) for x in given[:3])
        bias = given.bias
        if bias is not None:
            bias = torch.zeros_like(bias).masked_fill(bias == -torch.inf, -torch.inf)
        inputs = given._replace(
            q=q, k=k, v=v, bias=bias, alibi_slopes=None, sinks=None, dropout_seed=None
        )
        options = call.options._replace(scale=1.0, softcap=0.0, dropout_p=0.0, weights=0, stats=0)
        return call.compute(inputs, options).lse


def checked_bound(name: str, x: Any, absent: float) -> Tensor:
    """A floor or ceiling as a tensor, () or (H,)."""
    if isinstance(x, Tensor):
        if x.dim() > 1 or not x.is_floating_point() or x.isnan().any():
            fail(NAME, name, "a number or a float tensor (H,)", f"{x.dtype} {tuple(x.shape)}")
        return x.detach()
    if x is None:
        return torch.tensor(absent)
    return torch.tensor(number(NAME, name, x, -math.inf, math.inf, "or a tensor (H,)"))


def checked_schedule(schedule: Any) -> Callable[[int], float]:
    """A schedule as a function of the step."""
    if schedule is None:
        return lambda step: 1.0
    if callable(schedule):
        return schedule  # type: ignore[no-any-return]
    if not isinstance(schedule, tuple) or len(schedule) != 2:
        required = "a function of the step or a pair (warm_up, end)"
        fail(NAME, "schedule", required, repr(schedule), TypeError)
    warm_up: int = integer(NAME, "warm_up", schedule[0], low=0)
    if schedule[1] is None:
        return lambda step: min((step + 1) / max(warm_up, 1), 1.0)
    end: int = integer(NAME, "end", schedule[1], low=warm_up + 1)

    def factor(step: int) -> float:
        rise = (step + 1) / max(warm_up, 1)
        return max(min(rise, (end - step) / (end - warm_up), 1.0), 0.0)

    return factor

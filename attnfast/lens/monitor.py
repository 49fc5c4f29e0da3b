"""``Monitor``: watches a training's heads, writes what they do, and warns of what goes wrong."""

from __future__ import annotations

import logging
import math
import warnings
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from ..requirements import integer, number
from .rows import MEASURES, Writer, writer_of
from .watcher import Call, Watcher, real_queries

NAME = "Monitor"
LOG = logging.getLogger("attnfast.lens")


class Monitor(Watcher):
    """Watch the heads of a model in training: rows of numbers, and warnings of what goes wrong.

    Every so many forwards with gradients it looks at all attention of ours in the model, as
    `observe` does, and writes for each layer and head the mean entropy, breadth and focus of the
    real queries and the largest max_logit. It warns, once until the head has recovered, by Python's
    warnings and the logger "attnfast.lens", where a head's entropy has been below the floor in so
    many looks one after another, and where its largest logit is beyond the limit or not finite::

        with lens.Monitor(model, every=50, out="heads.csv"):
            train(model)

    Args:
        model: any module; nothing of it is changed but hooks, which are taken away at the end.
        every: look at the first of so many forwards with gradients.
        out: where to write: a path, for CSV with the columns step, layer, head, entropy, breadth,
            focus and max_logit, anew; TensorBoard's SummaryWriter, or whatever has its
            ``add_scalar(name, value, step)``; a run of W&B, or whatever has its ``log(dict)``; None
            writes nothing. Names there are ``entropy/layer/head``. It is left open.
        floor: the entropy, in nats, below which a head has collapsed; it is the mean's.
        looks: so many looks one after another below the floor are a collapse.
        limit: the largest logit that is not worth a warning.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a value out of range.

    Attributes:
        step: None counts forwards with gradients, and writes their number as the step; callbacks
            set it to the trainer's own, of which then all forwards of every so many-th are seen.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int = 1,
        out: Any = None,
        floor: float = 0.1,
        looks: int = 3,
        limit: float = 100.0,
    ) -> None:
        super().__init__(NAME, model)
        self.every: int = integer(NAME, "every", every, low=1)
        self.floor = number(NAME, "floor", floor, 0, math.inf, "of at least 0")
        self.looks = integer(NAME, "looks", looks, low=1)
        self.limit = number(NAME, "limit", limit, 0, math.inf, "of at least 0")
        self.out = out
        self.step: int | None = None
        self.forwards = 0  # with gradients, begun so far
        self.low: Counter[tuple[str, int]] = Counter()  # looks below the floor, of layer and head
        self.loud: set[tuple[str, int]] = set()  # layers and heads with logits beyond the limit
        self.found: dict[str, dict[str, Tensor]] = {}  # of this forward
        self.write: Writer = writer_of(NAME, out)

    def __enter__(self) -> Monitor:
        self.start()
        return self

    def begins(self) -> bool:
        """Every so many-th forward with gradients is looked at."""
        self.found = {}
        if not torch.is_grad_enabled():
            return False
        self.forwards += 1
        return (self.forwards - 1 if self.step is None else self.step) % self.every == 0

    def see(self, call: Call) -> None:
        """Measure a call's heads."""
        real = call.real
        lost = (call.outputs.lse.isnan() & real_queries(call.inputs)).any(2).any(0)
        rows = real.expand(call.outputs.lse.shape).sum((0, 2)) + lost
        values = {name: x.detach() for name, x in call.statistics.items()}
        values["breadth"] = values["entropy"].exp()
        largest = values["max_logit"].where(real, -torch.inf).transpose(0, 1).flatten(1)
        if not largest.shape[1]:
            return
        found = {
            name: values[name].where(real, 0).sum((0, 2)) / rows.clamp(min=1)
            for name in MEASURES
            if name != "max_logit"
        }
        found["max_logit"] = largest.amax(1).where(~lost, torch.nan)
        self.found[call.layer] = {**found, "queries": rows}

    def ends(self) -> None:
        """Write and judge what a forward has shown."""
        step = self.forwards - 1 if self.step is None else self.step
        rows: list[dict[str, Any]] = []
        for layer, found in self.found.items():
            numbers = {name: x.tolist() for name, x in found.items()}
            queries = numbers.pop("queries")
            for head, seen in enumerate(queries):
                if seen:
                    values = {name: x[head] for name, x in numbers.items()}
                    rows.append({"step": step, "layer": layer, "head": head, **values})
        self.found = {}
        if rows:
            self.write(rows)
        for row in rows:
            self._judge(row)

    def _judge(self, row: dict[str, Any]) -> None:
        """Warn of a head that has just gone wrong."""
        head = row["layer"], row["head"]
        where = f"step {row['step']}, {row['layer']!r}, head {row['head']}"
        self.low[head] = self.low[head] + 1 if row["entropy"] < self.floor else 0
        if self.low[head] == self.looks:
            told = f"entropy {row['entropy']:.3g} nats, below {self.floor:g} in {self.looks} looks"
            tell(f"{NAME}: {where}: the head has collapsed: {told}")
        if math.isfinite(row["max_logit"]) and row["max_logit"] <= self.limit:
            self.loud.discard(head)
        elif head not in self.loud:
            self.loud.add(head)
            told = f"the largest logit is {row['max_logit']:.4g}, beyond {self.limit:g}"
            tell(f"{NAME}: {where}: logits explode: {told}")


def tell(message: str) -> None:
    """Warn, and log the same."""
    LOG.warning(message)
    warnings.warn(message, RuntimeWarning, stacklevel=2)

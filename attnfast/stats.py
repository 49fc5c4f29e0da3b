"""Attention statistics: how broadly, how sharply and how far away every query looks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree


@dataclass(frozen=True, eq=False, repr=False)
class AttentionStats:
    """What one attention call did, per query row, found in the same pass as its output.

    Every tensor is fp32 (fp64 for fp64 inputs), taken before dropout, of shape (B, H, T); a call
    without a batch dimension has (H, T), a varlen call (H, total_q). Logarithms are natural; p are
    the row's probabilities, s its scores (scaled, capped, with bias and ALiBi), and t' is the
    position of the query among the keys. Only lse, entropy and breadth are differentiable.

    A row that may attend no key has entropy, breadth, focus and reach 0 and max_logit -inf.

    Attributes:
        lse: log(sum(exp(s))), the sink included.
        max_logit: max(s), the sink left out; QK-clip watches it (MuonClip, arXiv:2507.20534).
        entropy: -sum(p log p), the sink as one more key. Training breaks down where it collapses
            (arXiv:2303.06296); adding it to the loss costs one term in the fused backward.
        reach: sum(p * abs(j - t')) over the keys j: the mean distance looked at, in keys.
        focus: max(p), the probability of the likeliest key.
        received: per key, (B, H, S): its sum of p over all queries; None unless asked for.
    """

    lse: Tensor
    max_logit: Tensor
    entropy: Tensor
    reach: Tensor
    focus: Tensor
    received: Tensor | None = None

    @property
    def breadth(self) -> Tensor:
        """How many keys the row effectively attends to, ``exp(entropy)``, from 1 to S."""
        return torch.where(self._has_keys, self.entropy.exp(), 0)

    @property
    def _has_keys(self) -> Tensor:
        return self.max_logit != -torch.inf

    def detach(self) -> AttentionStats:
        """The same values, cut off from the graph: to keep beyond the training step."""
        return AttentionStats(
            self.lse.detach(),
            self.max_logit.detach(),
            self.entropy.detach(),
            self.reach.detach(),
            self.focus.detach(),
            None if self.received is None else self.received.detach(),
        )

    def per_head(self) -> dict[str, Tensor]:
        """One number per head, each (H,), for logs: over all rows that have keys.

        ``max_logit`` is the largest; ``entropy``, ``breadth``, ``focus`` and ``reach`` are means. A
        head whose rows all lack keys has max_logit -inf and 0 elsewhere. Nothing is differentiable
        or moved to the CPU.
        """
        stats = self.detach()
        H = stats.lse.shape[-2]
        others = [0, 2] if stats.lse.dim() == 3 else [1]
        rows = stats._has_keys.sum(others).clamp(min=1)
        means = {name: getattr(stats, name).sum(others) / rows for name in _MEANS}
        logits = torch.movedim(stats.max_logit, -2, 0).reshape(H, -1)
        largest = F.pad(logits, (0, 1), value=-torch.inf).amax(1)  # there may be no rows at all
        return {"max_logit": largest, **means}

    def __repr__(self) -> str:
        """The shape, the largest max_logit and the means over heads."""
        shape = ", ".join(str(n) for n in self.lse.shape)
        try:
            heads = self.per_head()
            largest = heads.pop("max_logit").max().item()
            means = "".join(f", {name} {x.mean().item():.4g}" for name, x in heads.items())
        except (RuntimeError, NotImplementedError):  # traced and meta tensors have no values
            return f"AttentionStats({shape})"
        return f"AttentionStats({shape}: max_logit {largest:.4g}{means})"


_MEANS = ("entropy", "breadth", "focus", "reach")

# So that torch.compile, torch.export and functorch can return it (without received if it is None).
_pytree.register_dataclass(AttentionStats)

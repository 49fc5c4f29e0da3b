"""Results of attention to some of the keys, merged into those to all of them: docs/math.md."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ..call import Outputs

LN2 = math.log(2.0)


class Results(NamedTuple):
    """Of some rows, over the keys that have been met; fp32."""

    out: Tensor  # (B, H, T, D_v)
    lse: Tensor  # (B, H, T), -inf where there was no key
    norm: Tensor  # (2, B, H, T): m in the units of the backend's scores, and log2 l
    stats: Tensor | None  # (4, B, H, T): max_logit, entropy, reach, focus

    @classmethod
    def none(cls, q: Tensor, D_v: int, stats: bool) -> Results:
        """Of the rows of q ``(B, H, T, D)``, before any key."""
        rows = q.shape[:3]
        norm = q.new_zeros((2, *rows), dtype=torch.float32)
        norm[1] = torch.inf
        found = q.new_zeros((4, *rows), dtype=torch.float32) if stats else None
        if found is not None:
            found[0] = -torch.inf
        return cls(
            q.new_zeros((*rows, D_v), dtype=torch.float32),
            q.new_full(rows, -torch.inf, dtype=torch.float32),
            norm,
            found,
        )

    def rows(self, begin: int, length: int) -> Results:
        """Some of the rows, in place."""
        out, lse, norm, stats = self
        return Results(
            out.narrow(2, begin, length),
            lse.narrow(2, begin, length),
            norm.narrow(3, begin, length),
            None if stats is None else stats.narrow(3, begin, length),
        )

    def add(self, other: Outputs) -> None:
        """Take in what a backend found over more keys."""
        assert other.norm is not None
        (m, log2_l), (other_m, other_log2_l) = self.norm, other.norm
        # By m and l apart where m is the same, however large: lse would have lost l beside it
        ahead = torch.where(m == other_m, (other_log2_l - log2_l) * LN2, other.lse - self.lse)
        ahead = torch.where(self.lse == -torch.inf, torch.inf, ahead)
        ahead = torch.where(other.lse == -torch.inf, -torch.inf, ahead)
        mine, theirs = torch.sigmoid(-ahead), torch.sigmoid(ahead)
        more, other_more = softplus(ahead), softplus(-ahead)  # by which the sum is above each
        behind = ahead > 0
        if self.stats is not None and other.stats is not None:
            self._add_statistics(other.stats, mine, theirs)
        self.out.mul_(mine[..., None]).add_(theirs[..., None] * other.out)
        self.lse.copy_(torch.where(behind, other.lse + other_more, self.lse + more))
        log2_l = torch.where(behind, other_log2_l + other_more / LN2, log2_l + more / LN2)
        self.norm.copy_(torch.stack((torch.where(behind, other_m, m), log2_l)))

    def add_sinks(self, sinks: Tensor) -> None:
        """One more logit per head, without a key: after all keys."""
        sink = sinks.float()[None, :, None]
        keyless = self.lse == -torch.inf
        ahead = torch.where(keyless, 0.0, sink - self.lse)
        mine, more = torch.sigmoid(-ahead), softplus(ahead)
        if self.stats is not None:
            _, entropy, reach, focus = self.stats
            mixed = mine * entropy + torch.special.entr(mine) + torch.special.entr(1 - mine)
            entropy.copy_(torch.where(keyless, 0.0, mixed))
            reach.mul_(mine), focus.mul_(mine)
        self.out.mul_(mine[..., None])
        larger = torch.where(ahead > 0, sink + softplus(-ahead), self.lse + more)
        self.lse.copy_(torch.where(keyless, sink, larger))
        self.norm[1] += more / LN2  # where there is no key it stays inf, and p 0

    def _add_statistics(self, other: Tensor, mine: Tensor, theirs: Tensor) -> None:
        assert self.stats is not None
        max_logit, entropy, reach, focus = self.stats
        other_max, other_entropy, other_reach, other_focus = other
        mixed = mine * entropy + theirs * other_entropy
        mixed += torch.special.entr(mine) + torch.special.entr(theirs)
        empty = (max_logit == -torch.inf) & (other_max == -torch.inf)
        entropy.copy_(torch.where(empty, mixed * 0.0, mixed))
        max_logit.copy_(torch.maximum(max_logit, other_max))
        reach.mul_(mine).add_(theirs * other_reach)
        focus.copy_(torch.maximum(mine * focus, theirs * other_focus))

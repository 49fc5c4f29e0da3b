"""What a head does, in a word: the rules, which heads have faults, and which are alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

NEAR = 8  # tokens that are near
ALIKE = 0.95  # the least cosine of heads that are similar
MOST = 30  # pairs that are listed

Facts = Mapping[str, float]  # of a head: see report.py


class Rule(NamedTuple):
    """A name for what some heads do."""

    name: str
    says: str  # the rule in words
    holds: Callable[[Facts], bool]


# The first that holds gives a head its name.
NAMES = (
    Rule("previous", "at least 40% on the token before", lambda x: x["previous"] >= 0.4),
    Rule("next", "at least 40% on the token after", lambda x: x["next"] >= 0.4),
    Rule("copy", "at least 25% on the same token elsewhere", lambda x: x["same"] >= 0.25),
    Rule("sink", "at least 40% on one key, the same for all", lambda x: x["sink"] >= 0.4),
    Rule(
        "broad",
        "breadth is at least half of the keys that it may attend",
        lambda x: x["breadth"] >= 0.5 * x["keys"],
    ),
    Rule("local", f"at least 60% within {NEAR} tokens", lambda x: x["near"] >= 0.6),
)
FAULTS = (
    Rule(
        "dead",
        "chooses nothing: at least 95% on one key, or breadth at least 95% of the keys",
        lambda x: x["sink"] >= 0.95 or x["breadth"] >= 0.95 * x["keys"],
    ),
    Rule(
        "collapsed",
        "95% of the queries have a breadth below 1.1 keys: the softmax lets no gradient through",
        lambda x: x["breadth_p95"] < 1.1,
    ),
)


def name_of(facts: Facts) -> str:
    """What a head does; empty where no rule says."""
    return next((rule.name for rule in NAMES if rule.holds(facts)), "")


def faults_of(facts: Facts) -> list[str]:
    """What is wrong with a head."""
    return [rule.name for rule in FAULTS if rule.holds(facts)]


def near(distances: Tensor) -> Tensor:
    """Shares within `NEAR` tokens, (H,), of shares by signed log2 distance, (H, 64)."""
    bins = NEAR.bit_length() - 1  # 1, 2 to 3, 4 to 7
    return distances[:, 32 - bins : 33 + bins].sum(1)


def similar(maps: Sequence[Tensor]) -> list[tuple[int, int, float]]:
    """Pairs of heads whose maps, of any but one size, have a cosine of at least `ALIKE`.

    Returns:
        ``(one, other, cosine)``, the most alike first, at most `MOST`.
    """
    flat = torch.nn.functional.normalize(torch.stack([x.flatten() for x in maps]).float(), dim=1)
    cosine = (flat @ flat.T).triu(1)
    pairs = (cosine >= ALIKE).nonzero()
    values = cosine[pairs[:, 0], pairs[:, 1]]
    first = values.argsort(descending=True, stable=True)[:MOST]
    return [(int(pairs[i, 0]), int(pairs[i, 1]), float(values[i])) for i in first]

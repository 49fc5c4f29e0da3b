"""Two runs, row by row: is the second slower than the first?

A time alone depends on what else the machine did. A row counts as a regression only if three things
hold: our median rose by more than the threshold; it also rose by that much relative to the
fastest contestant that both runs timed beside us; and the interquartile ranges do not overlap.
"""

from __future__ import annotations

from typing import NamedTuple

from . import OURS
from .results import Row, Run
from .summary import geometric_mean

THRESHOLD = 0.10


class Change(NamedTuple):
    """A row in both runs."""

    id: str
    suite: str
    before_s: float
    after_s: float
    spread: tuple[float, float]  # half the interquartile range over the median, before and after
    relative: float | None  # after over before, each over the same rival's time in its own run
    regression: bool

    @property
    def ratio(self) -> float:
        """Our time after over before."""
        return self.after_s / self.before_s


def compare(before: Run, after: Run, threshold: float = THRESHOLD) -> list[Change]:
    """The rows that both runs hold, in the order of the second.

    Raises:
        ValueError: They have no row of ours in common; one line.
    """
    old = {_key(row): row for row in before.rows if OURS in row["contestants"]}
    both = [(old.get(_key(row)), row) for row in after.rows]
    changes = [_change(a, b, threshold) for a, b in both if a and OURS in b["contestants"]]
    if not changes:
        raise ValueError(f"bench: {before.path} and {after.path} have no row in common")
    return changes


def _key(row: Row) -> tuple[str, str, str | None]:
    return row["suite"], row["id"], row["backend"]


def _change(a: Row, b: Row, threshold: float) -> Change:
    old, new = a["contestants"][OURS], b["contestants"][OURS]
    shared = [
        name
        for name in a["contestants"]
        if name != OURS and name in b["contestants"] and a["contestants"][name]["rounds"] > 1
    ]
    relative = None
    if shared:
        rival = min(shared, key=lambda name: float(a["contestants"][name]["median_s"]))
        drift = b["contestants"][rival]["median_s"] / a["contestants"][rival]["median_s"]
        relative = new["median_s"] / old["median_s"] / drift
    slower = new["median_s"] > old["median_s"] * (1 + threshold)
    apart = new["q1_s"] > old["q3_s"]
    beside = relative is None or relative > 1 + threshold
    spread = tuple((x["q3_s"] - x["q1_s"]) / x["median_s"] / 2 for x in (old, new))
    return Change(
        id=b["id"],
        suite=b["suite"],
        before_s=old["median_s"],
        after_s=new["median_s"],
        spread=(spread[0], spread[1]),
        relative=relative,
        regression=slower and apart and beside,
    )


def means(changes: list[Change]) -> dict[str, float]:
    """The geometric mean of the ratios by suite."""
    suites = dict.fromkeys(change.suite for change in changes)
    return {s: geometric_mean(c.ratio for c in changes if c.suite == s) for s in suites}

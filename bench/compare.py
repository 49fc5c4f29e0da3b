"""Two runs, row by row: is the second slower than the first?

A time alone depends on what else the machine did. The rivals are the same code in both runs, so how
far they moved tells what the machine does by itself: all of them together is its drift, each beside
that is the noise. A row is a regression only if all of this holds:

- our median rose by more than the threshold, drift taken out, and so it did beside the fastest
  rival of both runs;
- our best round rose beside that rival's by ``BEST`` of the threshold: what disturbs a call only
  ever lengthens it;
- beside the rival both rose by more than ``SIGMAS`` times the noise;
- the middle halves of our rounds are apart, the second run's above the first's.

A row that was timed by one call, ours or the rival's, is held to twice the threshold. Noise does
not hide what a whole suite shows: it is slower if the median of its rows is, by the first rule.
"""

from __future__ import annotations

import itertools
import math
import statistics
from typing import Any, NamedTuple

import pandas as pd

from . import OURS
from .results import Row, Run
from .tables import geometric_mean, table

THRESHOLD = 0.10
SIGMAS = 4.0
BEST = 0.7
SHORT_S = 1e-3  # calls below it have a noise of their own
FEWEST = 3  # rows of a suite that is judged as one
FEW = 8  # rows whose noise says nothing: then that of all rows is taken
NORMAL = 1.4826  # of a normal distribution, the standard deviation over the median distance


class Change(NamedTuple):
    """A row in both runs."""

    id: str
    suite: str
    before_s: float
    after_s: float
    spread: tuple[float, float]  # half the interquartile range over the median, before and after
    adjusted: float  # after over before, the machine's drift taken out
    relative: float | None  # after over before, each over the same rival's time in its own run
    rounds: int  # the fewest of ours and the rival's in both runs
    regression: bool

    @property
    def ratio(self) -> float:
        """Our time after over before."""
        return self.after_s / self.before_s


class Noise(NamedTuple):
    """What the machine does by itself from one run to the next."""

    drift: float  # the factor by which all times moved
    short: float  # standard deviation of a contestant's logarithm beside that, of short calls
    long: float

    def of(self, seconds: float) -> float:
        """The deviation for calls of so many seconds."""
        return self.short if seconds < SHORT_S else self.long


def compare(before: Run, after: Run, threshold: float = THRESHOLD) -> list[Change]:
    """The rows that both runs hold, in the order of the second.

    Raises:
        ValueError: They have no row of ours in common; one line.
    """
    old = {_key(row): row for row in before.rows if OURS in row["contestants"]}
    both = [(old.get(_key(row)), row) for row in after.rows]
    pairs = [(a, b) for a, b in both if a and OURS in b["contestants"]]
    if not pairs:
        raise ValueError(f"bench: {before.path} and {after.path} have no row in common")
    found = noise(before, after)
    return [_change(a, b, threshold, found) for a, b in pairs]


def noise(before: Run, after: Run) -> Noise:
    """How far rivals moved from one run to the next; 1 and 0 without any.

    Two rivals of a row show the noise of one beside another, which is what a row is judged by.
    Where too few rows have two, the noise is that of single rivals, and larger.
    """
    old = {_key(row): row for row in before.rows}
    alone: dict[bool, list[float]] = {True: [], False: []}
    beside: dict[bool, list[float]] = {True: [], False: []}
    for row in after.rows:
        a = old.get(_key(row))
        drifts = _drifts(a, row) if a else []
        for short, drift in drifts:
            alone[short].append(drift)
        for (short, one), (_, other) in itertools.pairwise(drifts):
            beside[short].append((one - other) / math.sqrt(2))
    everything = alone[True] + alone[False]
    drift = math.exp(statistics.median(everything)) if everything else 1.0
    found = []
    for short in (True, False):
        chosen = (beside[short], alone[short], everything)
        found.append(_deviation(next((x for x in chosen if len(x) >= FEW), everything)))
    return Noise(drift, *found)


def _drifts(a: Row, b: Row) -> list[tuple[bool, float]]:
    """Of each rival of both rows whether its call is short, and by what logarithm it moved."""
    found = []
    for name in _shared(a, b):
        one, other = (x["contestants"][name] for x in (a, b))
        if min(one["rounds"], other["rounds"]) > 1:
            drift = math.log(other["median_s"] / one["median_s"])
            found.append((one["median_s"] < SHORT_S, drift))
    return found


def _deviation(values: list[float]) -> float:
    """The standard deviation, whatever a few of the values are; 0 of less than two."""
    if len(values) < 2:
        return 0.0
    middle = statistics.median(values)
    return NORMAL * statistics.median(abs(x - middle) for x in values)


def _key(row: Row) -> tuple[str, str, str | None]:
    return row["suite"], row["id"], row["backend"]


def _shared(a: Row, b: Row) -> list[str]:
    """The rivals of both rows, the fastest of the first one first."""
    names = [name for name in a["contestants"] if name != OURS and name in b["contestants"]]
    return sorted(names, key=lambda name: float(a["contestants"][name]["median_s"]))


def _change(a: Row, b: Row, threshold: float, noise_: Noise) -> Change:
    old, new = a["contestants"][OURS], b["contestants"][OURS]
    ratio = new["median_s"] / old["median_s"]
    relative, drift, drift_best = None, noise_.drift, noise_.drift
    counts = [old["rounds"], new["rounds"]]
    if shared := _shared(a, b):
        then, now = (x["contestants"][shared[0]] for x in (a, b))
        drift, drift_best = (now[name] / then[name] for name in ("median_s", "min_s"))
        relative = ratio / drift
        counts += [then["rounds"], now["rounds"]]
    allowed = threshold * (2 if min(counts) == 1 else 1)
    best = new["min_s"] / old["min_s"] / drift_best
    beyond = SIGMAS * math.sqrt(2) * noise_.of(old["median_s"])
    regression = (
        min(ratio / noise_.drift, ratio / drift) > 1 + allowed
        and best > 1 + BEST * allowed
        and math.log(min(ratio / drift, best)) > beyond
        and new["q1_s"] > old["q3_s"] * min(1.0, noise_.drift)
    )
    return Change(
        id=b["id"],
        suite=b["suite"],
        before_s=old["median_s"],
        after_s=new["median_s"],
        spread=(_spread(old), _spread(new)),
        adjusted=ratio / noise_.drift,
        relative=relative,
        rounds=min(counts),
        regression=bool(regression),
    )


def _spread(one: dict[str, Any]) -> float:
    return float((one["q3_s"] - one["q1_s"]) / one["median_s"] / 2)


def means(changes: list[Change]) -> dict[str, float]:
    """The geometric mean of the ratios by suite."""
    suites = dict.fromkeys(change.suite for change in changes)
    return {s: geometric_mean(c.ratio for c in changes if c.suite == s) for s in suites}


def slower_suites(changes: list[Change], threshold: float = THRESHOLD) -> list[str]:
    """The suites that are slower as a whole: the median of rows of several rounds is.

    Of our times without the machine's drift, and of our times beside the rivals'.
    """
    found = []
    for suite in means(changes):
        rows = [c for c in changes if c.suite == suite and c.relative is not None and c.rounds > 1]
        if len(rows) >= FEWEST:
            ours, beside = ([getattr(c, x) for c in rows] for x in ("adjusted", "relative"))
            if min(map(statistics.median, (ours, beside))) > 1 + threshold:
                found.append(suite)
    return found


def text(changes: list[Change], before: Run, after: Run, threshold: float) -> str:
    """Every row of both runs, then the means of the suites, the noise, and the regressions."""
    lines = [
        {
            f"{before.path.name} -> {after.path.name}": f"{change.suite}: {change.id}",
            "before, ms": f"{change.before_s * 1e3:.4g} ±{change.spread[0]:.0%}",
            "after, ms": f"{change.after_s * 1e3:.4g} ±{change.spread[1]:.0%}",
            "ratio": f"{change.ratio:.2f}",
            "beside rival": "-" if change.relative is None else f"{change.relative:.2f}",
            "": "slower" if change.regression else "",
        }
        for change in changes
    ]
    said = [table(pd.DataFrame(lines)), ""]
    for suite, mean in means(changes).items():
        said.append(f"{suite}: {mean:.3f} of the time before, geometric mean")
    devices = {run.facts["device"] for run in (before, after)}
    if len(devices) > 1:
        said.append(f"These are two devices: {', '.join(sorted(devices))}.")
    found = noise(before, after)
    said.append(
        f"Rivals, the same code in both runs: {found.drift:.3f} of the time before, ±"
        f"{found.short:.1%} where under {SHORT_S * 1e3:g} ms, ±{found.long:.1%} else."
    )
    slower = sum(change.regression for change in changes)
    suites = slower_suites(changes, threshold)
    whole = f", and these suites as a whole: {', '.join(suites)}" if suites else ""
    said.append(f"{slower} of {len(changes)} rows are slower{whole}.")
    return "\n".join(said)

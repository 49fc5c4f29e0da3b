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

from typing import NamedTuple

import numpy as np
import pandas as pd

from . import OURS
from .results import Run
from .tables import geometric_mean, table

THRESHOLD = 0.10
SIGMAS = 4.0
BEST = 0.7
SHORT_S = 1e-3  # calls below it have a noise of their own
FEWEST = 3  # rows of a suite that is judged as one
FEW = 8  # rows whose noise says nothing: then that of all rows is taken
NORMAL = 1.4826  # of a normal distribution, the standard deviation over the median distance
KEY = ["suite", "id", "backend"]


class Noise(NamedTuple):
    """What the machine does by itself from one run to the next."""

    drift: float  # the factor by which all times moved
    short: float  # standard deviation of a contestant's logarithm beside that, of short calls
    long: float


def _both(before: Run, after: Run) -> pd.DataFrame:
    """A line per row and contestant of both runs: ``median_s_a`` before, ``median_s_b`` after."""
    a, b = (
        pd.DataFrame(
            {**{x: row[x] for x in KEY}, "backend": str(row["backend"]), "name": name, **one}
            for row in run.rows
            for name, one in row["contestants"].items()
        )
        for run in (before, after)
    )
    found = b.merge(a, on=[*KEY, "name"], suffixes=("_b", "_a"))
    return found.assign(
        rounds=found[["rounds_a", "rounds_b"]].min(axis=1),
        ratio=found["median_s_b"] / found["median_s_a"],
        best=found["min_s_b"] / found["min_s_a"],
        short=found["median_s_a"] < SHORT_S,
    )


def noise(before: Run, after: Run) -> Noise:
    """How far rivals moved from one run to the next; 1 and 0 without any.

    Two rivals of a row show the noise of one beside another, which is what a row is judged by.
    Where too few rows have two, the noise is that of single rivals, and larger.
    """
    return _noise(_both(before, after))


def _noise(both: pd.DataFrame) -> Noise:
    rivals = both[(both["name"] != OURS) & (both["rounds"] > 1)].sort_values("median_s_a")
    alone = np.log(rivals["ratio"])
    beside = alone.groupby([rivals[x] for x in KEY]).diff(-1).dropna() / np.sqrt(2)

    def deviation(short: bool) -> float:
        """The standard deviation, whatever a few of the values are; 0 of less than two."""
        choices = [x[rivals["short"].loc[x.index] == short] for x in (beside, alone)]
        values = next((x for x in choices if len(x) >= FEW), alone)
        return NORMAL * float((values - values.median()).abs().median()) if len(values) > 1 else 0.0

    drift = float(np.exp(alone.median())) if len(alone) else 1.0
    return Noise(drift, deviation(True), deviation(False))


def compare(before: Run, after: Run, threshold: float = THRESHOLD) -> pd.DataFrame:
    """The rows that both runs hold, in the order of the second.

    Returns:
        Per row times and spreads of ours before and after; ``adjusted``, after over before, the
        machine's drift taken out; ``relative``, each over the same rival's time in its own run;
        ``rounds``, the fewest of ours and the rival's in both runs; and ``regression``.

    Raises:
        ValueError: They have no row of ours in common; one line.
    """
    both = _both(before, after)
    ours = both[both["name"] == OURS]
    if ours.empty:
        raise ValueError(f"bench: {before.path} and {after.path} have no row in common")
    drift, short, long = _noise(both)
    rivals = both[both["name"] != OURS].sort_values("median_s_a").drop_duplicates(KEY)
    rows = ours.merge(
        rivals[[*KEY, "rounds", "ratio", "best"]], "left", on=KEY, suffixes=("", "_r")
    )
    rows["adjusted"], rows["relative"] = rows["ratio"] / drift, rows["ratio"] / rows["ratio_r"]
    rows["rounds"] = rows[["rounds", "rounds_r"]].min(axis=1)
    beside = rows["relative"].fillna(rows["adjusted"])
    best = rows["best"] / rows["best_r"].fillna(drift)
    allowed = threshold * np.where(rows["rounds"] == 1, 2, 1)
    beyond = SIGMAS * np.sqrt(2) * np.where(rows["short"], short, long)
    rows["regression"] = (
        (np.minimum(rows["adjusted"], beside) > 1 + allowed)
        & (best > 1 + BEST * allowed)
        & (np.log(np.minimum(beside, best)) > beyond)
        & (rows["q1_s_b"] > rows["q3_s_a"] * min(1.0, drift))
    )
    return rows


def slower_suites(rows: pd.DataFrame, threshold: float = THRESHOLD) -> list[str]:
    """The suites that are slower as a whole: the median of rows of several rounds is.

    Of our times without the machine's drift, and of our times beside the rivals'.
    """
    judged = rows[rows["relative"].notna() & (rows["rounds"] > 1)]
    suites = judged.groupby("suite", sort=False)[["adjusted", "relative"]]
    slower = (suites.median().min(axis=1) > 1 + threshold) & (suites.size() >= FEWEST)
    return [*slower.index[slower]]


def text(rows: pd.DataFrame, before: Run, after: Run, threshold: float) -> str:
    """Every row of both runs, then the means of the suites, the noise, and the regressions."""

    def milliseconds(end: str) -> pd.Series:
        spread = (rows[f"q3_s_{end}"] - rows[f"q1_s_{end}"]) / rows[f"median_s_{end}"] / 2
        times = rows[f"median_s_{end}"] * 1e3
        return times.map("{:.4g}".format) + " ±" + spread.map("{:.0%}".format)

    columns = {
        f"{before.path.name} -> {after.path.name}": rows["suite"] + ": " + rows["id"],
        "before, ms": milliseconds("a"),
        "after, ms": milliseconds("b"),
        "ratio": rows["ratio"].map("{:.2f}".format),
        "beside rival": rows["relative"].map(lambda x: "-" if pd.isna(x) else f"{x:.2f}"),
        "": rows["regression"].map({True: "slower", False: ""}),
    }
    said = [table(pd.DataFrame(columns)), ""]
    for suite, ratios in rows.groupby("suite", sort=False)["ratio"]:
        said.append(f"{suite}: {geometric_mean(ratios):.3f} of the time before, geometric mean")
    devices = {run.facts["device"] for run in (before, after)}
    if len(devices) > 1:
        said.append(f"These are two devices: {', '.join(sorted(devices))}.")
    drift, short, long = noise(before, after)
    said.append(
        f"Rivals, the same code in both runs: {drift:.3f} of the time before, ±{short:.1%} where"
        f" under {SHORT_S * 1e3:g} ms, ±{long:.1%} else."
    )
    suites = slower_suites(rows, threshold)
    whole = f", and these suites as a whole: {', '.join(suites)}" if suites else ""
    said.append(f"{rows['regression'].sum()} of {len(rows)} rows are slower{whole}.")
    return "\n".join(said)

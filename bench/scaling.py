"""How time and memory grow with length, batch, heads and head size: measured, and drawn.

Each series lets one size grow; ours is timed alone, by one thread in CPU time.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from . import OURS, ROOT, plots
from .clock import HostClock
from .environment import Settings
from .grid import DTYPE_NAMES, AttentionCase
from .pages import fill, provenance
from .problem import pass_of, problem
from .race import Entries, Limits, Race
from .results import Row, Run
from .rivals.attention import ours

WORKS = ("forward", "forward+backward")
DTYPES = ("float32", "bfloat16")
LENGTHS = (64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096)
LIMITS = Limits(budget_s=0.2, most_rounds=60)
LONG = 512  # the growth with the length is fitted from here on: shorter calls are mostly overhead
COLORS = ("#c1272d", "#e08a8d", "#0000a7", "#7a7ad6")


class Series(NamedTuple):
    """Sizes of which one grows."""

    title: str  # in files of results
    name: str  # what grows
    column: str  # in files of results
    sizes: tuple[tuple[int, int, int, int], ...]  # B, H, T, D


SERIES = FULL, HEADS, SIZE = (
    Series("length, full", "length", "T", tuple((1, 4, T, 64) for T in LENGTHS)),
    Series(
        "batch times heads", "batch", "B", tuple((B, 4, 256, 64) for B in (1, 2, 3, 4, 8, 16, 32))
    ),
    Series(
        "head size", "head size", "D", tuple((2, 4, 512, D) for D in (16, 32, 48, 64, 96, 128, 256))
    ),
)
PANELS = (
    (FULL, "seconds", "time, ms", 1e3),
    (FULL, "peak_bytes", "memory, MB", 1e-6),
    (HEADS, "seconds", "time, ms", 1e3),
    (SIZE, "seconds", "time, ms", 1e3),
)


def measure(settings: Settings) -> list[Row]:
    """Points of all series by dtype and pass: seconds (lower quartile), bytes beside inputs."""
    rows = []
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    clock = HostClock(1)
    for series, dtype, work in itertools.product(SERIES, DTYPES, WORKS):
        for B, H, T, D in series.sizes:
            case = AttentionCase(B, H, T, T, D, dtype, False, work)
            call = pass_of(problem(case), ours(settings.backend).forward)
            race = Race(case, Entries({OURS: [call]}, {}), clock, LIMITS, None)
            for _ in range(race.rounds):
                race.our_turn()
            found = race.row()["contestants"][OURS]
            sizes = {"B": B, "H": H, "T": T, "D": D, "dtype": dtype, "work": work}
            figures = {"seconds": found["q1_s"], "peak_bytes": found["peak_bytes"]}
            rows.append({"series": series.title, "clock": clock.name, **sizes, **figures})
    torch.set_num_threads(before)
    return rows


def write(run: Run, root: Path = ROOT) -> list[Path]:
    """Fill docs/scaling.md, and draw its plot."""
    folder = root / "docs" / "performance"
    [picture] = _draw(run, folder)
    text = f"{provenance(run)}\n\n![How time and memory grow](performance/{picture})"
    return [fill(root / "docs" / "scaling.md", text), folder / picture]


def exponent(xs: Any, ys: Any) -> float:
    """The slope of a line through the points' logarithms: 2 where twice x gives four times y."""
    return float(np.polyfit(np.log(np.asarray(xs, float)), np.log(np.asarray(ys, float)), 1)[0])


def _draw(run: Run, folder: Path) -> list[str]:
    """A panel for each size that grows, both axes logarithmic; its title has the exponents."""
    points = pd.DataFrame(run.rows).dropna(subset=["seconds"])
    figure, axes = plots.pyplot().subplots(2, 2, figsize=(9, 6.6), layout="constrained")
    for axis, (series, column, label, scale) in zip(axes.flat, PANELS, strict=True):
        chosen = points[points["series"] == series.title]
        exponents = []
        kernels = chosen.groupby(["work", "dtype"], sort=False)
        for ((work, dtype), rows), color in zip(kernels, COLORS, strict=False):
            xs, ys = rows[series.column], rows[column] * scale
            axis.plot(xs, ys, "o-", c=color, ms=3, lw=1, label=f"{work}, {DTYPE_NAMES[dtype]}")
            fitted = (xs >= (LONG if series is FULL else 0)) & (ys > 0)
            exponents.append(exponent(xs[fitted], ys[fitted]))
        lengths = sorted(set(chosen[series.column]))
        if column == "peak_bytes":  # of 4 heads in fp32
            scores = [4 * 4 * T * T * scale for T in lengths]
            axis.plot(lengths, scores, ":", c="#8a8a8a", label="T x S scores, fp32")
        reach = plots.reach(exponents, ".1f")
        what = label.partition(",")[0]
        title = f"{what} grows as the {series.name} to the power of {reach}"
        axis.set(xscale="log", xlabel=series.name, ylabel=label, title=title)
        plots.plain_log(axis.yaxis)
        plots.plain_ticks(axis.xaxis, lengths)
    plots.legend_below(figure, axes.flat)
    return plots.save(figure, run, folder, "scaling")

"""Plots of a run, SVG and PNG: throughput, share of the limit and memory over length; latency.

A panel's title is what its points say; who is who stands below all panels.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import OURS, SDPA
from .grid import DTYPE_NAMES
from .results import Row, Run, case_name

COLORS = {  # one per contestant, whatever the plot
    OURS: "#c1272d",
    "torch.sdpa flash": "#0000a7",
    "torch.sdpa": "#0000a7",
    "torch.sdpa cudnn": "#008176",
    "torch.sdpa efficient": "#7f5fa8",
    "torch.sdpa math": "#8a8a8a",
    "FlexAttention": "#eecc16",
    "ONNX Runtime": "#1b9e4b",
    "flash_attn": "#005f8a",
    "eager": "#b3b3b3",
}
PASSES = ("forward", "backward", "forward+backward")
SMALL_S = 1e-3  # rows of the latency plot take less
MOST_BARS = 24
FORMATS = ("svg", "png")

Lines = dict[tuple[str, int], dict[int, float]]  # contestant, D -> length -> value


def draw(run: Run, folder: Path) -> list[str]:
    """Draw a run's plots.

    Args:
        run: Timed rows.
        folder: Where ``<device>-<threads>t-<plot>.svg`` and ``.png`` are written.

    Returns:
        The names of the SVG files, in the order in which they are shown.
    """
    unit, scale = ("TFLOP/s", 1e-3) if "gpu" in run.facts["machine"] else ("GFLOP/s", 1.0)
    return [
        *_over_length(run, folder, "throughput", unit, lambda x: x["gflops"] * scale, _faster),
        *_over_length(run, folder, "share", "share of the limit, %", _share, _of_limit),
        *_over_length(run, folder, "memory", "memory beside the inputs, MB", _megabytes, _leaner),
        *_latency(run, folder),
    ]


def pyplot() -> Any:
    """matplotlib, set up so that the same rows give the same files."""
    import matplotlib
    from matplotlib import pyplot

    matplotlib.use("Agg")
    settings = {"svg.hashsalt": "attnfast", "svg.fonttype": "none", "font.size": 8}
    spines = {"axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 8}
    matplotlib.rcParams.update({**settings, **spines, "axes.grid": True, "grid.alpha": 0.4})
    return pyplot


def plain_ticks(axis: Any, values: list[int]) -> None:
    """A logarithmic axis whose ticks are values that were measured, as far as there is room."""
    kept = values[:1]
    for value in values:
        kept += [value] if value >= 1.9 * kept[-1] else []
    axis.set_ticks(kept, [str(x) for x in kept])
    axis.set_ticks([], minor=True)


def plain_log(axis: Any) -> None:
    """A logarithmic axis of round numbers, as they are written."""
    from matplotlib import ticker

    axis.axes.set_yscale("log")
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(ticker.FuncFormatter(lambda y, _: f"{y:g}"))
    axis.set_minor_formatter(ticker.NullFormatter())


def save(figure: Any, run: Run, folder: Path, name: str) -> list[str]:
    """Write a figure in every format; the name of the SVG file."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{run.facts['device']}-{run.facts['settings']['threads']}t-{name}"
    for kind in FORMATS:
        metadata = {"Date": None} if kind == "svg" else {"Software": None}
        figure.savefig(folder / f"{stem}.{kind}", dpi=110, metadata=metadata)
    pyplot().close(figure)
    return [f"{stem}.svg"]


def legend_below(figure: Any, axes: Any) -> None:
    """One legend for all panels, where no curve is."""
    found = {
        label: handle
        for axis in axes
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=4, frameon=False)


def _share(contestant: dict[str, Any]) -> float | None:
    share = contestant.get("share")
    return 100 * share if share else None


def _megabytes(contestant: dict[str, Any]) -> float | None:
    peak = contestant.get("peak_bytes")
    return peak / 1e6 if peak else None


def _faster(lines: Lines) -> str:
    """How many times as fast ours is as the fastest rival, over all points."""
    ratios = [y / max(others) for y, others in _beside(lines)]
    return f"ours {reach(ratios, '.1f')} times as fast as the best rival" if ratios else ""


def _of_limit(lines: Lines) -> str:
    ours = [y for (name, _), line in lines.items() if name == OURS for y in line.values()]
    return f"ours at {reach(ours, '.0f')}% of what the machine can do" if ours else ""


def _leaner(lines: Lines) -> str:
    """How much more or less than torch's fused kernel."""
    fused = {key: line for key, line in lines.items() if key[0] in (OURS, SDPA)}
    ratios = [y / min(others) for y, others in _beside(fused)]
    return f"ours {reach(ratios, '.2f')} times the memory of {SDPA}" if ratios else ""


def _beside(lines: Lines) -> list[tuple[float, list[float]]]:
    """Our points, each with those of the rivals at the same length and head size."""
    found = []
    for (name, D), line in lines.items():
        for length, y in line.items() if name == OURS else ():
            others = [
                other[length]
                for (who, size), other in lines.items()
                if who != OURS and size == D and length in other
            ]
            if others:
                found.append((y, others))
    return found


def reach(values: list[float], form: str) -> str:
    """The least and the largest value in words."""
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} to {high}"


def _over_length(
    run: Run,
    folder: Path,
    name: str,
    label: str,
    value: Callable[[dict[str, Any]], float | None],
    finding: Callable[[Lines], str],
) -> list[str]:
    """One panel per pass and dtype; causal self-attention, a line per contestant and D."""
    panels = [
        (f"{work.replace('+', ' + ')}, {DTYPE_NAMES[dtype]}, causal", lines)
        for work in PASSES
        for dtype in DTYPE_NAMES
        if (lines := _lines(run.rows, work, dtype, value))
    ]
    if not panels:
        return []
    height = -(-len(panels) // 2)
    figure, axes = pyplot().subplots(
        height, 2, figsize=(9, 0.8 + 2.6 * height), squeeze=False, layout="constrained"
    )
    for axis, (title, lines) in zip(axes.flat, panels, strict=False):
        for (contestant, D), points in sorted(lines.items(), key=lambda x: (x[0][0] != OURS, x[0])):
            axis.plot(
                *zip(*sorted(points.items()), strict=True),
                marker="o" if D == 64 else "s",
                markersize=3,
                linestyle="-" if D == 64 else "--",
                linewidth=1.8 if contestant == OURS else 1,
                color=COLORS.get(contestant),
                label=f"{contestant}, D {D}",
            )
        axis.set(xlabel="length", ylabel=label, xscale="log", title=f"{title}\n{finding(lines)}")
        plain_ticks(axis.xaxis, sorted({length for line in lines.values() for length in line}))
        if name == "memory":
            plain_log(axis.yaxis)
        else:
            axis.set_ylim(bottom=0)
    for axis in list(axes.flat)[len(panels) :]:
        axis.remove()
    legend_below(figure, figure.axes)
    return save(figure, run, folder, name)


def _lines(
    rows: list[Row], work: str, dtype: str, value: Callable[[dict[str, Any]], float | None]
) -> Lines:
    """Values by contestant, D and length; of several rows of a length, the one of most heads."""
    found: Lines = {}
    chosen = [row for row in rows if row["suite"] == work]
    for row in sorted(chosen, key=lambda row: row["case"]["B"] * row["case"]["H"]):
        case = row["case"]
        wanted = case["dtype"] == dtype and case["causal"]
        if not wanted or case["T"] != case["S"] or case["D"] not in (64, 128):
            continue
        for name, contestant in row["contestants"].items():
            if y := value(contestant):
                found.setdefault((name, case["D"]), {})[case["T"]] = y
    return found


def _latency(run: Run, folder: Path) -> list[str]:
    """The shortest rows: ours beside the fastest rival."""
    rows = [r for r in run.rows if r["ratio"] and r["contestants"][OURS]["median_s"] < SMALL_S]
    rows = sorted(rows, key=lambda row: float(row["contestants"][OURS]["median_s"]))[:MOST_BARS]
    if not rows:
        return []
    figure, axis = pyplot().subplots(figsize=(9, 1.0 + 0.24 * len(rows)), layout="constrained")
    names = [f"{r['suite']}, {DTYPE_NAMES[r['case']['dtype']]}: {case_name(r)}" for r in rows]
    for shift, label, color in ((-0.2, OURS, COLORS[OURS]), (0.2, "fastest rival", "#0000a7")):
        times = [
            row["contestants"][OURS if label == OURS else row["rival"]]["median_s"] * 1e6
            for row in rows
        ]
        axis.barh([i + shift for i in range(len(rows))], times, 0.38, color=color, label=label)
    axis.set_yticks(range(len(rows)), names, fontsize=6)
    axis.invert_yaxis()
    faster = sum(row["ratio"] >= 1 for row in rows)
    title = f"ours is the faster in {faster} of the {len(rows)} shortest rows"
    axis.set(xlabel="µs per call", title=title)
    legend_below(figure, [axis])
    return save(figure, run, folder, "latency")

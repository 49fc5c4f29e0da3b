"""Plots of a run, SVG and PNG: throughput, share of the limit and memory over length; latency."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import OURS
from .model import Fitted
from .results import Row, Run
from .summary import DTYPE_NAMES, case_name, compared

STYLES = {  # one colour per contestant, whatever the plot
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
KERNEL_COLORS = ("#c1272d", "#0000a7", "#eecc16", "#008176")  # of the scaling study
PASSES = ("forward", "backward", "forward+backward")
SMALL_S = 1e-3  # rows of the latency plot take less
MOST_BARS = 24
FORMATS = ("svg", "png")

Value = Callable[[dict[str, Any]], float | None]  # of a contestant of a row


def draw(run: Run, folder: Path) -> list[str]:
    """Draw a run's plots.

    Args:
        run: Timed rows.
        folder: Where ``<device>-<threads>t-<plot>.svg`` and ``.png`` are written.

    Returns:
        The names of the SVG files, in the order in which they are shown.
    """
    drawn = []
    for name, label, value in (
        ("throughput", "TFLOP/s", lambda x: x["gflops"] / 1e3),
        ("share", "share of the limit", lambda x: x.get("share")),
        ("memory", "memory beside the inputs, MB", _megabytes),
    ):
        drawn += _over_length(run, folder, name, label, value)
    return drawn + _latency(run, folder)


def _pyplot() -> Any:
    """matplotlib, set up so that the same rows give the same files."""
    import matplotlib
    from matplotlib import pyplot

    matplotlib.use("Agg")
    matplotlib.rcParams.update(
        {"svg.hashsalt": "attnfast", "svg.fonttype": "none", "font.size": 8, "axes.grid": True}
    )
    return pyplot


def _megabytes(contestant: dict[str, Any]) -> float | None:
    peak = contestant.get("peak_bytes")
    return peak / 1e6 if peak else None


def _over_length(run: Run, folder: Path, name: str, label: str, value: Value) -> list[str]:
    """One panel per pass and dtype; causal self-attention, a line per contestant and D."""
    panels = [
        (f"{work}, {DTYPE_NAMES[dtype]}", lines)
        for work in PASSES
        for dtype in DTYPE_NAMES
        if (lines := _lines(run.rows, work, dtype, value))
    ]
    if not panels:
        return []
    height = -(-len(panels) // 2)
    figure, axes = _pyplot().subplots(height, 2, figsize=(9, 2.8 * height), squeeze=False)
    for axis, (title, lines) in zip(axes.flat, panels, strict=False):
        for (contestant, D), points in sorted(lines.items(), key=lambda x: (x[0][0] != OURS, x[0])):
            xs, ys = zip(*sorted(points), strict=True)
            axis.plot(
                xs,
                ys,
                marker="o" if D == 64 else "s",
                markersize=3,
                linestyle="-" if D == 64 else "--",
                linewidth=1.8 if contestant == OURS else 1,
                color=STYLES.get(contestant),
                label=f"{contestant}, D {D}",
            )
        axis.set(title=f"{title}, causal", xlabel="length", ylabel=label, xscale="log")
        if name == "memory":
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
        axis.legend(fontsize=5, ncols=2)
    for axis in list(axes.flat)[len(panels) :]:
        axis.remove()
    return _save(figure, run, folder, name)


def _lines(
    rows: list[Row], work: str, dtype: str, value: Value
) -> dict[tuple[str, int], list[tuple[int, float]]]:
    """Points (length, value) by contestant and D; of several rows of a length, the largest."""
    best: dict[tuple[str, int], dict[int, tuple[int, float]]] = {}
    for row in rows:
        case = row["case"]
        wanted = row["suite"] == work and case["dtype"] == dtype and case["causal"]
        if not wanted or case["T"] != case["S"] or case["D"] not in (64, 128):
            continue
        heads = case["B"] * case["H"]
        for name, contestant in row["contestants"].items():
            y = value(contestant)
            line = best.setdefault((name, case["D"]), {})
            if y and heads >= line.get(case["T"], (0, 0.0))[0]:
                line[case["T"]] = (heads, y)
    return {
        key: [(length, y) for length, (_, y) in line.items()] for key, line in best.items() if line
    }


def _latency(run: Run, folder: Path) -> list[str]:
    """The shortest rows: ours beside the fastest rival."""
    rows = [r for r in compared(run.rows) if r["contestants"][OURS]["median_s"] < SMALL_S]
    rows = sorted(rows, key=lambda row: float(row["contestants"][OURS]["median_s"]))[:MOST_BARS]
    if not rows:
        return []
    figure, axis = _pyplot().subplots(figsize=(9, 0.6 + 0.24 * len(rows)))
    names = [f"{r['suite']}, {DTYPE_NAMES[r['case']['dtype']]}: {case_name(r)}" for r in rows]
    for shift, label, color in ((-0.2, OURS, STYLES[OURS]), (0.2, "fastest rival", "#0000a7")):
        times = [
            row["contestants"][OURS if label == OURS else row["rival"]]["median_s"] * 1e6
            for row in rows
        ]
        axis.barh([i + shift for i in range(len(rows))], times, 0.38, color=color, label=label)
    axis.set_yticks(range(len(rows)), names, fontsize=6)
    axis.invert_yaxis()
    axis.set(xlabel="us per call", title="latency at small sizes")
    axis.legend(fontsize=6)
    return _save(figure, run, folder, "latency")


def scaling(run: Run, kernels: list[Fitted], folder: Path) -> list[str]:
    """Time over every size that grows: points are measured, lines are the model.

    Returns:
        The name of the SVG file; the PNG lies beside it.
    """
    titles = list(dict.fromkeys(row["series"] for row in run.rows))
    figure, axes = _pyplot().subplots(3, 2, figsize=(9, 9.6), squeeze=False)
    for axis, title in zip(axes.flat, titles, strict=False):
        for kernel, color in zip(
            kernels, ("#c1272d", "#0000a7", "#eecc16", "#008176"), strict=True
        ):
            points = [
                (row, predicted)
                for row, predicted in zip(kernel.rows, kernel.predicted, strict=True)
                if row["series"] == title
            ]
            if not points:
                continue
            name = next(x for x in ("T", "B", "D") if len({row[x] for row, _ in points}) > 1)
            xs = [row[name] * (row["H"] if name == "B" else 1) for row, _ in points]
            label = f"{DTYPE_NAMES[kernel.dtype]}, {kernel.work}"
            axis.plot(
                xs, [row["seconds"] * 1e3 for row, _ in points], "o", color=color, markersize=3
            )
            axis.plot(
                xs, [guess * 1e3 for _, guess in points], color=color, label=label, linewidth=1
            )
        axis.set(title=title, xscale="log", yscale="log", ylabel="ms: points measured, lines model")
    axes[0, 0].legend(fontsize=6)
    for axis in list(axes.flat)[len(titles) :]:
        axis.remove()
    return _save(figure, run, folder, "scaling")


def _save(figure: Any, run: Run, folder: Path, name: str) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    threads = run.facts["settings"]["threads"]
    stem = f"{run.facts['device']}-{threads}t-{name}"
    figure.tight_layout()
    for kind in FORMATS:
        metadata = {"Date": None} if kind == "svg" else {"Software": None}
        figure.savefig(folder / f"{stem}.{kind}", dpi=110, metadata=metadata)
    _pyplot().close(figure)
    return [f"{stem}.svg"]

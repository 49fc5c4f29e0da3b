"""What the demos draw alike: maps of attention weights, losses, files of pictures."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import font_manager
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from demo.files import written_whole

COLOURS = "viridis"  # grows steadily brighter, to colour-blind eyes and in grey too
LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#f0e442")
STYLES = ("-", "--", ":", "-.")
COLUMNS = 4
# Some font for Chinese, if there is any; without one its letters are boxes.
CHINESE = ("Noto Sans CJK SC", "Noto Sans SC", "WenQuanYi Zen Hei", "Source Han Sans SC", "SimHei")


def draw_map(
    axes: Axes, weights: np.ndarray, rows: Sequence[str], columns: Sequence[str], size: float
) -> Any:
    """One head's weights [T, S], with the words of rows and columns; returns the image."""
    norm = PowerNorm(0.5, 0.0, 1.0)
    image = axes.imshow(weights, cmap=COLOURS, norm=norm, aspect="auto")
    axes.set_xticks(range(len(columns)), literal(columns), rotation=90, fontsize=size)
    axes.set_yticks(range(len(rows)), literal(rows), fontsize=size)
    axes.tick_params(length=0)
    return image


def draw_scale(figure: Any, image: Any, panels: Any) -> None:
    """What the colours of the maps mean."""
    bar = figure.colorbar(image, ax=panels, shrink=0.5, aspect=40, pad=0.015)
    bar.set_label("attention weight")
    bar.set_ticks([0, 0.05, 0.2, 0.5, 1])


def draw_losses(
    path: Path, losses: Mapping[str, Sequence[float]], what: str, title: str, window: int
) -> None:
    """Save the training losses of one or both models over the steps, smoothed.

    Args:
        path: the PNG file.
        losses: of each step, by the model's name.
        what: a loss is.
        title: with a place for where the smoothed losses end.
        window: steps of the running mean.
    """
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    ends = []
    for (name, values), colour, line in zip(losses.items(), LINES, STYLES, strict=False):
        steps, means = np.arange(1, len(values) + 1), smoothed(values, window)
        axes.plot(steps, values, ".", color=colour, alpha=0.25, markersize=4)
        axes.plot(steps, means, line, color=colour, lw=2.2, label=name)
        ends.append(f"{means[-1]:.2f} after {len(values)} steps ({name})")
    axes.set_xlabel("step")
    axes.set_ylabel(f"{what}\n(dots: each step, lines: running mean)")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    tidy(axes)
    axes.set_title(title.format(", ".join(ends)), loc="left", fontsize=10)
    save(figure, path, 120)


def smoothed(values: Sequence[float], window: int) -> np.ndarray:
    """The mean of the last `window` values at every step."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def tidy(axes: Axes) -> None:
    """Without a frame."""
    axes.spines[["top", "right"]].set_visible(False)


def literal(texts: Sequence[str]) -> list[str]:
    """Without matplotlib's mathematical notation."""
    return [text.replace("$", r"\$") for text in texts]


def save(figure: Figure, path: Path, dpi: int) -> None:
    """Write the picture whole; letters that no font has are no news."""
    known = {font.name for font in font_manager.fontManager.ttflist}
    fonts = ["DejaVu Sans", *(name for name in CHINESE if name in known)]
    for text in figure.findobj(matplotlib.text.Text):
        text.set_fontfamily(fonts)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        with written_whole(path) as temporary:
            figure.savefig(temporary, dpi=dpi)
    plt.close(figure)

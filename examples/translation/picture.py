"""Pictures: cross-attention of one sentence, breadth and focus over training, losses."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import font_manager
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure, SubFigure
from search_demo.files import written_whole
from torch import Tensor

from translation.watch import Look

COLOURS = "viridis"  # grows steadily brighter, to colour-blind eyes and in grey too
LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#f0e442")
STYLES = ("-", "--", ":", "-.")
# Some font for Chinese, if there is any; without one its letters are boxes.
CHINESE = ("Noto Sans CJK SC", "Noto Sans SC", "WenQuanYi Zen Hei", "Source Han Sans SC", "SimHei")
NAMES = {
    "encoder": "the source at itself",
    "decoder": "the translation at itself",
    "cross": "the translation at the source",
}
COLUMNS = 4


def draw_cross_attention(
    path: Path, maps: Tensor, sources: Sequence[str], targets: Sequence[str], layer: int
) -> None:
    """Save where a translation's tokens look in the source, a panel per head and their mean.

    Args:
        path: the PNG file.
        maps: fp32 [H, T, S], the weights of one layer of the decoder.
        sources: the S tokens.
        targets: the T tokens that were being told.
        layer: which layer it is, from 0.
    """
    panels = np.concatenate([maps.numpy(), maps.numpy().mean(0, keepdims=True)])
    columns = COLUMNS if len(panels) > 6 else min(3, len(panels))
    rows = -(-len(panels) // columns)
    height = 0.9 + 0.24 * len(targets)
    width = 1.2 + 0.26 * len(sources)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(max(9, columns * width), 1.2 + rows * max(2.6, height)),
        layout="constrained",
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    norm = PowerNorm(0.5, 0.0, 1.0)
    for index, panel in enumerate(axes.flat):
        if index >= len(panels):
            panel.set_axis_off()
            continue
        image = panel.imshow(panels[index], cmap=COLOURS, norm=norm, aspect="auto")
        name = "all heads, mean" if index == len(panels) - 1 else f"head {index + 1}"
        panel.set_title(name, fontsize=10)
        panel.set_xticks(range(len(sources)), _plain(sources), rotation=90, fontsize=8)
        panel.set_yticks(range(len(targets)), _plain(targets), fontsize=8)
        panel.tick_params(length=0, labelbottom=True)
    figure.suptitle(_strongest(panels[-1], sources, targets, layer), fontweight="bold")
    figure.supylabel("telling this token, it looks …")
    figure.supxlabel("… at this token of the source")
    bar = figure.colorbar(image, ax=axes, shrink=0.6, aspect=40, pad=0.015)
    bar.set_label("attention weight")
    bar.set_ticks([0, 0.05, 0.2, 0.5, 1])
    _save(figure, path, 130)


def _strongest(mean: np.ndarray, sources: Sequence[str], targets: Sequence[str], layer: int) -> str:
    """The layer's title: the words that look hardest, over all heads."""
    best = sorted(((mean[t].max(), t) for t in range(len(targets))), reverse=True)[:3]
    told = ", ".join(
        f"“{targets[t]}” at “{sources[int(mean[t].argmax())]}” ({share:.0%})" for share, t in best
    )
    title = f"Decoder layer {layer + 1}, from the translation to the source: {told}"
    return "\n".join(_plain(textwrap.wrap(title, 95)))


def draw_habits(path: Path, looks: Sequence[Look]) -> None:
    """Save breadth and focus of every layer and head over the steps, a panel per layer."""
    kinds = list(looks[0].breadth)
    layers = len(looks[0].breadth[kinds[0]])
    size = (4.3 * layers + 0.6, 4.7 * len(kinds))
    figure = plt.figure(figsize=size, layout="constrained", facecolor="white")
    for kind, part in zip(kinds, figure.subfigures(len(kinds), 1, squeeze=False).flat, strict=True):
        _draw_kind(part, kind, layers, looks)
    _save(figure, path, 110)


def _draw_kind(figure: SubFigure, kind: str, layers: int, looks: Sequence[Look]) -> None:
    """Two rows, breadth and focus; a column per layer; a line per head."""
    panels = figure.subplots(2, layers, sharex=True, sharey="row", squeeze=False)
    steps = [look.step for look in looks]
    broadest = max(look.breadth[kind].max().item() for look in looks)
    for row, (measure, top) in enumerate({"breadth": 1.05 * broadest, "focus": 1.0}.items()):
        for layer in range(layers):
            axes = panels[row, layer]
            heads = np.stack([getattr(look, measure)[kind][layer].numpy() for look in looks])
            for head in range(heads.shape[1]):
                style = STYLES[head // len(LINES) % len(STYLES)]
                colour = LINES[head % len(LINES)]
                axes.plot(steps, heads[:, head], style, color=colour, label=f"head {head + 1}")
            axes.set_ylim(0, top)
            _tidy(axes)
            if row == 0:
                axes.set_title(f"layer {layer + 1}", fontsize=10)
            else:
                axes.set_xlabel("step")
        panels[row, 0].set_ylabel(
            "breadth: tokens looked at" if row == 0 else "focus: the largest weight"
        )
    panels[0, 0].legend(frameon=False, fontsize=8, ncols=4, loc="lower left")
    first, last = (
        [float(getattr(look, m)[kind].mean()) for m in ("breadth", "focus")]
        for look in (looks[0], looks[-1])
    )
    figure.suptitle(
        f"{NAMES[kind].capitalize()}, means over layers and heads:\n"
        f"breadth {first[0]:.1f} to {last[0]:.1f} tokens, focus {first[1]:.2f} to {last[1]:.2f}",
        fontweight="bold",
        fontsize=10 if layers > 1 else 8,
    )


def draw_losses(path: Path, losses: Mapping[str, Sequence[float]]) -> None:
    """Save the training losses of one or both models over the steps, smoothed."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for (name, values), colour, line in zip(losses.items(), LINES, STYLES, strict=False):
        steps = np.arange(1, len(values) + 1)
        axes.plot(steps, values, ".", color=colour, alpha=0.2, markersize=3)
        axes.plot(steps, smoothed(values), line, color=colour, lw=2.2, label=name)
    axes.set_xlabel("step")
    axes.set_ylabel("loss of a token, with dropout\n(dots: each step, lines: running mean)")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    _tidy(axes)
    ends = ", ".join(
        f"{smoothed(values)[-1]:.2f} after {len(values)} steps ({name})"
        for name, values in losses.items()
    )
    axes.set_title(f"The training loss comes down to {ends}", loc="left", fontsize=10)
    _save(figure, path, 120)


def smoothed(values: Sequence[float], window: int = 20) -> np.ndarray:
    """The mean of the last `window` values at every step."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _plain(texts: Sequence[str]) -> list[str]:
    """Without matplotlib's mathematical notation."""
    return [text.replace("$", r"\$") for text in texts]


def _save(figure: Figure, path: Path, dpi: int) -> None:
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

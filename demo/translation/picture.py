"""Cross-attention of one sentence, and breadth and focus over training."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import SubFigure
from torch import Tensor

from demo.picture import COLUMNS, LINES, STYLES, draw_map, draw_scale, literal, save, tidy
from demo.translation.watch import Look

NAMES = {
    "encoder": "the source at itself",
    "decoder": "the translation at itself",
    "cross": "the translation at the source",
}


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
    for index, panel in enumerate(axes.flat):
        if index >= len(panels):
            panel.set_axis_off()
            continue
        image = draw_map(panel, panels[index], targets, sources, 8)
        name = "all heads, mean" if index == len(panels) - 1 else f"head {index + 1}"
        panel.set_title(name, fontsize=10)
        panel.tick_params(labelbottom=True)
    figure.suptitle(_strongest(panels[-1], sources, targets, layer), fontweight="bold")
    figure.supylabel("telling this token, it looks …")
    figure.supxlabel("… at this token of the source")
    draw_scale(figure, image, axes)
    save(figure, path, 130)


def _strongest(mean: np.ndarray, sources: Sequence[str], targets: Sequence[str], layer: int) -> str:
    """The layer's title: the words that look hardest, over all heads."""
    best = sorted(((mean[t].max(), t) for t in range(len(targets))), reverse=True)[:3]
    told = ", ".join(
        f"“{targets[t]}” at “{sources[int(mean[t].argmax())]}” ({share:.0%})" for share, t in best
    )
    title = f"Decoder layer {layer + 1}, from the translation to the source: {told}"
    return "\n".join(literal(textwrap.wrap(title, 95)))


def draw_habits(path: Path, looks: Sequence[Look]) -> None:
    """Save breadth and focus of every layer and head over the steps, a panel per layer."""
    kinds = list(looks[0].breadth)
    layers = len(looks[0].breadth[kinds[0]])
    size = (4.3 * layers + 0.6, 4.7 * len(kinds))
    figure = plt.figure(figsize=size, layout="constrained", facecolor="white")
    for kind, part in zip(kinds, figure.subfigures(len(kinds), 1, squeeze=False).flat, strict=True):
        _draw_kind(part, kind, layers, looks)
    save(figure, path, 110)


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
            tidy(axes)
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

"""Where the words of a sentence look, and breadth and focus of every head."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from matplotlib.patches import Rectangle
from torch import Tensor

from demo.picture import COLOURS, COLUMNS, draw_map, draw_scale, save
from demo.search.look import habits

SPREAD = 0.2  # less than this is no habit worth a name


def draw_attention(
    path: Path, maps: Tensor, words: Sequence[str], layer: int, breadth: Tensor, focus: Tensor
) -> None:
    """Save one layer's maps, a panel per head, beside breadth and focus of all layers.

    Args:
        path: the PNG file.
        maps: (heads, L, L), the layer's weights.
        words: the L tokens.
        layer: which layer it is, from 0.
        breadth: (layers, heads), means over the corpus.
        focus: (layers, heads), means over the corpus.
    """
    figure = plt.figure(figsize=(18, 9.6), layout="constrained", facecolor="white")
    left, right = figure.subfigures(1, 2, width_ratios=[1.75, 1], wspace=0.03)
    _draw_maps(left, maps.numpy(), words, layer)
    upper, lower = right.subfigures(2, 1, hspace=0.04)
    _draw_table(
        upper,
        breadth.numpy(),
        "Breadth: how many words a word attends to",
        "exp of the entropy, mean over the corpus",
        layer,
        "{:.0f}",
    )
    _draw_table(
        lower,
        focus.numpy(),
        "Focus: the largest weight a word gives",
        "mean over the corpus",
        layer,
        "{:.2f}",
    )
    save(figure, path, 110)


def _draw_maps(figure: SubFigure, maps: np.ndarray, words: Sequence[str], layer: int) -> None:
    heads = len(maps)
    rows = -(-heads // COLUMNS)
    panels = figure.subplots(rows, COLUMNS, sharex=True, sharey=True, squeeze=False)
    size = 9 if len(words) <= 14 else 7
    for head, axes in enumerate(panels.flat):
        image = draw_map(axes, maps[head], words, words, size)
        axes.set_title(_head_title(head, maps[head]), fontsize=9.5)
    figure.suptitle(_maps_title(maps, layer), fontsize=14, fontweight="bold")
    figure.supylabel("this word looks …", fontsize=12)
    figure.supxlabel("… at this word", fontsize=12)
    draw_scale(figure, image, panels)


def _head_title(head: int, weights: np.ndarray) -> str:
    """The head's number and its one or two strongest habits."""
    told = [f"{share:.0%} {place}" for place, share in habits(weights)[:2] if share > SPREAD]
    return f"head {head + 1}: {', '.join(told) or 'spread out'}"


def _maps_title(maps: np.ndarray, layer: int) -> str:
    """What the layer's heads do, the most common habit first."""
    counts: dict[str, int] = {}
    for weights in maps:
        place, share = habits(weights)[0]
        where = f"the {place} word" if place in ("previous", "next") else place
        name = f"mostly at {where}" if share > SPREAD else "at many words"
        counts[name] = counts.get(name, 0) + 1
    told = [
        f"{count} {'head looks' if count == 1 else 'heads look'} {name}"
        for name, count in sorted(counts.items(), key=lambda item: -item[1])
    ]
    return "\n".join(textwrap.wrap(f"Layer {layer + 1}: {', '.join(told)}", 95))


def _draw_table(
    figure: SubFigure, values: np.ndarray, title: str, note: str, layer: int, form: str
) -> None:
    """A layers x heads heat map with its numbers; the layer of the maps is framed."""
    axes: Axes = figure.subplots()
    layers, heads = values.shape
    image = axes.imshow(values, cmap=COLOURS, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        dark = image.norm(value) < 0.6
        axes.text(
            column,
            row,
            form.format(value),
            ha="center",
            va="center",
            fontsize=9,
            color="white" if dark else "black",
        )
    frame = Rectangle((-0.5, layer - 0.5), heads, 1, fill=False, color="#d55e00", lw=2.5)
    frame.set_clip_on(False)
    axes.add_patch(frame)
    low, high = (np.unravel_index(f(values), values.shape) for f in (np.argmin, np.argmax))
    axes.set_title(
        f"{note}\nleast {form.format(values[low])} (layer {low[0] + 1}, head {low[1] + 1}), "
        f"most {form.format(values[high])} (layer {high[0] + 1}, head {high[1] + 1})",
        fontsize=9.5,
    )
    axes.set_xticks(range(heads), [str(head + 1) for head in range(heads)])
    axes.set_yticks(range(layers), [str(row + 1) for row in range(layers)])
    axes.tick_params(length=0)
    axes.set_xlabel("head")
    axes.set_ylabel("layer (framed: the maps on the left)")
    figure.suptitle(title, fontsize=13, fontweight="bold")

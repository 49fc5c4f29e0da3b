"""What was seen of a model's heads: tables, files and pictures."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..requirements import fail
from .running import Running
from .shares import Shares

STATISTICS = ("breadth", "focus", "reach", "max_logit", "entropy")
QUANTILES = (0.05, 0.5, 0.95)
FORMAT = 2  # of files; a reader refuses others


class Seen:
    """Statistics of every layer and head of a model, over all queries that were seen."""

    def __init__(self) -> None:
        self.layers: dict[str, dict[str, Running]] = {}  # in the order in which they ran
        self.shares: dict[str, Shares] = {}  # of observe(shares=True)

    def add(self, layer: str, name: str, found: Running) -> None:
        """Take in a batch."""
        before = self.layers.setdefault(layer, {}).get(name)
        self.layers[layer][name] = found if before is None else before.merged(found)

    def add_shares(self, layer: str, found: Shares) -> None:
        """Take in a batch."""
        before = self.shares.get(layer)
        self.shares[layer] = found if before is None else before.merged(found)

    def merged(self, other: Seen) -> Seen:
        """What both have seen."""
        result = Seen()
        for seen in (self, other):
            for layer, statistics in seen.layers.items():
                for name, found in statistics.items():
                    result.add(layer, name, found)
            for layer, shares in seen.shares.items():
                result.add_shares(layer, shares)
        return result

    def over_ranks(self, group: Any = None) -> Seen:
        """What all ranks of a process group have seen, on each of them.

        Args:
            group: the group; by default that of all processes.

        Raises:
            ValueError: There is no group.
        """
        if not dist.is_initialized():
            fail("over_ranks", "torch.distributed", "initialised: see init_process_group", "not")
        every: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(every, (self.layers, self.shares), group=group)
        result = Seen()
        for of_rank in every:
            other = Seen()
            other.layers, other.shares = of_rank
            result = result.merged(other)
        return result

    def table(self) -> Any:
        """A pandas DataFrame with a row for each layer and head, in the order in which they ran.

        Its columns are ``layer``, ``head``, ``queries`` (how many were seen), and for each of
        breadth, focus, reach, max_logit and entropy the mean under that name, and the standard
        deviation, least, largest and quantiles as ``breadth_sd``, ``_min``, ``_max``, ``_p05``,
        ``_p50`` and ``_p95``, the quantiles within 4%. Units are those of
        `attnfast.AttentionStats`: keys, probabilities, keys, natural logarithms. After
        ``observe(shares=True)`` there are also the mean probabilities of ``self``, ``previous``,
        ``next`` and ``first``, positions as causal order counts them, and of ``same``: all other
        positions of the query's token.

        Raises:
            ImportError: There is no pandas.
            ValueError: No attention of attnfast ran.
        """
        pandas = needed("pandas")
        if not self.layers:
            raise ValueError(
                "observe: no attention of attnfast ran within the model: attnfast.replace swaps"
                " torch's layers, transformers takes attn_implementation='attnfast', and"
                " attnfast.integrations.sdpa.activate() serves callers of torch's function"
            )
        tables = []
        for layer, statistics in self.layers.items():
            queries = statistics["breadth"].number.long()
            columns: dict[str, Any] = {"layer": layer, "head": range(len(queries))}
            columns["queries"] = queries
            for name, found in statistics.items():
                columns |= {name: found.mean, f"{name}_sd": found.deviation}
                columns |= {f"{name}_min": found.least, f"{name}_max": found.largest}
                for q in QUANTILES:
                    columns[f"{name}_p{round(100 * q):02}"] = found.quantile(q)
            if layer in self.shares:
                columns |= self.shares[layer].table
            tables.append(pandas.DataFrame(columns))
        return pandas.concat(tables, ignore_index=True)

    def distances(self, layer: str) -> Tensor:
        """The mean probability of every distance between query and key: ``(H, 64)``, fp64.

        Column 32 is the query's own position; 33 + n has the keys ``2 ** n`` to
        ``2 ** (n + 1) - 1`` positions before it, 31 - n those after it.

        Raises:
            ValueError: There is no such layer, or it was observed without ``shares=True``.
        """
        if layer not in self.shares:
            fail("distances", "layer", f"one of {list(self.shares)}, seen with shares=True", layer)
        return self.shares[layer].distances

    def save(self, path: str | Path) -> None:
        """Write a file that `load` reads."""
        layers = {
            layer: {name: dict(found._asdict()) for name, found in statistics.items()}
            for layer, statistics in self.layers.items()
        }
        shares = {layer: dict(found._asdict()) for layer, found in self.shares.items()}
        torch.save({"format": FORMAT, "layers": layers, "shares": shares}, path)

    def plot(self, statistics: tuple[str, ...] = ("breadth", "focus", "reach", "max_logit")) -> Any:
        """A matplotlib figure: a map of layers and heads for each statistic's mean.

        Raises:
            ImportError: There is no matplotlib.
            ValueError: There is no such statistic, or no attention of attnfast ran.
        """
        pyplot, table = needed("matplotlib.pyplot"), self.table()
        for name in statistics:
            if name not in STATISTICS:
                fail("plot", "statistics", f"some of {STATISTICS}", name)
        layers = list(self.layers)
        size = (3.2 * len(statistics), 1.2 + 0.28 * len(layers))
        figure, axes = pyplot.subplots(
            1, len(statistics), figsize=size, layout="constrained", squeeze=False, sharey=True
        )
        for axis, name in zip(axes[0], statistics, strict=True):
            shown = table.pivot(index="layer", columns="head", values=name).reindex(layers)
            image = axis.imshow(shown, aspect="auto", cmap="viridis")
            axis.set(title=name, xlabel="head", xticks=range(shown.shape[1]))
            axis.set_yticks(range(len(layers)), layers)
            figure.colorbar(image, ax=axis)
        return figure

    def html(self) -> str:
        """The table as an HTML document of its own, cells coloured from least to largest."""
        table = self.table()
        shown = table[["layer", "head", "queries", *STATISTICS]]
        rows = []
        spans = {name: (shown[name].min(), shown[name].max()) for name in STATISTICS}
        for row in shown.to_dict("records"):
            cells = [
                f"<td>{escape(row['layer'])}</td><td>{row['head']}</td><td>{row['queries']}</td>"
            ]
            for name, (least, largest) in spans.items():
                share = (row[name] - least) / ((largest - least) or 1)
                color = f"hsl(210 80% {95 - 40 * share:.0f}%)"
                cells.append(f'<td style="background:{color}">{row[name]:.4g}</td>')
            rows.append(f"<tr>{''.join(cells)}</tr>")
        head = "".join(f"<th>{name}</th>" for name in shown.columns)
        return (
            '<!doctype html><html lang="en"><meta charset="utf-8"><title>Heads</title><style>'
            "body{font:14px sans-serif}td,th{padding:2px 8px;text-align:right}"
            "td:first-child,th:first-child{text-align:left}</style>"
            f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></html>"
        )


def load(path: str | Path) -> Seen:
    """Read what `Seen.save` wrote.

    Raises:
        ValueError: The file is of another kind.
    """
    content = torch.load(path, weights_only=True)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        fail("load", "path", f"a file of Seen.save, of format {FORMAT}", str(path))
    seen = Seen()
    for layer, statistics in content["layers"].items():
        for name, found in statistics.items():
            seen.add(layer, name, Running(**found))
    for layer, found in content["shares"].items():
        seen.add_shares(layer, Shares(**found))
    return seen


def compare(a: Seen, b: Seen) -> Any:
    """How two observations differ: a pandas DataFrame with a row for each layer and head of both.

    For each statistic there are the means ``breadth_a`` and ``breadth_b``, and ``breadth_change``,
    b less a.

    Raises:
        ImportError: There is no pandas.
        ValueError: They have no layer and head in common.
    """
    keys, names = ["layer", "head"], list(STATISTICS)
    both = a.table()[keys + names].merge(
        b.table()[keys + names], on=keys, suffixes=("_a", "_b"), validate="one_to_one"
    )
    if both.empty:
        fail("compare", "a and b", "of models with layers and heads in common", "none")
    for name in STATISTICS:
        both[f"{name}_change"] = both[f"{name}_b"] - both[f"{name}_a"]
    return both


def needed(name: str) -> Any:
    """A module that only the lens needs.

    Raises:
        ImportError: It is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        said = f"attnfast.lens needs {package}: pip install 'attnfast[lens]'"
        raise ImportError(said) from error


def escape(text: str) -> str:
    """Text within HTML."""
    return text.replace("&", "&amp;").replace("<", "&lt;")

"""What the demos print: headings, indented text, tables."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence

import torch
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

import attnfast
from demo.measure import ATTNFAST, TORCH

WIDTH = 118  # of tables where the output is no terminal
INDENT = (0, 0, 0, 2)


def console() -> Console:
    """A console on standard output, wide enough for tables side by side in a log file too."""
    terminal = Console(highlight=False)
    return terminal if terminal.is_terminal else Console(highlight=False, width=WIDTH)


def heading(out: Console, text: str) -> None:
    """A line that opens a part of the report."""
    out.print()
    out.print(Text(text, style="bold"))


def plain(out: Console, text: str) -> None:
    """Indented text, taken literally."""
    out.print(Padding(Text(text), INDENT, expand=False))


def versions(device: torch.device) -> str:
    """What runs on what."""
    return (
        f"attnfast {attnfast.__version__}, torch {torch.__version__},"
        f" Python {platform.python_version()}, {device}, {torch.get_num_threads()} threads"
    )


def table(first: str, *columns: str, gap: int = 3) -> Table:
    """A table without lines; all columns but the first hold numbers."""
    made = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style="dim")
    made.add_column(first)
    for column in columns:
        made.add_column(column, justify="right")
    return made


def show(out: Console, made: Table) -> None:
    """Print a table, indented."""
    out.print(Padding(made, INDENT, expand=False))


def ratio(values: Mapping[str, float]) -> str:
    """Torch's number over attnfast's."""
    return f"{values[TORCH] / values[ATTNFAST]:.2f}" if values[ATTNFAST] > 0 else "-"


def add_compared(made: Table, label: str, values: Mapping[str, float], form: str) -> None:
    """A row of both models' numbers and their ratio."""
    made.add_row(label, *(f"{value:{form}}" for value in values.values()), ratio(values))


def add_memory(made: Table, label: str, peaks: Mapping[str, int | None]) -> None:
    """A row of both models' bytes in MiB, where the system tells them."""
    known = {name: value / 2**20 for name, value in peaks.items() if value is not None}
    if len(known) == len(peaks):
        add_compared(made, label, known, ".0f")


def stretches(losses: Mapping[str, Sequence[float]], rows: int) -> Iterator[tuple[str, list[str]]]:
    """Losses averaged over stretches of steps: which steps, and each model's mean."""
    steps = len(losses[TORCH])
    length = -(-steps // rows)
    for start in range(0, steps, length):
        stop = min(start + length, steps)
        label = f"steps {start + 1} to {stop}" if stop - start > 1 else f"step {stop}"
        yield label, [f"{sum(x[start:stop]) / (stop - start):.4f}" for x in losses.values()]

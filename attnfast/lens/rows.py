"""Where a `Monitor`'s rows go: a CSV file, TensorBoard, W&B."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..requirements import fail, shown

MEASURES = ("entropy", "breadth", "focus", "max_logit")
Writer = Callable[[list[dict[str, Any]]], None]


def writer_of(function: str, out: Any) -> Writer:
    """What writes rows to ``out``, by the method that it has."""
    if out is None:
        return lambda rows: None
    if isinstance(out, (str, os.PathLike)):
        return to_csv(Path(out))
    if callable(getattr(out, "add_scalar", None)):
        return lambda rows: to_tensorboard(out, rows)
    if not callable(getattr(out, "log", None)):
        required = "a path for CSV, a SummaryWriter (add_scalar), a run of W&B (log) or None"
        fail(function, "out", required, shown(out), TypeError)
    return lambda rows: to_run(out, rows)


def to_csv(path: Path) -> Writer:
    """A new file; each look is whole in it as soon as it was written."""
    with path.open("w", newline="") as file:
        csv.writer(file).writerow(("step", "layer", "head", *MEASURES))

    def write(rows: list[dict[str, Any]]) -> None:
        with path.open("a", newline="") as file:
            csv.DictWriter(file, ("step", "layer", "head", *MEASURES)).writerows(rows)

    return write


def to_tensorboard(writer: Any, rows: list[dict[str, Any]]) -> None:
    """A scalar for each number."""
    for row in rows:
        for name in MEASURES:
            writer.add_scalar(f"{name}/{row['layer']}/{row['head']}", row[name], row["step"])


def to_run(run: Any, rows: list[dict[str, Any]]) -> None:
    """One call for a look; the step is a number of its own, as the run counts its own."""
    numbers = {
        f"{name}/{row['layer']}/{row['head']}": row[name] for row in rows for name in MEASURES
    }
    run.log({"lens/step": rows[0]["step"], **numbers})

"""How time and memory grow with length, batch, heads, head size and threads, and a model of it.

`measure` times our CPU kernels over series in which one size grows, `page` fits the model of
`model.py` to every other point of each kernel, predicts those in between, and says how far off it
is.
"""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import ROOT, model
from .clock import HostClock
from .environment import Settings
from .grid import AttentionCase
from .model import Fitted, Shape
from .problem import pass_of, problem
from .results import Row, Run
from .rivals import ours
from .summary import DTYPE_NAMES, size, table

WORKS = ("forward", "forward+backward")
DTYPES = ("float32", "bfloat16")
LENGTHS = (64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096)
BUDGET_S = 0.2  # of a point
MOST, FEWEST = 60, 5  # calls of a point
GPU_LENGTHS = (512, 2048, 8192)


class Series(NamedTuple):
    """Sizes of which one grows."""

    title: str
    name: str  # what grows
    sizes: tuple[tuple[int, int, int, int, bool], ...]  # B, H, T, D, causal
    parallel: bool = False  # with all threads instead of one


FULL, CAUSAL, HEADS, SIZE, THREADS = (
    Series("length, full", "T", tuple((1, 4, T, 64, False) for T in LENGTHS)),
    Series("length, causal", "T", tuple((1, 4, T, 64, True) for T in LENGTHS)),
    Series("batch times heads", "B", tuple((B, 4, 256, 64, True) for B in (1, 2, 3, 4, 8, 16, 32))),
    Series("head size", "D", tuple((2, 4, 512, D, False) for D in (16, 32, 48, 64, 96, 128, 256))),
    Series("all threads", "T", tuple((1, 4, T, 64, True) for T in LENGTHS[:8]), parallel=True),
)
SERIES = (FULL, CAUSAL, HEADS, SIZE, THREADS)


def measure(settings: Settings, kept: list[Row] | None = None) -> list[Row]:
    """Points of all series, for every dtype and pass.

    Args:
        settings: Backend and threads.
        kept: Points that need not be measured again.

    Returns:
        Per point its shape, ``seconds`` (the lower quartile: what disturbs a call only ever
        lengthens it; with one thread CPU time, else time on the wall), ``median_s`` and
        ``peak_bytes`` beside the inputs. Points of which fewer than ``FEWEST`` calls ran without
        waiting for a core have no times.
    """
    known = {(row["series"], _shape(row)): row for row in kept or []}
    rows = []
    before = torch.get_num_threads()
    try:
        for series in SERIES:
            threads = settings.threads if series.parallel else 1
            clock = HostClock(threads)
            for dtype, work, sizes in itertools.product(DTYPES, WORKS, series.sizes):
                shape = Shape(*sizes[:4], dtype, sizes[4], work, threads)
                row = known.get((series.title, shape))
                if row is None:
                    point = _point(shape, settings.backend, clock)
                    place = {"series": series.title, "clock": clock.name}
                    row = {**place, **shape._asdict(), **point}
                rows.append(row)
    finally:
        torch.set_num_threads(before)
    return rows


def _point(shape: Shape, backend: str, clock: HostClock) -> dict[str, Any]:
    torch.set_num_threads(shape.threads)
    torch.manual_seed(0)
    B, H, T, D = shape[:4]
    case = AttentionCase(B, H, T, T, D, shape.dtype, shape.causal, shape.work)
    call = pass_of(problem(case), ours(backend).forward)
    clock.read(call)
    reading, peak = clock.peak(call)
    count = min(MOST, max(FEWEST, int(BUDGET_S / reading.seconds)))
    times: list[float] = []
    for _ in range(count if shape.threads == 1 else MOST):
        reading = clock.read(call)
        if not reading.disturbed:
            times.append(reading.seconds)
        if len(times) == count:
            break
    if len(times) < FEWEST:
        return {"seconds": None, "median_s": None, "rounds": len(times), "peak_bytes": peak}
    quartile = statistics.quantiles(times, n=4, method="inclusive")[0]
    return {
        "seconds": quartile,
        "median_s": statistics.median(times),
        "rounds": len(times),
        "peak_bytes": peak,
    }


def fitted(run: Run) -> list[Fitted]:
    """The model of each kernel, fitted to every other point."""
    found = []
    for dtype in DTYPES:
        for work in WORKS:
            rows = [
                row
                for row in run.rows
                if (row["dtype"], row["work"]) == (dtype, work) and row["seconds"] is not None
            ]
            todo = [model.work(_shape(row), model.CPU_TILES[dtype]) for row in rows]
            times = [float(row["seconds"]) for row in rows]
            machine = model.fit(todo[::2], times[::2])
            predicted = [model.seconds(one, machine) for one in todo]
            errors = [model.error(predicted[i::2], times[i::2]) for i in (0, 1)]
            found.append(Fitted(dtype, work, machine, rows, predicted, *errors))
    return found


def unseen_error(kernels: list[Fitted]) -> float:
    """The geometric mean over the points of all kernels that no fit has seen, less 1."""
    predicted = [x for kernel in kernels for x in kernel.predicted[1::2]]
    measured = [float(row["seconds"]) for kernel in kernels for row in kernel.rows[1::2]]
    return model.error(predicted, measured)


def _shape(row: Row) -> Shape:
    return Shape(*(row[name] for name in Shape._fields))


TEXT = """\
How time and memory grow with the length, batch and heads, head size and threads; measured, and
predicted by a model with four numbers for each kernel:

```text
seconds = launch + (flop / rate + pairs * pair) / workers + bytes / bandwidth
```

- **flop**: 4 D (forward) or 14 D (with the backward pass, whose products are five) for every pair
  of a query and a key in the tiles that are computed; a causal call computes the tiles on the
  diagonal whole. With fewer heads than threads the backward pass has seven products.
- **pairs**: the scores in these tiles, twice with the backward pass. Each costs an exponential, a
  maximum and a sum, whatever D is.
- **workers**: how many threads are busy on average when blocks (forward) or heads (backward) are
  shared out.
- **bytes**: every input and output once.

`python -m bench scaling` measures this on your machine and writes this page. A time is the lower
quartile of at least {fewest} calls: what disturbs a call only ever lengthens it. With one thread it
is CPU time, else time on the wall, of calls whose threads had a core all the while; a dash where
there were too few. The numbers are fitted to every other point, by least squares of relative
errors; "unseen" are the points in between. An error is the factor between prediction and
measurement, less 1, at the geometric mean.
"""


def page(run: Run, picture: str) -> str:
    """The text of docs/scaling.md."""
    from .report import NOTE, provenance

    kernels = fitted(run)
    overall = unseen_error(kernels)
    parts = [
        NOTE.replace("report", "scaling"),
        "# Scaling",
        TEXT.strip().format(fewest=FEWEST),
        provenance(run),
        f"Points that no fit has seen are off by {overall:.0%} at the geometric mean.",
        _machines(kernels),
        f"![Time over length, batch, head size and threads](performance/{picture})",
    ]
    for series in SERIES:
        parts += [f"## {series.title[0].upper()}{series.title[1:]}", _series_table(series, kernels)]
    parts += [
        "## Threads",
        _threads_table(kernels, run.facts["settings"]["threads"]),
        "## Memory",
        MEMORY,
        _memory_table(run),
    ]
    parts += ["## What a GPU should give", GPU.strip(), _gpu_table()]
    return "\n\n".join(parts) + "\n"


MEMORY = (
    "What a call needs beside its inputs, with one thread: resident memory at its peak, and what"
    " is certain: output and lse, with the backward pass the gradients too. The T x S scores would"
    " take the last column."
)
GPU = """\
The same model with a GPU's ceilings for its four numbers: from the data sheet, not measured. "no
overlap" adds its parts, "overlap" takes the longest one: no kernel can be faster. A measured kernel
should lie between the two; `make gpu` measures. bf16, 16384 tokens, width 2048.
"""


def _machines(kernels: list[Fitted]) -> str:
    lines = []
    for x in kernels:
        m = x.machine
        lines.append(
            [
                f"{x.work}, {DTYPE_NAMES[x.dtype]}",
                f"{m.launch * 1e6:.3g}",
                f"{m.rate / 1e9:.3g}" if m.rate < float("inf") else "-",
                f"{m.pair * 1e9:.3g}",
                f"{m.bandwidth / 1e9:.3g}" if m.bandwidth < float("inf") else "-",
                f"{x.known_error:.0%}",
                f"{x.unseen_error:.0%}",
            ]
        )
    header = ["kernel", "launch, us", "rate, GFLOP/s a thread", "pair, ns", "bandwidth, GB/s"]
    return table([*header, "error, fitted", "error, unseen"], lines)


def _series_table(series: Series, kernels: list[Fitted]) -> str:
    """Measured and predicted milliseconds of each kernel."""
    lines = []
    for sizes in series.sizes:
        B, H, T, D, _ = sizes
        line = [str({"B": B * H, "T": T, "D": D}[series.name])]
        for kernel in kernels:
            seconds, predicted = _point_of(kernel, series, sizes) or (None, None)
            line.append("-" if seconds is None else f"{seconds * 1e3:.3g} / {predicted * 1e3:.3g}")
        lines.append(line)
    first = "B H" if series.name == "B" else series.name
    return "ms, measured / predicted:\n\n" + table([first, *_names(kernels)], lines)


def _point_of(
    kernel: Fitted, series: Series, sizes: tuple[int, int, int, int, bool]
) -> tuple[float, float] | None:
    """Measured and predicted seconds of a point; None if it was not measured undisturbed."""
    for row, predicted in zip(kernel.rows, kernel.predicted, strict=True):
        at = tuple(row[name] for name in ("B", "H", "T", "D", "causal"))
        if row["series"] == series.title and at == sizes:
            return row["seconds"], predicted
    return None


def _names(kernels: list[Fitted]) -> list[str]:
    return [f"{DTYPE_NAMES[kernel.dtype]}, {kernel.work}" for kernel in kernels]


def _threads_table(kernels: list[Fitted], threads: int) -> str:
    """How many times as fast all threads are as one."""
    lines = []
    for sizes in THREADS.sizes:
        line = [str(sizes[2])]
        for kernel in kernels:
            one, all_ = (_point_of(kernel, series, sizes) for series in (CAUSAL, THREADS))
            both = one is not None and all_ is not None
            line.append(f"{one[0] / all_[0]:.2f} / {one[1] / all_[1]:.2f}" if both else "-")
        lines.append(line)
    intro = f"Times as fast with {threads} threads as with one, causal, measured / predicted:"
    return f"{intro}\n\n{table(['T', *_names(kernels)], lines)}"


def _memory_table(run: Run) -> str:
    lines = []
    for row in run.rows:
        if row["series"] != FULL.title or row["dtype"] != "float32" or row["T"] < 512:
            continue
        heads = row["B"] * row["H"]
        certain = heads * row["T"] * 4 * (row["D"] + 1)
        if row["work"] != "forward":
            certain += heads * row["T"] * 4 * 3 * row["D"]
        scores = heads * row["T"] ** 2 * 4
        sizes = [size(row["peak_bytes"]), size(certain), size(scores)]
        lines.append([f"{row['work']}, {row['T']}", *sizes])
    return table(["fp32, T", "measured", "certain", "scores"], lines)


def _gpu_table() -> str:
    lines = []
    for name, machine in model.DATA_SHEETS.items():
        for work in WORKS:
            for D in (64, 128):
                for T in GPU_LENGTHS:
                    shape = Shape(16384 // T, 2048 // D, T, D, "bfloat16", True, work, 1)
                    todo = model.work(shape, model.GPU_TILES)._replace(workers=1)
                    useful = AttentionCase(shape.B, shape.H, T, T, D, "bfloat16", True, work).flop
                    times = model.seconds(todo, machine), model.overlapped(todo, machine)
                    lines.append(
                        [
                            f"{name}, {work}, D {D}, T {T}, causal",
                            *(f"{seconds * 1e3:.3g}" for seconds in times),
                            *(f"{useful / seconds / 1e12:.0f}" for seconds in times),
                        ]
                    )
    header = ["kernel", "no overlap, ms", "overlap, ms", "no overlap, TFLOP/s", "overlap, TFLOP/s"]
    return table(header, lines)


def write(run: Run, root: Path = ROOT) -> list[Path]:
    """Write docs/scaling.md and its plot."""
    from . import plots

    folder = root / "docs" / "performance"
    [picture] = plots.scaling(run, fitted(run), folder)
    path = root / "docs" / "scaling.md"
    path.write_text(page(run, picture))
    return [path, folder / picture]

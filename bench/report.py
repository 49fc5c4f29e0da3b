"""What the files of results say, put into the pages: the README, docs/performance.md and others.

`report` takes the newest timing of each device under ``bench/results``, or some files. What it
writes comes out of those files, and stands in each page between two markers; the rest is by hand.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from . import OURS, ROOT, distributed, limits, plots, results, scaling
from .grid import DTYPE_NAMES
from .pages import device_title, fill, provenance
from .results import Run
from .tables import core, details, frame, geometric_mean, means, table


def ceilings(run: Run) -> str:
    """What the machine did at best."""
    found = run.facts.get("ceilings")
    if not found:
        return "Ceilings were not measured in this run."
    lines = [
        (f"{kind}, {DTYPE_NAMES[dtype]}", f"{rate / 1e9:.0f} GFLOP/s")
        for kind, name in (("matrix product", "gemm"), ("multiply-adds on registers", "fma"))
        for dtype, rate in found[name].items()
    ]
    lines += [
        (f"copy touching {touched / 1e6:.3g} MB", f"{rate / 1e9:.1f} GB/s")
        for touched, rate in found["copy"]
    ]
    lines.append(("shortest call", f"{found['launch'] * 1e6:.2g} us"))
    lines += [(name, f"not measured: {reason}") for name, reason in found["missing"].items()]
    return table(pd.DataFrame(lines, columns=["ceiling", "measured"]))


def losses(lines: pd.DataFrame) -> str:
    """Which rows are slower than a rival, the worst first."""
    total = lines["ratio"].count()
    lost = lines[lines["ratio"] < 1].sort_values("ratio", kind="stable")
    if lost.empty:
        return f"No row is slower than its fastest rival ({total} rows)."
    named = []
    for line in lost.itertuples():
        kind = line.row["case"].get("mode") or line.row["case"].get("work")
        parts = [line.suite, line.dtype, None if kind == line.suite else kind, line.name]
        named.append(f"- {', '.join(filter(None, parts))}: {line.ratio:.2f}x, {line.row['rival']}")
    return "\n".join([f"Slower than the fastest rival in {len(lost)} of {total} rows:", "", *named])


def device_section(run: Run, pictures: list[str]) -> str:
    """All that one run says."""
    lines = frame(run)
    parts = [
        f"## {device_title(run)}",
        provenance(run),
        means("times as fast as the fastest rival", lines),
        means("core shapes beside torch's fused", core(lines)),
        losses(lines),
        *(f"![{Path(name).stem}](performance/{name})" for name in pictures),
        "### Ceilings",
        ceilings(run),
    ]
    for title, rows in lines.groupby("group", sort=False):
        parts += [f"### {title[0].upper()}{title[1:]}", details(rows["row"])]
    if left_out := run.facts.get("not_timed"):
        parts += ["### Left out", f"{len(left_out)} rows did not fit into the time:"]
        parts += ["\n".join(f"- {x['suite']} `{x['id']}`: {x['reason']}" for x in left_out)]
    return "\n\n".join(filter(None, parts))


def devices(runs: list[Run]) -> str:
    """The means of all runs: suites down, devices across."""

    def cell(ratios: pd.Series) -> str:
        return f"{geometric_mean(ratios):.2f}x ({(ratios < 1).sum()} of {len(ratios)})"

    columns = {
        device_title(run): frame(run)
        .dropna(subset=["ratio"])
        .groupby("group", sort=False)["ratio"]
        .agg(cell)
        for run in runs
    }
    found = pd.DataFrame(columns).fillna("-")
    order = dict.fromkeys(title for column in columns.values() for title in column.index)
    return table(found.loc[[*order]].reset_index(names="times as fast (slower in)"))


def by_shape(run: Run) -> str:
    """The README's table: the ratios of the attention suites, full / causal."""
    lines = frame(run).dropna(subset=["ratio"])
    lines = lines[lines["suite"].isin(["forward", "forward+backward"])]
    shapes = lines["name"].str.removesuffix(", causal")
    columns = lines["dtype"] + ", " + lines["suite"].str.replace("+", " + ")
    found: dict[str, dict[str, str]] = {shape: {"B, H, L, D": shape} for shape in shapes}
    ratios = dict(zip(zip(lines["name"], columns, strict=True), lines["ratio"], strict=True))
    for shape, line in found.items():
        for column in sorted(dict.fromkeys(columns), key=lambda x: not x.startswith("fp32")):
            pair = [ratios.get((name, column)) for name in (shape, f"{shape}, causal")]
            line[column] = " / ".join(
                "-" if x is None else f"{x:.1f}" if x >= 1 else f"{x:.2f}" for x in pair
            )
    return table(pd.DataFrame(found.values()))


def write(runs: list[Run], root: Path) -> list[Path]:
    """Fill the README and docs/performance.md, and draw the plots.

    Raises:
        ValueError: A run is of smoke rows, or a page has no place to fill; one line.
    """
    for run in runs:
        if run.facts["settings"]["size"] == "smoke":
            raise ValueError(f"bench: {run.path} has smoke rows, so it is not written to docs")
    newest, folder = runs[0], root / "docs" / "performance"
    date = f"{newest.facts['date'][:10]}, commit {(newest.facts['commit']['id'] or 'unknown')[:12]}"
    readme = [
        f"Times as fast as the fastest rival, full / causal, on {device_title(newest)} ({date}):",
        by_shape(newest),
        "Every row of every suite and device, with rivals, spread, memory and ceilings:"
        " [docs/performance.md](docs/performance.md).",
    ]
    pages = [fill(root / "README.md", "\n\n".join(readme))]
    pictures = {run.path: plots.draw(run, folder) for run in runs}
    sections = [device_section(run, pictures[run.path]) for run in runs]
    pages.append(fill(root / "docs" / "performance.md", "\n\n".join([devices(runs), *sections])))
    return pages + [folder / name for names in pictures.values() for name in names]


def newest(folder: Path) -> list[Run]:
    """The newest timing with rows of ours of each device and number of threads, newest first.

    Raises:
        ValueError: There is none, or a file cannot be read; one line.
    """
    chosen: dict[tuple[str, int], Run] = {}
    for run in results.found("timing", folder):
        if any(OURS in row["contestants"] for row in run.rows):
            chosen.setdefault((run.facts["device"], run.facts["settings"]["threads"]), run)
    if not chosen:
        raise ValueError(f"bench: no timing in {folder}; run `make bench` first")
    return list(chosen.values())


def report(files: list[Path], root: Path = ROOT) -> tuple[list[Path], Run]:
    """Write the pages from these files, or from the newest of each device.

    Returns:
        What was written, and the newest run of it.

    Raises:
        ValueError: As `newest` and `write` say.
    """
    folder = root / "bench" / "results"
    runs = [results.load(path, "timing") for path in files] or newest(folder)
    written = write(runs, root)
    studies = (("scaling", scaling), ("distributed", distributed), ("limits", limits))
    for kind, study in studies:
        if found := results.found(kind, folder):
            written += study.write(found[0], root)
    return written, runs[0]

"""Tables in a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from . import OURS
from .compare import SHORT_S, Change, means, noise, slower_suites
from .evidence import Line
from .results import Row, Run
from .summary import case_name, milliseconds, percent, rate, size


def console() -> Console:
    """Of the standard output; wide enough where nobody looks."""
    found = Console()
    return found if found.is_terminal else Console(width=120)


def table(title: str, first: str, *others: str) -> Table:
    """A table whose first column is text and whose others are figures."""
    made = Table(title=title, title_justify="left")
    made.add_column(first)
    for other in others:
        made.add_column(other, justify="right")
    return made


def row(found: Row) -> None:
    """One row: every contestant, the fastest first, and who is absent."""
    case = found["case"]
    title = f"{case_name(found)}, {case['dtype']}, {case.get('work') or case.get('mode')}"
    made = table(title, "", "ms", "times ours", "GFLOP/s", "of limit", "memory", "rounds")
    contestants = found["contestants"]
    ours = contestants.get(OURS)
    for name in sorted(contestants, key=lambda name: float(contestants[name]["median_s"])):
        one = contestants[name]
        made.add_row(
            f"[bold]{name}" if name == OURS else name,
            milliseconds(one),
            f"{one['median_s'] / ours['median_s']:.2f}" if ours else "-",
            rate(one),
            percent(one["share"]),
            size(one["peak_bytes"]),
            str(one["rounds"]),
        )
    out = console()
    out.print(made)
    for name, reason in found["absent"].items():
        out.print(f"  [dim]{name}: {reason}", highlight=False)


def changes(found: list[Change], before: Run, after: Run, threshold: float) -> None:
    """Every row of both runs, then the means of the suites, the noise, and the regressions."""
    out = console()
    made = table(
        f"{before.path.name} -> {after.path.name}", "", "before, ms", "after, ms", "ratio",
        "beside rival", "",
    )  # fmt: skip
    for change in found:
        made.add_row(
            f"{change.suite}: {change.id}",
            f"{change.before_s * 1e3:.4g} ±{change.spread[0]:.0%}",
            f"{change.after_s * 1e3:.4g} ±{change.spread[1]:.0%}",
            f"{change.ratio:.2f}",
            "-" if change.relative is None else f"{change.relative:.2f}",
            "[red]slower" if change.regression else "",
        )
    out.print(made)
    for suite, mean in means(found).items():
        out.print(f"{suite}: {mean:.3f} of the time before, geometric mean", highlight=False)
    devices = {run.facts["device"] for run in (before, after)}
    if len(devices) > 1:
        out.print(f"These are two devices: {', '.join(sorted(devices))}.", highlight=False)
    found_noise = noise(before, after)
    out.print(
        f"Rivals, the same code in both runs: {found_noise.drift:.3f} of the time before, ±"
        f"{found_noise.short:.1%} where under {SHORT_S * 1e3:g} ms, ±{found_noise.long:.1%} else.",
        highlight=False,
    )
    slower = sum(change.regression for change in found)
    suites = slower_suites(found, threshold)
    whole = f", and these suites as a whole: {', '.join(suites)}" if suites else ""
    out.print(f"{slower} of {len(found)} rows are slower{whole}.", highlight=False)


def evidence(found: list[Line]) -> None:
    """Every kernel and what is known of it."""
    made = Table(title="evidence", title_justify="left", show_lines=True)
    for name in ("kernel", "proven", "compiled", "run on hardware", "timed"):
        made.add_column(name, overflow="fold")
    for line in found:
        kernel = line.kernel
        name = f"{kernel.backend} {kernel.kind}, {kernel.dtype}, {kernel.architecture}"
        made.add_row(name, *line[1:])
    console().print(made)

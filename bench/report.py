"""What the files of results say: docs/performance.md with its plots, and the README's table.

`report` takes the newest timing of each device under ``bench/results``, or one file. Everything it
writes comes out of those files.
"""

from __future__ import annotations

from pathlib import Path

from . import OURS, ROOT, budget, environment, evidence, plots, results
from .results import Row, Run
from .summary import (
    DTYPE_NAMES,
    case_name,
    compared,
    core,
    core_table,
    detail_table,
    geometric_mean,
    groups,
    lost,
    summary_table,
    table,
)

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
NOTE = "<!-- Written by `python -m bench report`; not by hand. -->"

METHOD = """\
## How it is measured

`make bench` repeats this on your machine, `python -m bench run --shape 2,16,1024,64 --causal` for a
shape of your own. Each row runs ours and its rivals in one process on the same inputs. Their
results are compared first, and a row whose results differ fails. Then they take turns, one call
each per round, for as many rounds as fit the row's time; the times shown are medians, ± half the
interquartile range. One thread is timed by its CPU time, more by the wall, a GPU by its events.
Rounds in which threads had to wait for a core that another process had are left out where at least
three others remain.

The ratio is the fastest rival's median over ours; its quartiles are over the rounds. "others" are
the remaining rivals' times over ours. A rival more than four times slower than the fastest runs in
one round; * marks one whose call is so long that its first stands for its time. The quick suites
end in time on any machine: there rows get fewer rounds, down to one call of each, and what does not
fit is listed under "Left out". "Core shapes" are ours beside `F.scaled_dot_product_attention` only.

Rivals: `F.scaled_dot_product_attention` with each of its kernels, FlexAttention compiled (in the
quick suites for a few causal shapes and options), ONNX Runtime's Attention operator, flash_attn,
xformers and flashinfer where they can be had, and plain PyTorch ("eager"); for layers
`nn.MultiheadAttention` and `nn.TransformerEncoder` with their fast paths, and a layer written by
hand around `F.scaled_dot_product_attention`. Who did not compete in a row, and why, is in the row's
`absent`.

FLOP: 4 D for each pair of a query and a key it may attend, 2.5 times that backward. A causal row
counts half, "window" its own pairs. A layer adds 8 B T E E for its projections, 3 times in
training, and a layer of an encoder 16 B T E E more for its feed-forward part. "weights" are
averaged over heads, "padding" hides a quarter of the keys; "encoder" rows are two layers, stock and
after `attnfast.replace`, a step is forward, backward and AdamW.

The limit of a row is a roofline of the ceilings below, measured in the same run: its FLOP at the
machine's best rate, or its bytes (every input and output once) at the rate of copying as many.
Memory is what a call adds at most to the inputs: resident memory on a CPU, torch's allocator on
a GPU. Scratch memory of ours up to 8 MB per thread stays between calls.
"""


def device_title(run: Run) -> str:
    """The device's name for headings."""
    machine = run.facts["machine"]
    name = machine["gpu"]["name"] if "gpu" in machine else machine["cpu"]
    threads = run.facts["settings"]["threads"]
    count = "" if "gpu" in machine else f", {threads} thread{'s' * (threads > 1)}"
    return f"{name}, {run.facts['kernel']}{count}"


def provenance(run: Run) -> str:
    """Where the figures come from, in one paragraph."""
    facts, versions = run.facts, run.facts["versions"]
    machine, settings = facts["machine"], facts["settings"]
    commit = (facts["commit"]["id"] or "unknown")[:12]
    dirty = " with uncommitted changes" if facts["commit"]["dirty"] else ""
    load = "" if facts["load"] is None else f"; load before the run {facts['load']}"
    others = [f"{name} {version}" for name, version in versions.items() if name != "attnfast"]
    smoke = " Smoke rows: not for publication." if settings["size"] == "smoke" else ""
    rivals = sorted({name for row in run.rows for name in row.get("contestants", ())} - {OURS})
    beside = f" Rivals that took part: {', '.join(rivals)}." if rivals else ""
    now = environment.sources(settings["backend"])
    changed = "" if facts["sources"] == now else " The kernels have changed since."
    return (
        f"{device_title(run)}; {machine['architecture']}, {machine['system']};"
        f" {machine['cores']} cores{load}; {_clock(run)}; torch's kernels:"
        f" {facts['torch_isa']}. attnfast {versions['attnfast']} at commit {commit}{dirty} (kernel"
        f" sources {facts['sources']}), {', '.join(others)}; {facts['date'][:10]};"
        f" {settings['size']} suites.{beside}{changed}{smoke}"
    )


def _clock(run: Run) -> str:
    """How times were taken."""
    names = dict.fromkeys(row["clock"] for row in run.rows)
    words = {"cpu time": "CPU time of the thread", "events": "GPU events"}
    return ", ".join(words.get(name, "time on the wall") for name in names)


def ceilings_table(run: Run) -> str:
    """What the machine did at best."""
    found = run.facts.get("ceilings")
    if not found:
        return "Ceilings were not measured in this run."
    lines = [
        [f"{kind}, {DTYPE_NAMES[dtype]}", f"{rate / 1e9:.0f} GFLOP/s"]
        for kind, name in (("matrix product", "gemm"), ("multiply-adds on registers", "fma"))
        for dtype, rate in found[name].items()
    ]
    lines += [
        [f"copy touching {touched / 1e6:.3g} MB", f"{rate / 1e9:.1f} GB/s"]
        for touched, rate in found["copy"]
    ]
    lines.append(["shortest call", f"{found['launch'] * 1e6:.2g} us"])
    lines += [[name, f"not measured: {reason}"] for name, reason in found["missing"].items()]
    return table(["ceiling", "measured"], lines)


def losses(run: Run) -> str:
    """Which rows are slower than a rival."""
    rows, total = lost(run.rows), len(compared(run.rows))
    if not rows:
        return f"No row is slower than its fastest rival ({total} rows)."
    lines = [f"- {_in_full(row)}: {row['ratio']:.2f}x, {row['rival']}" for row in rows]
    return "\n".join([f"Slower than the fastest rival in {len(rows)} of {total} rows:", "", *lines])


def _in_full(row: Row) -> str:
    case = row["case"]
    how = case.get("mode") or case.get("work") or ""
    return ", ".join(
        x for x in (row["suite"], DTYPE_NAMES[case["dtype"]], how, case_name(row)) if x
    )


def device_section(run: Run, pictures: list[str]) -> str:
    """All that one run says, as Markdown."""
    parts = [f"## {device_title(run)}", provenance(run), summary_table(run)]
    parts += [core_table(run)] if core(run) else []
    parts += [losses(run)]
    parts += [f"![{Path(name).stem}](performance/{name})" for name in pictures]
    parts += ["### Ceilings", ceilings_table(run)]
    for title, rows in groups(run).items():
        parts += [f"### {title[0].upper()}{title[1:]}", detail_table(rows)]
    if names := budget.named(run.facts):
        parts += ["### Left out", f"{len(names)} rows did not fit into the time:"]
        parts += ["\n".join(f"- {x['suite']} `{x['id']}`: {x['reason']}" for x in names)]
    return "\n\n".join(parts)


def page(runs: list[Run], pictures: dict[Path, list[str]]) -> str:
    """The text of docs/performance.md."""
    sections = [device_section(run, pictures.get(run.path, [])) for run in runs]
    return "\n\n".join([NOTE, "# Speed", METHOD.strip(), *sections]) + "\n"


EVIDENCE = """\
Which kernel was proven, run and timed where, at which commit. "proven" is Triton's interpreter or
the emulator of the CUDA kernels, "compiled" what the compiler said, "run on hardware" the case
tables of the tests there: how many passed, and the largest error as a share of what the accuracy
rule allows. *Stale* is what is older than the sources of its backend. A "+" after a commit: with
uncommitted changes.

`python -m bench evidence --run` runs the tables on this machine, by every CPU instruction set that
it has (`--backend NAME`: by another backend), and adds their lines.
"""


def evidence_page(root: Path) -> str:
    """The text of docs/evidence.md."""
    found = evidence.lines(root / "bench" / "results", root)
    return "\n\n".join([NOTE, "# Evidence", EVIDENCE.strip(), evidence.markdown(found)]) + "\n"


def readme_block(runs: list[Run]) -> str:
    """The README's tables: the newest run by shape, then the means of all devices."""
    newest = runs[0]
    columns = [
        (f"{DTYPE_NAMES[dtype]}, {work.replace('+', ' + ')}", dtype, work)
        for dtype in ("float32", "bfloat16")
        for work in ("forward", "forward+backward")
    ]
    ratios = {
        (case_name(row), row["case"]["dtype"], row["suite"]): row["ratio"]
        for row in compared(newest.rows)
        if row["suite"] in ("forward", "forward+backward")
    }
    shapes = list(dict.fromkeys(name.removesuffix(", causal") for name, _, _ in ratios))

    def cell(shape: str, dtype: str, work: str) -> str:
        found = [ratios.get((name, dtype, work)) for name in (shape, f"{shape}, causal")]
        return " / ".join("-" if x is None else f"{x:.1f}" if x >= 1 else f"{x:.2f}" for x in found)

    lines = [[shape, *(cell(shape, *column[1:]) for column in columns)] for shape in shapes]
    parts = [
        BEGIN,
        f"Times as fast as the fastest rival, full / causal, on {device_title(newest)}:",
        table(["B, H, L, D", *(title for title, _, _ in columns)], lines),
        "Geometric means of whole suites, and in how many rows a rival is faster:",
        means_table(runs),
        f"{provenance(newest)} Every row, with rivals, spread, memory and ceilings:"
        " [docs/performance.md](docs/performance.md).",
        END,
    ]
    return "\n\n".join(parts)


def means_table(runs: list[Run]) -> str:
    """Suites down, devices across."""
    cells: dict[str, list[str]] = {}
    for i, run in enumerate(runs):
        for title, rows in groups(run).items():
            if ours := compared(rows):
                line = cells.setdefault(title, ["-"] * len(runs))
                mean = geometric_mean(row["ratio"] for row in ours)
                line[i] = f"{mean:.2f}x ({len(lost(ours))} of {len(ours)})"
    header = ["times as fast (slower in)", *(device_title(run) for run in runs)]
    return table(header, [[title, *line] for title, line in cells.items()])


def write(runs: list[Run], root: Path) -> list[Path]:
    """Put the report into docs/performance.md with its plots, and into the README's block.

    Raises:
        ValueError: A run is of smoke rows, or the README has no block to fill; one line.
    """
    for run in runs:
        if run.facts["settings"]["size"] == "smoke":
            raise ValueError(f"bench: {run.path} has smoke rows, so it is not written to docs")
    readme, performance = root / "README.md", root / "docs" / "performance.md"
    text = readme.read_text() if readme.exists() else ""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"bench: {readme} has no line {BEGIN} followed by {END}")
    pictures = {run.path: plots.draw(run, root / "docs" / "performance") for run in runs}
    performance.parent.mkdir(exist_ok=True)
    performance.write_text(page(runs, pictures))
    proven = root / "docs" / "evidence.md"
    proven.write_text(evidence_page(root))
    readme.write_text(before + readme_block(runs) + after)
    drawn = [root / "docs" / "performance" / name for names in pictures.values() for name in names]
    return [performance, proven, readme, *drawn]


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
    """Write the report of these files, or of the newest of each device.

    Returns:
        What was written, and the newest run of it.

    Raises:
        ValueError: As `newest` and `write` say.
    """
    runs = [results.load(path, "timing") for path in files] or newest(root / "bench" / "results")
    return write(runs, root), runs[0]

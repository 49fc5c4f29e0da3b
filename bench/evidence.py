"""Which kernel was proven, compiled, run and timed where: all of it from files of results.

A file of evidence is written by whoever ran something: `record` for the case tables (on hardware,
in Triton's interpreter or on the emulator of the CUDA kernels), `compiled` for what a compiler
said. Nothing is typed by hand, and what is older than the kernels' sources is called stale.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from attnfast import dispatch

from . import RESULTS, ROOT, environment, guard, proof, results, summary
from . import compiled as compiled_kernels
from .summary import DTYPE_NAMES

STAGES = ("interpreter", "emulator", "compiled", "hardware")
KINDS = ("forward", "backward", "weights", "decode")
KINDS_OF = {"gluon": ("forward",)}  # backends that have not all of them
CPU_ISAS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")  # of the wheel
DRY_STEP = 60  # every so-manieth case of a table in a trial, without fp16


class Kernel(NamedTuple):
    """What evidence is about."""

    backend: str
    kind: str  # one of KINDS
    dtype: str
    architecture: str


def stage(backend: str, device: str) -> str:
    """What it means that a backend ran on a device's tensors."""
    if device == "cpu" and backend != "cpu":
        return "emulator" if backend == "cuda" else "interpreter"
    return "hardware"


def plan(backend: str, device: str, *, dry: bool = False) -> list[guard.Item]:
    """The cases of all tables for a backend, the smallest first."""
    items = []
    for table in proof.TABLES:
        for index in range(0, proof.count(table), DRY_STEP if dry else 1):
            case = proof.describe(table, index)
            item = {"task": "case", "backend": backend, "device": device, "table": table}
            if not (dry and case["dtype"] == "float16"):
                items.append({**item, "index": index, **case})
    return sorted(items, key=lambda item: int(item["size"]))


def record(
    backend: str, device: str, outcomes: Iterable[guard.Outcome], architecture: str
) -> list[results.Row]:
    """Rows of evidence from the outcomes of a plan's items: one for each kernel.

    Args:
        backend: Whose kernels they are.
        device: Of the tensors.
        outcomes: What became of the items.
        architecture: What failed cases count against; those that ran say themselves what ran.

    Returns:
        Per kernel and stage: ``passed``, the ids of its tests; ``failed``, ids and reasons;
        ``worst``, the largest error as a share of what the accuracy rule allows, with its test and
        result. A failed case counts against every kind of kernel that it may have come from; one
        that the backend refuses, as it may, is in no row.
    """
    rows: dict[Kernel, results.Row] = {}
    for outcome in outcomes:
        if refused(outcome):
            continue
        item = outcome.item
        test = proof.test_id(backend, item["table"], item["index"])
        if outcome.failure is None:
            kinds, ran = dict(outcome.result["margins"]), outcome.result["architecture"]
        else:
            failing = ("decode",) if item["table"] == "decode" else ("forward", "backward")
            kinds, ran = dict.fromkeys(failing), architecture
        for kind, margin in kinds.items():
            kernel = Kernel(backend, kind, item["dtype"], ran)
            row = rows.setdefault(
                kernel,
                {
                    **kernel._asdict(),
                    "stage": stage(backend, device),
                    "passed": [],
                    "failed": [],
                    "worst": None,
                },
            )
            if margin is None:
                row["failed"].append({"test": test, "reason": outcome.failure})
                continue
            row["passed"].append(test)
            if row["worst"] is None or margin[0] > row["worst"]["margin"]:
                row["worst"] = {"margin": margin[0], "result": margin[1], "test": test}
    return list(rows.values())


def compiled(kernel: Kernel, *, registers: int, spills: int, shared_bytes: int) -> results.Row:
    """A row of evidence from what a compiler said: registers, bytes of spills and shared memory."""
    figures = {"registers": registers, "spills": spills, "shared_bytes": shared_bytes}
    return {**kernel._asdict(), "stage": "compiled", **figures}


def path(facts: dict[str, Any], backend: str, how: str, root: Path = RESULTS) -> Path:
    """Where a backend's evidence of a stage lies: on a CPU one file for each instruction set."""
    folder = facts["device"] if how == "hardware" else how
    name = f"{backend}-{facts['kernel']}" if backend == "cpu" else backend
    return root / folder / f"evidence-{name}.json"


def run(
    backend: str,
    device: str,
    *,
    dry: bool,
    log: Path,
    until: float = float("inf"),
    isa: str | None = None,
) -> list[guard.Outcome]:
    """Run a backend's plan, each kernel family in a process of its own.

    Args:
        backend: Whose kernels.
        device: Of the tensors.
        dry: A few cases only.
        log: Where the processes' messages are added.
        until: ``time.monotonic()`` after which no case is begun.
        isa: The CPU backend's instruction set; None for the best one.
    """
    from . import worker

    command = worker.command(Path(__file__).with_name("gpu.py"), sys.executable)
    limits = guard.Limits(start_s=120, item_s=60, deaths=5, until=until)
    families: dict[tuple[str, str], list[guard.Item]] = {}
    for item in plan(backend, device, dry=dry):
        families.setdefault((item["table"], item["dtype"]), []).append(item)
    outcomes: list[guard.Outcome] = []
    for i, items in enumerate(families.values()):  # each has its part of the time that is left
        now = time.monotonic()
        part = limits._replace(until=now + (until - now) / (len(families) - i))
        outcomes += guard.run(command, items, part, log, {"ATTNFAST_CPU_ISA": isa} if isa else {})
    return outcomes


def refused(outcome: guard.Outcome) -> str | None:
    """Why the backend refused an item, or None."""
    reason: str | None = (outcome.result or {}).get("refused")
    return reason


def refusals(outcomes: Iterable[guard.Outcome]) -> str | None:
    """How many items the backend refused, and its reasons; None if it took all."""
    reasons = [reason for reason in map(refused, outcomes) if reason]
    return f"{len(reasons)} refused: {'; '.join(sorted(set(reasons)))}" if reasons else None


class Line(NamedTuple):
    """A kernel and all that is known of it, in words; a dash for nothing."""

    kernel: Kernel
    proven: str
    compiled: str
    hardware: str
    timed: str


def lines(root: Path = RESULTS, tree: Path = ROOT) -> list[Line]:
    """Every kernel of which there is evidence, and those of code of which there is none.

    Args:
        root: Where the files lie.
        tree: The sources that staleness is judged by.

    Raises:
        ValueError: A file cannot be read; one line.
    """
    known: dict[Kernel, dict[str, list[str]]] = {}
    for run_ in results.found("evidence", root):
        for row in run_.rows:
            kernel = Kernel(*(row[name] for name in Kernel._fields))
            column = "proven" if row["stage"] in ("interpreter", "emulator") else row["stage"]
            text = _evidence(row, run_) + _stale(row["backend"], run_, tree)
            known.setdefault(kernel, {}).setdefault(column, []).append(text)
    for run_ in results.found("timing", root):
        for kernel, text in _timed(run_).items():
            text += _stale(kernel.backend, run_, tree)
            known.setdefault(kernel, {}).setdefault("timed", []).append(text)
    for key, text in compiled_kernels.read(tree).items():
        known.setdefault(Kernel(*key), {}).setdefault("compiled", []).append(text)
    for backend in dispatch.NAMES:
        for architecture in CPU_ISAS if backend == "cpu" else ("any",):
            shown = any(
                kernel.backend == backend and architecture in ("any", kernel.architecture)
                for kernel in known
            )
            if backend != "reference" and not shown:
                kinds = KINDS_OF.get(backend, KINDS)
                known.update({Kernel(backend, kind, "any", architecture): {} for kind in kinds})
    columns = ("proven", "compiled", "hardware", "timed")
    return [
        Line(kernel, *("; ".join(found.get(column, ["-"])) for column in columns))
        for kernel, found in sorted(known.items(), key=lambda item: _order(item[0]))
    ]


def _order(kernel: Kernel) -> tuple[str, ...]:
    """Backends one after another, and in them what was compiled together."""
    return kernel.backend, kernel.architecture, kernel.kind, kernel.dtype


def _where(run_: results.Run) -> str:
    commit = (run_.facts["commit"]["id"] or "unknown")[:9]
    dirty = "+" if run_.facts["commit"]["dirty"] else ""
    return f"{commit}{dirty}, {run_.facts['date'][:10]}"


def _evidence(row: results.Row, run_: results.Run) -> str:
    if row["stage"] == "compiled":
        return (
            f"{row['registers']} registers, {row['spills']} B spilled,"
            f" {row['shared_bytes']} B shared, {_where(run_)}"
        )
    tests, failed = row["passed"], row["failed"]
    place = run_.facts["device"] if row["stage"] == "hardware" else row["stage"]
    names = sorted({test["test"] if isinstance(test, dict) else test for test in (*tests, *failed)})
    functions = ", ".join(sorted({name.partition("[")[0] for name in names}))
    text = f"{place}: {len(tests)} of {len(names)} cases of {functions}"
    if row["worst"]:
        worst = row["worst"]
        text += f", worst {worst['result']} at {worst['margin']:.0%} of the rule"
    return f"{text}, {_where(run_)}"


def _timed(run_: results.Run) -> dict[Kernel, str]:
    """By kernel, how many rows of the grid were timed."""
    counts: dict[Kernel, int] = {}
    for row in run_.rows:
        case, backend = row["case"], row.get("backend")
        if backend is None or "attnfast" not in row["contestants"]:
            continue
        work = case.get("work") or {"train": "forward+backward", "step": "forward+backward"}.get(
            case.get("mode", ""), "forward"
        )
        kinds = ["decode"] if row["suite"] == "decode" else work.split("+")
        if case.get("weights") or "weights" in case.get("option", ""):
            kinds = [*kinds, "weights"]
        for kind in kinds:
            kernel = Kernel(backend, kind, case["dtype"], row["kernel"])
            counts[kernel] = counts.get(kernel, 0) + 1
    return {
        kernel: f"{run_.facts['device']}: {rows} rows, {_where(run_)}"
        for kernel, rows in counts.items()
    }


def _stale(backend: str, run_: results.Run, tree: Path) -> str:
    """Whether the kernels' sources have changed since."""
    return "" if run_.facts["sources"] == environment.sources(backend, tree) else " (stale)"


def markdown(found: list[Line]) -> str:
    """The lines as a table."""
    rows = [
        [
            f"{line.kernel.backend}, {line.kernel.architecture}, {line.kernel.kind},"
            f" {DTYPE_NAMES.get(line.kernel.dtype, line.kernel.dtype)}",
            *line[1:],
        ]
        for line in found
    ]
    header = ["kernel", "proven", "compiled", "run on hardware", "timed"]
    return summary.table(header, rows, text=True)

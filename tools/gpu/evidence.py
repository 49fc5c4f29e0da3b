"""Running the tests' case tables by a backend, and putting on record what came out.

On hardware, in Triton's interpreter or on the emulator of the CUDA kernels. `python -m bench
evidence` shows what is on record, with ``--run`` it adds to it.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from attnfast import ops
from bench import RESULTS, environment, results

from . import guard, proof, worker

DRY_STEP = 60  # every so-manieth case of a table in a trial, without fp16


class Kernel(NamedTuple):
    """What evidence is about."""

    backend: str
    kind: str  # one of kernels.KINDS
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
    guarded: Callable[..., Iterator[guard.Outcome]] = guard.run,
) -> list[guard.Outcome]:
    """Run a backend's plan, each kernel family in a process of its own.

    Args:
        backend: Whose kernels.
        device: Of the tensors.
        dry: A few cases only.
        log: Where the processes' messages are added.
        until: ``time.monotonic()`` after which no case is begun.
        isa: The CPU backend's instruction set; None for the best one.
        guarded: `guard.run`, or that of a journal.
    """
    limits = guard.Limits(start_s=120, item_s=60, deaths=5, until=until)
    families: dict[tuple[str, str], list[guard.Item]] = {}
    for item in plan(backend, device, dry=dry):
        families.setdefault((item["table"], item["dtype"]), []).append(item)
    outcomes: list[guard.Outcome] = []
    for i, items in enumerate(families.values()):  # each has its part of the time that is left
        now = time.monotonic()
        part = limits._replace(until=now + (until - now) / (len(families) - i))
        outcomes += guarded(
            worker.COMMAND, items, part, log, {"ATTNFAST_CPU_ISA": isa} if isa else {}
        )
    return outcomes


def refused(outcome: guard.Outcome) -> str | None:
    """Why the backend refused an item, or None."""
    reason: str | None = (outcome.result or {}).get("refused")
    return reason


def refusals(outcomes: Iterable[guard.Outcome]) -> str | None:
    """How many items the backend refused, and its reasons; None if it took all."""
    reasons = [reason for reason in map(refused, outcomes) if reason]
    return f"{len(reasons)} refused: {'; '.join(sorted(set(reasons)))}" if reasons else None


def command(options: argparse.Namespace) -> int:
    """The command `python -m bench evidence`."""
    from . import kernels

    failed = 0
    if not (options.run or options.results.is_dir()):
        raise ValueError(f"bench: no evidence in {options.results}; --run makes some")
    if options.run:
        reason = environment.unavailable(options.backend, options.device)
        if reason is not None:
            raise ValueError(f"bench: nothing to run: {reason}")
        sets: list[str | None] = [None]
        if options.backend == "cpu" and not os.environ.get("ATTNFAST_CPU_ISA"):
            sets = [*ops.cpu_isas()]
        failed = sum(prove(options, isa) for isa in sets)
    print(kernels.text(kernels.lines(options.results)))
    return 1 if failed else 0


def prove(options: argparse.Namespace, isa: str | None) -> int:
    """Run the case tables on a backend, a CPU's by one instruction set; the number of failures."""
    settings = environment.settings(backend=options.backend, device=options.device)
    facts = environment.facts("evidence", settings)
    facts["kernel"] = isa or facts["kernel"]
    with tempfile.TemporaryDirectory() as folder:
        outcomes = run(
            options.backend, options.device, dry=options.dry, log=Path(folder) / "log.txt", isa=isa
        )
    how = stage(options.backend, options.device)
    if not options.dry:
        target = path(facts, options.backend, how, options.results)
        rows = record(options.backend, options.device, outcomes, facts["kernel"])
        results.save(target, facts, rows)
        print(f"wrote {target}")
    failed = [outcome for outcome in outcomes if outcome.failure]
    for outcome in failed:
        print(f"{options.backend} {outcome.item['id']}: {outcome.failure}", file=sys.stderr)
    name = f"{options.backend}, {facts['kernel']}"
    taken = [outcome for outcome in outcomes if not refused(outcome)]
    print(f"{name}: {len(taken) - len(failed)} of {len(taken)} cases right")
    if (text := refusals(outcomes)) is not None:
        print(f"{name}: {text}")
    return len(failed)

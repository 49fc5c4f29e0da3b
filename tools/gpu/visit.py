"""What `make gpu` does, step by step, with a time for each.

The first answer, which kernels are right, comes within ten minutes; then how fast they are; what
looks closer comes last. Outcomes are kept in a journal: the same command again goes on.
"""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from attnfast import dispatch
from bench import OURS, environment, results, suites
from bench.grid import DTYPE_NAMES, SUITES
from bench.results import case_name

from . import crosscheck, evidence, guard, page, worker

FIRST_ANSWER_S = 600.0
EVIDENCE_SHARE = 0.4  # of the time, where that is less
GRID_SHARE = 0.75  # of what is left then
CROSSCHECK_SHARE = 0.6  # of what is left after that; the sanitizer gets the rest
ROW_S = 120.0
SANITIZED = 4  # cases per backend, the largest of the smallest tenth
MOST_LINES = 60
# The suites in order of value.
VALUE = (
    "forward", "forward+backward", "decode", "varlen", "backward", "options", "module", "encoder",
)  # fmt: skip


class Visit:
    """One run: where it writes, what it may use, and what it has found."""

    def __init__(self, out: Path, until: float, *, dry: bool) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.until, self.dry = out, until, dry
        self.log = out / "log.txt"
        self.device = "cpu" if dry else "cuda"
        size = "smoke" if dry else "gpu"
        self.settings = environment.settings({}, size=size, device=self.device, threads=1)
        self.first_answer = time.monotonic() + FIRST_ANSWER_S
        stamp = {
            "device": environment.device_name(self.device),
            "size": size,
            "versions": environment.versions(self.device),
            "sources": [environment.sources(name) for name in ("cpu", "cuda", "triton")],
        }
        self.journal = guard.Journal(out / "journal.jsonl", stamp)
        self.refusals = self._refusals()
        self.backends = [name for name, reason in self.refusals.items() if reason is None]
        self.failures: list[str] = []
        self.lines: list[str] = []

    def _refusals(self) -> dict[str, str | None]:
        """By backend, why it does not run here, or None: seen by a first call, guarded as well."""
        limits = guard.Limits(start_s=120, item_s=120, deaths=9)
        names = [row.name for row in dispatch.backends_of(torch.device(self.device))]
        items = [
            {"task": "available", "backend": name, "device": self.device}
            for name in names
            if name != "reference"
        ]
        return {
            outcome.item["backend"]: outcome.failure or outcome.result
            for outcome in self.journal.run(worker.COMMAND, items, limits, self.log)
        }

    def say(self, line: str) -> None:
        """Print a line of progress."""
        print(line, flush=True)

    def share(self, part: float) -> float:
        """When a part of the time that is left will be over."""
        return time.monotonic() + part * max(0.0, self.until - time.monotonic())

    def facts(self, kind: str, backend: str) -> dict[str, Any]:
        """The head of a file of results."""
        return environment.facts(kind, self.settings._replace(backend=backend))


def run(out: Path, until: float, *, dry: bool) -> int:
    """All steps.

    Args:
        out: Where results are written.
        until: ``time.monotonic()`` when the last row may begin.
        dry: On the CPU, a few cases and smoke rows.

    Returns:
        1 if a case or row failed, else 0.
    """
    visit = Visit(out, until, dry=dry)
    _environment(visit)
    _evidence(visit)
    visit.say("")
    _table(visit)
    _grid(visit)
    _crosscheck(visit)
    _sanitize(visit)
    return _end(visit)


def _environment(visit: Visit) -> None:
    machine = environment.machine(visit.device)
    gpu = machine.get("gpu")
    name = f"{gpu['name']}, sm {gpu['capability']}" if gpu else f"{machine['cpu']} (dry run)"
    visit.lines.append(name)
    versions = environment.versions(visit.device)
    visit.lines.append(", ".join(f"{key} {value}" for key, value in versions.items()))
    commit = environment.commit()
    visit.lines.append(
        f"commit {(commit['id'] or 'unknown')[:12]}{' with changes' if commit['dirty'] else ''};"
        f" our backends here: {', '.join(visit.backends) or 'none'}"
    )
    for backend, reason in visit.refusals.items():
        if reason is not None:
            visit.lines.append(f"  {backend}: {reason}"[:200])
    for line in visit.lines:
        visit.say(line)


def _crosscheck(visit: Visit) -> None:
    """The emulator of the CUDA kernels beside the GPU; in a dry run, two of its schedules."""
    until = visit.share(CROSSCHECK_SHARE)
    reason = None if visit.dry else visit.refusals.get("cuda", "not part of this build")
    emulator = None
    if reason is None:
        emulator, reason = crosscheck.library(visit.log, build=not visit.dry)
    if emulator is None:
        visit.lines.append(f"cuda, emulator and GPU: not compared: {reason}"[:200])
        visit.say(visit.lines[-1])
        return
    if reason is not None:
        visit.lines.append(f"cuda, emulator: an older library serves, the newest is {reason}")
    architecture = None if visit.dry else environment.architecture("cuda", visit.device)
    pair = crosscheck.sides(emulator, architecture)
    items = crosscheck.plan(dry=visit.dry, turing=architecture == "sm_75")
    rows = crosscheck.run(worker.COMMAND, pair, items, visit.log, until)
    if rows:
        results.save(visit.out / "crosscheck.json", visit.facts("crosscheck", "cuda"), rows)
    visit.failures += [f"{row['id']}: {row['failure']}" for row in rows if row["failure"]]
    for line in crosscheck.lines(pair, rows, len(items)):
        visit.lines.append(line)
        visit.say(line)


def _evidence(visit: Visit) -> None:
    """The case tables, each backend's part of the time the same."""
    end = min(visit.first_answer, visit.share(EVIDENCE_SHARE))
    for i, backend in enumerate(visit.backends):
        now = time.monotonic()
        outcomes = evidence.run(
            backend,
            visit.device,
            dry=visit.dry,
            log=visit.log,
            until=now + (end - now) / (len(visit.backends) - i),
            guarded=visit.journal.run,
        )
        done = [x for x in outcomes if x.failure != guard.NO_TIME]
        ran = environment.architecture(backend, visit.device)
        rows = evidence.record(backend, visit.device, done, ran)
        if rows:
            path = visit.out / f"evidence-{backend}.json"
            results.save(path, visit.facts("evidence", backend), rows)
        for row in rows:
            worst = f", worst {row['worst']['margin']:.0%} of the rule" if row["worst"] else ""
            visit.lines.append(
                f"{backend} {row['kind']} {DTYPE_NAMES[row['dtype']]}:"
                f" {len(row['passed'])} cases right, {len(row['failed'])} wrong{worst}"
            )
            visit.say(visit.lines[-1])
        visit.failures += [f"{backend} {x.item['id']}: {x.failure}" for x in done if x.failure]
        if (text := evidence.refusals(done)) is not None:
            visit.lines.append(f"{backend}: {text}"[:200])
        if len(done) < len(outcomes):
            visit.lines.append(
                f"{backend}: {len(outcomes) - len(done)} cases not run: no time left"
            )


def _sanitize(visit: Visit) -> None:
    tool = shutil.which("compute-sanitizer")
    if tool is None or visit.dry:
        visit.lines.append("compute-sanitizer: " + ("not run" if tool else "not installed"))
        return
    for backend in visit.backends:
        items = evidence.plan(backend, visit.device)
        small = items[: max(1, len(items) // 10)]
        chosen = small[:: max(1, len(small) // SANITIZED)][:SANITIZED]
        for check in ("memcheck", "racecheck"):
            command = [tool, "--tool", check, "--error-exitcode", "9", *worker.COMMAND]
            limits = guard.Limits(start_s=180, item_s=300, deaths=1, until=visit.until)
            outcomes = list(visit.journal.run(command, chosen, limits, visit.log))
            wrong = [x for x in outcomes if x.failure and x.failure != guard.NO_TIME]
            visit.failures += [f"{check} {backend} {x.item['id']}: {x.failure}" for x in wrong]
            errors = _sanitizer_errors(visit.log)
            ran = sum(x.failure is None for x in outcomes)
            visit.lines.append(f"{check} {backend}: {ran} cases, {errors} errors reported so far")
            visit.say(visit.lines[-1])


def _sanitizer_errors(log: Path) -> int:
    """The sum of the tool's ``ERROR SUMMARY: N errors`` lines."""
    text = log.read_text(errors="replace") if log.exists() else ""
    return sum(int(count) for count in re.findall(r"ERROR SUMMARY: (\d+) error", text))


def _grid(visit: Visit) -> None:
    """Ceilings, then rows in order of value until the time is over."""
    until = visit.until if visit.dry else visit.share(GRID_SHARE)
    limits = guard.Limits(start_s=120, item_s=ROW_S, deaths=20, until=until)
    settings = visit.settings._asdict()
    [outcome] = visit.journal.run(
        worker.COMMAND,
        [{"task": "ceilings", "settings": settings}],
        limits._replace(until=float("inf")),
        visit.log,
    )
    if outcome.failure:
        visit.failures.append(f"ceilings: {outcome.failure}")
    facts = visit.facts("timing", visit.backends[0] if visit.backends else "reference")
    facts["ceilings"] = outcome.result
    visit.lines += _ceiling_lines(outcome.result)
    rows: list[results.Row] = []
    refused: list[guard.Outcome] = []
    items = rows_by_value(visit)
    for item in items:
        item["ceilings"] = outcome.result
    for done in visit.journal.run(worker.COMMAND, items, limits, visit.log):
        if done.failure == guard.NO_TIME:
            ran = len(rows) + len(refused)
            visit.lines.append(f"grid: {ran} of {len(items)} rows, then no time was left")
            break
        if done.failure:
            visit.failures.append(f"{done.item['suite']} {done.item['id']}: {done.failure}")
            visit.say(visit.failures[-1])
            continue
        if evidence.refused(done):
            refused.append(done)
            continue
        rows.append(done.result)
        visit.say(suites.line(done.result))
        results.save(visit.out / "timing.json", facts, rows)
    if (text := evidence.refusals(refused)) is not None:
        visit.lines.append(f"grid: of {len(items)} rows {text}"[:200])
    visit.lines += [_row_line(row) for row in rows]


def rows_by_value(visit: Visit) -> list[guard.Item]:
    """Rows of all suites, bf16 before fp32, each suite's first rows before its later ones.

    In a dry run only the first of each suite and dtype.
    """
    size = visit.settings.size
    ranked = []
    for suite in VALUE:
        cases = SUITES[suite](size)
        place: dict[str, int] = {}
        for index, case in enumerate(cases):
            place[case.dtype] = place.get(case.dtype, 0) + 1
            for backend in visit.backends or [None]:
                item = {
                    "task": "row",
                    "suite": suite,
                    "index": index,
                    "id": str(case),
                    "backend": backend,
                    "settings": visit.settings._asdict(),
                }
                rank = (case.dtype == "float32", place[case.dtype], VALUE.index(suite))
                ranked.append((rank, item))
    ranked.sort(key=lambda pair: pair[0])
    return [item for rank, item in ranked if not visit.dry or rank[1] == 1]


def _ceiling_lines(found: dict[str, Any] | None) -> list[str]:
    if not found:
        return []
    rates = [f"{DTYPE_NAMES[x]} {rate / 1e12:.1f}" for x, rate in found["gemm"].items()]
    copy = max(rate for _, rate in found["copy"])
    return [f"ceilings: matrix product {', '.join(rates)} TFLOP/s; copy {copy / 1e9:.0f} GB/s"]


def _row_line(row: results.Row) -> str:
    case = row["case"]
    name = f"{row['suite']} {DTYPE_NAMES[case['dtype']]} {case_name(row)}"
    named = row["contestants"]
    times = sorted((one["median_s"], who) for who, one in named.items())
    text = ", ".join(f"{who} {seconds * 1e3:.3g}" for seconds, who in times[:3])
    mark = f" {row['ratio']:.2f}x" if row["ratio"] is not None else ""
    share = named.get(OURS, {}).get("share")
    of_limit = f" {share:.0%} of limit" if share else ""
    return f"{name}:{mark}{of_limit} [ms: {text}]"[:160]


def table(head: list[str], failures: list[str], most: int = MOST_LINES) -> list[str]:
    """The last table: what was found, failures first cut to a third, never more than ``most``."""
    shown = failures[: most // 3]
    if len(failures) > len(shown):
        shown.append(f"... and {len(failures) - len(shown)} more failures in log.txt")
    room = most - len(shown) - 2
    body = head[:room]
    if len(head) > room:
        body = [*head[: room - 1], f"... and {len(head) - room + 1} more lines in timing.json"]
    title = f"failures: {len(failures)}" if failures else "no failures"
    return [*body, title, *shown]


def _table(visit: Visit) -> None:
    """Print what was found so far, and keep it."""
    lines = table(visit.lines, visit.failures)
    (visit.out / "summary.txt").write_text("\n".join(lines) + "\n")
    for line in lines:
        visit.say(line)


def _end(visit: Visit) -> int:
    with visit.log.open("a") as log:
        log.writelines(f"{line}\n" for line in visit.failures)
    page.write(visit.out, visit.lines[:3], visit.failures)
    if not visit.dry:
        folder = f"bench/results/{environment.device_name(visit.device)}"
        visit.say(f"to publish: {visit.out}/*.json into {folder}, then `python -m bench report`")
    visit.say(f"one page: {visit.out / page.NAME}")
    visit.say("")
    _table(visit)
    return 1 if visit.failures else 0

"""The emulator of the CUDA kernels against the GPU: whether what tests ran is what hardware does.

Small calls are run twice, by a process that has the emulator and by one that has the GPU, with the
same inputs and by the same kernels. Both sides round the same numbers to 16 bits, sum in fp32, and
differ in how: hardware adds a tensor core's products in an order of its own and may drop other
bits than the emulator, and its ``ex2.approx`` has another last bit. So results may not differ by
more than, element by element,

    4 unit + e |x| + n unit32 + spacing

`unit` is that of the tests' accuracy rule (``tests/dense.py``): how far the rounding of every term
to the 16-bit dtype, of eps e, moves a sum. A rounded term differs only where fp32's errors carry it
over the middle between two neighbours, and then by one spacing; so does the sum x, rounded in its
turn. `unit32` is the same with es of fp32 in the place of e. Each addition of a chain may
cost it once on either side; chains are D / 8 long in scores, and S / 8 or T / 8 over the keys or
queries of a key head: n = (D + max(S, T H / H_kv)) / 4. `spacing` is that of subnormal numbers.

NaN and Inf have to be in the same places. Where dropout drops, the bound of the returned weights is
zero, and elsewhere smaller than they are: the masks have to be the same.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import ROOT, results
from bench.grid import DTYPE_NAMES

from . import guard, proof

HEAD_DIMS = (32, 64, 96, 128, 192, 256)  # each is kernels of its own
DRY_STEP = 29  # every so-manieth case in a trial
GPUS = (75, 80, 86, 89, 90, 100, 120)  # that the emulator can play
BUILD_S = 600
ITEM_S = 120
LIBRARY = ROOT / "build" / "emulator" / "_emulator.so"
Results = dict[str, Tensor]
# Fields of cases.Case: each form of every kernel, with more than one tile of queries and of keys.
FORMS: dict[str, dict[str, Any]] = {
    "short": {"T": 100, "S": 100},  # up to D = 128 backward is one kernel
    "long": {"grads": ("out", "lse")},
    "causal": {"causal": True, "align": "bottom_right"},
    "window": {"window": (40, 9)},
    "mask": {"mask": "bts", "B": 2, "T": 70},
    "bias": {"bias": "hts", "T": 70},
    "softcap": {"softcap": 2.0, "T": 70},
    "dropout": {"dropout_p": 0.3, "weights": "per head", "T": 70},
    "plain blocks": {"blocks": "blocks 64", "T": 70},
    "blocks": {"blocks": "blocks 64", "T": 70, "softcap": 2.0},
    "grouped": {"H": 4, "H_kv": 2, "T": 70, "causal": True},
    "packed": {"lengths": ((5, 70), (70, 5), (66, 130)), "causal": True},
}


class Side(NamedTuple):
    """One of the two that are compared."""

    name: str
    device: str
    variables: dict[str, str]  # of its process's environment


class Agreement(NamedTuple):
    """How far two sides' results agree."""

    margin: float  # the largest difference as a share of its bound
    result: str  # and whose it is
    same: float  # the share of numbers with the same bits


def cases() -> list[tuple[Any, str]]:
    """Calls of the tests' tables' kinds, each with its way of decoding or ""."""
    tables, decode = proof.module("cases"), proof.module("decode_cases")
    plain = tables.Case(B=1, H=1, H_kv=1, T=150, S=200)
    everything = replace(tables.EVERYTHING, H=2, H_kv=1, D_v=0)
    cache = decode.DecodeCase("cache", lengths=(129, 300), H=8)
    rest = decode.DecodeCase(
        "cache_options", lengths=(129, 300), T=2, softcap=4.0, alibi="h", sinks=True, bias="bs"
    )
    found: list[tuple[Any, str]] = []
    for dtype in (torch.bfloat16, torch.float16):
        for D in HEAD_DIMS:
            forms = [replace(plain, name=name, **form) for name, form in FORMS.items()]
            found += [(replace(x, D=D, dtype=dtype), "") for x in (*forms, everything)]
            ways = ((cache, "contiguous"), (cache, "paged"), (rest, "contiguous"))
            found += [(replace(x, D=D, D_v=D, dtype=dtype), way) for x, way in ways]
    return found


def plan(*, dry: bool, turing: bool = False) -> list[guard.Item]:
    """What is to be compared: few cases in a trial, and what an sm_75 takes on one."""
    items = []
    for index, (case, way) in enumerate(cases()):
        dtype = str(case.dtype).removeprefix("torch.")
        refused = turing and (dtype == "bfloat16" or case.D > 128)
        if not refused and not (dry and index % DRY_STEP):
            name = f"{case}-{way}" if way else str(case)
            items.append({"task": "crosscheck", "index": index, "id": name, "dtype": dtype})
    return items


def library(log: Path, *, build: bool) -> tuple[Path | None, str | None]:
    """The emulator's library, and what stands in the way of it or of bringing it up to date.

    Args:
        log: Where a compiler's messages are added.
        build: Whether to build it, where the tree has its sources.
    """
    reason = "not built: make emulator"
    if build:
        command = [sys.executable, "setup.py", "-q", "build_emulator"]
        try:
            done = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, timeout=BUILD_S, check=False
            )
        except subprocess.TimeoutExpired:
            reason = f"not built within {BUILD_S} s"
        else:
            with log.open("a") as file:
                file.write(done.stdout + done.stderr)
            if done.returncode == 0 and LIBRARY.exists():
                return LIBRARY, None
            said = done.stderr.strip().splitlines() or ["no message"]
            reason = f"not built: {said[-1]}"
    return (LIBRARY, reason if build else None) if LIBRARY.exists() else (None, reason)


def sides(emulator: Path, architecture: str | None) -> tuple[Side, Side]:
    """The emulator and the GPU of an architecture (sm_90); without one, two of its schedules."""

    def emulated(name: str, seed: int, number: int) -> Side:
        variables = {
            "ATTNFAST_EMULATOR": str(emulator),
            "ATTNFAST_EMULATOR_SEED": str(seed),
            "ATTNFAST_EMULATOR_ARCH": str(number),
            "CUDA_VISIBLE_DEVICES": "",
        }
        return Side(name, "cpu", variables)

    if architecture is None:
        return emulated("schedule 0", 0, 80), emulated("schedule 1", 1, 80)
    asked = int(architecture.removeprefix("sm_"))
    played = max((number for number in GPUS if number <= asked), default=80)
    return emulated("emulator", 0, played), Side("GPU", "cuda", {"ATTNFAST_EMULATOR": "0"})


def run(
    command: list[str],
    pair: tuple[Side, Side],
    items: list[guard.Item],
    log: Path,
    until: float = float("inf"),
) -> list[results.Row]:
    """Have both sides compute, each in a process of its own, and compare.

    Args:
        command: Starts a process that calls `worker.main`.
        pair: Who computes.
        items: Of `plan`.
        log: Where the processes' messages are added.
        until: ``time.monotonic()`` after which no case is begun.

    Returns:
        By case: ``id``, ``dtype``; ``failure``, which side failed and why, or how they differ, or
        None; ``margin``, ``result`` and ``same`` of their `Agreement`, or None; ``seconds`` of
        both. Cases for which no time was left have no row.
    """
    limits = guard.Limits(start_s=120, item_s=ITEM_S, deaths=3)
    rows: list[results.Row] = []
    with tempfile.TemporaryDirectory() as folder:
        given = [{**x, "device": pair[0].device, "save": f"{folder}/{x['index']}"} for x in items]
        first = guard.run(command, given, limits._replace(until=until), log, pair[0].variables)
        computed = []
        for outcome in first:
            if outcome.failure is None:
                computed.append(outcome)
            elif outcome.failure != guard.NO_TIME:
                rows.append(_row(outcome, pair[0], [outcome.seconds]))
        given = [
            {**x.item, "device": pair[1].device, "save": None, "against": x.item["save"]}
            for x in computed
        ]
        second = guard.run(command, given, limits, log, pair[1].variables)
        for before, outcome in zip(computed, second, strict=True):
            rows.append(_row(outcome, pair[1], [before.seconds, outcome.seconds]))
    return rows


def _row(outcome: guard.Outcome, side: Side, seconds: list[float]) -> results.Row:
    failure = None if outcome.failure is None else f"{side.name}: {outcome.failure}"
    agreement = outcome.result or dict.fromkeys(Agreement._fields)
    names = {name: outcome.item[name] for name in ("id", "dtype")}
    return {**names, "failure": failure, **agreement, "seconds": seconds}


def work(item: guard.Item) -> dict[str, Any] | None:
    """Compute one case on this process's side; keep the results, or compare them with others."""
    case, way = cases()[item["index"]]
    if way:
        found, problem = proof.decode("cuda", item["device"], case, way)
    else:
        found, problem = proof.attention("cuda", item["device"], case)
    if item["save"] is not None:
        torch.save(found, item["save"])
        return None
    return compare(found, torch.load(item["against"]), problem)._asdict()


def compare(found: Results, expected: Results, problem: Any) -> Agreement:
    """Hold two sides' results to the bound that stands above.

    Raises:
        AssertionError: They differ by more; one line for each result.
    """
    q, k, v = problem.inputs[:3]
    dense = proof.module("dense").dense
    in_fp32 = problem._replace(inputs=problem.inputs._replace(q=q.float()))
    units, units32 = dense(problem), dense(in_fp32)
    chain = (
        max(q.shape[3], v.shape[3]) + max(k.shape[2], q.shape[2] * q.shape[1] // k.shape[1])
    ) / 4
    worst, faults = (0.0, "out"), []
    if found.keys() != expected.keys():
        raise AssertionError(f"results {sorted(found)}, expected {sorted(expected)}")
    for name, x in found.items():
        y = expected[name]
        fault = _special(x, y)
        if fault is not None:
            faults.append(f"{name}: {fault}")
            continue
        info = torch.finfo(x.dtype)
        bound = 4 * units[name].unit + chain * units32[name].unit + info.eps * x.double().abs()
        bound = bound + info.eps * info.smallest_normal
        finite = x.isfinite()
        difference, bound = (x.double() - y.double())[finite].abs(), bound[finite]
        share = float((difference / bound).max()) if difference.numel() else 0.0
        worst = max(worst, (share, name), key=lambda pair: pair[0])
        if not share <= 1.0:
            at = int((difference / bound).argmax())
            faults.append(f"{name}: differs by {difference[at]:.3g}, bound {bound[at]:.3g}")
    if faults:
        raise AssertionError("\n".join(faults))
    total = sum(x.numel() for x in found.values())
    same = sum(int(_same(x, expected[name]).sum()) for name, x in found.items())
    return Agreement(worst[0], worst[1], same / total)


def _special(x: Tensor, y: Tensor) -> str | None:
    """What is wrong with a result beside its finite numbers, or None."""
    if x.shape != y.shape or x.dtype != y.dtype:
        return f"{x.dtype} {tuple(x.shape)}, expected {y.dtype} {tuple(y.shape)}"
    special = ~(x.isfinite() & y.isfinite())
    return None if _same(x, y)[special].all() else "NaN or Inf out of place"


def _same(x: Tensor, y: Tensor) -> Tensor:
    return x.eq(y) | x.isnan() & y.isnan()


def lines(pair: tuple[Side, Side], rows: Iterable[results.Row], planned: int) -> list[str]:
    """What a summary says: the cases that agree, by dtype, and how well."""
    found = []
    names, rows = " and ".join(side.name for side in pair), list(rows)
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        ran = [row for row in rows if row["dtype"] == dtype]
        right = [row for row in ran if row["failure"] is None]
        line = f"cuda, {names}, {DTYPE_NAMES[dtype]}: {len(right)} cases agree"
        line += f", {len(ran) - len(right)} do not"
        if right:
            worst = max(right, key=lambda row: float(row["margin"]))
            same = sum(row["same"] for row in right) / len(right)
            line += f", {same:.2%} of numbers the same bits"
            line += f", worst {worst['result']} at {worst['margin']:.0%} of the bound"
        found.append(line)
    if len(rows) < planned:
        found.append(f"cuda, {names}: {planned - len(rows)} cases not run: no time left")
    return found

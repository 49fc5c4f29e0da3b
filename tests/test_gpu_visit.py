"""The way to a GPU, as far as it goes without one: guarded work, clocks, cases, a dry run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import clock, environment, results
from tools.gpu import evidence, guard, proof, visit, worker
from tools.gpu.__main__ import main

ROOT = Path(__file__).resolve().parent.parent
ABSENT = ("pytest", "pandas", "matplotlib", "pytest_benchmark")  # on a machine with a GPU


WORKER = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from tools.gpu import guard

def work(item):
    if item["do"] == "crash":
        os.abort()
    if item["do"] == "exit":
        os._exit(7)
    if item["do"] == "hang":
        time.sleep(60)
    if item["do"] == "raise":
        raise ValueError("wrong\\nin two lines")
    if item["do"] == "poison":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    print("what libraries print is no answer")
    return [item["do"], os.getpid()]

guard.serve(work, lambda error: "CUDA error" in str(error))
"""


@pytest.fixture
def guarded(tmp_path):
    """Outcomes of items that do what their names say."""

    def run(*names, **limits):
        script = tmp_path / "worker.py"
        script.write_text(WORKER)
        limits = {"start_s": 30, "item_s": 2, "deaths": 9, **limits}
        items = [{"do": name} for name in names]
        log = tmp_path / "log.txt"
        command = [sys.executable, str(script)]
        return list(guard.run(command, items, guard.Limits(**limits), log))

    return run


def test_a_failure_costs_only_its_item(guarded, tmp_path):
    names = ("ok", "ok", "crash", "ok", "exit", "raise", "ok", "hang", "ok")
    outcomes = guarded(*names)
    assert [x.item["do"] for x in outcomes] == list(names)
    assert [x.failure for x in outcomes] == [
        None, None, "crash: SIGABRT", None, "crash: exit code 7", "ValueError: wrong; in two lines",
        None, "hang: no answer in 2 s", None,
    ]  # fmt: skip
    processes = [x.result[1] for x in outcomes if x.failure is None]
    assert processes[0] == processes[1], "one process for as long as nothing happens"
    assert len(set(processes)) == 4
    assert "what libraries print" in (tmp_path / "log.txt").read_text()


def test_a_hanging_process_is_killed(guarded):
    [outcome] = guarded("hang", item_s=0.2)
    assert outcome.failure == "hang: no answer in 0.2 s"
    assert outcome.seconds < 20
    children = subprocess.run(
        ["ps", "-o", "args=", "--ppid", str(os.getpid())], capture_output=True, text=True
    )
    assert "ps -o" in children.stdout
    assert "worker.py" not in children.stdout


def test_a_lost_device_gets_a_new_process(guarded):
    first, poisoned, after = guarded("ok", "poison", "ok")
    assert poisoned.failure.startswith("RuntimeError: CUDA error")
    assert first.result[1] != after.result[1]


def test_giving_up(guarded):
    outcomes = guarded("crash", "crash", "ok", "ok", deaths=2)
    assert outcomes[2].failure == outcomes[3].failure == "left undone after 2 crashes or hangs"
    [late] = guarded("ok", until=time.monotonic() - 1)
    assert late.failure == "no time left"


def test_a_run_that_was_cut_short_goes_on(tmp_path):
    script, path, log = (tmp_path / x for x in ("worker.py", "journal.jsonl", "log.txt"))
    script.write_text(WORKER)
    command = [sys.executable, str(script)]
    limits = guard.Limits(start_s=30, item_s=2, deaths=2)

    def run(stamp, *items, **changes):
        given = [{"do": do, "n": n, "ceilings": len(items)} for n, do in enumerate(items)]
        journal = guard.Journal(path, {"device": stamp})
        return list(journal.run(command, given, limits._replace(**changes), log))

    first = run("a", "ok", "crash", "raise")
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 4
    path.write_text("".join(lines)[:-20])  # killed while it wrote the last
    again = run("a", "ok", "crash", "raise", "ok")
    assert again[:2] == [x._replace(item={**x.item, "ceilings": 4}) for x in first[:2]]
    assert again[2].failure == first[2].failure
    assert again[3].failure is None
    assert again[3].result != first[0].result, "another item"
    [*_, late] = run("a", "ok", "crash", "raise", "ok", "ok", until=time.monotonic() - 1)
    assert late.failure == "no time left"
    [*_, done] = run("a", "ok", "crash", "raise", "ok", "ok")
    assert done.failure is None, "what had no time is done now"
    assert run("b", "ok")[0].result != first[0].result, "another machine"


class FakeCuda:
    """A GPU whose clock is advanced by what is sent to it; records the order of everything."""

    def __init__(self, host_s=0.0):
        self.now, self.log, self.host_s = 0.0, [], host_s

    def get_device_properties(self, index):
        return SimpleNamespace(L2_cache_size=1 << 20, clock_rate=1e6)

    def _sleep(self, cycles):
        self.log.append(("sleep", cycles / 1e9))
        self.now += cycles / 1e9

    def Event(self, enable_timing):
        gpu = self

        class Event:
            def record(self):
                gpu.log.append(("event", gpu.now))
                self.at = gpu.now

            def synchronize(self):
                gpu.log.append(("synchronize", gpu.now))

            def elapsed_time(self, other):
                return (other.at - self.at) * 1e3

        return Event()

    def call(self, seconds):
        def run():
            time.sleep(self.host_s)
            self.log.append(("call", seconds))
            self.now += seconds
            return {"out": torch.ones(1)}

        return run


def test_a_gpu_is_timed_by_events_after_a_flush():
    gpu = FakeCuda(host_s=0.003)
    flush = torch.ones(4)
    timer = clock.EventClock(gpu, flush)
    reading = timer.read(gpu.call(0.25))
    assert reading.seconds == pytest.approx(0.25)
    assert 0.003 <= reading.host_s < 0.1
    assert flush.sum() == 0
    names = [name for name, _ in gpu.log]
    assert names == ["sleep", "event", "call", "event", "synchronize"]
    timer.read(gpu.call(0.25))
    leads = [seconds for name, seconds in gpu.log if name == "sleep"]
    assert leads[1] >= 1.4 * 0.003, "the GPU is busy while the host issues the call"


def test_a_call_that_cannot_be_captured_is_timed_as_it_is():
    class Uncapturable(FakeCuda):
        def Stream(self):
            raise RuntimeError("operation not permitted when stream is capturing")

        def synchronize(self):
            self.log.append(("synchronize", self.now))

    gpu = Uncapturable()
    call = gpu.call(0.1)
    assert clock.EventClock(gpu, torch.ones(1)).prepared(call) is call


def test_memory_on_a_gpu_is_what_the_allocator_added():
    gpu = FakeCuda()
    gpu.synchronize = gpu.reset_peak_memory_stats = lambda: None
    gpu.memory_allocated, gpu.max_memory_allocated = lambda: 1000, lambda: 5000
    timer = clock.EventClock(gpu, torch.ones(1))
    assert timer.peak(gpu.call(0.1))[1] == 4000


def test_cases_come_smallest_first_and_are_named_as_tests():
    plan = evidence.plan("cpu", "cpu")
    sizes = [item["size"] for item in plan]
    assert sizes == sorted(sizes)
    assert len(plan) == proof.count("attention") + proof.count("decode")
    firsts = [next(x for x in plan if x["table"] == table) for table in proof.TABLES]
    names = [proof.test_id("cpu", x["table"], x["index"]) for x in firsts]
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", *names]
    collected = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert collected.stdout.splitlines()[:2] == names, collected.stdout + collected.stderr


def test_a_case_is_judged_by_the_accuracy_rule(monkeypatch):
    judged = proof.run("cpu", "cpu", "attention", 0)
    assert judged.margins.keys() == {"forward", "backward"}
    assert all(0 <= margin <= 1 for margin, _ in judged.margins.values())
    cases = proof.module("cases")
    right = cases.run
    monkeypatch.setattr(
        cases, "run", lambda *given: {name: x + 0.01 for name, x in right(*given).items()}
    )
    with pytest.raises(AssertionError, match="beyond the accuracy rule"):
        proof.run("cpu", "cpu", "attention", 0)


def test_what_a_backend_refuses_is_no_failure(tmp_path):
    """The CUDA kernels, on their emulator, take no fp32 and no D above 256."""
    emulator = ROOT / "build" / "emulator" / "_emulator.so"
    if not emulator.exists():
        pytest.skip("the emulator of the CUDA kernels is not built: make emulator")
    plan = evidence.plan("cuda", "cpu")
    fp32, bf16 = (next(x for x in plan if x["dtype"] == name) for name in ("float32", "bfloat16"))
    wide = next(x for x in plan if "D512:" in x["id"] and x["dtype"] == "bfloat16")
    settings = environment.settings({}, size="smoke", threads=1)._asdict()
    row = {"task": "row", "suite": "forward", "index": 0, "ceilings": None, "settings": settings}
    asked = {"task": "available", "backend": "cuda", "device": "cpu"}
    first, *cases, timed = guard.run(
        worker.COMMAND,
        [asked, fp32, bf16, wide, row | {"id": "row", "backend": "cuda"}],
        guard.Limits(start_s=120, item_s=60, deaths=1),
        tmp_path / "log.txt",
        {"ATTNFAST_EMULATOR": str(emulator), "OMP_NUM_THREADS": "1"},
    )
    assert (first.result, first.failure) == (None, None)
    assert not any(x.failure for x in (*cases, timed)), cases
    reasons = ["takes bfloat16 and float16, got float32", "takes D and D_v up to 256, got 512"]
    assert [evidence.refused(x) for x in cases] == [reasons[0], None, reasons[1]]
    assert evidence.refused(timed) == reasons[0]
    assert evidence.refusals(cases) == f"2 refused: {reasons[1]}; {reasons[0]}"
    assert evidence.refusals([cases[1]]) is None
    rows = evidence.record("cuda", "cpu", cases, "none")
    assert {(row["dtype"], row["kind"]) for row in rows} <= {
        ("bfloat16", "forward"), ("bfloat16", "backward")
    }  # fmt: skip
    assert not any(row["failed"] for row in rows)


def test_the_last_table_has_at_most_60_lines():
    head = [f"line {i}" for i in range(100)]
    failures = [f"failure {i}" for i in range(50)]
    for few in (0, 5, 50):
        lines = visit.table(head, failures[:few])
        assert len(lines) <= 60
        assert f"failures: {few}" in lines if few else "no failures" in lines
    assert "... and 30 more failures in log.txt" in visit.table(head, failures)
    assert visit.table(["a"], []) == ["a", "no failures"]


def gpu(*arguments, **variables):
    """`tools/gpu` as a user runs it, where only torch, Triton and numpy are installed."""
    blocked = f"import sys; sys.modules.update(dict.fromkeys({ABSENT!r}))"
    program = (
        f"{blocked}; import runpy; sys.argv = {['gpu', *map(str, arguments)]!r};"
        f"runpy.run_path({str(ROOT / 'tools' / 'gpu')!r}, run_name='__main__')"
    )
    environ = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        [sys.executable, "-c", program], cwd="/", env=environ, capture_output=True, text=True,
        timeout=240,
    )  # fmt: skip


def test_dry_run(tmp_path):
    done = gpu("--out", tmp_path, "--minutes", "4", "--dry")
    assert done.returncode == 0, done.stdout + done.stderr
    summary = (tmp_path / "summary.txt").read_text()
    assert len(summary.splitlines()) <= 60
    assert done.stdout.endswith(summary)
    assert "no failures" in summary
    assert "cpu backward fp32: " in summary
    assert "ceilings: matrix product" in summary
    timing = results.load(tmp_path / "timing.json", "timing")
    suites = {"forward", "backward", "options", "decode", "varlen", "module", "encoder"}
    assert suites <= {row["suite"] for row in timing.rows}
    proven = results.load(tmp_path / "evidence-cpu.json", "evidence")
    assert {"forward", "backward", "decode"} <= {row["kind"] for row in proven.rows}
    assert all(not row["failed"] for row in proven.rows)
    page = (tmp_path / "page.md").read_text()
    assert "| cpu backward | fp32 |" in page
    assert "No plots: matplotlib is not installed here" in page
    assert page.count("| forward |") == sum(row["suite"] == "forward" for row in timing.rows)
    again = gpu("--out", tmp_path, "--minutes", "4", "--dry")
    assert again.returncode == 0, again.stdout + again.stderr
    assert results.load(tmp_path / "timing.json", "timing").rows == timing.rows, "not timed again"
    if not (ROOT / "build" / "emulator" / "_emulator.so").exists():
        assert "cuda, emulator and GPU: not compared: not built: make emulator" in summary
        return
    compared = results.load(tmp_path / "crosscheck.json", "crosscheck").rows
    assert len(compared) >= 5
    assert all(row["same"] == 1 for row in compared), "a schedule changes no bit"
    assert "cuda, schedule 0 and schedule 1, bf16: " in summary


def test_make_gpu_runs_this_script():
    environ = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    for dry, end in (("1", " --dry"), ("0", ""), ("", "")):
        command = ["make", "-n", "gpu", f"DRY={dry}", "OUT=x", "MINUTES=4"]
        done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert f"{done.stdout.strip()}|".endswith(f' tools/gpu --out "x" --minutes 4{end}|')


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--minutes", "5"), "--out DIR is needed"),
        (("--out", "x", "--minutes", "-1"), "must be a positive number, got '-1'"),
        (("--out", "/dev/null/x", "--dry"), "--out: "),
        (("--out", "/dev/null/x"), "no GPU that this torch can use"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message, monkeypatch, capsys):
    if torch.cuda.is_available() and "GPU" in message:
        pytest.skip("there is one")
    monkeypatch.setattr(sys, "path", [*sys.path])  # which the command orders anew
    with pytest.raises(SystemExit) as stopped:
        main([*arguments])
    printed = capsys.readouterr()
    assert (stopped.value.code, printed.out) == (2, "")
    assert len(printed.err.splitlines()) == 1
    assert printed.err.startswith("gpu: ")
    assert message in printed.err

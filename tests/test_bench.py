"""The benchmarks work: a quick run from end to end, the rounds, the report, and bad input."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
MARKED = "# Title\n\n<!-- bench:begin -->\nold\n<!-- bench:end -->\n\nThe rest.\n"


def run(*arguments, **variables):
    """`python -m` with these arguments, in the repository, as a user runs it."""
    command = [sys.executable, "-m", *map(str, arguments)]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    for name in ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER"):  # a worker's children time nothing
        environ.pop(name, None)
    return subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def bench(monkeypatch):
    """The modules of the benchmarks, which are not installed."""
    monkeypatch.syspath_prepend(ROOT)
    names = ("environment", "report", "shapes", "timing")
    return SimpleNamespace(**{name: importlib.import_module(f"bench.{name}") for name in names})


def measured(ours_s, rival_s, once=()):
    """The measured part of a row with these medians."""

    def contestant(seconds):
        times = {f"{name}_s": seconds for name in ("median", "q1", "q3", "min")}
        return {"rounds": 1 if once else 7, "gflops": 1e-9 / seconds, **times}

    return {
        "contestants": {"attnfast": contestant(ours_s), "torch": contestant(rival_s)},
        "rival": "torch",
        "ratio": rival_s / ours_s,
        "ratio_quartiles": [rival_s / ours_s] * 2,
        "once": list(once),
        "differences": {},
    }


def every_case(bench, suite):
    """The rows of a run, in its order."""
    shapes = bench.shapes
    makers = (shapes.attention_cases, shapes.encoder_cases, shapes.layer_cases)
    return [case for make in makers for case in make(suite)]


@pytest.fixture
def results(bench, tmp_path):
    """Writes a file of results: every row of the full suites, its ratio given by `ratio(row)`."""

    def write(ratio=lambda row: 3.0, **changes):
        cases = every_case(bench, "full")
        rows = [case.describe() for case in cases]
        infos = [{**row, **measured(1e-3, ratio(row) * 1e-3)} for row in rows]
        facts = {
            "schema": 1,
            "device": "cpu",
            "load": 0.25,
            "settings": {"suite": "full", "backend": "cpu", "threads": 2},
            "versions": {"attnfast": "1.2.3", "torch": "2.13.0", "python": "3.11"},
            "kernel": "avx2",
            "torch_isa": "AVX2",
            "sources": "0123456789abcdef",
            **changes,
        }
        content = {
            "machine_info": {"cpu": "A CPU", "architecture": "x86", "cores": 2, "system": "Linux"},
            "commit_info": {"id": "f" * 40, "dirty": True},
            "datetime": "2026-01-02T03:04:05",
            "benchmarks": [{"extra_info": info} for info in infos],
            "attnfast": facts,
        }
        path = tmp_path / "results.json"
        path.write_text(json.dumps(content))
        return path

    return write


def test_quick_run(bench, tmp_path):
    path = tmp_path / "made" / "quick.json"
    arguments = ["pytest", "bench", "-q", "--benchmark-quiet", f"--benchmark-json={path}"]
    done = run(*arguments, BENCH_QUICK="1", BENCH_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(path.read_text())
    cases = every_case(bench, "quick")
    rows = [row["extra_info"] for row in content["benchmarks"]]
    assert [row["case"] for row in rows] == [case.describe()["case"] for case in cases]
    for case, row in zip(cases, rows, strict=True):
        ours, rival = row["contestants"]["attnfast"], row["contestants"][row["rival"]]
        assert row["flop"] == case.flop
        assert ours["gflops"] == pytest.approx(case.flop / ours["median_s"] / 1e9)
        assert row["ratio"] == rival["median_s"] / ours["median_s"]
        assert ours["rounds"] == rival["rounds"] == 1
        assert f"{case}: " in done.stdout
        named = {"out", "dq", "dk", "dv"} if row["suite"] == "attention" else {"out"}
        if row["case"].get("work") != "forward":
            assert named <= set(row["differences"][row["rival"]])
    facts = content["attnfast"]
    assert facts["settings"]["suite"] == "quick"
    assert facts["settings"]["threads"] == 1
    assert facts["versions"]["torch"] == torch.__version__
    assert set(content["machine_info"]) == {"cpu", "architecture", "cores", "system"}
    assert set(content["commit_info"]) == {"id", "dirty"}

    printed = run("bench.report", path)
    assert printed.returncode == 0, printed.stderr
    assert "quick suite: not for publication" in printed.stdout
    for group in bench.report.DETAILED:
        assert f"## {group.title}\n" in printed.stdout


def test_work_of_a_row(bench):
    case = bench.shapes.AttentionCase(2, 3, 10, 10, 8, "float32", False, "forward")
    assert case.flop == 4 * 2 * 3 * 10 * 10 * 8
    assert case._replace(causal=True).flop == case.flop / 2
    assert case._replace(work="forward+backward").flop == case.flop * 3.5


def rounds_of(bench, seconds, monkeypatch, **limits):
    """The order of calls and the row of a race on a clock that the calls themselves move."""
    calls, now = [], [0.0]
    monkeypatch.setattr(bench.timing.time, "perf_counter", lambda: now[0])

    def call(name):
        def result():
            calls.append(name)
            now[0] += seconds[name]
            return {"out": torch.ones(3)}

        return result

    def pedantic(target, setup, rounds):
        for _ in range(rounds):
            setup()
            target()

    fixture = SimpleNamespace(pedantic=pedantic)
    contestants = {name: call(name) for name in seconds}
    limits = {"budget_s": 2.0, "most_rounds": 500, **limits}
    return calls, bench.timing.race(fixture, contestants, flop=1e9, **limits)


def test_contestants_take_turns(bench, monkeypatch):
    calls, row = rounds_of(bench, {"attnfast": 0.1, "a": 0.3, "b": 0.2}, monkeypatch)
    assert calls == ["attnfast", "a", "b"] * 2 + ["a", "b", "attnfast"] * 3
    assert row["rival"] == "b"
    assert row["ratio"] == pytest.approx(2.0)
    assert row["contestants"]["a"]["rounds"] == 3
    assert row["contestants"]["attnfast"]["gflops"] == pytest.approx(10.0)
    assert row["once"] == []


def test_many_rounds_for_short_calls(bench, monkeypatch):
    _, row = rounds_of(bench, {"attnfast": 0.001, "a": 0.003}, monkeypatch, most_rounds=50)
    assert row["contestants"]["attnfast"]["rounds"] == 50


def test_giants_run_once(bench, monkeypatch):
    calls, row = rounds_of(bench, {"attnfast": 1.0, "a": 30.0}, monkeypatch)
    assert calls == ["attnfast", "a", "attnfast"]
    assert row["once"] == ["a"]
    assert row["ratio"] == pytest.approx(30.0)
    assert row["contestants"]["a"]["rounds"] == 1


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (torch.full((4,), 1.01), "out differs from rival by 0.01 of its norm"),
        (torch.full((4,), torch.nan), "out differs from rival by nan"),
        (torch.ones(4, 1), r"out is \(4, 1\), rival has \(4,\)"),
    ],
)
def test_wrong_results_are_not_timed(bench, result, message):
    with pytest.raises(AssertionError, match=message):
        bench.timing.disagreement({"out": result}, {"out": torch.ones(4)}, "rival")
    with pytest.raises(AssertionError, match="results"):
        bench.timing.disagreement({}, {"out": torch.ones(4)}, "rival")


def test_report_says_what_was_measured_and_where_we_lose(results):
    def ratio(row):
        case = row["case"]
        if row["suite"] != "attention":
            return 0.5 if case["layer"] == "small" and case.get("weights") else 1.5
        return 8.0 if case["causal"] else 2.0

    done = run("bench.report", results(ratio))
    assert done.returncode == 0, done.stderr
    assert re.search(r"attention, fp32, forward +\| +12 \| +\*\*4.00x\*\* \| +2.00x", done.stdout)
    assert "Slower than torch in 4 of 148 rows:" in done.stdout
    assert "- module, float32, train: small 4, 32, 128, 4, weights, padding: 0.50x" in done.stdout
    assert "ffffffffffff with uncommitted changes" in done.stdout
    assert "A CPU" in done.stdout
    assert "load before the run 0.25" in done.stdout


def test_report_marks_rows_that_ran_once(bench):
    row = bench.shapes.attention_cases("full")[0].describe()
    text = bench.report.detail_table([{**row, **measured(1.0, 30.0, once=("torch",))}])
    assert "|     1* |" in text
    assert "±" not in text


def test_report_fills_the_docs(results, tmp_path):
    (tmp_path / "README.md").write_text(MARKED)
    for _ in range(2):
        done = run("bench.report", results(), "--write", "--root", tmp_path)
        assert done.returncode == 0, done.stderr
        readme = (tmp_path / "README.md").read_text()
        assert readme.startswith("# Title\n\n<!-- bench:begin -->\n")
        assert readme.endswith("<!-- bench:end -->\n\nThe rest.\n")
        assert readme.count("bench:begin") == 1
        assert "old" not in readme
        assert re.search(r"\| 1, 16, 4096, 128 +(\| +3.0 / 3.0 ){4}\|", readme)
        assert "No row is slower than torch (148 rows)." in readme
        assert "## How it is measured" in (tmp_path / "docs" / "performance.md").read_text()


def refused(*arguments, **variables):
    done = run(*arguments, **variables)
    assert done.returncode in (2, 4), done.stdout + done.stderr
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line]
    assert len(lines) == 1, lines
    return lines[0]


def test_report_refuses_files_it_cannot_read(results, tmp_path):
    assert "cannot read" in refused("bench.report", tmp_path / "missing.json")
    path = tmp_path / "results.json"
    path.write_text("{")
    assert "cannot read" in refused("bench.report", path)
    for other in ("[]", "{}", '{"benchmarks": []}'):
        path.write_text(other)
        assert "not a result of this project's benchmarks" in refused("bench.report", path)
    results(schema=99)
    assert "has schema 99, this code reads 1" in refused("bench.report", path)
    content = json.loads(results().read_text())
    path.write_text(json.dumps({**content, "benchmarks": []}))
    assert "holds no finished row" in refused("bench.report", path)


def write_error(path, root):
    done = run("bench.report", path, "--write", "--root", root)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    return done.stderr


def test_report_does_not_write_without_a_place_or_full_results(results, tmp_path):
    assert "has no line <!-- bench:begin -->" in write_error(results(), tmp_path)
    (tmp_path / "README.md").write_text(MARKED)
    quick = results(settings={"suite": "quick", "backend": "cpu", "threads": 2})
    assert "not of the full suite" in write_error(quick, tmp_path)
    assert (tmp_path / "README.md").read_text() == MARKED
    assert not (tmp_path / "docs").exists()


def test_missing_library_is_one_line(tmp_path):
    missing = str(tmp_path / "none.so")
    line = refused("pytest", "bench", BENCH_BACKEND="cpu", BENCH_QUICK="1", ATTNFAST_NATIVE=missing)
    assert "bench: nothing to measure: attention: backend 'cpu'" in line
    assert "native library not built" in line


@pytest.mark.parametrize(
    ("name", "value", "requirement"),
    [
        ("BENCH_QUICK", "yes", "0 or 1"),
        ("BENCH_THREADS", "0", "a positive int"),
        ("BENCH_BUDGET", "nan", "a positive float"),
    ],
)
def test_bad_settings(bench, name, value, requirement):
    with pytest.raises(ValueError, match=f"bench: {name} must be {requirement}, got '{value}'"):
        bench.environment.settings({name: value})


def test_bad_settings_are_one_line():
    assert "bench: BENCH_QUICK must be 0 or 1" in refused("pytest", "bench", BENCH_QUICK="2")

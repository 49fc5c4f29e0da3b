"""The benchmarks work: every suite from end to end with one round, the rounds, bad input."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments, timeout=240, **variables):
    """`python -m` with these arguments, in the repository, as a user runs it."""
    command = [sys.executable, "-m", *map(str, arguments)]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    for name in ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER"):  # a worker's children time nothing
        environ.pop(name, None)
    return subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=timeout
    )


def test_every_suite_runs_from_end_to_end(bench, tmp_path):
    path, own = tmp_path / "made" / "pytest.json", tmp_path / "results.json"
    arguments = ["pytest", "bench", "-q", "--benchmark-quiet", f"--benchmark-json={path}"]
    done = run(*arguments, f"--results={own}", BENCH_SIZE="smoke", BENCH_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    content, rows = json.loads(path.read_text()), json.loads(own.read_text())["rows"]
    cases = [case for suite in bench.grid.SUITES for case in bench.suites.cases(suite, "smoke")]
    assert [row["case"] for row in rows] == [
        json.loads(json.dumps(bench.grid.describe(case)["case"])) for case in cases
    ]
    for case, row, benchmark in zip(cases, rows, content["benchmarks"], strict=True):
        assert benchmark["group"] == row["suite"]
        assert benchmark["extra_info"]["id"] == row["id"]
        ours, rival = row["contestants"]["attnfast"], row["contestants"][row["rival"]]
        assert row["flop"] == pytest.approx(case.flop, rel=1e-5)
        assert row["bytes"] == pytest.approx(case.bytes, rel=1e-5)
        assert ours["gflops"] == pytest.approx(case.flop / ours["median_s"] / 1e9, rel=1e-4)
        assert ours["share"] == pytest.approx(row["limit_s"] / ours["median_s"], rel=1e-4)
        assert row["ratio"] == pytest.approx(rival["median_s"] / ours["median_s"], rel=1e-4)
        assert ours["rounds"] == rival["rounds"] == 1
        assert (row["backend"], row["kernel"]) == ("cpu", torch.ops.attnfast.cpu_isa())
        assert f"{case}: " in done.stdout
        if row["suite"] in ("forward", "backward", "forward+backward"):
            names = {"out"} if "forward" in row["suite"] else set()
            names |= {"dq", "dk", "dv"} if "backward" in row["suite"] else set()
            assert names == set(row["differences"][row["rival"]])
    competed = {name for row in rows for name in row["contestants"]}
    assert {
        "torch.sdpa flash",
        "torch.sdpa math",
        "FlexAttention",
        "ONNX Runtime",
        "eager",
        "nn.MultiheadAttention",
        "linear + torch.sdpa",
        "nn.TransformerEncoder",
        "torch.sdpa per sequence",
        "torch.sdpa padded",
    } <= competed
    assert rows[0]["absent"]["torch.sdpa cudnn"] == "needs a GPU"
    if importlib.util.find_spec("flash_attn") is None:
        assert "not installed" in rows[0]["absent"]["flash_attn"]
    facts = content["attnfast"]
    assert facts["schema"] == 2
    assert facts["settings"]["size"] == "smoke"
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["ceilings"]["gemm"].keys() == {"float32", "bfloat16"}
    assert facts["ceilings"]["fma"]["float32"] > 0
    assert set(content["machine_info"]) == {"cpu", "architecture", "cores", "system"}
    assert set(content["commit_info"]) == {"id", "dirty"}


def test_the_compiler_of_the_peak_may_be_several_words(bench, monkeypatch):
    ceilings = importlib.import_module("bench.ceilings")
    monkeypatch.setenv("CXX", "env g++")
    rates, reason = ceilings._fma(1, 1000)
    assert reason is None
    assert rates["float32"] > 0
    monkeypatch.setenv("CXX", "/nonexistent/g++ -x")
    assert ceilings._fma(1, 1000) == ({}, "no C++ compiler")


def test_the_quick_suites_run_within_their_minutes(bench, tmp_path):
    """What `make bench` does, with one round for each row and less time."""
    own, minutes = tmp_path / "results.json", 0.4
    variables = {"BENCH_SIZE": "quick", "BENCH_ROUNDS": "1", "BENCH_THREADS": "1"}
    arguments = ["pytest", "bench", "-q", "--benchmark-quiet", f"--results={own}"]
    done = run(*arguments, **variables, BENCH_MINUTES=str(minutes))
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(own.read_text())
    cases = [case for suite in bench.grid.SUITES for case in bench.suites.cases(suite, "quick")]
    timed = [(row["suite"], row["id"]) for row in content["rows"]]
    left_out = [(x["suite"], x["id"]) for x in content["not_timed"]]
    assert sorted(timed + left_out) == sorted((case.suite, str(case)) for case in cases)
    assert {suite for suite, _ in timed} == set(bench.grid.SUITES)
    for row in content["rows"]:
        assert row["contestants"]["attnfast"]["rounds"] == 1
        assert len(row["contestants"]) > 1, row["absent"]
    assert f": left out: {content['not_timed'][0]['reason']}" in done.stdout
    last = done.stdout.splitlines()[-40:]
    assert any(
        re.match(r"\| core shapes beside torch's fused +\| +rows \| geometric", x) for x in last
    )
    assert any(re.match(r"\| fp32, forward +\| +\d+ of 12 \| +\*\*[\d.]+x\*\*", x) for x in last)
    assert any(x.startswith(f"Left out, for want of time: {len(left_out)} rows (") for x in last)


def test_grid_covers_the_shapes_that_matter(bench):
    full = [case for suite in ("forward", "backward", "forward+backward")
            for case in bench.suites.cases(suite, "full")]  # fmt: skip
    assert {16, 32, 64, 96, 128, 192, 256} <= {case.D for case in full}
    assert {64, 197, 577, 1024, 8192, 131072} <= {case.T for case in full}
    assert any(case.T % 8 and case.S % 8 and case.D % 16 for case in full)
    for suite in bench.grid.SUITES:
        quick, whole = (set(bench.suites.cases(suite, size)) for size in ("quick", "full"))
        assert quick
        assert len(quick) <= len(whole)
        assert len({str(case) for case in whole}) == len(whole), "ids are unique within a suite"


def test_work_of_a_row(bench):
    case = bench.grid.AttentionCase(2, 3, 10, 10, 8, "float32", False, "forward")
    assert case.flop == 4 * 2 * 3 * 10 * 10 * 8
    assert case._replace(causal=True).flop == case.flop / 2
    assert case._replace(work="forward+backward").flop == case.flop * 3.5
    assert case.bytes == 2 * 3 * (10 + 10 + 10 + 10) * 8 * 4
    long = case._replace(T=1000, S=1000, causal=True, option="window")
    attended = sum(min(t, bench.grid.WINDOW) + 1 for t in range(1000))
    assert long.flop == 4 * 2 * 3 * attended * 8


class FakeClock:
    """A clock that the calls themselves move."""

    name, copies = "fake", 1

    def __init__(self, bench, seconds):
        self.bench, self.seconds, self.calls = bench, seconds, []

    def call(self, name):
        return lambda: {"out": torch.ones(3), "name": name}

    def read(self, call):
        results = call()
        name = results.pop("name")
        self.calls.append(name)
        return self.bench.clock.Reading(self.seconds[name], 0.0, results)

    def peak(self, call):
        return self.read(call), 1000

    def prepared(self, call):
        return call


def rounds_of(bench, seconds, budget_s=2.0, most_rounds=500, limit_s=None):
    """The order of calls and the row of a race."""
    clock = FakeClock(bench, seconds)
    entries = bench.timing.Entries({name: [clock.call(name)] for name in seconds}, {})
    case = bench.grid.AttentionCase(1, 1, 8, 8, 8, "float32", False, "forward")
    limits = bench.timing.Limits(budget_s, most_rounds)
    race = bench.timing.Race(case, entries, clock, limits, limit_s)
    for _ in range(race.rounds):
        race.rivals_turn()
        race.our_turn()
    return clock.calls, race.row()


def test_contestants_take_turns(bench):
    calls, row = rounds_of(bench, {"attnfast": 0.1, "a": 0.3, "b": 0.2}, limit_s=0.05)
    assert calls == ["attnfast", "a", "b"] * 2 + ["a", "b", "attnfast"] * 5
    assert row["rival"] == "b"
    assert row["ratio"] == pytest.approx(2.0)
    assert row["contestants"]["a"]["rounds"] == 5
    assert row["contestants"]["attnfast"]["share"] == pytest.approx(0.5)
    assert row["contestants"]["attnfast"]["peak_bytes"] == 1000
    assert row["once"] == []


def test_disturbed_rounds_are_left_out(bench):
    clock = FakeClock(bench, {"attnfast": 0.1, "a": 0.2})
    read = clock.read

    def disturbed(call):
        reading = read(call)
        if len(clock.calls) in (7, 10):  # a's turn of the second round, ours of the third
            return reading._replace(seconds=9.0, disturbed=True)
        return reading

    clock.read = disturbed
    entries = {name: [clock.call(name)] for name in ("attnfast", "a")}
    case = bench.grid.AttentionCase(1, 1, 8, 8, 8, "float32", False, "forward")
    limits = bench.timing.Limits(2.0, 500)
    race = bench.timing.Race(case, bench.timing.Entries(entries, {}), clock, limits, None)
    for _ in range(race.rounds):
        race.rivals_turn()
        race.our_turn()
    row = race.row()
    assert (race.rounds, row["disturbed"], row["left_out"]) == (6, 2, 2)
    assert row["contestants"]["attnfast"]["rounds"] == row["contestants"]["a"]["rounds"] == 4
    assert row["ratio_quartiles"] == pytest.approx([2.0, 2.0])


def test_a_thread_that_waits_for_a_core_is_noticed(bench, monkeypatch):
    waited = iter([1.0, 1.0, 2.0, 2.5])
    monkeypatch.setattr(bench.clock, "_waited", lambda: next(waited))
    clock = bench.clock.HostClock(2)
    assert not clock.read(dict).disturbed
    assert clock.read(dict).disturbed
    assert not bench.clock.HostClock(1).read(dict).disturbed, "CPU time has no waiting in it"


def test_many_rounds_for_short_calls(bench):
    _, row = rounds_of(bench, {"attnfast": 0.001, "a": 0.003}, most_rounds=50)
    assert row["contestants"]["attnfast"]["rounds"] == 50


def test_giants_run_once_and_slow_rivals_in_one_round(bench):
    calls, row = rounds_of(bench, {"attnfast": 1.0, "a": 30.0})
    assert calls == ["attnfast", "a"] + ["attnfast"] * 6
    assert row["once"] == ["a"]
    assert row["ratio"] == pytest.approx(30.0)
    assert row["contestants"]["a"]["rounds"] == 1
    calls, row = rounds_of(bench, {"attnfast": 0.1, "a": 0.2, "slow": 1.0})
    assert calls.count("slow") == 3
    assert row["contestants"]["slow"]["rounds"] == 1
    assert row["contestants"]["a"]["rounds"] == 6


def test_a_core_shape_for_which_there_is_no_time_is_called_once(bench):
    clock = FakeClock(bench, {"attnfast": 4.0, "a": 6.0})
    entries = bench.timing.Entries({name: [clock.call(name)] for name in clock.seconds}, {})
    case = bench.grid.AttentionCase(1, 1, 8, 8, 8, "float32", False, "forward")
    limits = bench.timing.Limits(0.5, 200, row_s=10.0, once=True)
    race = bench.timing.Race(case, entries, clock, limits, None)
    assert clock.calls == ["a"], "ours is called in its turn"
    assert race.rounds == 1
    race.rivals_turn()
    race.our_turn()
    row = race.row()
    assert clock.calls == ["a", "attnfast"]
    assert row["ratio"] == pytest.approx(1.5)
    assert row["once"] == ["a", "attnfast"]
    assert row["differences"] == {"a": {"out": 0.0}}
    assert row["contestants"]["attnfast"]["peak_bytes"] == 1000
    wrong = {
        "attnfast": [clock.call("attnfast")],
        "a": [lambda: {"out": torch.zeros(3), "name": "a"}],
    }
    race = bench.timing.Race(case, bench.timing.Entries(wrong, {}), clock, limits, None)
    with pytest.raises(AssertionError, match="out differs from a"):
        race.our_turn()


def test_a_row_has_as_many_rounds_as_fit(bench, monkeypatch):
    """Of the row's seconds the first calls are taken; a long call is not called to warm up."""
    clock = FakeClock(bench, {"attnfast": 0.5, "a": 1.0})
    spent = lambda: sum(clock.seconds[name] for name in clock.calls)  # noqa: E731
    monkeypatch.setattr(bench.timing.time, "perf_counter", spent)
    entries = bench.timing.Entries({name: [clock.call(name)] for name in clock.seconds}, {})
    case = bench.grid.AttentionCase(1, 1, 8, 8, 8, "float32", False, "forward")
    for row_s, rounds in ((8.0, 4), (4.0, 1), (1.0, 1), (100.0, 5)):
        clock.calls.clear()
        limits = bench.timing.Limits(0.5, 200, row_s=row_s)
        assert bench.timing.Race(case, entries, clock, limits, None).rounds == rounds
        assert clock.calls == ["attnfast", "a"]


def test_a_rival_that_fails_is_named(bench):
    clock = FakeClock(bench, {"attnfast": 0.1, "a": 0.2})

    def broken():
        raise RuntimeError("no kernel\nand more")

    calls = {"attnfast": [clock.call("attnfast")], "broken": [broken], "a": [clock.call("a")]}
    case = bench.grid.AttentionCase(1, 1, 8, 8, 8, "float32", False, "forward")
    entries = bench.timing.Entries(calls, {"b": "not installed"})
    race = bench.timing.Race(case, entries, clock, bench.timing.Limits(1.0, 1), None)
    assert race.absent == {"b": "not installed", "broken": "failed: no kernel"}
    assert race.rivals == ["a"]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (torch.full((4,), 1.01), "out differs from rival by 0.01 of its norm"),
        (torch.full((4,), torch.nan), "out differs from rival by nan"),
        (torch.ones(4, 1), r"out is \(4, 1\), rival has \(4,\)"),
    ],
)
def test_wrong_results_are_not_timed(bench, result, message):
    disagreement = bench.timing.disagreement
    with pytest.raises(AssertionError, match=message):
        disagreement({"out": result}, {"out": torch.ones(4)}, "rival", "float32")
    with pytest.raises(AssertionError, match="results"):
        disagreement({}, {"out": torch.ones(4)}, "rival", "float32")


def test_dropout_is_compared_without_and_timed_with(bench):
    case = bench.grid.AttentionCase(1, 2, 9, 9, 8, "float32", False, "forward", "dropout")
    entries = bench.rivals.entries(case, "cpu", torch.device("cpu"), 1, full=False)
    call = entries.calls["attnfast"][0]
    before = call()["out"]
    assert torch.equal(before, call()["out"])
    entries.ready()
    assert not torch.equal(before, call()["out"])
    assert entries.absent["torch.sdpa flash"] == "has no dropout"
    assert "torch.sdpa math" in entries.calls


def test_memory_of_a_call(bench):
    count = 1 << 22
    _, peak = bench.clock.HostClock(1).peak(lambda: {"out": torch.zeros(count) + 1})
    if peak is None:
        pytest.skip("this system does not tell the peak of resident memory")
    batch = 1 << 20  # Linux counts resident pages in batches, on each core by itself
    assert 8 * count - batch <= peak <= 12 * count


def refused(*arguments, **variables):
    done = run(*arguments, **variables)
    assert done.returncode in (2, 4), done.stdout + done.stderr
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line]
    assert len(lines) == 1, lines
    return lines[0]


def test_missing_library_is_one_line(tmp_path):
    missing = str(tmp_path / "none.so")
    line = refused(
        "pytest", "bench", BENCH_BACKEND="cpu", BENCH_SIZE="smoke", ATTNFAST_NATIVE=missing
    )
    assert "bench: nothing to measure: attention: backend 'cpu'" in line
    assert "native library not built" in line


@pytest.mark.parametrize(
    ("name", "value", "requirement"),
    [
        ("BENCH_SIZE", "big", "one of smoke, quick, full, gpu"),
        ("BENCH_DEVICE", "tpu", "cpu or cuda"),
        ("BENCH_THREADS", "0", "a positive int"),
        ("BENCH_BUDGET", "nan", "a positive float"),
    ],
)
def test_bad_settings(bench, name, value, requirement):
    with pytest.raises(ValueError, match=f"bench: {name} must be {requirement}, got '{value}'"):
        bench.environment.settings({name: value})


def test_bad_settings_are_one_line():
    assert "bench: BENCH_SIZE must be one of" in refused("pytest", "bench", BENCH_SIZE="2")


def test_without_rich_a_line_says_what_is_missing():
    program = "import sys; sys.modules['rich'] = None; import runpy; runpy.run_module('bench')"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "bench: rich is missing: pip install -r requirements/bench.txt\n"


def test_flex_attention_is_compiled_anew_for_each_row(bench, monkeypatch):
    """Rows whose problems happen to lie at the same address do not share masks."""
    flex = importlib.import_module("bench.flex")
    compiled = []
    monkeypatch.setattr(flex, "_compile", lambda p: lambda *given, **options: compiled.append(p))
    case = bench.grid.AttentionCase(1, 1, 8, 8, 8, "float32", True, "forward")
    problem = importlib.import_module("bench.problem").problem
    for _ in range(20):
        given = problem(case)
        flex.forward(given)
        flex.forward(given)
        assert compiled.pop() is compiled.pop() is given

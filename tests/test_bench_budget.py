"""The quick suites end in time on any machine, and say what they left out."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SDPA = "torch.sdpa flash"
QUICK_S = 570


class Machine:
    """A clock that made-up contestants move: a call takes its FLOP over a rate, and a bit."""

    name, copies = "fake", 1

    def __init__(self, bench, rates, overhead_s=1e-4, setup_s=0.05, compile_s=12.0):
        self.bench, self.rates, self.overhead_s = bench, rates, overhead_s
        self.setup_s, self.compile_s, self.seconds = setup_s, compile_s, 0.0

    def now(self):
        return self.seconds

    def entries(self, case):
        """The contestants of a row; making the inputs takes time as well."""
        self.seconds += self.setup_s

        def call(rate):
            def run():
                self.seconds += self.overhead_s + case.flop / rate
                return {"out": torch.ones(1)}

            return run

        calls = {name: [call(rate)] for name, rate in self.rates[case.dtype].items()}
        if isinstance(case, self.bench.grid.AttentionCase) and case.work == "forward":
            calls["FlexAttention"] = [self.compiling(call(2 * self.rates["float32"][SDPA]))]
        return self.bench.timing.Entries(calls, {}, compiled=("FlexAttention",))

    def compiling(self, call):
        state = {"compiled": False}

        def run():
            self.seconds += 0.0 if state["compiled"] else self.compile_s
            state["compiled"] = True
            return call()

        return run

    def read(self, call):
        start = self.seconds
        results = call()
        return self.bench.clock.Reading(self.seconds - start, 0.0, results)

    def peak(self, call):
        return self.read(call), 1000

    def prepared(self, call):
        return call


def run(bench, monkeypatch, machine, minutes=9.5):
    """All quick rows on a made-up machine: rows, the budget, and the seconds of each suite."""
    cases = [case for suite in bench.grid.SUITES for case in bench.suites.cases(suite, "quick")]
    monkeypatch.setattr(bench.timing.time, "perf_counter", machine.now)
    monkeypatch.setattr(bench.timing.gc, "collect", lambda: None)  # slow, and no tensors here
    settings = bench.environment.settings({}, size="quick", minutes=minutes)
    entries = lambda case, *given, full: machine.entries(case)  # noqa: E731
    monkeypatch.setattr(bench.suites, "ENTRIES", dict.fromkeys(bench.suites.ENTRIES, entries))
    monkeypatch.setattr(bench.suites, "architecture", lambda *given: "fake")
    budget = bench.budget.Budget(cases, minutes, settings.most_rounds, machine.now)
    session = bench.suites.Session(settings, torch.device("cpu"), machine, None, "cpu", budget)
    rows, spent = [], {}
    threads = torch.get_num_threads()
    for case in cases:
        before = machine.seconds
        with contextlib.suppress(bench.budget.LeftOut):
            rows.append(bench.suites.measured(case, session))
        spent[case.suite] = spent.get(case.suite, 0.0) + machine.seconds - before
    torch.set_num_threads(threads)
    return rows, budget, spent


def rates(ours, theirs, half, eager):
    """By dtype and contestant, FLOP/s."""
    slow = {"torch.sdpa math": eager, "eager": eager}
    return {
        "float32": {"attnfast": ours, SDPA: theirs, **slow},
        "bfloat16": {"attnfast": ours, SDPA: half, **dict.fromkeys(slow, eager / 20)},
    }


FAST = rates(400e9, 250e9, 300e9, 60e9)
SLOW = rates(60e9, 50e9, 15e9, 14e9)
VERY_SLOW = rates(12e9, 8e9, 3e9, 2e9)


@pytest.mark.parametrize("speed", [FAST, SLOW, VERY_SLOW], ids=["fast", "slow", "very slow"])
def test_any_machine_ends_in_time(bench, monkeypatch, speed):
    machine = Machine(bench, speed)
    rows, budget, spent = run(bench, monkeypatch, machine)
    assert machine.seconds < 1.1 * QUICK_S
    assert max(spent.values()) < 180 * 1.1
    cases = [case for suite in bench.grid.SUITES for case in bench.suites.cases(suite, "quick")]
    every = {(case.suite, str(case)) for case in cases}
    timed = {(row["suite"], row["id"]) for row in rows}
    left_out = {(x["suite"], x["id"]) for x in budget.left_out}
    assert timed | left_out == every
    assert not timed & left_out
    assert all("s are left" in x["reason"] for x in budget.left_out)
    assert {suite for suite, _ in timed} == set(bench.grid.SUITES), "something of every suite"


def test_every_suite_has_a_row_even_without_time(bench, monkeypatch):
    rows, budget, _ = run(bench, monkeypatch, Machine(bench, SLOW), minutes=0.01)
    counts = [sum(row["suite"] == suite for row in rows) for suite in bench.grid.SUITES]
    assert min(counts) == 1
    assert len(budget.left_out) > 200


def core_rows(bench, rows):
    core = set(bench.grid.CORE)
    names = ("B", "H", "T", "S", "D")
    wanted = ("forward", "forward+backward")
    return [
        row for row in rows
        if row["suite"] in wanted and tuple(row["case"].get(name) for name in names) in core
    ]  # fmt: skip


@pytest.mark.parametrize("speed", [FAST, SLOW], ids=["fast", "slow"])
def test_the_core_shapes_are_timed(bench, monkeypatch, speed):
    rows, _, _ = run(bench, monkeypatch, Machine(bench, speed))
    found = core_rows(bench, rows)
    assert len(found) == 2 * 2 * 6 * 2
    for row in found:
        named = row["contestants"]
        assert {"attnfast", SDPA} <= named.keys()
        one_call = row["once"] and "attnfast" in row["once"]
        assert named["attnfast"]["rounds"] >= (1 if one_call else 3)
        assert named["attnfast"]["rounds"] == named[SDPA]["rounds"]
        times = [named[name]["median_s"] for name in (row["rival"], "attnfast")]
        assert row["ratio"] == pytest.approx(times[0] / times[1])


def test_a_fast_machine_leaves_nothing_out(bench, monkeypatch):
    rows, budget, _ = run(bench, monkeypatch, Machine(bench, FAST))
    assert budget.left_out == []
    assert all(len(row["once"]) == 0 for row in core_rows(bench, rows))


def test_a_long_prediction_from_a_tiny_row_is_tried_once(bench):
    """A tiny row that was disturbed, or is all overhead, must not end its suite."""
    cases = bench.suites.cases("decode", "quick")
    time_ = SimpleNamespace(seconds=0.0)
    budget = bench.budget.Budget(cases, 9.5, 200, lambda: time_.seconds)
    budget.share(cases[0])

    def learn(case, seconds):
        times = {"attnfast": seconds, SDPA: seconds}
        race = SimpleNamespace(typical_s=lambda: times, compile_s=0.0)
        budget.learn(case, race)

    learn(cases[0], 0.05)
    large = next(case for case in cases if case.flop > 20 * cases[0].flop)
    assert 4 * budget.round_s(large) > budget.seconds["decode"] / bench.budget.PART
    assert budget.share(large).seconds > budget.round_s(large)
    learn(large, 3.0)
    same = large._replace(paged=not large.paged)
    with pytest.raises(bench.budget.LeftOut, match="a round would take about 6 s"):
        budget.share(same)


def test_a_slow_rival_is_not_waited_for(bench, monkeypatch):
    rows, _, _ = run(bench, monkeypatch, Machine(bench, SLOW))
    long = next(row for row in rows if row["id"] == "8x12x512x64-full-bfloat16-forward")
    assert "eager" not in long["contestants"]
    assert "times the fastest rival: not waited for" in long["absent"]["eager"]
    assert SDPA in long["contestants"], "the fastest rival always is"


def test_flex_attention_is_compiled_as_often_as_there_is_time(bench, monkeypatch):
    counts = []
    for seconds in (0.5, 12.0):
        machine = Machine(bench, FAST, compile_s=seconds)
        rows, _, _ = run(bench, monkeypatch, machine)
        counts.append(sum("FlexAttention" in row["contestants"] for row in rows))
        refused = [
            row for row in rows if "compiling takes" in row["absent"].get("FlexAttention", "")
        ]
        assert bool(refused) == (seconds > 1)
    assert counts[0] > counts[1] >= 2


def test_a_row_is_predicted_from_smaller_ones(bench):
    predicted, Timed = bench.budget.predicted, bench.budget.Timed
    tiny, large = Timed(1e6, 1e-3), Timed(1e9, 11e-3)
    assert predicted(2e9, [tiny, large]) == pytest.approx(21e-3, rel=1e-3)
    assert predicted(5e8, [tiny, large]) == pytest.approx(5.5e-3)
    assert predicted(1e7, [tiny]) < 1e-2, "a tiny row is mostly overhead"
    assert predicted(4e9, [large._replace(seconds=0.5), Timed(2e9, 0.5)]) >= 0.5 * 1.25
    kept = bench.budget._largest([tiny, large, Timed(1.1e9, 0.02)])
    assert kept == [tiny, Timed(1.1e9, 0.02)]


def test_without_minutes_everything_is_timed(bench):
    for size, minutes in (("quick", 9.5), ("full", None), ("smoke", None), ("gpu", None)):
        assert bench.environment.settings({}, size=size).minutes == minutes
    found = bench.environment.settings({"BENCH_MINUTES": "2", "BENCH_ROUNDS": "1"})
    assert (found.minutes, found.most_rounds) == (2.0, 1)

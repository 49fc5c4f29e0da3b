"""How a row is measured: turns, rounds, agreement, clocks, and the end of a run in time."""

from __future__ import annotations

import contextlib

import pytest
import torch

from bench import clock, grid, race, suites
from bench.environment import settings
from bench.problem import problem
from bench.rivals import attention, flex

CASE = grid.AttentionCase(1, 1, 8, 8, 8, "float32", False, "forward")
SDPA = "torch.sdpa flash"


class FakeClock:
    """A clock that the calls themselves move."""

    name, copies = "fake", 1

    def __init__(self, **seconds):
        self.seconds, self.calls = seconds, []

    def call(self, name):
        return lambda: {"out": torch.ones(3), "name": name}

    def read(self, call):
        results = call()
        name = results.pop("name")
        self.calls.append(name)
        return clock.Reading(self.seconds[name], 0.0, results)

    def peak(self, call):
        return self.read(call), 1000

    def prepared(self, call):
        return call

    def race(self, limits, limit_s=None, absent=(), **calls):
        made = {name: [calls.get(name, self.call(name))] for name in {**self.seconds, **calls}}
        return race.Race(CASE, race.Entries(made, dict(absent)), self, limits, limit_s)


def run(raced):
    """All rounds, and the row."""
    for _ in range(raced.rounds):
        raced.rivals_turn()
        raced.our_turn()
    return raced.row()


def test_contestants_take_turns():
    timer = FakeClock(attnfast=0.1, a=0.3, b=0.2)
    row = run(timer.race(race.Limits(2.0, 500), limit_s=0.05))
    assert timer.calls == ["attnfast", "a", "b"] * 2 + ["a", "b", "attnfast"] * 5
    assert row["rival"] == "b"
    assert row["ratio"] == pytest.approx(2.0)
    assert row["contestants"]["a"]["rounds"] == 5
    assert row["contestants"]["attnfast"]["share"] == pytest.approx(0.5)
    assert row["contestants"]["attnfast"]["peak_bytes"] == 1000
    assert row["once"] == []


def test_disturbed_rounds_are_left_out():
    timer = FakeClock(attnfast=0.1, a=0.2)
    read = timer.read

    def disturbed(call):
        reading = read(call)
        if len(timer.calls) in (7, 10):  # a's turn of the second round, ours of the third
            return reading._replace(seconds=9.0, disturbed=True)
        return reading

    timer.read = disturbed
    raced = timer.race(race.Limits(2.0, 500))
    row = run(raced)
    assert (raced.rounds, row["disturbed"], row["left_out"]) == (6, 2, 2)
    assert row["contestants"]["attnfast"]["rounds"] == row["contestants"]["a"]["rounds"] == 4
    assert row["ratio_quartiles"] == pytest.approx([2.0, 2.0])


def test_a_thread_that_waits_for_a_core_is_noticed(monkeypatch):
    waited = iter([1.0, 1.0, 2.0, 2.5])
    monkeypatch.setattr(clock, "_waited", lambda: next(waited))
    timer = clock.HostClock(2)
    assert not timer.read(dict).disturbed
    assert timer.read(dict).disturbed
    assert not clock.HostClock(1).read(dict).disturbed, "CPU time has no waiting in it"


def test_many_rounds_for_short_calls():
    row = run(FakeClock(attnfast=0.001, a=0.003).race(race.Limits(2.0, 50)))
    assert row["contestants"]["attnfast"]["rounds"] == 50


def test_giants_run_once_and_slow_rivals_in_one_round():
    timer = FakeClock(attnfast=1.0, a=30.0)
    row = run(timer.race(race.Limits(2.0, 500)))
    assert timer.calls == ["attnfast", "a"] + ["attnfast"] * 6
    assert row["once"] == ["a"]
    assert row["ratio"] == pytest.approx(30.0)
    assert row["contestants"]["a"]["rounds"] == 1
    timer = FakeClock(attnfast=0.1, a=0.2, slow=0.9, slower=1.1)
    row = run(timer.race(race.Limits(2.0, 500)))
    assert [timer.calls.count(name) for name in ("slow", "slower")] == [3, 1]
    assert row["once"] == ["slower"]
    assert row["contestants"]["slow"]["rounds"] == 1
    assert row["contestants"]["a"]["rounds"] == 6


def test_a_row_has_as_many_rounds_as_fit(monkeypatch):
    """Of the row's seconds the first calls are taken; a long call is not called to warm up."""
    timer = FakeClock(attnfast=0.5, a=1.0)
    spent = lambda: sum(timer.seconds[name] for name in timer.calls)  # noqa: E731
    monkeypatch.setattr(race.time, "perf_counter", spent)
    for row_s, rounds in ((8.0, 4), (4.0, 1), (1.0, 1), (100.0, 5)):
        timer.calls.clear()
        assert timer.race(race.Limits(0.5, 200, row_s=row_s)).rounds == rounds
        assert timer.calls == ["attnfast", "a"]


def test_a_rival_that_fails_is_named():
    def broken():
        raise RuntimeError("no kernel\nand more")

    timer = FakeClock(attnfast=0.1, a=0.2)
    raced = timer.race(race.Limits(1.0, 1), absent={"b": "not installed"}, broken=broken)
    assert raced.absent == {"b": "not installed", "broken": "failed: no kernel"}
    assert raced.rivals == ["a"]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (torch.full((4,), 1.01), "out differs from rival by 0.01 of its norm"),
        (torch.full((4,), torch.nan), "out differs from rival by nan"),
        (torch.ones(4, 1), r"out is \(4, 1\), rival has \(4,\)"),
    ],
)
def test_wrong_results_are_not_timed(result, message):
    with pytest.raises(AssertionError, match=message):
        race.disagreement({"out": result}, {"out": torch.ones(4)}, "rival", "float32")
    with pytest.raises(AssertionError, match="results"):
        race.disagreement({}, {"out": torch.ones(4)}, "rival", "float32")
    with pytest.raises(AssertionError, match="out differs from a"):
        FakeClock(attnfast=0.1, a=0.1).race(
            race.Limits(1.0, 1), a=lambda: {"out": torch.zeros(3), "name": "a"}
        )


def test_dropout_is_compared_without_and_timed_with():
    case = grid.AttentionCase(1, 2, 9, 9, 8, "float32", False, "forward", "dropout")
    entries = attention.entries(case, "cpu", torch.device("cpu"), 1, full=False)
    call = entries.calls["attnfast"][0]
    before = call()["out"]
    assert torch.equal(before, call()["out"])
    entries.ready()
    assert not torch.equal(before, call()["out"])
    assert entries.absent["torch.sdpa flash"] == "has no dropout"
    assert "torch.sdpa math" in entries.calls


def test_memory_of_a_call():
    count = 1 << 22
    _, peak = clock.HostClock(1).peak(lambda: {"out": torch.zeros(count) + 1})
    if peak is None:
        pytest.skip("this system does not tell the peak of resident memory")
    batch = 1 << 20  # Linux counts resident pages in batches, on each core by itself
    assert 8 * count - batch <= peak <= 12 * count


def test_flex_attention_is_compiled_anew_for_each_row(monkeypatch):
    """Rows whose problems happen to lie at the same address do not share masks."""
    compiled = []
    monkeypatch.setattr(flex, "_compile", lambda p: lambda *given, **options: compiled.append(p))
    case = CASE._replace(causal=True)
    for _ in range(20):
        given = problem(case)
        flex.forward(given)
        flex.forward(given)
        assert compiled.pop() is compiled.pop() is given


class Machine:
    """A clock that made-up contestants move: a call takes its FLOP over a rate, and a bit."""

    name, copies = "fake", 1

    def __init__(self, **rates):
        self.rates, self.seconds = rates, 0.0

    def entries(self, case, *given, full):
        """The contestants of a row; making the inputs takes time as well."""
        self.seconds += 0.05

        def call(rate):
            def run():
                self.seconds += 1e-4 + case.flop / rate
                return {"out": torch.ones(1)}

            return run

        return race.Entries({name: [call(rate)] for name, rate in self.rates.items()}, {})

    def read(self, call):
        start = self.seconds
        results = call()
        return clock.Reading(self.seconds - start, 0.0, results)

    def peak(self, call):
        return self.read(call), 1000

    def prepared(self, call):
        return call


@pytest.fixture
def quick(monkeypatch):
    """All quick rows on a made-up machine: those that were timed, and what was left out."""

    def run(machine, minutes=9.5):
        monkeypatch.setattr(race.time, "perf_counter", lambda: machine.seconds)
        monkeypatch.setattr(race.gc, "collect", lambda: None)  # slow, and no tensors here
        monkeypatch.setattr(suites, "ENTRIES", dict.fromkeys(suites.ENTRIES, machine.entries))
        monkeypatch.setattr(suites, "architecture", lambda *given: "fake")
        cases = [case for suite in grid.SUITES for case in grid.SUITES[suite]("quick")]
        deadline = suites.Deadline(cases, minutes, lambda: machine.seconds)
        wanted = settings({}, size="quick", minutes=minutes)
        session = suites.Session(wanted, torch.device("cpu"), machine, None, "cpu", deadline)
        rows = []
        for case in cases:
            with contextlib.suppress(suites.LeftOut):
                rows.append(suites.measured(case, session))
        timed = [(row["suite"], row["id"]) for row in rows]
        left_out = [(x["suite"], x["id"]) for x in deadline.left_out]
        assert sorted(timed + left_out) == sorted((x.suite, str(x)) for x in cases)
        assert {row["suite"] for row in rows} == set(grid.SUITES), "something of every suite"
        return rows, left_out

    return run


@pytest.mark.parametrize(("ours", "theirs"), [(400e9, 250e9), (60e9, 15e9), (12e9, 3e9)])
def test_any_machine_ends_in_time(quick, threads, ours, theirs):
    machine = Machine(**{"attnfast": ours, SDPA: theirs, "b": theirs / 2})
    rows, left_out = quick(machine)
    assert machine.seconds < 1.1 * 570
    assert len(rows) > 100
    assert bool(left_out) == (ours < 100e9)


def test_every_suite_has_a_row_even_without_time(quick):
    rows, left_out = quick(Machine(**{"attnfast": 60e9, SDPA: 15e9}), minutes=0.01)
    assert len(rows) < 2 * len(grid.SUITES)
    assert len(left_out) > 200


def test_a_tiny_row_that_was_disturbed_does_not_end_its_suite():
    cases = [x for x in grid.SUITES["decode"]("quick") if x.dtype == "float32"]
    deadline = suites.Deadline(cases, 9.5, lambda: 0.0)
    deadline.row_s(cases[0])
    raced = FakeClock(attnfast=0.5).race(race.Limits(0.0, 1))
    raced.case = cases[0]
    deadline.learn(raced)
    *_, large = sorted(cases, key=lambda case: case.flop)
    assert 0 < deadline.row_s(large) < deadline.ends["decode"]
    raced.case, raced.first = large, {"attnfast": 30.0}
    deadline.learn(raced)
    with pytest.raises(suites.LeftOut, match="a round would take about 30 s; 32 s are left"):
        deadline.row_s(large)

"""How one row is measured: the contestants take turns, after their results were seen to agree.

Ours and every rival run in the same process on the same inputs, one call each per round, so that
whatever else happens on the machine happens to all of them. Medians are compared.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from . import OURS
from .clock import Call, Clock, Results
from .grid import DTYPES, Case, describe

USUAL_ROUNDS = 5  # at least, where there is time for them
FEWEST_ROUNDS = 3
LONG_S = 5.0  # a rival's call that takes longer is not repeated: its first is its time
SLOW = 4.0  # a rival this many times slower than the fastest one runs in one round only
WAIT_S = 1.0  # and is not repeated at all if it takes longer than this
WARM_S = 0.2  # a call that takes longer is as long when it is warm

# The largest |ours - rival| / |rival| of a result, in Euclidean norms. How exact ours is, the tests
# say with their accuracy rule; this keeps a kernel that computes something else out of the tables.
AGREEMENT = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def nothing() -> None:
    """Where nothing has to be done."""


class Entries(NamedTuple):
    """Who competes in a row.

    Attributes:
        calls: ``OURS`` and its rivals by name; one call for each copy of the inputs.
        absent: Those who do not, and why.
        ready: Called between the comparison of results and the timing.
        compiled: Names whose first call compiles, and is no measure of anything.
    """

    calls: dict[str, list[Call]]
    absent: dict[str, str]
    ready: Callable[[], None] = nothing
    compiled: tuple[str, ...] = ()


class Limits(NamedTuple):
    """How long a row may take."""

    budget_s: float  # for the rounds; USUAL_ROUNDS are run all the same
    most_rounds: int
    row_s: float = float("inf")  # for all of it: there are fewer rounds rather than more seconds


class Race:
    """One row: compares, warms up, plans the rounds; then each side takes its turn `rounds` times.

    Raises:
        AssertionError: A rival's results are not ours.
    """

    def __init__(
        self, case: Case, entries: Entries, clock: Clock, limits: Limits, limit_s: float | None
    ) -> None:
        self.case, self.entries, self.clock, self.limit_s = case, entries, clock, limit_s
        self.absent, self.limits = dict(entries.absent), limits
        self.first: dict[str, float] = {}
        self.peaks: dict[str, int | None] = {}
        self.results: dict[str, Results] = {}
        self.differences: dict[str, dict[str, float]] = {}
        self.host_s: dict[str, float] = {}
        self.samples: dict[str, list[float]] = {}
        self.calls: dict[str, list[Call]] = {}
        self.replayed: dict[str, bool] = {}
        self.guests: list[str] = []
        self.disturbed: set[int] = set()  # rounds in which somebody had to wait for a core
        self.turn = 0
        gc.collect()  # the last row's tensors are no part of this one's memory
        start = time.perf_counter()
        for name in entries.calls:
            self._first_call(name)
        self.rivals = [name for name in self.first if name != OURS]
        self._compare()
        entries.ready()
        fastest = min((self.first[name] for name in self.rivals), default=0.0)
        self.once = [
            name
            for name in self.rivals
            if self.first[name] > LONG_S or self.first[name] > max(WAIT_S, SLOW * fastest)
        ]
        self._plan(start)

    def _first_call(self, name: str) -> None:
        """Call a contestant for the first time, and keep what it gives."""
        calls = self.entries.calls[name]
        try:
            if name in self.entries.compiled:
                calls[0]()
            reading, self.peaks[name] = self.clock.peak(calls[0])
        except Exception as error:  # a rival may refuse a row in any way
            if name == OURS:
                raise
            self.absent[name] = f"failed: {str(error).strip().splitlines()[0][:100]}"
            return
        self.first[name], self.results[name] = reading.seconds, reading.results

    def _compare(self) -> None:
        """Hold the rivals' results to ours, and let go of all of them."""
        if not self.results:
            return
        truth = self.results[OURS if OURS in self.results else self.rivals[0]]
        for name in self.rivals:
            found = disagreement(truth, self.results[name], name, self.case.dtype)
            self.differences[name] = found
        self.results.clear()

    def _plan(self, start: float) -> None:
        """Decide who runs in every round, and how many rounds there are."""
        racing = [name for name in self.first if name not in self.once]
        second = {name: self._second(name) for name in racing}
        for name in racing:
            self.calls[name] = [self.clock.prepared(x) for x in self.entries.calls[name]]
            self.replayed[name] = self.calls[name][0] is not self.entries.calls[name][0]
        self.samples = {n: [self.first[n]] if n in self.once else [] for n in self.first}
        fastest = min((second[name] for name in second if name != OURS), default=0.0)
        self.guests = [n for n in second if n != OURS and fastest and second[n] > SLOW * fastest]
        regular = sum(s for name, s in second.items() if name not in self.guests) or LONG_S
        rounds = max(USUAL_ROUNDS, int(self.limits.budget_s / regular))
        left = self.limits.row_s - (time.perf_counter() - start)
        fitting = max(1.0, left / regular)
        self.rounds = int(min(self.limits.most_rounds, rounds, fitting))

    def _second(self, name: str) -> float:
        """Seconds of a second, warm call, which also shows memory and the host's share."""
        hurried = self.limits.row_s < float("inf") and self.first[name] > WARM_S
        if hurried or self.limits.most_rounds == 1:
            return self.first[name]
        reading, peak = self.clock.peak(self.entries.calls[name][-1])
        self.host_s[name] = reading.host_s
        self.peaks[name] = peak
        return reading.seconds

    @property
    def call_s(self) -> float:
        """One call of everybody, the first ones."""
        return sum(self.first.values())

    def rivals_turn(self) -> None:
        """One call of every rival that takes part in this round."""
        for name in self.rivals:
            if name in self.calls and (self.turn == 0 or name not in self.guests):
                self._sample(name)

    def our_turn(self) -> None:
        """Our call of this round, its last."""
        if OURS in self.calls:
            self._sample(OURS)
        self.turn += 1

    def _sample(self, name: str) -> None:
        calls = self.calls[name]
        reading = self.clock.read(calls[self.turn % len(calls)])
        self.samples[name].append(reading.seconds)
        if reading.disturbed:
            self.disturbed.add(self.turn)

    def row(self) -> dict[str, Any]:
        """The row of results.

        Returns:
            The case; per contestant times in seconds, rounds, GFLOP/s, peak memory in bytes beside
            the inputs, the share of the limit, ``host_s``, which the host needed to issue a warm
            call, and whether it was ``replayed`` from a graph; ``rival``, the fastest of the
            others; ``ratio``, its median over ours; ``ratio_quartiles`` over the rounds; ``once``,
            whose only call stands; ``disturbed``, rounds in which somebody's threads had to wait
            for a core, and how many of them were ``left_out``: all, if enough others remain;
            ``absent``, who does not compete, and why.
        """
        left_out = self._leave_out_disturbed()
        contestants = {name: self._summary(name) for name in self.samples}
        found: dict[str, Any] = {
            **describe(self.case),
            "clock": self.clock.name,
            "limit_s": self.limit_s,
            "contestants": contestants,
            "once": self.once,
            "left_out": left_out,
            "disturbed": len(self.disturbed),
            "absent": self.absent,
            "differences": self.differences,
            "rival": None,
            "ratio": None,
            "ratio_quartiles": None,
        }
        if self.rivals:
            rival = min(self.rivals, key=lambda name: float(contestants[name]["median_s"]))
            found["rival"] = rival
            if OURS in contestants:
                found["ratio"], found["ratio_quartiles"] = self._ratio(rival)
        return found

    def _leave_out_disturbed(self) -> int:
        """Drop disturbed rounds if enough others remain; how many were dropped."""
        if self.turn - len(self.disturbed) < FEWEST_ROUNDS:
            return 0
        for name in self.samples:
            if name not in self.once and name not in self.guests:
                pairs = enumerate(self.samples[name])
                self.samples[name] = [x for turn, x in pairs if turn not in self.disturbed]
        return len(self.disturbed)

    def _ratio(self, rival: str) -> tuple[float, list[float]]:
        """A rival's median over ours, and the outer quartiles of the ratios of single rounds."""
        ours, theirs = self.samples[OURS], self.samples[rival]
        ratio = statistics.median(theirs) / statistics.median(ours)
        if len(theirs) < len(ours):
            return ratio, [ratio] * 2
        return ratio, quartiles([b / a for a, b in zip(ours, theirs, strict=True)])[::2]

    def _summary(self, name: str) -> dict[str, Any]:
        seconds = self.samples[name]
        low, median, high = quartiles(seconds)
        return {
            "rounds": len(seconds),
            "median_s": median,
            "q1_s": low,
            "q3_s": high,
            "min_s": min(seconds),
            "host_s": self.host_s.get(name),
            "replayed": self.replayed.get(name, False),
            "gflops": self.case.flop / median / 1e9,
            "peak_bytes": self.peaks[name],
            "share": None if self.limit_s is None else self.limit_s / median,
        }


def quartiles(values: list[float]) -> list[float]:
    """The three quartiles; the second is the median. All the same if there is one value."""
    if len(values) == 1:
        return values * 3
    return statistics.quantiles(values, n=4, method="inclusive")


def disagreement(ours: Results, theirs: Results, rival: str, dtype: str) -> dict[str, float]:
    """|ours - theirs| / |theirs| of every result by name; ``dtype`` is the row's.

    Raises:
        AssertionError: One of them is beyond ``AGREEMENT``, or NaN; or shapes differ, or names.
    """
    assert ours.keys() == theirs.keys(), f"bench: results {list(ours)}, {rival} has {list(theirs)}"
    differences = {}
    for name, x in theirs.items():
        assert ours[name].shape == x.shape, (
            f"bench: {name} is {tuple(ours[name].shape)}, {rival} has {tuple(x.shape)}"
        )
        error = torch.linalg.vector_norm(ours[name].float() - x.float())
        difference = float(error / torch.linalg.vector_norm(x.float()).clamp_min(1e-30))
        limit = max(AGREEMENT[x.dtype], AGREEMENT[DTYPES[dtype]])
        assert difference <= limit, (
            f"bench: {name} differs from {rival} by {difference:.2g} of its norm, limit {limit:g}"
        )
        differences[name] = difference
    return differences

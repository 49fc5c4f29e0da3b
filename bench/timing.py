"""How one row is measured: the contestants take turns, after their results were seen to agree.

Ours and every rival run in the same process on the same inputs, one call each per round, so that
whatever else happens on the machine happens to all of them. Medians are compared.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from . import OURS
from .clock import Call, Clock, Results
from .grid import DTYPES, Case, describe

FEWEST_ROUNDS = 3
LONG_S = 5.0  # a rival's call that takes longer is not repeated: its first is its time
SLOW = 4.0  # a rival this many times slower than the fastest one runs in one round only

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

    budget_s: float  # for the rounds; at least FEWEST_ROUNDS are run all the same
    most_rounds: int


class Race:
    """One row: compares, warms up, plans the rounds; then each side takes its turn `rounds` times.

    Raises:
        AssertionError: A rival's results are not ours.
    """

    def __init__(
        self, case: Case, entries: Entries, clock: Clock, limits: Limits, limit_s: float | None
    ) -> None:
        self.case, self.absent, self.clock, self.limit_s = (
            case,
            dict(entries.absent),
            clock,
            limit_s,
        )
        gc.collect()  # the last row's tensors are no part of this one's memory
        first, self.peaks = {}, dict[str, int | None]()
        results: dict[str, Results] = {}
        for name, calls in entries.calls.items():
            try:
                if name in entries.compiled:
                    calls[0]()
                reading, self.peaks[name] = clock.peak(calls[0])
            except Exception as error:  # a rival may refuse a row in any way
                if name == OURS:
                    raise
                self.absent[name] = f"failed: {str(error).strip().splitlines()[0][:100]}"
                continue
            first[name], results[name] = reading.seconds, reading.results
        self.host_s: dict[str, float] = {}
        self.rivals = [name for name in first if name != OURS]
        truth = results[OURS if OURS in results else self.rivals[0]]
        self.differences = {
            name: disagreement(truth, results[name], name, case.dtype) for name in self.rivals
        }
        results.clear()
        entries.ready()
        self.once = [name for name in self.rivals if first[name] > LONG_S]
        racing = [name for name in first if name not in self.once]
        second = {name: self._second(name, entries.calls[name][-1], limits) for name in racing}
        self.calls = {name: [clock.prepared(x) for x in entries.calls[name]] for name in racing}
        self.replayed = {name: self.calls[name][0] is not entries.calls[name][0] for name in racing}
        self.samples = {name: [first[name]] if name in self.once else [] for name in first}
        fastest = min((second[name] for name in second if name != OURS), default=0.0)
        self.guests = [n for n in second if n != OURS and fastest and second[n] > SLOW * fastest]
        regular = sum(s for name, s in second.items() if name not in self.guests)
        planned = max(FEWEST_ROUNDS, int(limits.budget_s / regular))
        self.rounds = min(limits.most_rounds, planned)
        self.turn = 0
        self.disturbed: set[int] = set()  # rounds in which somebody had to wait for a core

    def _second(self, name: str, call: Call, limits: Limits) -> float:
        """Seconds of a second, warm call, which also shows memory and the host's share."""
        if limits.most_rounds == 1:
            return LONG_S
        reading, peak = self.clock.peak(call)
        self.host_s[name] = reading.host_s
        self.peaks[name] = peak
        return reading.seconds

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

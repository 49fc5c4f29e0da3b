"""How long a run may take, and what does not fit: the quick suites end in time on any machine.

Every suite has its part of the minutes, and its rows come in order of value. Before a row, a round
of it is predicted from rows that were timed: seconds per FLOP of each contestant. The row gets as
many rounds as fit. What would take too long is left out and named with the reason: a rival that is
slower than another by far, compiling FlexAttention once more, a row. The core shapes are timed even
if only one call of each contestant fits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from . import OURS, SDPA
from .grid import Case, is_core
from .timing import FEWEST_ROUNDS, SLOW, Entries, Limits, Race

# Seconds of a suite, where all of them have nine and a half minutes.
SUITE_S = {
    "forward": 115,
    "backward": 30,
    "forward+backward": 180,
    "options": 60,
    "decode": 35,
    "varlen": 35,
    "module": 65,
    "encoder": 50,
}
DUEL = (OURS, SDPA)  # who has to be in a core row
PART = 8  # a row outside the core takes at most its suite's seconds over this
CORE_PART = 100  # and a core row may take as much as this part, whatever comes after it
CAUTION = 1.2  # times what later core rows are predicted to take is kept for them
NEW = 2.0  # times the FLOP of any row before: predictions are not trusted
OVER = 4  # one call each of a core row may go over the suite's end by its seconds over this
FIELD_S = 0.5  # a round of all contestants that is no question
WAIT_S = 1.0  # rivals that are slower by far are waited for so long
COMPILE_S = 15.0  # of FlexAttention, before it was seen
COMPILE_PART = 0.3  # of a suite's seconds that may go into compiling
LEAST = 0.25  # of the seconds per FLOP so far
RATE = 20e9  # FLOP/s of everybody, before anything was timed


class LeftOut(Exception):
    """A row that does not fit into the time."""


class Share(NamedTuple):
    """What a row may take."""

    seconds: float
    once: bool = False  # the first calls stand
    duel: bool = False  # ours and torch's fused kernel only


class Timed(NamedTuple):
    """A contestant's call in a row."""

    flop: float
    seconds: float


class Budget:
    """The time of a run.

    Args:
        cases: All rows of the run in their order.
        minutes: That all suites of the grid would have; some of them have their parts.
        most_rounds: Of a row.
        now: A clock.
    """

    def __init__(
        self,
        cases: Iterable[Case],
        minutes: float,
        most_rounds: int,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.now, self.rounds = now, min(FEWEST_ROUNDS, most_rounds)
        self.waiting = list(cases)
        whole = sum(SUITE_S.values())
        self.seconds = {
            suite: 60 * minutes * SUITE_S[suite] / whole
            for suite in dict.fromkeys(case.suite for case in self.waiting)
        }
        self.longest = max(SUITE_S.values()) * 60 * minutes / whole
        self.began: dict[str, float] = {}
        self.ends: dict[str, float] = {}
        end = now()
        for suite, seconds in self.seconds.items():
            end += seconds
            self.ends[suite] = end
        self.timed: dict[tuple[str, str, str], list[Timed]] = {}  # the largest rows, two at most
        self.compile_s = COMPILE_S
        self.compiled_s = dict.fromkeys(self.seconds, 0.0)
        self.left_out: list[dict[str, str]] = []

    def share(self, case: Case) -> Share:
        """What the next row may take.

        Raises:
            LeftOut: Nothing; the row and the reason are in ``left_out``.
        """
        self.waiting.remove(case)
        whole, calls = self.seconds[case.suite], 1 + self.rounds
        left = self._left(case.suite)
        need = self.round_s(case)
        if is_core(case):
            duel = self.round_s(case, DUEL)
            later = [x for x in self.waiting if x.suite == case.suite and is_core(x)]
            kept = CAUTION * sum(self.round_s(x, DUEL) for x in later)
            spare = max(duel + max(0.0, left - kept - duel) / 2, whole / CORE_PART)
            seconds = min(left, spare)
            if (need <= FIELD_S and calls * need <= left) or calls * need <= seconds / 4:
                return Share(seconds)
            if duel <= min(left + whole / OVER, self._longest(case.suite)):
                return Share(max(seconds, duel), once=calls * duel > seconds, duel=True)
        else:
            seconds = min(left, max(whole, left) / PART)
            if (1 if self._is_new(case) else calls) * need <= seconds:
                return Share(seconds)
        if not any(suite == case.suite for suite, _, _ in self.timed):
            return Share(whole / PART)  # something of every suite
        reason = (
            f"a round would take about {need:.2g} s; {max(0.0, left):.0f} s of the suite's"
            f" {whole:.0f} s are left"
        )
        self.left_out.append({"suite": case.suite, "id": str(case), "reason": reason})
        raise LeftOut(reason)

    def _is_new(self, case: Case) -> bool:
        """Whether a row is larger by far than those timed: its prediction may be much too long."""
        rows = [
            row
            for (suite, dtype, _), timed in self.timed.items()
            if (suite, dtype) == (case.suite, case.dtype)
            for row in timed
        ]
        return case.flop > NEW * max((row.flop for row in rows), default=0.0)

    def _left(self, suite: str) -> float:
        """Seconds that a suite has; what others did not use is more for it, to an end."""
        return min(self.ends[suite] - self.now(), self._longest(suite))

    def _longest(self, suite: str) -> float:
        """Seconds that a suite may take yet at most."""
        now = self.now()
        return self.began.setdefault(suite, now) + self.longest - now

    def call_s(self, case: Case) -> dict[str, float]:
        """One call of each contestant that was timed in the suite, predicted by FLOP."""
        return {
            name: predicted(case.flop, rows)
            for (suite, dtype, name), rows in self.timed.items()
            if (suite, dtype) == (case.suite, case.dtype)
        }

    def round_s(self, case: Case, names: Iterable[str] = ()) -> float:
        """One round of a row, predicted, without those who are slower by far; or of some names."""
        calls = self.call_s(case)
        if names:
            calls = {name: s for name, s in calls.items() if name in names}
        if not calls:
            return 2 * case.flop / RATE
        return sum(s for name, s in calls.items() if self._too_slow(name, calls) is None)

    @staticmethod
    def _too_slow(name: str, calls: dict[str, float]) -> str | None:
        fastest = min((s for who, s in calls.items() if who != OURS), default=0.0)
        seconds = calls.get(name, 0.0)
        if name == OURS or seconds <= max(WAIT_S, SLOW * fastest):
            return None
        return (
            f"would take about {seconds:.2g} s a call, {seconds / fastest:.0f} times the fastest"
            " rival: not waited for in the quick suites"
        )

    def trimmed(self, case: Case, entries: Entries, share: Share) -> Entries:
        """The contestants of a row without those who take too long."""
        calls = {name: s for name, s in self.call_s(case).items() if name in entries.calls}
        absent = dict(entries.absent)
        for name in entries.calls:
            reason = self._too_slow(name, calls)
            if share.duel and SDPA in entries.calls and name not in DUEL:
                reason = "not waited for in rows as long as this"
            if name in entries.compiled and reason is None:
                reason = self._no_compiler(case)
            if reason is not None:
                absent[name] = reason
        chosen = {name: x for name, x in entries.calls.items() if name not in absent}
        return entries._replace(calls=chosen, absent=absent)

    def _no_compiler(self, case: Case) -> str | None:
        spent = self.compiled_s[case.suite] + self.compile_s
        fits = spent <= COMPILE_PART * self.seconds[case.suite]
        if not fits or self.compile_s > self._left(case.suite):
            return f"compiling takes about {self.compile_s:.0f} s: not in each quick row"
        return None

    def limits(self, share: Share, limits: Limits) -> Limits:
        """A row's limits within its share."""
        return limits._replace(row_s=share.seconds, once=share.once)

    def learn(self, case: Case, race: Race) -> None:
        """Remember how long the contestants of a row took; rows of more FLOP count."""
        for name, seconds in race.typical_s().items():
            rows = self.timed.setdefault((case.suite, case.dtype, name), [])
            rows[:] = _largest([*rows, Timed(case.flop, seconds)])
        if race.compile_s:
            self.compile_s = race.compile_s
            self.compiled_s[case.suite] += race.compile_s


def _largest(rows: list[Timed]) -> list[Timed]:
    """The row of most FLOP, the latest of its size, and the next that has half as many or less."""
    last = max(reversed(rows), key=lambda row: row.flop)
    small = [row for row in rows if row.flop <= last.flop / 2]
    return [*([max(small, key=lambda row: row.flop)] if small else []), last]


def predicted(flop: float, rows: list[Timed]) -> float:
    """Seconds of a call: as many per FLOP as before, or what the last two rows make of it if less.

    A small row is mostly overhead, so that in proportion to it all others would take too long.
    """
    last = rows[-1]
    proportional = flop * last.seconds / last.flop
    if flop <= last.flop:
        return proportional
    more, slope = flop - last.flop, 3 / RATE
    if len(rows) == 2:
        slope = (last.seconds - rows[0].seconds) / (last.flop - rows[0].flop)
    return min(proportional, last.seconds + max(slope, LEAST * last.seconds / last.flop) * more)


def named(facts: dict[str, Any]) -> list[dict[str, str]]:
    """The rows that a run of results left out."""
    found: list[dict[str, str]] = facts.get("not_timed") or []
    return found

"""The suites: their rows, who competes in them, and how a row is measured from end to end."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from . import OURS
from . import ceilings as machine_limits
from .clock import Clock, clock
from .environment import Settings, architecture
from .grid import (
    MINUTES_SHARE,
    AttentionCase,
    CallersCase,
    Case,
    DecodeCase,
    EncoderCase,
    LayerCase,
    SparseCase,
    StatisticsCase,
    VarlenCase,
    WatchedCase,
)
from .race import Entries, Limits, Race
from .rivals import attention, callers, decode, layers, sparse, varlen

ENTRIES: dict[type, Callable[..., Entries]] = {
    AttentionCase: attention.entries,
    StatisticsCase: attention.statistics_entries,
    CallersCase: callers.entries,
    DecodeCase: decode.entries,
    VarlenCase: varlen.entries,
    SparseCase: sparse.entries,
    LayerCase: layers.layer_entries,
    EncoderCase: layers.encoder_entries,
    WatchedCase: layers.watched_entries,
}
PART = 4  # a row takes at most what its suite has left over this, or one round
LEAST_FLOP = 1e8  # smaller rows are mostly overhead, and say nothing of larger ones


class LeftOut(Exception):
    """A row for which there is no time."""


class Deadline:
    """Ends a run in time: each suite has its share of the minutes, in which rows come by value.

    What one round of a row takes is predicted from the last large row of its suite and dtype, as
    many seconds per FLOP. The first row of a suite is timed whatever it takes.

    Args:
        cases: All rows of the run in their order.
        minutes: That all suites of the grid would have; some of them have their parts.
        now: A clock.
    """

    def __init__(
        self, cases: Iterable[Case], minutes: float, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.now, self.ends, end = now, {}, now()
        whole = sum(MINUTES_SHARE.values())
        for suite in dict.fromkeys(case.suite for case in cases):
            end += 60 * minutes * MINUTES_SHARE[suite] / whole
            self.ends[suite] = end
        self.pace: dict[tuple[str, str], float] = {}  # seconds per FLOP, of one call of everybody
        self.begun: set[str] = set()
        self.left_out: list[dict[str, str]] = []

    def row_s(self, case: Case) -> float:
        """What the next row may take.

        Raises:
            LeftOut: Its first calls and a round would end too late.
        """
        left = self.ends[case.suite] - self.now()
        need = 2 * case.flop * self.pace.get((case.suite, case.dtype), 0.0)
        if case.suite in self.begun and need >= left:
            reason = f"a round would take about {need / 2:.2g} s; {max(0.0, left):.0f} s are left"
            self.left_out.append({"suite": case.suite, "id": str(case), "reason": reason})
            raise LeftOut(reason)
        self.begun.add(case.suite)
        return max(need, left / PART)

    def learn(self, race: Race) -> None:
        """Remember a row's pace."""
        case = race.case
        if case.flop >= LEAST_FLOP:
            self.pace[case.suite, case.dtype] = race.call_s / case.flop


class Session(NamedTuple):
    """What all rows of a run share."""

    settings: Settings
    device: torch.device
    clock: Clock
    ceilings: dict[str, Any] | None
    ours: str | None  # our backend; None: only rivals are measured
    deadline: Deadline | None = None  # None: everything is timed, whatever it takes

    def facts(self) -> dict[str, Any]:
        """What a file of results says of it."""
        left_out = {} if self.deadline is None else {"not_timed": self.deadline.left_out}
        return {"ceilings": self.ceilings, **left_out}


def session(settings: Settings, rows: Iterable[Case] = ()) -> Session:
    """A session for these rows, with the machine's ceilings measured first."""
    device = torch.device(settings.device)
    found = machine_limits.measure(device, settings.threads, dry=settings.size == "smoke")
    timer = clock(device, settings.threads)
    deadline = None if settings.minutes is None else Deadline(rows, settings.minutes)
    gc.freeze()  # what is imported outlives all rows: collecting between them is faster
    return Session(settings, device, timer, found, settings.backend, deadline)


def race(case: Case, session: Session) -> Race:
    """Compare a row's contestants and make ready for its rounds.

    Raises:
        AssertionError: A rival's results are not ours.
        LeftOut: The row does not fit into the run's time.
    """
    settings, deadline = session.settings, session.deadline
    limits = Limits(settings.budget_s, settings.most_rounds)
    if deadline is not None:
        limits = limits._replace(row_s=deadline.row_s(case))
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    full = settings.size == "full"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The PyTorch API of nested tensors")
        entries = ENTRIES[type(case)](
            case, session.ours, session.device, session.clock.copies, full=full
        )
        limit = machine_limits.limit_s(case, session.ceilings)
        found = Race(case, entries, session.clock, limits, limit)
    if deadline is not None:
        deadline.learn(found)
    return found


def measured(case: Case, session: Session) -> dict[str, Any]:
    """A row from end to end; what it raises is what `race` does."""
    run = race(case, session)
    for _ in range(run.rounds):
        run.rivals_turn()
        run.our_turn()
    return finished(run, session)


def finished(run: Race, session: Session) -> dict[str, Any]:
    """The row of a race whose rounds are over, with the backend and kernel of ours."""
    kernel = None if session.ours is None else architecture(session.ours, session.device.type)
    return {**run.row(), "backend": session.ours, "kernel": kernel}


def line(row: dict[str, Any]) -> str:
    """A row in one line."""
    named = row["contestants"]
    parts = [f"{row['id']}:"]
    if OURS in named:
        parts.append(f"{named[OURS]['median_s'] * 1e3:.3f} ms,")
    if row["rival"] is None:
        return " ".join([*parts, "no rival"])
    parts.append(f"{row['rival']} {named[row['rival']]['median_s'] * 1e3:.3f} ms")
    if row["ratio"] is not None:
        rounds = named[OURS]["rounds"]
        parts.append(f"({row['ratio']:.2f}x, {rounds} round{'s' * (rounds > 1)})")
    return " ".join(parts)

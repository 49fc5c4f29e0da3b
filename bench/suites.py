"""The suites: their rows, who competes in them, and how a row is measured from end to end."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from . import OURS, decode, layers, rivals, varlen
from . import ceilings as machine_limits
from .budget import Budget, Share
from .clock import Clock, clock
from .environment import Settings, architecture
from .grid import SUITES, AttentionCase, Case, DecodeCase, EncoderCase, LayerCase, VarlenCase
from .timing import Entries, Limits, Race

ENTRIES: dict[type, Callable[..., Entries]] = {
    AttentionCase: rivals.entries,
    DecodeCase: decode.entries,
    VarlenCase: varlen.entries,
    LayerCase: layers.layer_entries,
    EncoderCase: layers.encoder_entries,
}


class Session(NamedTuple):
    """What all rows of a run share."""

    settings: Settings
    device: torch.device
    clock: Clock
    ceilings: dict[str, Any] | None
    ours: str | None  # our backend; None: only rivals are measured
    budget: Budget | None = None  # None: everything is timed, whatever it takes


def session(settings: Settings, rows: Iterable[Case] = (), ours: str | None = "") -> Session:
    """A session with the machine's ceilings measured first.

    Args:
        settings: Of the run.
        rows: All that will be timed, where ``settings.minutes`` limit them.
        ours: Our backend, or None to time rivals only; by default the settings' backend.
    """
    device = torch.device(settings.device)
    found = machine_limits.measure(device, settings.threads, dry=settings.size == "smoke")
    chosen = settings.backend if ours == "" else ours
    budget = None
    if settings.minutes is not None:
        budget = Budget(rows, settings.minutes, settings.most_rounds)
    return Session(settings, device, clock(device, settings.threads), found, chosen, budget)


def cases(suite: str, size: str) -> list[Any]:
    """The rows of a suite.

    Raises:
        ValueError: There is no such suite; one line.
    """
    if suite not in SUITES:
        raise ValueError(f"bench: suite must be one of {', '.join(SUITES)}, got {suite!r}")
    return SUITES[suite](size)


def race(case: Case, session: Session) -> Race:
    """Compare a row's contestants and make ready for its rounds.

    Raises:
        AssertionError: A rival's results are not ours.
        LeftOut: The row does not fit into the run's time.
    """
    settings, budget = session.settings, session.budget
    share: Share | None = None if budget is None else budget.share(case)
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The PyTorch API of nested tensors")
        entries = ENTRIES[type(case)](
            case, session.ours, session.device, session.clock.copies, full=settings.size == "full"
        )
        limit = machine_limits.limit_s(case, session.ceilings)
        limits = Limits(settings.budget_s, settings.most_rounds)
        if budget and share:
            entries = budget.trimmed(case, entries, share)
            limits = budget.limits(share, limits)
        return Race(case, entries, session.clock, limits, limit)


def measured(case: Case, session: Session) -> dict[str, Any]:
    """A row from end to end.

    Raises:
        AssertionError: A rival's results are not ours.
        LeftOut: The row does not fit into the run's time.
    """
    run = race(case, session)
    for _ in range(run.rounds):
        run.rivals_turn()
        run.our_turn()
    return finished(run, session)


def finished(run: Race, session: Session) -> dict[str, Any]:
    """The row of a race whose rounds are over, with the backend and kernel of ours."""
    if session.budget is not None:
        session.budget.learn(run.case, run)
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

"""The process that does guarded work: first calls, cases, the cross-check, ceilings, rows."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from bench import ceilings, environment, suites
from bench.clock import clock
from bench.environment import Settings
from bench.grid import SUITES

from . import crosscheck, guard, proof

COMMAND = [sys.executable, str(Path(__file__).parent), "--worker"]  # starts the process


def work(item: guard.Item) -> Any:
    """Do one item, as ``item["task"]`` says; where the backend refuses it, ``{"refused": why}``."""
    try:
        return _work(item)
    except ValueError as error:
        _, refusal, reason = str(error).partition(" cannot run this call: ")
        if item["task"] not in ("case", "row") or not refusal:
            raise
        return {"refused": reason}


def _work(item: guard.Item) -> Any:
    if item["task"] == "case":
        judged = proof.run(item["backend"], item["device"], item["table"], item["index"])
        ran = environment.architecture(item["backend"], item["device"])
        return {"architecture": ran, "margins": judged.margins}
    if item["task"] == "crosscheck":
        return crosscheck.work(item)
    if item["task"] == "available":
        return environment.unavailable(item["backend"], item["device"])
    settings = Settings(**item["settings"])
    device = torch.device(settings.device)
    if item["task"] == "ceilings":
        return ceilings.measure(device, settings.threads, dry=settings.size == "smoke")
    timer = clock(device, settings.threads)
    session = suites.Session(settings, device, timer, item["ceilings"], item["backend"])
    case = SUITES[item["suite"]](settings.size)[item["index"]]
    return suites.measured(case, session)


def poisoned(error: Exception) -> bool:
    """Whether the device's context is lost: every later call would fail as well."""
    return "CUDA error" in str(error) or "Triton Error" in str(error)


def main() -> None:
    """Serve until the input ends."""
    guard.serve(work, poisoned)

"""The same training twice, with torch's attention and with attnfast's, each in its own process.

Within one process the two would share an allocator, its high-water mark and a generator. So each is
trained by a fresh `python -m demo.translation.worker FOLDER`, one after the other.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

import attnfast
from demo.command import UsageError
from demo.measure import ATTNFAST, TORCH, fresh_python, peak, restart_peak
from demo.translation import checkpoint
from demo.translation.interrupt import Interrupt, Interrupted
from demo.translation.settings import Settings
from demo.translation.tokens import Data, load_data, save_data
from demo.translation.train import Trainer
from demo.translation.worker import INTERRUPTED

EXACT, CLOSE = 1e-3, 0.05  # relative
UNTIMED = 3  # first steps, in which memory is first touched
LAST = 20  # steps whose mean loss is the final one


class Outcome(NamedTuple):
    """What one process measured."""

    losses: list[float]  # of each step
    held_out: float  # loss afterwards, without dropout
    step_seconds: float  # median
    tokens_per_second: float
    peak_bytes: int | None  # beyond the model and the data; None where the system does not tell


class Comparison(NamedTuple):
    """Both outcomes of one setting."""

    outcomes: dict[str, Outcome]  # by TORCH, ATTNFAST
    difference: float  # the largest relative one of what must agree
    tolerance: float

    @property
    def agree(self) -> bool:
        """Whether the two trained alike; False for NaN."""
        return self.difference <= self.tolerance


def compare_exact(data: Data, settings: Settings, steps: int, device: torch.device) -> Comparison:
    """Without dropout: the losses of every step."""
    settings = dataclasses.replace(settings, dropout=0.0)
    outcomes = _both(data, settings, steps, device, "without dropout")
    losses = (outcome.losses for outcome in outcomes.values())
    difference = max((_apart(a, b) for a, b in zip(*losses, strict=True)), key=_nan_first)
    return Comparison(outcomes, difference, EXACT)


def compare_dropout(
    data: Data,
    settings: Settings,
    steps: int,
    device: torch.device,
    **ours: Any,
) -> Comparison:
    """With dropout, whose masks differ: the final losses, in training and held out.

    Args:
        data: what both learn from.
        settings: how, dropout included.
        steps: how long.
        device: where.
        ours: what attnfast's process does besides: `watch_every`, `logdir`, `checkpoint`, the
            file that its training can be continued from, and `goal`, until which step.
    """
    outcomes = _both(data, settings, steps, device, f"dropout {settings.dropout:g}", **ours)
    a, b = outcomes.values()
    difference = max(
        _apart(statistics.fmean(a.losses[-LAST:]), statistics.fmean(b.losses[-LAST:])),
        _apart(a.held_out, b.held_out),
        key=_nan_first,
    )
    return Comparison(outcomes, difference, CLOSE)


def _apart(a: float, b: float) -> float:
    """The difference relative to torch's."""
    return abs(a - b) / abs(a)


def _nan_first(value: float) -> tuple[bool, float]:
    return value != value, value


def _both(
    data: Data, settings: Settings, steps: int, device: torch.device, label: str, **ours: Any
) -> dict[str, Outcome]:
    with tempfile.TemporaryDirectory(prefix="attnfast-translate-") as folder:
        save_data(data, Path(folder) / "data.pt")
        outcomes = {}
        for name in (TORCH, ATTNFAST):
            job = {
                "name": name,
                "settings": settings.as_dict(),
                "steps": steps,
                "device": str(device),
                "threads": torch.get_num_threads(),
                "label": f"{name}, {label}",
                **(ours if name == ATTNFAST else {}),
            }
            outcomes[name] = _in_process(job, Path(folder))
    return outcomes


def _in_process(job: dict[str, Any], folder: Path) -> Outcome:
    """Run one job; its progress bar appears here, its outcome comes back in a file."""
    (folder / "job.json").write_text(json.dumps(job))
    result, stopped = folder / "outcome.json", folder / "stopped"
    result.unlink(missing_ok=True)
    command, environment = fresh_python("demo.translation.worker", str(folder))
    with Interrupt() as interrupt:  # the process is told too, and given the time to save
        run = subprocess.run(command, env=environment)
    if run.returncode == INTERRUPTED or interrupt.asked:
        if "checkpoint" in job and stopped.exists():
            raise Interrupted(int(stopped.read_text()), Path(job["checkpoint"]))
        raise KeyboardInterrupt
    if run.returncode or not result.exists():
        raise UsageError(
            f"compare: training with {job['name']} failed with exit code {run.returncode}"
        )
    return Outcome(**json.loads(result.read_text()))


def work(folder: Path) -> bool:
    """What `_in_process` asks of this process; False if interrupted."""
    job = json.loads((folder / "job.json").read_text())
    torch.set_num_threads(job["threads"])
    settings = Settings(**job["settings"])
    data = load_data(folder / "data.pt")
    device = torch.device(job["device"])
    model = settings.build(data.tokenizer.get_vocab_size()).to(device)
    if job["name"] == ATTNFAST:
        attnfast.replace(model, verbose=False)
    torch.manual_seed(settings.seed)
    logdir = job.get("logdir") and Path(job["logdir"])
    trainer = Trainer(model, data, settings, job.get("watch_every", 0), logdir)
    trainer.goal = job.get("goal")
    target = job.get("checkpoint")
    before = restart_peak(device)
    whole = trainer.train(
        job["steps"],
        save=lambda: checkpoint.save(trainer, Path(target)) if target else None,
        label=job["label"],
    )
    after = peak(device)
    if not whole:
        (folder / "stopped").write_text(str(trainer.steps))
        return False
    timed = slice(min(UNTIMED, trainer.steps - 1), None)
    seconds, tokens = trainer.seconds[timed], trainer.tokens[timed]
    outcome = Outcome(
        losses=trainer.losses,
        held_out=trainer.held_out_loss(),
        step_seconds=statistics.median(seconds),
        tokens_per_second=sum(tokens) / sum(seconds),
        peak_bytes=None if before is None or after is None else after - before,
    )
    (folder / "outcome.json").write_text(json.dumps(outcome._asdict()))
    return True

"""What the demos' command lines share: one-line errors, numbers with limits, how it runs."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any, NoReturn

import torch

from demo.command import UsageError

OUT = Path(__file__).parent / "out"


class Parser(argparse.ArgumentParser):
    """Errors as one line and exit code 2."""

    def __init__(self, package: str, description: str, epilog: str) -> None:
        super().__init__(
            prog=f"python -m {package}",
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage too."""
        raise UsageError(f"{message} (--help lists the options)")


def add(
    group: Any, name: str, kind: Any, metavar: str, told: str, default: Any = None, **more: Any
) -> None:
    """An option with a value; a default is told behind the rest."""
    if default is not None:
        shown = default.relative_to(OUT.parents[1]) if isinstance(default, Path) else default
        told = f"{told} (default {shown})"
    group.add_argument(name, type=kind, metavar=metavar, help=told, default=default, **more)


def add_run(parser: Parser) -> Any:
    """The options of how it runs, which `set_up` obeys; returns their group."""
    group = parser.add_argument_group("how it runs")
    add(group, "--device", str, "DEVICE", "cpu, cuda, cuda:1, ...", "cpu")
    add(group, "--threads", number(1), "N", "CPU threads (default: torch's own choice)")
    return group


def set_up(options: argparse.Namespace) -> torch.device:
    """Set the threads asked for; returns the device, which is there.

    Raises:
        UsageError: there is no such device, or it does not work.
    """
    try:
        device = torch.device(options.device)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device: {options.device!r} cannot be used: {reason}") from error
    if options.threads:
        torch.set_num_threads(options.threads)
    return device


def number(low: int, high: int | None = None) -> Any:
    """An argparse type: a whole number of at least `low`, at most `high`."""

    def parsed(text: str) -> int:
        value = int(text)
        if value < low or (high is not None and value > high):
            limits = f"at least {low}" if high is None else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"must be {limits}, got {text}")
        return value

    parsed.__name__ = "number"
    return parsed


def real(low: float, high: float = math.inf, *, open_low: bool = False) -> Any:
    """An argparse type: a number of at least `low` (or above it), at most `high`."""

    def parsed(text: str) -> float:
        value = float(text)
        if not (low <= value <= high) or (open_low and value == low):
            least = f"above {low:g}" if open_low else f"at least {low:g}"
            limits = least if high == math.inf else f"{least}, at most {high:g}"
            raise argparse.ArgumentTypeError(f"must be {limits}, got {text}")
        return value

    parsed.__name__ = "number"
    return parsed

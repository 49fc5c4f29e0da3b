"""How a demo's command begins and ends; imports nothing that might not be installed."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path

NEEDED = ("torch", "attnfast", "safetensors", "tokenizers", "sklearn", "matplotlib", "rich", "tqdm")


class UsageError(Exception):
    """Something the user gave, or the machine lacks, stops the demo; the text says what to do."""


def start(name: str, package: str, load: Callable[[], Callable[[], int]], *more: str) -> int:
    """Run a command, in the project's own environment if this Python lacks what it needs.

    Args:
        name: of the command, for messages.
        package: what `python -m` runs it by.
        load: the long imports; returns the command's main function.
        more: modules that it needs beside those of all demos.
    """
    missing = [needed for needed in (*NEEDED, *more) if importlib.util.find_spec(needed) is None]
    python = Path(__file__).resolve().parents[1] / ".venv" / "bin" / "python"
    if missing and python.exists() and Path(sys.prefix) != python.parents[1]:
        os.execv(python, [str(python), "-m", package, *sys.argv[1:]])
    if missing:
        print(f"{name}: {missing[0]} is not installed: run `make demo` once", file=sys.stderr)
        return 2
    return guarded(name, lambda: load()())


def guarded(name: str, run: Callable[[], int]) -> int:
    """The command's exit code; bad input and Ctrl-C are one line."""
    try:
        return run()
    except UsageError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"\n{name}: {error.args[0] if error.args else 'interrupted'}", file=sys.stderr)
        return 130

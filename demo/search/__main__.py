"""Semantic search over Python's standard library; `python -m demo.search --help` says more."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from demo.command import start


def load() -> Callable[[], int]:
    """The command itself, whose imports take seconds."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own log lines
    from demo.search.cli import main

    return main


if __name__ == "__main__":
    sys.exit(start("search", "demo.search", load))

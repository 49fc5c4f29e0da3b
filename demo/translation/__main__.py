"""Train a translation Transformer and translate; `python -m demo.translation --help` says more."""

from __future__ import annotations

import sys
from collections.abc import Callable

from demo.command import start


def load() -> Callable[[], int]:
    """The command itself, whose imports take seconds."""
    from demo.translation.cli import main

    return main


if __name__ == "__main__":
    sys.exit(start("translate", "demo.translation", load, "polib", "sacrebleu", "tensorboard"))

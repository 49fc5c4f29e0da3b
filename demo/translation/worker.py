"""One training of the comparison: `python -m demo.translation.worker FOLDER`, for compare.py."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

INTERRUPTED = 130


def main() -> int:
    """Do the job in the folder; returns the exit code."""
    # Before the long imports, so that Ctrl-C meanwhile ends in silence.
    signal.signal(signal.SIGINT, lambda *_: sys.exit(INTERRUPTED))
    from demo.translation.compare import work

    return 0 if work(Path(sys.argv[1])) else INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())

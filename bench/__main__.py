"""The command line: ``python -m bench COMMAND``; ``--help`` lists them and their options."""

from __future__ import annotations

import sys

try:
    from .cli import main
except ModuleNotFoundError as error:
    package = (error.name or "").partition(".")[0]
    if package not in ("pandas", "matplotlib"):
        raise
    print(f"bench: {package} is missing: pip install -r requirements/bench.txt", file=sys.stderr)
    sys.exit(2)

sys.exit(main())

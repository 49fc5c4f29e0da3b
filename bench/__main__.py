"""The command line: ``python -m bench COMMAND``; ``--help`` lists them and their options."""

from __future__ import annotations

import sys

from .cli import main

sys.exit(main())

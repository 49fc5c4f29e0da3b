"""Benchmarks: attnfast against what PyTorch offers for the same result, on this machine.

    pytest bench --benchmark-json=FILE.json     time every row (`make bench`); -k selects rows
    python -m bench.report FILE.json            the tables, the geometric means, where we lose

`shapes.py` is the grid, `timing.py` how a row is measured, `environment.py` what is on record about
the machine and the code, `report.py` how results are read.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = 1  # of the rows and of "attnfast" in the JSON; a reader refuses what it does not know
OURS = "attnfast"  # our name among the contestants of a row

"""Benchmarks: attnfast against every other way to the same result, on this machine.

    python -m bench run                     the quick suites, or one question: --shape 2,16,1024,64
    python -m bench compare A.json B.json   two runs, row by row
    python -m bench report                  docs/performance.md, the plots and the README's table
    python -m bench scaling                 how time and memory grow with each size
    python -m bench distributed             the same over 1, 2 and 4 processes, and a model of more
    python -m bench evidence                which kernel was proven and timed where (tools/gpu)
    python -m bench tune                    the tiles of the Triton kernels, on a GPU (tools/gpu)
    pytest bench -k decode                  the same rows for users of pytest-benchmark

`grid.py` holds the rows, ``rivals`` who competes in them, `race.py` and `clock.py` how one is
measured, `ceilings.py` what the machine can do at best, `suites.py` puts them together,
`results.py` has the files that come out, and `tables.py`, `plots.py` and `report.py` what is
written of them. Nothing here is imported by the package, and what a visit of a GPU needs
(tools/gpu) imports only torch and numpy.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
OURS = "attnfast"  # our name among the contestants of a row
SDPA = "torch.sdpa flash"  # and that of the kernel of torch's that is its best on a CPU

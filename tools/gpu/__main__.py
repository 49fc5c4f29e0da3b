"""One command for a machine with a GPU: what runs, what is right, how fast it is.

    python3 tools/gpu --out DIR --minutes N        (`make gpu`)
    python3 tools/gpu --out DIR --dry              the same plan on the CPU, in short

It needs torch, and Triton and numpy where kernels do; our wheel or a source build. In this order:

1. the environment;
2. which kernels are right, within ten minutes: the case tables of the tests on every GPU backend of
   ours that is present, smallest cases first;
3. how fast they are: the timing grid beside all rivals, in order of value;
4. the CUDA kernels on the GPU beside the same on their emulator, which is built where g++ is;
5. compute-sanitizer on a few cases, where the tool is installed.

Whatever may crash or hang runs in a guarded process and costs its own row only. Without kernels of
ours it still measures rivals and ceilings. DIR then holds `page.md`, one page to commit,
`timing.json`, `crosscheck.json`, `evidence-<backend>.json` of each backend, `log.txt` and
`summary.txt`, the last table, of at most 60 lines; and `journal.jsonl`: the same command again goes
on where a run was cut short, on the same machine and sources.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


def find_package() -> None:
    """An installed attnfast is taken first, then the one of this repository."""
    sys.path[:] = [x for x in sys.path if Path(x or ".").resolve() not in (HERE, ROOT)]
    sys.path.append(str(ROOT))


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line."""

    def error(self, message: str) -> None:  # type: ignore[override]
        """Say what is wrong, and leave with exit code 2."""
        self.exit(2, f"gpu: {message}\n")


def positive(text: str) -> float:
    """A number of minutes."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return value


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code: 1 if anything failed, 2 for wrong arguments."""
    parser = Parser(prog="tools/gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, help="where results are written")
    parser.add_argument("--minutes", type=positive, default=30.0, help="default: %(default)g")
    parser.add_argument("--dry", action="store_true", help="a few cases and rows on the CPU")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    find_package()
    if options.worker:
        from tools.gpu import worker

        worker.main()
        return 0
    if options.out is None:
        parser.error("--out DIR is needed")
    import torch

    from tools.gpu import visit

    if not options.dry and not torch.cuda.is_available():
        parser.error("no GPU that this torch can use; --dry runs the same plan on the CPU")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: {error}")
    until = time.monotonic() + 60 * options.minutes
    return visit.run(options.out, until, dry=options.dry)


if __name__ == "__main__":
    sys.exit(main())

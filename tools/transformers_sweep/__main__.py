"""Compare every architecture of the installed transformers, tiny, with attnfast and with eager.

    python -m tools.transformers_sweep                all, about 20 minutes on one core
    python -m tools.transformers_sweep bert 't5*'     those whose model types match
    python -m tools.transformers_sweep --part 3/16    every 16th, from the third

A line per architecture, then the counts. Fails if one is wrong, that is silently not eager's.
"""

from __future__ import annotations

import argparse
import collections
import fnmatch
import sys
import warnings

import torch
import transformers

from . import compare, models


def main(arguments: list[str] | None = None) -> int:
    """The command line; 0 if nothing is wrong, else 1."""
    parser = argparse.ArgumentParser(
        "tools.transformers_sweep", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("names", nargs="*", default=["*"], help="model types, or patterns of them")
    parser.add_argument(
        "--part", default="1/1", help="N/OF: every OF-th architecture, from the Nth"
    )
    options = parser.parse_args(arguments)
    first, step = map(int, options.part.split("/"))
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    classes = models.model_classes()
    chosen = [n for n in classes if any(fnmatch.fnmatch(n, p) for p in options.names)]
    counts: collections.Counter[str] = collections.Counter()
    for name in chosen[first - 1 :: step]:
        verdict = compare.judge(name, classes[name])
        outcome = verdict.outcome + (", warned" if verdict.warned else "")
        counts[outcome] += 1
        calls = "" if verdict.outcome == "not built" else f"{verdict.calls} calls"
        print(f"{name:32} {outcome:14} {calls:9} {verdict.ran} {verdict.detail}", flush=True)
    print(", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())))
    return 1 if any(outcome.startswith("wrong") for outcome in counts) else 0


if __name__ == "__main__":
    sys.exit(main())

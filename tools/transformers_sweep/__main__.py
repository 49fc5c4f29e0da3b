"""Compare every architecture of the installed transformers, tiny, with attnfast and with eager.

    python -m tools.transformers_sweep                all, more than an hour on one core
    python -m tools.transformers_sweep bert 't5*'     those whose model types match
    python -m tools.transformers_sweep --part 3/16    every 16th, from the third
    python -m tools.transformers_sweep --write        into the data of docs/transformers.md; goes on
                                                      where it was cut short at the same commit
    python -m tools.transformers_sweep --page         that page, from the data
    python -m tools.transformers_sweep --check        whether the page fits the data

A line per architecture, then the counts. Fails if one is wrong, that is not eager's for a reason
that nobody has written down.
"""

from __future__ import annotations

import argparse
import collections
import fnmatch
import sys
import warnings

from . import page, table


def main(arguments: list[str] | None = None) -> int:
    """The command line; 0 if nothing is wrong, else 1."""
    parser = argparse.ArgumentParser(
        "tools.transformers_sweep", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("names", nargs="*", default=["*"], help="model types, or patterns of them")
    parser.add_argument(
        "--part", default="1/1", help="N/OF: every OF-th architecture, from the Nth"
    )
    parser.add_argument("--write", action="store_true", help="put what is found into the data")
    parser.add_argument("--page", action="store_true", help="write the page and do nothing else")
    parser.add_argument("--check", action="store_true", help="whether the page fits the data")
    options = parser.parse_args(arguments)
    if options.page:
        page.PAGE.write_text(page.text(table.read()))
        return 0
    if options.check:
        return 0 if page.PAGE.read_text() == page.text(table.read()) else 1
    return sweep(options.names, options.part, options.write)


def sweep(names: list[str], part: str, write: bool) -> int:
    """Compare some architectures; 0 if none is wrong, else 1."""
    import torch
    import transformers

    from . import compare, generating, models

    first, step = map(int, part.split("/"))
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    classes = models.model_classes()
    chosen = [n for n in classes if any(fnmatch.fnmatch(n, p) for p in names)]
    rows, commit = table.read() if write else {}, table.commit()
    if write:
        for name, cls in classes.items():
            unseen = table.Row(name, cls.__name__, transformers.__version__, "", "not yet")
            rows.setdefault(name, unseen)
        table.write(rows)
    counts: collections.Counter[str] = collections.Counter()
    for name in chosen[first - 1 :: step]:
        if name in rows and rows[name].commit == commit:
            continue
        what = (name, classes[name].__name__, transformers.__version__, commit)
        if write:  # what stays, if the process ends with it
            table.write(rows | {name: table.Row(*what, "not built", detail="the process ended")})
        verdict = compare.judge(name, classes[name], generating.model_class(name))
        rows[name] = table.Row(*what, *verdict[1:])
        if write:
            table.write(rows)
        outcome = verdict.outcome + (", warned" if verdict.warned else "")
        counts[outcome] += 1
        calls = "" if verdict.outcome == "not built" else f"{verdict.calls} calls"
        masks = f"[{verdict.masks}]"
        print(
            f"{name:32} {outcome:14} {calls:9} {masks} {verdict.ran} {verdict.detail}", flush=True
        )
    print(", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())))
    wrong = [name for name, row in rows.items() if row.outcome == "wrong"]
    return 1 if set(wrong) - page.KNOWN.keys() else 0


if __name__ == "__main__":
    sys.exit(main())

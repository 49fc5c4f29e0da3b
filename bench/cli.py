"""The commands of ``python -m bench``. A wrong argument or file: one line, and exit code 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from tools.gpu import evidence, kernels, tune

from . import (
    RESULTS,
    ROOT,
    compare,
    distributed,
    environment,
    limits,
    report,
    results,
    scaling,
    suites,
    tables,
)
from .environment import positive
from .grid import DTYPE_NAMES, DTYPES, OPTIONS, SIZES, SUITES, WORKS, AttentionCase

DTYPE_OF = {name: dtype for dtype, name in DTYPE_NAMES.items()} | {x: x for x in DTYPES}


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and leave with exit code 2."""
        self.exit(2, f"bench: {message}\n")


class Command(NamedTuple):
    """One command: `arguments` declares what it takes, `run` returns the exit code."""

    name: str
    help: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def _shape(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    if len(sizes) not in (4, 5) or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"must be B,H,L,D or B,H,T,S,D, got {text!r}")
    return sizes if len(sizes) == 5 else (*sizes[:3], *sizes[2:])


def _dtype(text: str) -> str:
    if text not in DTYPE_OF:
        raise argparse.ArgumentTypeError(f"must be fp32, bf16 or fp16, got {text!r}")
    return DTYPE_OF[text]


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    one = parser.add_argument_group("one question")
    one.add_argument("--shape", type=_shape, metavar="B,H,L,D", help="or B,H,T,S,D")
    one.add_argument("--causal", action="store_true")
    one.add_argument("--dtype", type=_dtype, help="fp32 (default), bf16, fp16")
    one.add_argument("--work", choices=WORKS, help="default: forward, then forward+backward")
    one.add_argument("--option", choices=OPTIONS, default="", help="of attention()")
    many = parser.add_argument_group("suites, where no shape is given")
    many.add_argument(
        "--suite",
        choices=[*SUITES, "limits"],
        action="append",
        help="default: all but limits, which are rows of the others with a bar on the CPU",
    )
    many.add_argument("--size", choices=SIZES, help="default: quick")
    many.add_argument(
        "--minutes", type=positive(float), help="for all suites; default: 9.5 for quick, else all"
    )
    parser.add_argument("--backend", help="ours; default: the first that serves the device")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=positive(int))
    parser.add_argument("--budget", type=positive(float), dest="budget_s", help="seconds a row")
    parser.add_argument("--out", type=Path, help="also write a file of results")
    parser.add_argument(
        "--resume", action="store_true", help="rows that --out holds already are not timed again"
    )


def _run(options: argparse.Namespace) -> int:
    one = options.shape is not None
    names = ("size", "backend", "device", "threads", "budget_s", "minutes")
    given = {name: getattr(options, name) for name in names}
    _check_question(options)
    settings = environment.available_settings(**{**given, "size": "full"} if one else given)
    chosen = _chosen(options, settings)
    kind = "limits" if options.suite == ["limits"] else "timing"
    facts = environment.facts(kind, settings)
    rows = _kept(options.out, facts) if options.resume else []
    done = {(row["suite"], row["id"]) for row in rows}
    waiting = [case for case in chosen if (case.suite, str(case)) not in done]
    session = suites.session(settings, waiting)
    facts.update(session.facts())
    failed = 0
    for case in waiting:
        try:
            row = suites.measured(case, session)
        except suites.LeftOut as reason:
            print(f"{case}: left out: {reason}", flush=True)
            continue
        except AssertionError as error:  # results differ: nothing to time
            print(f"{case}: {error}", file=sys.stderr)
            failed += 1
            continue
        rows.append(row)
        print(tables.contestants(row) if one else suites.line(row), flush=True)
        if options.out is not None:
            results.save(options.out, facts, rows)
    if rows and not one:
        print("", tables.overview(results.Run(Path("this run"), facts, rows)), sep="\n")
        if "limits" in (options.suite or ()):
            print("", limits.page(_kernel(settings), rows), sep="\n")
    return 1 if failed else 0


def _kernel(settings: environment.Settings) -> str:
    """The instruction set whose bars hold.

    Raises:
        ValueError: Ours are not the CPU's kernels.
    """
    if settings.backend != "cpu":
        raise ValueError(f"bench: --suite limits has bars for the CPU, got {settings.backend}")
    return environment.architecture("cpu")


def _check_question(options: argparse.Namespace) -> None:
    """Refuse what says nothing about suites, or about one shape."""
    if options.shape is not None and (options.suite or options.size or options.minutes):
        raise ValueError(
            "bench: --shape is a row of its own: leave out --suite, --size and --minutes"
        )
    for name in ("causal", "dtype", "work", "option"):
        if options.shape is None and getattr(options, name):
            raise ValueError(f"bench: --{name} is of one question: give its --shape")


def _chosen(options: argparse.Namespace, settings: environment.Settings) -> list[Any]:
    """The rows that were asked for."""
    if options.shape is None:
        asked = options.suite or SUITES
        found = [case for x in asked if x in SUITES for case in SUITES[x](settings.size)]
        return found + (limits.cases(_kernel(settings)) if "limits" in asked else [])
    works = [options.work] if options.work else ["forward", "forward+backward"]
    causal, dtype = options.causal or options.option == "window", options.dtype or "float32"
    cases = [AttentionCase(*options.shape, dtype, causal, x, options.option) for x in works]
    memory = environment.memory_bytes(settings.device)
    if memory is not None and cases[-1].bytes > memory:
        raise ValueError(
            f"bench: --shape needs {tables.size(int(cases[-1].bytes))} for its inputs and results,"
            f" this machine has {tables.size(memory)}"
        )
    return cases


def _kept(path: Path | None, facts: dict[str, Any]) -> list[results.Row]:
    """The rows of a run that is resumed."""
    if path is None:
        raise ValueError("bench: --resume needs --out")
    if not path.exists():
        return []
    before = results.load(path, facts["kind"])
    for name in ("device", "kernel", "versions", "sources"):
        if before.facts[name] != facts[name]:
            raise ValueError(f"bench: {path} is of another {name}: nothing to resume")
    return before.rows


def _compare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("before", type=Path, metavar="A.json")
    parser.add_argument("after", type=Path, metavar="B.json")
    parser.add_argument(
        "--threshold",
        type=positive(float),
        default=compare.THRESHOLD,
        help="how much slower is a regression; default: %(default)s, which is 10%%",
    )


def _compare(options: argparse.Namespace) -> int:
    before, after = (results.load(path, "timing") for path in (options.before, options.after))
    changes = compare.compare(before, after, options.threshold)
    print(compare.text(changes, before, after, options.threshold))
    slower = compare.slower_suites(changes, options.threshold)
    return 1 if slower or changes["regression"].any() else 0


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files", nargs="*", type=Path, help="default: the newest of each device in bench/results"
    )
    parser.add_argument("--root", type=Path, default=ROOT, help="of the repository to write to")


def _report(options: argparse.Namespace) -> int:
    written, newest = report.report(options.files, options.root)
    written.append(kernels.write(options.root))
    pages = [path for path in written if path.suffix == ".md"]
    print(f"wrote {', '.join(map(str, pages))} and {len(written) - len(pages)} pictures.")
    print("The newest run:", "", tables.overview(newest), sep="\n")
    return 0


def _scaling_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", help="ours; default: cpu")
    parser.add_argument("--root", type=Path, default=ROOT, help="of the repository to write to")


def _scaling(options: argparse.Namespace) -> int:
    return _study("scaling", scaling, options)


def _distributed(options: argparse.Namespace) -> int:
    return _study("distributed", distributed, options)


def _study(kind: str, study: Any, options: argparse.Namespace) -> int:
    """Measure, and write the file of results and the page."""
    settings = environment.available_settings(backend=options.backend, threads=1)
    facts = environment.facts(kind, settings)
    path = options.root / "bench" / "results" / facts["device"] / f"{kind}.json"
    results.save(path, facts, study.measure(settings))
    written = [path, *study.write(results.load(path, kind), options.root)]
    print(*(f"wrote {path}" for path in written), sep="\n")
    return 0


def _evidence_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--run", action="store_true", help="first run the tests' case tables, and write their file"
    )
    parser.add_argument("--backend", default="cpu", help="of --run; default: %(default)s")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of --run")
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: %(default)s")
    parser.add_argument("--dry", action="store_true", help="few cases, written nowhere")


def _tune_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pass", nargs="*", choices=tune.PASSES, default=[], dest="passes")
    parser.add_argument("--head-dim", nargs="*", type=positive(int), default=[])
    parser.add_argument("--bytes", nargs="*", type=int, choices=tuple(tune.DTYPES), default=[])
    parser.add_argument("--out", type=Path, default=tune.PATH, help="default: %(default)s")
    parser.add_argument("--minutes", type=positive(float), default=60.0, help="default: 60")


COMMANDS = (
    Command("run", "time suites, or one shape", _run_arguments, _run),
    Command("compare", "two runs, row by row; exit code 1: slower", _compare_arguments, _compare),
    Command("report", "write docs, plots and the README's table", _report_arguments, _report),
    Command("scaling", "measure how time grows, and write docs", _scaling_arguments, _scaling),
    Command("distributed", "the same over many processes", _scaling_arguments, _distributed),
    Command(
        "evidence", "which kernel was proven and timed where", _evidence_arguments, evidence.command
    ),
    Command(
        "tune", "write the tiles of the Triton kernels, on a GPU", _tune_arguments, tune.command
    ),
)


def main(arguments: list[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit code: 2, after one line, for arguments or files that make no sense.
    """
    parser = Parser(prog="python -m bench", description="Benchmarks of attnfast.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        added = commands.add_parser(command.name, help=command.help, description=command.help)
        command.arguments(added)
        added.set_defaults(execute=command.run)
    options = parser.parse_args(arguments)
    try:
        return int(options.execute(options))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2

"""Install the wheel in fresh environments, without a compiler, and check it there.

Each environment is one Python and one torch: the oldest that the wheel promises to serve, the
newest on the registry and some between. On the way a wheel is built from the source distribution.
Needs about 6 GB of disk and a network; `make test-abi` runs it.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import platform
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

from . import environments, table
from .environments import NEWEST, Environment, Failure

ROOT = Path(__file__).resolve().parents[2]
OLDEST, BETWEEN = "2.10", ("2.11", "2.13")  # those between under the last Python only
SPACE_GB = 6


def main(arguments: list[str] | None = None) -> int:
    """The command line; 0 if everything passed, 1 if something did not, 2 for bad input."""
    options = parse(arguments)
    try:
        compiler = checked(options)
        wheel, sdist = only(options.dist, "*.whl"), only(options.dist, "*.tar.gz")
    except Failure as error:
        print(f"tools.abi: {error}", file=sys.stderr)
        return 2
    options.work.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = described(wheel)
    passed = True
    if not options.no_sdist:
        result["sdist"] = build_again(sdist, wheel, options.work)
        print(f"{sdist.name}: {result['sdist']['outcome']}", flush=True)
        passed = result["sdist"]["outcome"] == "passed"
    result["environments"] = []
    for version in options.python:
        between = BETWEEN if version == options.python[-1] else ()
        for torch in options.torch or (OLDEST, *between, NEWEST):
            row = one(version, torch, wheel, options, compiler)
            passed = passed and row.outcome == "passed"
            result["environments"].append(environments.row(row))
            print(table.line(row), flush=True)
    if options.write:
        table.write(result)
    return 0 if passed else 1


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(prog="python -m tools.abi", description=__doc__)
    parser.add_argument("--python", nargs="+", default=["3.10", "3.13"], metavar="X.Y")
    parser.add_argument(
        "--torch",
        nargs="+",
        metavar="VERSION",
        help=f"such as {OLDEST}, or {NEWEST} (default: {OLDEST} {NEWEST}, and"
        f" {' '.join(BETWEEN)} under the last Python)",
    )
    parser.add_argument("--dist", type=Path, default=ROOT / "dist", help="holds the wheel")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "abi", help="for the venvs")
    parser.add_argument("--no-sdist", action="store_true", help="do not build from the sdist")
    parser.add_argument("--keep", action="store_true", help="keep the venvs and downloads")
    parser.add_argument(
        "--write", action="store_true", help=f"put the result into {table.RESULT} and {table.PAGE}"
    )
    return parser.parse_args(arguments)


def checked(options: argparse.Namespace) -> str:
    """A C compiler for the stand-ins; raises if there is none, or too little room."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise Failure("no C compiler (cc) to make the stand-ins of the CUDA libraries with")
    place = next(path for path in (options.work, *options.work.parents) if path.exists())
    free = shutil.disk_usage(place).free / 1e9
    if free < SPACE_GB:
        raise Failure(f"{place} must have {SPACE_GB} GB free, has {free:.1f}")
    return compiler


def only(folder: Path, pattern: str) -> Path:
    """The one file there."""
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise Failure(f"{folder} must hold one {pattern}, holds {len(found)}: run make wheel")
    return found[0]


def one(
    version: str, torch: str, wheel: Path, options: argparse.Namespace, compiler: str
) -> Environment:
    """Try one environment out, and remove it."""
    folder = options.work / f"{version}-{torch}"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        return environments.try_out(version, torch, wheel, folder, compiler)
    except Failure as error:
        return Environment(version, torch, 0, str(error), "none", "none", [], 0.0, 0.0)
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.rmtree(options.work / f"torch-{version}-{torch}", ignore_errors=True)


def build_again(sdist: Path, wheel: Path, work: Path) -> dict[str, Any]:
    """Build a wheel from the source distribution; it must hold what the wheel holds."""
    start = time.perf_counter()
    folder = work / "from-sdist"
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps"]
    try:
        environments.call([*command, "-w", str(folder), str(sdist)], work, environments.for_pip())
        differing = contents(only(folder, "*.whl")) ^ contents(wheel)
        outcome = f"differs in {', '.join(sorted(differing))}" if differing else "passed"
    except Failure as error:
        outcome = str(error)
    shutil.rmtree(folder, ignore_errors=True)
    return {
        "name": sdist.name,
        "bytes": sdist.stat().st_size,
        "outcome": outcome,
        "build_s": round(time.perf_counter() - start, 1),
    }


def contents(wheel: Path) -> set[str]:
    """The names of the files in a wheel, but for the bill of materials that auditwheel adds."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    return {name for name in names if not name.endswith("/") and "/sboms/" not in name}


def described(wheel: Path) -> dict[str, Any]:
    """When, where and what: the head of the result."""
    changed = git("status", "--porcelain", "--", "attnfast", "kernels", "csrc", "setup.py")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": git("rev-parse", "HEAD") + ("+" if changed else ""),
        "machine": f"{platform.machine()}, {platform.system()}, {' '.join(platform.libc_ver())}",
        "wheel": {
            "name": wheel.name,
            "bytes": wheel.stat().st_size,
            "sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
        },
    }


def git(*arguments: str) -> str:
    """What git says; nothing outside a checkout."""
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""


if __name__ == "__main__":
    sys.exit(main())

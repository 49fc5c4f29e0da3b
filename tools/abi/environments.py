"""Fresh virtual environments that hold torch, the wheel and no compiler."""

from __future__ import annotations

import email
import json
import os
import re
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

from . import pythons, stubs

NEWEST = "newest"
LEFT_OUT = re.compile(r"(nvidia|cuda|triton)")  # gigabytes that only a GPU needs
SMOKE = Path(__file__).with_name("smoke.py")
LIMIT_S = 600


class Failure(Exception):
    """A step that did not succeed; its message is one line."""


class Environment(NamedTuple):
    """One row of the result."""

    python: str  # the full version; what was asked for where there is none
    torch: str
    stubs: int  # how many CUDA libraries were stood in for
    outcome: str  # "passed", or what failed
    accuracy: str  # of `python -m attnfast --check`
    instruction_set: str
    smoke: list[str]
    install_s: float
    run_s: float


def try_out(version: str, torch: str, wheel: Path, folder: Path, compiler: str) -> Environment:
    """Install torch and the wheel under one Python and run both checks there.

    Args:
        version: Python's version, such as "3.13".
        torch: "newest", or the beginning of a version, such as "2.10".
        wheel: the attnfast wheel.
        folder: where the environment is made; it must not exist. Downloads go beside it.
        compiler: a C compiler, for the stand-ins of the CUDA libraries only.

    Raises:
        Failure: no such Python, no network, or a check that failed; one line.
    """
    base = pythons.find(version)
    if base is None:
        raise Failure(f"no Python {version} with venv (PATH, pyenv, uv, asdf, mise, conda)")
    start = time.perf_counter()
    call([str(base), "-m", "venv", str(folder)], folder.parent, dict(os.environ))
    python = str(folder / "bin" / "python")
    archive = download(python, torch, folder.parent / f"torch-{version}-{torch}")
    pip = [python, "-m", "pip", "install", "--quiet", "--no-compile", "--only-binary=:all:"]
    call([*pip, "--no-deps", str(archive)], folder, for_pip())
    call([*pip, *requirements(archive)], folder, for_pip())
    call([*pip, "--no-deps", "--no-index", str(wheel)], folder, for_pip())
    (torch_lib,) = folder.glob("lib/python*/site-packages/torch/lib")
    made = stubs.make(torch_lib, folder / "stubs", compiler)
    installed = time.perf_counter()
    bare = {"PATH": str(folder / "bin"), "LD_LIBRARY_PATH": str(folder / "stubs"), "LANG": "C"}
    smoke = json.loads(last_line(call([python, str(SMOKE)], folder, bare)))
    check = [python, "-m", "attnfast", "--check", "--json"]
    report = json.loads(call(check, folder, bare, allowed=(0, 1)))
    verdicts = report["check"]
    good = sum(verdict["ok"] for verdict in verdicts)
    cpu = next(row for row in report["backends"] if row["name"] == "cpu")
    for what, path in (("package", smoke["package"]), ("library", report["native_library"])):
        if not Path(path or "").is_relative_to(folder):
            raise Failure(f"the {what} must be the installed one, in {folder}, got {path}")
    return Environment(
        report["python"],
        report["torch"],
        len(made),
        "passed" if good == len(verdicts) else "failed",
        f"{good} of {len(verdicts)}",
        cpu["instruction_set"],
        smoke["passed"],
        round(installed - start, 1),
        round(time.perf_counter() - installed, 1),
    )


def download(python: str, torch: str, folder: Path) -> Path:
    """The wheel of torch that fits this Python; one that lies there already is not fetched again.

    For "newest" the registry is asked anyway, since it may have a newer one.
    """
    wanted = "torch" if torch == NEWEST else f"torch=={torch}.*"
    command = [python, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    call([*command, "--dest", str(folder), wanted], folder.parent, for_pip())
    return max(folder.glob("torch-*.whl"), key=lambda path: path.stat().st_mtime)


def requirements(archive: Path) -> list[str]:
    """What a wheel of torch requires, without the CUDA libraries and Triton."""
    with zipfile.ZipFile(archive) as content:
        (name,) = (x for x in content.namelist() if x.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(content.read(name))
    required = metadata.get_all("Requires-Dist", [])
    return [line for line in required if not LEFT_OUT.match(line) and "extra ==" not in line]


def for_pip() -> dict[str, str]:
    """For pip: no constraint of the machine's may choose another torch."""
    return os.environ | {"PIP_CONSTRAINT": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def call(
    command: list[str],
    cwd: Path,
    environment: dict[str, str],
    allowed: tuple[int, ...] = (0,),
) -> str:
    """Standard output of a command that ends with an allowed exit code.

    Raises:
        Failure: it does not; with the last line of what it said.
    """
    try:
        done = subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=LIMIT_S
        )
    except subprocess.TimeoutExpired:
        raise Failure(f"{shown(command)}: not done after {LIMIT_S} s") from None
    if done.returncode not in allowed:
        said = last_line(done.stderr) or last_line(done.stdout)
        raise Failure(f"{shown(command)}: exit code {done.returncode}: {said}")
    return done.stdout


def shown(command: list[str]) -> str:
    """A command, as short as still tells which it is."""
    return " ".join(Path(word).name for word in command[:4])


def last_line(text: str) -> str:
    """The last line that is not empty."""
    return next((line for line in reversed(text.splitlines()) if line.strip()), "")


def row(environment: Environment) -> dict[str, Any]:
    """For JSON."""
    return environment._asdict()


if sys.platform != "linux":
    raise SystemExit("tools.abi: wheels with kernels are for Linux only")

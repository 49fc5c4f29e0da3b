"""Whether a command in the documentation is one that exists: its program, files and options."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import attnfast

ROOT = Path(__file__).resolve().parent.parent
ASSIGNMENT = re.compile(r"([A-Z][A-Z_]*)=(.*)")
TARGETS = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
MAKE_VARIABLES = {"ARGS", "CXX", "PTX", "PYTHON", "RESULTS", "TRITON", "WORKERS"}
PROGRAM_SOURCES = {  # where a program's options are defined
    "attnfast": "attnfast/__main__.py",
    "attnfast.lens": "attnfast/lens/__main__.py",
    "bench": "bench",
    "bench.report": "bench",
    "tools.abi": "tools/abi",
    "tools.transformers_sweep": "tools/transformers_sweep",
    "demo.collapse": "demo/collapse.py",
    "demo.lens": "demo",
    "demo.search": "demo",
    "demo.sentences": "demo",
    "demo.translation": "demo",
}


def problem(line: str, switches: set[str]) -> str | None:
    """What is wrong with a command line, or None.

    Args:
        line: a command; comments are left out.
        switches: the environment variables that the package reads.
    """
    words = shlex.split(line, comments=True)
    while words and (assigned := ASSIGNMENT.fullmatch(words[0])):
        if assigned[1] not in switches | {"OMP_NUM_THREADS", "TRITON_INTERPRET"}:
            return f"nothing reads {assigned[1]}"
        words = words[1:]
    if not words:
        return None
    program, *rest = words
    if program == "make":
        return make_problem(rest, switches)
    if program == "pip":
        return pip_problem(rest)
    if program in ("python", ".venv/bin/python", "torchrun"):
        return python_problem(rest, torchrun=program == "torchrun")
    if program == "chromium" or words in (["pre-commit", "install"], [".ci/run"]):
        return None
    return f"no check for {program}: teach {Path(__file__).name}"


def make_problem(words: list[str], switches: set[str]) -> str | None:
    """Targets must be in the Makefile, and variables be known to it or to what it runs."""
    for word in words:
        assigned = ASSIGNMENT.fullmatch(word)
        if assigned and assigned[1] not in MAKE_VARIABLES | switches:
            return f"make does not know {assigned[1]}"
        if not assigned and word not in TARGETS:
            return f"make has no target {word}"
    return None


def pip_problem(words: list[str]) -> str | None:
    """Only what exists can be installed: this folder, torch, or the wheel that make wheel names."""
    wheel = f"attnfast-{attnfast.__version__}-py3-none-manylinux_2_28_x86_64.whl"
    for word in words[1:]:
        if not word.startswith("-") and word not in (".", "torch", wheel, f"dist/{wheel}"):
            return f"pip cannot install {word}"
    return None if words[:1] == ["install"] else f"pip {words[0]} is not checked"


def python_problem(words: list[str], *, torchrun: bool = False) -> str | None:
    """A module or a script that exists, with options that it has."""
    while torchrun and words and words[0].startswith("--"):
        words = words[1:]
    if words[:1] != ["-m"]:
        return options_problem(words[0], words[1:])
    module, rest = words[1], words[2:]
    if module == "pytest":
        missing = [word for word in rest if word.startswith("tests") and not (ROOT / word).exists()]
        return f"no {missing[0]}" if missing else None
    if not any((ROOT / f"{module.replace('.', '/')}{end}").exists() for end in (".py", "")):
        return f"no module {module}"
    return options_problem(module, rest)


def options_problem(program: str, words: list[str]) -> str | None:
    """Every --option must stand in the program's sources."""
    path = ROOT / PROGRAM_SOURCES.get(program, program)
    if "/" in program and not (ROOT / program).exists():
        return f"no {program}"
    if not path.exists():
        return f"no {program}"
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    text = "\n".join(file.read_text() for file in files)
    for word in words:
        option = word.partition("=")[0]
        known = option == "--help" or f'"{option}"' in text or flag_in(option, text)
        if option.startswith("--") and not known:
            return f"{program} has no option {option}"
    return None


def flag_in(option: str, text: str) -> bool:
    """Whether it is the ``--no-x`` of a BooleanOptionalAction called ``--x``."""
    return f'"{option.replace("--no-", "--", 1)}"' in text and "BooleanOptionalAction" in text

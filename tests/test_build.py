"""The build: what the library and the wheel hold, and one clear line for whatever is missing."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import attnfast
from attnfast import ops

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "attnfast" / "_native.so"
SOURCES = {".py", ".h", ".hpp", ".inc", ".cpp", ".cu", ".cuh", ".md", ".txt", ".json", ".png"}
OBJECTS = ROOT / "build" / "native" / "cpu"


def run(*command: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command with these environment variables set, without what make exports to pytest."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "CXX")}
    return subprocess.run(
        command, cwd=cwd, env={**inherited, **environment}, capture_output=True, text=True
    )


def script(path: Path, text: str) -> str:
    """An executable shell script's path."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def fresh_checkout(folder: Path) -> Path:
    """What make reads before there is a .venv."""
    for name in ("Makefile", "setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "requirements", folder / "requirements")
    return folder


def only_line(done: subprocess.CompletedProcess[str]) -> str:
    """The one line on stderr, beside make's own last word."""
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if not line.startswith("make: ***")]
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_setup_without_a_compiler() -> None:
    line = only_line(run(sys.executable, "setup.py", "-q", "build_ext", CXX="/nonexistent"))
    assert line.startswith("attnfast: no C++ compiler: /nonexistent was not found; install g++")


def test_setup_with_an_old_compiler(tmp_path: Path) -> None:
    old = script(tmp_path / "old-g++", "echo 'unrecognized option -mavx512' >&2; exit 1")
    line = only_line(run(sys.executable, "setup.py", "-q", "build_ext", CXX=old))
    assert "cannot compile the kernels (unrecognized option -mavx512); install g++ 10" in line


def test_setup_without_torch() -> None:
    hide = (
        "import importlib.util as u, runpy, sys; find = u.find_spec;"
        "u.find_spec = lambda name, *rest: None if name == 'torch' else find(name, *rest);"
        "sys.argv = ['setup.py', '-q', 'build_ext'];"
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    assert only_line(run(sys.executable, "-c", hide)).startswith(
        "attnfast: torch is not installed, and its headers are needed to build: pip install torch"
    )


def test_make_without_a_compiler(tmp_path: Path) -> None:
    done = run("make", "test", cwd=fresh_checkout(tmp_path), CXX="/nonexistent")
    assert only_line(done).startswith("attnfast: no C++ compiler (/nonexistent): install g++")
    assert not (tmp_path / ".venv").exists()


def test_make_with_an_old_python(tmp_path: Path) -> None:
    old = script(tmp_path / "python3.8", "exit 1  # what the version check gives there")
    done = run("make", "test", cwd=fresh_checkout(tmp_path), PYTHON=old)
    assert only_line(done).startswith(f"attnfast: no Python 3.10 or later ({old}): install one")


def test_make_without_venv(tmp_path: Path) -> None:
    bare = script(tmp_path / "python3", '[ "$1" = -c ]  # -m venv fails')
    done = run("make", "test", cwd=fresh_checkout(tmp_path), PYTHON=bare)
    assert "-m venv .venv failed: install Python's venv module" in only_line(done)
    assert not (tmp_path / ".venv").exists()


def test_make_without_network(tmp_path: Path) -> None:
    done = run(
        *("make", "test"),
        cwd=fresh_checkout(tmp_path),
        PYTHON=sys.executable,
        PIP_NO_INDEX="1",
        PIP_CONFIG_FILE=os.devnull,
        PIP_FIND_LINKS="",
    )
    line = only_line(done)
    assert line.startswith(
        "attnfast: could not install requirements/runtime.txt: ERROR: No matching"
    )
    assert "is there a network?" in line


def test_the_library_knows_no_python() -> None:
    """Else one wheel could not serve every Python."""
    symbols = run("nm", "-D", "--undefined-only", str(LIBRARY)).stdout
    assert "aoti_torch" in symbols
    assert not re.findall(r"\bU _?Py\w+", symbols)


def test_the_library_uses_torchs_stable_interface_alone() -> None:
    """Else it would load with one torch version only: C++ names of torch are no interface."""
    symbols = run("nm", "-D", "--undefined-only", "-C", str(LIBRARY)).stdout
    assert not re.findall(r"\bU ((?:at|c10|torch)::.*)", symbols)


@pytest.mark.parametrize("isa", [isa for isa in ops.cpu_isas() if isa != "portable"])
def test_no_code_for_one_instruction_set_runs_at_load(isa: str) -> None:
    """A global constructor in such an object would be an illegal instruction on a lesser CPU."""
    objects = sorted(OBJECTS.glob(f"kernels_*.{isa}.o"))
    assert objects
    for path in objects:
        sections = run("objdump", "-h", str(path)).stdout
        assert ".text" in sections
        assert ".init_array" not in sections, path.name


@pytest.mark.parametrize(
    ("asked", "built"),
    [
        ("all", ["portable", "avx2", "avx512", "avx512_bf16", "amx"]),
        ("avx512 avx2", ["portable", "avx2", "avx512"]),
        ("native", [isa for isa in reversed(ops.cpu_isas()) if isa not in ("lanes16", "tiles16")]),
    ],
)
@pytest.mark.skipif(platform.machine() != "x86_64", reason="elsewhere there is one set")
def test_the_instruction_sets_that_are_asked_for(asked: str, built: list[str]) -> None:
    program = (
        "import runpy, setuptools; setuptools.setup = lambda **_: None;"
        " print(*runpy.run_path('setup.py')['ISAS'])"
    )
    done = run(sys.executable, "-c", program, ATTNFAST_ISAS=asked)
    assert done.stdout.split() == built, done.stderr


@pytest.mark.skipif(platform.machine() != "x86_64", reason="elsewhere there is one set")
def test_an_unknown_instruction_set() -> None:
    done = run(sys.executable, "setup.py", "build_ext", ATTNFAST_ISAS="avx2 sse9")
    assert only_line(done).endswith("out of portable avx2 avx512 avx512_bf16 amx, got 'sse9'")


def linked_objects() -> list[str]:
    """What the library was last linked from, in order."""
    text = (OBJECTS.parent / "build.ninja").read_text()
    linked = re.search(r"build _native\.so: link (.*)", text)
    assert linked is not None
    return linked[1].split()


def linked_isas() -> list[str]:
    """The instruction set of every kernel's object."""
    return [name.split(".")[1] for name in linked_objects() if "kernels_" in name]


def test_lower_instruction_sets_are_linked_first() -> None:
    """Of an inline function in several objects the first is taken: every CPU must have its code."""
    order = ["portable", "avx2", "avx512", "avx512_bf16", "amx"]
    assert linked_isas() == sorted(linked_isas(), key=order.index)
    once = [i for i, name in enumerate(linked_objects()) if "kernels_" not in name]
    assert once == list(range(len(once)))


def test_the_wheel(tmp_path: Path) -> None:
    base = str(tmp_path)
    command = (
        *("egg_info", "--egg-base", base, "build", "--build-base", base),
        *("bdist_wheel", "--bdist-dir", f"{base}/bdist", "--dist-dir", base),
    )
    isas = " ".join(dict.fromkeys(linked_isas()))
    done = run(sys.executable, "setup.py", "-q", *command, ATTNFAST_ISAS=isas)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert re.fullmatch(rf"attnfast-{attnfast.__version__}-py3-none-linux_\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as content:
        names = set(content.namelist())
        assert content.read("attnfast/_native.so") == LIBRARY.read_bytes()
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "attnfast").rglob("*.py")}
    package |= {f"attnfast/{path.relative_to(ROOT)}" for path in (ROOT / "kernels").rglob("*.py")}
    expected = package | {"attnfast/_native.so", "attnfast/py.typed"}
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert wheel.stat().st_size < 100e6, "the registry's limit for one file"


def test_the_source_distribution_can_be_built_from(tmp_path: Path) -> None:
    base = str(tmp_path)
    done = run(
        sys.executable, "setup.py", "-q", "egg_info", "--egg-base", base, "sdist", "-d", base
    )
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as content:
        names = {name.partition("/")[2] for name in content.getnames()}
    folders = ("attnfast", "bench", "csrc", "docs", "examples", "kernels", "tests", "tools")
    whole = {
        str(path.relative_to(ROOT))
        for folder in (*folders, "requirements")
        for path in (ROOT / folder).rglob("*.*")
        if path.suffix in SOURCES and not {"out", ".cache", "__pycache__"} & {*path.parts}
    }
    assert {"csrc/params.h", "kernels/__init__.py", "tests/cases.py"} <= whole <= names
    files = {"LICENSE", "Makefile", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "setup.py"}
    assert files | {"pyproject.toml", "attnfast/py.typed"} <= names

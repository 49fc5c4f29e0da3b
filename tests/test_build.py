"""The build: what the library and the wheel hold, and one clear line for whatever is missing."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import setuptools

import attnfast
from attnfast import ops
from csrc import build

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "attnfast" / "_native.so"
SOURCES = {".py", ".h", ".hpp", ".inc", ".cpp", ".cu", ".cuh", ".md", ".txt", ".json", ".png"}
OBJECTS = ROOT / "build" / "native" / "cpu"
ODD = 'a b (c) ü\'d $HOME & co #1 "`q`" ;100%'  # a folder's name; a colon is made apart
OLD_LIBC = "csrc/bindings/old_libc.cpp"
SIMD = ("csrc/cpu/simd.h", "csrc/params.h")  # what the compiler is tried with
MAKE_NEEDS = ("Makefile", "setup.py", "pyproject.toml", *SIMD)


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
    (folder / "csrc" / "cpu").mkdir(parents=True)
    for name in MAKE_NEEDS:
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "requirements", folder / "requirements")
    return folder


def only_line(done: subprocess.CompletedProcess[str]) -> str:
    """The one line on stderr, beside make's own last word."""
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if not line.startswith("make: ***")]
    assert len(lines) == 1, done.stderr
    return lines[0]


def needed() -> str:
    """The compilers that the kernels are written for; simd.h is where it says so."""
    text = (ROOT / "csrc" / "cpu" / "simd.h").read_text()
    said = re.search(r"#if !\(__clang_major__ >= (\d+) \|\| __GNUC__ >= (\d+)\)\n#error .*", text)
    assert said is not None
    needed = f"g++ {said[2]} or clang {said[1]}, or newer"
    assert f"kernels need {needed}" in said[0]
    return needed


def test_the_readme_asks_for_the_compilers_that_the_kernels_need() -> None:
    assert f"a compiler ({needed()}, with OpenMP)" in (ROOT / "README.md").read_text()


def refusal(monkeypatch: pytest.MonkeyPatch, **environment: str) -> str:
    """What the build says instead of beginning, with these environment variables set."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stopped:
        build.native()
    return str(stopped.value)


def test_setup_without_a_compiler() -> None:
    line = only_line(run(sys.executable, "setup.py", "-q", "build_ext", CXX="/nonexistent"))
    assert line == (
        f"attnfast: no C++ compiler: /nonexistent was not found; install {needed()}, with OpenMP"
        " (Debian: apt install g++), or name one in CXX"
    )


@pytest.mark.parametrize(
    "said",
    ["unrecognized option -mavx512", "In file included from a.h:\na.h:1: error: 'omp.h' not found"],
)
def test_an_old_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: str) -> None:
    old = script(tmp_path / "old-g++", f'echo "{said}" >&2; exit 1')
    line = refusal(monkeypatch, CXX=old)
    reason = said.splitlines()[-1]
    assert f"cannot compile the kernels ({reason}); install {needed()}, with OpenMP" in line


def older_compiler(folder: Path) -> str:
    """What takes itself for a g++ of ten years ago."""
    return script(folder / "older-g++", 'exec g++ -U__GNUC__ -D__GNUC__=6 "$@"')


def test_the_compilers_version_is_asked_of_the_kernels_own_header(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of make before anything is downloaded, and of setup.py."""
    old = older_compiler(tmp_path)
    line = refusal(monkeypatch, CXX=old)
    assert f'#error "attnfast\'s CPU kernels need {needed()}"' in line
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    line = only_line(run("make", "test", cwd=fresh_checkout(checkout), CXX=old))
    assert line.startswith(f"attnfast: no C++ compiler for the kernels ({old}): install {needed()}")


@pytest.mark.parametrize(
    ("name", "value", "must"),
    [
        ("CXX", "g++ 'x", "words for a shell, got g++ 'x (No closing quotation)"),
        ("ATTNFAST_CXXFLAGS", '-DX="', 'words for a shell, got -DX=" (No closing quotation)'),
        ("ATTNFAST_SANITIZE", "yes", "0 or 1, got 'yes'"),
        ("ATTNFAST_CUDA", "true", "0 or 1, got 'true'"),
        ("MAX_JOBS", "0", "a number from 1 on, got '0'"),
        ("MAX_JOBS", "many", "a number from 1 on, got 'many'"),
    ],
)
def test_environment_variables_are_checked(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, must: str
) -> None:
    assert refusal(monkeypatch, **{name: value}) == f"attnfast: {name} must be {must}"


def test_flags_of_ones_own_that_the_compiler_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    line = refusal(monkeypatch, ATTNFAST_CXXFLAGS="-fno-such-flag")
    assert "cannot compile the kernels (" in line
    assert "-fno-such-flag" in line


def test_make_without_a_compiler(tmp_path: Path) -> None:
    done = run("make", "test", cwd=fresh_checkout(tmp_path), CXX="/nonexistent")
    assert only_line(done) == (
        f"attnfast: no C++ compiler for the kernels (/nonexistent): install {needed()},"
        " with OpenMP, or name one in CXX"
    )
    assert not (tmp_path / ".venv").exists()


def test_make_with_an_old_python(tmp_path: Path) -> None:
    (tmp_path / ODD).mkdir()
    old = script(tmp_path / ODD / "python3.8", "exit 1  # what the version check gives there")
    done = run("make", "test", cwd=fresh_checkout(tmp_path), PYTHON=old)
    assert only_line(done).startswith(f"attnfast: no Python 3.10 or later ({old}): install one")


def test_make_without_venv(tmp_path: Path) -> None:
    bare = script(tmp_path / "python3", '[ "$1" = -c ]  # -m venv fails')
    done = run("make", "test", cwd=fresh_checkout(tmp_path), PYTHON=bare)
    assert "-m venv .venv failed: install Python's venv module" in only_line(done)
    assert not (tmp_path / ".venv").exists()


def test_make_in_a_folder_with_a_colon(tmp_path: Path) -> None:
    """Python's venv refuses it, since PATH could not name such a folder."""
    (tmp_path / "a:b").mkdir()
    line = only_line(run("make", "test", cwd=fresh_checkout(tmp_path / "a:b")))
    assert line.startswith("attnfast: the folder's path must be without a colon")
    assert line.endswith("/a:b")


def test_make_without_network(tmp_path: Path) -> None:
    """In a folder of any name."""
    (tmp_path / ODD).mkdir()
    done = run(
        *("make", "test"),
        cwd=fresh_checkout(tmp_path / ODD),
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


def small_checkout(folder: Path) -> Path:
    """A tree with two small sources, and one of ours, that setup.py can build."""
    for name in ("cpu", "bindings"):
        (folder / "csrc" / name).mkdir(parents=True)
    for name in ("setup.py", "csrc/build.py", "csrc/hooks.py", OLD_LIBC, *SIMD):
        shutil.copy(ROOT / name, folder / name)
    (folder / "csrc" / "cpu" / "attention_a.cpp").write_text(
        '#include "cpu/simd.h"\n'
        "namespace attnfast::cpu::ATTNFAST_ISA { int a() { return WORD[0]; } }\n"
    )
    (folder / "csrc" / "bindings" / "cpu.cpp").write_text(
        "#include <of_torch.h>\nnamespace attnfast::cpu::portable { int a(); }\n"
        'extern "C" __attribute__((visibility("default"))) int answer() {\n'
        "  return OF_TORCH + attnfast::cpu::portable::a();\n}\n"
    )
    return folder


def small_torch(folder: Path, version: str) -> None:
    """A torch of one header and two empty libraries."""
    (folder / "torch" / "include").mkdir(parents=True)
    (folder / "torch" / "lib").mkdir()
    (folder / "torch" / "__init__.py").touch()
    (folder / "torch" / "version.py").write_text(f"__version__ = '{version}'\n")
    (folder / "torch" / "include" / "of_torch.h").write_text("#define OF_TORCH 1000\n")
    for name in ("libtorch.a", "libtorch_cpu.a"):
        (folder / "torch" / "lib" / name).write_bytes(b"!<arch>\n")  # an empty archive


def test_folders_may_have_any_name(tmp_path: Path) -> None:
    """The clone's, the compiler's and torch's: ninja and the shell have their own characters."""
    clone = small_checkout(tmp_path / ODD / "clone: its $in")
    small_torch(tmp_path / ODD, "2.10.0")
    compiler = script(tmp_path / ODD / "g++", 'exec g++ "$@"')

    def built() -> str:
        done = run(
            *(sys.executable, "setup.py", "build_ext"),
            cwd=clone,
            PYTHONPATH=str(tmp_path / ODD),
            CXX=shlex.join([compiler, "-O0"]),
            ATTNFAST_ISAS="portable",
            ATTNFAST_CXXFLAGS=shlex.quote('-DWORD="$A b"'),
        )
        assert done.returncode == 0, done.stderr
        (library,) = (clone / "build").glob("lib*/attnfast/_native.so")
        found = run(sys.executable, "-c", ANSWER, str(library))
        assert found.stdout == f"{1000 + ord('$')}\n", found.stderr
        return done.stderr

    assert "compile build/native/cpu/attention_a.portable.o" in built()
    commands = json.loads((clone / "build" / "native" / "compile_commands.json").read_text())
    compiled = {command["file"]: command["directory"] for command in commands}
    assert compiled == dict.fromkeys(
        ("csrc/bindings/cpu.cpp", OLD_LIBC, "csrc/cpu/attention_a.cpp"), str(clone)
    )
    assert "no work to do" in built()
    with (clone / "csrc" / "cpu" / "simd.h").open("a") as header:
        header.write("// changed\n")
    told = built()
    assert "attention_a.portable.o" in told
    assert "bindings/cpu.o" not in told


ANSWER = "import ctypes, sys; print(ctypes.CDLL(sys.argv[1]).answer())"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is built")
@pytest.mark.parametrize("version", [None, "2.9.1", "2.10.0", "2.13.0+cpu"])
def test_torch_is_fetched_only_where_there_is_none(tmp_path: Path, version: str | None) -> None:
    """A build that pip isolates: beside setuptools it sees nothing of its environment."""
    run(sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv"))
    (packages,) = (tmp_path / "venv").glob("lib/python3*/site-packages")
    if version is not None:
        small_torch(packages, version)
    seen = tmp_path / "seen"
    seen.mkdir()
    tools = Path(setuptools.__file__).parent.parent
    for path in (*tools.glob("setuptools*"), tools / "_distutils_hack"):
        (seen / path.name).symlink_to(path)
    clone = small_checkout(tmp_path / "clone")

    def isolated(*command: str) -> subprocess.CompletedProcess[str]:
        python = (str(tmp_path / "venv" / "bin" / "python"), "-S")
        return run(*python, *command, cwd=clone, PYTHONPATH=str(seen), PYTHONNOUSERSITE="1")

    asked = "from csrc import hooks; print(hooks.get_requires_for_build_wheel())"
    done = isolated("-c", asked)
    assert done.returncode == 0, done.stderr
    requires = done.stdout.splitlines()[-1]
    if version in (None, "2.9.1"):
        assert requires == "['torch>=2.10']"
        assert only_line(isolated("setup.py", "-q", "build_ext")) == (
            "attnfast: torch 2.10 or later is not installed, and its headers are needed to build:"
            " pip install 'torch>=2.10'"
        )
    else:
        assert requires == "[]"
    assert (
        "torch"
        not in (ROOT / "pyproject.toml").read_text().partition("[project]")[0].partition("#")[0]
    )


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
    objects = sorted(OBJECTS.glob(f"attention_*.{isa}.o"))
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
        ("native", [isa for isa in reversed(ops.cpu_isas()) if isa in build.X86_ISAS]),
    ],
)
@pytest.mark.skipif(platform.machine() != "x86_64", reason="elsewhere there are others")
def test_the_instruction_sets_that_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, asked: str, built: list[str]
) -> None:
    monkeypatch.setenv("ATTNFAST_ISAS", asked)
    monkeypatch.delenv("ATTNFAST_SANITIZE", raising=False)
    assert list(build.instruction_sets()) == built


@pytest.mark.parametrize(
    ("machine", "built"),
    [("aarch64", ["neon", "neon_bf16", "sve"]), ("riscv64", ["portable"])],
)
def test_the_instruction_sets_of_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: str, built: list[str]
) -> None:
    """What the compiler's code runs on counts, and its objects have a folder of their own."""
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setenv("CXX", script(tmp_path / "cross-g++", f"echo {machine}-linux-gnu"))
    monkeypatch.setenv("ATTNFAST_ISAS", "all")
    monkeypatch.delenv("ATTNFAST_SANITIZE", raising=False)
    assert list(build.instruction_sets()) == built
    assert build.build_folder() == Path("build", machine)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="elsewhere there are others")
def test_an_unknown_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    line = refusal(monkeypatch, ATTNFAST_ISAS="avx2 sse9")
    assert line.endswith("out of portable avx2 avx512 avx512_bf16 amx, got 'sse9'")


def linked_isas(ninja_file: str) -> list[str]:
    """The instruction set of each of the library's objects, in order; of most there is none."""
    linked = re.search(r"build build/native/_native\.so: link (.*)", ninja_file)
    assert linked is not None
    return [name.split(".")[1] if "attention_" in name else "" for name in linked[1].split()]


def test_lower_instruction_sets_are_linked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an inline function in several objects the first is taken: every CPU must have its code."""
    monkeypatch.delenv("ATTNFAST_SANITIZE", raising=False)
    monkeypatch.setenv("ATTNFAST_ISAS", "all")
    order = ["", *build.ISAS.get(build.target(), {"portable": None})]
    isas = linked_isas(build.native_file())
    assert isas == sorted(isas, key=order.index)
    assert set(isas) == set(order)


def test_the_wheel(tmp_path: Path) -> None:
    base = str(tmp_path)
    command = (
        *("egg_info", "--egg-base", base, "build", "--build-base", base),
        *("bdist_wheel", "--bdist-dir", f"{base}/bdist", "--dist-dir", base),
    )
    built = OBJECTS.parent / "_native.so"
    isas = linked_isas(built.with_name("build.ninja").read_text())
    asked = " ".join(sorted(set(isas) - {""}))
    done = run(sys.executable, "setup.py", "-q", *command, ATTNFAST_ISAS=asked)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert re.fullmatch(rf"attnfast-{attnfast.__version__}-py3-none-linux_\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as content:
        names = set(content.namelist())
        assert content.read("attnfast/_native.so") == built.read_bytes()
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "attnfast").rglob("*.py")}
    package |= {f"attnfast/{path.relative_to(ROOT)}" for path in (ROOT / "kernels").rglob("*.py")}
    expected = package | {
        f"attnfast/{name}" for name in ("_native.so", "py.typed", "lens/page.html")
    }
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
    folders = ("attnfast", "bench", "csrc", "demo", "docs", "examples", "kernels", "tests", "tools")
    whole = {
        str(path.relative_to(ROOT))
        for folder in (*folders, "requirements")
        for path in (ROOT / folder).rglob("*.*")
        if path.suffix in SOURCES and not {"out", ".cache", "__pycache__"} & {*path.parts}
    }
    assert {"csrc/params.h", "kernels/__init__.py", "tests/cases.py"} <= whole <= names
    files = {"LICENSE", "Makefile", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "setup.py"}
    files |= {"pyproject.toml", "attnfast/py.typed", "attnfast/lens/page.html"}
    assert files <= names

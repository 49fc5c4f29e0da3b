"""What one wheel for all rests on, as far as that can be seen without installing it elsewhere."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from tools import hub
from tools.abi import __main__ as tools_abi
from tools.abi import environments, pythons, stubs, table
from tools.abi.__main__ import main
from tools.abi.environments import Environment, Failure

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "attnfast" / "_native.so"
SYSTEM = {"c", "m", "gcc_s", "stdc++", "gomp", "pthread", "dl", "rt", "torch", "torch_cpu"}
NEWEST_VERSIONS = hub.MANYLINUX
WEAK = {
    "aoti_torch_get_current_cuda_stream",
    "torch_exception_get_what_without_backtrace",  # of torch 2.13 and later
    "__gmon_start__",
    "__cxa_finalize",
}


def output(*command: str) -> str:
    """What a command prints."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def wanted_symbols() -> list[tuple[str, str]]:
    """(kind, symbol) of all that the library wants from others; w is weak."""
    lines = output("nm", "-D", "--undefined-only", str(LIBRARY)).splitlines()
    return [(line.split()[0], line.split()[1]) for line in lines]


def test_it_names_no_library_that_a_machine_may_lack() -> None:
    dynamic = output("readelf", "-d", str(LIBRARY))
    named = re.findall(r"\(NEEDED\).*\[lib([\w+]+)\.so", dynamic)
    assert {"torch", "torch_cpu"} <= set(named) <= SYSTEM
    assert not re.search(r"\((RPATH|RUNPATH)\)", dynamic)


def test_it_wants_no_newer_system_than_the_tag_says() -> None:
    """manylinux_2_28's newest symbol versions, as auditwheel knows them."""
    versions = re.findall(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_([\d.]+)", "\n".join(
        symbol for _, symbol in wanted_symbols()
    ))  # fmt: skip
    assert versions
    for name, version in set(versions):
        assert tuple(map(int, version.split("."))) <= NEWEST_VERSIONS[name], f"{name}_{version}"


def test_weak_symbols_are_those_that_may_be_missing() -> None:
    """Only a symbol of a library that a CPU build of torch lacks may be weak."""
    weak = {symbol.partition("@")[0] for kind, symbol in wanted_symbols() if kind in "wv"}
    assert {symbol for symbol in weak if not symbol.startswith("_ITM_")} <= WEAK


def test_torchs_headers_declare_every_symbol_wanted_of_it() -> None:
    """The C interface that its releases keep, and nothing beside it."""
    folder = Path(torch.__file__).parent / "include" / "torch" / "csrc"
    patterns = ("inductor/aoti_torch/c/*.h", "inductor/aoti_torch/generated/c_shim_aten.h")
    headers = [x for pattern in (*patterns, "stable/c/*.h") for x in folder.glob(pattern)]
    declared = "\n".join(path.read_text() for path in headers)
    wanted = [x for kind, x in wanted_symbols() if kind == "U" and re.match(r"(aoti_)?torch_", x)]
    assert len(wanted) > 10
    for symbol in wanted:
        assert re.search(rf"\b{symbol}\b", declared), symbol
    others = {x for kind, x in wanted_symbols() if kind == "U" and "@" not in x} - set(wanted)
    assert not others, "neither torch's nor of a versioned system library"


def test_the_committed_result_is_of_all_environments() -> None:
    result = json.loads((ROOT / table.RESULT).read_text())
    rows = [Environment(**row) for row in result["environments"]]
    assert [row.outcome for row in rows] == ["passed"] * 6
    assert [row.python.rpartition(".")[0] for row in rows] == ["3.10"] * 2 + ["3.13"] * 4
    releases = [row.torch.rpartition(".")[0] for row in rows]
    assert releases[0] == "2.10"
    assert releases[2:5] == ["2.10", "2.11", "2.13"]
    newest = [tuple(map(int, releases[i].split("."))) for i in (1, 5)]
    assert all(release > (2, 13) for release in newest)
    assert result["sdist"]["outcome"] == "passed"
    assert len(result["wheel"]["sha256"]) == 64
    assert "manylinux_2_" in result["wheel"]["name"]


def script(path: Path, text: str) -> Path:
    """An executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home and a PATH without any Python."""
    for name in ("PYENV_ROOT", "UV_PYTHON_INSTALL_DIR", "ASDF_DATA_DIR", "MISE_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path


def test_a_python_is_found_by_a_version_manager(bare: Path) -> None:
    """The PATH's shim of a version that is not active runs, and only complains."""
    script(bare / "bin" / "python3.77", "echo not active >&2; exit 127")
    real = script(bare / ".pyenv" / "versions" / "3.77.1" / "bin" / "python3.77", "echo 3.77")
    assert pythons.find("3.77") == real


def test_a_python_of_another_version_is_not_taken(bare: Path) -> None:
    script(bare / "bin" / "python3.77", "echo 3.76")
    assert pythons.find("3.77") is None


def test_a_missing_python_is_one_clear_line(
    bare: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/cc" if name == "cc" else None)
    (bare / "dist").mkdir()
    for name in ("attnfast-1-py3-none-any.whl", "attnfast-1.tar.gz"):
        (bare / "dist" / name).touch()
    options = ["--dist", str(bare / "dist"), "--work", str(bare / "work"), "--no-sdist"]
    assert main([*options, "--python", "3.77", "--torch", "newest"]) == 1
    assert capsys.readouterr().out == (
        "Python 3.77, torch newest: no Python 3.77 with venv (PATH, pyenv, uv, asdf, mise, conda)\n"
    )


def test_a_missing_wheel_is_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--dist", str(tmp_path), "--work", str(tmp_path / "work")]) == 2
    line = f"tools.abi: {tmp_path} must hold one *.whl, holds 0: run make wheel\n"
    assert capsys.readouterr().err == line


def test_a_failing_command_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; print('a\\nwhy', file=sys.stderr); sys.exit(3)"]
    with pytest.raises(Failure, match=r"^python\S* -c .*: exit code 3: why$"):
        environments.call(command, tmp_path, dict(os.environ))
    assert environments.call(command, tmp_path, dict(os.environ), allowed=(3,)) == ""


def test_cuda_libraries_are_not_downloaded(tmp_path: Path) -> None:
    archive = tmp_path / "torch-2.10.0-cp310-none-any.whl"
    required = (
        *("sympy>=1.13", "nvidia-cublas-cu12==12.8; platform_system == 'Linux'", "triton==3.6"),
        *("cuda-bindings==12.9.4", "setuptools; python_version >= '3.12'", "x; extra == 'opt'"),
    )
    metadata = "Name: torch\n" + "".join(f"Requires-Dist: {line}\n" for line in required)
    with zipfile.ZipFile(archive, "w") as content:
        content.writestr("torch-2.10.0.dist-info/METADATA", metadata)
    kept = ["sympy>=1.13", "setuptools; python_version >= '3.12'"]
    assert environments.requirements(archive) == kept


def build(folder: Path, name: str, text: str, *options: str) -> None:
    """A shared library from C."""
    (folder / "source.c").write_text(text)
    command = ["cc", "-shared", "-fPIC", str(folder / "source.c"), "-o", str(folder / name)]
    subprocess.run([*command, f"-Wl,-soname,{name}", *options], check=True)
    (folder / "source.c").unlink()


def test_stand_ins_carry_the_names_and_versions_wanted(tmp_path: Path) -> None:
    """Of a library whose symbols have versions and of one whose symbols have none."""
    real, lib = tmp_path / "real", tmp_path / "lib"
    real.mkdir()
    lib.mkdir()
    (tmp_path / "map").write_text("CUDA_7 { global: cudaThing; };")
    script_option = f"-Wl,--version-script={tmp_path / 'map'}"
    build(real, "libcudart.so.7", "int cudaThing(void) { return 0; }", script_option)
    build(real, "libnccl.so.2", "int ncclThing(void) { return 0; }")
    build(
        lib,
        "libtorch_cuda.so",
        "int cudaThing(void); int ncclThing(void);"
        "int both(void) { return cudaThing() + ncclThing(); }",
        *(f"-L{real}", "-l:libcudart.so.7", "-l:libnccl.so.2", "-Wl,-z,now"),
    )
    use = f"import ctypes; print(ctypes.CDLL({str(lib / 'libtorch_cuda.so')!r}).both())"
    command = [sys.executable, "-c", use]
    without = subprocess.run(command, capture_output=True, text=True)
    assert "libcudart.so.7: cannot open" in without.stderr
    made = stubs.make(lib, tmp_path / "stubs", "cc")
    assert made == ["libcudart.so.7", "libnccl.so.2"]
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path / "stubs")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout == "200\n", done.stderr
    assert sorted(path.name for path in (tmp_path / "stubs").iterdir()) == made


def test_which_environments_are_tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The oldest torch and the newest under both Pythons, those between under the last."""
    tried: list[tuple[str, str]] = []

    def one(version: str, torch: str, *_: object) -> Environment:
        tried.append((version, torch))
        return Environment(version, torch, 0, "passed", "24 of 24", "avx2", [], 0.0, 0.0)

    monkeypatch.setattr(tools_abi, "one", one)
    for name in ("a.whl", "a.tar.gz"):
        (tmp_path / name).touch()
    common = ["--dist", str(tmp_path), "--work", str(tmp_path), "--no-sdist"]
    assert main(common) == 0
    assert tried == [
        ("3.10", "2.10"), ("3.10", "newest"),
        ("3.13", "2.10"), ("3.13", "2.11"), ("3.13", "2.13"), ("3.13", "newest"),
    ]  # fmt: skip
    tried.clear()
    assert main([*common, "--python", "3.12", "--torch", "2.12"]) == 0
    assert tried == [("3.12", "2.12")]

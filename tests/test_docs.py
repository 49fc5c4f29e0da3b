"""The documentation says what is true: its examples run, its tables and links are current."""

from __future__ import annotations

import re
import runpy
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
README = (ROOT / "README.md").read_text()
SOURCES = [
    path
    for folder in ("attnfast", "kernels", "csrc", "bench", "examples")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in {".py", ".h", ".cpp", ""} and path.is_file() and ".cache" not in path.parts
] + [ROOT / "setup.py"]
PREFIXES = r"(?:ATTNFAST|BENCH)_[A-Z_]+[A-Z]"


def test_the_readme_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 2
    names: dict[str, Any] = {}
    for i, block in enumerate(blocks, 1):
        exec(compile(block, f"README.md, python block {i}", "exec"), names)
    assert "chosen:" in capsys.readouterr().out
    assert names["bias"].grad.shape == names["bias"].shape


def test_the_support_matrix_is_current() -> None:
    tool = runpy.run_path(str(ROOT / "tools" / "support_matrix.py"))
    assert tool["filled"](README) == README, "run: .venv/bin/python tools/support_matrix.py --write"


def test_the_switches_are_those_that_are_read() -> None:
    read = re.compile(rf"(?:environ|getenv|_positive)[^\n]*?[\"']({PREFIXES})[\"']")
    used = {name for path in SOURCES for name in read.findall(path.read_text())}
    table = README.split("## Switches")[1].split("\n## ")[0]
    assert set(re.findall(PREFIXES, table)) == used


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_commands_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    commands = re.findall(r"(?:`|^    )make ([a-z ]+[a-z])", page.read_text(), re.MULTILINE)
    for command in commands:
        assert set(command.split()) <= targets, f"{page.name}: make {command}"


def test_help_lists_every_command() -> None:
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony is not None
    done = subprocess.run(["make", "-C", str(ROOT), "help"], capture_output=True, text=True)
    listed = re.findall(r"^make ([a-z]+)\s+\S", done.stdout, re.MULTILINE)
    assert set(listed) == set(phony[1].split())


def test_files_named_in_contributing_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    names = re.findall(r"(?:attnfast|csrc|tests|tools|docs|requirements|\.ci)/[\w./]*\w", text)
    assert names
    for name in names:
        assert (ROOT / name).exists(), name

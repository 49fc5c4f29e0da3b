"""The documentation says what is true: examples run, tables, commands and links are current."""

from __future__ import annotations

import io
import json
import re
import runpy
import subprocess
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import shell
import stand_ins
import torch
from markdown import PAGES, Block, blocks, inline_code, links

import attnfast
from tools.abi import table

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
SOURCES = [
    path
    for folder in ("attnfast", "kernels", "csrc", "bench", "demo", "examples")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in {".py", ".h", ".cpp", ""} and path.is_file() and ".cache" not in path.parts
] + [ROOT / "setup.py"]
PREFIXES = r"(?:ATTNFAST|BENCH)_[A-Z_]+[A-Z]"
SWITCHES = (ROOT / "docs" / "guide" / "switches.md").read_text()
BLOCKS = {page: blocks(page) for page in PAGES}
CHECKED = {"python", "sh", "text", "math", "mermaid", "{eval-rst}", "{toctree}"}


def page_id(page: Path) -> str:
    """A page's path as a test's name."""
    return str(page.relative_to(ROOT))


def run_blocks(page: Path) -> tuple[dict[str, Any], str]:
    """Run a page's Python blocks in order, in one namespace: the names, and what was printed."""
    module = ModuleType("page")  # torch.compile looks a function's module up
    names = vars(module)
    printed = io.StringIO()
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        text = "".join(block.text for block in BLOCKS[page] if block.language == "python")
        rivals = [made for made in stand_ins.modules() if made.__name__.partition(".")[0] in text]
        importable = stand_ins.importable(module, *rivals)  # transformers looks for them too
        with torch.random.fork_rng(), importable, redirect_stdout(printed):
            for block in BLOCKS[page]:
                if block.language == "python" and runs_here(block):
                    code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
                    exec(code, names)
    finally:
        torch.use_deterministic_algorithms(deterministic)
    return names, printed.getvalue()


def runs_here(block: Block) -> bool:
    """A block with the word "gpu" behind its language needs one; it is compiled in any case."""
    compile(block.text, str(block), "exec")
    return "gpu" not in block.attributes or torch.cuda.is_available()


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if any(block.language == "python" for block in BLOCKS[page])],
    ids=page_id,
)
def test_python_blocks_run(page: Path) -> None:
    names, printed = run_blocks(page)
    if page.name == "README.md":
        assert "chosen:" in printed
        assert names["bias"].grad.shape == names["bias"].shape


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_block_is_of_a_kind_that_is_checked(page: Path) -> None:
    """Formulas, drawings and directives are checked by `make docs`; text is shown as it is."""
    for block in BLOCKS[page]:
        assert block.language in CHECKED, f"{block}: {block.language or 'no language'}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_commands_exist(page: Path) -> None:
    switches = set(re.findall(PREFIXES, SWITCHES))
    lines = [
        line
        for block in BLOCKS[page]
        if block.language == "sh"
        for line in block.text.replace("\\\n", " ").splitlines()
    ]
    programs = ("make ", "python -m ", "python tools/", "pip install ")
    lines += [code for code in inline_code(page) if code.startswith(programs)]
    for line in lines:
        assert shell.problem(line, switches) is None, f"{page_id(page)}: {line}"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("make tset", "make has no target tset"),
        ("make test ARG=1", "make does not know ARG"),
        ("python -m attnfast --chekc", "attnfast has no option --chekc"),
        ("python -m atnfast", "no module atnfast"),
        ("ATTNFAST_BAKCEND=cpu python -m attnfast", "nothing reads ATTNFAST_BAKCEND"),
        ("python -m demo.serach", "no module demo.serach"),
        ("python -m demo.search --fast", "demo.search has no option --fast"),
        ("pip install atnfast", "pip cannot install atnfast"),
        ("python tools/absent.py", "no tools/absent.py"),
        ("curl x", "no check for curl: teach shell.py"),
        ("python -m demo.search --no-train 'a question'  # a comment", None),
        ("python -m attnfast --check", None),
    ],
)
def test_wrong_commands_are_found(line: str, problem: str | None) -> None:
    assert shell.problem(line, {"ATTNFAST_BACKEND"}) == problem


def test_the_text_of_explain_is_what_it_prints() -> None:
    """The guide's sample has the lines of the call above it, whatever this machine is."""
    page = ROOT / "docs" / "guide" / "explain.md"
    (sample,) = (block.text for block in BLOCKS[page] if block.language == "text")
    names, _ = run_blocks(page)
    shown, real = ([line.split()[0] for line in x.splitlines()] for x in (sample, names["text"]))
    assert sorted(shown) == sorted(real)
    same = ("attention:", "options:", "chosen:", "saved for backward:")
    shown, real = (
        [x for x in y.splitlines() if x.startswith(same)] for y in (sample, names["text"])
    )
    assert shown == real


def test_the_support_matrix_is_current() -> None:
    tool = runpy.run_path(str(ROOT / "tools" / "support_matrix.py"))
    assert tool["filled"](README) == README, "run: .venv/bin/python tools/support_matrix.py --write"


def test_the_table_of_environments_is_that_of_the_last_result() -> None:
    page = (ROOT / table.PAGE).read_text()
    result = json.loads((ROOT / table.RESULT).read_text())
    assert table.filled(page, result) == page, "run: make test-abi"


def test_the_switches_are_those_that_are_read() -> None:
    read = re.compile(rf"(?:environ|getenv|_positive|switch|words)[^\n]*?[\"']({PREFIXES})[\"']")
    used = {name for path in SOURCES for name in read.findall(path.read_text())}
    assert set(re.findall(PREFIXES, SWITCHES)) == used


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page: Path) -> None:
    for target in links(page):
        path = target.partition("#")[0]
        if "://" not in path:
            assert (page.parent / path).exists(), f"{page_id(page)} links to {target}"


def test_the_api_pages_hold_every_public_name() -> None:
    text = "\n".join(path.read_text() for path in sorted(ROOT.glob("docs/api/*.md")))
    directives = re.findall(r"\.\. auto(?:function|class|module):: (\S+)", text)
    public = set(attnfast.__all__) - {"__version__"}
    assert public <= {name.rpartition(".")[2] for name in directives}
    assert len(directives) == len(set(directives))
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (ROOT / "attnfast" / "integrations").glob("*.py")
        if not path.name.startswith("_")
    }
    assert modules <= set(directives)


def test_help_lists_every_command() -> None:
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony is not None
    done = subprocess.run(["make", "-C", str(ROOT), "help"], capture_output=True, text=True)
    listed = re.findall(r"^make ([a-z0-9-]+)\s+\S", done.stdout, re.MULTILINE)
    assert set(listed) == set(phony[1].split())


def test_files_named_in_contributing_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    names = re.findall(r"(?:attnfast|csrc|tests|tools|docs|requirements|\.ci)/[\w./*]*\w", text)
    assert names
    for name in names:
        assert any(ROOT.glob(name)), name


def test_requirements_agree() -> None:
    """A package that two files pin has one version, whichever file was installed last."""
    pins: dict[str, dict[str, str]] = {}
    for path in sorted((ROOT / "requirements").glob("*.txt")):
        for line in path.read_text().splitlines():
            if "==" in line and not line.startswith("#"):
                pinned, _, marker = (part.strip() for part in line.partition(";"))
                name, version = pinned.lower().replace("_", "-").split("==")
                known = pins.setdefault(f"{name};{marker}", {path.name: version})
                assert set(known.values()) == {version}, f"{name}: {known}, {path.name} {version}"

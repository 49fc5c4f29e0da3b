"""What is searched: the standard library's docstrings, or the texts of a file."""

from __future__ import annotations

import ast
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from demo.command import UsageError
from demo.files import read_text

# Not libraries: tests, whole programs, generated tables, installers, and what left Python 3.12.
SKIPPED = frozenset(
    ("__phello__", "antigravity", "distutils", "encodings", "ensurepip", "idlelib", "lib2to3")
    + ("pydoc_data", "test", "tests", "this", "turtledemo")
)
SHORTEST = 8  # words; below this a docstring says little more than its name


class Document(NamedTuple):
    """One searchable text."""

    name: str  # where it stands: "zipfile.ZipFile"
    module: str  # its top-level module or package, "" for texts of a file
    text: str

    @property
    def headline(self) -> str:
        """The first line that says something."""
        return next((line.strip() for line in self.text.splitlines() if line.strip()), "")


def collect_stdlib(
    modules: Collection[str] | None = None, root: Path | None = None
) -> list[Document]:
    """Docstrings of the public modules, classes and functions of the standard library.

    The sources are parsed, never imported, so that nothing runs. Methods are left out, as are
    private names, docstrings under eight words and repetitions. The order is that of the
    files' paths, then of the source, so two runs under one Python give the same list.

    Args:
        modules: only these top-level modules or packages; None is all of them.
        root: the folder that holds the sources; None is this Python's own.

    Raises:
        UsageError: a module that is not there, or a Python that came without its sources.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    sources = list(_sources(root))
    if modules is not None:
        known = {name.partition(".")[0] for _, name in sources}
        if missing := sorted(set(modules) - known):
            raise UsageError(f"--modules: no source in the standard library for {missing[0]!r}")
        sources = [(path, name) for path, name in sources if name.partition(".")[0] in modules]
    documents = []
    seen = set()
    for path, name in tqdm(sources, desc="reading docstrings", unit=" files", mininterval=0.5):
        for document in _documents(path, name):
            if document.text not in seen:
                seen.add(document.text)
                documents.append(document)
    if not documents:
        raise UsageError(f"no docstrings under {root}: this Python came without its sources")
    return documents


def _sources(root: Path) -> Iterator[tuple[Path, str]]:
    """Every public module's file and dotted name, sorted by path."""
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        if not parts or parts[0] not in sys.stdlib_module_names:
            continue
        if any(part in SKIPPED or part.startswith("_") for part in parts):
            continue
        yield path, ".".join(parts)


def _documents(path: Path, module: str) -> Iterator[Document]:
    """The documents of one source file: the module's own, then its public classes and functions."""
    with tokenize.open(path) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in other people's strings
        tree = ast.parse(file.read())
    named: list[tuple[str, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]] = [
        (module, tree)
    ]
    named += [
        (f"{module}.{node.name}", node)
        for node in tree.body
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        and not node.name.startswith("_")
    ]
    for name, node in named:
        text = ast.get_docstring(node) or ""
        if len(text.split()) >= SHORTEST:
            yield Document(name, module.partition(".")[0], text)


def read_texts(path: Path) -> list[Document]:
    """The texts of a UTF-8 file: parted by blank lines if it has any, else one a line.

    Raises:
        UsageError: the file cannot be read, is not UTF-8 text, or holds no text.
    """
    texts = _read_blocks(path, "--texts")
    return [Document(f"{path.name}:{line}", "", text) for line, text in texts]


def read_queries(path: Path) -> list[str]:
    """The queries of a UTF-8 file, one a line, blank lines ignored; errors as `read_texts`."""
    return [line for line in read_text(path, "--queries").splitlines() if line.strip()]


def _read_blocks(path: Path, option: str) -> list[tuple[int, str]]:
    """Numbered blocks between blank lines, or numbered lines where no blank line parts them."""
    text = read_text(path, option)
    lines = text.splitlines()
    parted = not all(line.strip() for line in text.strip().splitlines())
    blocks: list[tuple[int, str]] = []
    inside = False
    for number, line in enumerate(lines, 1):
        if not line.strip():
            inside = False
        elif parted and inside:
            first, block = blocks[-1]
            blocks[-1] = (first, f"{block}\n{line}")
        else:
            inside = True
            blocks.append((number, line))
    return blocks

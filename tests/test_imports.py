"""Imports go down the list in CONTRIBUTING.md: nothing in attnfast imports what imports it."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def modules() -> dict[str, Path]:
    """The files of attnfast by their modules' names."""
    found = {}
    for folder in ("attnfast", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.replace("kernels", "attnfast.kernels").removesuffix(".__init__")] = path
    return found


def imported(name: str, path: Path) -> Iterator[str]:
    """All that a file imports: at its top, in functions, for type checkers, or by name."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.rsplit(".", node.level - 1)[0] if node.level else ""
            source = ".".join(filter(None, (above, node.module)))
            yield source
            yield from (f"{source}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names = (x.value for x in node.args if isinstance(x, ast.Constant))
            yield from (resolve_name(name, package) for name in names)


def graph() -> dict[str, set[str]]:
    files = modules()
    return {
        name: {x for x in imported(name, path) if x in files and x not in (name, "attnfast")}
        for name, path in files.items()
    }


def test_no_module_imports_one_that_imports_it() -> None:
    order = list(graphlib.TopologicalSorter(graph()).static_order())  # raises for a cycle
    assert order.index("attnfast.call") < order.index("attnfast.nn.attention")
    assert order[-1] in ("attnfast.__main__", "attnfast")


def test_a_cycle_within_functions_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / "attnfast").mkdir(exist_ok=True)
        path = tmp_path / "attnfast" / f"{name}.py"
        path.write_text(f"def f():\n    from .{other} import f\n")
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    with pytest.raises(graphlib.CycleError):
        list(graphlib.TopologicalSorter(graph()).static_order())

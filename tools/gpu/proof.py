"""The case tables of the tests, run by one of our backends on one device.

The tables, and the rule that results are held to, are those of ``tests/``; they need torch alone.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from bench import ROOT

TABLES = ("attention", "decode")
TESTS = {  # the test that runs a table's cases
    "attention": "tests/backends/test_table.py::test_case",
    "decode": "tests/backends/test_decode.py::test_every_option",
}
WAYS = ("contiguous", "paged")


class Judged(NamedTuple):
    """One case: by kind of kernel, the largest error as a share of what the rule allows."""

    margins: dict[str, tuple[float, str]]  # kind -> (margin, result)


def count(table: str) -> int:
    """The number of a table's cases."""
    return len(_cases(table))


def describe(table: str, index: int) -> dict[str, Any]:
    """A case's id, dtype and size, for order and reports."""
    case = _cases(table)[index]
    if table == "decode":
        case, way = case
        size = len(case.lengths) * case.H * case.T * case.S * (case.D + case.D_v)
        return {"id": f"{case}-{way}", "dtype": _name(case.dtype), "size": size}
    rows = [(case.T, case.S)] * case.B if not case.lengths else case.lengths
    size = sum(t * s for t, s in rows) * case.H * (case.D + (case.D_v or case.D))
    return {"id": str(case), "dtype": _name(case.dtype), "size": size}


def test_id(backend: str, table: str, index: int) -> str:
    """How the case is called where it is a test, or where it would be."""
    case = _cases(table)[index]
    if table == "decode":
        case = f"{case[0].name}-{case[0].dtype}-{case[1]}"
    return f"{TESTS[table]}[{backend}-{case}]"


def run(backend: str, device: str, table: str, index: int) -> Judged:
    """Compute a case, and hold every result to the accuracy rule.

    Raises:
        AssertionError: A result is beyond the rule; one line for each.
    """
    accuracy = module("accuracy")
    case = _cases(table)[index]
    if table == "decode":
        results, problem = decode(backend, device, *case)
    else:
        results, problem = attention(backend, device, case)
    margins = accuracy.margins(results, problem)
    wrong = {name: margin for name, margin in margins.items() if not margin <= 1.0}
    if wrong:
        accuracy.check(results, problem)
    found: dict[str, tuple[float, str]] = {}
    for name, margin in margins.items():
        kind = _kind(table, name)
        found[kind] = max(found.get(kind, (0.0, name)), (float(margin), name))
    return Judged(found)


def _kind(table: str, result: str) -> str:
    """The kind of kernel that a result comes from."""
    if table == "decode":
        return "decode"
    if result in ("weights", "received"):
        return "weights"
    return "backward" if result.startswith("d") else "forward"


def attention(backend: str, device: str, case: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """The results of a ``cases.Case``, on the CPU, and its problem."""
    cases = module("cases")
    problem = cases.problem(case)
    moved = problem._replace(
        inputs=_moved(problem.inputs, device), cotangents=_moved(problem.cotangents, device)
    )
    results = cases.run(moved, backend)
    return {name: x.cpu() for name, x in results.items()}, problem


def decode(backend: str, device: str, case: Any, way: str) -> tuple[dict[str, torch.Tensor], Any]:
    """The results of a ``decode_cases.DecodeCase``, on the CPU, and its problem of attention."""
    cases = module("decode_cases")
    call = cases.make(case)
    options = {
        name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in call.options.items()
    }
    moved = _moved(call._replace(options=None), device)._replace(options=options)
    out, lse = cases.WAYS[way](moved, backend=backend)
    return {"out": out.cpu(), "lse": lse.cpu()}, cases.equivalent(call)


def _moved(fields: Any, device: str) -> Any:
    """A tuple of named tensors, on a device."""
    return type(fields)(*(x.to(device) if isinstance(x, torch.Tensor) else x for x in fields))


def _cases(table: str) -> Any:
    if table == "attention":
        return module("cases").CASES
    decode = module("decode_cases")
    dtypes = module("cases").DTYPES
    return [
        (replace(case, dtype=dtype), way)
        for case in decode.CASES
        for dtype in dtypes
        for way in WAYS
    ]


def module(name: str) -> Any:
    """A module of the tests."""
    folder = str(ROOT / "tests")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

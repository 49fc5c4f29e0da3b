"""Writes the case tables with what the accuracy rule wants of them, for machines without torch.

    python tests/record_cases.py FILE [--every N]

Each case runs here, through the public functions; the CPU backend's operators that it calls are
written with their arguments, and each result's truth and bounds. recorded_cases.cpp makes the same
calls of the same kernels, compiled for another machine, and compares. Numbers are little-endian,
sizes and counts int64, as the functions below write them.
"""

from __future__ import annotations

import argparse
import ctypes
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import cases
import decode_cases
import torch
from accuracy import STATISTICS, Expected, expected
from backends import test_pooled
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

NAMES: dict[str, tuple[str | tuple[str, ...], ...]] = {  # of an operator's results, and of planes
    "fwd": ("out", "lse", "norm", STATISTICS, "received", "weights"),
    "bwd": ("dq", "dk", "dv", "dbias", "dsinks"),
    "decode": ("out", "lse", "received"),
    "pooled": ("pooled",),
}
DTYPES = {
    torch.int32: 3,
    torch.int64: 4,
    torch.float16: 5,
    torch.float32: 6,
    torch.float64: 7,
    torch.bool: 11,
    torch.bfloat16: 15,
}  # c10::ScalarType
NOTHING, TENSOR, RESULT, INTEGER, REAL, FLAG = range(6)  # an argument's kind
CASE, CALL = range(2)

Wanted = dict[str, Expected]


class Calls(TorchDispatchMode):
    """Keeps the calls of the CPU backend's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, tuple[Any, ...], tuple[Tensor, ...]]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        results = function(*args, **(kwargs or {}))
        name = function.name()
        if name.startswith("attnfast::cpu_"):
            kept = (results,) if isinstance(results, Tensor) else tuple(results)
            self.made.append((name.removeprefix("attnfast::cpu_"), args, kept))
        return results


class Writer:
    """A file of cases."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        file.write(b"attnfast recorded cases 1\n")

    def case(self, name: str, run: Callable[[], Any], wanted: Wanted) -> None:
        """A case: the calls that `run` makes, and what is wanted of their results, by name."""
        with Calls() as calls:
            run()
        self.integers(CASE)
        self.text(name)
        names = set()
        for i, (operator, arguments, results) in enumerate(calls.made):
            self.integers(CALL)
            self.text(operator)
            for x in arguments:
                self.argument(x, [results for _, _, results in calls.made[:i]])
            known = [
                (r, plane if isinstance(x, tuple) else -1, name)
                for r, x in enumerate(NAMES[operator])
                for plane, name in enumerate(x if isinstance(x, tuple) else (x,))
                if name in wanted and results[r].numel()
            ]
            self.integers(len(known))
            for result, plane, name in known:
                self.integers(result, plane)
                self.text(name)
                self.wanted(wanted[name])
                names.add(name)
        lacking = {name for name, x in wanted.items() if x.truth.numel()} - names
        assert not lacking, f"{name}: no call has the results {sorted(lacking)}"

    def integers(self, *values: int) -> None:
        self.file.write(struct.pack(f"<{len(values)}q", *values))

    def text(self, text: str) -> None:
        self.integers(len(text.encode()))
        self.file.write(text.encode())

    def argument(self, x: Any, earlier: list[tuple[Tensor, ...]]) -> None:
        """A tensor, a result of an earlier call of the case, a number or nothing."""
        if x is None:
            self.integers(NOTHING)
        elif isinstance(x, Tensor):
            if place := _place(x, earlier):
                self.integers(RESULT, *place)
            else:
                self.integers(TENSOR)
                self.tensor(x)
        elif isinstance(x, bool):
            self.integers(FLAG, x)
        elif isinstance(x, int):
            self.integers(INTEGER, x)
        else:
            self.integers(REAL)
            self.file.write(struct.pack("<d", x))

    def tensor(self, x: Tensor) -> None:
        """Sizes, strides and all bytes between its first and its last element."""
        self.integers(DTYPES[x.dtype], x.dim(), *x.shape, *x.stride())
        steps = zip(x.shape, x.stride(), strict=True)
        last = sum((size - 1) * stride for size, stride in steps)
        bytes_of = (last + 1) * x.element_size() if x.numel() else 0
        self.integers(bytes_of)
        self.file.write(ctypes.string_at(x.data_ptr(), bytes_of))

    def wanted(self, x: Expected) -> None:
        self.integers(DTYPES[x.dtype], x.truth.dim(), *x.truth.shape)
        self.file.write(struct.pack("<2d", x.bound_max, x.bound_mean))
        self.file.write(x.truth.contiguous().numpy().tobytes())


def _place(x: Tensor, earlier: list[tuple[Tensor, ...]]) -> tuple[int, int, int] | None:
    """Which call's which result a tensor is, and which plane of it, or -1 for the whole."""
    if not x.numel():
        return None
    for call, results in enumerate(earlier):
        for number, result in enumerate(results):
            planes = [(-1, result), *enumerate(result)] if result.dim() else []
            for plane, y in planes:
                if x.data_ptr() == y.data_ptr() and (x.shape, x.dtype) == (y.shape, y.dtype):
                    return call, number, plane
    return None


def table() -> Iterator[tuple[str, Callable[[], Any], Callable[[], Wanted]]]:
    """Every case: its name, what runs it, and what is wanted of it."""
    for case in cases.CASES:
        given = cases.problem(case)
        yield (
            f"{case}",
            lambda given=given: cases.run(given, "cpu"),
            lambda given=given: expected(given),
        )
    for case in decode_cases.CASES:
        for dtype in cases.DTYPES:
            call = decode_cases.make(replace(case, dtype=dtype, received=dtype == torch.bfloat16))
            for way, run in decode_cases.WAYS.items():
                yield (
                    f"decode-{way}-{replace(case, dtype=dtype)}",
                    lambda call=call, run=run: run(call, "cpu"),
                    lambda call=call: decode_cases.expected_of(call),
                )
    for i, case in enumerate(test_pooled.TAKEN):
        given, cells = test_pooled.trial(case), [*test_pooled.cells_of(case)][i % 3]
        yield (
            f"pooled-{case}-{cells}",
            lambda given=given, cells=cells: test_pooled.run(given, cells, "cpu"),
            lambda given=given, cells=cells: {"pooled": test_pooled.expected_of(given, cells)},
        )


def main() -> None:
    """Write the cases, or every N-th of them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("--every", type=int, default=1)
    asked = parser.parse_args()
    with asked.file.open("wb") as file:
        writer = Writer(file)
        for i, (name, run, wanted) in enumerate(table()):
            if i % asked.every == 0:
                writer.case(name, run, wanted())


if __name__ == "__main__":
    main()

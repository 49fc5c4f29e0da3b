"""Where the CUDA kernels stand among the backends, why, and what is said where they cannot run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attnfast import __main__ as about
from attnfast import dispatch, explain, ops, selfcheck
from attnfast.backends import Problem, cuda, gluon, reference, triton
from attnfast.call import Options
from attnfast.explain import describe

ROOT = Path(__file__).resolve().parent.parent
EMULATOR = ROOT / "build" / "emulator" / "_emulator.so"
PROBLEM = Problem(
    "attention", torch.device("cuda"), torch.bfloat16, 2, 4, 2, 10, 12, 64, 32, Options(0.125)
)


@pytest.fixture
def with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table for GPUs as it is where the library has the CUDA kernels."""
    table = (triton.ROW, cuda.ROW, reference.ROW, gluon.ROW)
    monkeypatch.setitem(dispatch.BACKENDS, "cuda", table)
    monkeypatch.setattr(cuda, "_unusable", {})


def test_every_row_has_a_reason_for_its_place() -> None:
    for device, table in dispatch.BACKENDS.items():
        assert {row.name for row in table} <= set(dispatch.REASONS[device])


def test_the_documentation_has_the_same_order_and_reasons(with_cuda: None) -> None:
    text = (ROOT / "docs" / "cuda.md").read_text()
    rows = re.findall(r"^\| \d \| `(\w+)` \| (.*) \|$", text, re.MULTILINE)
    order = [row.name for row in dispatch.backends_of(torch.device("cuda"))]
    assert rows == [(name, dispatch.REASONS["cuda"][name]) for name in order]


def test_explain_says_why_the_chosen_one_comes_first(
    with_cuda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    reasons = dispatch.REASONS["cuda"]
    monkeypatch.setitem(cuda._unusable, 0, None)
    monkeypatch.setattr(triton, "MISSING", None)
    monkeypatch.setattr(triton, "NO_COMPILER", None)
    assert f"chosen: triton, the first that accepts\nits place: {reasons['triton']}" in describe(
        "attention", PROBLEM
    )
    monkeypatch.setattr(triton, "MISSING", "Triton is not installed")
    text = describe("attention", PROBLEM)
    assert "triton     Triton is not installed\n  cuda       accepted (sm_75 and later)" in text
    assert f"chosen: cuda, the first that accepts\nits place: {reasons['cuda']}" in text
    x = torch.zeros(1, 1, 2, 8)
    assert f"its place: {dispatch.REASONS['cpu']['cpu']}" in explain(x, x, x)
    assert "its place: the device has no other backend" in explain(*[x.to("meta")] * 3)


def test_a_driver_that_cannot_run_the_kernels_leaves_the_call_to_others(
    with_cuda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = "the NVIDIA driver is older than this build's CUDA"
    monkeypatch.setitem(cuda._unusable, 0, reason)
    monkeypatch.setattr(triton, "MISSING", "Triton is not installed")
    assert dispatch.refusal("cuda", PROBLEM) == reason
    with pytest.warns(RuntimeWarning, match=f"cuda: {reason}"):
        assert dispatch.select(PROBLEM).name == "reference"
    with pytest.raises(ValueError, match=f"backend 'cuda' cannot run this call: {reason}"):
        dispatch.select(PROBLEM, "cuda")


def test_the_library_is_asked_once_per_gpu(
    with_cuda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    class Operators:
        @staticmethod
        def cuda_unusable(index: int) -> str:
            asked.append(index)
            return "broken" if index else ""

    monkeypatch.setattr(cuda, "IN_LIBRARY", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda.ops, "RAW", Operators)
    assert [cuda.unusable(i) for i in (0, 1, 0, 1)] == [None, "broken"] * 2
    assert asked == [0, 1]


def test_what_passes_is_not_remembered(with_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """No memory, or a capture: the call is taken, its launch may fail, and the next asks again."""
    answers: list[str | None] = [None, None, "the driver is too old"]

    class Operators:
        @staticmethod
        def cuda_unusable(index: int) -> str:
            answer = answers.pop(0)
            if answer is None:
                raise RuntimeError("attention: asking what a GPU can run failed: out of memory")
            return answer

    monkeypatch.setattr(cuda, "IN_LIBRARY", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda.ops, "RAW", Operators)
    assert [cuda.unusable(0) for _ in range(4)] == [None, None, *["the driver is too old"] * 2]
    assert not answers


def test_the_command_says_what_the_kernels_were_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they run, and where they do not: an old driver is a reason."""
    library = torch.library.Library("attnfast", "IMPL")
    built = "sm_80, by CUDA 13.0: NVIDIA driver 580 or later"
    library.impl("cuda_build", lambda: built, "CompositeExplicitAutograd")
    monkeypatch.setattr(cuda, "IN_LIBRARY", True)
    monkeypatch.setattr(ops, "EMULATOR", "0")
    monkeypatch.setitem(dispatch.BACKENDS, "cuda", (cuda.ROW, reference.ROW))
    try:
        assert about.backend("cuda")["reason"].endswith(f"; they are built for {built}")
        monkeypatch.setattr(about, "absent", lambda device: None)
        monkeypatch.setitem(cuda._unusable, 0, None)
        assert about.backend("cuda")["details"] == built
    finally:
        library._destroy()


def test_asking_does_not_break_a_compiled_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first time too, when an operator is called that answers with words."""
    library = torch.library.Library("attnfast", "IMPL")
    library.impl("cuda_unusable", lambda i: "broken" if i else "", "CompositeExplicitAutograd")
    monkeypatch.setattr(cuda, "IN_LIBRARY", True)
    monkeypatch.setattr(cuda, "_unusable", {})
    gpu = SimpleNamespace(is_available=lambda: True)  # to others there is no GPU
    monkeypatch.setattr(cuda, "torch", SimpleNamespace(cuda=gpu))

    def run(x: torch.Tensor) -> torch.Tensor:
        return x + sum(cuda.unusable(i) is None for i in range(2))

    try:
        assert torch.compile(run, fullgraph=True, backend="eager")(torch.zeros(1)) == 1
        assert cuda._unusable == {0: None, 1: "broken"}
    finally:
        library._destroy()


class TestReport:
    """`python -m attnfast` judges a backend by the dtypes it takes."""

    def test_a_backend_without_float32_is_available(
        self, with_cuda: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(about, "absent", lambda device: None)
        monkeypatch.setattr(triton, "MISSING", None)
        monkeypatch.setattr(triton, "NO_COMPILER", None)
        for name in ("cuda", "gluon"):
            row = about.backend(name)
            assert row["available"]
            assert row["dtypes"] == ["bfloat16", "float16"]
        assert about.backend("triton")["dtypes"] == ["float32", "bfloat16", "float16"]

    def test_what_is_missing_is_said_instead_of_a_dtype(self, with_cuda: None) -> None:
        for name in ("cuda", "gluon"):
            row = about.backend(name)
            assert not row["available"]
            assert "float32" not in row["reason"]
        assert about.backend("cuda")["reason"] == "no GPU that torch can use"

    def test_the_text_names_the_dtypes(self) -> None:
        row = {
            "name": "cuda",
            "available": True,
            "details": "sm_75 and later",
            "dtypes": ["float16"],
        }
        report = {**about.describe(), "backends": [row]}
        assert about.as_text(report).endswith("cuda       sm_75 and later (float16 only)")

    def test_check_leaves_out_what_a_backend_refuses(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def half_only(name: str, problem: Problem) -> str | None:
            return "takes float16" if problem.dtype != torch.float16 else None

        monkeypatch.setattr(selfcheck, "SAMPLES", selfcheck.SAMPLES[:1])
        monkeypatch.setattr(selfcheck.dispatch, "refusal", half_only)
        assert [verdict.dtype for verdict in selfcheck.run([("reference", "cpu")])] == ["float16"]

    def test_the_emulated_kernels(self) -> None:
        if not EMULATOR.exists():
            pytest.skip("the emulator of the CUDA kernels is not built: make emulator")

        def reported(**variables: str) -> Any:
            done = subprocess.run(
                [sys.executable, "-m", "attnfast", "--json"],
                env=os.environ | {"ATTNFAST_EMULATOR": "1"} | variables,
                capture_output=True, text=True, check=True, cwd=ROOT,
            )  # fmt: skip
            rows = json.loads(done.stdout)["backends"]
            return next(row for row in rows if row["name"] == "cuda")

        assert reported()["dtypes"] == ["bfloat16", "float16"]
        assert reported(ATTNFAST_EMULATOR_ARCH="75")["dtypes"] == ["float16"]

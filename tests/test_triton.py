"""The Triton backend: a sample of its tests in a process of its own, and what it says of itself.

Triton has to know before it is imported that it is to interpret. `make test-triton` runs all.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import attnfast
from attnfast import __main__ as about
from attnfast import backends, dispatch
from attnfast.backends import gluon, gpus, triton
from attnfast.call import Options

ROOT = Path(__file__).resolve().parent.parent
PROBLEM = backends.Problem(
    "attention", torch.device("cuda", 0), torch.bfloat16, 2, 4, 4, 64, 64, 64, 64, Options(0.125)
)


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Python from the project's folder."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | variables,
        capture_output=True,
        text=True,
    )


def test_sample() -> None:
    sample = "tests/backends/test_triton_sample.py"
    options = ["-q", "-p", "no:cacheprovider", "-o", "timeout=300", "--backend", "triton"]
    done = run("-m", "pytest", *options, sample)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


REFUSALS = (
    ({"dtype": torch.float64}, "takes float32, bfloat16 and float16, got float64"),
    ({"D": 513}, "takes D and D_v up to 512, got 513"),
    ({"D_v": 1024}, "takes D and D_v up to 512, got 1024"),
    (
        {"device": torch.device("cpu")},
        "takes CPU tensors only in Triton's interpreter: set TRITON_INTERPRET=1",
    ),
)


@pytest.mark.parametrize(("changes", "reason"), REFUSALS, ids=lambda x: str(x)[:40])
def test_what_is_refused(changes: dict[str, object], reason: str) -> None:
    assert triton.ROW.unsupported(PROBLEM) is None
    assert triton.ROW.unsupported(PROBLEM._replace(**changes)) == reason


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        (None, "Triton is not installed: pip install 'triton>=3.6'"),
        ("3.5.1", "Triton 3.5.1 is too old: pip install 'triton>=3.6'"),
        ("3.6.0", None),
        ("4.0", None),
        ("unknown", None),
    ],
)
def test_what_is_missing(
    version: str | None, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton, "VERSION", version)
    assert triton.missing() == reason


def test_a_compiler_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "/nonexistent/cc")
    assert triton.no_compiler() == (
        "Triton finds no C compiler (/nonexistent/cc): install gcc, or name one in CC"
    )
    monkeypatch.setenv("CC", "env gcc")
    assert triton.no_compiler() is not None, "Triton takes CC as one word"
    monkeypatch.delenv("CC")
    assert triton.no_compiler() is None


@pytest.mark.parametrize("name", ["MISSING", "NO_COMPILER"])
def test_what_is_missing_is_refused_and_said(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By every call on a GPU, and by python -m attnfast without one."""
    monkeypatch.setattr(triton, name, "something is missing: install it")
    assert triton.ROW.unsupported(PROBLEM) == "something is missing: install it"
    about.main([])
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("triton")]
    assert len(said) == 1
    assert "something is missing: install it" in said[0]


def test_gluon_needs_a_gpu() -> None:
    on_cpu = PROBLEM._replace(device=torch.device("cpu"))
    assert gluon.unsupported(on_cpu) == ("runs on GPUs only: Triton cannot interpret Gluon")
    assert gluon.unsupported(PROBLEM) is None


@pytest.mark.parametrize("scale", [0.0, -0.1, 2.0**101])
def test_gluon_takes_a_scale_that_its_units_hold(scale: float) -> None:
    reason = gluon.unsupported(PROBLEM._replace(options=Options(scale)))
    assert reason is not None
    assert "a scale in (0, 2**100]" in reason


def test_an_old_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "capability", lambda index: (7, 5))
    assert triton.ROW.unsupported(PROBLEM) == (
        "needs a GPU of compute capability 8.0 or later, got 7.5"
    )


def test_on_a_gpu_it_comes_first_and_on_the_cpu_only_by_name() -> None:
    assert dispatch.select(PROBLEM).name == "triton"
    names = [row.name for row in dispatch.backends_of(torch.device("cuda"))]
    assert names[0] == "triton"
    assert names.index("gluon") > names.index("reference")
    names = [row.name for row in dispatch.backends_of(torch.device("cpu"))]
    assert names.index("triton") > names.index("reference")


IMPORTED_TOO_EARLY = """
import os, triton
os.environ["TRITON_INTERPRET"] = "1"
import torch, attnfast
x = torch.zeros(1, 1, 2, 8)
try:
    attnfast.attention(x, x, x, backend="triton")
except ValueError as error:
    print(error)
"""


def test_triton_imported_too_early() -> None:
    done = run("-c", IMPORTED_TOO_EARLY)
    assert "Triton was imported before TRITON_INTERPRET=1 was set" in done.stdout, done.stderr


def test_it_says_how_it_runs() -> None:
    """And importing the package imports no Triton, nor torch's compiler: it takes seconds."""
    code = """
import sys, attnfast, attnfast.__main__
assert not {"triton", "torch._dynamo"} & set(sys.modules)
attnfast.__main__.main([])
"""
    done = run("-c", code, TRITON_INTERPRET="1")
    assert f"Triton {triton.VERSION}, interpreted" in done.stdout, done.stderr
    q = torch.zeros(1, 1, 2, 8)
    assert "set TRITON_INTERPRET=1" in attnfast.explain(q, q, q, backend="triton")

"""``python -m attnfast``: what it reports, and that its check can fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

import attnfast
from attnfast import dispatch, selfcheck
from attnfast.__main__ import describe, main


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``python -m attnfast`` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "attnfast", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def without_times(verdict: selfcheck.Verdict) -> selfcheck.Verdict:
    return verdict._replace(forward_ms=0.0, backward_ms=0.0)


def test_json_holds_versions_and_every_backend() -> None:
    done = run("--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["attnfast"] == attnfast.__version__
    assert report["torch"] == torch.__version__
    assert [row["name"] for row in report["backends"]] == list(dispatch.NAMES)
    for row in report["backends"]:
        assert row["available"] == (row["reason"] is None) == bool(row["devices"])


def test_text_names_every_backend_and_the_library(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    text = capsys.readouterr().out
    assert f"attnfast {attnfast.__version__}, torch {torch.__version__}" in text
    for row in describe()["backends"]:
        line = next(line for line in text.splitlines() if line.startswith(row["name"] + " "))
        assert (row["details"] if row["available"] else f"not here: {row['reason']}") in line


def test_an_instruction_set_can_be_forced() -> None:
    report = json.loads(run("--json", ATTNFAST_CPU_ISA="portable").stdout)
    cpu = next(row for row in report["backends"] if row["name"] == "cpu")
    assert cpu["instruction_set"] == "portable"
    assert "portable" in cpu["instruction_sets"]


def test_a_missing_library_is_a_reason_and_not_a_failure() -> None:
    done = run("--json", ATTNFAST_NATIVE="/nonexistent/_native.so")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    cpu = next(row for row in report["backends"] if row["name"] == "cpu")
    assert report["native_library"] is None
    assert not cpu["available"]
    assert "native library not built: no /nonexistent/_native.so" in cpu["reason"]


def test_check_covers_every_available_backend_case_and_dtype(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--check", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    available = [row["name"] for row in report["backends"] if row["available"]]
    assert "cpu" in available
    assert len(report["check"]) == len(available) * len(selfcheck.SAMPLES) * len(selfcheck.DTYPES)
    with_everything = report["check"][-1]
    assert with_everything["ok"]
    assert set(with_everything["errors"]) == {
        *("out", "lse", "dq", "dk", "dv", "dbias", "dsinks"),
    }


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda out, lse: (out * 1.001, lse), id="0.1% off"),
        pytest.param(lambda out, lse: (out.where(out < out.max(), torch.nan), lse), id="a NaN"),
        pytest.param(lambda out, lse: (out, lse + 1e-4), id="lse off by 1e-4"),
    ],
)
def test_check_fails_where_a_backend_is_wrong(
    spoil: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = selfcheck.attention
    monkeypatch.setattr(selfcheck, "attention", lambda *a, **k: spoil(*right(*a, **k)))
    monkeypatch.setattr(selfcheck, "SAMPLES", selfcheck.SAMPLES[:1])
    monkeypatch.setattr(selfcheck, "DTYPES", (torch.float32,))
    assert main(["--check"]) == 1
    text = capsys.readouterr().out
    assert "FAILED" in text
    assert "0 of 2 within the accuracy rule" in text


def test_check_is_repeatable() -> None:
    first, second = (
        without_times(selfcheck.check("cpu", selfcheck.SAMPLES[-1], torch.float32, "cpu"))
        for _ in range(2)
    )
    assert first == second


def test_an_unknown_argument_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--nonsense"])
    assert "unrecognized arguments: --nonsense" in capsys.readouterr().err

"""A sample of the malformed calls, and whether the harness sees what it is there to see."""

from __future__ import annotations

from pathlib import Path

import malformed_calls
import pytest
import torch


def test_a_sample_of_malformed_calls() -> None:
    assert list(malformed_calls.findings(0, 1500, seed=0, timeout=600)) == []


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (KeyError("q"), "KeyError"),
        (ValueError("attention: q must be\nbetter"), "ValueError: attention"),
        (ValueError("q must be better"), "without a name"),
        (RuntimeError("aoti_torch_empty failed"), "RuntimeError: aoti_torch"),
        (ValueError("attention: q must be better"), None),
        (RuntimeError("the size of tensor a"), None),
    ],
    ids=str,
)
def test_which_errors_are_wrong(error: Exception, seen: str | None) -> None:
    def function() -> None:
        raise error

    said = malformed_calls.outcome(function, {}, "attention")
    assert said is None if seen is None else said is not None and seen in said


def test_modified_inputs_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    call = "torch.relu_", {"input": "f(9)"}, "relu_"
    monkeypatch.setattr(malformed_calls, "call_of", lambda seed, number: call)
    assert malformed_calls.problem(0, 0) == "an input was modified"
    call = "torch.relu", {"input": "f(9)"}, "relu"
    assert malformed_calls.problem(0, 0) is None


def test_a_process_that_dies_is_named_and_followed_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "dies.py"
    script.write_text(
        "import os, signal, sys\n"
        "first = int(sys.argv[sys.argv.index('--first') + 1])\n"
        "print('at', first, flush=True)\n"
        "if first == 2: os.kill(os.getpid(), signal.SIGSEGV)\n"
        "print('at', first + 1, flush=True)\n"
        "if first == 0: os.kill(os.getpid(), signal.SIGSEGV)\n"
    )
    monkeypatch.setattr(malformed_calls, "__file__", str(script))
    found = list(malformed_calls.findings(0, 5, seed=7, timeout=60))
    assert [line.split(":")[0] for line in found] == ["1 of seed 7", "2 of seed 7"]
    assert all("ended with -11" in line for line in found)


def test_calls_can_be_made_again() -> None:
    assert malformed_calls.call_of(3, 14) == malformed_calls.call_of(3, 14)
    texts = {malformed_calls.text_of(*malformed_calls.call_of(0, i)[:2]) for i in range(400)}
    assert len(texts) > 300
    assert torch.equal(malformed_calls.f(2), malformed_calls.f(2))

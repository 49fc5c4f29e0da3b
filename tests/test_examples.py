"""examples/: what each prints is true, at the smallest sizes, and what users copy stays short."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = sorted((Path(__file__).resolve().parents[1] / "examples").glob("*.py"))


def run(name: str, **sizes: int) -> dict[str, Any]:
    """What an example's main returns; it draws from generators of its own seed."""
    (path,) = (path for path in EXAMPLES if path.stem == name)
    with torch.random.fork_rng():
        return runpy.run_path(str(path))["main"](**sizes)


def falls(losses: list[float], share: float) -> bool:
    """Whether the last losses are less than this share of the first."""
    return sum(losses[-5:]) < share * sum(losses[:5])


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_says_how_to_run_it(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) < 120
    assert f"    python examples/{path.name}" in lines[:4]


def test_train_gpt(capsys: pytest.CaptureFixture[str]) -> None:
    found = run("train_gpt", steps=25)
    assert falls(found["losses"], 0.8)
    assert found["written"].startswith("The ")
    assert found["written"] in capsys.readouterr().out


def test_what_the_gpt_writes_over_its_cache_is_what_it_says_without() -> None:
    (path,) = (path for path in EXAMPLES if path.stem == "train_gpt")
    names = runpy.run_path(str(path))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = names["GPT"](30).eval()
    told = names["write"](model, torch.arange(5), 20, temperature=0)
    with torch.inference_mode():
        best = model(told[None, :-1])[0].argmax(-1)
    assert torch.equal(told[5:], best[4:])


def test_vit_replace(capsys: pytest.CaptureFixture[str]) -> None:
    found = run("vit_replace", steps=30)
    assert len(found["report"].replaced) == 2
    assert found["difference"] < 1e-5
    assert falls(found["losses"], 0.95)
    assert "when replaced" in capsys.readouterr().out


def test_t5_bias() -> None:
    found = run("t5_bias", steps=90)
    assert max(found["apart"].values()) < 1e-4
    assert falls(found["losses"], 0.3)
    assert found["bias"].argmax(1).tolist() == [3] * 4  # the distance that was asked for


def test_varlen_batch() -> None:
    found = run("varlen_batch", sequences=5, longest=40)
    assert found["difference"] < 1e-5
    assert found["apart"] < 1e-4


def test_serve_paged(capsys: pytest.CaptureFixture[str]) -> None:
    found = run("serve_paged", requests=6, longest=40)
    assert found["same"] == 6
    assert found["free"] == 16
    assert 0 < found["most"] <= 16
    assert found["steps"] < 6 * 20  # one after another
    assert (
        "the same answers as torch's attention without a cache: 6 of 6" in capsys.readouterr().out
    )


def test_long_context(capsys: pytest.CaptureFixture[str]) -> None:
    (path,) = (path for path in EXAMPLES if path.stem == "long_context")
    found = run("long_context", length=300, steps=12)
    assert falls(found["losses"], 0.95)
    assert "rank 0 of 1: 300 tokens, 12 steps" in capsys.readouterr().out
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(path)]
    told = subprocess.run(
        [*command, "--length", "300", "--steps", "3"], capture_output=True, text=True, check=True
    ).stdout
    losses = re.findall(r"rank \d of 2: .*loss ([\d.]+ to [\d.]+)", told)
    assert len(losses) == 2, told
    assert losses[0] == losses[1]
    assert "a layer's method: ring" in told
    assert "alone: losses differ by at most" in told


def test_watch_heads() -> None:
    found = run("watch_heads", steps=40)
    assert found["apart"] < 1e-4
    for losses in found["losses"]:
        assert falls(losses, 0.2)
    free, floored = (looks[-1] for looks in found["looks"])
    first = found["looks"][0][0]
    assert (free["breadth"] < first["breadth"] / 2).all()
    assert (free["focus"] > 2 * first["focus"]).all()
    assert (free["reach"] - 11).abs().max() < 1
    assert (floored["breadth"] > free["breadth"]).all()

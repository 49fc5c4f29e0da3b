"""The demo of a training that goes wrong: what it prints, and that steering is all it changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from translation_pairs import write_tsv

from demo import collapse

RUNS = ["plain", "BalanceLoss", "QKClip"]


def trained(folder: Path, *options: str) -> dict[str, Any]:
    tsv = write_tsv(folder / "pairs.tsv")
    given = [f"--pairs={tsv}", f"--out={folder}", "--steps=20", "--threads=1", *options]
    assert collapse.main(given) == 0
    return json.loads((folder / "collapse.json").read_text())


def test_steering_is_all_that_differs(tmp_path: Path) -> None:
    runs = trained(tmp_path, "--weight=0", "--limit=1e9", "--rate=0.01")["runs"]
    assert list(runs) == RUNS
    assert runs["plain"]["losses"] == runs["QKClip"]["losses"]
    for loss, same in zip(runs["plain"]["losses"], runs["BalanceLoss"]["losses"], strict=True):
        assert loss == pytest.approx(same, rel=1e-3)  # gradients are added up in another order
    assert [look["step"] for look in runs["plain"]["looks"]] == [0, 10]


def test_what_is_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = trained(tmp_path, "--floor=0.99", "--weight=30", "--limit=1.5", "--rate=0.05")
    runs = written["runs"]
    assert written["settings"]["rate"] == 0.05
    first, last = ({n: run["looks"][i] for n, run in runs.items()} for i in (0, -1))
    assert first["plain"] == first["QKClip"]
    assert runs["QKClip"]["heads_clipped"] > 0
    assert last["QKClip"]["max_logit"] < last["plain"]["max_logit"]
    assert last["BalanceLoss"]["mean_entropy"] > last["plain"]["mean_entropy"]
    printed = capsys.readouterr().out
    for told in (*RUNS, "loss, held out", "largest logit, last look", "heads clipped, all steps"):
        assert told in printed
    assert f"{runs['plain']['held_out']:.3f}" in printed


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("--steps=3", "--steps: must be at least 20, got 3"),
        ("--floor=2", "--floor: must be at least 0, at most 1, got 2"),
        ("--pairs=absent", "--pairs: cannot read absent: No such file or directory"),
    ],
)
def test_bad_input_is_one_line(
    option: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert collapse.main([option, f"--out={tmp_path}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("collapse: ")
    assert told in line

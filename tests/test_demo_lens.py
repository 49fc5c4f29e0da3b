"""The study of windows on heads, over a few short texts."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import demo_needs
import pytest


def test_the_study(tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    few = ("--count", 20, "--max-tokens", 40, "--out", tmp_path)
    done = subprocess.run(
        demo_needs.command("demo.lens", *few),
        env=demo_needs.environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    results = json.loads((tmp_path / "lens.json").read_text())
    same, wide, narrow = (results[name] for name in ("all keys", "keep 0.99", "keep 0.95"))
    assert same["largest change"] < 1e-12
    assert same["same nearest"] == same["of 5 nearest"] == 1
    assert 0 < wide["mean change"] < narrow["mean change"] < 0.1
    assert 0 == same["local heads"] < wide["local heads"] < narrow["local heads"] <= 72
    for name, values in results.items():
        if name.startswith("keep"):
            assert f"{values['largest change']:.3g}" in done.stdout

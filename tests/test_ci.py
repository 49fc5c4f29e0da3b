"""What .ci/run asks for."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("commits", ["0", "15", "16", "231", None], ids=str)
def test_what_is_asked_for(tmp_path: Path, commits: str | None) -> None:
    """With stand-ins for make and git, which knows no commits outside a clone."""
    for name, script in (
        ("make", 'echo "$@"'),
        ("git", "exit 128" if commits is None else f"echo {commits}"),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        [ROOT / ".ci" / "run"], env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    asked = [re.sub(r"^--no-print-directory ", "", line) for line in done.stdout.splitlines()]
    part = f"{int(commits or 0) % 16 + 1}/16"
    arch = ("75", "80", "90")[int(commits or 0) % 3]
    assert asked == [
        "lint docs",
        f"aot TRITON=3.9 ARGS=--sample {part}",
        f"aot TRITON=3.6 ARGS=--sample {part}",
        f"test-triton ARGS=--part {part}",
        "test-cuda",
        f"test-distributed ARGS=--part {part}",
        f"test-ptx PTX={arch} ARGS=--part {part}",
        "test",
    ]


def test_parts_are_all_tests_once(request: pytest.FixtureRequest) -> None:
    plugins = request.config.pluginmanager
    conftest = plugins.get_plugin(str(Path(__file__).with_name("conftest.py")))
    every = [SimpleNamespace(name=f"test[{i}]", path=Path("test.py")) for i in range(200)]
    parts = [list(every) for _ in range(16)]
    for n, part in enumerate(parts, 1):
        config = SimpleNamespace(getoption=lambda name, n=n: f"{n}/16", hook=Mock())
        conftest.pytest_collection_modifyitems(config, part)
    assert sorted(x.name for part in parts for x in part) == sorted(x.name for x in every)
    assert min(map(len, parts)) > 5

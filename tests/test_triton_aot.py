"""tools/aot.py: kernels compile without a GPU, and the committed table is held."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools import aot

ROOT = Path(__file__).resolve().parent.parent
GOOD = aot.Resources(
    "sm_90", "fwd", "bfloat16", 128, "plain", "128x128", 8, 2, 248, 0, 163840, "HGMMA"
)


def test_some_kernels_are_as_the_table_says(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tools.aot", "--workers", "1", "--bytes", "2"),
            *("--pass", "decode", "weights", "gluon", "--head-dim", "64", "--variant", "plain"),
            *("--arch", "sm_90"),
        ],
        cwd=ROOT,
        env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 kernels compiled, 0 faults" in done.stdout


def test_every_entry_of_every_table_is_compiled() -> None:
    found = set(aot.entries())
    assert len(found) == len(list(aot.entries()))
    for family, passes in aot.configs.TABLE.items():
        assert set(passes) == set(aot.configs.PASSES), family
        for name, sizes in passes.items():
            assert set(sizes) == {2, 4}
            for size, entries in sizes.items():
                assert len(entries) == len(aot.configs.HEAD_DIMS)
                for arch in aot.ARCHITECTURES:
                    for D in aot.configs.HEAD_DIMS:
                        assert aot.Entry(arch, name, size, D, "plain") in found


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({}, None),
        ({"registers": 249}, "registers 249, the table says 248"),
        ({"shared": 163841}, "shared 163841, the table says 163840"),
        ({"spills": 8}, "8 bytes spilled"),
        ({"matrix": ""}, "no matrix instructions"),
        ({"shared": 232449}, "232449 bytes of shared memory, the limit is 232448"),
        ({"registers": 200}, None),
    ],
    ids=str,
)
def test_faults(changes: dict[str, object], fault: str | None) -> None:
    found = aot.faults(GOOD._replace(**changes), {aot.key(GOOD): GOOD})
    assert bool(found) == (fault is not None)
    if fault is not None:
        assert found[0] == f"sm_90 fwd bfloat16 128 plain 128x128: {fault}"


def test_a_kernel_that_does_not_compile_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(entry: aot.Entry) -> aot.Resources:
        raise RuntimeError(f"{entry}: no")

    monkeypatch.setattr(aot, "compiled", broken)
    entry = next(aot.entries())
    assert aot.attempt(entry) == f"{entry}: no"

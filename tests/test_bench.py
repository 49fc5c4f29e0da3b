"""The benchmarks work: every suite from end to end with one round, the grid, bad input."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import ceilings, environment, grid

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments, timeout=240, **variables):
    """`python -m` with these arguments, in the repository, as a user runs it."""
    command = [sys.executable, "-m", *map(str, arguments)]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    for name in ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER"):  # a worker's children time nothing
        environ.pop(name, None)
    return subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=timeout
    )


def test_every_suite_runs_from_end_to_end(tmp_path):
    path, own = tmp_path / "made" / "pytest.json", tmp_path / "results.json"
    arguments = ["pytest", "bench", "-q", "--benchmark-quiet", f"--benchmark-json={path}"]
    done = run(*arguments, f"--results={own}", BENCH_SIZE="smoke", BENCH_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    content, rows = json.loads(path.read_text()), json.loads(own.read_text())["rows"]
    cases = [case for suite in grid.SUITES for case in grid.SUITES[suite]("smoke")]
    assert [row["case"] for row in rows] == [
        json.loads(json.dumps(grid.describe(case)["case"])) for case in cases
    ]
    for case, row, benchmark in zip(cases, rows, content["benchmarks"], strict=True):
        assert benchmark["group"] == row["suite"]
        assert benchmark["extra_info"]["id"] == row["id"]
        ours, rival = row["contestants"]["attnfast"], row["contestants"][row["rival"]]
        assert row["flop"] == pytest.approx(case.flop, rel=1e-5)
        assert row["bytes"] == pytest.approx(case.bytes, rel=1e-5)
        assert ours["gflops"] == pytest.approx(case.flop / ours["median_s"] / 1e9, rel=1e-4)
        assert ours["share"] == pytest.approx(row["limit_s"] / ours["median_s"], rel=1e-4)
        assert row["ratio"] == pytest.approx(rival["median_s"] / ours["median_s"], rel=1e-4)
        assert ours["rounds"] == rival["rounds"] == 1
        assert (row["backend"], row["kernel"]) == ("cpu", torch.ops.attnfast.cpu_isa())
        assert f"{case}: " in done.stdout
        if row["suite"] in ("forward", "backward", "forward+backward"):
            names = {"out"} if "forward" in row["suite"] else set()
            names |= {"dq", "dk", "dv"} if "backward" in row["suite"] else set()
            assert names == set(row["differences"][row["rival"]])
    competed = {name for row in rows for name in row["contestants"]}
    assert {
        "torch.sdpa flash",
        "torch.sdpa math",
        "FlexAttention",
        "ONNX Runtime",
        "eager",
        "nn.MultiheadAttention",
        "linear + torch.sdpa",
        "nn.TransformerEncoder",
        "torch.sdpa per sequence",
        "torch.sdpa padded",
    } <= competed
    assert rows[0]["absent"]["torch.sdpa cudnn"] == "needs a GPU"
    if importlib.util.find_spec("flash_attn") is None:
        assert "not installed" in rows[0]["absent"]["flash_attn"]
    facts = content["attnfast"]
    assert facts["schema"] == 2
    assert facts["settings"]["size"] == "smoke"
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["ceilings"]["gemm"].keys() == {"float32", "bfloat16"}
    assert facts["ceilings"]["fma"]["float32"] > 0
    assert set(content["machine_info"]) == {"cpu", "architecture", "cores", "system"}
    assert set(content["commit_info"]) == {"id", "dirty"}


def test_the_compiler_of_the_peak_may_be_several_words(monkeypatch):
    monkeypatch.setenv("CXX", "env g++")
    rates, reason = ceilings._fma(1, 1000)
    assert reason is None
    assert rates["float32"] > 0
    monkeypatch.setenv("CXX", "/nonexistent/g++ -x")
    assert ceilings._fma(1, 1000) == ({}, "no C++ compiler")


def test_what_there_is_no_time_for_is_left_out(tmp_path):
    own = tmp_path / "results.json"
    arguments = ["pytest", "bench", "-q", "--benchmark-quiet", f"--results={own}", "-k", "decode"]
    done = run(*arguments, BENCH_SIZE="smoke", BENCH_THREADS="1", BENCH_MINUTES="1e-6")
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(own.read_text())
    cases = grid.SUITES["decode"]("smoke")
    assert [row["id"] for row in content["rows"]] == [str(cases[0])]
    assert [x["id"] for x in content["not_timed"]] == [str(case) for case in cases[1:]]
    assert f"{cases[1]}: left out: {content['not_timed'][0]['reason']}" in done.stdout
    assert f"Left out, for want of time: {len(cases) - 1} rows (" in done.stdout


def test_grid_covers_the_shapes_that_matter():
    full = [case for suite in ("forward", "backward", "forward+backward")
            for case in grid.SUITES[suite]("full")]  # fmt: skip
    assert {16, 32, 64, 96, 128, 192, 256} <= {case.D for case in full}
    assert {64, 197, 577, 1024, 8192, 131072} <= {case.T for case in full}
    assert any(case.T % 8 and case.S % 8 and case.D % 16 for case in full)
    for suite in grid.SUITES:
        quick, whole = (set(grid.SUITES[suite](size)) for size in ("quick", "full"))
        assert quick
        assert len(quick) <= len(whole)
        assert len({str(case) for case in whole}) == len(whole), "ids are unique within a suite"


def test_work_of_a_row():
    case = grid.AttentionCase(2, 3, 10, 10, 8, "float32", False, "forward")
    assert case.flop == 4 * 2 * 3 * 10 * 10 * 8
    assert case._replace(causal=True).flop == case.flop / 2
    assert case._replace(work="forward+backward").flop == case.flop * 3.5
    assert case.bytes == 2 * 3 * (10 + 10 + 10 + 10) * 8 * 4
    long = case._replace(T=1000, S=1000, causal=True, option="window")
    attended = sum(min(t, grid.WINDOW) + 1 for t in range(1000))
    assert long.flop == 4 * 2 * 3 * attended * 8


def refused(*arguments, **variables):
    done = run(*arguments, **variables)
    assert done.returncode in (2, 4), done.stdout + done.stderr
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line]
    assert len(lines) == 1, lines
    return lines[0]


def test_missing_library_is_one_line(tmp_path):
    missing = str(tmp_path / "none.so")
    line = refused(
        "pytest", "bench", BENCH_BACKEND="cpu", BENCH_SIZE="smoke", ATTNFAST_NATIVE=missing
    )
    assert "bench: nothing to measure: attention: backend 'cpu'" in line
    assert "native library not built" in line


@pytest.mark.parametrize(
    ("name", "value", "requirement"),
    [
        ("BENCH_SIZE", "big", "one of smoke, quick, full, gpu"),
        ("BENCH_DEVICE", "tpu", "cpu or cuda"),
        ("BENCH_THREADS", "0", "a positive int"),
        ("BENCH_BUDGET", "nan", "a positive float"),
    ],
)
def test_bad_settings(name, value, requirement):
    with pytest.raises(ValueError, match=f"bench: {name} must be {requirement}, got '{value}'"):
        environment.settings({name: value})


def test_without_pandas_a_line_says_what_is_missing():
    program = "import sys; sys.modules['pandas'] = None; import runpy; runpy.run_module('bench')"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "bench: pandas is missing: pip install -r requirements/bench.txt\n"

"""The bars of the CPU: which rows they have, and when they are met."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_bench import run

from bench import OURS, environment, limits, results
from bench.grid import CallersCase, StatisticsCase, WatchedCase, describe
from bench.race import disagreement
from bench.rivals.attention import PLAIN
from bench.rivals.layers import UNOBSERVED
from bench.suites import ENTRIES

KERNELS = ("amx", "avx512_bf16", "avx2")


@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_have_names_of_their_own(kernel: str) -> None:
    cases = limits.cases(kernel)
    assert len({str(case) for case in cases}) == len(cases)
    large = [c for c in cases if type(c) is limits.AttentionCase and c.flop > 1e11]
    assert any(c.dtype == "bfloat16" for c in large) == (kernel == "amx")


def row(case: limits.Case, seconds: float, ratio: float) -> dict:
    """A row whose limit is a second."""
    ours = {"median_s": seconds, "q1_s": 0.9 * seconds, "q3_s": 1.1 * seconds}
    spread = [0.9 * ratio, 1.1 * ratio]
    return {
        **describe(case),
        "limit_s": 1.0,
        "contestants": {OURS: ours},
        "ratio": ratio,
        "ratio_quartiles": spread,
    }


def test_verdicts() -> None:
    """The least row decides, or the mean of all; what was not timed is not judged."""
    bars = {f"{bar.name}, {bar.of}": bar for bar in limits.bars("avx2")}
    full = bars["fp32 forward, full, T >= 1024: of the FMA peak, least"]
    short = bars["T = 50 to 197: times the fastest rival, mean"]
    rows = [row(case, 1 / 0.9, 3.0) for case in full.cases[:-1]]
    rows.append(row(full.cases[-1], 1 / 0.79, 3.0))
    rows += [row(case, 9.0, 4.0 if i % 2 else 0.9) for i, case in enumerate(short.cases)]
    found = limits.verdicts("avx2", rows).set_index("bar")
    assert found.loc["fp32 forward, full, T >= 1024: of the FMA peak, least", "met"] == "no"
    line = found.loc["fp32 forward, full, T >= 1024: of the FMA peak, least"]
    assert line["measured"] == "0.79"
    assert line["spread"] == "0.72 to 0.88"
    assert line["least row"] == str(full.cases[-1])
    assert found.loc["T = 50 to 197: times the fastest rival, mean", "met"] == "yes"
    assert found.loc["T = 50 to 197: times the fastest rival, mean", "measured"] == "1.90"
    assert found.loc["T = 50 to 197: times the fastest rival, least", "met"] == "no"
    assert len(found) == 3
    assert limits.page("avx2", []) == ""


def test_the_page(tmp_path: Path) -> None:
    """The suite alone is a kind of its own, which `report` puts into docs/cpu.md."""
    out = tmp_path / "bench" / "results" / "here" / "limits.json"
    bar = next(bar for bar in limits.bars("avx2") if bar.measure == "share")
    facts = environment.facts("limits", environment.settings({}, size="quick"))
    facts |= {"kernel": "avx2", "torch_isa": "AVX2", "load": None}
    results.save(out, facts, [row(case, 1 / 0.5, 2.0) | {"clock": "wall"} for case in bar.cases])
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "cpu.md").write_text(
        "Of the limit\n<!-- bench:begin -->\n<!-- bench:end -->\n"
    )
    [page] = limits.write(results.load(out, "limits"), tmp_path)
    assert f"| {bar.name}, least" in page.read_text()
    assert "| 0.50 " in page.read_text()


@pytest.mark.parametrize("work", limits.WORKS)
def test_statistics_race_against_ours_without(work: str) -> None:
    case = StatisticsCase(1, 2, 40, 40, 16, "float32", True, work)
    found = ENTRIES[type(case)](case, "cpu", torch.device("cpu"), 1, full=False)
    assert list(found.calls) == [OURS, PLAIN]
    ours, plain = (found.calls[name][0]() for name in found.calls)
    assert ours.keys() == plain.keys() >= {"out"}
    disagreement(ours, plain, PLAIN, case.dtype)
    assert str(case).endswith("-statistics")


@pytest.mark.parametrize("layer", ["statistics", "shares"])
def test_an_observed_step_races_against_the_step(layer: str) -> None:
    case = WatchedCase(layer, 2, 12, 16, 2, "float32", "step", True)
    found = ENTRIES[type(case)](case, "cpu", torch.device("cpu"), 1, full=False)
    assert list(found.calls) == [OURS, UNOBSERVED]
    ours, plain = (found.calls[name][0]() for name in found.calls)
    torch.testing.assert_close(ours, plain)
    assert str(case).startswith(f"observed-{layer}-")


@pytest.mark.parametrize("work", limits.WORKS)
def test_callers_at_once_have_results_of_their_own(work: str) -> None:
    case = CallersCase(1, 2, 30, 30, 16, "float32", True, work)
    found = ENTRIES[type(case)](case, "cpu", torch.device("cpu"), 1, full=False)
    assert list(found.calls) == [OURS, "torch.sdpa"]
    ours, torchs = (found.calls[name][0]() for name in found.calls)
    torch.testing.assert_close(ours, torchs)
    assert ours["out"].shape == (8, 1, 2, 30, 16)
    assert len({x.sum().item() for x in ours["out"]}) == 8
    assert str(case).startswith("8-callers-")


def test_bars_are_the_cpus() -> None:
    done = run("bench", "run", "--suite", "limits", "--backend", "triton")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1

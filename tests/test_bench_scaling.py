"""The scaling study: the model's formulas, its fit, and the page."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytest.importorskip("matplotlib")


def shape(bench, **changes):
    plain = bench.model.Shape(2, 4, 256, 64, "float32", False, "forward", 2)
    return plain._replace(**changes)


def test_work_of_a_shape(bench):
    model = bench.model
    tiles = model.Tiles(64, 64)
    full = model.work(shape(bench), tiles)
    assert full == model.Work(4 * 8 * 256**2 * 64, 8 * 256**2, 4 * 8 * 256 * 64 * 4, 2)
    causal = model.work(shape(bench, causal=True), tiles)
    assert causal.pairs == 8 * 64 * (64 + 128 + 192 + 256), "whole tiles on the diagonal"
    both = model.work(shape(bench, work="forward+backward"), tiles)
    assert both.flop == 3.5 * full.flop
    assert both.bytes == 3 * full.bytes
    alone = model.work(shape(bench, B=1, H=1, work="forward+backward"), tiles)
    assert alone.flop == 9 / 2 * full.flop / 8, "one head for two threads: seven products"
    assert model.touched(100, True, tiles) == 64 * 64 + 36 * 100


def test_workers_are_threads_that_have_work(bench):
    tiles = bench.model.Tiles(64, 64)
    blocks = {
        T: bench.model.work(shape(bench, B=1, H=1, T=T), tiles).workers for T in (64, 128, 192)
    }
    assert blocks == {64: 1, 128: 2, 192: 1.5}


def test_fit_finds_the_numbers_that_made_the_times(bench):
    model = bench.model
    true = model.Machine(20e-6, 80e9, 0.4e-9, 15e9)
    sizes = [
        (T, D, threads) for T in (64, 200, 512, 2000) for D in (16, 64, 256) for threads in (1, 2)
    ]
    todo = [model.work(shape(bench, T=T, D=D, threads=n), model.Tiles(64, 64)) for T, D, n in sizes]
    times = [model.seconds(work, true) for work in todo]
    assert model.fit(todo, times) == pytest.approx(true, rel=1e-6)
    assert model.error(times, times) == 0
    assert model.error([2.0, 0.5], [1.0, 1.0]) == pytest.approx(1.0)
    free = true._replace(launch=0.0, bandwidth=math.inf)
    found = model.fit(todo, [model.seconds(work, free) for work in todo])
    assert found.launch == pytest.approx(0.0, abs=1e-12)
    assert found.rate == pytest.approx(80e9, rel=1e-6)


def test_no_kernel_is_faster_than_overlap(bench):
    model = bench.model
    for machine in model.DATA_SHEETS.values():
        todo = model.work(shape(bench, dtype="bfloat16"), model.GPU_TILES)._replace(workers=1)
        assert todo.flop / machine.rate < model.overlapped(todo, machine)
        assert model.overlapped(todo, machine) < model.seconds(todo, machine)


def test_study_and_page(bench, monkeypatch, tmp_path, capsys):
    """Every kind of point once, tiny; then the page of times that the model itself made."""
    scaling, model = bench.scaling, bench.model
    small = [x._replace(sizes=x.sizes[:1]) for x in scaling.SERIES]
    with monkeypatch.context() as patch:
        patch.setattr(scaling, "SERIES", small)
        patch.setattr(scaling, "BUDGET_S", 1e-3)
        settings = bench.environment.settings({}, size="quick", threads=2)
        measured = scaling.measure(settings)
    assert len(measured) == len(small) * 2 * 2
    for row in measured:
        if row["threads"] == 1 or row["seconds"] is not None:  # None: the machine was too busy
            assert 0 < row["seconds"] <= row["median_s"]
    assert {row["threads"] for row in measured} == {1, 2}

    true = model.Machine(20e-6, 80e9, 0.4e-9, 15e9)
    rows = []
    for series in scaling.SERIES:
        for dtype in scaling.DTYPES:
            for work in scaling.WORKS:
                for B, H, T, D, causal in series.sizes:
                    threads = 2 if series.parallel else 1
                    one = model.Shape(B, H, T, D, dtype, causal, work, threads)
                    todo = model.work(one, model.CPU_TILES[dtype])
                    seconds = 1.1 * model.seconds(todo, true)
                    peak = {"seconds": seconds, "median_s": seconds, "peak_bytes": 5000}
                    place = {"series": series.title, "clock": "cpu time"}
                    rows.append({**place, **one._asdict(), **peak})
    rows[-1] |= {"seconds": None, "median_s": None}
    facts = bench.environment.facts("scaling", settings)
    path = tmp_path / "scaling.json"
    bench.results.save(path, facts, rows)
    (tmp_path / "docs").mkdir()
    assert bench.cli.main(["scaling", "--from", str(path), "--root", str(tmp_path)]) == 0
    page = (tmp_path / "docs" / "scaling.md").read_text()
    picture = tmp_path / "docs" / "performance" / f"{facts['device']}-2t-scaling.svg"
    drawn = picture.read_bytes()
    assert bench.cli.main(["scaling", "--from", str(path), "--root", str(tmp_path)]) == 0
    assert picture.read_bytes() == drawn, "drawn twice, the same"
    assert "off by 0% at the geometric mean" in page
    assert re.search(r"\| forward, fp32 +\| +22 \| +72.7 \|", page)
    assert re.search(r"\| 1024 \|( +[\d.]+ / [\d.]+ \|){3} +- \|", page), "not measured: a dash"
    assert "H100 SXM, forward+backward, D 128, T 8192, causal" in page
    assert "batch times heads" in picture.read_text()
    assert f"performance/{picture.name}" in page


def test_other_results_are_refused(bench, tmp_path, capsys):
    path = tmp_path / "x.json"
    path.write_text('{"schema": 2, "kind": "timing", "rows": [1]}')
    assert bench.cli.main(["scaling", "--from", str(path)]) == 2
    assert "holds timing results, scaling are needed" in capsys.readouterr().err

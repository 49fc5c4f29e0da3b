"""The command line of the benchmarks: report, comparison of runs, one shape, and bad input."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest

from bench import ceilings, cli, environment, grid, race, report, results, scaling, tables

ROOT = Path(__file__).resolve().parent.parent
MARKED = "# Title\n\n<!-- bench:begin -->\nold\n<!-- bench:end -->\n\nThe rest.\n"
PAGES = ("README.md", *(f"docs/{x}.md" for x in ("performance", "evidence", "scaling", "cpu")))


def measured(ours_s, rival_s, once=(), spread=0.01):
    """The measured part of a row with these medians."""

    def contestant(seconds):
        times = {"median_s": seconds, "min_s": seconds, "host_s": seconds}
        times |= {"q1_s": seconds * (1 - spread), "q3_s": seconds * (1 + spread)}
        rounds = 1 if once else 7
        return {
            "rounds": rounds,
            "gflops": 1e-9 / seconds,
            "peak_bytes": 2000,
            "share": 0.3,
            **times,
        }

    return {
        "clock": "wall",
        "limit_s": 0.3 * ours_s,
        "contestants": {"attnfast": contestant(ours_s), "torch.sdpa flash": contestant(rival_s)},
        "rival": "torch.sdpa flash",
        "ratio": rival_s / ours_s,
        "ratio_quartiles": [rival_s / ours_s] * 2,
        "once": list(once),
        "absent": {"flash_attn": "not installed"},
        "differences": {},
        "backend": "cpu",
        "kernel": "avx2",
    }


@pytest.fixture
def write_run(tmp_path):
    """Writes a file of results: every row of the quick suites, its ratio given by `ratio(row)`."""

    def write(
        ratio=lambda row: 3.0, name="bench/results/a-cpu/timing.json", ours_s=1e-3, **changes
    ):
        cases = [case for make in grid.SUITES.values() for case in make("quick")]
        described = [grid.describe(case) for case in cases]
        rows = [{**row, **measured(ours_s, ratio(row) * ours_s)} for row in described]
        facts = {
            "kind": "timing",
            "date": "2026-01-02T03:04:05+00:00",
            "device": "a-cpu",
            "machine": {"cpu": "A CPU", "architecture": "x86", "cores": 2, "system": "Linux"},
            "load": 0.25,
            "settings": {"size": "quick", "backend": "cpu", "device": "cpu", "threads": 2},
            "versions": {"attnfast": "1.2.3", "torch": "2.13.0", "python": "3.11"},
            "kernel": "avx2",
            "torch_isa": "AVX2",
            "sources": "0123456789abcdef",
            "commit": {"id": "f" * 40, "dirty": True},
            "ceilings": {
                "gemm": {"float32": 1e11},
                "fma": {},
                "copy": [[1000, 1e10]],
                "launch": 1e-6,
                "missing": {"fma": "no C++ compiler"},
            },
            **changes,
        }
        path = tmp_path / name
        results.save(path, facts, rows)
        return path

    return write


@pytest.fixture
def command(capsys):
    """Runs `python -m bench` in this process: exit code, standard output, standard error."""

    def run(*arguments):
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as stopped:
            code = stopped.code
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


@pytest.fixture
def pages(tmp_path):
    """The folder of a repository whose pages have their markers."""
    (tmp_path / "docs").mkdir()
    for name in PAGES:
        (tmp_path / name).write_text(MARKED)
    return tmp_path


def refused(command, *arguments):
    """The one line that a command with wrong arguments or files ends with."""
    code, out, err = command(*arguments)
    lines = (out + err).splitlines()
    assert (code, len(lines)) == (2, 1), (code, out, err)
    return lines[0]


def test_report_fills_the_pages(write_run, command, pages, monkeypatch):
    def ratio(row):
        case = row["case"]
        if row["suite"] == "module":
            return 0.5 if case["layer"] == "small" and case["weights"] else 1.5
        return 8.0 if case.get("causal") else 2.0

    write_run(ratio, not_timed=[{"suite": "varlen", "id": "x", "reason": "too long"}])
    texts = []
    draw, names = report.plots.draw, []
    monkeypatch.setattr(report.plots, "draw", lambda *x: names or names.extend(draw(*x)) or names)
    for _ in range(2):
        code, out, err = command("report", "--root", pages)
        assert code == 0, err
        assert "docs/performance.md, " in out
        assert out.splitlines()[-1] == "Left out, for want of time: 1 rows (1 of varlen)."
        texts.append([(pages / name).read_text() for name in PAGES])
    assert texts[0] == texts[1], "written twice, the same"
    readme, page, proven, *untouched = texts[0]
    assert untouched == [MARKED, MARKED], "there is no study"
    for text in (readme, page, proven):
        assert text.startswith("# Title\n\n<!-- bench:begin -->\n")
        assert text.endswith("<!-- bench:end -->\n\nThe rest.\n")
        assert "old" not in text
    assert re.search(r"\| 1, 16, 4096, 128 +(\| +2.0 / 8.0 ){4}\|", readme)
    assert re.search(r"\| 8, 12, 512, 64 +(\| +2.0 / 8.0 ){4}\|", readme)
    assert "on A CPU, avx2, 2 threads (2026-01-02, commit ffffffffffff):" in readme
    causal = [case.causal for case in grid.SUITES["forward"]("quick")]
    mean = 2 * 4 ** (sum(causal) / len(causal))
    line = rf"attention, forward, fp32 +\| +\d+ \| +\*\*{mean:.2f}x\*\* \| +2.00x"
    assert re.search(line, page)
    assert re.search(r"Slower than the fastest rival in 4 of \d+ rows:", page)
    assert "- module, fp32, train, small 4, 32, 128, 4, weights, padding: 0.50x" in page
    assert re.search(r"MultiheadAttention, fp32, train +\| +1.34x \(2 of 20\)", page)
    assert "ffffffffffff with uncommitted changes" in page
    assert "load before the run 0.25" in page
    assert "Rivals that took part: torch.sdpa flash. The kernels have changed since." in page
    assert "not measured: no C++ compiler" in page
    line = (
        r"\| bf16, forward \+ backward +\| +12 \|"
        r" +\*\*4.00x\*\* \| +2.00x \(1, 8, 128, 64\) \| 8.00x"
    )
    assert re.search(line, page), "the core shapes"
    assert "### Left out\n\n1 rows did not fit into the time:\n\n- varlen `x`: too long" in page
    assert re.search(r"\| cpu decode +\| - +\| - +\| [^|]* +\| avx2: 20 rows \(stale\) +\|", proven)
    assert re.search(r"\| a-cpu/timing.json +\| avx2 +\| fffffffff\+ +\| 2026-01-02 \|", proven)
    folder = pages / "docs" / "performance"
    for plot in ("throughput", "share", "memory"):
        assert (folder / f"a-cpu-2t-{plot}.png").stat().st_size > 10_000
        assert f"(performance/a-cpu-2t-{plot}.svg)" in page
        assert "torch.sdpa flash, D 64" in (folder / f"a-cpu-2t-{plot}.svg").read_text()
    drawn = (folder / "a-cpu-2t-throughput.svg").read_text()
    assert "GFLOP/s" in drawn
    assert "ours 8.0 times as fast as the best rival" in drawn, "what the points say"
    assert "ours at 30% of what" in (folder / "a-cpu-2t-share.svg").read_text()
    assert not (folder / "a-cpu-2t-latency.svg").exists(), "no row is short"


def test_report_shows_each_device_newest_run_first(write_run, command, pages, monkeypatch):
    monkeypatch.setattr(report.plots, "draw", lambda run, folder: [])
    write_run(lambda row: 2.0)
    write_run(lambda row: 9.0, "bench/results/a-cpu/old.json", date="2025-01-01T00:00:00+00:00")
    other = {"cpu": "B CPU", "architecture": "x86", "cores": 2, "system": "Linux"}
    later = "2026-05-01T00:00:00+00:00"
    write_run(lambda row: 4.0, "bench/results/b/timing.json", date=later, device="b", machine=other)
    assert command("report", "--root", pages)[0] == 0
    assert "on B CPU, avx2, 2 threads (2026-05-01" in (pages / "README.md").read_text()
    page = (pages / "docs" / "performance.md").read_text()
    assert re.search(r"decoding, fp32 +\| +4.00x \(0 of 10\) \| +2.00x \(0 of 10\) \|", page)
    assert page.index("## B CPU, avx2, 2 threads") < page.index("## A CPU, avx2, 2 threads")


def test_a_gpus_throughput_is_in_teraflops(write_run, tmp_path):
    machine = {"gpu": {"name": "A GPU"}, "cpu": "A CPU"}
    run = results.load(write_run(machine=machine))
    run.rows[:] = [row for row in run.rows if row["suite"] == "forward"]
    report.plots.draw(run, tmp_path)
    assert "TFLOP/s" in (tmp_path / "a-cpu-2t-throughput.svg").read_text()


def test_report_marks_rows_that_ran_once():
    row = grid.describe(grid.SUITES["forward"]("quick")[0])
    once = {**row, **measured(1.0, 30.0, once=["torch.sdpa flash"])}
    text = tables.details([once])
    assert "  30000* |" in text
    assert "±" not in text


def test_report_refuses(write_run, command, pages):
    assert "no timing in" in refused(command, "report", "--root", pages)
    settings = {"size": "smoke", "backend": "cpu", "device": "cpu", "threads": 2}
    path = write_run(settings=settings)
    assert "has smoke rows" in refused(command, "report", "--root", pages, path)
    assert (pages / "README.md").read_text() == MARKED
    write_run()
    (pages / "README.md").unlink()
    assert "has no line <!-- bench:begin -->" in refused(command, "report", "--root", pages)


def test_files_that_cannot_be_read(write_run, command, tmp_path):
    good, bad = write_run(), tmp_path / "bad.json"
    assert "cannot read" in refused(command, "compare", good, bad)
    for text, message in (
        ("{", "cannot read"),
        ("[]", "not a result of this project's benchmarks"),
        ('{"benchmarks": []}', "not a result of this project's benchmarks"),
        ('{"attnfast": {"schema": 1}, "benchmarks": []}', "has schema 1, this code reads 2"),
        ('{"schema": 99}', "has schema 99, this code reads 2"),
        ('{"schema": 2, "kind": "evidence", "rows": [1]}', "evidence results, timing are needed"),
        ('{"schema": 2, "kind": "timing", "rows": []}', "holds no finished row"),
        ('{"schema": 2, "kind": "timing", "rows": [{}]}', "is not complete: no 'date'"),
        ("\x00\xff", "cannot read"),
    ):
        bad.write_text(text)
        assert message in refused(command, "compare", good, bad)
        assert message in refused(command, "compare", bad, good)
        assert message in refused(command, "report", bad)
    whole = json.loads(good.read_text())
    for rows, message in (
        ([1], "no 'id' in row 0"),
        ({"a": 1}, "no 'id' in row 0"),
        (
            [whole["rows"][0], {"id": "x", "suite": "decode", "case": {}}],
            "no 'contestants' in row 1",
        ),
    ):
        bad.write_text(json.dumps({**whole, "rows": rows}))
        assert message in refused(command, "compare", good, bad)
    assert "cannot read" in refused(command, "report", tmp_path)


def test_bad_evidence_is_refused(write_run, command, tmp_path):
    assert "no evidence in" in refused(command, "evidence", "--results", tmp_path / "none")
    folder = tmp_path / "results" / "a-cpu"
    folder.mkdir(parents=True)
    (folder / "evidence-cpu.json").write_text('{"schema": 1}')
    assert "has schema 1" in refused(command, "evidence", "--results", folder.parent)


def test_two_runs_of_the_same_speed_are_no_regression(write_run, command):
    before, after = write_run(), write_run(name="after.json", ours_s=1.08e-3)
    code, out, _ = command("compare", before, after)
    assert code == 0
    assert "forward: 1.080 of the time before" in out
    assert "0 of " in out


def test_a_slower_kernel_is_a_regression(write_run, command):
    before = write_run(lambda row: 3.0)
    after = write_run(lambda row: 2.0, name="after.json", ours_s=1.5e-3)  # rivals as before
    code, out, _ = command("compare", before, after)
    assert code == 1
    assert "slower" in out
    assert command("compare", before, after, "--threshold", "0.6")[0] == 0
    assert command("compare", after, before)[0] == 0


def test_a_slower_machine_is_no_regression(write_run, command):
    before = write_run(lambda row: 3.0)
    after = write_run(lambda row: 3.0, name="after.json", ours_s=1.5e-3)  # rivals slower as well
    code, out, _ = command("compare", before, after)
    assert code == 0
    assert "1.500 of the time before" in out


def test_one_shape(command, tmp_path, monkeypatch):
    monkeypatch.setattr(ceilings, "measure", lambda *given, **how: None)  # which takes seconds
    out = tmp_path / "row.json"
    code, printed, err = command(
        "run", "--shape", "1,2,20,16", "--dtype", "fp16", "--option", "sinks", "--work", "forward",
        "--threads", "1", "--budget", "0.01", "--out", out,
    )  # fmt: skip
    assert code == 0, err
    assert "1, 2, 20, 16, sinks, float16, forward" in printed
    assert re.search(r"\| attnfast +\| +[\d.]+ ±\d+% \|", printed)
    assert "torch.sdpa flash: has no sinks" in printed
    run = results.load(out, "timing")
    assert run.rows[0]["contestants"].keys() == {"attnfast", "eager"}
    assert command("compare", out, out)[0] == 0
    more = ("run", "--shape", "1,2,9,16", "--work", "backward", "--budget", "0.01", "--resume")
    assert command(*more, "--option", "sinks", "--out", out)[0] == 0
    assert [row["case"]["T"] for row in results.load(out).rows] == [20, 9]
    before = out.read_bytes()
    assert command(*more, "--option", "sinks", "--out", out)[0] == 0
    assert out.read_bytes() == before, "nothing was left to time"
    assert "--resume needs --out" in refused(command, *more)


def test_a_run_of_another_device_is_not_resumed(write_run, command):
    path = write_run()
    message = refused(command, "run", "--shape", "1,1,8,8", "--out", path, "--resume")
    assert "is of another device: nothing to resume" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "--shape", "1,2,3"), "must be B,H,L,D or B,H,T,S,D, got '1,2,3'"),
        (("run", "--shape", "1,2,0,4"), "must be B,H,L,D or B,H,T,S,D, got '1,2,0,4'"),
        (("run", "--shape", "1,2,3,4", "--size", "full"), "--shape is a row of its own"),
        (("run", "--shape", "1,2,three,4"), "must be B,H,L,D or B,H,T,S,D, got '1,2,three,4'"),
        (("run", "--shape", "64,64,1000000,64"), "for its inputs and results, this machine has"),
        (("run", "--shape", "1,2,3,4", "--minutes", "1"), "--shape is a row of its own"),
        (("run", "--causal"), "--causal is of one question: give its --shape"),
        (("run", "--dtype", "bf16"), "--dtype is of one question: give its --shape"),
        (("run", "--option", "moustache"), "invalid choice: 'moustache'"),
        (("run", "--size", "huge"), "invalid choice: 'huge'"),
        (("run", "--budget", "nan"), "must be positive, got 'nan'"),
        (("run", "--shape", "1,2,3,4", "--backend", "triton"), "nothing to measure: attention"),
        (("evidence", "--run", "--backend", "tpu"), "nothing to run: attention: backend"),
        (("compare", "a.json", "b.json", "--threshold", "-1"), "must be positive, got '-1'"),
        (("paint",), "invalid choice: 'paint'"),
        (("run", "--dtype", "int8"), "must be fp32, bf16 or fp16, got 'int8'"),
        (("run", "--threads", "-1"), "must be positive, got '-1'"),
        (("run", "--suite", "all"), "invalid choice: 'all'"),
        (("run", "--backend", "tpu", "--shape", "1,2,3,4"), "measure: attention: backend"),
        (("compare", "a.json"), "B.json"),
        ((), "COMMAND"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_one_line(command, arguments, message):
    assert message in refused(command, *arguments)


def test_without_a_gpu(command):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert "no GPU that this torch can use" in refused(command, "run", "--device", "cuda")


def test_the_scaling_study(pages, monkeypatch):
    """Every kind of point once, tiny, and the page; then the page of times that are known."""
    small = [x._replace(sizes=x.sizes[:1]) for x in scaling.SERIES]
    with monkeypatch.context() as patch:
        patch.setattr(scaling, "SERIES", small)
        patch.setattr(scaling, "LIMITS", race.Limits(1e-3, 1))
        measured = scaling.measure(environment.settings({}))
    assert len(measured) == len(small) * 2 * 2
    assert all(row["seconds"] > 0 for row in measured)

    rows = []
    for row, series in itertools.product(measured, scaling.SERIES):
        for B, H, T, D in series.sizes if row["series"] == series.title else ():
            times = {"seconds": 1e-9 * B * H * T**2 * D, "peak_bytes": 1000 * T}
            rows.append({**row, "B": B, "H": H, "T": T, "D": D, **times})
    rows[-1] |= {"seconds": None}  # was not measured
    facts = environment.facts("scaling", environment.settings({}, size="quick"))
    path = pages / "bench" / "results" / facts["device"] / "scaling.json"
    results.save(path, facts, rows)
    page, picture = scaling.write(results.load(path, "scaling"), pages)
    assert f"performance/{picture.name}" in page.read_text()
    text = picture.read_text()
    for title in (
        "time grows as the length to the power of 2.0",
        "memory grows as the length to the power of 1.0",
        "time grows as the batch to the power of 1.0",
        "time grows as the head size to the power of 1.0",
    ):
        assert title in text
    scaling.write(results.load(path), pages)
    assert picture.read_text() == text, "drawn twice, the same"

"""The emulator of the CUDA kernels beside the GPU, as far as it goes without one."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import Case, bf16, fp16

from bench import environment, results
from tools.gpu import crosscheck, proof, visit, worker

ROOT = Path(__file__).resolve().parent.parent
BUILT = ROOT / "build" / "emulator" / "_emulator.so"


@pytest.fixture
def emulator():
    """The library of the emulator."""
    if not BUILT.exists():
        pytest.skip("the emulator of the CUDA kernels is not built: make emulator")
    return BUILT


SMALL = Case("small", B=1, T=40, S=50, D=64, dropout_p=0.3, weights="per head", mask="bts")


@pytest.fixture(params=[bf16, fp16], ids=str)
def computed(request):
    """A call's results and its problem; another backend serves where only the bound is meant."""
    return proof.attention("cpu", "cpu", replace(SMALL, dtype=request.param))


def test_the_same_results_agree(computed):
    found, problem = computed
    agreement = crosscheck.compare(found, dict(found), problem)
    assert agreement == (0.0, "out", 1.0)


@pytest.mark.parametrize("name", ["out", "dq", "dk", "dv", "weights"])
def test_a_neighbouring_number_agrees_and_a_distant_one_does_not(computed, name):
    found, problem = computed
    place = int(found[name].abs().argmax())

    def changed(steps):
        x = found[name].clone()
        x.view(torch.int16).view(-1)[place] += steps
        return found | {name: x}

    agreement = crosscheck.compare(found, changed(1), problem)
    assert agreement.result == name
    assert 0 < agreement.margin <= 1
    assert agreement.same < 1
    with pytest.raises(AssertionError, match=rf"^{name}: differs by .*, bound [^\n]*$"):
        crosscheck.compare(found, changed(64), problem)


def test_lse_is_held_to_fp32(computed):
    found, problem = computed
    for change, right in ((1e-6, True), (1e-3, False)):
        other = found | {"lse": found["lse"] + change}
        if right:
            assert crosscheck.compare(found, other, problem).result == "lse"
        else:
            with pytest.raises(AssertionError, match=r"^lse: differs by 0\.001"):
                crosscheck.compare(found, other, problem)


def test_one_entry_of_the_dropout_mask_is_missed(computed):
    """A probability that is dropped on one side, and one that is kept on one."""
    found, problem = computed
    weights = found["weights"]
    kept = int((weights > 0).view(-1).int().argmax())
    dropped = int(((weights == 0) & problem.inputs.mask).view(-1).int().argmax())
    for place, value in ((kept, 0.0), (dropped, float(weights[weights > 0].min()))):
        other = weights.clone()
        other.view(-1)[place] = value
        with pytest.raises(AssertionError, match=r"^weights: differs"):
            crosscheck.compare(found, found | {"weights": other}, problem)


def test_everything_wrong_is_said(computed):
    found, problem = computed
    nan = found["dk"].clone()
    nan[0, 0, 3, 3] = torch.nan
    empty = found["lse"].clone()
    assert empty[-1, -1, 0] == -torch.inf, "the row that has no keys"
    empty[-1, -1, 0] = 0.0
    other = found | {"out": found["out"].float(), "lse": empty, "dk": nan}
    with pytest.raises(AssertionError) as said:
        crosscheck.compare(found, other, problem)
    lines = str(said.value).splitlines()
    assert len(lines) == 3
    assert lines[0].endswith("(1, 2, 40, 64), expected torch.float32 (1, 2, 40, 64)")
    assert lines[1:] == ["lse: NaN or Inf out of place", "dk: NaN or Inf out of place"]
    lacking = {name: x for name, x in found.items() if name != "dq"}
    with pytest.raises(AssertionError, match=r"results \['dk', 'dv', 'lse', 'out', 'weights'\]"):
        crosscheck.compare(lacking, found, problem)


def test_the_plan():
    whole, dry, turing = (
        crosscheck.plan(**given)
        for given in ({"dry": False}, {"dry": True}, {"dry": False, "turing": True})
    )
    assert len({item["id"] for item in whole}) == len(whole)
    assert {item["dtype"] for item in dry} == {"bfloat16", "float16"}
    assert 5 <= len(dry) <= 12
    assert {item["dtype"] for item in turing} == {"float16"}
    assert not any("D192" in item["id"] or "D256" in item["id"] for item in turing)
    for form in (*crosscheck.FORMS, "everything", "cache", "cache_options"):
        assert sum(item["id"].startswith(f"{form}-") for item in turing) >= 4


def test_no_case_is_about_zeros():
    for case, way in crosscheck.cases():
        if case.D == 32 and case.dtype == bf16:
            given = ("cpu", "cpu", case, *([way] if way else []))
            compute = proof.decode if way else proof.attention
            for name, x in compute(*given)[0].items():
                assert (x != 0).double().mean() > 0.02, (case, name)


@pytest.mark.parametrize(
    ("architecture", "played"),
    [("sm_75", "75"), ("sm_87", "86"), ("sm_90", "90"), ("sm_103", "100"), ("sm_121", "120")],
)
def test_the_emulator_plays_the_gpu_that_is_there(architecture, played):
    emulator, gpu = crosscheck.sides(BUILT, architecture)
    assert emulator.variables["ATTNFAST_EMULATOR_ARCH"] == played
    assert emulator.variables["CUDA_VISIBLE_DEVICES"] == ""
    assert emulator.device == "cpu"
    assert (gpu.device, gpu.variables) == ("cuda", {"ATTNFAST_EMULATOR": "0"})


SETUP = """
import pathlib, sys
assert sys.argv[1:] == ["-q", "build_emulator"]
print("the compiler's words", file=sys.stderr)
{0}
"""


@pytest.mark.parametrize(
    ("what", "built_before", "found", "reason"),
    [
        ("pathlib.Path('_emulator.so').touch()", False, True, None),
        ("pathlib.Path('_emulator.so').touch()", True, True, None),
        ("sys.exit('attnfast: no C++ compiler')", False, False, "attnfast: no C++ compiler"),
        ("sys.exit('attnfast: no C++ compiler')", True, True, "attnfast: no C++ compiler"),
        ("", False, False, "the compiler's words"),
    ],
)
def test_the_library_is_built(monkeypatch, tmp_path, what, built_before, found, reason):
    library = tmp_path / "_emulator.so"
    monkeypatch.setattr(crosscheck, "ROOT", tmp_path)
    monkeypatch.setattr(crosscheck, "LIBRARY", library)
    (tmp_path / "setup.py").write_text(SETUP.format(what))
    if built_before:
        library.touch()
    log = tmp_path / "log.txt"
    assert crosscheck.library(log, build=True) == (
        library if found else None, reason and f"not built: {reason}"
    )  # fmt: skip
    assert "the compiler's words" in log.read_text()


def test_in_a_trial_nothing_is_built(monkeypatch, tmp_path):
    monkeypatch.setattr(crosscheck, "LIBRARY", tmp_path / "none")
    log = tmp_path / "log.txt"
    assert crosscheck.library(log, build=False) == (None, "not built: make emulator")
    monkeypatch.setattr(crosscheck, "LIBRARY", tmp_path)
    assert crosscheck.library(log, build=False) == (tmp_path, None)


def visiting(tmp_path, **changes):
    """A visit, without its first calls of every backend."""
    said: list[str] = []
    made = visit.Visit.__new__(visit.Visit)
    fields = {
        "out": tmp_path, "dry": False, "until": float("inf"), "log": tmp_path / "log.txt",
        "device": "cpu", "refusals": {"cuda": None}, "failures": [], "lines": [],
        "settings": environment.settings({}, size="smoke"),
    }  # fmt: skip
    made.__dict__.update(fields | {"say": said.append} | changes)
    return made


@pytest.mark.parametrize(
    ("refusals", "reason"),
    [({}, "not part of this build"), ({"cuda": "an old driver"}, "an old driver")],
)
def test_where_the_kernels_do_not_run_nothing_is_compared(tmp_path, refusals, reason):
    made = visiting(tmp_path, refusals=refusals)
    visit._crosscheck(made)
    assert made.lines == [f"cuda, emulator and GPU: not compared: {reason}"]
    assert not made.failures


def test_another_architectures_rounding_is_within_the_bound(emulator, tmp_path):
    """Tensor cores that add four products at a time, beside those that add eight."""
    sides = []
    for number in (80, 75):
        side, _ = crosscheck.sides(emulator, f"sm_{number}")
        sides.append(side._replace(name=f"sm_{number}"))
    items = crosscheck.plan(dry=False, turing=True)[::9]
    rows = crosscheck.run(worker.COMMAND, tuple(sides), items, tmp_path / "log.txt")
    assert [row["id"] for row in rows] == [item["id"] for item in items]
    assert not any(row["failure"] for row in rows), rows
    assert any(row["margin"] > 0 for row in rows)
    assert all(0.8 < row["same"] <= 1 for row in rows)
    [line] = crosscheck.lines(tuple(sides), rows, len(items))
    assert line.startswith(f"cuda, sm_80 and sm_75, fp16: {len(items)} cases agree, 0 do not, 9")


def test_what_a_side_cannot_do_is_a_failure(emulator, monkeypatch, tmp_path):
    """There is no GPU here, or none is shown."""
    items = crosscheck.plan(dry=True)[:2]
    monkeypatch.setattr(crosscheck, "library", lambda *_, **__: (emulator, "not built: x"))
    monkeypatch.setattr(crosscheck, "plan", lambda **_: items)
    monkeypatch.setattr(environment, "architecture", lambda *_: "sm_90")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    made = visiting(tmp_path)
    visit._crosscheck(made)
    starts = [f"{item['id']}: GPU: " for item in items]
    assert [x[: len(y)] for x, y in zip(made.failures, starts, strict=True)] == starts
    assert made.lines[0] == "cuda, emulator: an older library serves, the newest is not built: x"
    assert made.lines[1] == "cuda, emulator and GPU, bf16: 0 cases agree, 2 do not"
    rows = results.load(tmp_path / "crosscheck.json", "crosscheck").rows
    assert all(row["failure"] and row["margin"] is None for row in rows)


def test_cases_that_no_time_was_left_for(tmp_path):
    pair = crosscheck.sides(BUILT, None)
    command, past = [sys.executable, "-c", "1"], time.monotonic() - 1
    items = crosscheck.plan(dry=True)
    rows = crosscheck.run(command, pair, items, tmp_path / "log.txt", past)
    assert rows == []
    [line] = crosscheck.lines(pair, rows, 3)
    assert line == "cuda, schedule 0 and schedule 1: 3 cases not run: no time left"


def test_an_emulator_that_crashes(tmp_path):
    pair = crosscheck.sides(BUILT, None)
    items = crosscheck.plan(dry=True)[:1]
    command = [sys.executable, "-c", "import os; os.abort()"]
    [row] = crosscheck.run(command, pair, items, tmp_path / "log.txt")
    assert row["failure"] == "schedule 0: crash: SIGABRT"

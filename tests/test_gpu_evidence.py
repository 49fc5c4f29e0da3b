"""Evidence of kernels: what is recorded, what becomes stale, and what is listed."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch

from bench import cli, environment, results
from tools import device_code
from tools.gpu import evidence, guard, kernels

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def evidence_file(tmp_path):
    """Writes evidence of the outcomes of some cases; returns their rows."""

    def write(failures=(), isa="avx2", **changes):
        def margins(i):
            return {"forward": [0.1 * i, "out"], "backward": [0.2, "dq"]}

        items = evidence.plan("cpu", "cpu", dry=True)
        outcomes = [
            guard.Outcome(
                item,
                None if i in failures else {"architecture": isa, "margins": margins(i)},
                "crash: SIGSEGV" if i in failures else None,
                0.1,
            )
            for i, item in enumerate(items)
            if item["table"] == "attention" and item["dtype"] == "float32"
        ]
        rows = evidence.record("cpu", "cpu", outcomes, isa)
        settings = environment.settings({}, size="quick")
        facts = {**environment.facts("evidence", settings), "kernel": isa, **changes}
        results.save(evidence.path(facts, "cpu", "hardware", tmp_path), facts, rows)
        return rows

    return write


@pytest.fixture
def line_of(tmp_path):
    """The line of a kernel, of the evidence in the test's folder."""

    def find(backend, kind, tree=ROOT):
        found = kernels.lines(tmp_path, tree)
        return next(line for line in found if line[:2] == (backend, kind))

    return find


def test_evidence_counts_cases_and_keeps_the_worst(evidence_file, line_of):
    forward, backward = evidence_file(failures=(0,))
    assert (forward["kind"], backward["kind"]) == ("forward", "backward")
    assert forward["architecture"] == "avx2"
    assert forward["failed"][0]["reason"] == "crash: SIGSEGV"
    assert forward["failed"][0]["test"].startswith("tests/backends/test_table.py::test_case[cpu-")
    assert forward["worst"]["result"] == "out"
    assert forward["worst"]["margin"] > 0.1
    total, worst = len(forward["passed"]) + 1, forward["worst"]["margin"]
    line = line_of("cpu", "forward")
    assert line.hardware == (
        f"avx2: {total - 1} of {total} cases, worst {worst:.0%};"
        " not portable, avx512, avx512_bf16, amx"
    )
    assert (line.proven, line.compiled, line.timed) == ("-", "-", "-")
    assert line_of("cuda", "forward").hardware == "-", "no evidence is shown as none"


def test_evidence_of_each_instruction_set_is_kept(evidence_file, line_of, tmp_path):
    evidence_file(isa="portable", device="old", commit={"id": "a" * 40, "dirty": False})
    evidence_file(isa="avx2", device="new", commit={"id": "b" * 40, "dirty": False})
    evidence_file(isa="amx", device="new", commit={"id": "c" * 40, "dirty": True}, sources="0" * 16)
    evidence_file(isa="avx2", device="new", commit={"id": "d" * 40, "dirty": False})
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.json"))
    assert files == [
        "new/evidence-cpu-amx.json", "new/evidence-cpu-avx2.json", "old/evidence-cpu-portable.json"
    ]  # fmt: skip
    said = line_of("cpu", "forward").hardware.split("; ")
    assert said[-1] == "not avx512, avx512_bf16"
    found = {text.partition(":")[0]: text for text in said[:-1]}
    assert found.keys() == {"portable", "avx2", "amx"}
    assert {name for name, text in found.items() if text.endswith("(stale)")} == {"amx"}
    sources = kernels.sources(tmp_path, ROOT)
    assert re.search(r"old/evidence-cpu-portable.json \| portable +\| aaaaaaaaa +\| 20", sources)
    assert re.search(r"new/evidence-cpu-amx.json +\| amx +\| ccccccccc\+ \| 20", sources)
    assert "ddddddddd" in sources, "a new run takes the place of the old one"
    assert "bbbbbbbbb" not in sources


def test_instruction_sets_are_proven_one_by_one(tmp_path, monkeypatch, capsys):
    """A few cases of the tables; what a process says that it ran is what is on record."""
    sets = sorted({"portable", torch.ops.attnfast.cpu_isa()})
    plan = evidence.plan
    monkeypatch.setattr(evidence, "DRY_STEP", 300)
    monkeypatch.setattr(evidence, "plan", lambda *given, **how: plan(*given, dry=True))
    monkeypatch.setattr(evidence.ops, "cpu_isas", lambda: sets)
    monkeypatch.delenv("ATTNFAST_CPU_ISA", raising=False)
    assert cli.main(["evidence", "--run", "--results", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    runs = [results.load(path, "evidence") for path in tmp_path.rglob("*.json")]
    assert sorted(run.facts["kernel"] for run in runs) == sets
    for run in runs:
        name = run.facts["kernel"]
        assert run.path.name == f"evidence-cpu-{name}.json"
        assert {row["architecture"] for row in run.rows} == {name}
        assert {"forward", "backward", "decode"} <= {row["kind"] for row in run.rows}
        assert not any(row["failed"] for row in run.rows)
        assert f"cpu, {name}: " in printed


def test_every_kernel_that_exists_has_one_line(tmp_path):
    names = [line[:2] for line in kernels.lines(tmp_path)]
    assert len(set(names)) == len(names)
    source = (ROOT / "kernels" / "backend.py").read_text()
    assert [kind for backend, kind in names if backend == "gluon"] == ["forward"]
    assert "def gluon_fwd" in source
    assert not re.search("def gluon_(bwd|decode|weights)", source), "then it has more kinds"


def test_sources_of_a_backend(tmp_path):
    for name in ("csrc/params.h", "csrc/cpu/a.cpp", "csrc/bindings/cpu.cpp", "kernels/scores.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    before = {x: environment.sources(x, tmp_path) for x in ("cpu", "triton")}
    (tmp_path / "csrc/cpu/a.cpp").write_text("y")
    after = {x: environment.sources(x, tmp_path) for x in ("cpu", "triton")}
    assert before["cpu"] != after["cpu"]
    assert before["triton"] == after["triton"]


def test_compilers_tables_are_evidence(line_of, tmp_path):
    """With the commit of the table, and stale where the kernels are others than were compiled."""
    tree = tmp_path / "tree"
    table, folder = tree / "docs" / "triton-resources" / "3.9.csv", tree / "kernels"
    for path in (table.parent, folder):
        path.mkdir(parents=True)
    files = {file for file, *_ in device_code.KERNELS.values()}
    for name in files.union(device_code.INDEXED, device_code.BLOCKED):
        (folder / f"{name}.py").write_text(f"{name} = 1\n")
    columns = "arch,name,dtype,D,variant,tile,warps,stages,registers,spills,shared,matrix,source"
    rows = (
        "fwd,bfloat16,64,plain,t,8,3,175,0,900,H",
        "fwd,bfloat16,64,causal,t,8,3,213,16,800,H",
        "dq,bfloat16,64,plain,t,8,3,99,0,1,H",
        "gluon,float16,64,plain,t,8,3,240,0,1,H",
    )

    def write(changed=()):
        sources = [
            "00000000" if i in changed else device_code.fingerprint(row.split(",")[0], folder)
            for i, row in enumerate(rows)
        ]
        lines = [f"sm_90,{row},{source}" for row, source in zip(rows, sources, strict=True)]
        table.write_text("\n".join([columns, *lines]))

    def found(kind="forward", backend="triton"):
        return line_of(backend, kind, tree).compiled

    write()
    plain = "Triton 3.9: 2 variants for 1 GPU, 1 spill"
    assert found() == plain
    assert found("backward") == found("forward", "gluon") == "Triton 3.9: 1 variants for 1 GPU"
    assert re.search(r"3.9.csv \| Triton 3.9 \| unknown", kernels.sources(tmp_path / "none", tree))
    git = ["git", "-C", str(tree), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    said = kernels.sources(tmp_path / "none", tree)
    assert re.search(rf"3.9.csv \| Triton 3.9 \| {head[:9]} \| 20[\d-]+", said)
    (folder / "attention_fwd.py").write_text("attention_fwd = 1  # said better\n")
    assert found() == plain, "comments are not compiled"
    write(changed=[1])
    assert found() == f"{plain} (1 stale)"
    (folder / "attention_fwd.py").write_text("attention_fwd = 2\n")
    assert found() == f"{plain} (stale)"
    assert "stale" not in found("backward")
    table.write_text(f"{columns}\nsm_90,paint,float16,64,plain,t,8,3,240,0,1,H,00000000\n")
    with pytest.raises(ValueError, match=r"cannot read .*3\.9\.csv: KeyError"):
        found()

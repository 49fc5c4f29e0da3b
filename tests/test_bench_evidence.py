"""Evidence of kernels: what is recorded, what becomes stale, and what is listed."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def evidence_file(bench, tmp_path):
    """Writes evidence of the outcomes of some cases; returns their rows."""

    def write(failures=(), how="cpu", isa="avx2", **changes):
        def margins(i):
            return {"forward": [0.1 * i, "out"], "backward": [0.2, "dq"]}

        items = bench.evidence.plan("cpu", "cpu", dry=True)
        outcomes = [
            bench.guard.Outcome(
                item,
                None if i in failures else {"architecture": isa, "margins": margins(i)},
                "crash: SIGSEGV" if i in failures else None,
                0.1,
            )
            for i, item in enumerate(items)
            if item["table"] == "attention" and item["dtype"] == "float32"
        ]
        rows = bench.evidence.record("cpu", how, outcomes, isa)
        settings = bench.environment.settings({}, size="quick")
        facts = {**bench.environment.facts("evidence", settings), "kernel": isa, **changes}
        bench.results.save(bench.evidence.path(facts, "cpu", "hardware", tmp_path), facts, rows)
        return rows

    return write


def test_evidence_counts_cases_and_keeps_the_worst(bench, evidence_file, tmp_path):
    forward, backward = evidence_file(failures=(0,))
    assert forward["kind"] == "forward"
    assert backward["kind"] == "backward"
    assert forward["architecture"] == "avx2"
    assert forward["failed"][0]["reason"] == "crash: SIGSEGV"
    assert forward["failed"][0]["test"].startswith("tests/test_table.py::test_cpu[")
    assert forward["worst"]["result"] == "out"
    assert forward["worst"]["margin"] > 0.1
    lines = bench.evidence.lines(tmp_path)
    by_name = {line.kernel[:2] + line.kernel[3:]: line for line in lines}
    text = by_name["cpu", "forward", "avx2"].hardware
    total = len(forward["passed"]) + 1
    assert f"{total - 1} of {total} cases of tests/test_table.py::test_cpu" in text
    assert "stale" not in text
    assert by_name["cpu", "forward", "avx2"].proven == "-"
    assert by_name["cpu", "forward", "avx2"].timed == "-"
    assert by_name["cuda", "forward", "any"].hardware == "-", "no evidence is shown as none"


def test_evidence_of_each_instruction_set_is_kept(bench, evidence_file, tmp_path):
    evidence_file(isa="portable", device="old", commit={"id": "a" * 40, "dirty": False})
    evidence_file(isa="avx2", device="new", commit={"id": "b" * 40, "dirty": False})
    evidence_file(isa="amx", device="new", commit={"id": "c" * 40, "dirty": True}, sources="0" * 16)
    evidence_file(isa="avx2", device="new", commit={"id": "d" * 40, "dirty": False})
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.json"))
    assert files == [
        "new/evidence-cpu-amx.json", "new/evidence-cpu-avx2.json", "old/evidence-cpu-portable.json"
    ]  # fmt: skip
    lines = {
        line.kernel.architecture: line.hardware
        for line in bench.evidence.lines(tmp_path)
        if (line.kernel.backend, line.kernel.kind) == ("cpu", "forward")
    }
    assert lines.keys() == set(bench.evidence.CPU_ISAS)
    assert lines["portable"].startswith("old: ")
    assert "aaaaaaaaa, 20" in lines["portable"]
    assert "ddddddddd, 20" in lines["avx2"], "a new run takes the place of the old one"
    assert "bbb" not in lines["avx2"]
    assert "ccccccccc+, " in lines["amx"]
    assert lines["amx"].endswith("(stale)")
    assert lines["avx512"] == lines["avx512_bf16"] == "-"


def test_every_instruction_set_of_the_machine_is_proven(bench, tmp_path):
    """A few cases of the tables; what a process says that it ran is what is on record."""
    program = (
        "import bench.evidence as e, bench.cli as c; e.DRY_STEP = 300; plan = e.plan;"
        "e.plan = lambda *given, **how: plan(*given, dry=True);"
        f"c.main(['evidence', '--run', '--results', {str(tmp_path)!r}])"
    )
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    environ.pop("ATTNFAST_CPU_ISA", None)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    runs = [bench.results.load(path, "evidence") for path in tmp_path.rglob("*.json")]
    sets = torch.ops.attnfast.cpu_isas().split(",")
    assert {run.facts["kernel"] for run in runs} == set(sets)
    for run in runs:
        name = run.facts["kernel"]
        assert run.path.name == f"evidence-cpu-{name}.json"
        assert {row["architecture"] for row in run.rows} == {name}
        assert {"forward", "backward", "decode"} <= {row["kind"] for row in run.rows}
        assert not any(row["failed"] for row in run.rows)
        assert f"cpu, {name}: " in done.stdout


def test_kernels_that_do_not_exist_have_no_line(bench, tmp_path):
    kinds = [x.kernel.kind for x in bench.evidence.lines(tmp_path) if x.kernel.backend == "gluon"]
    kernels = (ROOT / "kernels" / "backend.py").read_text()
    assert set(kinds) == {"forward"}
    assert "def gluon_fwd" in kernels
    assert not re.search("def gluon_(bwd|decode|weights)", kernels), "then it has more kinds"


def test_evidence_of_other_sources_is_stale(bench, evidence_file, tmp_path):
    evidence_file(sources="0" * 16)
    assert any("(stale)" in line.hardware for line in bench.evidence.lines(tmp_path))


def test_sources_of_a_backend(bench, tmp_path):
    for name in ("csrc/params.h", "csrc/cpu/a.cpp", "csrc/bindings/cpu.cpp", "kernels/scores.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    before = {x: bench.environment.sources(x, tmp_path) for x in ("cpu", "triton")}
    (tmp_path / "csrc/cpu/a.cpp").write_text("y")
    after = {x: bench.environment.sources(x, tmp_path) for x in ("cpu", "triton")}
    assert before["cpu"] != after["cpu"]
    assert before["triton"] == after["triton"]


def test_evidence_of_a_compiler(bench, tmp_path):
    kernel = bench.evidence.Kernel("triton", "forward", "bfloat16", "sm_90")
    row = bench.evidence.compiled(kernel, registers=240, spills=0, shared_bytes=180_000)
    settings = bench.environment.settings({}, size="quick")
    facts = bench.environment.facts("evidence", settings._replace(backend="triton"))
    bench.results.save(tmp_path / "compiled" / "evidence-triton.json", facts, [row])
    line = next(x for x in bench.evidence.lines(tmp_path) if x.kernel == kernel)
    assert line.compiled.startswith("240 registers, 0 B spilled, 180000 B shared, ")


def test_compilers_tables_are_evidence(bench, tmp_path):
    """With the commit of the table, and stale where the kernels are others than were compiled."""
    compiled = importlib.import_module("bench.compiled")
    tree = tmp_path / "tree"
    table, kernels = tree / "docs" / "triton-resources" / "3.9.csv", tree / "kernels"
    for path in (table.parent, kernels):
        path.mkdir(parents=True)
    for name in ("attention_fwd", "attention_bwd", "attention_fwd_gluon", *compiled.SHARED):
        (kernels / f"{name}.py").write_text(f"{name} = 1\n")
    columns = "arch,name,dtype,D,variant,tile,warps,stages,registers,spills,shared,matrix,source"
    rows = (
        "fwd,bfloat16,64,plain,t,8,3,175,0,900,H",
        "fwd,bfloat16,64,causal,t,8,3,213,16,800,H",
        "dq,bfloat16,64,plain,t,8,3,99,0,1,H",
        "gluon,float16,64,plain,t,8,3,240,0,1,H",
    )

    def write(changed=()):
        sources = ["00000000" if i in changed else compiled.fingerprint(row.split(",")[0], tree)
                   for i, row in enumerate(rows)]  # fmt: skip
        lines = [f"sm_90,{row},{source}" for row, source in zip(rows, sources, strict=True)]
        table.write_text("\n".join([columns, *lines]))

    def found(kind="forward", backend="triton"):
        lines = bench.evidence.lines(tmp_path / "none", tree)
        return [x for x in lines if (x.kernel.backend, x.kernel.kind) == (backend, kind)]

    write()
    [line] = found()
    assert (line.kernel.dtype, line.kernel.architecture) == ("bfloat16", "sm_90")
    most = "2 variants, up to 213 registers, 16 B spilled, 900 B shared, Triton 3.9, "
    assert line.compiled == f"{most}unknown commit"
    git = ["git", "-C", str(tree), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    assert re.fullmatch(f"{most}{head[:9]}, 20[\\d-]+", found()[0].compiled)
    assert len(found("backward")) == len(found("forward", "gluon")) == 1
    (kernels / "attention_fwd.py").write_text("attention_fwd = 1  # said better\n")
    assert not found()[0].compiled.endswith("stale)"), "comments are not compiled"
    write(changed=[1])
    assert found()[0].compiled.endswith("(1 of 2 stale)")
    (kernels / "attention_fwd.py").write_text("attention_fwd = 2\n")
    assert found()[0].compiled.endswith("(stale)")
    assert not found("backward")[0].compiled.endswith("stale)")
    table.write_text(f"{columns}\nsm_90,paint,float16,64,plain,t,8,3,240,0,1,H,00000000\n")
    with pytest.raises(ValueError, match=r"cannot read .*3\.9\.csv: KeyError"):
        found()


def test_fingerprints_are_those_of_the_compiler(bench, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(ROOT)
    aot = importlib.import_module("tools.aot")
    compiled = importlib.import_module("bench.compiled")
    assert compiled.FILES.keys() == compiled.KERNELS.keys() == aot.MODULES.keys()
    for name in aot.MODULES:
        assert compiled.fingerprint(name, ROOT) == aot.fingerprint(name)

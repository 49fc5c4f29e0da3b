"""tools/aot.py: kernels compile without a GPU, and the committed table is held."""

from __future__ import annotations

import argparse
import csv
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tools import aot, aot_docs, device_loops

ROOT = Path(__file__).resolve().parent.parent
GOOD = aot.Resources(
    "sm_90", "fwd", "bfloat16", 128, "plain", "128x128", 8, 2, 248, 0, 163840, "HGMMA", "0a1b2c3d",
    blocks=1, products=16, waits=2, loop=(16, *range(1, 9), 400),
)  # fmt: skip


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


FORWARD_WITH_SINKS = """
import torch
from attnfast.kernels import arguments, attention_fwd
from attnfast.call import Inputs, Options
from tools import aot
q = torch.empty(2, 2, 256, 64, dtype=torch.bfloat16)
inputs, options = Inputs(q, q, q, sinks=torch.empty(2)), Options(0.125)
call = arguments.gather(inputs, options, 1 << 20)
aot.driver.set_active(aot.NoDevice("sm_80"))
job = attention_fwd.forward_launch(call, attention_fwd.results(inputs, options), "sm_80")
print(aot.read_binary(job.kernel.warmup(*job.arguments(), grid=(1,), **job.options()))[3])
"""


def test_a_score_is_rounded_as_its_maximum_is(tmp_path: Path) -> None:
    """Not fused with the subtraction of the maximum: the interpreter cannot tell, exp2 would."""
    done = subprocess.run(
        [sys.executable, "-c", FORWARD_WITH_SINKS],
        cwd=ROOT,
        env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    scores = 128 * 64 // (8 * 32)  # of a thread, in each of two loops
    assert len(re.findall(r"FFMA [^;]*, RZ", done.stdout)) >= 2 * scores


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


@pytest.mark.parametrize("side", [64, 128])
def test_a_tile_lies_within_a_block(side: int) -> None:
    """And is what it is without a block mask where it does."""
    choose = aot.configs.choose
    for arch in aot.ARCHITECTURES:
        for name in aot.configs.PASSES:
            for size in aot.DTYPES:
                for D in aot.configs.HEAD_DIMS:
                    without = choose(arch, name, size, D, D, False)
                    config = choose(arch, name, size, D, D, False, side)
                    assert side % config.BLOCK_M == side % config.BLOCK_N == 0
                    fits = max(without.BLOCK_M, without.BLOCK_N) <= side
                    assert (config == without) == fits, (arch, name, size, D)


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
        ({"loop": (16, *range(1, 9), 408)}, None),
        ({"loop": (16, *range(1, 9), 409)}, "409 issue slots, the table says 400"),
        ({"loop": ()}, "no loop with matrix products, the table has one"),
        ({"waits": 15}, None),
        ({"waits": 16}, "a wait for every wgmma"),
    ],
    ids=str,
)
def test_faults(changes: dict[str, object], fault: str | None) -> None:
    found = aot.faults(GOOD._replace(**changes), {aot.key(GOOD): GOOD})
    assert bool(found) == (fault is not None)
    if fault is not None:
        assert found[0] == f"sm_90 fwd bfloat16 128 plain 128x128: {fault}"


@pytest.mark.parametrize(
    ("changes", "spilling_is_a_fault"),
    [
        ({}, True),
        ({"dtype": "float32", "matrix": ""}, True),
        ({"variant": "causal", "D": 64}, True),
        ({"D": 256}, False),
        ({"variant": "everything"}, False),
    ],
    ids=str,
)
def test_which_kernels_must_not_spill(
    changes: dict[str, object], spilling_is_a_fault: bool
) -> None:
    assert aot.faults(GOOD._replace(**changes), {}) == []
    found = aot.faults(GOOD._replace(**changes, spills=8), {})
    assert bool(found) == spilling_is_a_fault


# A walk over heads (0x00 to 0xb0) round two loops over tiles, of which the second masks; in the
# first a wait that jumps behind the kernel's end and back.
LOOPS = """
        /*0000*/                   IADD3 R8, R8, 0x1, RZ ;
        /*0010*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R4], R5 ;
        /*0020*/              @!P1 BRA 0xd0 ;
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0040*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0050*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0060*/              @!P2 BRA 0x10 ;
        /*0070*/                   FSEL R8, R8, -INF , P2 ;
        /*0078*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0080*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0088*/                   MUFU.EX2 R8, R8 ;
        /*0090*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*00a0*/              @!P3 BRA 0x70 ;
        /*00b0*/              @!P4 BRA 0x0 ;
        /*00c0*/                   EXIT ;
        /*00d0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R4], R5 ;
        /*00e0*/              @!P1 BRA 0xd0 ;
        /*00f0*/                   BRA 0x30 ;
"""


def test_the_loop_that_is_counted_is_the_shortest_over_tiles() -> None:
    turn = device_loops.turn(device_loops.parsed(LOOPS.splitlines()))
    assert [hex(each.address) for each in turn] == ["0x10", "0x20", "0x30", "0x40", "0x50", "0x60"]
    assert sum(map(device_loops.is_wait, turn)) == 1
    found = dict(zip(device_loops.NAMES, device_loops.counts(turn, 0.5), strict=True))
    assert found["mma"] == 1
    assert found["total"] == 3
    assert device_loops.counts(device_loops.turn([]), 0.5) == ()


def test_a_kernel_that_does_not_compile_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(entry: aot.Entry) -> aot.Resources:
        raise RuntimeError(f"{entry}: no")

    monkeypatch.setattr(aot, "compiled", broken)
    entry = next(aot.entries())
    assert aot.attempt(entry) == f"{entry}: no"


def test_the_reason_is_the_cause_and_not_the_place() -> None:
    error = ValueError("at 13:11:\n    mask = at_head()\n           ^")
    error.__cause__ = TypeError("cannot convert None\n")
    assert aot.reason(error) == "cannot convert None"
    assert aot.reason(ValueError("at 1:2:\n    x = y\n       ^")) == "x = y"
    assert aot.reason(KeyError()) == "KeyError"


def test_a_killed_compiler_is_a_fault_and_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot, "attempt", kill_this_process)
    found = list(aot.results([next(aot.entries())], workers=1))
    assert len(found) == 1
    assert "the compiler's process was killed" in str(found[0])


def kill_this_process(entry: aot.Entry) -> str:
    os.kill(os.getpid(), signal.SIGKILL)
    return "still alive"


@pytest.mark.parametrize("parts", [1, 2, 7])
def test_parts_are_everything_once(parts: int) -> None:
    found = [[e for e in aot.entries() if aot.in_part(e, (n + 1, parts))] for n in range(parts)]
    assert sorted(entry for part in found for entry in part) == sorted(aot.entries())
    for part in found:
        assert len(part) > len(list(aot.entries())) / parts / 2
        assert {entry.arch for entry in part} == set(aot.ARCHITECTURES)


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "1/", "a/b", "-1/4"])
def test_a_part_that_makes_no_sense(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="must be N/M with 1 <= N <= M"):
        aot.part_of(text)
    assert aot.part_of("2/8") == (2, 8)


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of a table of nothing."""
    monkeypatch.setattr(aot, "TABLES", tmp_path)
    return aot.table_path()


def resources(entry: aot.Entry, **changes: object) -> aot.Resources:
    """A row of an entry that is current, without compiling."""
    arch, name, dtype, D, variant = aot.entry_key(entry)
    aot.driver.set_active(aot.NoDevice(arch))
    tile = aot.tile_of(aot.job(entry).config)
    row = aot.Resources(
        *(arch, name, dtype, int(D), variant, *tile, 64, 0, 512, "HMMA", aot.fingerprint(name)),
        *(1, 0, 0, ()),
    )
    return row._replace(**changes)


def missing(*arguments: str) -> list[aot.Entry]:
    """What --missing leaves to compile."""
    given = aot.parser().parse_args(["--missing", *arguments])
    return aot.chosen_entries(given, aot.read_table())


def test_only_what_is_missing_or_older_is_compiled(table: Path) -> None:
    asked = ("--arch", "sm_80", "--pass", "fwd", "--bytes", "2", "--variant", "plain")
    every = missing(*asked)
    assert len(every) == 4
    assert not table.exists()
    rows = [resources(entry) for entry in every]
    aot.write_table(rows[:1])
    assert missing(*asked) == every[1:]
    aot.write_table([rows[2]])
    assert missing(*asked) == [every[1], every[3]], "rows are added to those that are there"
    aot.write_table([rows[1], rows[3]])
    assert missing(*asked) == []
    assert list(aot.read_table().values()) == rows, "in the order of entries"
    aot.write_table([rows[0]._replace(source="00000000"), rows[3]._replace(tile="16x16")])
    assert missing(*asked) == [every[0], every[3]]


def test_a_run_that_ends_early_leaves_its_rows(
    table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def some(chosen: list[aot.Entry], workers: int) -> object:
        yield from (resources(entry) for entry in chosen[: aot.WRITE_EVERY])
        raise KeyboardInterrupt

    monkeypatch.setattr(aot, "results", some)
    with pytest.raises(KeyboardInterrupt):
        aot.main(["--write", "--arch", "sm_80", "--bytes", "2"])
    assert len(aot.read_table()) == aot.WRITE_EVERY
    assert [path.name for path in table.parent.iterdir()] == [table.name]


def test_without_write_what_is_missing_is_a_fault(
    table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(aot, "results", lambda chosen, workers: map(resources, chosen))
    asked = ["--arch", "sm_80", "--pass", "decode", "--bytes", "2"]
    assert aot.main(asked) == 1
    assert "entries are not in" in capsys.readouterr().out
    assert not table.exists()
    assert aot.main(["--write", *asked]) == 0
    assert aot.main(asked) == 0


def test_only_device_code_changes_a_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "attention_decode.py"
    plain = Path(aot.attention_decode.__file__).read_text()
    before = aot.fingerprint.__wrapped__("decode")
    monkeypatch.setattr(aot.attention_decode, "__file__", str(copy))
    for text, same in (
        (plain, True),
        ("# a line of it\n\n" + plain.replace("\n\n", "\n    # more\n\n"), True),
        ("import sys\n" + plain.replace("def attention_decode(", "def decode_attention("), True),
        (plain.replace('"""The cache, ', '"""A '), True),
        (plain + "X = 1\n", False),
        (plain.replace("tl.cdiv(keys, MAX_PIECES)", "tl.cdiv(keys + 1, MAX_PIECES)"), False),
        (plain.replace("    page_size: int\n", "    page_size: float\n"), False),
    ):
        copy.write_text(text)
        assert (aot.fingerprint.__wrapped__("decode") == before) is same


def test_committed_tables_have_entries_that_exist_and_no_faults() -> None:
    keys = {aot.entry_key(entry) for entry in aot.entries()}
    for path in aot.TABLES.glob("*.csv"):
        rows = list(csv.DictReader(path.read_text().splitlines()))
        for made in map(aot.resources_of, rows):
            assert aot.key(made) in keys, path
            assert aot.faults(made, {}) == [], path


def test_the_page_is_as_the_tables_say() -> None:
    assert aot_docs.main(["--check"]) == 0


def test_the_page_is_written_from_the_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "docs" / "triton-resources"
    folder.mkdir(parents=True)
    for version, registers in (("3.9", 248), ("3.10", 250)):
        with (folder / f"{version}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow((*aot.Resources._fields[:-1], *aot.LOOP))
            other = GOOD._replace(arch="sm_80", spills=24, matrix="HMMA", shared=512)
            for row in (GOOD._replace(registers=registers), other):
                writer.writerow(aot.cells(row))
    page = tmp_path / "docs" / "triton.md"
    page.write_text("before\n")
    assert aot_docs.main([], tmp_path) == 2
    assert "lacks the marks" in capsys.readouterr().err
    page.write_text(f"before\n{aot_docs.BEGIN}old\n{aot_docs.END}after\n")
    assert aot_docs.main(["--check"], tmp_path) == 1
    assert "old" in page.read_text()
    assert aot_docs.main([], tmp_path) == 0
    assert aot_docs.main(["--check"], tmp_path) == 0
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "| 3.10 | sm_90 | 1 | 160 KB | HGMMA | 0 of 1 | 0 of 1 |" in text
    assert "| 3.9 | sm_80 | 1 | 0 KB | HMMA | 1 of 1 | 1 of 1 |" in text
    assert (
        "| fwd, bf16, 128 | 128x128, 8 w, 250 r, 160 KB |"
        " 128x128, 8 w, 248 r, 0 KB, spills 24 |" in text
    ), "of the newest Triton alone"

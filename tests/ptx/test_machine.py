"""The PTX machine: what lanes do together, memory, what is refused, schedules."""

from __future__ import annotations

import pytest
import torch

from .machine import LIBRARY, Fault, Program
from .snippets import run, text_of

pytestmark = pytest.mark.skipif(
    not LIBRARY.exists(), reason="the emulator, of which the machine is a part, is not built"
)


def unsigned(x: int) -> int:
    return x & 0xFFFFFFFF


# ---- Lanes together


def of_lanes(body: str, **options: int) -> list[int]:
    """What %r10 is in every lane."""
    out = torch.zeros(options.get("threads", 32), dtype=torch.int32)
    run(body + "mad.lo.u64 %d30, %d20, 4, %d0;\nst.global.b32 [%d30], %r10;", out, **options)
    return [unsigned(x) for x in out.tolist()]


def test_shuffles() -> None:
    lanes = range(32)
    assert of_lanes("shfl.sync.bfly.b32 %r10, %r0, 5, 31, -1;") == [n ^ 5 for n in lanes]
    assert of_lanes("shfl.sync.idx.b32 %r10, %r0, 7, 31, -1;") == [7] * 32
    assert of_lanes("shfl.sync.up.b32 %r10, %r0, 3, 0, -1;") == [
        n - 3 if n >= 3 else n for n in lanes
    ]
    half = "shfl.sync.down.b32 %r11|%p1, %r0, 3, 0x100F, -1;\nselp.b32 %r10, %r11, 99, %p1;"
    assert of_lanes(half) == [n + 3 if n % 16 < 13 else 99 for n in lanes]


def test_votes_and_reductions() -> None:
    odd = "and.b32 %r11, %r0, 1;\nsetp.ne.u32 %p1, %r11, 0;\n"
    assert of_lanes(odd + "vote.sync.ballot.b32 %r10, %p1, -1;") == [0xAAAAAAAA] * 32
    assert (
        of_lanes(odd + "vote.sync.any.pred %p2, !%p1, -1;\nselp.b32 %r10, 1, 0, %p2;") == [1] * 32
    )
    assert of_lanes(odd + "vote.sync.all.pred %p2, %p1, -1;\nselp.b32 %r10, 1, 0, %p2;") == [0] * 32
    assert of_lanes("redux.sync.add.s32 %r10, %r0, -1;") == [31 * 16] * 32
    assert of_lanes("sub.s32 %r11, %r0, 9;\nredux.sync.min.s32 %r10, %r11, -1;") == [2**32 - 9] * 32
    assert of_lanes(odd + "match.any.sync.b32 %r10, %r11, -1;") == [0x55555555, 0xAAAAAAAA] * 16
    assert of_lanes("activemask.b32 %r10;") == [2**32 - 1] * 32
    elected = of_lanes("elect.sync %r11|%p1, -1;\nselp.b32 %r10, 1, 0, %p1;")
    assert sorted(elected) == [0] * 31 + [1]


def test_divergence() -> None:
    """Loops of different lengths, and what lanes do after they meet again."""
    counted = of_lanes(
        """
        mov.b32 %r10, 0;
        $loop:
        add.s32 %r10, %r10, 2;
        setp.lt.s32 %p1, %r10, %r0;
        @%p1 bra $loop;
        bar.warp.sync -1;
        """
    )
    assert counted == [max(n + n % 2, 2) for n in range(32)]


def test_indexed_branch() -> None:
    targets = of_lanes(
        """
        and.b32 %r11, %r0, 3;
        table: .branchtargets $zero, $one, $other, $other;
        brx.idx %r11, table;
        $zero:
        mov.b32 %r10, 100;
        bra.uni $end;
        $one:
        mov.b32 %r10, 101;
        bra.uni $end;
        $other:
        add.s32 %r10, %r11, 5;
        $end:
        """
    )
    assert targets == [100, 101, 7, 8] * 8


def test_labels_belong_to_their_braces() -> None:
    once = """
        {
            .reg .b32 n;
            mov.b32 n, 0;
            again:
            add.s32 n, n, 1;
            add.s32 %r10, %r10, n;
            setp.lt.s32 %p1, n, 3;
            @%p1 bra again;
        }
    """
    assert of_lanes("mov.b32 %r10, 0;\n" + once + once) == [12] * 32


# ---- Memory


def test_loads_and_stores() -> None:
    x = torch.tensor([-1, 2, -3, 4], dtype=torch.int16)
    out = torch.zeros(4, dtype=torch.int32)
    run(
        """
        setp.ne.u32 %p1, %r0, 0;
        @%p1 bra $end;
        ld.global.v2.s16 {%r10, %r11}, [%d0];
        ld.global.L1::evict_last.u16 %r12, [%d0+4];
        ld.global.nc.s8 %r13, [%d0+6];
        st.global.v4.b32 [%d1], {%r10, %r11, %r12, %r13};
        $end:
        """,
        x, out,
    )  # fmt: skip
    assert out.tolist() == [-1, 2, 65533, 4]


def test_atomics() -> None:
    """Of all threads of two blocks."""
    total, most = torch.zeros(1, dtype=torch.int32), torch.zeros(1)
    run(
        """
        atom.global.add.u32 %r10, [%d0], 3;
        cvt.rn.f32.s32 %r11, %r0;
        red.global.add.f32 [%d1], %r11;
        """,
        total, most, threads=64, blocks=2,
    )  # fmt: skip
    assert total.item() == 3 * 128
    assert most.item() == 2 * sum(range(64))


def test_packing() -> None:
    assert (
        of_lanes("mov.b32 %r11, 0x12345678;\nmov.b32 {%h0, %h1}, %r11;\nmov.b32 %r10, {%h1, %h0};")
        == [0x56781234] * 32
    )
    assert of_lanes("mov.b64 %d40, {%r0, 7};\nmov.b64 {%r11, %r10}, %d40;") == [7] * 32


def test_runs_are_counted_by_line() -> None:
    body = "$loop:\nadd.s32 %r10, %r10, 1;\nsetp.lt.s32 %p1, %r10, 5;\n@%p1 bra $loop;"
    program = run("mov.b32 %r10, 0;\n" + body, threads=64)
    runs = dict(zip(program.lines, program.runs(), strict=True))
    assert runs["add.s32 %r10, %r10, 1;"] == 10
    assert runs["@%p1 bra $loop;"] == 8


UNKNOWN: dict[str, tuple[str, str]] = {
    "opcode": ("frobnicate.s32 %r10, %r0;", "frobnicate.s32: opcode is not known"),
    "modifier": ("min.relux.s32 %r10, %r0, %r0;", r"modifier .relux is not known"),
    "order": ("add.volatile.s32 %r10, %r0, %r0;", r"modifier .volatile is not known"),
    "type": ("add.e4m3 %r10, %r0, %r0;", "no type that is known"),
    "register": ("mov.b32 %r10, %nosuch;", "register %nosuch is not known"),
    "width": ("add.s32 %d10, %r0, %r0;", "another width"),
    "operands": ("add.s32 %r10, %r0;", "takes 3 operands, got 2"),
    "label": ("bra $nowhere;", "label \\$nowhere is not known"),
    "vector": ("ld.global.v4.b32 {%r10, %r11}, [%d0];", "vector of another size"),
    "shape": ("mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {%r1}, {%r1};", "needs one of"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_known_is_named_with_its_line(name: str) -> None:
    line, message = UNKNOWN[name]
    text = text_of(line, 0)
    number = text.split("\n").index(line) + 1
    with pytest.raises(Fault, match=message) as caught:
        Program(text)
    assert f"PTX line {number}: {line}" in str(caught.value)


def test_same_seed_same_results() -> None:
    """A schedule is its seed's: sums of atomics in another order differ in the last bits."""
    x = torch.randn(512)
    sums = {seed: [] for seed in range(6)}
    for seed in sums:
        for _ in range(2):
            out = torch.zeros(1)
            run(
                """
                mad.lo.s32 %r10, %r1, 64, %r0;
                mul.wide.u32 %d30, %r10, 4;
                add.s64 %d30, %d30, %d0;
                ld.global.f32 %r11, [%d30];
                red.global.add.f32 [%d1], %r11;
                """,
                x, out, threads=64, blocks=8, seed=seed,
            )  # fmt: skip
            sums[seed].append(out.item())
    assert all(first == second for first, second in sums.values())
    assert len({first for first, _ in sums.values()}) > 1

"""Asynchronous copies and mbarriers on the PTX machine."""

from __future__ import annotations

import pytest
import torch

from .machine import LIBRARY
from .snippets import MAKE_MAP, TMA_LOAD, maps, run, swizzled, words

pytestmark = pytest.mark.skipif(
    not LIBRARY.exists(), reason="the emulator, of which the machine is a part, is not built"
)


# ---- Asynchronous copies


def test_thread_copies_and_zero_fill() -> None:
    x, out = torch.arange(128.0), torch.zeros(128)
    for seed in range(4):
        run(
            """
            mad.lo.s32 %r20, %r0, 16, %r2;
            mad.lo.u64 %d30, %d20, 16, %d0;
            mov.b32 %r21, 16;
            setp.eq.u32 %p1, %r0, 3;
            selp.b32 %r21, 4, 16, %p1;
            cp.async.cg.shared.global.L2::128B [%r20], [%d30], 16, %r21;
            cp.async.commit_group;
            cp.async.wait_group 0;
            ld.shared.v4.b32 {%r10, %r11, %r12, %r13}, [%r20];
            mad.lo.u64 %d31, %d20, 16, %d1;
            st.global.v4.b32 [%d31], {%r10, %r11, %r12, %r13};
            """,
            x, out, shared=512, seed=seed,
        )  # fmt: skip
        expected = x.clone()
        expected[13:16] = 0
        assert torch.equal(out, expected)


@pytest.mark.parametrize("seed", range(6))
def test_tensor_maps(seed: int) -> None:
    """A box of 16 rows from row 4 on, of 12 that there are: swizzled, zeros beyond; and back."""
    x = torch.randn(12, 64, dtype=torch.bfloat16)
    y, room = torch.zeros(16 * 32, dtype=torch.int32), maps()
    copy = "\n".join(
        f"ld.shared.b32 %r30, [%r20+{128 * n}];\nst.global.b32 [%d31+{128 * n}], %r30;"
        for n in range(16)
    )
    run(
        MAKE_MAP.replace("ROWS", "12") + TMA_LOAD + "mad.lo.u64 %d31, %d20, 4, %d1;\n" + copy,
        x, y, room, shared=9000, seed=seed,
    )  # fmt: skip
    expected = torch.cat([x[4:], torch.zeros(8, 64, dtype=torch.bfloat16)])
    assert torch.equal(y, swizzled(expected))
    back = x.clone()
    copy = "\n".join(f"st.shared.b32 [%r20+{128 * n}], %r0;" for n in range(16))
    run(
        MAKE_MAP.replace("ROWS", "12") + copy +
        """
        fence.proxy.async.shared::cta;
        bar.warp.sync -1;
        @%p1 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%d2, {0, 4}], [%r2];
        cp.async.bulk.commit_group;
        cp.async.bulk.wait_group.read 0;
        """,
        back, y, room, shared=9000, seed=seed,
    )  # fmt: skip
    assert torch.equal(back[:4], x[:4])
    columns = torch.arange(32) ^ torch.arange(8)[:, None] * 4  # of the words of rows 4 to 11
    assert torch.equal(words(back[4:]).reshape(8, 32), columns.int())


@pytest.mark.parametrize("seed", range(6))
def test_mbarriers_order_warps(seed: int) -> None:
    """A producer and a consumer, four tiles through two places."""
    out = torch.zeros(4, 32, dtype=torch.int32)

    def wait(name: str, base: str, phase: str) -> str:
        return f"""
            {name}:
            mbarrier.try_wait.parity.shared::cta.b64 %p3, [{base}], {phase};
            @!%p3 bra {name};
        """

    run(
        f"""
        // full at 1024 and 1032, empty at 1040 and 1048
        setp.eq.u32 %p1, %r0, 0;
        @%p1 mbarrier.init.shared::cta.b64 [%r2+1024], 32;
        @%p1 mbarrier.init.shared::cta.b64 [%r2+1032], 32;
        @%p1 mbarrier.init.shared::cta.b64 [%r2+1040], 1;
        @%p1 mbarrier.init.shared::cta.b64 [%r2+1048], 1;
        bar.sync 0;
        mov.b32 %r10, 0;
        and.b32 %r11, %r0, 31;
        setp.ge.u32 %p2, %r0, 32;
        $loop:
        and.b32 %r12, %r10, 1;
        shr.u32 %r13, %r10, 1;
        xor.b32 %r14, %r13, 1;
        mad.lo.s32 %r15, %r12, 8, %r2;
        add.s32 %r16, %r15, 1024;
        add.s32 %r17, %r15, 1040;
        mad.lo.s32 %r18, %r12, 128, %r2;
        mad.lo.s32 %r18, %r11, 4, %r18;
        @%p2 bra $consumer;
        {wait("$empty", "%r17", "%r14")}
        mad.lo.s32 %r19, %r10, 100, %r11;
        st.shared.b32 [%r18], %r19;
        mbarrier.arrive.release.cta.shared::cta.b64 %d50, [%r16];
        bra.uni $next;
        $consumer:
        {wait("$full", "%r16", "%r13")}
        ld.shared.b32 %r19, [%r18];
        mad.lo.s32 %r20, %r10, 32, %r11;
        mul.wide.u32 %d30, %r20, 4;
        add.s64 %d30, %d30, %d0;
        st.global.b32 [%d30], %r19;
        bar.warp.sync -1;
        setp.eq.u32 %p4, %r11, 0;
        @%p4 mbarrier.arrive.shared::cta.b64 _, [%r17];
        $next:
        add.s32 %r10, %r10, 1;
        setp.lt.s32 %p5, %r10, 4;
        @%p5 bra $loop;
        """,
        out, threads=64, shared=1056, seed=seed,
    )  # fmt: skip
    assert torch.equal(out, torch.arange(4).int()[:, None] * 100 + torch.arange(32).int())

"""What the PTX machine has to report: each kernel passes as it is, and not without one line.

A line marked `!` is what the sound kernel has and the faulty one lacks; one marked `?` is what only
the faulty one has.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest
import torch

from .machine import LIBRARY, Fault
from .snippets import MAKE_MAP, TMA_LOAD, maps, run

pytestmark = pytest.mark.skipif(
    not LIBRARY.exists(), reason="the emulator, of which the machine is a part, is not built"
)
SEEDS = range(6)


class Kernel(NamedTuple):
    """A kernel, and what is said of it without its marked lines."""

    name: str
    message: str
    body: str
    threads: int = 32
    blocks: int = 1
    shared: int = 0


WAIT = """
    $wait:
    mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r2], 0;
    @!%p2 bra $wait;
"""
BULK_LOAD = "cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes"
GLOBAL = (
    Kernel(
        "misaligned load",
        "misaligned: address 0x[0-9a-f]+ is no multiple of 8 bytes",
        """
        ! ld.global.b64 %d30, [%d0+8];
        ? ld.global.b64 %d30, [%d0+4];
        """,
    ),
    Kernel(
        "beyond a tensor",
        "read of 4 bytes of global memory .*, 4 bytes past the end",
        """
        ! ld.global.b32 %r10, [%d0+1020];
        ? ld.global.b32 %r10, [%d0+1024];
        """,
    ),
    Kernel(
        "write to what is read only",
        "write to a tensor that is only read",
        """
        ! st.global.b32 [%d0], 1;
        ? st.global.b32 [%d1], 1;
        """,
    ),
    Kernel(
        "blocks write different values",
        "race between blocks: .* another block wrote another value",
        """
        ! mov.b32 %r10, 5;
        ? mov.b32 %r10, %r1;
        st.global.b32 [%d0], %r10;
        """,
        blocks=3,
    ),
    Kernel(
        "a block reads what another wrote",
        "race between blocks: .* is read, another block wrote it",
        """
        mul.wide.u32 %d30, %r1, 4;
        add.s64 %d30, %d30, %d0;
        st.global.b32 [%d30], %r1;
        ! ld.global.b32 %r10, [%d30];
        ? ld.global.b32 %r10, [%d0];
        """,
        blocks=3,
    ),
)
SHARED = (
    Kernel(
        "beyond shared memory",
        "shared address 1152 .* is outside",
        """
        ! ld.volatile.shared.b32 %r10, [%r2+124];
        ? ld.volatile.shared.b32 %r10, [%r2+128];
        """.replace("ld.volatile.shared.b32 %r10, [", "st.shared.b32 [").replace("];", "], 1;"),
        shared=128,
    ),
    Kernel(
        "never written",
        "shared byte 1028 is read and was never written",
        """
        st.shared.b32 [%r2], 1;
        ! st.shared.b32 [%r2+4], 1;
        bar.warp.sync -1;
        ld.shared.b32 %r10, [%r2+4];
        """,
        shared=128,
    ),
    Kernel(
        "warps race",
        "race: shared byte .* no barrier between",
        """
        mad.lo.s32 %r10, %r0, 4, %r2;
        st.shared.b32 [%r10], 0;
        bar.sync 0;
        add.s32 %r12, %r0, 1;
        st.shared.b32 [%r10], %r12;
        ! bar.sync 0;
        xor.b32 %r11, %r0, 32;
        mad.lo.s32 %r11, %r11, 4, %r2;
        ld.shared.b32 %r12, [%r11];
        """,
        threads=64,
        shared=256,
    ),
    Kernel(
        "warps race, write after read",
        "race: shared byte .* no barrier between",
        """
        mad.lo.s32 %r10, %r0, 4, %r2;
        st.shared.b32 [%r10], %r0;
        bar.sync 0;
        xor.b32 %r11, %r0, 32;
        mad.lo.s32 %r11, %r11, 4, %r2;
        ld.shared.b32 %r12, [%r11];
        ! bar.sync 0;
        add.s32 %r12, %r12, 100;
        st.shared.b32 [%r10], %r12;
        """,
        threads=64,
        shared=256,
    ),
    Kernel(
        "half of a word",
        "race: shared byte .* no barrier between",
        """
        shl.b32 %r10, %r0, 1;
        add.s32 %r10, %r10, %r2;
        cvt.u16.u32 %h1, %r0;
        st.shared.b16 [%r10], %h1;
        ! bar.warp.sync -1;
        xor.b32 %r11, %r10, 2;
        ld.shared.b16 %h2, [%r11];
        """,
        shared=64,
    ),
    Kernel(
        "lanes race",
        "race: shared byte .* no barrier between",
        """
        mad.lo.s32 %r10, %r0, 4, %r2;
        st.shared.b32 [%r10], %r0;
        ! bar.warp.sync -1;
        xor.b32 %r11, %r0, 1;
        mad.lo.s32 %r11, %r11, 4, %r2;
        ld.shared.b32 %r12, [%r11];
        """,
        shared=128,
    ),
    Kernel(
        "lanes race, write after read",
        "race: shared byte .* no barrier between",
        """
        // what ldmatrix reads, it reads for all lanes; what a lane reads, for that one
        mad.lo.s32 %r10, %r0, 16, %r2;
        st.shared.v4.b32 [%r10], {%r0, %r0, %r0, %r0};
        bar.warp.sync -1;
        xor.b32 %r11, %r10, 16;
        ! ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r12, %r13, %r14, %r15}, [%r11];
        ? ld.shared.v4.b32 {%r12, %r13, %r14, %r15}, [%r11];
        shfl.sync.bfly.b32 %r16, %r12, 1, 31, -1;
        st.shared.v4.b32 [%r10], {7, 7, 7, 7};
        """,
        shared=512,
    ),
    Kernel(
        "a lane's read beside a matrix's",
        "race: shared byte .* no barrier between",
        """
        mad.lo.s32 %r10, %r0, 16, %r2;
        st.shared.v4.b32 [%r10], {%r0, %r0, %r0, %r0};
        bar.warp.sync -1;
        ld.shared.b32 %r16, [%r10];
        ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r12, %r13, %r14, %r15}, [%r10];
        ? xor.b32 %r10, %r10, 16;
        st.shared.b32 [%r10], 7;
        """,
        shared=512,
    ),
    Kernel(
        "a matrix of rows that other lanes wrote",
        "race: shared byte .* no barrier between",
        """
        mad.lo.s32 %r10, %r0, 16, %r2;
        st.shared.v4.b32 [%r10], {%r0, %r0, %r0, %r0};
        ! bar.warp.sync -1;
        ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r12, %r13, %r14, %r15}, [%r10];
        """,
        shared=512,
    ),
    Kernel(
        "an arrival after a lane's read",
        "race: shared byte .* no barrier between",
        """
        // warp 0 reads, its first lane arrives; warp 1 waits and writes
        setp.eq.u32 %p1, %r0, 0;
        @%p1 mbarrier.init.shared::cta.b64 [%r2], 1;
        and.b32 %r10, %r0, 31;
        mad.lo.s32 %r10, %r10, 16, %r2;
        setp.ge.u32 %p3, %r0, 32;
        st.shared.v4.b32 [%r10+128], {1, 1, 1, 1};
        bar.sync 0;
        @%p3 bra $wait;
        ! ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r12, %r13, %r14, %r15}, [%r10+128];
        ? ld.shared.v4.b32 {%r12, %r13, %r14, %r15}, [%r10+128];
        @%p1 mbarrier.arrive.shared::cta.b64 _, [%r2];
        bra.uni $end;
        """
        + WAIT
        + "st.shared.v4.b32 [%r10+128], {2, 2, 2, 2};\n$end:",
        threads=64,
        shared=640,
    ),
    Kernel(
        "a barrier of the wrong warps",
        "race: shared byte .* no barrier between",
        """
        // warps 0, 1 share barrier 1, warps 2, 3 barrier 2; all read what the neighbour wrote
        mad.lo.s32 %r10, %r0, 4, %r2;
        st.shared.b32 [%r10], %r0;
        shr.u32 %r11, %r0, 6;
        ? and.b32 %r11, %r11, 0;
        ? shr.u32 %r12, %r0, 5;
        ? and.b32 %r11, %r12, 1;
        add.s32 %r11, %r11, 1;
        bar.sync %r11, 64;
        xor.b32 %r13, %r0, 32;
        mad.lo.s32 %r13, %r13, 4, %r2;
        ld.shared.b32 %r14, [%r13];
        """,
        threads=128,
        shared=512,
    ),
    Kernel(
        "a misaligned row of a matrix",
        "misaligned: address 0x[0-9a-f]+ is no multiple of 16 bytes",
        """
        mad.lo.s32 %r10, %r0, 16, %r2;
        st.shared.v4.b32 [%r10], {0, 0, 0, 0};
        bar.warp.sync -1;
        ! mad.lo.s32 %r10, %r0, 8, %r2;
        ! and.b32 %r10, %r10, 0xFFFFFFF0;
        ? mad.lo.s32 %r10, %r0, 8, %r2;
        ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r11, %r12, %r13, %r14}, [%r10];
        """,
        shared=512,
    ),
)
MEETINGS = (
    Kernel(
        "lanes that part before they meet",
        "lanes wait for one another at different instructions",
        """
        setp.lt.u32 %p1, %r0, 7;
        ? @%p1 bra $apart;
        bar.sync 0;
        bra.uni $end;
        $apart:
        bar.sync 0;
        $end:
        """,
    ),
    Kernel(
        "a barrier that one warp misses",
        "deadlock in block 0\n.*warp 0 waits at barrier 0, where 32 of 64 threads are",
        """
        setp.ge.u32 %p1, %r0, 32;
        ? @%p1 bra $other;
        bar.sync 0;
        bra.uni $end;
        $other:
        bar.sync 1;
        $end:
        """,
        threads=64,
    ),
    Kernel(
        "counts of a barrier that differ",
        "a barrier that others reached with another count",
        """
        shr.u32 %r10, %r0, 5;
        ? shl.b32 %r10, %r10, 5;
        ! mov.b32 %r10, 32;
        add.s32 %r10, %r10, 32;
        bar.sync 1, %r10;
        """,
        threads=64,
    ),
    Kernel(
        "a shuffle from a lane that is not there",
        "the mask names lanes that are not there|at different instructions",
        """
        setp.lt.u32 %p1, %r0, 16;
        ? @%p1 shfl.sync.bfly.b32 %r10, %r0, 1, 31, -1;
        ! shfl.sync.bfly.b32 %r10, %r0, 1, 31, -1;
        """,
    ),
    Kernel("a trap", "trap", "? trap;"),
)
COPIES = (
    Kernel(
        "cp.async not waited for",
        "while an asynchronous copy to it is not waited for",
        """
        mad.lo.s32 %r10, %r0, 4, %r2;
        mad.lo.u64 %d30, %d20, 4, %d0;
        cp.async.ca.shared.global [%r10], [%d30], 4;
        cp.async.commit_group;
        ! cp.async.wait_group 0;
        ? cp.async.wait_group 1;
        ld.shared.b32 %r11, [%r10];
        """,
        shared=128,
    ),
    Kernel(
        "cp.async not committed",
        "while an asynchronous copy to it is not waited for",
        """
        mad.lo.s32 %r10, %r0, 4, %r2;
        mad.lo.u64 %d30, %d20, 4, %d0;
        cp.async.ca.shared.global [%r10], [%d30], 4;
        ! cp.async.commit_group;
        cp.async.wait_group 0;
        ld.shared.b32 %r11, [%r10];
        """,
        shared=128,
    ),
    Kernel(
        "cp.async read by another warp",
        "race: shared byte .* no barrier between",
        """
        mad.lo.s32 %r10, %r0, 4, %r2;
        mad.lo.u64 %d30, %d20, 4, %d0;
        st.shared.b32 [%r10], 0;
        bar.sync 0;
        cp.async.ca.shared.global [%r10], [%d30], 4;
        cp.async.wait_all;
        ! bar.sync 0;
        xor.b32 %r11, %r0, 32;
        mad.lo.s32 %r11, %r11, 4, %r2;
        ld.shared.b32 %r12, [%r11];
        """,
        threads=64,
        shared=256,
    ),
    Kernel(
        "cp.async from an odd address",
        "misaligned: cp.async of 16 bytes",
        """
        mad.lo.s32 %r10, %r0, 16, %r2;
        mad.lo.u64 %d30, %d20, 16, %d0;
        ! cp.async.cg.shared.global [%r10], [%d30], 16;
        ? cp.async.cg.shared.global [%r10], [%d30+8], 16;
        """,
        shared=512,
    ),
)
MBARRIERS = (
    Kernel(
        "no mbarrier",
        "there is no mbarrier at shared address",
        """
        setp.eq.u32 %p1, %r0, 0;
        ! @%p1 mbarrier.init.shared::cta.b64 [%r2], 32;
        bar.warp.sync -1;
        mbarrier.arrive.shared::cta.b64 _, [%r2];
        """,
        shared=64,
    ),
    Kernel(
        "an mbarrier that is not shown to others",
        "is used with no barrier after its initialisation",
        """
        setp.eq.u32 %p1, %r0, 0;
        @%p1 mbarrier.init.shared::cta.b64 [%r2], 64;
        ! bar.sync 0;
        ? bar.warp.sync -1;
        mbarrier.arrive.shared::cta.b64 _, [%r2];
        """,
        threads=64,
        shared=64,
    ),
    Kernel(
        "the wrong phase",
        "deadlock in block 0\n.*waits for the mbarrier at shared address 1024, phase 1",
        """
        setp.eq.u32 %p1, %r0, 0;
        @%p1 mbarrier.init.shared::cta.b64 [%r2], 32;
        bar.warp.sync -1;
        mbarrier.arrive.shared::cta.b64 _, [%r2];
        """
        + WAIT.replace("%r2], 0", "%r2], %r10").replace(
            "$wait:", "! mov.b32 %r10, 0;\n? mov.b32 %r10, 1;\n$wait:"
        ),
        shared=64,
    ),
    Kernel(
        "too many arrivals",
        "more arrivals than an mbarrier has left",
        """
        setp.eq.u32 %p1, %r0, 0;
        @%p1 mbarrier.init.shared::cta.b64 [%r2], 2;
        @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], 16;
        bar.warp.sync -1;
        @%p1 mbarrier.arrive.shared::cta.b64 _, [%r2];
        ? @%p1 mbarrier.arrive.shared::cta.b64 _, [%r2];
        """,
        shared=64,
    ),
    Kernel(
        "an mbarrier read as data",
        "is an mbarrier's",
        """
        setp.eq.u32 %p1, %r0, 0;
        @%p1 mbarrier.init.shared::cta.b64 [%r2], 2;
        ! @%p1 mbarrier.inval.shared::cta.b64 [%r2];
        @%p1 st.shared.b64 [%r2], %d20;
        """,
        shared=64,
    ),
    Kernel(
        "an arrival before the lanes have met",
        "race: shared byte .* no barrier between",
        """
        // warp 0 writes, its first lane arrives; warp 1 waits and reads
        setp.eq.u32 %p1, %r0, 0;
        @%p1 mbarrier.init.shared::cta.b64 [%r2], 1;
        bar.sync 0;
        mad.lo.s32 %r10, %r0, 4, %r2;
        setp.ge.u32 %p3, %r0, 32;
        @%p3 bra $wait;
        st.shared.b32 [%r10+128], %r0;
        ! bar.warp.sync -1;
        @%p1 mbarrier.arrive.shared::cta.b64 _, [%r2];
        bra.uni $end;
        """
        + WAIT
        + "ld.shared.b32 %r11, [%r10];\n$end:",
        threads=64,
        shared=384,
    ),
)
BULK = (
    Kernel(
        "no fence before a bulk copy reads",
        "read by the asynchronous proxy, .* with no fence.proxy.async between",
        """
        mad.lo.s32 %r10, %r0, 4, %r2;
        st.shared.b32 [%r10], %r0;
        ! fence.proxy.async.shared::cta;
        bar.warp.sync -1;
        setp.eq.u32 %p1, %r0, 0;
        @%p1 cp.async.bulk.global.shared::cta.bulk_group [%d0], [%r2], 128;
        cp.async.bulk.commit_group;
        cp.async.bulk.wait_group 0;
        """,
        shared=128,
    ),
    Kernel(
        "written while a bulk copy reads",
        "is written while an asynchronous instruction reads it",
        """
        mad.lo.s32 %r10, %r0, 4, %r2;
        st.shared.b32 [%r10], %r0;
        fence.proxy.async.shared::cta;
        bar.warp.sync -1;
        setp.eq.u32 %p1, %r0, 0;
        @%p1 cp.async.bulk.global.shared::cta.bulk_group [%d0], [%r2], 128;
        cp.async.bulk.commit_group;
        ! cp.async.bulk.wait_group.read 0;
        ! bar.warp.sync -1;
        st.shared.b32 [%r10], 77;
        cp.async.bulk.wait_group 0;
        """,
        shared=128,
    ),
    Kernel(
        "a bulk copy that the block does not wait for",
        "ends with a bulk copy that still reads",
        """
        mad.lo.s32 %r10, %r0, 4, %r2;
        st.shared.b32 [%r10], %r0;
        fence.proxy.async.shared::cta;
        bar.warp.sync -1;
        setp.eq.u32 %p1, %r0, 0;
        @%p1 cp.async.bulk.global.shared::cta.bulk_group [%d0], [%r2], 128;
        cp.async.bulk.commit_group;
        ! cp.async.bulk.wait_group.read 0;
        """,
        shared=128,
    ),
    Kernel(
        "a bulk load of odd bytes",
        "misaligned: a bulk copy",
        """
        setp.eq.u32 %p1, %r0, 0;
        @%p1 mbarrier.init.shared::cta.b64 [%r2], 1;
        @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], 32;
        ! mov.b32 %r10, 32;
        ? mov.b32 %r10, 24;
        @%p1 LOAD [%r2+128], [%d0], %r10, [%r2];
        bar.warp.sync -1;
        """
        + WAIT,
        shared=256,
    ),
    Kernel(
        "fewer bytes than are expected",
        "deadlock in block 0\n.*lacks 0 of 1 arrivals and 32 bytes",
        """
        setp.eq.u32 %p1, %r0, 0;
        @%p1 mbarrier.init.shared::cta.b64 [%r2], 1;
        ! @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], 32;
        ? @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], 64;
        @%p1 LOAD [%r2+128], [%d0], 32, [%r2];
        bar.warp.sync -1;
        """
        + WAIT,
        shared=256,
    ),
    Kernel(
        "a bulk load that is not waited for",
        "while an asynchronous copy to it is not waited for|an asynchronous copy wrote it",
        """
        setp.eq.u32 %p1, %r0, 0;
        @%p1 mbarrier.init.shared::cta.b64 [%r2], 1;
        @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], 32;
        @%p1 LOAD [%r2+128], [%d0], 32, [%r2];
        bar.warp.sync -1;
        ? bra.uni $read;
        """
        + WAIT
        + "$read:\nld.shared.b32 %r10, [%r2+128];",
        shared=256,
    ),
)
# Four warps: A (128 rows of 16 bytes) and B (16 rows) without a swizzle, m64n8k16.
WGMMA_HEAD = """
    mad.lo.s32 %r10, %r0, 16, %r2;
    st.shared.v4.b32 [%r10], {0x3F803F80, 0x3F803F80, 0x3F803F80, 0x3F803F80};
    st.shared.v4.b32 [%r10+2048], {0x3F803F80, 0x3F803F80, 0x3F803F80, 0x3F803F80};
    fence.proxy.async.shared::cta;
    bar.sync 0;
    shr.u32 %r11, %r2, 4;
    cvt.u64.u32 %d40, %r11;
    or.b64 %d40, %d40, 0x1000080000;
    mov.b32 %r20, 0;
    mov.b32 %r21, 0;
    mov.b32 %r22, 0;
    mov.b32 %r23, 0;
    mov.b32 %r30, 0x3F803F80;
"""
WGMMA = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r20, %r21, %r22, %r23}, "
WAIT_WGMMA = "wgmma.wait_group.sync.aligned 0;"
PRODUCTS = (
    Kernel(
        "accumulators before the wait",
        "an accumulator is used while its wgmma is not waited for",
        f"""{WGMMA_HEAD}
        wgmma.fence.sync.aligned;
        {WGMMA} %d40, %d40, 1, 1, 1, 0, 0;
        wgmma.commit_group.sync.aligned;
        ! {WAIT_WGMMA}
        add.f32 %r24, %r20, %r21;
        {WAIT_WGMMA}
        """,
    ),
    Kernel(
        "operands in registers before the wait",
        "a register is written while a wgmma that is not waited for reads it",
        f"""{WGMMA_HEAD}
        wgmma.fence.sync.aligned;
        {WGMMA} {{%r30, %r30, %r30, %r30}}, %d40, 1, 1, 1, 0;
        wgmma.commit_group.sync.aligned;
        ! {WAIT_WGMMA}
        add.s32 %r30, %r30, 1;
        {WAIT_WGMMA}
        """,
    ),
    Kernel(
        "registers without wgmma.fence",
        "a wgmma uses registers that were written with no wgmma.fence after",
        f"""{WGMMA_HEAD}
        add.s32 %r30, %r30, 1;
        ! wgmma.fence.sync.aligned;
        {WGMMA} {{%r30, %r30, %r30, %r30}}, %d40, 1, 1, 1, 0;
        wgmma.commit_group.sync.aligned;
        {WAIT_WGMMA}
        """,
    ),
    Kernel(
        "shared operands before the wait",
        "is written while an asynchronous instruction reads it|another warp|race",
        f"""{WGMMA_HEAD}
        wgmma.fence.sync.aligned;
        {WGMMA} %d40, %d40, 1, 1, 1, 0, 0;
        wgmma.commit_group.sync.aligned;
        ! {WAIT_WGMMA}
        ! bar.sync 0;
        st.shared.b32 [%r10], 7;
        {WAIT_WGMMA}
        """,
    ),
    Kernel(
        "shared operands without a proxy fence",
        "read by the asynchronous proxy, .* with no fence.proxy.async between",
        WGMMA_HEAD.replace("fence.proxy", "! fence.proxy")
        + f"""
        wgmma.fence.sync.aligned;
        {WGMMA} %d40, %d40, 1, 1, 1, 0, 0;
        wgmma.commit_group.sync.aligned;
        {WAIT_WGMMA}
        """,
    ),
    Kernel(
        "no wait at all",
        "the warp ends with a wgmma that is not waited for",
        f"""{WGMMA_HEAD}
        wgmma.fence.sync.aligned;
        {WGMMA} %d40, %d40, 1, 1, 1, 0, 0;
        wgmma.commit_group.sync.aligned;
        ! {WAIT_WGMMA}
        """,
    ),
)
PRODUCTS = tuple(k._replace(threads=128, shared=4096) for k in PRODUCTS)
SOUND_MAP = MAKE_MAP.replace("ROWS", "24") + TMA_LOAD
MAPS = (
    Kernel(
        "a map that is not fenced",
        "a tensor map is used with no fence.proxy.tensormap",
        SOUND_MAP.replace("fence.proxy.tensormap", "! fence.proxy.tensormap"),
    ),
    Kernel(
        "a map without one of its fields",
        "a tensor map of which some fields were never set",
        SOUND_MAP.replace("tensormap.replace.tile.swizzle", "! tensormap.replace.tile.swizzle"),
    ),
    Kernel(
        "a box beyond its swizzle",
        "a tensor map's box is wider than its swizzle",
        "! mov.b32 %r25, 3;\n? mov.b32 %r25, 2;\n" + SOUND_MAP.replace("40], 3;", "40], %r25;"),
    ),
    Kernel(
        "a tile at an odd place",
        "misaligned: a tile in shared memory",
        "! add.s32 %r25, %r2, 1024;\n? add.s32 %r25, %r2, 64;\n"
        + SOUND_MAP.replace("[%r2], [%d2", "[%r25], [%d2"),
    ),
)
MAPS = tuple(k._replace(shared=9000) for k in MAPS)
KERNELS = (*GLOBAL, *SHARED, *MEETINGS, *COPIES, *MBARRIERS, *BULK, *PRODUCTS, *MAPS)


def variant(body: str, faulty: bool) -> str:
    """The lines of the sound kernel, or of the faulty one."""
    left_out, kept = ("!", "?") if faulty else ("?", "!")
    lines = [line.strip() for line in body.split("\n")]
    lines = [line.replace("LOAD", BULK_LOAD) for line in lines]
    return "\n".join(x.removeprefix(kept).strip() for x in lines if not x.startswith(left_out))


def execute(kernel: Kernel, faulty: bool, seed: int, options: int = 1) -> None:
    data = torch.zeros(1024, dtype=torch.uint8)
    tensors = (torch.arange(256, dtype=torch.float32), torch.zeros(8))
    if kernel in MAPS:
        tensors = (torch.zeros(24, 64, dtype=torch.bfloat16), data, maps())
    run(
        variant(kernel.body, faulty), *tensors, threads=kernel.threads, blocks=kernel.blocks,
        shared=kernel.shared, seed=seed, options=options, read_only=[1],
    )  # fmt: skip


def fault_of(kernel: Kernel, seed: int) -> str:
    """What is found in the faulty kernel, or nothing."""
    try:
        execute(kernel, faulty=True, seed=seed)
    except Fault as fault:
        return str(fault)
    return ""


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_faults(kernel: Kernel) -> None:
    for seed in SEEDS:
        execute(kernel, faulty=False, seed=seed)
    found = [fault_of(kernel, seed) for seed in SEEDS]  # of one mistake several things may be said
    assert any(re.search(kernel.message, x, re.DOTALL) for x in found), found


def test_a_race_names_both_lines() -> None:
    kernel = next(k for k in KERNELS if k.name == "warps race")
    found = next(x for x in (fault_of(kernel, seed) for seed in SEEDS) if x.startswith("race"))
    _, now, before = found.split("\n")
    assert re.search(r"block 0, warp \d, PTX line \d+: (ld|st)\.shared\.b32", now)
    assert re.search(r"before: PTX line \d+: (ld|st)\.shared\.b32", before)


def test_without_checks_only_addresses_are() -> None:
    """Races pass; what is out of bounds does not."""
    race = next(k for k in KERNELS if k.name == "warps race")
    execute(race, faulty=True, seed=0, options=0)
    beyond = next(k for k in KERNELS if k.name == "beyond a tensor")
    with pytest.raises(Fault):
        execute(beyond, faulty=True, seed=0, options=0)

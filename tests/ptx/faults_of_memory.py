"""Faults of memory, and of lanes and warps that meet; each kernel with its sound twin.

A line marked `!` is what the sound kernel has and the faulty one lacks; one marked `?` is what only
the faulty one has.
"""

from __future__ import annotations

from typing import NamedTuple


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
MEMORY = (*GLOBAL, *SHARED, *MEETINGS)

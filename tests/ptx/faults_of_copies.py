"""Faults of copies and mbarriers, of wgmma and tensor maps; each kernel with its sound twin.

A line marked `!` is what the sound kernel has and the faulty one lacks; one marked `?` is what only
the faulty one has.
"""

from __future__ import annotations

from .faults_of_memory import WAIT, Kernel
from .snippets import MAKE_MAP, TMA_LOAD

BULK_LOAD = "cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes"
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
ASYNCHRONOUS = (*COPIES, *MBARRIERS, *BULK, *PRODUCTS, *MAPS)

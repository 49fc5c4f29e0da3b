"""Faults of blocks that hand data to each other; each kernel with its sound twin.

Lines are marked as in `faults_of_memory`. Blocks add to 32 sums one after the other: the first to
begin writes them.
"""

from __future__ import annotations

from .faults_of_memory import Kernel

TURNS = """
    setp.eq.u32 %p1, %r0, 0;
    @%p1 atom.global.add.u32 %r10, [%d0], 1;
    shfl.sync.idx.b32 %r10, %r10, 0, 31, -1;
    mad.lo.u64 %d30, %d20, 4, %d0;
    mov.b32 %r12, 0;
    setp.eq.u32 %p2, %r10, 0;
    @%p2 bra $add;
    @!%p1 bra $there;
    $wait:
    ld.acquire.gpu.global.b32 %r11, [%d0+4];
    setp.ne.u32 %p3, %r11, %r10;
    @%p3 bra $wait;
    $there:
    bar.warp.sync -1;
    ld.global.cg.b32 %r12, [%d30+128];
    $add:
    add.u32 %r12, %r12, 1;
    st.global.cg.b32 [%d30+128], %r12;
    bar.warp.sync -1; // all have added
    add.u32 %r10, %r10, 1;
    @%p1 st.release.gpu.global.b32 [%d0+4], %r10;
"""
RELEASE, ACQUIRE = "@%p1 st.release.gpu", "ld.acquire.gpu"
FENCES = TURNS.replace(RELEASE, "@%p1 membar.gl;\n@%p1 st.volatile").replace(
    f"{ACQUIRE}.global.b32 %r11, [%d0+4];",
    "ld.volatile.global.b32 %r11, [%d0+4];\nfence.acq_rel.gpu;",
)
READ = "race between blocks: .* is read, another block wrote it"
WRITTEN = "race between blocks: .* is (read|written), another block wrote"


def of_turns(name: str, message: str, old: str, new: str, body: str = TURNS) -> Kernel:
    """Has one line of a hand-over replaced."""
    line = next(line for line in body.split("\n") if old in line)
    marked = f"! {line}\n? {line.replace(old, new)}" if new else f"! {line}"
    return Kernel(name, message, body.replace(line, marked, 1), blocks=7)


BLOCKS = (
    of_turns("no wait for a block's turn", WRITTEN, "@%p3 bra $wait;", ""),
    of_turns("a turn passed on with nothing", READ, RELEASE, "@%p1 st.relaxed.gpu"),
    of_turns("a turn passed on within a block", READ, RELEASE, "@%p1 st.release.cta"),
    of_turns("a turn taken with nothing", READ, ACQUIRE, "ld.relaxed.gpu"),
    of_turns("a turn that is an ordinary read", READ, f"{ACQUIRE}.global", "ld.global"),
    of_turns("no fence before a turn is passed", READ, "@%p1 membar.gl;", "", FENCES),
    of_turns("no fence after a turn is taken", READ, "fence.acq_rel.gpu;", "", FENCES),
    of_turns("a fence within a block", READ, "membar.gl", "membar.cta", FENCES),
    of_turns("other lanes have not waited", READ, "bar.warp.sync -1;", ""),
    of_turns("other lanes may not have added", READ, "bar.warp.sync -1; // all", ""),
    of_turns(
        "waits for blocks that may not have begun",
        "deadlock of blocks block .* waits for other blocks",
        "shfl.sync.idx.b32 %r10, %r10, 0, 31, -1;",
        "mov.b32 %r10, %r1;",
    ),
)

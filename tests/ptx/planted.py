"""Faults to plant in compiled kernels, and what has to be said of each.

Patterns are of what Triton 3.9 and nvcc 13 emit; one that occurs nowhere is an error.
"""

from __future__ import annotations

from typing import NamedTuple

FORWARD = "attention_fwd_kernel"
KEYS = {"triton": "dkdv_kernel", "cuda": "attention_bwd_fused_kernel"}
HOPPER = "attention_fwd_hopper_kernel"
WRONG = "beyond the accuracy rule"
RACE = "race: shared byte"
BLOCKS_RACE = "race between blocks: global memory"
UNDER_WAY = "while an asynchronous copy to it is not waited for"
UNORDERED = f"{RACE}|{UNDER_WAY}|is read and was never written"
DESCRIPTOR = 4611686293305294848  # of a matrix for wgmma, but for the address: 128-byte swizzle


class Planted(NamedTuple):
    """What is replaced in a kernel's PTX, wherever it is, and what is said of that."""

    name: str
    backend: str
    arch: str
    kernel: str
    pattern: str
    replacement: str
    said: str


def of_products(backend: str, arch: str, bar: str, wait: str) -> tuple[Planted, ...]:
    """The same faults in what two compilers make of mma and cp.async."""
    rows = (
        ("no wait for copies", r"cp\.async\.wait_group\s+\d;", "", UNDER_WAY),
        ("no barrier after copies", rf"({wait})([^;]*?)bar\.sync\s+0;", r"\1\2", UNORDERED),
        ("no barrier before copies", bar, "", UNORDERED),
        ("rows of v for columns", r"(ldmatrix\S+x4)\.trans", r"\1", WRONG),
        (
            "a's registers swapped",
            r"(mma\.sync\S+ \{[^}]*\}, \{\s*)(%r\d+), (%r\d+)",
            r"\1\3, \2",
            WRONG,
        ),
        (
            "b's registers swapped",
            r"(mma\.sync\S+ \{[^}]*\}, \{[^}]*\}, \{\s*)(%r\d+), (%r\d+)",
            r"\1\3, \2",
            WRONG,
        ),
        ("the diagonal left out", r"setp\.le\.s32", "setp.lt.s32", WRONG),
        ("exp for exp2", r"ex2\.approx\.ftz\.f32(\s+%\w+), (%\w+);", r"mov.b32\1, \2;", WRONG),
    )
    return tuple(Planted(name, backend, arch, FORWARD, *rest) for name, *rest in rows)


TRITON_BARRIER = r"bar\.sync\s+0;(?=(?:\n(?!.*(?:ldmatrix|bar\.)).*){1,12}?\n\s*cp\.async\.cg)"
TRITON = (
    *of_products("triton", "80", TRITON_BARRIER, r"cp\.async\.wait_group\s+2;"),
    Planted(
        "one group of copies too many under way",
        "triton", "80", FORWARD,
        r"cp\.async\.wait_group\s+2;", "cp.async.wait_group 3;", UNDER_WAY,
    ),
    Planted(
        "copies that do not fill up with zeros",
        "triton", "80", FORWARD,
        r"(cp\.async\.cg\S+ .*, 0x10), %r\d+;", r"\1;", "read of .* past the end",
    ),
    Planted(
        "another lane's maximum",
        "triton", "80", FORWARD,
        r"(shfl\.sync\.bfly\.b32\s+%r\d+, %r\d+), 2,", r"\1, 1,", f"{WRONG}|{RACE}",
    ),
    Planted(
        "another swizzle",
        "triton", "80", FORWARD,
        r"(xor\.b32\s+%r\d+, %r\d+), 16;", r"\1, 48;", WRONG,
    ),
    Planted(
        "rows stored that are not there",
        "triton", "80", FORWARD,
        r"@%p\d+ (st\.global\.v4)", r"\1", "race between blocks|write of .* past the end",
    ),
    Planted(
        "no barrier in the backward",
        "triton", "80", KEYS["triton"],
        r"bar\.sync\s+0;", "", UNORDERED,
    ),
    Planted(
        "no wait for wgmma",
        "triton", "90", FORWARD,
        r"wgmma\.wait_group\S+\s+\d;", "", "used while its wgmma is not waited for",
    ),
    Planted(
        "no wgmma.fence",
        "triton", "90", FORWARD,
        r"wgmma\.fence\S+;", "", r"written with no wgmma\.fence after",
    ),
    Planted(
        "no commit of wgmma",
        "triton", "90", FORWARD,
        r"wgmma\.commit_group\S+;", "", "used while its wgmma is not waited for",
    ),
    Planted(
        "no proxy fence",
        "triton", "90", FORWARD,
        r"fence\.proxy\.async\S+;", "", "read by the asynchronous proxy",
    ),
    Planted(
        "a descriptor of another swizzle",
        "triton", "90", FORWARD,
        str(DESCRIPTOR), str(DESCRIPTOR ^ 3 << 62), f"{WRONG}|{UNORDERED}",
    ),
    Planted(
        "a descriptor of another stride",
        "triton", "90", FORWARD,
        str(DESCRIPTOR), str(DESCRIPTOR + (1 << 32)),
        f"{WRONG}|{UNORDERED}",
    ),
)  # fmt: skip
CUDA_BARRIER = r"bar\.sync\s+0;(?=(?:\n(?!.*(?:ldmatrix|bar\.)).*){1,90}?\n\s*cp\.async\.cg)"
CUDA = tuple(
    planted
    for arch in ("80", "90")
    for planted in (
        *of_products("cuda", arch, CUDA_BARRIER, r"cp\.async\.wait_group\s+0;"),
        Planted(
            "a matrix's rows that other lanes are writing",
            "cuda", arch, FORWARD,
            r"bar\.warp\.sync\s+\S+;", "", RACE,
        ),
        Planted(
            "no barrier in the backward",
            "cuda", arch, KEYS["cuda"],
            r"bar\.sync\s+0;", "", UNORDERED,
        ),
        Planted(
            "a block's turn is passed on with nothing",
            "cuda", arch, KEYS["cuda"],
            r"st\.release\.gpu", "st.relaxed.gpu", BLOCKS_RACE,
        ),
        Planted(
            "a block's turn is taken with nothing",
            "cuda", arch, KEYS["cuda"],
            r"ld\.acquire\.gpu", "ld.relaxed.gpu", BLOCKS_RACE,
        ),
        Planted(
            "no wait for a block's turn",
            "cuda", arch, KEYS["cuda"],
            r"(ld\.acquire[^@]*)@%p\d+ bra[^;]*;", r"\1", f"{BLOCKS_RACE}|{WRONG}",
        ),
        Planted(
            "a turn passed on while other lanes still add",
            "cuda", arch, KEYS["cuda"],
            r"bar\.warp\.sync\s+\S+;([^:]*st\.release)", r"\1", BLOCKS_RACE,
        ),
    )
)  # fmt: skip
REGISTER = r"%r\d+"
WAIT = rf"(mbarrier\.try_wait\S+ complete, \[{REGISTER}\]), {REGISTER};"
GLUON = (
    ("no mbarrier waited for", WAIT, "setp.eq.u32 complete, 0, 0;", UNORDERED),
    ("waits for the phase before", WAIT, r"\1, 1;", f"{UNORDERED}|deadlock"),
    (
        "fewer bytes expected than come",
        rf"(expect_tx\S+ _, \[{REGISTER}\]), 16384", r"\1, 8192", f"{UNORDERED}|deadlock",
    ),
    (
        "more bytes expected than come",
        rf"(expect_tx\S+ _, \[{REGISTER}\]), 8192", r"\1, 16384", "deadlock.* bytes",
    ),
    (
        "free after one consumer",
        rf"(mbarrier\.init\S+ \[{REGISTER}\]), 2;", r"\1, 1;",
        f"{RACE}|more arrivals|is written while|deadlock",
    ),
    (
        "no arrival when a tile is free",
        rf"@%p\d+ mbarrier\.arrive\.shared::cta\S+ _, \[{REGISTER}\];", "", "deadlock",
    ),
    (
        "no barrier of the consumers",
        r"bar\.sync\s+0, 128;", "", "after its initialisation|race|never set|there is no mbarrier",
    ),
    (
        "no proxy fence before the output is sent",
        r"(stmatrix[^;]*;[^;]*)fence\.proxy\.async\S+;", r"\1", "read by the asynchronous proxy",
    ),
    (
        "no barrier before the output is sent",
        r"(stmatrix[^;]*;[^;]*fence\S+;[^;]*?)bar\.sync\s+\d, 128;", r"\1",
        "race|read by the asynchronous proxy",
    ),
    (
        "the output's copy not waited for",
        r"\n\s*cp\.async\.bulk\.wait_group\.read\s+0;", "", "still reads shared memory",
    ),
    (
        "a map not fenced",
        r"@%p\d+ fence\.proxy\.tensormap\S+acquire.*;", "", "a tensor map is used with no fence",
    ),
    (
        "a map with fewer rows",
        rf"(global_dim\S+ \[ %rd\d+ \+ 0 \], 0x1), {REGISTER};", r"\1, 100;", WRONG,
    ),
    (
        "a map without a swizzle",
        r"(swizzle_mode\S+ \[ %rd\d+ \+ 0 \]), 0x3;", r"\1, 0x0;", f"{WRONG}|swizzle",
    ),
    ("wgmma not waited for", r"wgmma\.wait_group\S+ 1;", "", "used while its wgmma"),
    ("no wgmma.fence", r"wgmma\.fence\S+;", "", r"written with no wgmma\.fence after"),
    ("no commit of wgmma", r"wgmma\.commit_group\S+;", "", "used while its wgmma"),
    (
        "the accumulator begun anew",
        r"(wgmma\S+m64n64k16\S+ .*), %p\d+, 1, 1, 1;", r"\1, 0, 1, 1, 1;", WRONG,
    ),
)  # fmt: skip
PLANTED = (*TRITON, *CUDA, *(Planted(x, "gluon", "90", HOPPER, *rest) for x, *rest in GLUON))

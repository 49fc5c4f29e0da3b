"""Small PTX kernels for the tests of the machine: a text around a few lines, tensors in and out."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .machine import Program, Range

CHECKS, EXACT, ROUNDED_SUMS = 1, 2, 4  # of ptx_launch's options
HEAD = """
.version 9.0
.target sm_90a
.address_size 64
.extern .shared .align 1024 .b8 smem[];
.visible .entry kernel({parameters})
{{
    .reg .pred %p<32>;
    .reg .b16 %h<32>;
    .reg .b32 %r<512>;
    .reg .b64 %d<64>;
    mov.u32 %r0, %tid.x;
    mov.u32 %r1, %ctaid.x;
{loads}
    cvt.u64.u32 %d20, %r0;
    mov.u32 %r2, smem;
    mov.u64 %d21, smem;
{body}
    ret;
}}
"""


def text_of(body: str, tensors: int) -> str:
    """A kernel.

    Tensors' addresses are in %d0 and on, the thread in %r0 and %d20, the block in %r1, shared
    memory's address in %r2 and %d21.
    """
    parameters = ", ".join(f".param .u64 a{n}" for n in range(tensors))
    loads = "\n".join(f"    ld.param.u64 %d{n}, [a{n}];" for n in range(tensors))
    return HEAD.format(parameters=parameters, loads=loads, body=body)


def run(
    body: str,
    *tensors: torch.Tensor,
    threads: int = 32,
    blocks: int = 1,
    shared: int = 0,
    seed: int = 0,
    options: int = CHECKS,
    read_only: Sequence[int] = (),
) -> Program:
    """Execute a kernel on these tensors."""
    program = Program(text_of(body, len(tensors)))
    parameters = b"".join(x.data_ptr().to_bytes(8, "little") for x in tensors)
    ranges = [Range.of(x, n not in read_only) for n, x in enumerate(tensors)]
    program.launch((blocks, 1, 1), threads, shared, parameters, ranges, seed, options)
    return program


REGISTERS = {1: "%h", 2: "%h", 4: "%r", 8: "%d"}


def elementwise(
    opcode: str, *sources: torch.Tensor, into: torch.dtype, more: str = "", options: int = CHECKS
) -> torch.Tensor:
    """``opcode d, a, b, more`` of every element; at most 32 of them."""
    count = sources[0].numel()
    out = torch.zeros(count, dtype=into)
    lines = []
    for n, x in enumerate(sources):
        size = x.element_size()
        register = f"{REGISTERS[size]}{24 + n}"
        lines += [
            f"mad.lo.u64 %d30, %d20, {size}, %d{n};",
            f"ld.global.b{8 * size} {register}, [%d30];",
        ]
    operands = [f"{REGISTERS[x.element_size()]}{24 + n}" for n, x in enumerate(sources)]
    size = out.element_size()
    result = f"{REGISTERS[size]}20" if size < 8 else "%d31"
    listed = ", ".join([result, *operands, *([more] if more else [])])
    lines += [
        f"{opcode} {listed};",
        f"mad.lo.u64 %d30, %d20, {size}, %d{len(sources)};",
        f"st.global.b{8 * size} [%d30], {result};",
    ]
    run("\n".join(lines), *sources, out, threads=count, options=options)
    return out


def words(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.int32).flatten()


def swizzled(x: torch.Tensor) -> torch.Tensor:
    """Rows of 128 bytes as a 128-byte swizzle lays them out: 16 bytes at a time, by the row."""
    chunks = x.contiguous().view(torch.int32).reshape(-1, 8, 4)
    rows = torch.arange(chunks.shape[0])[:, None] % 8
    out = torch.empty_like(chunks)
    out.scatter_(1, (torch.arange(8)[None] ^ rows)[..., None].expand(-1, -1, 4), chunks)
    return out.flatten()


MAKE_MAP = """
        // a map in shared memory at 4096, of %d0: rows of 128 bytes, ROWS of them
        setp.eq.u32 %p1, %r0, 0;
        mad.lo.s32 %r20, %r0, 4, %r2;
        st.shared.b32 [%r20+4096], 0;
        bar.warp.sync -1;
        cvt.u64.u32 %d40, %r2;
        add.s64 %d40, %d40, 4096;
        @!%p1 bra $made;
        tensormap.replace.tile.global_address.shared::cta.b1024.b64 [%d40], %d0;
        tensormap.replace.tile.rank.shared::cta.b1024.b32 [%d40], 1;
        tensormap.replace.tile.box_dim.shared::cta.b1024.b32 [%d40], 0, 64;
        tensormap.replace.tile.box_dim.shared::cta.b1024.b32 [%d40], 1, 16;
        tensormap.replace.tile.global_dim.shared::cta.b1024.b32 [%d40], 0, 64;
        tensormap.replace.tile.global_dim.shared::cta.b1024.b32 [%d40], 1, ROWS;
        tensormap.replace.tile.global_stride.shared::cta.b1024.b64 [%d40], 0, 128;
        tensormap.replace.tile.element_stride.shared::cta.b1024.b32 [%d40], 0, 1;
        tensormap.replace.tile.element_stride.shared::cta.b1024.b32 [%d40], 1, 1;
        tensormap.replace.tile.elemtype.shared::cta.b1024.b32 [%d40], 10;
        tensormap.replace.tile.interleave_layout.shared::cta.b1024.b32 [%d40], 0;
        tensormap.replace.tile.swizzle_mode.shared::cta.b1024.b32 [%d40], 3;
        tensormap.replace.tile.fill_mode.shared::cta.b1024.b32 [%d40], 0;
        $made:
        bar.warp.sync -1;
        PUBLISH [%d2], [%d40], 128;
        fence.proxy.tensormap::generic.acquire.gpu [%d2], 128;
""".replace(
    "PUBLISH",
    "tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned",
)
TMA_LOAD = """
        add.s32 %r22, %r2, 8192;
        @%p1 mbarrier.init.shared::cta.b64 [%r22], 1;
        fence.proxy.async.shared::cta;
        bar.warp.sync -1;
        @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r22], 2048;
        @%p1 LOAD [%r2], [%d2, {0, 4}], [%r22];
        $wait:
        mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r22], 0;
        @!%p2 bra $wait;
""".replace("LOAD", "cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes")


def maps() -> torch.Tensor:
    """Room for a tensor map, aligned as it must be."""
    room = torch.zeros(256, dtype=torch.uint8)
    start = -room.data_ptr() % 128
    return room[start : start + 128]

"""ldmatrix, stmatrix, mma and wgmma on the PTX machine, held to torch's products."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from .machine import LIBRARY
from .snippets import CHECKS, ROUNDED_SUMS, run, swizzled, words

pytestmark = pytest.mark.skipif(
    not LIBRARY.exists(), reason="the emulator, of which the machine is a part, is not built"
)


# ---- Matrices


def mma(
    shape: tuple[int, int], opcode: str, a: torch.Tensor, b: torch.Tensor, options: int = CHECKS
) -> torch.Tensor:
    """One product of a [16, K] and b [K, 8], registers filled as the ISA draws the fragments."""
    na, nb = shape
    out, per = torch.zeros(16, 8), 4 // a.element_size()

    def registers(element: Callable[[int, int, int], float], count: int) -> torch.Tensor:
        values = [
            [[element(lane, r, part) for part in range(per)] for r in range(count)]
            for lane in range(32)
        ]
        return torch.tensor(values, dtype=a.dtype).view(torch.int32).contiguous()

    def a_element(lane: int, r: int, half: int) -> float:
        return a[lane // 4 + r % 2 * 8, lane % 4 * per + half + r // 2 * 4 * per].item()

    def b_element(lane: int, r: int, half: int) -> float:
        return b[lane % 4 * per + half + r * 4 * per, lane // 4].item()

    def load(base: int, count: int, tensor: int) -> str:
        lines = (f"ld.global.b32 %r{base + r}, [%d{tensor}+{4 * r}];" for r in range(count))
        return "\n".join(lines)

    def listed(base: int, count: int) -> str:
        return "{" + ", ".join(f"%r{base + r}" for r in range(count)) + "}"

    fa, fb = registers(a_element, na), registers(b_element, nb)
    operands = f"{listed(10, na)}, {listed(20, nb)}, {{%r30, %r30, %r30, %r30}}"
    run(
        f"""
        mad.lo.u64 %d30, %d20, {4 * na}, %d0;
        mov.b64 %d0, %d30;
        mad.lo.u64 %d30, %d20, {4 * nb}, %d1;
        mov.b64 %d1, %d30;
        {load(10, na, 0)}
        {load(20, nb, 1)}
        mov.b32 %r30, 0f3F800000;
        {opcode} {{%r40, %r41, %r42, %r43}}, {operands};
        shr.u32 %r50, %r0, 2;
        and.b32 %r51, %r0, 3;
        mad.lo.s32 %r52, %r50, 8, %r51;
        add.s32 %r52, %r52, %r51;
        cvt.u64.u32 %d31, %r52;
        mad.lo.u64 %d32, %d31, 4, %d2;
        st.global.v2.b32 [%d32], {{%r40, %r41}};
        st.global.v2.b32 [%d32+256], {{%r42, %r43}};
        """,
        fa, fb, out, options=options,
    )  # fmt: skip
    return out


@pytest.mark.parametrize(
    ("opcode", "K", "dtype", "shape"),
    [
        ("m16n8k16.row.col.f32.bf16.bf16.f32", 16, torch.bfloat16, (4, 2)),
        ("m16n8k16.row.col.f32.f16.f16.f32", 16, torch.float16, (4, 2)),
        ("m16n8k8.row.col.f32.f16.f16.f32", 8, torch.float16, (2, 1)),
        ("m16n8k8.row.col.f32.tf32.tf32.f32", 8, torch.float32, (4, 2)),
        ("m16n8k4.row.col.f32.tf32.tf32.f32", 4, torch.float32, (2, 1)),
    ],
)
def test_mma(opcode: str, K: int, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(K)
    a = torch.randint(-8, 9, (16, K), generator=generator).to(dtype)
    b = torch.randint(-8, 9, (K, 8), generator=generator).to(dtype)
    found = mma(shape, f"mma.sync.aligned.{opcode}", a, b)
    assert torch.equal(found, 1 + a.float() @ b.float())


def test_sums_of_mma() -> None:
    """Tensor cores drop what does not fit beside the accumulator; rounded sums keep the nearest."""
    a, b = torch.zeros(16, 16, dtype=torch.bfloat16), torch.zeros(16, 8, dtype=torch.bfloat16)
    a[:, 0], b[0] = 2.0**-12, 1.75 * 2.0**-12  # 1 + 0.875 of a unit in the last place
    opcode = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
    assert mma((4, 2), opcode, a, b).unique().tolist() == [1.0]
    nearest = mma((4, 2), opcode, a, b, options=CHECKS + ROUNDED_SUMS)
    assert nearest.unique().tolist() == [1 + 2.0**-23]


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_in_shared_memory(transposed: bool) -> None:
    """Rows laid down by stmatrix, transposed or not, and taken up by ldmatrix."""
    out = torch.zeros(32, 4, dtype=torch.int32)
    trans = ".trans" if transposed else ""
    run(
        f"""
        mad.lo.s32 %r20, %r0, 16, %r2;
        mul.lo.s32 %r10, %r0, 0x20002;
        add.s32 %r10, %r10, 0x10000;
        add.s32 %r11, %r10, 0x1000100;
        add.s32 %r12, %r10, 0x2000200;
        add.s32 %r13, %r10, 0x3000300;
        stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r20], {{%r10, %r11, %r12, %r13}};
        bar.warp.sync -1;
        ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r14, %r15, %r16, %r17}}, [%r20];
        mad.lo.u64 %d30, %d20, 16, %d0;
        st.global.v4.b32 [%d30], {{%r14, %r15, %r16, %r17}};
        """,
        out, shared=512,
    )  # fmt: skip
    halves = out.view(torch.int16).reshape(8, 4, 4, 2)  # row, column pair, matrix, half
    whole = halves.permute(2, 0, 1, 3).reshape(4, 8, 8)
    expected = torch.arange(64).reshape(8, 8) + 256 * torch.arange(4)[:, None, None]
    assert torch.equal(whole.long(), expected.mT if transposed else expected)


def wgmma_body(N: int, K: int, dtype: str, more: str, b_at: int, step: int) -> str:
    """128 threads fill shared memory from %d0 (%r10 words) and multiply, K / 16 times."""
    registers = ", ".join(f"%r{100 + n}" for n in range(N // 2))
    zeros = "\n".join(f"mov.b32 %r{100 + n}, 0;" for n in range(N // 2))
    products = "\n".join(
        f"add.s64 %d42, %d40, {n * step >> 4};\nadd.s64 %d43, %d41, {n * step >> 4};\n"
        f"wgmma.mma_async.sync.aligned.m64n{N}{dtype} {{{registers}}}, %d42, %d43, 1, 1, 1{more};"
        for n in range(K)
    )
    stores = "\n".join(f"st.global.b32 [%d30+{4 * n}], %r{100 + n};" for n in range(N // 2))
    return f"""
        mov.b32 %r12, %r0;
        $fill:
        mul.wide.u32 %d31, %r12, 4;
        add.s64 %d32, %d31, %d0;
        ld.global.b32 %r13, [%d32];
        mad.lo.s32 %r14, %r12, 4, %r2;
        st.shared.b32 [%r14], %r13;
        add.s32 %r12, %r12, 128;
        setp.lt.s32 %p1, %r12, WORDS;
        @%p1 bra $fill;
        fence.proxy.async.shared::cta;
        bar.sync 0;
        {zeros}
        shr.u32 %r15, %r2, 4;
        cvt.u64.u32 %d40, %r15;
        or.b64 %d40, %d40, DESCRIPTOR;
        add.s64 %d41, %d40, {b_at >> 4};
        wgmma.fence.sync.aligned;
        {products}
        wgmma.commit_group.sync.aligned;
        wgmma.wait_group.sync.aligned 0;
        mad.lo.u64 %d30, %d20, {2 * N}, %d1;
        {stores}
    """


def accumulators(out: torch.Tensor, N: int) -> torch.Tensor:
    """[64, N] of [128, N / 2] registers."""
    found = torch.zeros(64, N)
    for thread in range(128):
        for n in range(N // 2):
            row = thread // 32 * 16 + thread % 32 // 4 + n // 2 % 2 * 8
            found[row, n // 4 * 8 + thread % 4 * 2 + n % 2] = out[thread, n]
    return found


@pytest.mark.parametrize("seed", range(3))
def test_wgmma(seed: int) -> None:
    """bf16, both operands in shared memory with a 128-byte swizzle, K = 64."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randint(-4, 5, (n, 64), generator=generator).to(torch.bfloat16) for n in (64, 16))
    data = torch.cat([swizzled(a), swizzled(b)])
    descriptor = 1 << 62 | (1024 >> 4) << 32 | 1 << 16
    body = wgmma_body(16, 4, "k16.f32.bf16.bf16", ", 0, 0", 64 * 128, 32)
    body = body.replace("WORDS", str(len(data))).replace("DESCRIPTOR", str(descriptor))
    out = torch.zeros(128, 8)
    run(body, data, out, threads=128, shared=80 * 128, seed=seed)
    assert torch.equal(accumulators(out, 16), a.float() @ b.float().T)


def test_wgmma_tf32() -> None:
    """Without a swizzle, K = 8: blocks of 8 rows of 16 bytes."""
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randint(-4, 5, (n, 8), generator=generator).float() for n in (64, 8))

    def blocks(x: torch.Tensor) -> torch.Tensor:  # [row block, k half, 8 rows, 4]
        return words(x.reshape(-1, 8, 2, 4).permute(0, 2, 1, 3))

    data = torch.cat([blocks(a), blocks(b)])
    descriptor = (256 >> 4) << 32 | (128 >> 4) << 16
    body = wgmma_body(8, 1, "k8.f32.tf32.tf32", "", 64 * 32, 0)
    body = body.replace("WORDS", str(len(data))).replace("DESCRIPTOR", str(descriptor))
    out = torch.zeros(128, 4)
    run(body, data, out, threads=128, shared=72 * 32)
    assert torch.equal(accumulators(out, 8), a @ b.T)

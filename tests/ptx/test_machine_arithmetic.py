"""What the PTX machine computes, an opcode at a time, held to Python's own arithmetic."""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch

from .machine import LIBRARY
from .snippets import CHECKS, EXACT, elementwise, run

pytestmark = pytest.mark.skipif(
    not LIBRARY.exists(), reason="the emulator, of which the machine is a part, is not built"
)
INTEGERS = {16: torch.int16, 32: torch.int32, 64: torch.int64}


def signed(x: int, bits: int) -> int:
    """The value of an integer's lower bits."""
    x &= (1 << bits) - 1
    return x - (1 << bits) if x >> (bits - 1) else x


def unsigned(x: int, bits: int) -> int:
    return x & ((1 << bits) - 1)


def integers(bits: int, seed: int) -> torch.Tensor:
    """32 integers, the extreme ones among them."""
    drawn = random.Random(seed)
    edges = [0, 1, -1, 2, -2, 1 << (bits - 2), -(1 << (bits - 1)), (1 << (bits - 1)) - 1]
    rest = [signed(drawn.getrandbits(drawn.randint(1, bits)), bits) for _ in range(24)]
    chosen = edges + rest
    drawn.shuffle(chosen)
    return torch.tensor(chosen, dtype=INTEGERS[bits])


def truncated(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def field(a: int, place: int, bits: int, sign: bool) -> int:
    place, bits = place & 255, bits & 255
    if not bits:
        return 0
    top = min(place + bits - 1, 31)
    have = unsigned(a, 32) >> place & ((1 << bits) - 1) if place < 32 else 0
    filled = sign and unsigned(a, 32) >> top & 1
    width = max(top - place + 1, 0)
    return have | (-1 << width if filled else 0)


def permuted(a: int, b: int, selector: int) -> int:
    both = (unsigned(a, 32) | unsigned(b, 32) << 32).to_bytes(8, "little")
    out = 0
    for k in range(4):
        n = selector >> 4 * k & 15
        byte = both[n & 7]
        out |= (255 * (byte >> 7) if n & 8 else byte) << 8 * k
    return out


Row = tuple[str, int, int, Callable[..., int]]
INTEGER_ROWS: tuple[Row, ...] = (  # opcode, bits of sources, of the result, what it is
    ("add.s32", 32, 32, lambda a, b: a + b),
    ("add.sat.s32", 32, 32, lambda a, b: max(-(1 << 31), min((1 << 31) - 1, a + b))),
    ("sub.sat.s32", 32, 32, lambda a, b: max(-(1 << 31), min((1 << 31) - 1, a - b))),
    ("add.s64", 64, 64, lambda a, b: a + b),
    ("sub.s16", 16, 16, lambda a, b: a - b),
    ("mul.lo.s32", 32, 32, lambda a, b: a * b),
    ("mul.lo.s64", 64, 64, lambda a, b: a * b),
    ("mul.hi.s32", 32, 32, lambda a, b: a * b >> 32),
    ("mul.hi.u32", 32, 32, lambda a, b: unsigned(a, 32) * unsigned(b, 32) >> 32),
    ("mul.hi.u64", 64, 64, lambda a, b: unsigned(a, 64) * unsigned(b, 64) >> 64),
    ("mul.wide.s32", 32, 64, lambda a, b: a * b),
    ("mul.wide.u16", 16, 32, lambda a, b: unsigned(a, 16) * unsigned(b, 16)),
    ("mad.lo.s32", 32, 32, lambda a, b, c: a * b + c),
    ("mad.hi.u32", 32, 32, lambda a, b, c: (unsigned(a, 32) * unsigned(b, 32) >> 32) + c),
    ("div.s32", 32, 32, lambda a, b: truncated(a, b) if b else -1),
    ("div.u32", 32, 32, lambda a, b: unsigned(a, 32) // unsigned(b, 32) if b else -1),
    ("div.s64", 64, 64, lambda a, b: truncated(a, b) if b else -1),
    ("rem.s32", 32, 32, lambda a, b: a - b * truncated(a, b) if b else a),
    ("rem.u64", 64, 64, lambda a, b: unsigned(a, 64) % unsigned(b, 64) if b else a),
    ("min.s32", 32, 32, min),
    ("max.u32", 32, 32, lambda a, b: max(unsigned(a, 32), unsigned(b, 32))),
    ("max.s16", 16, 16, max),
    ("min.relu.s32", 32, 32, lambda a, b: max(min(a, b), 0)),
    ("neg.s32", 32, 32, lambda a: -a),
    ("abs.s32", 32, 32, abs),
    ("sad.s32", 32, 32, lambda a, b, c: c + abs(a - b)),
    ("and.b32", 32, 32, lambda a, b: a & b),
    ("or.b64", 64, 64, lambda a, b: a | b),
    ("xor.b16", 16, 16, lambda a, b: a ^ b),
    ("not.b32", 32, 32, lambda a: ~a),
    ("shl.b32", 32, 32, lambda a, b: a << unsigned(b, 32) if unsigned(b, 32) < 32 else 0),
    ("shr.s32", 32, 32, lambda a, b: a >> min(unsigned(b, 32), 32)),
    ("shr.u32", 32, 32, lambda a, b: unsigned(a, 32) >> min(unsigned(b, 32), 32)),
    ("bfe.u32", 32, 32, lambda a, b, c: field(a, b, c, sign=False)),
    ("bfe.s32", 32, 32, lambda a, b, c: field(a, b, c, sign=True)),
    ("popc.b32", 32, 32, lambda a: unsigned(a, 32).bit_count()),
    ("popc.b64", 64, 32, lambda a: unsigned(a, 64).bit_count()),
    ("clz.b32", 32, 32, lambda a: 32 - unsigned(a, 32).bit_length()),
    ("clz.b64", 64, 32, lambda a: 64 - unsigned(a, 64).bit_length()),
    ("bfind.u32", 32, 32, lambda a: unsigned(a, 32).bit_length() - 1),
    ("bfind.s32", 32, 32, lambda a: unsigned(a if a >= 0 else ~a, 32).bit_length() - 1),
    ("brev.b32", 32, 32, lambda a: int(f"{unsigned(a, 32):032b}"[::-1], 2)),
    ("prmt.b32", 32, 32, lambda a, b, c: permuted(a, b, unsigned(c, 16))),
    ("cvt.s64.s32", 32, 64, lambda a: a),
    ("cvt.u64.u32", 32, 64, lambda a: unsigned(a, 32)),
    ("cvt.u32.u64", 64, 32, lambda a: a),
    ("cvt.s32.s8", 32, 32, lambda a: signed(a, 8)),
    ("cvt.u16.u32", 32, 16, lambda a: a),
    ("cvt.sat.u16.s32", 32, 16, lambda a: max(0, min(65535, a))),
)


@pytest.mark.parametrize("row", INTEGER_ROWS, ids=lambda row: row[0])
def test_integers(row: Row) -> None:
    opcode, bits, result, expected = row
    count = expected.__code__.co_argcount if hasattr(expected, "__code__") else 2
    count = 1 if expected is abs else count
    sources = [integers(bits, seed) for seed in range(count)]
    if opcode.startswith(("bfe", "shl", "shr")):
        sources[1:] = [x % 40 for x in sources[1:]]
    found = elementwise(opcode, *sources, into=INTEGERS[result])
    wanted = [
        signed(int(expected(*x)), result) for x in zip(*(s.tolist() for s in sources), strict=True)
    ]
    assert found.tolist() == wanted


def test_fields_and_tables() -> None:
    a, b, c = (integers(32, seed) for seed in range(3))
    found = elementwise("lop3.b32", a, b, c, into=torch.int32, more="0xE8")  # the majority
    assert torch.equal(found, (a & b) | (a & c) | (b & c))
    shifted = elementwise("shf.l.wrap.b32", a, b, into=torch.int32, more="5")
    assert shifted.tolist() == [
        signed(y << 5 | unsigned(x, 32) >> 27, 32)
        for x, y in zip(a.tolist(), b.tolist(), strict=True)
    ]
    found = elementwise("bfi.b32", a, b, into=torch.int32, more="4, 8")
    assert torch.equal(found, (b & ~0xFF0) | (a << 4 & 0xFF0))
    whole = elementwise("mad.wide.u32", a, b, into=torch.int64, more="%d20")
    assert whole.tolist() == [
        signed(unsigned(x, 32) * unsigned(y, 32) + n, 64)
        for n, (x, y) in enumerate(zip(a.tolist(), b.tolist(), strict=True))
    ]


def test_carries() -> None:
    """A sum of 64 bits, by halves, and a difference."""
    a, b = integers(64, 1), integers(64, 2)
    for first, second, expected in (("add", "addc", a + b), ("sub", "subc", a - b)):
        out = torch.zeros_like(a)
        run(
            f"""
            mad.lo.u64 %d30, %d20, 8, %d0;
            ld.global.v2.u32 {{%r10, %r11}}, [%d30];
            mad.lo.u64 %d30, %d20, 8, %d1;
            ld.global.v2.u32 {{%r12, %r13}}, [%d30];
            {first}.cc.u32 %r14, %r10, %r12;
            {second}.u32 %r15, %r11, %r13;
            mad.lo.u64 %d30, %d20, 8, %d2;
            st.global.v2.u32 [%d30], {{%r14, %r15}};
            """,
            a, b, out,
        )  # fmt: skip
        assert torch.equal(out, expected)


# ---- Floats


def floats(seed: int, low: float = -60, high: float = 60) -> torch.Tensor:
    """32 floats of all sizes, with what is special."""
    drawn = random.Random(seed)
    special = [0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, 1e-40, -3e-39]
    rest = [
        drawn.choice((-1, 1)) * drawn.uniform(1, 2) * 2 ** drawn.uniform(low, high)
        for _ in range(24)
    ]
    chosen = special + rest
    drawn.shuffle(chosen)
    return torch.tensor(chosen, dtype=torch.float32)


def neighbours(x: Fraction) -> tuple[Fraction, Fraction]:
    """The floats below and above."""
    if not x:
        return x, x
    exponent = max(math.floor(math.log2(abs(x))) - 23, -149)
    while abs(x) / Fraction(2) ** exponent >= 1 << 24:
        exponent += 1
    while abs(x) / Fraction(2) ** exponent < 1 << 23 and exponent > -149:
        exponent -= 1
    unit = Fraction(2) ** exponent
    return math.floor(x / unit) * unit, math.ceil(x / unit) * unit


def rounded(x: Fraction, mode: str) -> float:
    """To fp32; for results that are neither tiny nor infinite."""
    below, above = neighbours(x)
    if mode == "rm":
        return float(below)
    if mode == "rp":
        return float(above)
    if mode == "rz":
        return float(below if x > 0 else above)
    if x - below != above - x:
        return float(below if x - below < above - x else above)
    return float(below) if struct.unpack("i", struct.pack("f", below))[0] % 2 == 0 else float(above)


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("opcode", ["add", "mul", "fma"])
def test_roundings(opcode: str, mode: str) -> None:
    drawn = random.Random(mode)
    columns = [
        torch.tensor([drawn.uniform(-2, 2) * 2.0 ** drawn.randint(-12, 12) for _ in range(32)])
        for _ in range(3)
    ]
    sources = columns[: 3 if opcode == "fma" else 2]
    found = elementwise(f"{opcode}.{mode}.f32", *sources, into=torch.float32)
    exact = {"add": lambda a, b: a + b, "mul": lambda a, b: a * b, "fma": lambda a, b, c: a * b + c}
    rows = zip(*(map(Fraction, x.tolist()) for x in sources), strict=True)
    assert found.tolist() == [rounded(exact[opcode](*row), mode) for row in rows]


def flushed(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x.abs() < 2.0**-126, torch.copysign(torch.zeros_like(x), x), x)


FLOAT_ROWS: tuple[tuple[str, int, Callable[..., torch.Tensor]], ...] = (
    ("add.f32", 2, lambda a, b: a + b),
    ("sub.rn.f32", 2, lambda a, b: a - b),
    ("mul.ftz.f32", 2, lambda a, b: flushed(flushed(a) * flushed(b))),
    ("add.sat.f32", 2, lambda a, b: torch.nan_to_num((a + b).clamp(0, 1), 0.0)),
    ("div.rn.f32", 2, lambda a, b: a / b),
    ("sqrt.rn.f32", 1, lambda a: a.double().sqrt().float()),
    ("rcp.rn.f32", 1, lambda a: 1 / a),
    ("neg.f32", 1, lambda a: -a),
    ("abs.ftz.f32", 1, lambda a: flushed(a).abs()),
    ("min.f32", 2, torch.fmin),
    ("max.f32", 2, torch.fmax),
    ("max.NaN.f32", 2, torch.maximum),
    ("copysign.f32", 2, lambda a, b: torch.copysign(b, a)),
    ("cvt.rzi.s32.f32", 1, lambda a: saturated(a.double().trunc())),
    ("cvt.rmi.s32.f32", 1, lambda a: saturated(a.double().floor())),
    ("cvt.rni.f32.f32", 1, lambda a: a.double().round().float()),
    ("cvt.rn.bf16.f32", 1, lambda a: a.to(torch.bfloat16)),
    ("cvt.rn.f16.f32", 1, lambda a: a.to(torch.float16)),
    ("cvt.f64.f32", 1, lambda a: a.double()),
)


def saturated(x: torch.Tensor) -> torch.Tensor:
    return torch.nan_to_num(x, 0.0).clamp(-(2**31), 2**31 - 1).to(torch.int32)


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Bit for bit; any NaN is like any other."""
    nan = expected != expected
    kind = INTEGERS[8 * found.element_size()]
    return bool(
        ((found != found) == nan).all()
        and torch.equal(found.view(kind)[~nan], expected.view(kind)[~nan])
    )


@pytest.mark.parametrize("row", FLOAT_ROWS, ids=lambda row: row[0])
def test_floats(row: tuple[str, int, Callable[..., torch.Tensor]]) -> None:
    opcode, count, expected = row
    for seed in range(4):
        sources = [floats(10 * seed + n) for n in range(count)]
        wanted = expected(*sources)
        assert same(elementwise(opcode, *sources, into=wanted.dtype), wanted)


@pytest.mark.parametrize("name", ["bf16", "f16"])
def test_halves(name: str) -> None:
    """In pairs and alone."""
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16}[name]
    a, b, c = (floats(seed, -9, 9).to(dtype) for seed in range(3))
    rows = {
        "add.rn": (a.double() + b.double()).to(dtype),
        "mul.rn": (a.float() * b.float()).to(dtype),
        "fma.rn": (a.double() * b.double() + c.double()).to(dtype),
        "max": torch.fmax(a.float(), b.float()).to(dtype),
        "min.NaN": torch.minimum(a, b),
        "neg": -a,
    }  # fmt: skip
    for opcode, expected in rows.items():
        sources = (a,) if opcode == "neg" else (a, b, c) if opcode == "fma.rn" else (a, b)
        assert same(elementwise(f"{opcode}.{name}", *sources, into=dtype), expected), opcode
        pairs = [x.view(torch.int32) for x in sources]
        found = elementwise(f"{opcode}.{name}x2", *pairs, into=torch.int32)
        assert same(found.view(dtype), expected), opcode
    high, low = floats(7), floats(8)
    found = elementwise(f"cvt.rn.{name}x2.f32", high, low, into=torch.int32).view(dtype)
    assert same(found, torch.stack([low, high], 1).to(dtype).flatten())


def test_tf32() -> None:
    """cvt.rna: to nearest, ties away from zero, ten bits of mantissa."""
    x = torch.tensor([1 + 2.0**-11, 1 + 2.0**-12, -1 - 2.0**-11, 3.0, 1 + 3 * 2.0**-11])
    found = elementwise("cvt.rna.tf32.f32", x, into=torch.int32).view(torch.float32)
    assert found.tolist() == [1 + 2.0**-10, 1.0, -1 - 2.0**-10, 3.0, 1 + 2.0**-9]


def ulp(x: float) -> float:
    return 2.0 ** (max(math.frexp(x)[1] - 1, -126) - 23)


APPROXIMATIONS: tuple[
    tuple[str, Callable[[float], float], Callable[[float, float], float]], ...
] = (
    ("ex2.approx.ftz.f32", lambda x: 2.0**x, lambda x, y: 2 * ulp(y)),
    ("lg2.approx.f32", math.log2, lambda x, y: 2**-22 if 0.5 < x < 2 else abs(y) * 2**-22),
    ("rcp.approx.ftz.f32", lambda x: 1 / x, lambda x, y: ulp(y)),
    ("sqrt.approx.f32", math.sqrt, lambda x, y: y * 2**-23),
    ("rsqrt.approx.f32", lambda x: 1 / math.sqrt(x), lambda x, y: y * 2**-22.9),
    ("sin.approx.f32", math.sin, lambda x, y: 2**-20.5 if x <= 2 * math.pi else 2**-14.7),
    ("cos.approx.f32", math.cos, lambda x, y: 2**-20.5 if x <= 2 * math.pi else 2**-14.7),
    ("tanh.approx.f32", math.tanh, lambda x, y: abs(y) * 2**-11),
)


@pytest.mark.parametrize("row", APPROXIMATIONS, ids=lambda row: row[0])
def test_approximations(row: tuple[str, Callable, Callable]) -> None:
    """Off, but by no more than the PTX ISA says; not at all if so asked; the same every time."""
    opcode, value, bound = row
    drawn = random.Random(3)
    x = torch.tensor([drawn.uniform(1, 2) * 2.0 ** drawn.randint(-3, 5) for _ in range(32)])
    found = elementwise(opcode, x, into=torch.float32)
    exact = [value(y) for y in x.tolist()]
    errors = [abs(y - z) for y, z in zip(found.tolist(), exact, strict=True)]
    assert all(e <= bound(*xy) for e, *xy in zip(errors, x.tolist(), exact, strict=True))
    nearest = elementwise(opcode, x, into=torch.float32, options=CHECKS + EXACT)
    assert nearest.tolist() == torch.tensor(exact, dtype=torch.float64).float().tolist()
    assert not torch.equal(found, nearest)
    assert torch.equal(found, elementwise(opcode, x, into=torch.float32))


def test_exact_results_stay_exact() -> None:
    x = torch.tensor([0.0, 1.0, -3.0, 24.0])
    assert elementwise("ex2.approx.ftz.f32", x, into=torch.float32).tolist() == [
        1,
        2,
        0.125,
        2.0**24,
    ]
    y = torch.tensor([1.0, 0.25, 4.0, math.inf])
    assert elementwise("rcp.approx.ftz.f32", y, into=torch.float32).tolist() == [1, 4, 0.25, 0]


@pytest.mark.parametrize("opcode", ["div.full.f32", "div.approx.ftz.f32"])
def test_quotients(opcode: str) -> None:
    a, b = torch.rand(32) + 0.5, torch.rand(32) + 0.5
    found = elementwise(opcode, a, b, into=torch.float32).tolist()
    for x, y, z in zip(a.tolist(), b.tolist(), found, strict=True):
        assert abs(z - x / y) <= 2 * ulp(x / y)


COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a < b or a > b,
    "lt": lambda a, b: a < b,
    "leu": lambda a, b: not a > b,
    "neu": lambda a, b: a != b,
    "gtu": lambda a, b: not a <= b,
    "num": lambda a, b: a == a and b == b,
    "nan": lambda a, b: a != a or b != b,
}


@pytest.mark.parametrize("name", COMPARISONS)
def test_comparisons(name: str) -> None:
    """Of floats, with a second result, and joined with a predicate."""
    a, b = floats(1), floats(2)
    b[:4] = a[:4]
    out = torch.zeros(32, dtype=torch.int32)
    run(
        f"""
        mad.lo.u64 %d30, %d20, 4, %d0;
        ld.global.f32 %r10, [%d30];
        mad.lo.u64 %d30, %d20, 4, %d1;
        ld.global.f32 %r11, [%d30];
        setp.lt.u32 %p1, %r0, 16;
        setp.{name}.f32 %p2|%p3, %r10, %r11;
        setp.{name}.and.f32 %p4, %r10, %r11, !%p1;
        setp.{name}.xor.f32 %p5, %r10, %r11, %p1;
        selp.b32 %r12, 1, 0, %p2;
        selp.b32 %r13, 2, 0, %p3;
        selp.b32 %r14, 4, 0, %p4;
        selp.b32 %r15, 8, 0, %p5;
        add.s32 %r12, %r12, %r13;
        add.s32 %r12, %r12, %r14;
        add.s32 %r12, %r12, %r15;
        mad.lo.u64 %d30, %d20, 4, %d2;
        st.global.b32 [%d30], %r12;
        """,
        a, b, out,
    )  # fmt: skip
    wanted = []
    for n, (x, y) in enumerate(zip(a.tolist(), b.tolist(), strict=True)):
        p, q = COMPARISONS[name](x, y), n < 16
        wanted.append(p + 2 * (not p) + 4 * (p and not q) + 8 * (p != q))
    assert out.tolist() == wanted

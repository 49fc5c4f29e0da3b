"""Decoding: a few new queries over a cache, contiguous and paged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pytest
import torch
from accuracy import check
from cases import DTYPES, bf16, fp32
from dense import Cotangents, Problem
from torch import Tensor

import attnfast
from attnfast.options import Inputs, Options

PAGE = 16


@dataclass(frozen=True)
class Case:
    """A call of `decode_attention`: lengths are those of the cache's entries, S its capacity."""

    name: str
    lengths: tuple[int, ...] = (129, 300, 64)
    H: int = 4
    H_kv: int = 2
    T: int = 1
    S: int = 320
    D: int = 64
    D_v: int = 64
    dtype: torch.dtype = fp32
    scale: float | None = None
    window: tuple[int | None, int | None] | None = None
    softcap: float | None = None
    alibi: str = ""
    sinks: bool = False
    bias: str | None = None

    def __str__(self) -> str:
        lengths = "+".join(map(str, self.lengths))
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.name}-S{lengths}-T{self.T}-H{self.H}:{self.H_kv}-D{self.D}:{self.D_v}-{dtype}"
        )


CASES = (
    Case("plain"),
    Case("mha", H_kv=4),
    Case("mqa", H=8, H_kv=1),
    Case("gqa_wide", H=24, H_kv=2, D=128, D_v=128),
    Case("few_queries", T=5),
    Case("many_queries", T=40, lengths=(129, 300, 41)),
    Case("more_queries_than_keys", T=7, lengths=(0, 3, 7, 300)),
    Case("empty", lengths=(0, 0, 5)),
    Case("short", lengths=(1, 2, 15, 16, 17), S=32),
    Case("long", lengths=(4097, 1, 2000), S=4112),
    Case("long_row", lengths=(9000,), S=9008, H=2, H_kv=1),
    Case("tiny", D=1, D_v=1),
    Case("odd", D=40, D_v=72),
    Case("wide", D=192, D_v=512),
    Case("narrow", D=512, D_v=8),
    Case("scale", scale=0.3),
    Case("softcap", softcap=2.0),
    Case("window", window=(40, None)),
    Case("window_outside", window=(0, 0), T=3),
    Case("window_long", window=(100, 0), lengths=(4000, 50, 101), S=4000, T=2),
    Case("alibi", alibi="h", T=2),
    Case("alibi_batch", alibi="bh"),
    Case("sinks", sinks=True, lengths=(0, 100, 320)),
    Case("bias", bias="bhts", T=3),
    Case("bias_keys", bias="bs"),
    Case("bias_heads", bias="h"),
    Case("everything", H=6, T=3, D=40, D_v=24, scale=0.2, window=(150, None), softcap=4.0,
         alibi="bh", sinks=True, bias="hts"),
)  # fmt: skip


class Call(NamedTuple):
    """Tensors of `decode_attention` with a contiguous cache, and its keyword arguments."""

    q: Tensor
    k: Tensor
    v: Tensor
    lengths: Tensor
    options: dict[str, Any]


def make(case: Case, beyond: float = torch.nan) -> Call:
    """The case's tensors; cache slots past the lengths hold ``beyond``."""
    rng = torch.Generator().manual_seed(len(str(case)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng).to(case.dtype)

    B, H, H_kv, T, S = len(case.lengths), case.H, case.H_kv, case.T, case.S
    lengths = torch.tensor(case.lengths).int()
    unused = (torch.arange(S) >= lengths.view(B, 1)).view(B, 1, S, 1)
    q = normal(B, H, T, case.D)
    k = normal(B, H_kv, S, case.D).masked_fill(unused, beyond)
    v = normal(B, H_kv, S, case.D_v).masked_fill(unused, beyond)
    options: dict[str, Any] = {
        "scale": case.scale,
        "window": case.window,
        "softcap": case.softcap,
        "return_lse": True,
        "backend": "cpu",
    }
    if case.alibi:
        shape = (B, H) if "b" in case.alibi else (H,)
        options["alibi_slopes"] = torch.rand(shape, generator=rng)
    if case.sinks:
        options["sinks"] = normal(H)
    if case.bias is not None:
        sizes = zip("bhts", (B, H, T, S), strict=True)
        bias = normal(*(n if d in case.bias else 1 for d, n in sizes))
        bias[..., ::7] = -torch.inf if bias.shape[-1] > 1 else 0.5
        options["bias"] = bias
    return Call(q, k, v, lengths, options)


def judge(results: tuple[Tensor, Tensor], call: Call) -> None:
    """By the accuracy rule: decoding is causal attention with align = length - T."""
    options = call.options
    left, right = options["window"] or (None, None)
    slopes = options.get("alibi_slopes")
    inputs = Inputs(
        call.q,
        call.k,
        call.v,
        bias=options.get("bias"),
        alibi_slopes=slopes[None] if slopes is not None and slopes.dim() == 1 else slopes,
        sinks=options.get("sinks"),
        align=call.lengths - call.q.shape[2],
    )
    scale = call.q.shape[3] ** -0.5 if options["scale"] is None else options["scale"]
    given = Options(
        scale,
        causal=True,
        window_left=-1 if left is None else left,
        window_right=-1 if right is None else right,
        softcap=options["softcap"] or 0.0,
    )
    out, lse = results
    check({"out": out, "lse": lse}, Problem(inputs, given, Cotangents()))


def decode(call: Call, **changes: Any) -> tuple[Tensor, Tensor]:
    return attnfast.decode_attention(
        call.q, call.k, call.v, call.lengths, **(call.options | changes)
    )


def decode_paged(call: Call, page: int = PAGE, **changes: Any) -> tuple[Tensor, Tensor]:
    """The same with the cache cut into pages that lie in any order among unused ones."""
    B, H_kv, S, _ = call.k.shape
    n = S // page
    assert n * page == S
    rng = torch.Generator().manual_seed(1)
    places = torch.randperm(B * n + 3, generator=rng)[: B * n]  # three pages stay unused

    def pages(x: Tensor) -> Tensor:
        scattered = x.new_full((B * n + 3, page, H_kv, x.shape[3]), torch.nan)
        scattered[places] = x.transpose(1, 2).reshape(B * n, page, H_kv, x.shape[3])
        return scattered

    table = places.int().view(B, n).clone()
    used = (call.lengths.view(B, 1) + page - 1) // page
    table[torch.arange(n) >= used] = -7  # never read
    return attnfast.decode_attention(
        call.q,
        pages(call.k),
        pages(call.v),
        call.lengths,
        page_table=table,
        **(call.options | changes),
    )


WAYS = {"contiguous": decode, "paged": decode_paged}
EVERY = pytest.mark.parametrize("way", WAYS)


@EVERY
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_option(case: Case, dtype: torch.dtype, way: str) -> None:
    """Cache slots past the lengths hold NaN."""
    call = make(replace(case, dtype=dtype))
    judge(WAYS[way](call), call)


@EVERY
@pytest.mark.parametrize("case", CASES[::4], ids=lambda case: case.name)
def test_reference(case: Case, way: str) -> None:
    call = make(case)
    judge(WAYS[way](call, backend="reference"), call)


@pytest.mark.parametrize("page", [1, 2, 5, 64, 320])
def test_any_page_size(page: int) -> None:
    call = make(Case("pages", lengths=(129, 320, 0, 64)))
    judge(decode_paged(call, page), call)


@EVERY
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unused_slots_may_hold_anything(dtype: torch.dtype, value: float, way: str) -> None:
    """The results are bitwise those of zeros in their place."""
    case = Case("unused", lengths=(129, 300, 64, 0, 1), dtype=dtype, T=2)
    results, clean = WAYS[way](make(case, value)), WAYS[way](make(case, 0.0))
    for result, expected in zip(results, clean, strict=True):
        assert torch.equal(result, expected)


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "(B, S, H_kv, D)": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "(S, B, H_kv, D)": lambda x: x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
    "part of a larger cache": lambda x: torch.nn.functional.pad(x, (1, 2, 3, 4))[:, :, 3:-4, 1:-2],
    "last stride 2": lambda x: x.repeat_interleave(2, 3)[..., ::2],
}


@pytest.mark.parametrize("dtype", [fp32, bf16], ids=str)
@pytest.mark.parametrize("strides", STRIDES)
def test_caches_of_any_strides(strides: str, dtype: torch.dtype) -> None:
    call = make(Case("strided", T=2, dtype=dtype))
    q, k, v = (STRIDES[strides](x) for x in call[:3])
    call = call._replace(q=q, k=k, v=v)
    out, lse = decode(call)
    judge((out, lse), call)
    assert sorted(range(3), key=out.stride) == sorted(range(3), key=q.stride)


@EVERY
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_entry_does_not_depend_on_the_batch(
    dtype: torch.dtype, way: str, threads: Callable[[int], None]
) -> None:
    """Alone, on one thread and in a smaller cache, it has the same bits as among others on two."""
    case = Case("batch", lengths=(129, 300, 64, 9, 2000), S=2048, T=2, dtype=dtype, alibi="bh")
    call = make(case)
    torch.use_deterministic_algorithms(True)
    try:
        threads(2)
        out, lse = WAYS[way](call)
        threads(1)
        for b, length in enumerate(case.lengths):
            one = slice(b, b + 1)
            S = (length + PAGE - 1) // PAGE * PAGE
            options = call.options | {"alibi_slopes": call.options["alibi_slopes"][one]}
            alone = Call(
                call.q[one], call.k[one, :, :S], call.v[one, :, :S], call.lengths[one], options
            )
            out_alone, lse_alone = WAYS[way](alone)
            assert torch.equal(out_alone, out[one])
            assert torch.equal(lse_alone, lse[one])
    finally:
        torch.use_deterministic_algorithms(False)


@EVERY
def test_threads_and_runs_give_the_same_bits(way: str, threads: Callable[[int], None]) -> None:
    call = make(Case("threads", lengths=(4097, 1, 2000), S=4112, T=2))
    threads(1)
    expected = WAYS[way](call)
    for number in (2, 5, 2):
        threads(number)
        for result, same in zip(WAYS[way](call), expected, strict=True):
            assert torch.equal(result, same)


def test_the_same_as_attention() -> None:
    """Step by step over a growing cache: the rows of one causal call."""
    rng = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 40, 16, generator=rng)
    whole, lse = attnfast.attention(q, k, v, causal=True, return_lse=True, backend="cpu")
    outs, lses = [], []
    for t in range(40):
        length = torch.tensor([t + 1]).int()
        out, row_lse = attnfast.decode_attention(
            q[:, :, t : t + 1], k, v, length, return_lse=True, backend="cpu"
        )
        outs.append(out)
        lses.append(row_lse)
    given = Problem(Inputs(q, k, v), Options(0.25, causal=True), Cotangents())
    check({"out": torch.cat(outs, 2), "lse": torch.cat(lses, 2)}, given)
    check({"out": whole, "lse": lse}, given)


@EVERY
def test_nothing_of_something(way: str) -> None:
    for changes in ({"T": 0}, {"lengths": ()}, {"S": 0, "lengths": (0, 0)}):
        call = make(replace(CASES[0], **changes))
        judge(WAYS[way](call), call)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("page", [5, -1, 2**31 - 1, -(2**31)])
def test_a_page_out_of_range(page: int, backend: str) -> None:
    """Only pages that the lengths reach are looked at."""
    q, pages = torch.randn(2, 2, 1, 8), torch.randn(5, 4, 2, 8)
    lengths, table = torch.tensor([8, 9]).int(), torch.tensor([[0, 1, 9], [2, 3, 4]]).int()
    attnfast.decode_attention(q, pages, pages, lengths, page_table=table, backend=backend)
    table[1, 2] = page
    with pytest.raises(ValueError, match=rf"page_table must .*{page}"):
        attnfast.decode_attention(q, pages, pages, lengths, page_table=table, backend=backend)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("length", [21, -1, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("paged", [False, True])
def test_a_length_out_of_range(length: int, paged: bool, backend: str) -> None:
    q, cache, table = torch.randn(2, 2, 1, 8), torch.randn(2, 2, 20, 8), None
    if paged:
        cache, table = torch.randn(10, 4, 2, 8), torch.arange(10).view(2, 5).int()
    lengths = torch.tensor([5, 20]).int()
    attnfast.decode_attention(q, cache, cache, lengths, page_table=table, backend=backend)
    lengths[1] = length
    with pytest.raises(ValueError, match=rf"cache_seqlens must .*{length}"):
        attnfast.decode_attention(q, cache, cache, lengths, page_table=table, backend=backend)


@pytest.mark.parametrize("name", ["q", "k_cache", "v_cache", "bias", "sinks"])
def test_no_gradients(name: str) -> None:
    tensors = {
        "q": torch.randn(1, 2, 1, 8),
        "k_cache": torch.randn(1, 2, 9, 8),
        "v_cache": torch.randn(1, 2, 9, 8),
        "bias": torch.randn(9),
        "sinks": torch.randn(2),
    }
    tensors[name].requires_grad_()
    lengths = torch.tensor([9]).int()
    with pytest.raises(ValueError, match=f"{name} must be without gradient"):
        attnfast.decode_attention(**tensors, cache_seqlens=lengths)
    with torch.no_grad():
        attnfast.decode_attention(**tensors, cache_seqlens=lengths)


@EVERY
def test_the_cache_is_never_written(way: str) -> None:
    call = make(CASES[-1], beyond=0.0)
    tensors = [*call[:4], *(x for x in call.options.values() if isinstance(x, Tensor))]
    before = [(x.clone(), x._version) for x in tensors]
    WAYS[way](call)
    for x, (copy, version) in zip(tensors, before, strict=True):
        assert torch.equal(x, copy)
        assert x._version == version

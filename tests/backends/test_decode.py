"""Decoding: a few new queries over a cache, contiguous and paged."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from accuracy import check
from cases import DTYPES, bf16, fp32
from decode_cases import CASES, PAGE, WAYS, Call, DecodeCase, decode, decode_paged, judge, make
from dense import Cotangents, Trial
from torch import Tensor

import attnfast
from attnfast.call import Inputs, Options

EVERY = pytest.mark.parametrize("way", WAYS)


@pytest.mark.reference(5)
@EVERY
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_option(backend: str, case: DecodeCase, dtype: torch.dtype, way: str) -> None:
    """Cache slots past the lengths hold NaN."""
    call = make(replace(case, dtype=dtype))
    judge(WAYS[way](call, backend), call)


@pytest.mark.reference(5)
@EVERY
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_received(backend: str, case: DecodeCase, way: str) -> None:
    dtype = DTYPES[CASES.index(case) % 3]
    call = make(replace(case, received=True, dtype=dtype))
    results = WAYS[way](call, backend)
    judge(results, call)
    slots = torch.arange(case.S) >= call.lengths.view(-1, 1, 1)
    assert not torch.where(slots, results[2], 0).any()
    without = call._replace(options=call.options | {"return_received": False})
    assert all(map(torch.equal, WAYS[way](without, backend), results[:2]))


@pytest.mark.reference(1)
@EVERY
def test_received_of_a_row_with_nan(backend: str, way: str) -> None:
    """NaN at the keys that are there, as softmax has it, and 0 past them."""
    call = make(DecodeCase("nan", T=2, received=True, window=(40, None), dtype=torch.bfloat16))
    call.q[0, 1, 1, 3] = torch.nan
    received = WAYS[way](call, backend)[2]
    assert torch.equal(received[0, 1].isnan(), torch.arange(320) < 129)
    assert received.isnan().sum() == 129
    assert not received[:, :, 300:].any()


@pytest.mark.parametrize("page", [1, 2, 5, 64, 320])
def test_any_page_size(backend: str, page: int) -> None:
    call = make(DecodeCase("pages", lengths=(129, 320, 0, 64)))
    judge(decode_paged(call, backend, page), call)


@EVERY
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unused_slots_may_hold_anything(
    backend: str, dtype: torch.dtype, value: float, way: str
) -> None:
    """The results are bitwise those of zeros in their place."""
    case = DecodeCase("unused", lengths=(129, 300, 64, 0, 1), dtype=dtype, T=2, received=True)
    results, clean = (WAYS[way](make(case, beyond), backend) for beyond in (value, 0.0))
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
def test_caches_of_any_strides(backend: str, strides: str, dtype: torch.dtype) -> None:
    call = make(DecodeCase("strided", T=2, dtype=dtype))
    q, k, v = (STRIDES[strides](x) for x in call[:3])
    call = call._replace(q=q, k=k, v=v)
    out, lse = decode(call, backend)
    judge((out, lse), call)
    assert sorted(range(3), key=out.stride) == sorted(range(3), key=q.stride)


@EVERY
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_entry_does_not_depend_on_the_batch(
    backend: str, dtype: torch.dtype, way: str, threads: Callable[[int], None]
) -> None:
    """Alone, on one thread and in a smaller cache, it has the same bits as among others on two."""
    case = DecodeCase(
        "batch", lengths=(129, 300, 64, 9, 2000), S=2048, T=2, dtype=dtype, alibi="bh"
    )
    call = make(case)
    torch.use_deterministic_algorithms(True)
    try:
        threads(2)
        out, lse = WAYS[way](call, backend)
        threads(1)
        for b, length in enumerate(case.lengths):
            one = slice(b, b + 1)
            S = (length + PAGE - 1) // PAGE * PAGE
            options = call.options | {"alibi_slopes": call.options["alibi_slopes"][one]}
            alone = Call(
                call.q[one], call.k[one, :, :S], call.v[one, :, :S], call.lengths[one], options
            )
            out_alone, lse_alone = WAYS[way](alone, backend)
            assert torch.equal(out_alone, out[one])
            assert torch.equal(lse_alone, lse[one])
    finally:
        torch.use_deterministic_algorithms(False)


@EVERY
def test_threads_and_runs_give_the_same_bits(way: str, threads: Callable[[int], None]) -> None:
    call = make(DecodeCase("threads", lengths=(4097, 1, 2000), S=4112, T=2))
    threads(1)
    expected = WAYS[way](call, "cpu")
    for number in (2, 5, 2):
        threads(number)
        for result, same in zip(WAYS[way](call, "cpu"), expected, strict=True):
            assert torch.equal(result, same)


def test_the_same_as_attention(backend: str) -> None:
    """Step by step over a growing cache: the rows of one causal call."""
    rng = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 40, 16, generator=rng)
    whole, lse = attnfast.attention(q, k, v, causal=True, return_lse=True, backend=backend)
    outs, lses = [], []
    for t in range(40):
        length = torch.tensor([t + 1]).int()
        out, row_lse = attnfast.decode_attention(
            q[:, :, t : t + 1], k, v, length, return_lse=True, backend=backend
        )
        outs.append(out)
        lses.append(row_lse)
    given = Trial(Inputs(q, k, v), Options(0.25, causal=True), Cotangents())
    check({"out": torch.cat(outs, 2), "lse": torch.cat(lses, 2)}, given)
    check({"out": whole, "lse": lse}, given)


@EVERY
def test_nothing_of_something(backend: str, way: str) -> None:
    for changes in ({"T": 0}, {"lengths": ()}, {"S": 0, "lengths": (0, 0)}):
        call = make(replace(CASES[0], received=True, **changes))
        judge(WAYS[way](call, backend), call)


@EVERY
def test_lengths_and_pages_with_gaps(backend: str, way: str) -> None:
    """Every second number of a tensor, as slices of a server's tables are."""

    def with_gaps(x: Tensor) -> Tensor:
        return torch.stack([x, torch.full_like(x, 99)], -1).flatten(-2)[..., ::2]

    call = make(DecodeCase("gaps", lengths=(20, 3, 9), dtype=torch.bfloat16))
    judge(WAYS[way](call._replace(lengths=with_gaps(call.lengths)), backend), call)
    q, pages = torch.randn(2, 2, 1, 8), torch.randn(6, 4, 2, 8)
    lengths, table = torch.tensor([12, 7]).int(), torch.tensor([[5, 1, 2], [3, 4, 0]]).int()
    outs = [
        attnfast.decode_attention(
            *(x.bfloat16() for x in (q, pages, pages)), lengths, page_table=x, backend=backend
        )
        for x in (table, with_gaps(table), table.t().contiguous().t())
    ]
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


@pytest.mark.reference(1)
@pytest.mark.parametrize("page", [5, -1, 2**31 - 1, -(2**31)])
def test_a_page_out_of_range(backend: str, page: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only pages that the lengths reach are looked at; on GPUs, where that is asked for."""
    monkeypatch.setenv("ATTNFAST_CHECK", "1")
    q, pages = torch.randn(2, 2, 1, 8), torch.randn(5, 4, 2, 8)
    lengths, table = torch.tensor([8, 9]).int(), torch.tensor([[0, 1, 9], [2, 3, 4]]).int()
    attnfast.decode_attention(q, pages, pages, lengths, page_table=table, backend=backend)
    table[1, 2] = page
    with pytest.raises(ValueError, match=rf"page_table must .*{page}"):
        attnfast.decode_attention(q, pages, pages, lengths, page_table=table, backend=backend)


@pytest.mark.reference(1)
@pytest.mark.parametrize("length", [21, -1, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("paged", [False, True])
def test_a_length_out_of_range(
    backend: str, length: int, paged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATTNFAST_CHECK", "1")
    q, cache, table = torch.randn(2, 2, 1, 8), torch.randn(2, 2, 20, 8), None
    if paged:
        cache, table = torch.randn(10, 4, 2, 8), torch.arange(10).view(2, 5).int()
    lengths = torch.tensor([5, 20]).int()
    attnfast.decode_attention(q, cache, cache, lengths, page_table=table, backend=backend)
    lengths[1] = length
    with pytest.raises(ValueError, match=rf"cache_seqlens must .*{length}"):
        attnfast.decode_attention(q, cache, cache, lengths, page_table=table, backend=backend)


@pytest.mark.parametrize("name", ["q", "k_cache", "v_cache", "bias", "sinks"])
def test_no_gradients(backend: str, name: str) -> None:
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
        attnfast.decode_attention(**tensors, cache_seqlens=lengths, backend=backend)
    with torch.no_grad():
        attnfast.decode_attention(**tensors, cache_seqlens=lengths, backend=backend)


@EVERY
def test_the_cache_is_never_written(backend: str, way: str) -> None:
    call = make(CASES[-1], beyond=0.0)
    tensors = [*call[:4], *(x for x in call.options.values() if isinstance(x, Tensor))]
    before = [(x.clone(), x._version) for x in tensors]
    WAYS[way](call, backend)
    for x, (copy, version) in zip(tensors, before, strict=True):
        assert torch.equal(x, copy)
        assert x._version == version


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_of_one_query_is_a_step(dtype: torch.dtype) -> None:
    """One query that attends all keys runs in this kernel; one that does not, as always."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, n, 40).to(dtype) for heads, n in ((6, 1), (2, 700), (2, 700)))
    options = {"sinks": torch.randn(6), "alibi_slopes": torch.rand(6), "softcap": 5.0}
    lengths = torch.full((2,), 700, dtype=torch.int32)
    expected = attnfast.decode_attention(q, k, v, lengths, return_lse=True, **options)
    step = functools.partial(attnfast.attention, q, k, v, return_lse=True, backend="cpu", **options)
    for causal in (False, True):
        actual = step(causal=causal, align="bottom_right")
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    for changed in ({"align": 3}, {"causal": True}, {"align": "bottom_right", "window": (9, None)}):
        assert not torch.equal(step(**changed)[1], expected[1])

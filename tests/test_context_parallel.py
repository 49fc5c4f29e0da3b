"""Context parallel attention over real processes is attention by one."""

from __future__ import annotations

import inspect
import os
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from accuracy import check
from cases import CASES, Case, bf16, problem
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import attnfast
from attnfast.call import Inputs, Options
from attnfast.distributed import (
    context,
    context_parallel_attention,
    context_parallel_decode,
    ring,
    shard,
    unshard,
)
from attnfast.distributed.cost import choose_method, sent
from attnfast.distributed.layout import Chunk, Layout
from attnfast.distributed.methods import Call
from attnfast.distributed.pieces import Sequence, Sight, last_step

METHODS, LAYOUTS = ("ring", "all_to_all", "all_gather"), ("zigzag", "contiguous")
WAYS = tuple(product(METHODS, LAYOUTS))


def hold_cases(
    group: dist.ProcessGroup, cases: list[Case], ways: tuple[tuple[str, str], ...] = WAYS
) -> None:
    """Every case by every method and layout, held to the accuracy rule."""
    faults, held = [], 0
    mesh: Any = group
    if ways[0][0] == "2d":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("far", "near"))
    for case, (method, layout) in product(cases, ways):
        given = problem(case)
        if ranks.refusal(given, method) is not None:
            continue
        found = ranks.run(given, mesh, layout, method, backend="cpu")
        held += 1
        if dist.get_rank(group) > 0:
            continue
        try:
            check(found, given)
        except AssertionError as error:
            faults.append(f"{case} {method} {layout}: {error}")
    assert held >= len(cases) // 2
    assert not faults, "\n".join(faults)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The case table, or a sample of it."""
    if "among" not in metafunc.fixturenames:
        return
    every = metafunc.config.getoption("--every-case")
    over = (2, 4) if every else (2,)
    parts = [(i, 16) for i in range(16)] if every else [(0, 11)]
    given = [(world, *part) for world in over for part in parts]
    ids = [f"{world} ranks, case {i} of each {n}" for world, i, n in given]
    metafunc.parametrize(("world", "which", "among"), given, ids=ids)


def test_ranks_find_what_one_process_finds(
    tmp_path: Path, world: int, which: int, among: int
) -> None:
    ranks.run_on(world, tmp_path, hold_table, CASES[which::among])


def hold_table(group: dist.ProcessGroup, cases: list[Case]) -> None:
    hold_cases(group, cases)
    if dist.get_world_size(group) == 4:
        hold_cases(group, cases, (("2d", "zigzag"), ("2d", "contiguous")))


FOUR = [
    Case("all", B=3, H=3, H_kv=1, T=203, S=166, window=(40, 9), align="bottom_right", softcap=3.0,
         alibi="bh", sinks=True, mask="bs", bias="hts", masking_bias=True, stats=1,
         grads=("out", "lse", "entropy")),
    Case("dropout", H=3, H_kv=3, T=100, S=141, bias="hts", dropout_p=0.3, stats=1,
         grads=("out", "lse")),
    Case("gqa", H=8, H_kv=2, T=129, S=129, causal=True, stats=1, grads=("out", "entropy")),
    Case("received", H=6, H_kv=2, T=65, S=129, stats=2, sinks=True, mask="bs", grads=("lse",)),
    Case("indices", B=1, H=2, H_kv=1, T=41, S=60, indices=9),
    Case("few_keys", T=65, S=3, sinks=True, grads=("out", "lse")),
    Case("few_queries", T=2, S=130, causal=True, align="bottom_right"),
    Case("one_row", T=4, S=130, D=64, dtype=bf16, causal=True, align="bottom_right"),
    Case("align_tensor", T=70, S=90, causal=True, align="tensor"),
    Case("bias_shared", T=64, S=64, bias="hs", causal=True),
    Case("sequences", H=3, H_kv=1, lengths=((5, 70), (0, 9), (90, 30), (66, 67), (1, 8)), stats=1,
         causal=True, align="bottom_right", alibi="bh", sinks=True, grads=("out", "entropy")),
    Case("self", lengths=((30, 30), (1, 1), (7, 7), (40, 40)), window=(12, 0), grads=("lse",)),
    Case("aligned", lengths=((30, 20), (8, 50)), causal=True, align="tensor", dtype=bf16),
    Case("masked", lengths=((30, 20), (8, 50)), mask="hts", bias="hts", dropout_p=0.3),
    Case("blocks", H=3, H_kv=1, T=150, S=201, blocks="blocks 64", causal=True, stats=1),
]  # fmt: skip


def hold_four(group: dist.ProcessGroup) -> None:
    hold_cases(group, FOUR)
    hold_cases(group, FOUR, (("2d", "zigzag"), ("2d", "contiguous")))
    hold_bytes(group)
    hold_explanation(group)
    hold_shards(group)


def test_four_ranks(tmp_path: Path) -> None:
    """Heads that four do not divide, shards without a row, and what is sent."""
    ranks.run_on(4, tmp_path, hold_four)


def hold_bytes(group: dist.ProcessGroup) -> None:
    """Keys go no further than somebody attends them, and dk and dv come home."""
    rank, sent = dist.get_rank(group), []
    spied = ring.Exchange.send
    ring.Exchange.send = lambda self, x, steps: (
        sent.append((steps, x.numel())),
        spied(self, x, steps),
    )[1]  # type: ignore[method-assign, assignment]
    size = 2 * 2 * 16 * 8  # k and v of 16 rows, two heads, D 8
    x = torch.randn(1, 2, 16, 8, requires_grad=True)
    for options, forward, backward in (
        # keys of rank r are met by r + 1 alone, but for the last rank's
        (
            {"causal": True, "window": (16, 0)},
            [1] * (rank < 3),
            [1, 1] * (rank < 3) + [-1] * (rank > 0),
        ),
        # by all that follow
        ({"causal": True}, [1] * min(rank + 1, 3 if rank < 3 else 0), None),
        ({}, [1] * 3, None),
    ):
        sent.clear()
        out = context_parallel_attention(
            x, x, x, group, layout="contiguous", method="ring", **options
        )
        assert sent == [(step, size) for step in forward], (rank, options, sent)
        sent.clear()
        out.sum().backward()
        if backward is not None:
            assert sorted(sent) == sorted((step, size) for step in backward), (rank, sent)
    ring.Exchange.send = spied  # type: ignore[method-assign]


def hold_shards(group: dist.ProcessGroup) -> None:
    """A shard and back again is the tensor, gradients too, whatever the length."""
    rank = dist.get_rank(group)
    for length, layout in product((1, 7, 8, 13), LAYOUTS):
        whole = torch.arange(2.0 * length).view(2, length).requires_grad_()
        part = shard(whole, group, 1, layout)
        rows = 2 * -(-length // 8) if layout == "zigzag" else -(-length // 4)
        assert part.shape == (2, rows)
        joined = unshard(part * (rank + 1), group, -1, layout, length)
        of_rank = unshard(torch.full_like(part, rank + 1), group, 1, layout, length)
        assert joined.equal(whole * of_rank)
        (grad,) = torch.autograd.grad(joined, whole, torch.arange(2.0 * length).view(2, length))
        assert grad.equal(torch.arange(2.0 * length).view(2, length) * of_rank)
    if rank == 0:
        first = shard(torch.arange(16), group, 0)
        assert first.tolist() == [0, 1, 14, 15]


def hold_numbers(group: dist.ProcessGroup) -> None:
    """Large scores, the same bits every time, and meshes."""
    rank = dist.get_rank(group)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("cp",))
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        q, k = (torch.randn(1, 2, 40, 16).sign().to(dtype) for _ in "qk")
        v = torch.randn(1, 2, 40, 16).to(dtype)
        for scale, causal in product((1.0, 1e3, 1e8, 1e20), (True, False)):
            expected = attnfast.attention(q, k, v, scale=scale, causal=causal, backend="cpu")
            parts = (shard(x, mesh, 2) for x in (q, k, v))
            found = context_parallel_attention(
                *parts, mesh["cp"], scale=scale, causal=causal, method="ring", backend="cpu"
            )
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(
                unshard(found, mesh, 2), expected, atol=4 * eps, rtol=4 * eps
            )
    leaves = [torch.randn(2, 4, 33, 16, requires_grad=True) for _ in "qkv"]
    runs: list[list[Tensor]] = []
    for _ in range(2):
        outs = context_parallel_attention(
            *leaves, group, layout="contiguous", method="ring", causal=True, return_stats=True
        )
        runs.append([outs[0], outs[1].entropy, *torch.autograd.grad(outs[0].sum(), leaves)])
    assert all(a.equal(b) for a, b in zip(*runs, strict=True))
    none = torch.randn(0, 2, 8, 16, requires_grad=True)
    context_parallel_attention(none, none, none, group, method="ring").sum().backward()
    exchange = ring.Exchange(group)
    exchange.send(none, 1)  # not a byte: gloo has waited for such messages in vain
    assert not exchange.operations
    assert rank == mesh.get_local_rank()


def hold_decode(group: dist.ProcessGroup) -> None:
    """A cut cache is decoded as a whole one, whatever of it is filled."""
    rank, S = dist.get_rank(group), 48
    for dtype, T in ((torch.float32, 3), (torch.bfloat16, 1)):
        torch.manual_seed(0)
        q = torch.randn(5, 4, T, 16).to(dtype)
        k, v = (torch.randn(5, 2, S, 16).to(dtype) for _ in "kv")
        lengths = torch.tensor([0, 1, 24, 30, 48], dtype=torch.int32)
        own = slice(rank * S // 2, (rank + 1) * S // 2)
        bias = torch.randn(1, 4, 1, S).to(dtype)
        for options in (
            {},
            {"window": (9, None), "softcap": 2.0},
            {"sinks": torch.randn(4), "alibi_slopes": torch.rand(4)},
            {"bias": bias},
        ):
            expected = attnfast.decode_attention(
                q.float(), k.float(), v.float(), lengths, return_lse=True, **options
            )
            parts = options | ({"bias": bias[..., own]} if "bias" in options else {})
            found = context_parallel_decode(
                *(q, k[:, :, own], v[:, :, own], lengths, group), return_lse=True, **parts
            )
            eps = 8 * torch.finfo(dtype).eps
            torch.testing.assert_close(found[0].float(), expected[0], atol=eps, rtol=eps)
            torch.testing.assert_close(found[1], expected[1], atol=1e-5, rtol=1e-5)
    pages = [x.view(5, 2, 12, 4, 16).permute(0, 2, 3, 1, 4).flatten(0, 1) for x in (k, v)]
    table = torch.arange(60, dtype=torch.int32).view(5, 12)
    found = context_parallel_decode(
        q, *pages, lengths, group, page_table=table[:, 6 * rank : 6 * rank + 6], sinks=torch.ones(4)
    )
    expected = attnfast.decode_attention(q, k, v, lengths, sinks=torch.ones(4))
    torch.testing.assert_close(found, expected, atol=0.04, rtol=0.04)
    with pytest.raises(ValueError, match="page_table must be None with more than one query"):
        context_parallel_decode(q, *pages, lengths, group, page_table=table[:, :6], window=(3, 0))
    with pytest.raises(ValueError, match="return_received must be False: a rank's column sums are"):
        context_parallel_decode(q, *pages, lengths, group, return_received=True)
    with pytest.raises(ValueError, match=r"cache_seqlens must be in \[0, 48\], got \[49\]"):
        context_parallel_decode(q[:1], k[:1, :, own], v[:1, :, own], lengths[-1:] + 1, group)


def test_decode(tmp_path: Path) -> None:
    ranks.run_on(2, tmp_path, hold_decode)


def test_numbers(tmp_path: Path) -> None:
    ranks.run_on(2, tmp_path, hold_numbers)


def lose_a_rank(group: dist.ProcessGroup, said: str) -> None:
    """The last rank ends in the middle of the ring."""
    rank, found = dist.get_rank(group), ring.forward_of
    if rank == dist.get_world_size(group) - 1:
        ring.forward_of = lambda *_: os._exit(0)  # type: ignore[assignment]
    x = torch.randn(1, 2, 16, 8, requires_grad=True)
    with pytest.raises(RuntimeError) as raised:  # one may have its keys before the last has ended
        [context_parallel_attention(x, x, x, group, method="ring") for _ in range(2)]
    ring.forward_of = found
    Path(f"{said}{rank}").write_text(str(raised.value))
    os._exit(0)  # a group that has lost a rank is not destroyed in time


def test_a_rank_that_ends_is_an_error_on_all_others(tmp_path: Path) -> None:
    ranks.run_on(3, tmp_path, lose_a_rank, str(tmp_path / "said"))
    for rank in range(2):
        said = Path(f"{tmp_path / 'said'}{rank}").read_text()
        assert said.startswith(
            f"context_parallel_attention: the ring of 3 ranks, seen from rank {rank}: one has ended"
        )


def hold_explanation(group: dist.ProcessGroup) -> None:
    """What `explain` says is sent is what is sent."""
    rank, moved = dist.get_rank(group), {"bytes": 0}
    spied = ring.Exchange.send, dist.all_to_all_single

    def send(self: ring.Exchange, x: Tensor, steps: int) -> None:
        moved["bytes"] += x.numel() * x.element_size()
        spied[0](self, x, steps)

    def exchange(out: Tensor, x: Tensor, of: list[int], to: list[int], **given: Any) -> Any:
        others = sum(to) - to[rank]
        moved["bytes"] += x.element_size() * others * x[:1].numel()
        return spied[1](out, x, of, to, **given)

    ring.Exchange.send, dist.all_to_all_single = send, exchange  # type: ignore[method-assign]
    for dtype, layout, method, options in product(
        (torch.float32, bf16), LAYOUTS, ("ring", "all_to_all"),
        ({"causal": True}, {"window": (20, 0)}, {}),
    ):  # fmt: skip
        q, k = (torch.randn(2, h, 16, 8).to(dtype).requires_grad_() for h in (6, 2))
        call = (q, k, k), {"mesh": group, "layout": layout, "method": method, **options}
        given = context.plan(context.ATTENTION, arguments(*call[0], **call[1]))
        forward, backward = sent(given.call, method)
        moved["bytes"] = 0
        out = context_parallel_attention(*call[0], **call[1])
        assert moved["bytes"] == forward, (rank, call[1], moved, forward)
        moved["bytes"] = 0
        out.sum().backward()
        assert moved["bytes"] == backward, (rank, call[1], moved, backward)
        said = str(attnfast.explain(*call[0], **call[1])).splitlines()
        assert said[0] == (
            f"context_parallel_attention: {layout} over 4 ranks, 16 of 64 queries and 16 of 64"
            " keys here"
        )
        assert said[1].startswith(f"method: {method}, named by method; rank {rank} sends ")
    ring.Exchange.send, dist.all_to_all_single = spied  # type: ignore[method-assign]
    said = attnfast.explain(*call[0], mesh=group, method="all_to_all", lengths=(61, 62))
    assert ", 61, 8), k (2, " in said
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("far", "near"))
    said = attnfast.explain(*call[0], mesh=grid).splitlines()[1]
    assert said.endswith(f"dimensions; rank {rank} sends heads within a row, keys from row to row")


def arguments(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """All arguments of a call."""
    bound = inspect.signature(context_parallel_attention).bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def hold_agreement(group: dist.ProcessGroup) -> None:
    """Ranks that call with different arguments all say so."""
    os.environ["ATTNFAST_CHECK"] = "1"
    rank = dist.get_rank(group)
    for name, given, got in (
        ("causal", {"causal": rank == 1}, str(rank == 1)),
        ("softcap", {"softcap": 1.0 + rank}, str(1.0 + rank)),
        ("q", {"q": torch.zeros(1, 2, 8 + rank, 4)}, f"(1, 2, {8 + rank}, 4) of torch.float32"),
        ("other", {"is_causal": True} if rank else {}, str(["is_causal"] * rank)),
        ("bias", {"bias": X[..., :1, :1] if rank else None}, None),
    ):
        own = {"q": X, "k": X, "v": X, "mesh": group} | given
        with pytest.raises(ValueError) as raised:
            context_parallel_attention(**own)
        said = f"context_parallel_attention: {name} must be the same on every rank, got "
        assert str(raised.value).startswith(said + (got or "")), str(raised.value)
        assert str(raised.value).endswith(f"on rank {rank}, and another on [{1 - rank}]")
    context_parallel_attention(X, X, X, group)
    with pytest.raises(TypeError, match="q must be a 4-D Tensor, got int"):
        context_parallel_attention(1, 2, 3, group)  # type: ignore[arg-type]
    if rank == 0:  # which sends nothing
        assert "method: ring" in attnfast.explain(X, X, X, mesh=group)
    del os.environ["ATTNFAST_CHECK"]


def test_ranks_agree(tmp_path: Path) -> None:
    ranks.run_on(2, tmp_path, hold_agreement)


@pytest.fixture
def alone(tmp_path: Path) -> Any:
    """A group of one process."""
    dist.init_process_group("gloo", f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


X = torch.randn(1, 2, 8, 4)
WRONG: tuple[tuple[dict[str, Any], str], ...] = (
    ({"mesh": None}, "mesh must be a group of torch.distributed: see init_process_group, got None"),
    ({"mesh": "cp"}, "mesh must be a DeviceMesh or a ProcessGroup, got str"),
    ({"layout": "striped"}, "layout must be one of ['contiguous', 'zigzag'], got 'striped'"),
    ({"method": "2d"}, "mesh must be of two dimensions with method='2d', got one"),
    ({"method": "usp"}, "method must be one of ['auto', 'ring', 'all_to_all', 'all_gather', '2d']"),
    ({"lengths": 8}, "lengths must be (T, S), of the whole sequences, got 8"),
    ({"lengths": (8, 5)}, "k must be of 6 rows (5 over 1 ranks, zigzag, see shard), got 8"),
    ({"lengths": (8.0, 8)}, "lengths must be an int, got 8.0"),
    ({"lengths": (-1, 8)}, "lengths must be from 0 to "),
    ({"q": X[:, :, :7]}, "q must be of 8 rows (7 over 1 ranks, zigzag, see shard), got 7"),
    ({"q": X[0]}, "q must be a 4-D Tensor, got torch.Size([2, 8, 4])"),
    ({"v": X[:, :, :6]}, "k and v must be of equally many rows, at least one, got "),
    ({"return_weights": True}, "return_weights must be False: weights are T x S, on no rank whole"),
    ({"dropout_p": 0.1, "backend": "cuda"}, "backend 'cuda' cannot run this call"),
    ({"align": 2**29}, "align must be at most 268435456 either way, got 536870912"),
    ({"mask": attnfast.BlockMask.strided(8, 8, 2), "method": "ring"},
     "method with a BlockMask must be 'all_to_all', where a rank has whole sequences, got 'ring'"),
    ({"window": torch.zeros(2, 2).int(), "method": "ring"},
     "method with a window for each head must be 'all_to_all', where a rank has whole sequences, "),
    ({"indices": torch.zeros(1, 8, 2).int(), "method": "ring"}, "indices must be given with met"),
    ({"return_stats": "received", "method": "ring"}, "return_stats must be True: 'received' needs"),
    ({"mask": torch.ones(1, 1, 4, 8).bool()}, "mask must be broadcastable to (B, H, T, S) = (1, "),
    ({"is_causal": True}, "is_causal must be given as causal=, got is_causal="),
)  # fmt: skip


@pytest.mark.parametrize(("given", "message"), WRONG, ids=[text[:40] for _, text in WRONG])
def test_errors(alone: dist.ProcessGroup, given: dict[str, Any], message: str) -> None:
    arguments = {"q": X, "k": X, "v": X, "mesh": alone} | given
    with pytest.raises((TypeError, ValueError)) as raised:
        context_parallel_attention(**arguments)
    assert str(raised.value).startswith(f"context_parallel_attention: {message}")


def test_dropout_on_a_backend_that_counts_from_its_first_row(
    alone: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(context, "PLACED", {})
    message = (
        "dropout_p must be 0 on the backend 'cpu', which counts from its own first row, got 0.1"
    )
    with pytest.raises(ValueError, match=message):
        context_parallel_attention(X, X, X, alone, dropout_p=0.1)


def test_one_rank_is_one_process(alone: dist.ProcessGroup) -> None:
    for method in (*METHODS, "auto"):
        out = context_parallel_attention(X, X, X, alone, method=method, layout="contiguous")
        torch.testing.assert_close(out, attnfast.attention(X, X, X))


@pytest.mark.parametrize(("given", "message"), [
    ({"x": 1}, "x must be a Tensor, got int"),
    ({"dim": 4}, "dim must be a dimension of x, of 4, got 4"),
    ({"layout": "striped"}, "layout must be one of ['contiguous', 'zigzag'], got 'striped'"),
])  # fmt: skip
def test_shard_errors(alone: dist.ProcessGroup, given: dict[str, Any], message: str) -> None:
    arguments = {"x": X, "mesh": alone, "dim": 2} | given
    for name, function in (("shard", shard), ("unshard", unshard)):
        with pytest.raises((TypeError, ValueError)) as raised:
            function(**arguments)
        assert str(raised.value) == f"{name}: {message}"
    with pytest.raises(ValueError, match="unshard: x must be 6 rows of 5 over 1 ranks, got 8"):
        unshard(X, alone, 2, length=5)
    with pytest.raises(TypeError, match="unshard: length must be an int, got"):
        unshard(X, alone, 2, length=8.0)


def test_what_goes_furthest_decides_the_method() -> None:
    """Heads for rows where that is less than what travels, and heads can be dealt out."""

    def chosen(H: int, H_kv: int, ranks: int, layout: str = "contiguous", **options: Any) -> str:
        rows = Layout.of_sequence(1 << 13, ranks, layout)
        q, kv = torch.empty(1, H, rows.rows, 64), torch.empty(1, H_kv, rows.rows, 64)
        given = Inputs(q, kv, kv), Options(scale=1.0, **options)
        call = Call("", *given, rows, rows, Sight.of(*given), dist.group.WORLD, "cpu")
        return choose_method(call)[0]

    assert chosen(16, 16, 8) == "all_to_all"
    assert chosen(16, 1, 8) == "ring"
    assert chosen(6, 6, 8) == "ring"
    assert chosen(16, 16, 8, causal=True, window_left=512) == "ring"
    assert chosen(16, 16, 8, stats=2) == "all_gather"
    assert chosen(16, 1, 8, causal=True) == "all_to_all"  # contiguous: the last rank has the most
    assert chosen(12, 1, 8, causal=True) == "ring"
    assert chosen(16, 1, 8, layout="zigzag", causal=True) == "ring"


def test_only_sequences_of_both_chunks_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ring of thousands of packed sequences is planned in a moment."""
    total, looked, within = 1 << 14, [], Chunk.within
    monkeypatch.setattr(Chunk, "within", lambda *given: (looked.append(1), within(*given))[1])
    rows = Layout.of_sequence(total, 8, "contiguous")
    for first, steps in ((8, [0] * 8), (4, [1] * 7 + [0])):  # none, and some, over the borders
        ends = pairwise((0, *range(first, total, 8), total))
        sight = Sight(-1, 0, 0, False, tuple(Sequence(x, x, 0) for x in ends))
        assert [last_step(rows, rows, sight, owner) for owner in range(8)] == steps
    assert 0 < len(looked) < 100


GPU = [
    Case("part", B=1, H=2, H_kv=1, T=64, S=48, window=(40, 9), align="bottom_right", stats=1,
         sinks=True, bias="hts", grads=("out", "lse", "entropy"), dtype=bf16),
    Case("drops", B=1, H=2, H_kv=2, T=32, S=32, D=16, causal=True, dropout_p=0.4, dtype=bf16),
    Case("packed", H=2, H_kv=1, lengths=((20, 30), (9, 1), (7, 17)), causal=True, dtype=bf16),
]  # fmt: skip


def hold_on(group: dist.ProcessGroup, backend: str) -> None:
    for case, (method, layout) in product(GPU, WAYS):
        given = problem(case)
        if ranks.refusal(given, method) or (backend == "cuda" and case.dropout_p):
            continue
        check(ranks.run(given, group, layout, method, backend=backend), given)


@pytest.mark.parametrize(
    ("backend", "variable"), [("triton", "TRITON_INTERPRET"), ("cuda", "ATTNFAST_EMULATOR")]
)
def test_the_kernels_of_gpus_compute_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str, variable: str
) -> None:
    """In Triton's interpreter and on the emulator."""
    monkeypatch.setenv(variable, "1")
    ranks.run_on(2, tmp_path, hold_on, backend)


def hold_second_order(group: dist.ProcessGroup) -> None:
    """Gradients of gradients, by every method."""
    torch.manual_seed(0)
    whole = [torch.randn(1, 2, 12, 4), torch.randn(1, 1, 16, 4), torch.randn(1, 1, 16, 4)]
    sinks, bias = torch.randn(2), torch.randn(1, 2, 1, 16)
    options: dict[str, Any] = {"causal": True, "align": "bottom_right", "return_lse": True}

    def second(call: Any, given: list[Tensor]) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in (*given, sinks, bias)]
        out, lse = call(leaves)
        first = torch.autograd.grad(out.sin().sum() + lse.cos().sum(), leaves, create_graph=True)
        return list(torch.autograd.grad(sum(x.square().sum() for x in first), leaves))

    def one(leaves: list[Tensor]) -> Any:
        q, k, v, sink, more = leaves
        return attnfast.attention(q, k, v, sinks=sink, bias=more, **options)

    expected = second(one, whole)
    for method, layout in WAYS:

        def many(leaves: list[Tensor], method: str = method, layout: str = layout) -> Any:
            q, k, v, sink, more = leaves
            given = {"sinks": sink, "bias": more, "method": method, "layout": layout}
            return context_parallel_attention(q, k, v, group, **given, **options)

        found = second(many, [shard(x, group, 2, layout) for x in whole])
        for i, (x, y) in enumerate(zip(found, expected, strict=True)):
            z = unshard(x, group, 2, layout, y.shape[2]) if i < 3 else x
            torch.testing.assert_close(
                z, y, atol=1e-4, rtol=1e-4, msg=lambda m, i=i, n=method: f"{n} {i}: {m}"
            )


def test_second_derivatives(tmp_path: Path) -> None:
    ranks.run_on(2, tmp_path, hold_second_order)

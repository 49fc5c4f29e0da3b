"""DTensor: calls cut over two processes give what whole calls give, cut where they can be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)

import attnfast
from attnfast import ops

WORLD = 2
BATCH, HEADS, ROWS, WHOLE = Shard(0), Shard(1), Shard(2), Replicate()
DIFFERENTIABLE = ("q", "k", "v", "bias", "sinks")


def tensors(H_kv: int = 2) -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = {"q": (2, 4, 6, 8), "k": (2, H_kv, 8, 8), "v": (2, H_kv, 8, 4), "sinks": (4,)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def compare(
    mesh: DeviceMesh,
    given: dict[str, Tensor],
    placements: dict[str, Any],
    expected: dict[str, Any],
    **options: Any,
) -> None:
    """The same results and gradients, placed as expected."""
    found: list[dict[str, Tensor]] = []
    for cut in (False, True):
        x = {name: tensor.clone() for name, tensor in given.items()}
        if cut:
            x = {
                name: distribute_tensor(tensor, mesh, [placements.get(name, WHOLE)])
                for name, tensor in x.items()
            }
        leaves = {n: t.requires_grad_() for n, t in x.items() if n in DIFFERENTIABLE}
        q, k, v = (x.pop(name) for name in "qkv")
        out, lse, stats, *weights = attnfast.attention(
            q, k, v, **x, **options, return_lse=True, return_stats="received"
        )
        results = {"out": out, "lse": lse, "entropy": stats.entropy, "received": stats.received}
        results |= {"weights": weights[0]} if weights else {}
        loss = sum(y.sin().sum() for name, y in results.items() if name != "received")
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        results |= {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}
        found.append(results)
    whole, cut = found
    for name, y in cut.items():
        assert isinstance(y, DTensor), name
        torch.testing.assert_close(y.full_tensor(), whole[name], msg=lambda m, n=name: f"{n}: {m}")
    for name, placement in expected.items():
        assert cut[name].placements == (placement,), (name, cut[name].placements)


def by_heads(mesh: DeviceMesh) -> None:
    given = tensors() | {"bias": torch.randn(4, 6, 8), "alibi_slopes": torch.rand(4)}
    placements = {"q": HEADS, "k": HEADS, "v": HEADS, "bias": Shard(0), "sinks": Shard(0)}
    same = dict.fromkeys(("out", "lse", "dq", "dk", "dv", "received"), HEADS)
    same |= {"weights": HEADS, "dbias": Shard(0), "dsinks": Shard(0)}
    compare(mesh, given, placements, same, causal=True, return_weights=True)
    shared = tensors() | {"bias": torch.randn(6, 8), "mask": torch.rand(2, 1, 6, 8) < 0.7}
    placements = {"q": HEADS, "k": HEADS, "v": HEADS}
    compare(mesh, shared, placements, {"out": HEADS, "dbias": Partial(), "dk": HEADS})
    for heads in (1, 4):
        blocks = attnfast.BlockMask.from_mask(torch.rand(2, heads, 6, 8) < 0.7)
        compare(mesh, tensors(), placements, {"out": HEADS, "dk": HEADS}, mask=blocks)


def by_batch(mesh: DeviceMesh) -> None:
    given = tensors() | {
        "bias": torch.randn(2, 1, 6, 8),
        "mask": torch.rand(1, 4, 6, 8) < 0.7,
        "alibi_slopes": torch.rand(2, 4),
        "align": torch.tensor([2, 1], dtype=torch.int32),
    }
    placements = {"q": BATCH, "k": BATCH, "v": BATCH, "bias": BATCH, "align": BATCH}
    expected = dict.fromkeys(("out", "lse", "dq", "dk", "dv", "weights", "dbias"), BATCH)
    expected |= {"dsinks": Partial()}
    compare(mesh, given, placements, expected, causal=True, return_weights="mean")
    for entries in (1, 2):
        blocks = attnfast.BlockMask.from_mask(torch.rand(entries, 4, 6, 8) < 0.7)
        placements = {"q": BATCH, "k": BATCH, "v": BATCH}
        compare(mesh, tensors(), placements, {"out": BATCH, "dk": BATCH}, mask=blocks)


def gathered(mesh: DeviceMesh) -> None:
    """What may not be cut is made whole, as by torch's own attention; never wrong."""
    rows = {"q": ROWS, "k": ROWS, "v": ROWS}
    compare(mesh, tensors(), rows, {}, causal=True)
    heads = {"q": HEADS, "k": HEADS, "v": HEADS}
    compare(mesh, tensors(), heads, {"out": WHOLE}, return_weights="mean")
    odd = {**tensors(), "q": torch.randn(2, 6, 6, 8), "sinks": torch.randn(6)}
    odd |= {"k": torch.randn(2, 3, 8, 8), "v": torch.randn(2, 3, 8, 4)}
    compare(mesh, odd, heads, {"out": WHOLE})  # three groups for two processes
    one = tensors(H_kv=1)
    compare(mesh, one, {"q": HEADS}, {"out": WHOLE})
    seeded = tensors() | {"dropout_seed": torch.tensor([1, 2])}
    batch = {"q": BATCH, "k": BATCH, "v": BATCH}
    compare(mesh, seeded, batch, {"out": WHOLE}, dropout_p=0.5)
    q = distribute_tensor(seeded["q"], mesh, [BATCH])
    with pytest.raises(ValueError, match="attention: dropout_seed must be given, as a replicated"):
        attnfast.attention(q, q, q, dropout_p=0.5)
    with pytest.raises(TypeError, match="attention: q must be a plain Tensor where the reference"):
        attnfast.attention(q.double(), q.double(), q.double())


def decoding(mesh: DeviceMesh) -> None:
    torch.manual_seed(0)
    q, lengths = torch.randn(2, 4, 1, 8), torch.tensor([5, 12], dtype=torch.int32)
    caches = [torch.randn(2, 2, 12, 8) for _ in range(2)]
    pages = [torch.randn(5, 6, 2, 8) for _ in range(2)]
    table = torch.tensor([[0, 3], [4, 1]], dtype=torch.int32)
    sinks = torch.randn(4)
    whole = [WHOLE]
    for held, given, places in (
        (caches, None, {BATCH: BATCH, HEADS: HEADS}),
        (pages, table, {BATCH: WHOLE, HEADS: Shard(2)}),
    ):
        expected, sums = attnfast.decode_attention(
            q, *held, lengths, page_table=given, sinks=sinks, return_received=True
        )
        for cut, place in places.items():
            found, received = attnfast.decode_attention(
                distribute_tensor(q, mesh, [cut]),
                *(distribute_tensor(x, mesh, [place]) for x in held),
                distribute_tensor(lengths, mesh, whole),
                page_table=None if given is None else distribute_tensor(given, mesh, whole),
                sinks=distribute_tensor(sinks, mesh, whole),
                return_received=True,
            )
            assert found.placements == received.placements == (cut,)
            torch.testing.assert_close(found.full_tensor(), expected)
            torch.testing.assert_close(received.full_tensor(), sums)


def sequences(mesh: DeviceMesh) -> None:
    torch.manual_seed(0)
    x, ends = torch.randn(7, 4, 8), torch.tensor([0, 3, 7], dtype=torch.int32)
    expected = attnfast.varlen_attention(x, x, x, ends, ends, 4, 4, causal=True)
    for cut, kept in ((HEADS, HEADS), (BATCH, None)):
        y = distribute_tensor(x, mesh, [cut])
        whole = distribute_tensor(ends, mesh, [WHOLE])
        found = attnfast.varlen_attention(y, y, y, whole, whole, 4, 4, causal=True)
        assert kept is None or found.placements == (kept,)
        torch.testing.assert_close(found.full_tensor(), expected)


def chosen_keys(mesh: DeviceMesh) -> None:
    """Lists for all key heads stay whole where heads are cut."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8)
    for lists in (torch.randint(7, (2, 5, 3)), torch.randint(7, (2, 2, 5, 3))):
        expected = attnfast.attention(q, k, k, indices=lists)
        for cut in (BATCH, HEADS):
            place = WHOLE if cut == HEADS and lists.dim() == 3 else cut
            found = attnfast.attention(
                *(distribute_tensor(x, mesh, [cut]) for x in (q, k, k)),
                indices=distribute_tensor(lists, mesh, [place]),
            )
            assert found.placements == (cut,)
            torch.testing.assert_close(found.full_tensor(), expected)


def windows_of_heads(mesh: DeviceMesh) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8)
    windows, lengths = torch.tensor([[2, 0], [-1, 1], [0, -1], [3, 3]]), torch.tensor([5, 7])
    expected = attnfast.attention(q, k, k, window=windows)
    decoded = attnfast.decode_attention(q, k, k, lengths, window=windows)
    for cut in (BATCH, HEADS):
        x, y = (distribute_tensor(x, mesh, [cut]) for x in (q, k))
        own = distribute_tensor(windows, mesh, [Shard(0) if cut == HEADS else WHOLE])
        of_entries = distribute_tensor(lengths, mesh, [cut if cut == BATCH else WHOLE])
        found = attnfast.attention(x, y, y, window=own)
        step = attnfast.decode_attention(x, y, y, of_entries, window=own)
        for result, whole in ((found, expected), (step, decoded)):
            assert result.placements == (cut,)
            torch.testing.assert_close(result.full_tensor(), whole)


def self_attention(mesh: DeviceMesh) -> None:
    torch.manual_seed(0)
    packed, mask = torch.randn(2, 5, 24), torch.rand(2, 1, 5, 5) < 0.7
    options = None, True, 0.0, None
    expected = ops.SELF_ATTENTION(packed, 2, True, mask, *options, 1)
    out, norm, _ = expected
    expected += (ops.SELF_ATTENTION_BWD(out.cos(), out, norm, packed, 2, True, mask, *options),)
    cut = [distribute_tensor(x, mesh, [BATCH]) for x in (packed, mask)]
    found = ops.SELF_ATTENTION(cut[0], 2, True, cut[1], *options, 1)
    out, norm, _ = found
    layer = (cut[0], 2, True, cut[1], *options)
    found += (ops.SELF_ATTENTION_BWD(out.cos(), out, norm, *layer),)
    for x, y, dim in zip(found, expected, (0, 1, 0, 0), strict=True):
        assert x.placements == (Shard(dim),)
        torch.testing.assert_close(x.full_tensor(), y)


def layers(mesh: DeviceMesh) -> None:
    """A layer's parameters are whole, its inputs cut along the batch, in training and inference."""
    x = torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(0))
    for grads in (True, False):
        found = []
        for cut in (False, True):
            torch.manual_seed(1)
            layer = attnfast.MultiheadAttention(
                16, 4, batch_first=True, num_kv_heads=2, sinks=True, alibi=True, similarity="cosine"
            )
            given = x
            if cut:
                distribute_module(layer, mesh)
                given = distribute_tensor(x, mesh, [BATCH])
            with torch.set_grad_enabled(grads):
                results = [layer(given, given, given, need_weights=False)[0]]
            if grads:
                results[0].sin().sum().backward()
                results += [p.grad for p in layer.parameters()]
            found.append(results)
        for y, z in zip(*found, strict=True):
            torch.testing.assert_close(z.full_tensor(), y)


def two_dimensions(mesh: DeviceMesh) -> None:
    """Batch over one, heads over the other, of one process here and two there."""
    for shape in ((1, 2), (2, 1)):
        grid = init_device_mesh("cpu", shape, mesh_dim_names=("data", "model"))
        given = tensors()
        del given["sinks"]
        x = [distribute_tensor(t, grid, [BATCH, HEADS]).requires_grad_() for t in given.values()]
        out = attnfast.attention(*x, causal=True)
        assert out.placements == (BATCH, HEADS)
        leaves = [t.requires_grad_() for t in given.values()]
        whole = attnfast.attention(*leaves, causal=True)
        found = torch.autograd.grad(out.sin().sum(), x)
        expected = torch.autograd.grad(whole.sin().sum(), leaves)
        for y, z in zip((out, *found), (whole, *expected), strict=True):
            torch.testing.assert_close(y.full_tensor(), z)


CHECKS = (by_heads, by_batch, gathered, decoding, sequences, chosen_keys,
          windows_of_heads, self_attention, layers, two_dimensions)  # fmt: skip


def process(rank: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=WORLD)
    mesh = init_device_mesh("cpu", (WORLD,))
    for check in CHECKS:
        check(mesh)
    dist.destroy_process_group()


def test_two_processes_compute_as_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(process, (str(tmp_path / "rendezvous"),), nprocs=WORLD)


def test_every_operator_can_be_cut() -> None:
    known = DTensor._op_dispatcher.sharding_propagator.op_strategy_funcs
    for each in ops.DEFINED.values():
        assert all(op in known for op in each)
    assert {ops.SELF_ATTENTION, ops.SELF_ATTENTION_BWD} <= known.keys()

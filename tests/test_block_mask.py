"""BlockMask: every constructor against the bool mask that it stands for, and where it is given."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention

from attnfast import BlockMask, MultiheadAttention, attention, explain, second_order
from attnfast.block_index import FULL, unpacked
from attnfast.flex_mask import from_flex

SIZES = ((200, 300, 64), (128, 128, 128), (1, 5, 64), (257, 64, 128), (0, 4, 64), (4, 0, 64))


def drawn(*shape: int, share: float = 0.5, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def by_columns(mask: BlockMask) -> Tensor:
    """The bool mask, entry by entry of the columns."""
    B, H = mask.shape[:2]
    rows, n = mask.grid[2], mask.block_size
    found = torch.zeros(mask.shape, dtype=torch.bool)
    for b in range(B):
        for h in range(H):
            for j in range(mask.grid[3]):
                begin, _, end = mask.starts[b, h, 2 * (rows + j) + 1 :][:3].tolist()
                for i, slot in mask.index[2:, begin:end].T.tolist():
                    part = found[b, h, i * n : (i + 1) * n, j * n : (j + 1) * n]
                    bits = torch.ones(n, n) > 0 if slot < 0 else unpacked(mask.bits[slot, None])[0]
                    part |= bits[: part.shape[0], : part.shape[1]]
    return found


@pytest.mark.parametrize(("T", "S", "size"), SIZES)
def test_from_mask_and_algebra(T: int, S: int, size: int) -> None:
    a, b = drawn(2, 3, T, S), drawn(1, 3, T, S, share=0.1, seed=1)
    a[0, 0, :64, :64], a[1, 1, :64], a[1, 2], b[:, 0] = True, False, True, False
    x, y = BlockMask.from_mask(a, size), BlockMask.from_mask(b, size)
    assert torch.equal(x.to_dense(), a)
    assert torch.equal(by_columns(x), a)
    assert torch.equal((x & y).to_dense(), a & b)
    assert torch.equal((x | y).to_dense(), a | b)
    assert torch.equal((~x).to_dense(), ~a)
    assert torch.equal((~~y).to_dense(), b)


def test_only_what_is_there_has_memory() -> None:
    mask = torch.zeros(256, 256, dtype=torch.bool)
    mask[:128], mask[200, 3] = True, True
    found = BlockMask.from_mask(mask, 64)
    assert found.density == 9 / 16
    assert found.bits.shape == (1, 64, 2)
    assert found.starts[0, 0].tolist() == [0, 4, 4, 8, 8, 8, 8, 8, 9, 0, 2, 3, 5, 5, 7, 7, 9, 9]


def test_blocks_that_are_cut_off_have_bits_and_none_beyond() -> None:
    every = ~BlockMask.nothing((1, 1, 100, 70), 64)
    assert (every.index[1] == FULL).sum() == 1
    assert unpacked(every.bits).sum() == 100 * 70 - 64 * 64


def test_constructors() -> None:
    ids = torch.tensor([[0] * 70 + [2] * 60 + [-1] * 9, [5] * 139])
    same = (ids[:, :, None] == ids[:, None]) & (ids >= 0)[:, :, None]
    assert torch.equal(BlockMask.from_documents(ids, block_size=64).to_dense()[:, 0], same)

    ends = torch.tensor([0, 100, 100, 230])
    number = torch.bucketize(torch.arange(230), ends[1:], right=True)
    packed = BlockMask.from_cu_seqlens(ends, block_size=64).to_dense()[0, 0]
    assert torch.equal(packed, number[:, None] == number)

    q, k = torch.arange(130)[:, None], torch.arange(200)
    prefix = BlockMask.prefix(torch.tensor([150, 0]), 130, 200).to_dense()[:, 0]
    assert torch.equal(prefix[0], (k < 150) | (k <= q + 70))
    assert torch.equal(prefix[1], k <= q + 70)

    strided = BlockMask.strided(130, 200, 5, 2).to_dense()[0, 0]
    assert torch.equal(strided, (q + 70 - k) % 5 < 2)

    tree = BlockMask.from_tree(torch.tensor([-1, 0, 0, 1, 1, 4])).to_dense()[0, 0]
    ancestors = [{0}, {0, 1}, {0, 2}, {0, 1, 3}, {0, 1, 4}, {0, 1, 4, 5}]
    assert [set(row.nonzero()[:, 0].tolist()) for row in tree] == ancestors

    edges = torch.randint(0, 130, (2, 500), generator=torch.Generator().manual_seed(0))
    graph = torch.zeros(130, 200, dtype=torch.bool)
    graph[edges[0], edges[1]] = True
    assert torch.equal(BlockMask.from_graph(edges, 130, 200).to_dense()[0, 0], graph)


def test_scipy_graph() -> None:
    sparse = pytest.importorskip("scipy.sparse")
    matrix = sparse.random(130, 200, density=0.01, random_state=0, format="csr")
    matrix.data[0] = 0.0  # an entry that is no edge
    found = BlockMask.from_graph(matrix, 130, 200).to_dense()[0, 0]
    assert torch.equal(found, torch.as_tensor(matrix.toarray() != 0))


def test_picture() -> None:
    mask = BlockMask.from_mask_mod(lambda b, h, q, k: q >= k, None, None, 200, 300, block_size=64)
    lines = repr(mask).splitlines()
    assert lines[0] == "BlockMask of (1, 1, 200, 300) in blocks of 64, 50.0% of them visited"
    assert lines[1:] == ["▒····", "█▒···", "██▒··", "███▒·"]
    wide = BlockMask.nothing((1, 1, 64 * 100, 64 * 200), 64).picture().splitlines()
    assert (len(wide), len(wide[0])) == (32, 64)
    assert mask.shares()[0, 0] == 65 / 128
    assert mask.shares()[3, 3] == pytest.approx((8 * 9 / 2) / (8 * 64))


def test_plot() -> None:
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("Agg")
    ax = BlockMask.strided(300, 300, 300).plot()
    assert ax.images[0].get_array().shape == (3, 3)
    plt.close(ax.figure)


Call = Callable[[], Any]
ERRORS: dict[str, tuple[Call, type[Exception], str]] = {
    "mask_mod of Python values": (
        lambda: BlockMask.from_mask_mod(lambda b, h, q, k: q > k if q > 3 else k > q, 1, 1, 9, 9),
        ValueError,
        "BlockMask.from_mask_mod: mask_mod must be elementwise in int64 tensors (b, h, q, k) that "
        "broadcast, got RuntimeError: Boolean value of Tensor with more than one value",
    ),
    "mask_mod of whole blocks": (
        lambda: BlockMask.from_mask_mod(lambda b, h, q, k: q.amax() > k + q, 1, 1, 200, 200),
        ValueError,
        "mask_mod must be elementwise, got another answer for (b, h, q, k) = (0, 0, ",
    ),
    "mask_mod of its own shape": (
        lambda: BlockMask.from_mask_mod(lambda b, h, q, k: torch.ones(3, 7) > 0, 1, 1, 9, 9),
        ValueError,
        "mask_mod must be elementwise: (1, 128, 128) positions have as many answers",
    ),
    "mask_mod to numbers": (
        lambda: BlockMask.from_mask_mod(lambda b, h, q, k: q - k, 1, 1, 9, 9),
        TypeError,
        "mask_mod must be a function to a bool Tensor, got torch.int64",
    ),
    "no function": (
        lambda: BlockMask.from_mask_mod(torch.ones(3), 1, 1, 9, 9),  # type: ignore[arg-type]
        TypeError,
        "mask_mod must be a function, got Tensor",
    ),
    "size": (
        lambda: BlockMask.strided(9, 9, 3, block_size=32),
        ValueError,
        "BlockMask.strided: block_size must be 64 or 128, got 32",
    ),
    "lengths": (
        lambda: BlockMask.prefix(torch.tensor([1.0]), 9, 9),
        TypeError,
        "lengths must be an int Tensor (n,) or (B, n), got torch.float32 (1,)",
    ),
    "descending": (
        lambda: BlockMask.from_cu_seqlens(torch.tensor([0, 5, 3])),
        ValueError,
        "BlockMask.from_cu_seqlens: cu_seqlens_q must be 0 and then ascending, got [0, 5, 3]",
    ),
    "node": (
        lambda: BlockMask.from_graph(torch.tensor([[0, 3], [1, 12]]), 9, 9),
        ValueError,
        "BlockMask.from_graph: edges must be from 0 to 8 in keys, got 12",
    ),
    "parent": (
        lambda: BlockMask.from_tree(torch.tensor([-1, 5])),
        ValueError,
        "BlockMask.from_tree: parents must be from -1 to 1, got 5",
    ),
    "circle": (
        lambda: BlockMask.from_tree(torch.tensor([1, 0])),
        ValueError,
        "BlockMask.from_tree: parents must be a forest, got a node that is its own ancestor",
    ),
    "combined": (
        lambda: BlockMask.nothing((1, 1, 9, 9), 64) & BlockMask.nothing((1, 1, 9, 8), 64),
        ValueError,
        "BlockMask: & must be of masks that broadcast, of one block size, got (1, 1, 9, 9) in "
        "blocks of 64 and (1, 1, 9, 8) in blocks of 64",
    ),
    "combined with a tensor": (
        lambda: BlockMask.nothing((1, 1, 9, 9), 64) | torch.ones(9, 9),  # type: ignore[operator]
        TypeError,
        "BlockMask: | must be of two BlockMasks, got Tensor",
    ),
    "of another size": (
        lambda: attention(*(torch.ones(2, 4, 9, 8),) * 3, mask=BlockMask.nothing((1, 1, 9, 8), 64)),
        ValueError,
        "attention: mask must be a BlockMask that broadcasts to (B, H, T, S) = (2, 4, 9, 9), got "
        "(1, 1, 9, 8)",
    ),
    "of other heads": (
        lambda: attention(*(torch.ones(2, 4, 9, 8),) * 3, mask=BlockMask.nothing((1, 2, 9, 9), 64)),
        ValueError,
        "got (1, 2, 9, 9)",
    ),
    "elsewhere": (
        lambda: attention(
            *(torch.ones(2, 4, 9, 8),) * 3, mask=BlockMask.nothing((1, 1, 9, 9), 64, "meta")
        ),
        ValueError,
        "attention: mask must be on q's device, cpu, got meta",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    call, error, message = ERRORS[name]
    with pytest.raises(error, match=re.escape(message)):
        call()


def qkv(T: int, S: int, *, grad: bool = False) -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    shapes = ((2, 4, T, 16), (2, 2, S, 16), (2, 2, S, 16))
    return [torch.randn(s, generator=rng).requires_grad_(grad) for s in shapes]


@pytest.mark.parametrize("block", [128, 64, (32, 64), 16])
def test_torchs_own(block: Any) -> None:
    def mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return ((q >= k) & (q - k < 100)) | (k < 3 * b)

    theirs = flex_attention.create_block_mask(mod, 2, None, 200, 200, "cpu", BLOCK_SIZE=block)
    ours = BlockMask.from_mask_mod(mod, 2, None, 200, 200)
    assert torch.equal(from_flex(theirs).to_dense(), ours.to_dense())
    assert from_flex(theirs) is from_flex(theirs)
    q, k, v = qkv(200, 200)
    assert torch.equal(attention(q, k, v, mask=theirs), attention(q, k, v, mask=from_flex(theirs)))


def test_blocks_that_torchs_mask_does_not_list_are_empty() -> None:
    counts, blocks = torch.tensor([[[1, 1]]]).int(), torch.tensor([[[[1, 0], [0, 1]]]]).int()
    theirs = flex_attention.BlockMask.from_kv_blocks(counts, blocks, BLOCK_SIZE=64)
    found = from_flex(theirs).to_dense()[0, 0]
    assert found[:64, 64:].all()
    assert found[64:, :64].all()
    assert found.sum() == 2 * 64 * 64


def test_explain_says_it() -> None:
    mask = BlockMask.strided(70, 70, 3)
    assert "mask in blocks" in explain(*qkv(70, 70), mask=mask)


def test_compiled_with_a_mask_as_input() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
        return attention(q, k, v, mask=mask).sin()

    for T, seed in ((130, 0), (130, 1), (190, 2), (260, 3)):
        mask = BlockMask.from_mask(drawn(1, 4, T, T, seed=seed), 64)
        x, y = qkv(T, T, grad=True), qkv(T, T, grad=True)
        compiled(*x, mask).sum().backward()
        attention(*y, mask=mask).sin().sum().backward()
        for a, b in zip(x, y, strict=True):
            assert a.grad is not None
            assert b.grad is not None
            assert torch.equal(a.grad, b.grad)


def test_mapped() -> None:
    q, k, v = (torch.stack((x, x.flip(0), 2 * x)) for x in qkv(100, 150))
    for heads in (1, 4):
        for B in (1, 2):
            mask = BlockMask.from_mask(drawn(B, heads, 100, 150), 64)
            mapped = torch.vmap(lambda q, k, v, mask=mask: attention(q, k, v, mask=mask))(q, k, v)
            for i in range(3):
                torch.testing.assert_close(mapped[i], attention(q[i], k[i], v[i], mask=mask))


@pytest.mark.parametrize("at_once", [second_order.BLOCK_ELEMENTS, 2 * 4 * 90 * 9])
def test_second_derivatives(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(second_order, "BLOCK_ELEMENTS", at_once)  # all rows at once, or few
    mask = BlockMask.from_mask(drawn(2, 1, 70, 90), 64)
    found = []
    for given in (mask, mask.to_dense()):
        q, k, v = qkv(70, 90, grad=True)
        (dq,) = torch.autograd.grad(
            attention(q, k, v, mask=given).square().sum(), q, create_graph=True
        )
        found.append(torch.autograd.grad(dq.square().sum(), (q, k, v)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_keys_and_blocks_that_nobody_attends_may_hold_anything() -> None:
    mask = drawn(200, 200)
    mask[:, 64:128], mask[:, 5] = False, False
    q, k, v = qkv(200, 200, grad=True)
    expected = attention(q, k, v, mask=mask)
    spoilt = [x.detach().clone() for x in (k, v)]
    for x in spoilt:
        x[:, :, 64:128], x[:, :, 5] = float("nan"), float("inf")
        x.requires_grad_()
    found = attention(q, *spoilt, mask=BlockMask.from_mask(mask, 64))
    torch.testing.assert_close(found, expected)
    grads = torch.autograd.grad(found.sum(), (q, *spoilt))
    for a, b in zip(grads, torch.autograd.grad(expected.sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(a, b)


def test_raw_operator_refuses_entries_that_are_not_there() -> None:
    from attnfast import ops
    from attnfast.call import Inputs, Options

    q = torch.ones(1, 1, 100, 16)
    mask = BlockMask.from_mask(drawn(100, 100), 64)
    index = mask.index.clone()
    index[0, 0] = 2
    starts = mask.starts.clone()
    starts[0, 0, 1] = 99
    for fields, message in (
        ((mask.starts, index, mask.bits), "block_index must hold blocks below 2"),
        ((starts, mask.index, mask.bits), "block_starts must ascend to at most 4"),
        (
            (mask.starts[:, :, 1:], mask.index, mask.bits),
            "block_starts must be (1 or 1, 1 or 1, 10)",
        ),
        ((mask.starts, mask.index, mask.bits[:, :32]), "of size 64 or 128, got (4, 32, 2)"),
    ):
        inputs = Inputs(q, q, q)._replace(
            block_starts=fields[0], block_index=fields[1], block_bits=fields[2]
        )
        with pytest.raises(RuntimeError, match=re.escape(message)):
            ops.CPU.fwd(*inputs, *Options(1.0))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("padding", [None, torch.bool, torch.float32])
def test_layer(training: bool, padding: torch.dtype | None) -> None:
    torch.manual_seed(0)
    layer = MultiheadAttention(32, 4, batch_first=True).train(training)
    x = torch.randn(2, 130, 32)
    mask = BlockMask.from_documents(torch.arange(130) // 50, block_size=64)
    given: dict[str, Any] = {"need_weights": not training, "is_causal": True}
    if padding is not None:
        ignored = torch.zeros(2, 130)
        ignored[1, 100:] = -torch.inf
        given["key_padding_mask"] = ignored if padding.is_floating_point else ignored < 0
    found, expected = [], []
    with torch.set_grad_enabled(training):
        causal = torch.ones(130, 130, dtype=torch.bool).tril()
        dense = ~(mask.to_dense()[0, 0] & causal)
        for results, attn_mask in ((found, mask), (expected, dense)):
            if attn_mask is dense:
                given["is_causal"] = False
            out, weights = layer(x, x, x, attn_mask=attn_mask, **given)
            results.append(out)
            if weights is not None:
                results.append(weights)
            if training:
                results += torch.autograd.grad(out.square().sum(), tuple(layer.parameters()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_layer_refuses_appended_keys() -> None:
    layer = MultiheadAttention(32, 4, batch_first=True, add_zero_attn=True)
    x = torch.randn(2, 70, 32)
    message = "attn_mask must be a Tensor where add_bias_kv or add_zero_attn appends keys"
    with pytest.raises(ValueError, match=message):
        layer(x, x, x, attn_mask=BlockMask.strided(70, 70, 3))

"""What an installed attnfast has to do under any torch, beside ``python -m attnfast --check``.

Run in the environment's own Python, without a compiler. Prints one JSON object: where the package
lies, and what was tried.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from torch import Tensor, nn

import attnfast


def replaced_encoder_is_the_same() -> None:
    """A padded encoder in training and inference, before and after replace, forward and back."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    stock = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    ours = copy.deepcopy(stock)
    assert len(attnfast.replace(ours, backend="cpu", verbose=False).replaced) == 2
    x = torch.randn(2, 9, 32)
    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[1, 5:] = True
    for training in (True, False):
        outputs = [
            model.train(training)(x, src_key_padding_mask=padding) for model in (stock, ours)
        ]
        torch.testing.assert_close(outputs[1][~padding], outputs[0][~padding], rtol=0, atol=1e-5)
    for out in outputs:
        out[~padding].square().sum().backward()
    for mine, theirs in zip(ours.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-4)


def compiles_in_one_graph() -> None:
    """torch.compile without breaks, forward and backward, with another length afterwards."""

    def loss(q: Tensor, bias: Tensor) -> Tensor:
        out, stats = attnfast.attention(
            q, q, q, bias=bias, causal=True, return_stats=True, backend="cpu"
        )
        return out.square().sum() + stats.entropy.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (10, 17):
        q = torch.randn(2, 2, length, 16, requires_grad=True)
        bias = torch.randn(1, 2, length, length, requires_grad=True)
        expected = torch.autograd.grad(loss(q, bias), (q, bias))
        for mine, theirs in zip(
            torch.autograd.grad(compiled(q, bias), (q, bias)), expected, strict=True
        ):
            torch.testing.assert_close(mine, theirs)


def compiles_under_autocast() -> None:
    """In one graph: a fused backend in bf16, and the reference in fp64."""

    def both(q: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            half = attnfast.attention(q, q, q, backend="cpu")
        return half, attnfast.attention(*[q.double()] * 3)

    q = torch.randn(2, 2, 10, 16)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for mine, theirs in zip(compiled(q), both(q), strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs)


def exports() -> None:
    """torch.export of the layer, and the exported program's result."""
    layer = attnfast.MultiheadAttention(16, 2, batch_first=True, backend="cpu").eval()
    x = torch.randn(2, 7, 16)
    with torch.no_grad():
        program = torch.export.export(layer, (x, x, x))
        torch.testing.assert_close(program.module()(x, x, x), layer(x, x, x))


def decodes_and_packs() -> None:
    """varlen_attention and decode_attention against attention, sequence by sequence."""
    lengths = [3, 0, 6]
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    q, k, v = torch.randn(3, 9, 2, 16)
    packed = attnfast.varlen_attention(q, k, v, ends, ends, 6, 6, causal=True, backend="cpu")
    alone = torch.cat(
        [
            attnfast.attention(*(x[None].transpose(1, 2) for x in rows), causal=True)[0]
            for rows in zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
        ],
        1,
    )
    torch.testing.assert_close(packed, alone.transpose(0, 1))
    cache = [x[None].transpose(1, 2) for x in (q[-1:], k, v)]
    newest = attnfast.decode_attention(*cache, torch.tensor([9], dtype=torch.int32), backend="cpu")
    torch.testing.assert_close(newest, attnfast.attention(*cache))


CHECKS = (
    replaced_encoder_is_the_same,
    compiles_in_one_graph,
    compiles_under_autocast,
    exports,
    decodes_and_packs,
)

if __name__ == "__main__":
    for check in CHECKS:
        check()
    passed = [check.__name__.replace("_", " ") for check in CHECKS]
    print(json.dumps({"package": str(Path(attnfast.__file__).parent), "passed": passed}))

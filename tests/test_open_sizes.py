"""Sizes that a traced program leaves open: rows that a mask keeps, the longest of some lengths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnfast

KEPT = [torch.tensor(x, dtype=torch.bool) for x in ([1, 0, 1, 1], [0, 1, 0, 0], [1, 1, 1, 1])]


class Program(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


def dense(keep: Tensor, x: Tensor) -> Tensor:
    x = x[keep]
    return attnfast.attention(x, x[:, :1], x[:, :1], causal=True)


def masked(keep: Tensor, x: Tensor, mask: Tensor, shared: Tensor) -> Any:
    x = x[keep]
    return attnfast.attention(x, x, x, mask=mask[keep], bias=shared, return_lse=True)


def kept_twice(keep: Tensor, also: Tensor, x: Tensor, align: Tensor, slopes: Tensor) -> Tensor:
    q, k = x[keep], x[also]  # two sizes, for all that the trace knows
    options = {"align": align[also], "alibi_slopes": slopes[also]}
    return attnfast.attention(q, k, k, causal=True, **options)


def torchs(keep: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    x = x[keep]
    return attnfast.scaled_dot_product_attention(x, x, x, mask[keep])


def queries(keep: Tensor, x: Tensor) -> Tensor:
    q = x.transpose(0, 2)[keep].transpose(0, 2)  # (T, H, B, D), of which rows are kept
    return attnfast.attention(q, x, x, window=(1, 1))


def decoded(keep: Tensor, x: Tensor, lengths: Tensor) -> Tensor:
    x = x[keep]
    return attnfast.decode_attention(x[:, :, -1:], x, x, lengths[keep])


def paged(keep: Tensor, x: Tensor, lengths: Tensor, pages: Tensor) -> Tensor:
    cache = x.transpose(1, 2)
    q = x[keep][:, :, -1:]
    return attnfast.decode_attention(q, cache, cache, lengths[keep], page_table=pages[keep])


def varlen(lengths: Tensor, x: Tensor) -> Any:
    longest = lengths.max().item()
    ends = nn.functional.pad(lengths.cumsum(0), (1, 0))
    return attnfast.varlen_attention(x, x, x, ends, ends, longest, longest, return_weights=True)


def varlen_of_kept(keep: Tensor, lengths: Tensor, x: Tensor) -> Any:
    lengths = lengths[keep]
    ends = nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    return attnfast.varlen_attention(x, x, x, ends, ends, lengths.max(), lengths.max())


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = attnfast.MultiheadAttention(16, 4, batch_first=True).eval()

    def forward(self, keep: Tensor, x: Tensor) -> Tensor:
        x = x[keep]
        out: Tensor = self.attention(x, x, x)[0]
        return out


X = torch.randn(4, 2, 4, 8)
MASK = torch.rand(4, 1, 4, 4) > 0.3
LENGTHS = torch.tensor([1, 3, 4, 2])
CASES: dict[Any, tuple[Tensor, ...]] = {
    dense: (X,),
    masked: (X, MASK, torch.randn(2, 1, 4)),
    torchs: (X, MASK),
    queries: (X,),
    decoded: (X, LENGTHS),
    paged: (X, LENGTHS.int(), torch.tensor([[0], [3], [2], [1]])),
    varlen_of_kept: (LENGTHS, torch.randn(10, 2, 8)),
    Layer(): (torch.randn(4, 5, 16),),
}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    ("function", "inputs"), CASES.items(), ids=lambda x: getattr(x, "__name__", "")
)
def test_exported(function: Any, inputs: tuple[Tensor, ...], strict: bool) -> None:
    with torch.no_grad():
        program = torch.export.export(Program(function), (KEPT[0], *inputs), strict=strict).module()
        for keep in KEPT:
            torch.testing.assert_close(program(keep, *inputs), function(keep, *inputs))


@pytest.mark.parametrize("strict", [False, True])
def test_exported_with_the_longest_sequence_open(strict: bool) -> None:
    x = torch.randn(10, 2, 8)
    program = torch.export.export(Program(varlen), (LENGTHS, x), strict=strict).module()
    for lengths in (LENGTHS, torch.tensor([1, 1, 1, 1]), torch.tensor([0, 10, 0, 0])):
        torch.testing.assert_close(program(lengths, x), varlen(lengths, x))


@pytest.mark.parametrize("strict", [False, True])
def test_sizes_that_turn_out_to_differ_raise(strict: bool) -> None:
    inputs = (X, torch.tensor([1, 2, 3, 4]), torch.rand(4, 2))
    made = (KEPT[0], KEPT[0].clone(), *inputs)
    program = torch.export.export(Program(kept_twice), made, strict=strict).module()
    for keep in KEPT:
        found = program(keep, keep.clone(), *inputs)
        torch.testing.assert_close(found, kept_twice(keep, keep, *inputs))
    with pytest.raises((RuntimeError, ValueError)):
        program(KEPT[0], KEPT[1], *inputs)


def test_a_mask_that_turns_out_too_small_raises() -> None:
    def function(keep: Tensor, also: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        return attnfast.attention(x[keep], x[keep], x[keep], mask=mask[also])

    program = torch.export.export(Program(function), (KEPT[0], KEPT[0].clone(), X, MASK)).module()
    want = attnfast.attention(*(X[KEPT[0]],) * 3, mask=MASK[KEPT[1]])  # of one row: it broadcasts
    torch.testing.assert_close(program(KEPT[0], KEPT[1], X, MASK), want)
    with pytest.raises((RuntimeError, ValueError)):
        program(KEPT[2], KEPT[0], X, MASK)


@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True)
@pytest.mark.parametrize("function", [masked, varlen_of_kept])
def test_compiled_with_gradients(function: Any) -> None:
    inputs = CASES[function]
    at = next(i for i, x in enumerate(inputs) if x.is_floating_point() and x.dim() > 1)
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for keep in KEPT:
        grads = []
        for run in (function, compiled):
            given = [x.clone().requires_grad_() if i == at else x for i, x in enumerate(inputs)]
            result = run(keep, *given)
            out = result[0] if isinstance(result, tuple) else result
            grads.append((out, *torch.autograd.grad(out.square().sum(), given[at])))
        torch.testing.assert_close(*grads)

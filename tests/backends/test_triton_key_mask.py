"""A mask that is the same for all queries and heads: what it hides is neither walked nor read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attnfast.kernels.arguments import gather
from attnfast.kernels.key_ends import key_ends_launches, with_key_ends
from attnfast.kernels.launch import launch
from torch import Tensor

import attnfast
from attnfast.call import Inputs, Options

S, D = 300, 32
HIDDEN = slice(130, None)  # of the first entry; of the second all keys, of the third more than half


def key_mask() -> Tensor:
    mask = torch.rand(3, 1, 1, S, generator=torch.Generator().manual_seed(1)) < 0.8
    mask[0, ..., HIDDEN] = False
    mask[1] = False
    mask[2, ..., 64:] = False
    return mask


def results(mask: Tensor, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, stats = attnfast.attention(
        *leaves, mask=mask, return_stats=True, backend="triton", **options
    )
    loss = (out * torch.arange(D).cos()).sum() + stats.entropy.sum()
    return [out, stats.lse, stats.entropy, *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"window": (70, 9), "softcap": 3.0}], ids=str
)
def test_gives_the_bits_of_a_mask_of_all_scores(options: dict[str, Any]) -> None:
    """And what hidden keys and values hold, NaN or inf, stays there, by either mask."""
    q, k, v = (torch.randn(3, heads, S, D) for heads in (4, 2, 2))
    mask = key_mask()
    every = mask.expand(3, 1, S, S).contiguous()
    expected = results(every, q, k, v, **options)
    poisoned_k, poisoned_v = k.clone(), v.clone()
    poisoned_k[0, :, HIDDEN], poisoned_v[0, :, HIDDEN] = torch.nan, torch.nan
    poisoned_k[1], poisoned_v[2, :, 64:] = torch.inf, -torch.inf
    for given in ((mask, k, v), (mask, poisoned_k, poisoned_v), (every, poisoned_k, poisoned_v)):
        found = results(given[0], q, *given[1:], **options)
        for x, y in zip(found, expected, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize(
    ("hidden", "options"), [(64, {}), (90, {"causal": True}), (90, {"bias": True})], ids=str
)
def test_gives_these_bits_where_keys_begin_late(hidden: int, options: dict[str, Any]) -> None:
    """Padding on the left; in one entry with a hole behind it, in one of them a single key."""
    S = 256
    q, k, v = (torch.randn(3, heads, S, D) for heads in (2, 1, 1))
    mask = torch.ones(3, 1, 1, S, dtype=torch.bool)
    mask[0, ..., :hidden] = False
    mask[1, ..., 200:203], mask[1, ..., :10] = False, False
    mask[2], mask[2, ..., hidden + 1] = False, True
    if "bias" in options:
        options = {"bias": torch.randn(1, 1, 1, S)}
    expected = results(mask.expand(3, 1, S, S).contiguous(), q, k, v, **options)
    for x in (k, v):
        x[0, :, :hidden], x[1, :, 200:203], x[1, :, :10] = torch.nan, torch.inf, -torch.inf
        x[2, :, hidden + 2 :] = torch.nan
    for x, y in zip(results(mask, q, k, v, **options), expected, strict=True):
        assert torch.equal(x, y)


ENDS = {  # which keys are attended, of 2,500: the first, the end of their run, the end
    "all": ([(0, 2500)], [0, 2500, 2500]),
    "right padding": ([(0, 1300)], [0, 1300, 1300]),
    "left padding": ([(1100, 2500)], [1100, 2500, 2500]),
    "one": ([(1024, 1025)], [1024, 1025, 1025]),
    "the last": ([(2499, 2500)], [2499, 2500, 2500]),
    "a hole": ([(3, 1024), (1025, 2048)], [3, 1024, 2048]),
    "in another tile": ([(3, 4), (2048, 2049)], [3, 4, 2049]),
    "none": ([], [2500, 0, 0]),
}


def test_where_keys_begin_and_end() -> None:
    mask = torch.zeros(2500, len(ENDS), dtype=torch.bool).t()[:, None, None]  # strided
    for row, (attended, _) in zip(mask, ENDS.values(), strict=True):
        for begin, end in attended:
            row[..., begin:end] = True
    q = torch.zeros(len(ENDS), 2, 2500, 16)
    assert ends_of(mask, q) == [ends for _, ends in ENDS.values()]


def test_where_the_keys_of_one_mask_for_all_end() -> None:
    q = torch.zeros(3, 2, 7, 16)
    assert ends_of(torch.arange(7)[None, None, None] < 5, q) == [[0, 5, 5]] * 3


def ends_of(mask: Tensor, q: Tensor) -> list[list[int]]:
    call = with_key_ends(gather(Inputs(q, q, q, mask=mask), Options(1.0), 1 << 20))
    for job in key_ends_launches(call):
        launch(job)
    return call.x.key_ends.tolist()

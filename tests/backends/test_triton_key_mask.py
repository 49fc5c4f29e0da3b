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


@pytest.mark.parametrize("entries", [1, 3])
@pytest.mark.parametrize("length", [1, 300, 2500])
def test_where_keys_end(entries: int, length: int) -> None:
    """After the last that is attended; 0 where none is. A mask may be shared by all entries."""
    mask = torch.zeros(length, entries, dtype=torch.bool).t()[:, None, None]  # strided
    last = torch.tensor([length - 1, length // 2, 0])[:entries]
    mask[range(entries), 0, 0, last] = True
    mask[:1, 0, 0, 0] = True
    if entries == 3:
        mask[2] = False
    q = torch.zeros(3, 2, length, 16)
    call = with_key_ends(gather(Inputs(q, q, q, mask=mask), Options(1.0), 1 << 20))
    for job in key_ends_launches(call):
        launch(job)
    expected = [length] * 3 if entries == 1 else [length, length // 2 + 1, 0]
    assert call.x.key_ends.tolist() == expected

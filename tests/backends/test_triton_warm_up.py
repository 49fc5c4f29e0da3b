"""Warming up launches what the call launches, as Triton would specialise it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attnfast.kernels import launch as launching

import attnfast


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], set[Any]]:
    """What a run launches: kernels, with all by which they are compiled."""
    jobs: list[launching.Launch] = []
    plain = launching.Launch.options

    def options(job: launching.Launch) -> Any:
        jobs.append(job)
        return plain(job)

    monkeypatch.setattr(launching.Launch, "options", options)

    def run(function: Callable[[], Any]) -> set[Any]:
        jobs.clear()
        function()
        return {
            (job.kernel.__name__, job.grid, job.values, job.features, job.tile, job.config)
            + tuple(described(x) for tensors in job.tensors for x in tensors)
            for job in jobs
        }

    return run


def described(x: Any) -> Any:
    return (x.dtype, x.data_ptr() % 16) if isinstance(x, torch.Tensor) else x


@pytest.mark.parametrize("returned", [{}, {"return_lse": True}], ids=["out", "lse"])
@pytest.mark.parametrize("offset", [0, 1])
def test_nothing_is_new_afterwards(launched: Any, offset: int, returned: dict[str, Any]) -> None:
    x = torch.randn(2 * 20 * 16 + offset)[offset:].view(1, 2, 20, 16).requires_grad_()
    options = {"causal": True, "backend": "triton", **returned}

    def call() -> None:
        results = attnfast.attention(x, x, x, **options)
        torch.autograd.grad(sum(map(torch.sum, results if returned else (results,))), x)

    warm = launched(lambda: attnfast.warm_up(x, x, x, **options))
    assert len(warm) >= 3
    assert launched(call) <= warm


def test_decoding(launched: Any) -> None:
    q, cache, lengths = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 40, 16), torch.tensor([30])
    call = (q, cache, cache, lengths)
    warm = launched(lambda: attnfast.warm_up(*call, backend="triton"))
    assert len(warm) == 2
    assert launched(lambda: attnfast.decode_attention(*call, backend="triton")) <= warm

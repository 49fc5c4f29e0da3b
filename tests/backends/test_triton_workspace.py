"""The scratch that Triton's launches take is what ``explain`` says they take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attnfast.kernels import attention_bias, attention_bwd, attention_decode, attention_fwd, backend
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from attnfast.call import DecodeInputs, DecodeOptions, Inputs, Options, Upstream


class Storages(TorchDispatchMode):
    """Every memory that a tensor was given, in bytes by its address."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.kept += [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        return result


def addresses(*tensors: Any) -> dict[int, int]:
    storages = [x.untyped_storage() for x in tensors if isinstance(x, Tensor)]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def taken(operator: Any, args: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes that an operator takes beside what it is given and gives."""
    for module in (attention_fwd, attention_bwd, attention_bias, attention_decode):
        monkeypatch.setattr(module, "launch", lambda job: None)
    monkeypatch.setattr(backend.launch, "launch", lambda job: None)
    with Storages() as storages:
        results = operator(*args)
    known = addresses(*args, *results)
    return sum(size for at, size in addresses(*storages.kept).items() if at not in known)


@pytest.mark.parametrize("bias", [None, (1, 1, 70, 70), (1, 3, 1, 70), (2, 3, 70, 70)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("varlen", [False, True])
def test_backward(
    bias: tuple[int, ...] | None,
    dtype: torch.dtype,
    varlen: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if varlen and bias is not None and bias[0] > 1:
        bias = (1, *bias[1:])  # sequences share it
    B = 1 if varlen else 2
    q, k, v = (torch.zeros(B, 3, 70, 32) for _ in "qkv")
    inputs = Inputs(q, k, v)
    if bias is not None:
        inputs = inputs._replace(bias=torch.zeros(bias, dtype=dtype, requires_grad=True))
    options = Options(1.0)
    if varlen:
        ends = torch.tensor([0, 30, 70], dtype=torch.int32)
        inputs = inputs._replace(cu_seqlens_q=ends, cu_seqlens_k=ends)
        options = options._replace(max_seqlen_q=70, max_seqlen_k=70)
    norm = torch.zeros(2, B, 3, 70)
    upstream = Upstream.plain(q, q, norm)._replace(need_dbias=bias is not None)
    said = backend.workspace(inputs, options)
    given = (None if x is None else x.detach() for x in inputs)
    assert said == (0, taken(backend.bwd, (*upstream, *given, *options), monkeypatch))
    assert said[1] >= norm.nbytes // 2


def test_a_mask_of_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward keep where its keys end."""
    q, norm = torch.zeros(2, 3, 70, 32), torch.zeros(2, 2, 3, 70)
    inputs = Inputs(q, q, q, mask=torch.zeros(2, 1, 1, 70, dtype=torch.bool))
    upstream = Upstream.plain(q, q, norm)
    assert backend.workspace(inputs, Options(1.0)) == (
        taken(backend.fwd, (*inputs, *Options(1.0)), monkeypatch),
        taken(backend.bwd, (*upstream, *inputs, *Options(1.0)), monkeypatch),
    )


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("received", [False, True])
def test_decode(paged: bool, received: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = torch.tensor([100, 1500], dtype=torch.int32)
    cache = torch.zeros(9, 300, 2, 64) if paged else torch.zeros(2, 2, 2000, 64)
    table = torch.zeros(2, 5, dtype=torch.int32) if paged else None
    inputs = DecodeInputs(torch.zeros(2, 8, 1, 64), cache, cache, lengths, table)
    options = DecodeOptions(1.0, received=received)
    said = backend.workspace(inputs, options)
    assert said == (taken(backend.decode, (*inputs, *options), monkeypatch), 0)
    assert said[0] > 0

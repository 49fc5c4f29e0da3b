"""FLOP counted by torch.utils.flop_counter: as many as torch's own formulas for its attention."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import (
    FlopCounterMode,
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

import attnfast
from attnfast import ops

Q, K, V = (2, 4, 6, 8), (2, 2, 9, 8), (2, 2, 9, 16)
OUT = (2, 4, 6, 16)


def count(call: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_attention_counts_as_torchs(dtype: torch.dtype) -> None:
    forward, backward = sdpa_flop_count(Q, K, V), sdpa_backward_flop_count(OUT, Q, K, V)
    q, k, v = leaves(Q, K, V, dtype=dtype)
    assert count(lambda: attnfast.attention(q, k, v, causal=True)) == forward
    call = lambda: attnfast.attention(q, k, v, window=(2, 0)).sum().backward()  # noqa: E731
    assert count(call) == forward + backward


def test_varlen_attention_counts_its_sequences() -> None:
    lengths = [(3, 2), (0, 4), (5, 7)]
    q, k, v = leaves((8, 4, 8), (13, 2, 8), (13, 2, 16))
    ends = [torch.tensor([0, *x]).cumsum(0).int() for x in zip(*lengths, strict=True)]
    shapes = [((1, 4, T, 8), (1, 2, S, 8), (1, 2, S, 16)) for T, S in lengths]
    wanted = sum(sdpa_flop_count(*x) for x in shapes)
    assert count(lambda: attnfast.varlen_attention(q, k, v, *ends, 5, 7)) == wanted
    wanted += sum(sdpa_backward_flop_count((1, 4, x[0][2], 16), *x) for x in shapes)
    call = lambda: attnfast.varlen_attention(q, k, v, *ends, 5, 7).sum().backward()  # noqa: E731
    assert count(call) == wanted

    def fake() -> None:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            given = [mode.from_tensor(x.detach()) for x in (q, k, v, *ends)]
            attnfast.varlen_attention(*given, 5, 7)

    longest = sdpa_flop_count((3, 4, 5, 8), (3, 2, 7, 8), (3, 2, 7, 16))
    assert count(fake) == longest


@pytest.mark.parametrize("paged", [False, True])
def test_decoding_counts_what_the_cache_holds(paged: bool) -> None:
    q, lengths = torch.randn(2, 4, 1, 8), torch.tensor([3, 9])
    k, v, table = torch.randn(2, 2, 12, 8), torch.randn(2, 2, 12, 16), None
    if paged:
        k, v = torch.randn(5, 6, 2, 8), torch.randn(5, 6, 2, 16)
        table = torch.tensor([[0, 1], [3, 4]])
    call = lambda: attnfast.decode_attention(q, k, v, lengths, page_table=table)  # noqa: E731
    assert count(call) == sum(
        sdpa_flop_count((1, 4, 1, 8), (1, 2, S, 8), (1, 2, S, 16)) for S in (3, 9)
    )


@pytest.mark.parametrize("batch_first", [False, True])
def test_layers_count_as_their_projections_and_attention(batch_first: bool) -> None:
    ours = attnfast.MultiheadAttention(16, 4, batch_first=batch_first)
    x = torch.randn(3, 5, 16)
    B, T = (3, 5) if batch_first else (5, 3)
    head = (B, 4, T, 4)
    projections = 2 * B * T * 16 * (3 * 16 + 16)
    for context in (torch.enable_grad, torch.no_grad):
        with context():
            assert count(lambda: ours(x, x, x)) == projections + sdpa_flop_count(head, head, head)
    packed = torch.randn(3, 5, 48)
    layer = (packed, 4, batch_first, None, None, False, 0.0, None)
    assert count(lambda: ops.SELF_ATTENTION(*layer, 0)) == sdpa_flop_count(head, head, head)
    out, norm, _ = ops.SELF_ATTENTION(*layer, 0)
    wanted = sdpa_backward_flop_count(head, head, head, head)
    assert count(lambda: ops.SELF_ATTENTION_BWD(out, out, norm, *layer)) == wanted


def test_modules_are_told_apart() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True))
    attnfast.replace(model)
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(3, 5, 16))
    counted = counter.get_flop_counts()["Sequential.0.self_attn"]
    assert counted[torch.ops.attnfast.cpu_fwd] > 0


def test_every_operator_has_a_formula() -> None:
    for backend, each in ops.DEFINED.items():
        for op in each:
            assert op.overloadpacket in flop_registry, backend
    assert {"cpu", "cuda", "triton", "gluon"} <= ops.DEFINED.keys()
    for op in (ops.SELF_ATTENTION, ops.SELF_ATTENTION_BWD):
        assert op.overloadpacket in flop_registry


LATE = """
import sys, importlib.util
import {first}
import attnfast
heavy = "torch.utils.flop_counter", "torch.distributed.tensor", "triton"
imported = [name for name in heavy if name in sys.modules]
importlib.util.find_spec("torch.utils.flop_counter")  # only looked for
import torch.utils.flop_counter as counter
print(imported, torch.ops.attnfast.cpu_fwd in counter.flop_registry, counter.__loader__.name,
      [x for x in sys.meta_path if getattr(x, "name", "") == counter.__name__])
"""


@pytest.mark.parametrize("first", ["torch", "torch.utils.flop_counter"])
def test_formulas_are_there_whatever_is_imported_first(first: str) -> None:
    result = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", LATE.format(first=first)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    early = ["torch.utils.flop_counter"] if first != "torch" else []
    imported, rest = result.stdout.strip().split("] ", 1)
    assert [x.strip("' ") for x in imported.strip("[").split(",") if x][: len(early)] == early
    assert first != "torch" or imported == "["
    assert rest == "True torch.utils.flop_counter []"


def test_what_cannot_be_added_is_a_warning() -> None:
    def fails() -> None:
        raise AttributeError("gone")

    with pytest.warns(RuntimeWarning, match=r"nothing was added to sys: AttributeError: gone"):
        attnfast.late_imports.when_imported("sys", fails)

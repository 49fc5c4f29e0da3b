"""The operators under torch.compile, and their registration."""

from __future__ import annotations

import pytest
import torch
from accuracy import check
from cases import EVERYTHING, Case, problem
from dense import Trial

import attnfast
from attnfast.call import DecodeInputs, DecodeOptions, Upstream


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> tuple:
    return attnfast.attention(
        q, k, v, bias=bias, causal=True, softcap=3.0, return_lse=True, backend="triton"
    )


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
def test_one_graph_forward_and_backward(compiler: str) -> None:
    given = problem(Case(bias="hts", causal=True, softcap=3.0, H_kv=1, T=20, S=30))
    inputs = given.inputs
    leaves = [x.detach().requires_grad_() for x in (*inputs[:3], inputs.bias)]
    out, lse = torch.compile(attend, fullgraph=True, backend=compiler)(*leaves)
    grads = torch.autograd.grad(out, leaves, given.cotangents.out)
    names = ("dq", "dk", "dv", "dbias")
    results = {"out": out.detach(), "lse": lse.detach(), **dict(zip(names, grads, strict=True))}
    check(results, Trial(inputs, given.options, given.cotangents))


@pytest.mark.parametrize("varlen", [False, True])
def test_registration(varlen: bool) -> None:
    """Schemas, fakes and real results agree."""
    case = Case(T=9, S=11, H_kv=1, stats=2, weights="mean", lengths=((4, 5), (3, 2)) * varlen)
    inputs, options, _ = problem(case)
    with torch.no_grad():
        torch.library.opcheck(
            torch.ops.attnfast.triton_fwd.default,
            (*inputs, *options),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_no_result_has_the_memory_of_another() -> None:
    """Not even the empty ones: torch's compiler refuses such operators."""
    inputs, options, _ = problem(Case(T=3, S=3, D=8))
    with torch.no_grad():
        outputs = torch.ops.attnfast.triton_fwd(*inputs, *options)
        out, _, norm, *_ = outputs
        gradients = torch.ops.attnfast.triton_bwd(
            *Upstream.plain(out, out, norm), *inputs, *options
        )
    for results in (outputs, gradients):
        assert len({x.untyped_storage()._cdata for x in results}) == len(results)


def test_it_is_named_whatever_the_device() -> None:
    assert EVERYTHING.H
    q = torch.randn(1, 1, 3, 8)
    with torch.no_grad():
        cache = DecodeInputs(q, q, q, torch.tensor([3]).int())
        out = torch.ops.attnfast.triton_decode(*cache, *DecodeOptions(0.3))[0]
    expected = attnfast.attention(q, q, q, causal=True, scale=0.3, backend="reference")
    torch.testing.assert_close(out, expected)

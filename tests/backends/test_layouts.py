"""Strides, empty dimensions, very many heads, and offsets beyond 32 bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accuracy import check
from cases import DTYPES, EVERYTHING, Case, bf16, fp16, fp32, problem, run
from dense import Cotangents, Trial
from torch import Tensor

import attnfast
from attnfast.call import Inputs, Options


def transposed(x: Tensor) -> Tensor:
    """(B, H, T, D) as a view of (B, T, H, D): what a projection gives."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def sequence_first(x: Tensor) -> Tensor:
    """(B, H, T, D) as a view of (T, B, H, D)."""
    return x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)


def inside_larger(x: Tensor) -> Tensor:
    """X as an odd corner of a larger tensor, so that no row is aligned."""
    larger = x.new_full([n + 3 for n in x.shape], torch.nan)
    corner = larger[1:-2, 2:-1, 1:-2, 1:-2]
    return corner.copy_(x)


def every_other_row(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, 2)[:, :, ::2]


def column_major(x: Tensor) -> Tensor:
    """The last stride is not 1: the one layout that is copied."""
    return x.mT.contiguous().mT


def same_for_the_batch(x: Tensor) -> Tensor:
    return x[:1].expand_as(x)


def same_for_all_heads(x: Tensor) -> Tensor:
    return x[:, :1].expand_as(x)


def same_for_all_rows(x: Tensor) -> Tensor:
    return x[:, :, :1].expand_as(x)


def same_everywhere(x: Tensor) -> Tensor:
    return x[:1, :1, :1, :1].expand_as(x)


LAYOUTS = (
    transposed,
    sequence_first,
    inside_larger,
    every_other_row,
    column_major,
    same_for_the_batch,
    same_for_all_heads,
    same_for_all_rows,
    same_everywhere,
)
PLAIN = Case("plain", H=4, H_kv=2, causal=True, D=40)


def stride_order(x: Tensor) -> list[int]:
    """The dimensions but the last, largest stride first."""
    return sorted(range(3), key=x.stride, reverse=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_inputs_of_any_strides(
    backend: str, layout: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    given = problem(replace(PLAIN, dtype=dtype))
    q, k, v = (layout(x) for x in given.inputs[:3])
    given = given._replace(inputs=given.inputs._replace(q=q, k=k, v=v))
    check(run(given, backend), given)


@pytest.mark.reference(1)
@pytest.mark.parametrize(
    "layout", [transposed, sequence_first, inside_larger], ids=lambda f: f.__name__
)
def test_out_keeps_the_order_of_strides(layout: Callable[[Tensor], Tensor], backend: str) -> None:
    """So that a transposed view needs no copy before the output projection."""
    q, k, v = (layout(x) for x in problem(PLAIN).inputs[:3])
    out = attnfast.attention(q, k, v, causal=True, backend=backend)
    assert stride_order(out) == stride_order(q)
    in_memory = out.permute(*stride_order(out), 3)
    assert in_memory.is_contiguous()


@pytest.mark.parametrize(
    "layout", [transposed, sequence_first, inside_larger], ids=lambda f: f.__name__
)
def test_gradients_keep_the_order_of_strides(
    backend: str, layout: Callable[[Tensor], Tensor]
) -> None:
    leaves = [layout(x).requires_grad_() for x in problem(PLAIN).inputs[:3]]
    out = attnfast.attention(*leaves, causal=True, backend=backend)
    for leaf, grad in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
        assert stride_order(grad) == stride_order(leaf)
        assert grad.stride(-1) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_qkv(backend: str, dtype: torch.dtype) -> None:
    """Views of one (B, T, 3, H, D) tensor, whose gradient comes back whole."""
    rng = torch.Generator().manual_seed(0)
    packed = torch.randn(2, 70, 3, 4, 24, generator=rng).to(dtype).requires_grad_()
    grad_out = torch.randn(2, 4, 70, 24, generator=rng).to(dtype)
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    out, lse = attnfast.attention(q, k, v, causal=True, return_lse=True, backend=backend)
    (grad,) = torch.autograd.grad(out, packed, grad_out)
    dq, dk, dv = grad.permute(2, 0, 3, 1, 4)
    given = Trial(
        Inputs(*(x.detach() for x in (q, k, v))),
        Options(24**-0.5, causal=True),
        Cotangents(grad_out),
    )
    check({"out": out.detach(), "lse": lse.detach(), "dq": dq, "dk": dk, "dv": dv}, given)


GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda g: g.mT.contiguous().mT,
    "of a sum": lambda g: g.flatten()[:1].view([1] * g.dim()).expand_as(g),
    "broadcast over heads": lambda g: g[:, :1].expand_as(g),
    "inside a larger tensor": lambda g: torch.nn.functional.pad(g, (3, 2))[..., 3:-2],
    "every other entry": lambda g: g.repeat_interleave(2, -1)[..., ::2],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weights", ["mean", "per head"])
@pytest.mark.parametrize("layout", GRADIENTS)
def test_gradients_of_any_strides(
    backend: str, layout: str, weights: str, dtype: torch.dtype
) -> None:
    case = Case(
        T=20, weights=weights, stats=1, grads=("out", "lse", "entropy", "weights"), dtype=dtype
    )
    given = problem(case)
    views = {name: GRADIENTS[layout](g) for name, g in given.cotangents._asdict().items()}
    given = given._replace(cotangents=Cotangents(**views))
    check(run(given, backend), given)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_mask_and_bias_of_any_strides(backend: str, layout: Callable[[Tensor], Tensor]) -> None:
    """An expanded bias is read through its zero strides; its gradient has its full shape."""
    given = problem(Case(mask="bhts", bias="bhts"))
    mask, bias = given.inputs.mask, given.inputs.bias
    assert mask is not None
    assert bias is not None
    mask, bias = layout(mask.float()) == 1, layout(bias)
    if mask.shape[0] == 2 and layout is same_everywhere:
        mask = torch.ones_like(mask)
    given = given._replace(inputs=given.inputs._replace(mask=mask, bias=bias))
    check(run(given, backend), given)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_mask_and_bias_of_fewer_dimensions(backend: str, dims: int) -> None:
    given = problem(Case(mask="hts", bias="hts"))
    inputs = given.inputs
    assert inputs.mask is not None
    assert inputs.bias is not None
    corner = (0,) * (4 - dims)
    mask, bias = inputs.mask[corner], inputs.bias[corner].requires_grad_()
    given = given._replace(
        inputs=inputs._replace(
            mask=mask[(None,) * (4 - dims)], bias=bias.detach()[(None,) * (4 - dims)]
        )
    )
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    out, lse = attnfast.attention(*leaves, mask=mask, bias=bias, return_lse=True, backend=backend)
    grads = torch.autograd.grad(out, (*leaves, bias), given.cotangents.out)
    results = dict(zip(("dq", "dk", "dv", "dbias"), grads, strict=True))
    assert results["dbias"].shape == bias.shape
    results["dbias"] = results["dbias"][(None,) * (4 - dims)]
    check({"out": out.detach(), "lse": lse.detach(), **results}, given)


@pytest.mark.parametrize("sizes", [
    {"B": 0}, {"T": 0}, {"S": 0}, {"T": 0, "S": 0}, {"B": 0, "T": 0, "S": 0},
    {"lengths": ((0, 0),)}, {"lengths": ((0, 7), (0, 3))}, {"lengths": ((7, 0), (3, 0))},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_of_something(backend: str, sizes: dict[str, object], dtype: torch.dtype) -> None:
    grads = ("out", "lse", "entropy", "weights")
    plain = Case(stats=2, weights="per head", grads=grads, bias="hts", sinks=True, dtype=dtype)
    if "lengths" not in sizes:
        plain = replace(plain, mask="bs")
    for case in (
        plain,
        replace(plain, weights="mean"),
        replace(EVERYTHING, mask=None, dtype=dtype),
    ):
        given = problem(replace(case, **sizes))
        check(run(given, backend), given)


@pytest.mark.parametrize(
    ("B", "H", "dtype"), [(66_000, 1, fp32), (1, 66_000, bf16), (270, 260, fp16)]
)
def test_more_than_65535_heads(B: int, H: int, dtype: torch.dtype) -> None:
    """CUDA's grid.y ends at 65,535, and 16-bit counters too."""
    given = problem(
        Case(B=B, H=H, H_kv=H, T=2, S=3, D=2, dtype=dtype, causal=True, dropout_p=0.2, stats=1)
    )
    check(run(given, "cpu"), given)


def test_more_than_65535_sequences() -> None:
    case = Case(H=1, H_kv=1, D=2, lengths=((1, 2),) * 3)
    q, k, v = problem(case).inputs[:3]
    n = 66_000
    q, k, v = (x[0].transpose(0, 1).repeat(n // 3, 1, 1) for x in (q, k, v))
    ends = torch.arange(n + 1).int()
    out = attnfast.varlen_attention(q, k, v, ends, 2 * ends, 1, 2, backend="cpu")
    assert torch.equal(out, out[:3].repeat(n // 3, 1, 1))


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_strides_beyond_32_bits(backend: str, dim: int, tmp_path: Path) -> None:
    """Two slices 2**31 elements apart, in a sparse file of which few pages are ever touched."""
    shape, far = (2, 2, 2, 16), 2**31 + 8
    strides = [256, 64, 16, 1]
    strides[dim] = far
    near = problem(Case(T=2, S=2, dtype=bf16))
    tensors = []
    for name, x in zip("qkv", near.inputs[:3], strict=True):
        size = far + 1024
        file = torch.from_file(str(tmp_path / name), shared=True, size=size, dtype=bf16)
        tensors.append(file.as_strided(shape, strides).copy_(x))
    wide = near._replace(inputs=Inputs(*tensors))
    expected, results = run(near, backend), run(wide, backend)
    for name, result in results.items():
        assert torch.equal(result, expected[name]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("varlen", [False, True])
def test_inputs_are_never_modified(backend: str, varlen: bool, dtype: torch.dtype) -> None:
    lengths = ((30, 50), (65, 129)) if varlen else ()
    given = problem(
        replace(EVERYTHING, dtype=dtype, lengths=lengths, mask=None if varlen else "bs")
    )
    tensors = [x for x in (*given.inputs, *given.cotangents) if x is not None]
    before = [(x.clone(), x._version) for x in tensors]
    run(given, backend)
    for x, (copy, version) in zip(tensors, before, strict=True):
        assert torch.equal(x, copy)
        assert x._version == version

"""The raw operators: schemas, fakes, gradients, and that none of them is lost."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import Case, problem
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import attnfast
from attnfast import ops
from attnfast.backends import cpu
from attnfast.call import (
    BY_DISTANCE,
    DISTANCES,
    LARGEST,
    MEAN,
    DecodeOptions,
    Gradients,
    Inputs,
    Options,
    Outputs,
    Pooling,
    forward_call,
)
from attnfast.dispatch import BACKENDS

SMALL = Case(B=2, H=4, H_kv=2, T=5, S=7, D=16, D_v=8, causal=True)
EVERYTHING = replace(
    SMALL,
    mask="bs",
    bias="hs",
    bias_dtype=torch.float64,
    alibi="bh",
    sinks=True,
    align="tensor",
    softcap=3.0,
    window=(4, 2),
    dropout_p=0.25,
    stats=2,
    weights="per head",
)
CASES = {
    "plain": SMALL,
    "everything": EVERYTHING,
    "mean weights, bf16": replace(EVERYTHING, weights="mean", dtype=torch.bfloat16),
    "fp16, bottom right": replace(SMALL, dtype=torch.float16, align="bottom_right"),
    "varlen": replace(
        EVERYTHING, lengths=((3, 2), (0, 4), (5, 7)), mask="s", bias="ht", alibi="h", align=3
    ),
    "no queries": replace(SMALL, T=0, stats=2, weights="mean"),
    "no keys": replace(SMALL, S=0, stats=2, weights="per head"),
    "no batch": replace(SMALL, B=0),
}


def forward_arguments(case: Case) -> tuple[Any, ...]:
    inputs, options, _ = problem(case)
    return (*inputs, *options)


def backward_arguments(case: Case, *, bias: bool = True, sinks: bool = True) -> tuple[Any, ...]:
    inputs, options, _ = problem(case)
    outputs = Outputs(*ops.CPU.fwd(*inputs, *options))
    stats = outputs.stats if options.stats else None
    return (
        torch.randn_like(outputs.out),
        torch.randn_like(outputs.lse),
        None if stats is None else torch.randn_like(outputs.lse),
        torch.randn_like(outputs.weights) if options.weights else None,
        outputs.out,
        outputs.norm,
        None if stats is None else stats[1],
        bias and inputs.bias is not None,
        sinks and inputs.sinks is not None,
        *inputs,
        *options,
    )


def decode_arguments(
    dtype: torch.dtype = torch.float32, paged: bool = False, received: bool = False
) -> tuple[Any, ...]:
    q = torch.randn(2, 3, 4, 16, dtype=dtype).transpose(1, 2)
    k, v = torch.randn(2, 2, 24, 16, dtype=dtype), torch.randn(2, 2, 24, 8, dtype=dtype)
    table = None
    if paged:
        k, v = torch.randn(5, 8, 2, 16, dtype=dtype), torch.randn(5, 8, 2, 8, dtype=dtype)
        table = torch.tensor([[0, 3, -1], [4, 1, 2]], dtype=torch.int32)
    lengths = torch.tensor([11, 24], dtype=torch.int32)
    bias, slopes, sinks = torch.randn(4, 1, 24)[None], torch.rand(1, 4), torch.randn(4)
    windows = torch.tensor([[9, 0], [-1, 2], [0, -1], [3, 3]], dtype=torch.int32)
    tensors = (q, k, v, lengths, table, bias, slopes, sinks, None, windows)
    return *tensors, *DecodeOptions(0.25, 2.0, 9, received=received)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_opcheck_of_forward(case: Case) -> None:
    torch.library.opcheck(ops.CPU.fwd, forward_arguments(case))


def pooled_arguments(case: Case, kind: int = BY_DISTANCE) -> tuple[Any, ...]:
    inputs, options, _ = problem(case)
    norm = Outputs(*ops.CPU.fwd(*inputs, *options)).norm
    tokens = (torch.zeros(x.shape[0], x.shape[2], dtype=torch.int32) for x in inputs[:2])
    columns = DISTANCES if kind == BY_DISTANCE else 4
    return *inputs, *options, *Pooling(norm, *tokens, kind, 3, columns)


@pytest.mark.parametrize("kind", [MEAN, LARGEST, BY_DISTANCE])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_opcheck_of_pooled(case: Case, kind: int) -> None:
    torch.library.opcheck(ops.CPU.pooled, pooled_arguments(case, kind))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_opcheck_of_backward(case: Case) -> None:
    torch.library.opcheck(ops.CPU.bwd, backward_arguments(case))


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("received", [False, True])
def test_opcheck_of_decode(paged: bool, received: bool) -> None:
    torch.library.opcheck(ops.CPU.decode, decode_arguments(paged=paged, received=received))


def test_the_schema_is_inputs_then_options() -> None:
    names = [argument.name for argument in ops.CPU.fwd._schema.arguments]
    assert names == [*Inputs._fields, *Options._fields]
    assert [result.name for result in ops.CPU.fwd._schema.returns] == list(Outputs._fields)
    names = [argument.name for argument in ops.CPU.bwd._schema.arguments]
    assert names[9:] == [*Inputs._fields, *Options._fields]
    assert [result.name for result in ops.CPU.bwd._schema.returns] == list(Gradients._fields)


ORDERS = list(itertools.permutations(range(3)))


def permuted(order: tuple[int, ...], *sizes: int) -> Tensor:
    """A tensor (B, H, T, D) whose first three dimensions lie in memory in this order."""
    x = torch.randn(*(sizes[d] for d in order), sizes[3])
    return x.permute(*(order.index(d) for d in range(3)), 3)


@pytest.mark.parametrize("sizes", [(2, 4, 5), (1, 4, 5), (2, 4, 1), (3, 2, 3)], ids=str)
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_results_lie_in_memory_like_their_inputs_and_like_the_fakes_say(
    order: tuple[int, ...], sizes: tuple[int, ...]
) -> None:
    B, H, T = sizes
    q, k, v = (permuted(order, B, H, T, D) for D in (16, 16, 8))
    assert_same_layout(q, k, v)
    out = ops.CPU.fwd(*Inputs(q, k, v), *Options(0.25))[0]
    memory = [d for d in range(3) if sizes[d] > 1]
    assert sorted(memory, key=out.stride, reverse=True) == [d for d in order if sizes[d] > 1]
    assert out.stride(3) == 1


@pytest.mark.parametrize("layout", ["packed", "sliced", "expanded", "padded"])
def test_views_that_share_memory(layout: str) -> None:
    if layout == "packed":  # one projection for q, k and v
        q, k, v = torch.randn(2, 5, 3, 4, 16).transpose(1, 3).unbind(2)
    elif layout == "sliced":
        q, k, v = (torch.randn(4, 8, 10, 32)[::2, ::2, ::2, :16] for _ in range(3))
    elif layout == "expanded":
        q = torch.randn(2, 4, 5, 16)
        k, v = (torch.randn(1, 1, 5, 16).expand(2, 4, 5, 16) for _ in range(2))
    else:
        q, k, v = (torch.randn(2, 4, 5, 24)[..., 3:19] for _ in range(3))
    assert_same_layout(q, k, v)


def assert_same_layout(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Fakes and kernels agree on every size, stride and dtype."""
    forward = (*Inputs(q, k, v), *Options(0.25, stats=2, weights=2))
    real = Outputs(*ops.CPU.fwd(*forward))
    backward = (real.out, None, None, None, real.out, real.norm, None, False, False, *forward)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:

        def fake(arguments: tuple[Any, ...]) -> list[Any]:
            return [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in arguments]

        fakes = [*ops.CPU.fwd(*fake(forward)), *ops.CPU.bwd(*fake(backward))]
    for x, y in zip([*real, *ops.CPU.bwd(*backward)], fakes, strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        for d in range(x.dim()):
            assert x.shape[d] <= 1 or x.stride(d) == y.stride(d)


def differentiable(arguments: tuple[Any, ...], *places: int) -> tuple[Any, ...]:
    return tuple(
        x.detach().clone().requires_grad_() if i in places else x for i, x in enumerate(arguments)
    )


PRIMALS = (0, 1, 2, 4, 6)  # q, k, v, bias and sinks among the tensors of a call
GRADIENTS = (0, 1, 2, 3, *(9 + i for i in PRIMALS))  # what second derivatives are by
BACKWARD_CASES = {
    "plain": SMALL,
    "everything": replace(EVERYTHING, align="bottom_right"),
    "varlen": replace(CASES["varlen"], align="bottom_right", mask="ts"),
}


def sum_of(results: Any) -> Tensor:
    """A scalar of all that is differentiable."""
    return sum((x.float().sin().sum() for x in results if x.requires_grad), torch.zeros(()))


def wanted(arguments: tuple[Any, ...], places: tuple[int, ...]) -> list[Tensor]:
    return [arguments[i] for i in places if arguments[i] is not None]


@pytest.mark.parametrize("case", BACKWARD_CASES.values(), ids=BACKWARD_CASES)
def test_the_forward_operator_has_the_gradients_of_attention(case: Case) -> None:
    arguments = forward_arguments(case)
    places = tuple(i for i in PRIMALS if arguments[i] is not None)
    found = []
    for run in (
        lambda *x: ops.CPU.fwd(*x),
        lambda *x: attnfast.autograd.fused_attention(ops.CPU, *forward_call(x), True),
    ):
        given = differentiable(arguments, *places)
        first = torch.autograd.grad(sum_of(run(*given)), wanted(given, places), create_graph=True)
        second = torch.autograd.grad(sum_of(first), wanted(given, places))
        found.append([*first, *second])
    for x, y in zip(*found, strict=True):
        assert x.any()
        assert torch.equal(x, y)


@pytest.mark.parametrize("case", BACKWARD_CASES.values(), ids=BACKWARD_CASES)
def test_the_backward_operator_has_second_derivatives(case: Case) -> None:
    """Those by ``out`` and ``entropy`` are among those by the inputs that these come from."""
    arguments = backward_arguments(case)
    places = tuple(i for i in GRADIENTS if arguments[i] is not None)
    given = differentiable(arguments, *places)
    found = torch.autograd.grad(sum_of(ops.CPU.bwd(*given)), wanted(given, places))

    again = differentiable(arguments, *places)
    outputs = Outputs(*ops.CPU.fwd(*again[9:]))
    results = {0: outputs.out, 1: outputs.lse, 2: outputs.stats, 3: outputs.weights}
    grads = dict(enumerate(again[:4]))
    if grads[2] is not None:
        zero = torch.zeros_like(grads[2])
        grads[2] = torch.stack([zero, again[2], zero, zero])
    first = torch.autograd.grad(
        [results[i] for i in grads if grads[i] is not None],
        wanted(again[9:], PRIMALS),
        [g for g in grads.values() if g is not None],
        create_graph=True,
    )
    expected = torch.autograd.grad(sum_of(first), wanted(again, places))
    for x, y in zip(found, expected, strict=True):
        assert x.any()
        assert torch.equal(x, y)


@pytest.mark.parametrize("kind", ["fwd", "bwd"])
def test_opcheck_with_gradients(kind: str) -> None:
    if kind == "fwd":
        torch.library.opcheck(ops.CPU.fwd, differentiable(forward_arguments(EVERYTHING), *PRIMALS))
    else:
        tests = ("test_schema", "test_autograd_registration", "test_faketensor")
        arguments = differentiable(backward_arguments(EVERYTHING), *GRADIENTS)
        torch.library.opcheck(ops.CPU.bwd, arguments, test_utils=tests)


def self_attention_arguments() -> tuple[Any, ...]:
    return torch.randn(2, 5, 24), 2, True, None, torch.randn(1, 1, 5, 5), False, 0.0, None, 1


def self_attention_backward_arguments() -> tuple[Any, ...]:
    *layer, weights = self_attention_arguments()
    out, norm, _ = ops.SELF_ATTENTION(*layer, weights)
    return out.cos(), out, norm, *layer


@pytest.mark.parametrize("batch_first", [True, False])
def test_opcheck_of_self_attention(batch_first: bool) -> None:
    packed, heads, *_, weights = self_attention_arguments()
    mask = torch.rand(1, 1, 5, 5) < 0.7 if batch_first else None
    seed = torch.tensor([1, 2]) if batch_first else None
    layer = (packed, heads, batch_first, mask, None, False, 0.5 if batch_first else 0.0, seed)
    torch.library.opcheck(ops.SELF_ATTENTION, (*layer, weights))
    out, norm, _ = ops.SELF_ATTENTION(*layer, weights)
    torch.library.opcheck(ops.SELF_ATTENTION_BWD, (out.cos(), out, norm, *layer))


# The tensors, by their places, by which an operator has no derivative: the slopes; results of
# forward, apart from the inputs they come from.
REFUSED = {
    "cpu_fwd": (ops.CPU.fwd, forward_arguments(EVERYTHING), (5,)),
    "cpu_bwd": (ops.CPU.bwd, backward_arguments(EVERYTHING), (4, 5, 6, 14)),
    "cpu_decode": (ops.CPU.decode, decode_arguments(), (0, 1, 2, 5, 6, 7)),
    "cpu_pooled": (ops.CPU.pooled, pooled_arguments(EVERYTHING), (0, 1, 2, 4, 5, 6)),
    "cpu_self_attention": (ops.SELF_ATTENTION, self_attention_arguments(), (0, 4)),
    "cpu_self_attention_bwd": (
        ops.SELF_ATTENTION_BWD,
        self_attention_backward_arguments(),
        (0, 1, 2, 3, 7),
    ),
}


@pytest.mark.parametrize(
    ("name", "index"), [(name, i) for name, (_, _, places) in REFUSED.items() for i in places]
)
def test_a_raw_operator_raises_instead_of_losing_a_gradient(name: str, index: int) -> None:
    op, arguments, _ = REFUSED[name]
    message = f"attnfast::{name}: a derivative is wanted, but "
    with pytest.raises(NotImplementedError, match=message):
        op(*differentiable(arguments, index))
    dual = list(arguments)
    with forward_ad.dual_level():
        op(*arguments)
        dual[index] = forward_ad.make_dual(dual[index], dual[index])
        with pytest.raises(NotImplementedError, match=rf"{message}|derivatives \(jvp\) are not"):
            op(*dual)


@pytest.mark.parametrize("index", [4, 6], ids=["out", "entropy"])
def test_a_result_of_forward_counts_only_with_its_inputs(index: int) -> None:
    of_no_inputs = list(differentiable(backward_arguments(EVERYTHING), index))
    of_no_inputs[index] = of_no_inputs[index] * 1
    no_result = differentiable(backward_arguments(EVERYTHING), index, 9)  # a leaf beside q
    for given in (of_no_inputs, no_result):
        with pytest.raises(NotImplementedError, match="have none apart from the inputs'"):
            ops.CPU.bwd(*given)


@pytest.mark.parametrize("name", REFUSED)
def test_a_raw_operator_runs_where_no_gradient_is_wanted(name: str) -> None:
    op, arguments, (index, *_) = REFUSED[name]
    wanted = op(*arguments)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for x, y in zip(op(*differentiable(arguments, index)), wanted, strict=True):
                assert torch.equal(x, y)


def test_a_compiled_raw_operator_raises_too() -> None:
    compiled = torch.compile(lambda *x: ops.CPU.decode(*x)[0], backend="aot_eager", fullgraph=True)
    arguments = decode_arguments()
    with torch.no_grad():
        compiled(*arguments)
    with pytest.raises(Exception, match="attnfast::cpu_decode: a derivative is wanted"):
        compiled(*differentiable(arguments, 0))


def test_decode_does_not_lose_a_tangent() -> None:
    q, k, v, lengths, *_ = decode_arguments()
    with forward_ad.dual_level():
        attnfast.decode_attention(q, k, v, lengths)
        with pytest.raises(NotImplementedError, match="attnfast::cpu_decode: a derivative is want"):
            attnfast.decode_attention(q, forward_ad.make_dual(k, k), v, lengths)


def test_the_native_library_names_its_instruction_sets() -> None:
    assert ops.load() is None
    assert ops.cpu_isa() in ops.cpu_isas()
    assert "portable" in ops.cpu_isas()


def test_a_call_passes_the_documented_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that attention() takes reaches the operator, in canonical form."""
    seen: list[Any] = []
    spy = ops.CPU._replace(fwd=lambda *x: seen.extend(x) or ops.CPU.fwd(*x))
    monkeypatch.setitem(BACKENDS, "cpu", (cpu.ROW._replace(ops=spy),))
    q, k, v = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 7, 16), torch.randn(2, 2, 7, 8)
    mask, bias = torch.ones(5, 7, dtype=torch.bool), torch.randn(4, 1, 1)
    slopes, sinks, seed = torch.rand(4), torch.randn(4), torch.tensor([1, 2])
    attnfast.attention(
        q,
        k,
        v,
        mask=mask,
        bias=bias,
        causal=True,
        window=(4, None),
        align=torch.tensor([2, 3]),
        scale=0.5,
        softcap=2.0,
        alibi_slopes=slopes,
        sinks=sinks,
        dropout_p=0.5,
        dropout_seed=seed,
        return_stats="received",
        return_weights="mean",
        deterministic=True,
    )
    inputs, options = forward_call(seen)
    assert options == Options(
        0.5, 2.0, True, 4, -1, 0, False, 0.5, 1, 2, True, max_seqlen_q=0, max_seqlen_k=0
    )
    assert inputs.q is q
    assert inputs.mask.shape == (1, 1, 5, 7)
    assert inputs.bias.shape == (1, 4, 1, 1)
    assert inputs.alibi_slopes.shape == (1, 4)
    assert inputs.align.dtype == torch.int32
    assert inputs.sinks is sinks
    assert inputs.dropout_seed is seed

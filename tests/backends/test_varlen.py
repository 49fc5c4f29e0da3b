"""Sequences without padding: each is attention of its own, whatever the options."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from accuracy import STATISTICS, check
from cases import DTYPES, OPTIONS, Case, bf16, problem, run
from torch import Tensor

import attnfast
from attnfast import ops
from attnfast.call import Inputs, Options

LENGTHS = ((5, 9), (0, 3), (66, 70), (40, 0), (0, 0), (1, 130), (129, 64))


DENSE = [case for case in OPTIONS if not (case.lengths or case.indices)]


def packed(case: Case) -> Case:
    """The case with `LENGTHS` in the place of B, T and S, and mask and bias the same for all."""
    dims = {
        name: None if dims is None else dims.replace("b", "")
        for name, dims in (("mask", case.mask), ("bias", case.bias))
    }
    return replace(case, lengths=LENGTHS, **dims)


@pytest.mark.parametrize(
    "case",
    [
        *map(packed, DENSE),
        *(replace(packed(case), dtype=bf16) for case in DENSE[::3]),
    ],
    ids=str,
)
def test_every_option(backend: str, case: Case) -> None:
    """The truth, the reference, runs the sequences one by one."""
    given = problem(case)
    check(run(given, backend), given)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_attention_of_each_sequence(dtype: torch.dtype) -> None:
    """Of two public functions, the same numbers; the reference is not asked."""
    case = Case(lengths=LENGTHS, H=6, H_kv=2, dtype=dtype, causal=True, align="bottom_right")
    given = problem(replace(case, alibi="bh", sinks=True, softcap=5.0, bias="hts", stats=2))
    inputs, options = given.inputs, given.options
    whole = run(given, "cpu")
    assert inputs.cu_seqlens_q is not None
    assert inputs.cu_seqlens_k is not None
    assert inputs.alibi_slopes is not None
    assert inputs.bias is not None
    for i, (T, S) in enumerate(LENGTHS):
        rows = slice(*inputs.cu_seqlens_q[i : i + 2].tolist())
        keys = slice(*inputs.cu_seqlens_k[i : i + 2].tolist())
        one = inputs._replace(
            q=inputs.q[:, :, rows],
            k=inputs.k[:, :, keys],
            v=inputs.v[:, :, keys],
            bias=inputs.bias[..., :T, :S],
            alibi_slopes=inputs.alibi_slopes[i : i + 1],
            cu_seqlens_q=None,
            cu_seqlens_k=None,
        )
        out = None if given.cotangents.out is None else given.cotangents.out[:, :, rows]
        single = given._replace(
            inputs=one,
            options=options._replace(max_seqlen_q=0, max_seqlen_k=0),
            cotangents=given.cotangents._replace(out=out),
        )
        results = {name: whole[name][:, :, rows] for name in ("out", "lse", *STATISTICS, "dq")}
        results |= {name: whole[name][:, :, keys] for name in ("dk", "dv", "received")}
        alone = run(single, "cpu")
        check(results | {name: alone[name] for name in ("dbias", "dsinks")}, single)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weights", ["mean", "per head"])
def test_rows_past_the_last_sequence(backend: str, weights: str, dtype: torch.dtype) -> None:
    """They are queries without keys, and keys that nothing attends."""
    grads = ("out", "lse", "entropy", "weights")
    case = Case(lengths=LENGTHS, weights=weights, stats=2, sinks=True, grads=grads, dtype=dtype)
    given = problem(case)
    inputs, n = given.inputs, 4
    assert inputs.cu_seqlens_q is not None
    assert inputs.cu_seqlens_k is not None
    assert given.cotangents.weights is not None
    given = given._replace(
        inputs=inputs._replace(
            cu_seqlens_q=inputs.cu_seqlens_q[: n + 1], cu_seqlens_k=inputs.cu_seqlens_k[: n + 1]
        ),
        cotangents=given.cotangents._replace(weights=given.cotangents.weights[:n]),
    )
    check(run(given, backend), given)


def test_longest_may_be_overstated(backend: str) -> None:
    grads = ("out", "weights")
    case = Case(lengths=((5, 9), (66, 70)), weights="mean", bias="hts", grads=grads, causal=True)
    given = problem(case)
    options = given.options._replace(max_seqlen_q=100, max_seqlen_k=300)
    assert given.cotangents.weights is not None
    assert given.inputs.bias is not None
    weights, bias = (
        torch.nn.functional.pad(x, (0, 230, 0, 34), value=3.0)
        for x in (given.cotangents.weights, given.inputs.bias)
    )
    given = given._replace(
        inputs=given.inputs._replace(bias=bias),
        options=options,
        cotangents=given.cotangents._replace(weights=weights),
    )
    check(run(given, backend), given)


def test_no_sequences(backend: str) -> None:
    q, ends = torch.empty(0, 2, 8), torch.zeros(1, dtype=torch.int32)
    out, weights = attnfast.varlen_attention(
        q, q, q, ends, ends, 0, 0, return_weights=True, backend=backend
    )
    assert out.shape == (0, 2, 8)
    assert weights.shape == (0, 2, 0, 0)


def test_int64_ends(backend: str) -> None:
    given = problem(Case(lengths=((5, 9), (66, 70))))
    inputs = given.inputs
    assert inputs.cu_seqlens_q is not None
    assert inputs.cu_seqlens_k is not None
    wide = inputs._replace(
        cu_seqlens_q=inputs.cu_seqlens_q.long(), cu_seqlens_k=inputs.cu_seqlens_k.long()
    )
    expected = run(given, backend)
    for name, result in run(given._replace(inputs=wide), backend).items():
        assert torch.equal(result, expected[name])


def call(**changes: Any) -> Any:
    """A right call of two sequences, 3 + 2 queries over 4 + 6 keys, but for the changes."""
    arguments: dict[str, Any] = {
        "q": torch.randn(5, 2, 8),
        "k": torch.randn(10, 2, 8),
        "v": torch.randn(10, 2, 8),
        "cu_seqlens_q": torch.tensor([0, 3, 5]).int(),
        "cu_seqlens_k": torch.tensor([0, 4, 10]).int(),
        "max_seqlen_q": 3,
        "max_seqlen_k": 6,
    }
    return attnfast.varlen_attention(**(arguments | changes))


def ends(*values: int) -> Tensor:
    return torch.tensor(values).int()


@pytest.mark.reference(1)
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize(("changes", "message"), [
    ({"cu_seqlens_q": ends(1, 3, 5)}, r"cu_seqlens_q must start (at|with) 0"),
    ({"cu_seqlens_k": ends(-4, 4, 10)}, r"cu_seqlens_k must start (at|with) 0"),
    ({"cu_seqlens_q": ends(0, 5, 3)}, r"cu_seqlens_q must not decrease"),
    ({"cu_seqlens_k": ends(0, 9, 8)}, r"cu_seqlens_k must not decrease"),
    ({"cu_seqlens_q": ends(0, 3, 6)}, r"cu_seqlens_q must .*5.*6"),
    ({"cu_seqlens_k": ends(0, 4, 2**31 - 1)}, r"cu_seqlens_k must .*10.*2147483647"),
    ({"max_seqlen_q": 2}, r"max_seqlen_q must .*3.*2"),
    ({"max_seqlen_k": 5}, r"max_seqlen_k must .*6.*5"),
], ids=str)  # fmt: skip
def test_ends_out_of_range(
    backend: str,
    changes: dict[str, Any],
    message: str,
    gradient: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ATTNFAST_CHECK", "1")
    call(backend=backend)
    if gradient:
        changes = changes | {"q": torch.randn(5, 2, 8, requires_grad=True)}
    with pytest.raises(ValueError, match=message):
        call(**changes, backend=backend)


def test_views(backend: str) -> None:
    """(H, total, D) viewed as (total, H, D), and sequences of every other row."""
    given = problem(Case(lengths=((5, 9), (66, 70)), causal=True))
    inputs = given.inputs
    expected = run(given, backend)
    views = {name: getattr(inputs, name).contiguous() for name in ("q", "k", "v")}
    check(run(given._replace(inputs=inputs._replace(**views)), backend), given)
    doubled = {name: x.repeat_interleave(2, 2)[:, :, ::2] for name, x in views.items()}
    results = run(given._replace(inputs=inputs._replace(**doubled)), backend)
    for name in ("out", "dq", "dk", "dv"):
        assert results[name].shape == expected[name].shape
    check(results, given)


@pytest.mark.reference(1)
def test_maximum_is_only_a_bound(backend: str) -> None:
    """A larger one changes no number; the results whose shape it gives are zero beyond."""
    torch.manual_seed(0)
    ends = torch.tensor([0, 5, 70, 71])
    q = torch.randn(75, 2, 16, requires_grad=True)
    found = []
    for T, S in ((65, 65), (150, 200)):
        bias = torch.zeros(1, 1, T, S)
        bias[..., :65, :65] = torch.linspace(-1, 1, 65 * 65).view(65, 65)
        bias.requires_grad_()
        out, stats, weights = attnfast.varlen_attention(
            *(q, q, q, ends, ends, T, S),
            bias=bias,
            return_stats="received",
            return_weights=True,
            backend=backend,
        )
        dq, dbias = torch.autograd.grad(out.square().sum(), (q, bias))
        assert weights.shape == (3, 2, T, S)
        for x in (weights.detach(), dbias):
            assert not x[..., 65:, :].any()
            assert not x[..., 65:].any()
        inner = (x[..., :65, :65] for x in (weights, dbias))
        found.append((out, stats.lse, stats.received, dq, *inner))
    for tight, loose in zip(*found, strict=True):
        torch.testing.assert_close(tight, loose)


def test_maximum_costs_nothing() -> None:
    """Scratch and items follow the rows: with those of the maximum this would take terabytes."""
    torch.manual_seed(0)
    q = torch.randn(128, 16, 32, requires_grad=True)
    ends = torch.arange(0, 129, 2)
    found = []
    for longest in (2, 2**31 - 1):
        out = attnfast.varlen_attention(
            q, q, q, ends, ends, longest, longest, sinks=torch.zeros(16), backend="cpu"
        )
        found.append((out, *torch.autograd.grad(out.square().sum(), q)))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_one_long_sequence_among_short_ones(dtype: torch.dtype, threads: int) -> None:
    """The long one's rows are shared out, and no sequence's numbers depend on where it stands."""
    torch.manual_seed(0)
    lengths = [3, 1, 0, 700, *[2] * 40]
    order = [3, *range(4, 44), 0, 1, 2]
    pieces = [torch.randn(n, 4, 32, dtype=dtype) for n in lengths]
    found = {}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for name, which in (("given", range(44)), ("moved", order)):
            q = torch.cat([pieces[i] for i in which]).requires_grad_()
            ends = torch.tensor([0, *(lengths[i] for i in which)]).cumsum(0)
            out = attnfast.varlen_attention(
                q, q, q, ends, ends, 700, 700, causal=True, backend="cpu"
            )
            (grad,) = torch.autograd.grad(out.float().square().sum(), q)
            rows = [lengths[i] for i in which]
            parts = zip(out.split(rows), grad.split(rows), strict=True)
            found[name] = dict(zip(which, parts, strict=True))
    finally:
        torch.set_num_threads(before)
    for i in range(44):
        for given, moved in zip(found["given"][i], found["moved"][i], strict=True):
            assert torch.equal(given, moved)


@pytest.mark.parametrize(
    ("ends_q", "ends_k", "said"),
    [
        ([0, 4], None, "cu_seqlens_k must be given with cu_seqlens_q"),
        ([], [0], "cu_seqlens_q must start with 0, got nothing"),
        ([0, 4], [0, 2, 4], "cu_seqlens_k must have 2 elements, got 3"),
    ],
)
def test_an_operator_without_all_boundaries(
    ends_q: list[int], ends_k: list[int] | None, said: str
) -> None:
    x = torch.randn(1, 1, 4, 8)
    q, k = (None if ends is None else torch.tensor(ends).int() for ends in (ends_q, ends_k))
    inputs = Inputs(x, x, x, cu_seqlens_q=q, cu_seqlens_k=k)
    with pytest.raises(RuntimeError, match=said):
        ops.CPU.fwd(*inputs, *Options(1.0, max_seqlen_q=4, max_seqlen_k=4))

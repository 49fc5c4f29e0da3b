"""The reference against definitions: torch's attention, loops over numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from attnfast.call import DecodeInputs, DecodeOptions, Inputs, Options, Outputs
from attnfast.reference import dropout_mask, reference_attention, reference_decode

B, H, H_KV, T, S, D, D_V = 2, 4, 2, 3, 5, 2, 3
SCALE = 0.6
SEED = torch.tensor([-7_000_000_000_000, 2**32 + 5])
INF = math.inf


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def tensors(t: int = T, s: int = S, **more: Tensor) -> Inputs:
    torch.manual_seed(0)
    return Inputs(draw(B, H, t, D), draw(B, H_KV, s, D), draw(B, H_KV, s, D_V), **more)


def some_mask(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.6


def bias_with_inf(*shape: int) -> Tensor:
    return draw(*shape).masked_fill(~some_mask(*shape), -INF)


@torch.random.fork_rng()
def options_table() -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Every option by itself, and all at once: more of `Inputs`, and more of `Options`."""
    torch.manual_seed(2)
    return {
        "plain": ({}, {}),
        "mask": ({"mask": some_mask(B, 1, T, S)}, {}),
        "padding": ({"mask": some_mask(B, 1, 1, S)}, {}),
        "bias": ({"bias": draw(1, H, T, S)}, {}),
        "bias_inf": ({"bias": bias_with_inf(B, 1, T, S)}, {}),
        "bias_column": ({"bias": draw(1, 1, T, 1)}, {}),
        "causal": ({}, {"causal": True}),
        "bottom_right": ({}, {"causal": True, "align_bottom_right": True}),
        "offset": ({}, {"causal": True, "align_offset": -2}),
        "align": ({"align": torch.tensor([-1, 2], dtype=torch.int32)}, {"causal": True}),
        "window": ({}, {"window_left": 1, "window_right": 0, "align_offset": 1}),
        "causal_window": ({}, {"causal": True, "window_left": 1, "window_right": 3}),
        "softcap": ({}, {"softcap": 0.7}),
        "alibi": ({"alibi_slopes": torch.rand(B, H)}, {"align_bottom_right": True}),
        "sinks": ({"sinks": torch.tensor([0.5, -1.0, 2.0, -INF], dtype=torch.float64)}, {}),
        "dropout": ({"dropout_seed": SEED}, {"dropout_p": 0.4}),
        "dropout_all": ({"dropout_seed": SEED}, {"dropout_p": 1.0}),
        "no_keys": ({"mask": torch.zeros(1, 1, 1, 1, dtype=torch.bool)}, {}),
        "no_keys_but_sinks": (
            {"mask": torch.zeros(1, 1, 1, 1, dtype=torch.bool), "sinks": draw(H)},
            {},
        ),
        "everything": (
            {
                "mask": some_mask(1, 1, T, S),
                "bias": bias_with_inf(1, H, 1, S),
                "alibi_slopes": torch.rand(1, H),
                "sinks": draw(H),
                "align": torch.tensor([0, -1], dtype=torch.int32),
                "dropout_seed": SEED,
            },
            {"causal": True, "window_left": 3, "softcap": 0.9, "dropout_p": 0.3},
        ),
    }


OPTIONS = options_table()
each_option = pytest.mark.parametrize("name", OPTIONS)


def call(name: str, **changes: Any) -> tuple[Inputs, Options]:
    given, options = OPTIONS[name]
    return tensors(**given), Options(SCALE, **(options | changes))


def by_hand(inputs: Inputs, options: Options) -> Outputs:
    """The definition, one number at a time."""
    q, k, v = inputs.q, inputs.k, inputs.v
    out, lse = q.new_zeros(B, H, T, D_V), q.new_full((B, H, T), -INF)
    stats, received = q.new_zeros(4, B, H, T), q.new_zeros(B, H, S)
    weights = q.new_zeros(B, H, T, S)
    kept = (
        torch.ones(B, H, T, S, dtype=torch.bool)
        if inputs.dropout_seed is None
        else dropout_mask(inputs.dropout_seed, B, H, T, S, options.dropout_p)
    )

    def at(x: Tensor, *index: int) -> float:
        return x[tuple(0 if n == 1 else i for n, i in zip(x.shape, index, strict=True))].item()

    for b, h, t in torch.cartesian_prod(*(torch.arange(n) for n in (B, H, T))).tolist():
        stands = t + options.align_offset + (S - T if options.align_bottom_right else 0)
        stands += 0 if inputs.align is None else int(inputs.align[b])
        row = {}
        for j in range(S):
            x = options.scale * (q[b, h, t] * k[b, h * H_KV // H, j]).sum().item()
            x = options.softcap * math.tanh(x / options.softcap) if options.softcap else x
            x += 0 if inputs.bias is None else at(inputs.bias, b, h, t, j)
            if inputs.alibi_slopes is not None:
                x -= at(inputs.alibi_slopes, b, h) * abs(j - stands)
            masked = inputs.mask is not None and not at(inputs.mask, b, h, t, j)
            masked |= options.causal and j > stands
            masked |= options.window_left >= 0 and j < stands - options.window_left
            masked |= options.window_right >= 0 and j > stands + options.window_right
            if not masked and x > -INF:
                row[j] = x
        sink = -INF if inputs.sinks is None else at(inputs.sinks, h)
        total = sum(math.exp(x) for x in [*row.values(), sink])
        p = {j: math.exp(x) / total for j, x in row.items()}
        p_sink = math.exp(sink) / total if sink > -INF else 0.0
        terms = [x for x in [*p.values(), p_sink] if x > 0]
        lse[b, h, t] = math.log(total) if total > 0 else -INF
        stats[0, b, h, t] = max(row.values(), default=-INF)
        stats[1, b, h, t] = -sum(x * math.log(x) for x in terms)
        stats[2, b, h, t] = sum(x * abs(j - stands) for j, x in p.items())
        stats[3, b, h, t] = max(p.values(), default=0)
        for j, x in p.items():
            received[b, h, j] += x
            if kept[b, h, t, j] and options.dropout_p < 1:
                weights[b, h, t, j] = x / (1 - options.dropout_p)
                out[b, h, t] += weights[b, h, t, j] * v[b, h * H_KV // H, j]
    return Outputs(out, lse, None, stats, received, weights)


@each_option
def test_definition(name: str) -> None:
    inputs, options = call(name, stats=2, weights=2)
    actual, expected = reference_attention(inputs, options), by_hand(inputs, options)
    for field in Outputs._fields:
        assert_close(
            getattr(actual, field), getattr(expected, field), msg=lambda m, f=field: f"{f}: {m}"
        )
    mean = reference_attention(inputs, options._replace(weights=1)).weights
    assert_close(mean, expected.weights.mean(1))


def differentiable(inputs: Inputs, options: Options) -> tuple[Any, tuple[Tensor, ...]]:
    """A function of its leaves that returns all results that have gradients, and the leaves."""
    names = [n for n in ("q", "k", "v", "bias", "sinks") if getattr(inputs, n) is not None]
    leaves = tuple(getattr(inputs, n).clone().requires_grad_() for n in names)

    def function(*leaves: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(names, leaves, strict=True))
        for n in given.keys() & {"bias", "sinks"}:  # a difference quotient at -inf is NaN
            fixed = getattr(inputs, n)
            given[n] = torch.where(fixed == -INF, fixed, given[n].nan_to_num(neginf=0.0))
        out, lse, _, stats, _, weights = reference_attention(inputs._replace(**given), options)
        lse = torch.where(lse == -INF, 0, lse)
        return tuple(x for x in (out, lse, stats[1], weights) if x is not None and x.requires_grad)

    return function, tuple(x.detach().nan_to_num(neginf=0.0).requires_grad_() for x in leaves)


@each_option
def test_gradients(name: str) -> None:
    inputs, options = call(name, stats=1, weights=1)
    function, leaves = differentiable(inputs, options)
    assert torch.autograd.gradcheck(function, leaves)


@each_option
def test_second_derivatives(name: str) -> None:
    inputs, options = call(name, stats=1, weights=2)
    function, leaves = differentiable(inputs, options)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=name != "everything")


def test_varlen_derivatives() -> None:
    inputs, options = varlen_call()
    function, leaves = differentiable(inputs, options._replace(stats=1, weights=1))
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("gqa", [False, True])
@pytest.mark.parametrize("kind", ["plain", "causal", "mask", "bias"])
def test_torch_agrees(kind: str, gqa: bool) -> None:
    q, k, v = draw(2, 4, 7, 8), draw(2, 2 if gqa else 4, 9, 8), draw(2, 2 if gqa else 4, 9, 6)
    mask = some_mask(2, 1, 7, 9) if kind == "mask" else None
    bias = draw(1, 4, 7, 9) if kind == "bias" else None
    causal = kind == "causal"
    inputs = Inputs(q, k, v, mask, bias)
    expected = F.scaled_dot_product_attention(
        q, k, v, mask if bias is None else bias, is_causal=causal, scale=0.3, enable_gqa=gqa
    )
    assert_close(reference_attention(inputs, Options(0.3, causal=causal)).out, expected)


@each_option
def test_slices_of_rows_and_batch(name: str) -> None:
    """Blocks of rows of single batch entries, put together, are the whole call."""
    inputs, options = call(name, stats=2, weights=2)
    whole = reference_attention(inputs, options)
    if options.align_bottom_right:
        options = options._replace(align_bottom_right=False, align_offset=S - T)
    received = torch.zeros_like(whole.received)
    for b in range(B):
        for rows in (slice(0, 2), slice(2, T)):

            def part(x: Tensor | None, b: int = b, rows: slice = rows) -> Tensor | None:
                x = x if x is None or x.shape[0] == 1 else x[b : b + 1]
                return x if x is None or x.dim() < 4 or x.shape[2] == 1 else x[:, :, rows]

            block = inputs._replace(
                q=part(inputs.q),
                k=inputs.k[b : b + 1],
                v=inputs.v[b : b + 1],
                mask=part(inputs.mask),
                bias=part(inputs.bias),
                alibi_slopes=part(inputs.alibi_slopes),
                align=part(inputs.align),
            )
            result = reference_attention(block, options, row_start=rows.start, batch_start=b)
            assert_close(result.out[0], whole.out[b][:, rows])
            assert_close(result.lse[0], whole.lse[b][:, rows])
            assert_close(result.stats[:, 0], whole.stats[:, b][:, :, rows])
            assert_close(result.weights[0], whole.weights[b][:, rows])
            received[b] += result.received[0]
    assert_close(received, whole.received)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("sink", [None, 0.25, -INF])
def test_a_row_without_keys(sink: float | None) -> None:
    """Zeros and a log of zero, or the sink; and no NaN, not even on the way to a derivative."""
    mask = torch.ones(1, 1, T, 1, dtype=torch.bool)
    mask[:, :, 1] = False
    sinks = {} if sink is None else {"sinks": torch.full((H,), sink, dtype=torch.float64)}
    inputs = tensors(mask=mask, dropout_seed=SEED, **sinks)
    leaves = [x.requires_grad_() for x in (*inputs[:3], *sinks.values())]
    options = Options(SCALE, softcap=1.0, dropout_p=0.2, stats=1, weights=2)
    with torch.autograd.detect_anomaly():
        out, lse, _, stats, _, weights = reference_attention(inputs, options)
        row = (slice(None), slice(None), 1)
        assert (out[row] == 0).all()
        assert (weights[row] == 0).all()
        assert (lse[row] == (-INF if sink is None else sink)).all()
        for statistic, value in zip(stats, (-INF, 0, 0, 0), strict=True):
            assert (statistic[row] == value).all()

        loss = out[row].sum() + lse[row].sum() + stats[1][row].sum() + weights[row].sum()
        gradients = torch.autograd.grad(loss, leaves, retain_graph=True)
        assert all((g == 0).all() for g in gradients[:3])
        assert all((g == (B if sink == 0.25 else 0)).all() for g in gradients[3:])  # of the lse

        finite = (x.masked_fill(x == -INF, 0) for x in (out, lse, stats[1], weights))
        gradients = torch.autograd.grad(
            sum((x**2).sum() for x in finite), leaves, create_graph=True
        )
        second = torch.autograd.grad(sum((g**2).sum() for g in gradients), leaves)
        assert all(g.isfinite().all() for g in (*gradients, *second))


@pytest.mark.parametrize("how", ["mask", "bias", "causal", "window", "all"])
@pytest.mark.parametrize("poison", [math.nan, INF, -INF])
def test_unattended_keys_may_hold_anything(how: str, poison: float) -> None:
    """NaN and Inf that no query may attend reach no output and no gradient."""
    keys = torch.zeros(S, dtype=torch.bool)
    keys[: 0 if how == "all" else 3] = True  # three keys are attended
    given: dict[str, Any] = {"sinks": draw(H)}
    options = Options(SCALE, softcap=1.0, stats=2, weights=1)
    if how in ("mask", "all"):
        given["mask"] = keys.view(1, 1, 1, S)
    elif how == "bias":
        given["bias"] = draw(1, H, 1, S).masked_fill(~keys, -INF)
    elif how == "causal":
        options = options._replace(causal=True)
    else:
        options = options._replace(window_right=0)

    def results(fill: float) -> list[Tensor]:
        inputs = tensors(**given)
        inputs = inputs._replace(
            k=inputs.k.masked_fill(~keys.view(S, 1), fill),
            v=inputs.v.masked_fill(~keys.view(S, 1), fill),
        )
        leaves = [x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
        outputs = reference_attention(inputs, options)
        loss = sum(
            (x**2).sum() for x in (outputs.out, outputs.lse, outputs.stats[1], outputs.weights)
        )
        results = [x for x in outputs if x is not None]
        return [*results, *torch.autograd.grad(loss, leaves)]

    for dirty, clean in zip(results(poison), results(0.0), strict=True):
        assert torch.equal(dirty, clean)


def test_a_query_without_keys_may_hold_anything() -> None:
    mask = torch.ones(1, 1, T, 1, dtype=torch.bool)
    mask[:, :, 0] = False
    inputs = tensors(mask=mask)
    inputs.q[:, :, 0] = math.nan
    leaves = [x.requires_grad_() for x in inputs[:3]]
    outputs = reference_attention(inputs, Options(SCALE))
    assert outputs.out.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(outputs.out.sum(), leaves))


Q_ENDS, K_ENDS = [0, 2, 2, 5, 6], [0, 3, 5, 5, 9]  # a sequence without queries, one without keys


def varlen_call() -> tuple[Inputs, Options]:
    torch.manual_seed(0)
    inputs = Inputs(
        draw(1, H, 8, D),  # two rows belong to no sequence
        draw(1, H_KV, 10, D),
        draw(1, H_KV, 10, D_V),
        mask=some_mask(1, 1, 3, 4),
        bias=draw(1, H, 1, 4),
        alibi_slopes=torch.rand(4, H),
        sinks=draw(H),
        align=torch.tensor([0, 1, 2, 1], dtype=torch.int32),
        dropout_seed=SEED,
        cu_seqlens_q=torch.tensor(Q_ENDS, dtype=torch.int32),
        cu_seqlens_k=torch.tensor(K_ENDS, dtype=torch.int32),
    )
    longest = {"max_seqlen_q": 3, "max_seqlen_k": 4}
    return inputs, Options(SCALE, causal=True, window_left=3, dropout_p=0.3, **longest)


@pytest.mark.parametrize("bottom_right", [False, True])
def test_varlen_is_a_loop(bottom_right: bool) -> None:
    inputs, options = varlen_call()
    options = options._replace(stats=2, weights=2, align_bottom_right=bottom_right)
    result = reference_attention(inputs, options)
    for i in range(4):
        rows, keys = slice(Q_ENDS[i], Q_ENDS[i + 1]), slice(K_ENDS[i], K_ENDS[i + 1])
        t, s = rows.stop - rows.start, keys.stop - keys.start
        sequence = Inputs(
            inputs.q[:, :, rows],
            inputs.k[:, :, keys],
            inputs.v[:, :, keys],
            inputs.mask[:, :, :t, :s],
            inputs.bias[..., :s],
            inputs.alibi_slopes[i : i + 1],
            inputs.sinks,
            inputs.align[i : i + 1],
            SEED,
        )
        alone = reference_attention(sequence, options, batch_start=i)
        assert_close(result.out[:, :, rows], alone.out)
        assert_close(result.lse[:, :, rows], alone.lse)
        assert_close(result.stats[..., rows], alone.stats)
        assert_close(result.received[..., keys], alone.received)
        assert_close(result.weights[i, :, :t, :s], alone.weights[0])
        assert result.weights[i, :, t:].count_nonzero() == 0
        assert result.weights[i, :, :, s:].count_nonzero() == 0
    assert (result.out[:, :, 6:] == 0).all()
    assert (result.lse[:, :, 6:] == -INF).all()
    assert (result.received[..., 9:] == 0).all()
    mean = reference_attention(inputs, options._replace(weights=1)).weights
    assert_close(mean, result.weights.mean(1))


def test_varlen_without_sequences() -> None:
    inputs, options = varlen_call()
    none = torch.zeros(1, dtype=torch.int32)
    inputs = inputs._replace(cu_seqlens_q=none, cu_seqlens_k=none, align=None)
    result = reference_attention(inputs, options._replace(stats=2, weights=2))
    assert result.weights.shape == (0, H, 3, 4)
    assert (result.out == 0).all()
    assert result.received.shape == (1, H, 10)


def test_varlen_rows_past_the_sequences_may_hold_anything() -> None:
    inputs, options = varlen_call()
    clean = reference_attention(inputs, options)
    for x, end in ((inputs.q, 6), (inputs.k, 9), (inputs.v, 9)):
        x[:, :, end:] = math.nan
    leaves = [x.requires_grad_() for x in inputs[:3]]
    dirty = reference_attention(inputs, options)
    assert torch.equal(dirty.out, clean.out)
    assert all(g.isfinite().all() for g in torch.autograd.grad(dirty.out.sum(), leaves))


DECODE = {"scale": SCALE, "window_left": 2, "softcap": 0.8}


@pytest.mark.parametrize("paged", [False, True])
def test_decode_is_dense(paged: bool) -> None:
    """Every entry against dense attention over its own keys; what lies past them is NaN."""
    torch.manual_seed(0)
    lengths = [6, 2, 0]  # the second has fewer keys than queries before, the third none
    q, k, v = draw(3, H, T, D), draw(3, H_KV, 8, D), draw(3, H_KV, 8, D_V)
    bias, slopes, sinks = draw(1, H, 1, 8), torch.rand(3, H), draw(H)
    expected = []
    for b, n in enumerate(lengths):
        k[b, :, n:], v[b, :, n:] = math.nan, math.nan
        one = Inputs(q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n])
        one = one._replace(bias=bias[..., :n], alibi_slopes=slopes[b : b + 1], sinks=sinks)
        options = Options(causal=True, align_bottom_right=True, **DECODE)
        expected.append(reference_attention(one, options))
    caches, table = (k, v), None
    if paged:  # four pages of two keys each, scattered; one page belongs to nobody
        order = torch.randperm(13)[:12].view(3, 4)
        caches = tuple(x.new_full((13, 2, H_KV, x.shape[3]), math.nan) for x in (k, v))
        for pages, x in zip(caches, (k, v), strict=True):
            pages[order] = x.transpose(1, 2).unflatten(1, (4, 2))
        table = order.int()
        table[1, 1:], table[2] = -1, 2**30
    seqlens = torch.tensor(lengths, dtype=torch.int32)
    out, lse, _ = reference_decode(
        DecodeInputs(q, *caches, seqlens, table, bias, slopes, sinks), DecodeOptions(**DECODE)
    )
    assert_close(out, torch.cat([x.out for x in expected]))
    assert_close(lse, torch.cat([x.lse for x in expected]))


def test_entropy_of_huge_scores() -> None:
    """Scores near 1e5 that differ by 1: the entropy keeps all its digits in fp32."""
    scores = 1e5 + torch.arange(4.0)
    inputs = Inputs(torch.ones(1, 1, 1, 1), scores.view(1, 1, 4, 1), torch.zeros(1, 1, 4, 1))
    entropy = reference_attention(inputs, Options(1.0, stats=1)).stats[1].item()
    p = torch.softmax(torch.arange(4.0).double(), 0)
    assert entropy == pytest.approx(-(p * p.log()).sum().item(), rel=1e-6)


@pytest.mark.parametrize("shape", [(0, T, S), (B, 0, S), (B, T, 0), (B, 0, 0)], ids=str)
def test_zero_sizes(shape: tuple[int, int, int]) -> None:
    b, t, s = shape
    q, k, v = (
        draw(*n).requires_grad_() for n in ((b, H, t, D), (b, H_KV, s, D), (b, H_KV, s, D_V))
    )
    inputs = Inputs(q, k, v, torch.ones(1, 1, 1, 1, dtype=torch.bool), draw(1, H, 1, 1))
    inputs = inputs._replace(alibi_slopes=torch.rand(1, H), dropout_seed=SEED)
    options = Options(SCALE, causal=True, softcap=1.0, dropout_p=0.5, weights=2, stats=2)
    result = reference_attention(inputs, options)
    assert result.out.shape == (b, H, t, D_V)
    assert (result.out == 0).all()
    assert (result.lse == -INF).all()
    assert result.stats.shape == (4, b, H, t)
    assert result.received.shape == (b, H, s)
    assert result.weights.shape == (b, H, t, s)
    gradients = torch.autograd.grad(result.out.sum() + result.stats[1].sum(), (q, k, v))
    assert all((g == 0).all() for g in gradients)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_dtypes(dtype: torch.dtype) -> None:
    inputs = Inputs(*(x.to(dtype) for x in tensors()[:3]))
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    options = Options(SCALE, stats=2, weights=1)
    for compute, result in ((None, dtype), (dtype, dtype), (torch.float64, torch.float64)):
        outputs = reference_attention(inputs, options, compute_dtype=compute)
        assert outputs.out.dtype == outputs.weights.dtype == result
        assert outputs.lse.dtype == outputs.stats.dtype == outputs.received.dtype
        assert outputs.lse.dtype == (result if compute == torch.float64 else accumulator)


def test_autocast_changes_nothing() -> None:
    inputs = Inputs(*(x.float() for x in tensors()[:3]))
    expected = reference_attention(inputs, Options(SCALE)).out
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(reference_attention(inputs, Options(SCALE)).out, expected)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3)], ids=str)
def test_out_lies_in_memory_as_q_does(order: tuple[int, ...]) -> None:
    inputs = tensors()
    q = inputs.q.permute(order).contiguous().permute([order.index(d) for d in range(4)])
    out = reference_attention(inputs._replace(q=q), Options(SCALE)).out
    assert out.permute(order).is_contiguous()


def test_compiles_whole() -> None:
    """Without a break in the graph, whatever the seed is: it is read as a tensor."""
    inputs, options = call("everything", stats=2, weights=1)
    compiled = torch.compile(
        lambda *x: reference_attention(Inputs(*x), options), fullgraph=True, backend="aot_eager"
    )
    for seed in (SEED, SEED + 1):
        inputs = inputs._replace(dropout_seed=seed)
        for a, e in zip(compiled(*inputs), reference_attention(inputs, options), strict=True):
            if e is None:  # norm
                assert a is None
                continue
            assert_close(a, e)

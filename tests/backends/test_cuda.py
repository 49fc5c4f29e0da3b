"""The CUDA kernels on the emulator: architectures, schedules, layouts, and what they refuse."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import decode_cases
import pytest
import torch
from accuracy import check
from cases import CASES, EVERYTHING, Case, bf16, fp16, fp32, problem, run
from emulation import SEEDS, architecture, check_case, places, sabotage, schedule
from test_given_back import CALLS as GIVEN_BACK
from test_given_back import EACH, complaint
from torch import Tensor

import attnfast
from attnfast import BlockMask, dispatch, ops
from attnfast.backends import cuda, gpus
from attnfast.call import DecodeInputs, DecodeOptions, Inputs, Options
from attnfast.functional import attention_problem

fp64 = torch.float64
PLAIN = Case("plain", B=1, H_kv=1, T=150, S=200, D=64, dtype=bf16, causal=True)
OPTIONS = replace(EVERYTHING, name="options", dtype=fp16, H=2, H_kv=1, T=90)


TURING = [
    case
    for case in CASES
    if case.dtype == fp16 and max(case.D, case.D_v) <= (128 if case.grads else 256)
]
# Where its 64 KB of shared memory ask for other kernels or tiles, with options and without.
FORMS = [
    Case(f"{name}{D}", B=1, H_kv=1, T=T, S=T, D=D, dtype=fp16, grads=grads, softcap=softcap)
    for D, grads in ((64, ("out",)), (96, ("out",)), (128, ("out",)), (192, ()), (256, ()))
    for name, softcap in (("plain", 0.0), ("options", 5.0))
    for T in (100, 150)
]
FORMS += [
    Case(f"blocks{D}", B=1, H_kv=1, T=100, S=150, D=D, blocks="blocks 64", dtype=fp16, grads=grads)
    for D, grads in ((64, ("out",)), (96, ("out",)), (128, ("out",)), (192, ()), (256, ()))
]
FORMS += [replace(case, softcap=5.0) for case in FORMS[-5:]]


@pytest.mark.parametrize("case", [*TURING[::3], *FORMS], ids=str)
def test_table_on_turing(case: Case) -> None:
    if case.indices:
        pytest.skip("refused on every architecture")
    with architecture(75):
        check_case(case)


# Backward in one launch beyond D = 64, where CASES have few of its forms.
ONE_LAUNCH = [
    replace(case, D=D, dtype=dtype)
    for D in (80, 96, 128)
    for dtype in (bf16, fp16)
    for case in (
        Case("causal", B=2, H=1, H_kv=1, T=100, S=120, causal=True),
        Case("window", B=1, H=1, H_kv=1, T=128, S=77, window=(20, 9), align="bottom_right"),
        Case("grouped", B=1, H=6, H_kv=2, T=70, S=128, grads=("out", "lse")),
        Case("packed", lengths=((5, 70), (128, 100), (0, 9), (33, 0)), H=3, H_kv=1, causal=True),
    )
]


@pytest.mark.parametrize("case", ONE_LAUNCH, ids=str)
def test_backward_in_one_launch(case: Case) -> None:
    check_case(case)


@pytest.mark.parametrize(
    ("arch", "D", "T", "S", "one"),
    [
        (75, 32, 20, 30, True),
        (75, 64, 20, 30, False),
        (75, 128, 20, 30, False),
        (80, 64, 128, 128, True),
        (80, 64, 129, 128, False),
        (80, 64, 128, 129, False),
        (80, 80, 20, 30, True),
        (80, 128, 128, 128, True),
        (80, 128, 129, 1, False),
        (80, 130, 20, 30, False),
        (86, 96, 20, 30, True),
        (86, 128, 20, 30, False),
        (89, 128, 20, 30, False),
        (90, 128, 20, 30, True),
        (100, 128, 20, 30, True),
        (120, 96, 20, 30, True),
        (120, 100, 20, 30, False),
    ],
)
def test_where_backward_is_one_launch(arch: int, D: int, T: int, S: int, one: bool) -> None:
    """By the lengths, and by the shared memory that the GPU gives a block."""
    case = Case(B=1, H=1, H_kv=1, T=T, S=S, D=D, dtype=fp16)
    with architecture(arch):
        files = {place.file for place in places(lambda: check_case(case))}
    assert ("attention_bwd_short.h" in files) == one
    assert ("row_terms.cu" in files) != one


# Backward in one pass: blocks of 128 keys, tiles of 64 queries, heads that share keys, queries
# without keys, sequences without queries or keys.
FUSED = [
    replace(case, D=D, dtype=dtype)
    for D, dtype in ((64, bf16), (128, fp16))
    for case in (
        Case("causal", B=2, H=2, H_kv=1, T=200, S=300, causal=True),
        Case("cross", B=1, H=1, H_kv=1, T=70, S=280, grads=("out", "lse")),
        Case("empty rows", B=1, H=2, H_kv=1, T=270, S=140, causal=True, align="bottom_right"),
        Case("unreached", B=1, H=1, H_kv=1, T=70, S=150, causal=True, align=40),
        Case("window", B=1, H=1, H_kv=1, T=330, S=330, window=(40, 20)),
        Case("window left", B=1, H=1, H_kv=1, T=260, S=400, window=(130, 0), align="bottom_right"),
        Case("packed", lengths=((5, 300), (140, 0), (0, 9), (150, 150)), H=2, H_kv=1, causal=True),
    )
]


@pytest.mark.parametrize("case", FUSED, ids=str)
def test_backward_in_one_pass(case: Case) -> None:
    for threads in (1, 2):
        with schedule(threads, threads):
            files = {place.file for place in places(lambda: check_case(case))}
            assert "attention_bwd_fused.h" in files
            assert "attention_bwd_keys.h" not in files


@pytest.mark.parametrize(
    ("arch", "case", "one_pass"),
    [
        (80, Case(D=64), True),
        (80, Case(D=40), True),
        (80, Case(D=128, D_v=72), True),
        (86, Case(D=64), True),
        (86, Case(D=128), False),  # more than 99 KB
        (90, Case(D=128), True),
        (75, Case(D=64), False),
        (80, Case(D=32), False),
        (80, Case(D=96), False),
        (80, Case(D=68), False),  # rows of no whole number of 16 bytes
        (80, Case(D=64, softcap=5.0), False),
        (80, Case(D=64, mask="bhts"), False),
        (80, Case(D=64, dropout_p=0.3), False),
        (80, Case(D=64, stats=1, grads=("out", "entropy")), False),
    ],
    ids=str,
)
def test_where_backward_is_one_pass(arch: int, case: Case, one_pass: bool) -> None:
    case = replace(case, name="", B=1, H=1, H_kv=1, T=20, S=130, dtype=fp16)
    with architecture(arch):
        files = {place.file for place in places(lambda: results(case))}
    assert ("attention_bwd_fused.h" in files) == one_pass
    assert ("attention_bwd_queries.h" in files) != one_pass


# Masks and biases in pairs and one by one (an odd S), of every dtype, alone and together.
MASKED = [
    replace(case, B=1, H=2, H_kv=1, T=150, S=S, D=D, dtype=dtype)
    for S, D, dtype in ((192, 32, fp16), (192, 64, bf16), (201, 64, fp16), (192, 128, bf16))
    for case in (
        Case("mask", mask="ts"),
        Case("keys", mask="hs", causal=True, scale=-0.3),
        Case("bias", bias="hts", masking_bias=True),
        Case("fp32", bias="ts", bias_dtype=fp32, sinks=True),
        Case("fp64", bias="ht", bias_dtype=fp64, masking_bias=True, window=(90, 40)),
        Case("both", bias="hts", mask="bs", sinks=True, causal=True, align="bottom_right"),
    )
]


@pytest.mark.parametrize("case", MASKED, ids=str)
def test_masks_and_biases(case: Case) -> None:
    check_case(case)


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("bias", [False, True])
def test_masks_that_leave_few_keys_out(bias: bool, shift: int, D: int) -> None:
    """Whole tiles without one, at even and at odd addresses: padding beside nothing at all."""
    case = Case("few", B=1, H=1, H_kv=1, T=150, S=192, D=D, dtype=bf16)
    given = problem(replace(case, **{"bias" if bias else "mask": "ts"}))
    wide = torch.randn(1, 1, 150, 194).to(bf16) if bias else torch.ones(1, 1, 150, 194) > 0
    x = wide[..., shift : shift + 192]
    x[..., 40:, 170:] = -torch.inf if bias else False
    x[..., 7, 3] = -torch.inf if bias else False
    inputs = given.inputs._replace(**{"bias" if bias else "mask": x})
    for poison in (0.0, torch.nan):  # of a key that nobody attends
        x[..., 180] = -torch.inf if bias else False
        v = inputs.v.clone()
        v[:, :, 180] = poison
        found = run(given._replace(inputs=inputs._replace(v=v)), "cuda")
        clean = inputs._replace(v=v.nan_to_num())
        check(found, given._replace(inputs=clean))


@pytest.mark.parametrize(
    ("case", "form"),
    [
        (Case(D=64), "64, plain"),
        (Case(D=64, mask="ts"), "64, masked"),
        (Case(D=20, bias="s", sinks=True, scale=-1.0), "32, options"),  # rows of 40 bytes
        (Case(D=24, bias="s", sinks=True, scale=-1.0), "32, masked"),
        (Case(D=64, mask="ts", softcap=5.0), "64, options"),
        (Case(D=64, mask="ts", dropout_p=0.3), "64, options"),
        (Case(D=64, alibi="h"), "64, options"),
        (Case(D=64, stats=1), "64, options"),
        (Case(D=72, mask="ts"), "96, options"),
        (Case(D=64, blocks="full 64"), "64, plain blocks"),
        (Case(D=60, blocks="full 64"), "64, blocks"),  # rows of 120 bytes
        (Case(D=72, blocks="documents 64", softcap=5.0), "96, blocks"),
    ],
    ids=str,
)
def test_which_form_of_the_forward_serves(case: Case, form: str) -> None:
    case = replace(case, name="", B=1, H=1, H_kv=1, T=20, S=30, dtype=bf16, grads=())

    def run() -> None:
        results(case)

    stored = [x for x in places(run) if x.file == "attention_fwd.h" and x.op == "store_global"]
    with (
        sabotage("shift", stored[0], 1 << 22),
        pytest.raises(RuntimeError, match=rf"attention_fwd<bf16, {form}>"),
    ):
        run()


@pytest.mark.parametrize("D", [64, 96, 128, 192, 256])
@pytest.mark.parametrize(
    "way",
    [{}, {"softcap": 5.0}, {"blocks": "full 64"}, {"blocks": "full 64", "softcap": 5.0}],
    ids=str,
)
def test_shared_memory_is_enough_where_there_is_least(D: int, way: dict[str, Any]) -> None:
    """The emulator refuses what exceeds an architecture's limit, as CUDA does: 99 KB on sm_86."""
    with architecture(86):
        results(Case("86", B=1, H=1, H_kv=1, T=40, S=40, D=D, dtype=bf16, **way))


def test_what_turing_refuses() -> None:
    inputs, options, _ = problem(PLAIN)
    call = attention_problem(inputs, options)._replace(requires_grad=True)
    bf16_only = "takes float16 only on a GPU of compute capability 7.5, got bfloat16"
    gradients = "has gradients for D and D_v up to 128 on a GPU of compute capability 7.5, got 192"
    half = call._replace(dtype=fp16)
    with architecture(75):
        assert dispatch.refusal("cuda", call) == bf16_only
        assert dispatch.refusal("cuda", half) is None
        assert dispatch.refusal("cuda", half._replace(D_v=192)) == gradients
        assert dispatch.refusal("cuda", half._replace(D_v=192, requires_grad=False)) is None
        with pytest.raises(ValueError, match=bf16_only):
            attnfast.attention(*inputs[:3], backend="cuda")
    assert dispatch.refusal("cuda", call._replace(D_v=192)) is None


def test_raw_operators_refuse_as_well_on_turing() -> None:
    """A kernel without code there would leave its outputs as they are."""
    inputs, options, _ = problem(PLAIN)
    wide, _, grads = problem(Case("wide", B=1, H=1, H_kv=1, T=9, S=9, D=192, dtype=fp16))
    with torch.no_grad(), architecture(75):
        with pytest.raises(RuntimeError, match=r"compute capability 7\.5 take float16 only"):
            ops.CUDA.fwd(*inputs, *options)
        out, _, norm, *_ = ops.CUDA.fwd(*wide, *options)
        gradients = (grads.out, None, None, None, out, norm, None, False, False)
        with pytest.raises(RuntimeError, match=r"gradients need D and D_v up to 128"):
            ops.CUDA.bwd(*gradients, *wide, *options)


def results(case: Case, inputs: Inputs | None = None) -> list[Tensor]:
    """Outputs, then gradients."""
    given = problem(case)
    return list(run(given._replace(inputs=inputs or given.inputs), "cuda").values())


@pytest.mark.parametrize("case", [PLAIN, OPTIONS], ids=str)
def test_no_schedule_changes_a_bit(case: Case) -> None:
    first, *others = (results_on(case, seed, threads=1 + seed % 2) for seed in SEEDS)
    for other in others:
        assert all(torch.equal(x, y) for x, y in zip(first, other, strict=True))


def test_kernels_read_the_dropout_seed() -> None:
    """From memory: the host, which does not wait for the device, cannot know it."""
    for dropout_p in (0.0, 0.3):
        case = replace(PLAIN, dropout_p=dropout_p)
        found = places(lambda case=case: results(case))
        kernels = [place for place in found if place.op == "load_global"]
        assert kernels
        assert any(place.file == "dropout.h" for place in kernels) == (dropout_p > 0)


def results_on(case: Case, seed: int, threads: int) -> list[Tensor]:
    with schedule(seed, threads):
        return results(case)


@pytest.mark.parametrize("long", [300, 40])
@pytest.mark.parametrize("D", [64, 96, 128])
def test_a_sequence_does_not_depend_on_its_neighbours(D: int, long: int) -> None:
    """Alone, where a kernel for short sequences serves it, it has the same results."""
    alone = problem(Case("", B=1, H_kv=1, T=100, S=100, D=D, dtype=bf16)).inputs
    q, k, v = (x[0].transpose(0, 1) for x in alone[:3])
    others = [torch.randn(long, *x.shape[1:]).to(bf16) for x in (q, k, v)]
    outputs = []
    for lengths in ((100,), (long, 100)):
        tensors = [
            torch.cat([x, y] if len(lengths) > 1 else [y]).requires_grad_()
            for x, y in zip(others, (q, k, v), strict=True)
        ]
        ends = torch.tensor([0, *lengths]).cumsum(0)
        out, lse = attnfast.varlen_attention(
            *tensors, ends, ends, max(lengths), max(lengths), return_lse=True, backend="cuda"
        )
        grads = torch.autograd.grad(out, tensors, torch.ones_like(out))
        outputs.append((out[-100:], lse[:, -100:], *(grad[-100:] for grad in grads)))
    for x, y in zip(*outputs, strict=True):
        assert torch.equal(x, y)


def test_maximum_beyond_all_rows() -> None:
    """Blocks are started for the rows that there are; what is shaped by the maximum is zero."""
    q, ends = torch.randn(71, 2, 32, dtype=bf16, requires_grad=True), torch.tensor([0, 5, 70])
    found = []
    for longest in (65, 400):
        bias = torch.ones(1, 1, 1, longest, requires_grad=True)
        out, weights = attnfast.varlen_attention(
            *(q, q, q, ends, ends, longest, longest),
            bias=bias,
            return_weights="mean",
            backend="cuda",
        )
        grads = torch.autograd.grad(out.float().square().sum(), (q, bias))
        assert weights.shape == (2, longest, longest)
        for x in (weights.detach(), grads[1]):
            assert not x[..., 65:].any()
        assert not weights[:, 65:].any()
        found.append((out, weights[:, :65, :65], grads[0], grads[1][..., :65]))
    for tight, loose in zip(*found, strict=True):
        assert torch.equal(tight, loose)


# Tiles of every head dim, which CASES have few of; heads with lists of their own, some empty.
BLOCKED = [
    Case(f"D{D}", B=1, H=4, H_kv=2, T=200, S=330, D=D, blocks=blocks, window=window, dtype=dtype)
    for D, blocks, window, dtype in (
        (32, "heads 128", (-1, -1), bf16),
        (64, "heads 64", (100, -1), fp16),
        (96, "heads 64", (150, 60), bf16),
        (128, "heads 128", (-1, -1), fp16),
        (128, "heads 64", (70, 200), bf16),
        (192, "blocks 64", (-1, -1), bf16),
        (256, "heads 64", (90, 40), fp16),
    )
]


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("case", BLOCKED, ids=str)
def test_block_masks(case: Case, softcap: float) -> None:
    check_case(replace(case, softcap=softcap))


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_nan_in_queries_of_partial_blocks(softcap: float | None) -> None:
    """One attends nothing, one the first 70 keys: gradients of later keys know of neither."""
    mask = torch.rand(130, 130) < 0.7
    mask[70], mask[80], mask[80, :70] = False, False, True
    q, k, v = (torch.randn(1, 1, 130, 64, dtype=bf16) for _ in range(3))
    found = []
    for value in (0.0, torch.nan):
        q[:, :, [70, 80]] = value
        leaves = [x.clone().requires_grad_() for x in (k, v)]
        blocks = BlockMask.from_mask(mask, 64)
        out = attnfast.attention(q, *leaves, mask=blocks, softcap=softcap, backend="cuda")
        upstream = torch.ones_like(out)
        found.append([x[:, :, 70:] for x in torch.autograd.grad(out, leaves, upstream)])
    for clean, spoilt in zip(*found, strict=True):
        assert torch.equal(clean, spoilt)


def fragments(mask: BlockMask | None, *, H: int = 1, T: int = 0, **options: Any) -> int:
    """How many fragments of tiles a call loads, forward and backward."""
    T = T if mask is None else mask.shape[2]
    q = torch.randn(1, H, T, 32, dtype=bf16, requires_grad=True)

    def call() -> None:
        attnfast.attention(q, q, q, mask=mask, backend="cuda", **options).sum().backward()

    return sum(place.requests for place in places(call) if place.op == "load_matrix")


@pytest.mark.parametrize("partial", [False, True], ids=["full", "partial"])
@pytest.mark.parametrize("size", [64, 128])
def test_only_blocks_that_are_left_are_walked(size: int, partial: bool) -> None:
    """What a mask leaves out is not loaded, nor what positions do."""
    T = 4 * size

    def some(T: int) -> BlockMask:
        everything = ~BlockMask.nothing((1, 1, T, T), size)
        return BlockMask.strided(T, T, 3, block_size=size) if partial else everything

    document = torch.arange(T) // size
    apart = BlockMask.from_documents(document, block_size=size) & some(T)
    assert fragments(apart) == 4 * fragments(some(size))

    ahead = document[:, None] - document
    near = BlockMask.from_mask((ahead == 0) | (ahead == 1), size) & some(T)
    window = {"causal": True, "window": (size - 1, None)}
    assert fragments(some(T), **window) == fragments(near, **window) < fragments(some(T))


def test_each_head_walks_its_own_window() -> None:
    T, window = 330, torch.tensor([[40, 0], [-1, -1], [100, 64]])
    apart = [fragments(None, T=T, window=window[h : h + 1]) for h in range(3)]
    assert fragments(None, H=3, T=T, window=window) == sum(apart)
    assert apart[0] < apart[2] < apart[1]


@pytest.mark.parametrize("case", [PLAIN, OPTIONS], ids=str)
def test_layouts(case: Case) -> None:
    """Views of any strides, rows at odd addresses too, give the bits of dense tensors."""
    given = problem(case).inputs
    expected = results(case)

    def transposed(x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    def at_odd_addresses(x: Tensor) -> Tensor:
        wide = x.new_full((*x.shape[:3], x.shape[3] + 3), torch.nan)
        wide[..., 1:-2] = x
        return wide[..., 1:-2]

    for view in (transposed, at_odd_addresses):
        views = given._replace(q=view(given.q), k=view(given.k), v=view(given.v))
        got = results(case, views)
        if view is transposed or case is OPTIONS:
            assert all(torch.equal(x, y) for x, y in zip(expected, got, strict=True))
        else:  # other kernels, which round the scores elsewhere
            for x, y in zip(got, expected, strict=True):
                torch.testing.assert_close(x, y, rtol=2e-2, atol=4e-2)
        assert got[0].stride() == ops.empty_in_order(views.q, given.v.shape[3]).stride()


@pytest.mark.parametrize("dtype", [bf16, fp16])
def test_every_number_passes(dtype: torch.dtype) -> None:
    """One query and one key: the output is the value, whatever its bits, except NaN's."""
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    v = bits.view(dtype).view(1, 512, 1, 128)
    zeros = torch.zeros_like(v)
    out = attnfast.attention(zeros, zeros, v, backend="cuda")
    assert torch.equal(out.isnan(), v.isnan())
    same = out.view(torch.int16) == v.view(torch.int16)
    assert (same | v.isnan() | (v == 0)).all()  # the sum 0 + -0 is 0


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("options", ["mask", "bias", "causal", "window", "lengths"])
def test_poison_that_nobody_attends(options: str, poison: float) -> None:
    """Keys and values past the 110th are padding, as are queries past the 50th with a full mask."""
    case = Case(B=1, H=2, H_kv=1, T=70, S=150, D=40, dtype=bf16)
    inputs, _, grads = problem(case)
    allowed = ((torch.arange(150) < 110) & (torch.arange(70) < 50).view(70, 1)).view(1, 1, 70, 150)
    arguments: dict[str, Any] = {
        "mask": {"mask": allowed},
        "bias": {"bias": torch.zeros(1, 1, 70, 150).masked_fill(~allowed, -torch.inf)},
        "causal": {"causal": True, "align": 40},
        "window": {"window": (None, 0), "align": 40},
        "lengths": {},
    }[options]
    padded_queries = options in ("mask", "bias")

    def all_results(value: float) -> list[Tensor]:
        q, k, v = (x.clone() for x in inputs[:3])
        k[:, :, 110:], v[:, :, 110:] = value, value
        if padded_queries:
            q[:, :, 50:] = value
        leaves = [x.requires_grad_() for x in (q, k, v)]
        if options == "lengths":
            ends = torch.tensor([0, 70]), torch.tensor([0, 110])
            rows = (x[0].transpose(0, 1) for x in leaves)
            out = attnfast.varlen_attention(*rows, *ends, 70, 110, backend="cuda")
            out = out.transpose(0, 1)[None]
        else:
            out = attnfast.attention(*leaves, backend="cuda", **arguments)
        assert grads.out is not None
        return [out.detach(), *torch.autograd.grad(out, leaves, grads.out)]

    clean = all_results(0.0)
    assert all(x.isfinite().all() for x in clean)
    for x, y in zip(all_results(poison), clean, strict=True):
        assert torch.equal(x, y)


LYING = {  # about sequences of 200 rows: their ends, and the longest
    "longer": ([0, 200], 64),
    "two longer": ([0, 150, 200], 40),
    "none": ([0, 200], 0),
    "beyond": ([0, 250, 1 << 30], 200),
    "before": ([-7, 3, 900], 200),
    "back": ([0, 150, 4, 200], 160),
    "past": ([200, 200, 200], 200),
    "both": ([-(2**31), 2**31 - 1], 65),
}
MASKED: dict[str, Any] = {  # what is read or written by positions within the longest
    "plain": {},
    "mask": {"mask": "bool"},
    "bias": {"bias": "float"},
    "statistics": {"return_stats": "received", "return_weights": "mean", "softcap": 5.0},
    "dropout": {"dropout_p": 0.3, "return_weights": True, "window": (70, 9), "causal": True},
}


@pytest.mark.parametrize("options", MASKED)
@pytest.mark.parametrize("lie", LYING)
def test_no_kernel_trusts_cu_seqlens(lie: str, options: str) -> None:
    """A GPU does not check them: of a longer sequence only the first rows are there."""
    ends, longest = LYING[lie]
    cu = torch.tensor(ends, dtype=torch.int32)
    q = torch.randn(200, 2, 32).to(bf16).requires_grad_()
    given = dict(MASKED[options])
    if "mask" in given:
        given["mask"] = torch.rand(1, 2, longest, longest) < 0.8
    if "bias" in given:
        given["bias"] = torch.randn(1, 2, longest, longest, requires_grad=True)

    def results(cu: Tensor) -> list[Tensor]:
        torch.manual_seed(0)  # of dropout
        out = attnfast.varlen_attention(q, q, q, cu, cu, longest, longest, backend="cuda", **given)
        out, weights = (out[0], out[-1]) if isinstance(out, tuple) else (out, out)
        loss = out.float().sum() + weights.float().square().sum()
        leaves = [q, *(x for x in given.values() if isinstance(x, Tensor) and x.requires_grad)]
        return [out.detach(), *torch.autograd.grad(loss, leaves)]

    found = results(cu)
    assert all(x.isfinite().all() for x in found)
    if lie == "longer":
        expected = results(torch.tensor([0, longest], dtype=torch.int32))
        for x, y in zip(found, expected, strict=True):
            assert torch.equal(x, y)


def test_lengths_and_pages_of_raw_calls_beyond_int32() -> None:
    """Public functions say so of CPU tensors; those of a GPU reach the kernels as they are."""
    q, pages = torch.randn(2, 2, 1, 8).to(bf16), torch.randn(5, 100, 2, 8).to(bf16)
    inputs = DecodeInputs(
        *(q, pages, pages, torch.tensor([2**32 + 5, -(2**32) + 7])),
        page_table=torch.tensor([[2**32, -(2**32) + 1, 0], [1, 2, 3]]),
    )
    full, empty = ops.CUDA.decode(*inputs, *DecodeOptions(0.1))[0]
    assert full.any()
    assert not empty.any()


def test_negative_maxima_of_raw_calls() -> None:
    q, ends = torch.randn(1, 2, 20, 32).to(bf16), torch.tensor([0, 20]).int()
    inputs = Inputs(q, q, q, cu_seqlens_q=ends, cu_seqlens_k=ends)
    for maxima, name in (((-1, 20), "max_seqlen_q"), ((20, -300), "max_seqlen_k")):
        options = Options(0.1, max_seqlen_q=maxima[0], max_seqlen_k=maxima[1])
        with pytest.raises(RuntimeError, match=f"{name} must be at least 0, got -"):
            ops.CUDA.fwd(*inputs, *options)


@pytest.mark.parametrize("returned", [{}, {"return_stats": True}], ids=["out", "statistics"])
@pytest.mark.parametrize("T", [30, 150])
def test_warming_up_runs_every_kernel_of_a_call(T: int, returned: dict[str, Any]) -> None:
    q = torch.randn(1, 2, T, 32).to(bf16).requires_grad_()

    def call() -> None:
        results = attnfast.attention(q, q, q, causal=True, backend="cuda", **returned)
        out, *stats = results if returned else (results,)
        loss = out.float().sum() + sum(x.entropy.sum() for x in stats)
        torch.autograd.grad(loss, q)

    def warm_up() -> None:
        attnfast.warm_up(q, q, q, causal=True, backend="cuda", **returned)

    def run(function: Any) -> set[str]:
        return {str(place) for place in places(function)}

    needed = run(call)
    assert needed <= run(warm_up)
    with torch.no_grad():
        assert not needed <= run(warm_up)  # nor does it run backward


def test_old_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, options, _ = problem(PLAIN)
    call = attention_problem(inputs, options)._replace(device=torch.device("cuda"))
    for capability, reason in {
        (7, 0): "needs a GPU of compute capability 7.5 or later, got 7.0",
        (7, 5): "takes float16 only on a GPU of compute capability 7.5, got bfloat16",
        (8, 0): None,
        (12, 0): None,
    }.items():
        monkeypatch.setattr(gpus, "capability", lambda _, found=capability: found)
        assert cuda.ROW.unsupported(call) == reason


def test_checks_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNFAST_CHECK", "1")
    q, cu = torch.randn(20, 2, 32).to(bf16), torch.tensor([0, 25])
    with pytest.raises(ValueError, match="cu_seqlens_q must end within the 20 rows of q, got 25"):
        attnfast.varlen_attention(q, q, q, cu, cu, 25, 25, backend="cuda")
    x, lengths = torch.randn(1, 2, 20, 32).to(bf16), torch.tensor([21])
    with pytest.raises(ValueError, match=r"cache_seqlens must .*21"):
        attnfast.decode_attention(x[:, :, :1], x, x, lengths, backend="cuda")


@pytest.mark.parametrize("D", [64, 256])
def test_decode_on_turing(D: int) -> None:
    """Where the cache's tiles are half as large, for its shared memory."""
    case = decode_cases.DecodeCase(
        "turing", lengths=(129, 300), D=D, D_v=D, dtype=fp16, received=True
    )
    call = decode_cases.make(case)
    with architecture(75):
        decode_cases.judge(decode_cases.decode_paged(call, "cuda"), call)


@pytest.mark.parametrize("window", [None, (3, 0), (2**31 - 1, 2)], ids=str)
@pytest.mark.parametrize("T", [1, 5])
def test_lengths_and_pages_never_lead_out_of_a_cache(T: int, window: Any) -> None:
    q, cache = torch.randn(2, 2, T, 8).to(bf16), torch.randn(2, 2, 300, 8).to(bf16)
    pages, bias = torch.randn(5, 100, 2, 8).to(bf16), torch.randn(2, 1, T, 300)
    table = torch.tensor([[0, -1, 9], [2, 2**31 - 1, -(2**31)]])
    for length in (301, -1, 2**31 - 1, -(2**31)):
        lengths = torch.tensor([5, length])
        for given in ({}, {"bias": bias, "window": window}):
            call = {"backend": "cuda", **given}
            for out in (
                attnfast.decode_attention(q, cache, cache, lengths, **call),
                attnfast.decode_attention(q, pages, pages, lengths, page_table=table, **call),
                attnfast.decode_attention(
                    q, pages[:0], pages[:0], lengths, page_table=table, **call
                ),
            ):
                assert out.isfinite().all()


TAKEN = [each for each in EACH if "indices" not in GIVEN_BACK[each[0]]()]


@pytest.mark.parametrize(("call", "name"), TAKEN, ids=lambda x: getattr(x, "__name__", x))
def test_a_storage_given_back(call: Any, name: str) -> None:
    given = {name: x.to(bf16) if name[0] in "qkv" else x for name, x in GIVEN_BACK[call]().items()}
    call("cuda", **given)  # right, before
    given[name].untyped_storage().resize_(0)
    said = complaint(call, "cuda", **given)
    assert re.search(rf"{name} must (have its|be in) memory", said)


def test_numbers_beyond_int32_are_out_of_range() -> None:
    q, k = torch.randn(2, 2, 6, 8).to(bf16), torch.randn(2, 2, 9, 8).to(bf16)
    outs = [
        attnfast.attention(q, k, k, causal=True, align=align, backend="cuda")
        for align in (torch.tensor([far, -far - 1]).int() for far in (2**31 - 1, 2**29))
    ]
    assert torch.equal(*outs)
    assert outs[0][0].any(-1).all()
    assert not outs[0][1].any()
    inputs = Inputs(q, k, k, align=torch.tensor([2**32, -(2**32)]))  # saturates, never wraps
    assert torch.equal(ops.CUDA.fwd(*inputs, *Options(8**-0.5, causal=True))[0], outs[0])


def test_opcheck() -> None:
    inputs, options, grads = problem(replace(OPTIONS, T=9, S=20))
    torch.library.opcheck(ops.CUDA.fwd, (*inputs, *options))
    out, _, norm, stats, *_ = ops.CUDA.fwd(*inputs, *options)
    gradients = (*grads, out, norm, stats[1], True, True)
    torch.library.opcheck(ops.CUDA.bwd, (*gradients, *inputs, *options))
    call = decode_cases.make(decode_cases.DecodeCase("opcheck", T=2, dtype=fp16))
    torch.library.opcheck(ops.CUDA.decode, (*DecodeInputs(*call[:4]), *DecodeOptions(0.1)))


REFUSED = {
    "takes bfloat16 and float16, got float32": {"dtype": torch.float32},
    "takes D and D_v up to 256, got 320": {"D_v": 320},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals(reason: str) -> None:
    inputs, options, _ = problem(PLAIN)
    plain = attention_problem(inputs, options)
    assert dispatch.refusal("cuda", plain) is None
    assert dispatch.refusal("cuda", plain._replace(**REFUSED[reason])) == reason
    assert dispatch.select(plain).name == "cpu"  # the emulator serves only where it is named

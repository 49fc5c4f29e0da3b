"""attnfast.lens: products with the attention matrix, and every query's likeliest keys."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from accuracy import check
from cases import EVERYTHING, OPTIONS, Case, arguments_of, problem, run
from dense import Trial
from torch import Tensor

import attnfast
from attnfast import lens
from attnfast.lens import maps

fp32, bf16 = torch.float32, torch.bfloat16
TAKEN = [
    replace(case, dropout_p=0.0, weights="none", stats=0, grads=("out",))
    for case in (*OPTIONS, EVERYTHING)
    if not case.indices
]


def trials() -> list[Case]:
    """The options alone and together, and of sequences, in fp32; some in bf16."""
    names: dict[str, Case] = {}
    for i, case in enumerate(TAKEN):
        names.setdefault(str(case), replace(case, dtype=bf16 if i % 4 == 1 else fp32))
    return list(names.values())


def arguments(trial: Trial) -> dict[str, Any]:
    """The options of a trial, as the lens takes them."""
    given = arguments_of(trial.inputs, trial.options)
    dropped = ("dropout_p", "dropout_seed", "return_lse", "return_stats", "return_weights")
    for name in dropped:
        given.pop(name)
    if trial.inputs.cu_seqlens_q is not None:
        for side in "qk":
            given[f"cu_seqlens_{side}"] = getattr(trial.inputs, f"cu_seqlens_{side}")
            given[f"max_seqlen_{side}"] = getattr(trial.options, f"max_seqlen_{side}")
    return given


def as_given(trial: Trial, x: Tensor) -> Tensor:
    """(B, H, rows, columns) as the caller has it, packed or not; and back."""
    return x if trial.inputs.cu_seqlens_q is None else x.squeeze(0).transpose(0, 1)


def as_held(trial: Trial, x: Tensor) -> Tensor:
    return x if trial.inputs.cu_seqlens_q is None else x.transpose(0, 1).unsqueeze(0)


def hold(found: dict[str, Tensor], trial: Trial) -> None:
    """The accuracy rule for what was found; the call's other results are its own."""
    check(run(trial, "cpu") | found, trial)


@pytest.mark.parametrize("case", trials(), ids=str)
def test_products(case: Case) -> None:
    """P x is the trial's out, P^T y its gradient of v."""
    trial = problem(case)
    q, k, v = (as_given(trial, x) for x in trial.inputs[:3])
    assert trial.cotangents.out is not None
    found = lens.apply(q, k, v, **arguments(trial))
    hold({"out": as_held(trial, found)}, trial)
    group = case.H // case.H_kv
    wide = trial.inputs._replace(
        k=trial.inputs.k.repeat_interleave(group, 1), v=trial.inputs.v.repeat_interleave(group, 1)
    )
    y = as_given(trial, trial.cotangents.out)
    given = arguments(trial)
    found = lens.apply_transposed(q, k, y, **given)
    each = as_held(trial, found)
    hold({"dv": each}, trial._replace(inputs=wide))
    mean = lens.apply_transposed(q.double(), k.double(), y, heads="mean", **in_double(given))
    every = lens.apply_transposed(q.double(), k.double(), y, **in_double(given))
    head = 0 if case.lengths else 1
    torch.testing.assert_close(mean, (every.transpose(0, 1) if case.lengths else every).mean(head))


def in_double(given: dict[str, Any]) -> dict[str, Any]:
    names = ("bias", "sinks")
    return {n: x.double() if n in names and x is not None else x for n, x in given.items()}


@pytest.mark.parametrize("case", trials(), ids=str)
def test_top_keys(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """All keys, put where they belong, are the weights; a few are the first of all."""
    monkeypatch.setattr(maps, "CELL", 1 << 20)
    trial = problem(replace(case, dtype=fp32, weights="per head", grads=()))
    q, k = (as_given(trial, x) for x in trial.inputs[:2])
    S = trial.options.max_seqlen_k or trial.inputs.k.shape[2]
    indices, probabilities, left_out = lens.top_keys(q, k, S, **arguments(trial))
    assert bool((probabilities.diff(dim=-1) <= 0).all())
    assert bool(((indices < 0) == (probabilities == 0)).all())
    torch.testing.assert_close(left_out, torch.zeros_like(left_out), atol=1e-6, rtol=0)
    hold_weights(case, trial, indices, probabilities)
    few = lens.top_keys(q, k, min(3, S), **arguments(trial))
    assert torch.equal(few[1], probabilities[..., :3])
    torch.testing.assert_close(few[2], probabilities[..., 3:].sum(-1), atol=1e-6, rtol=1e-5)


def hold_weights(case: Case, trial: Trial, *found: Tensor) -> None:
    """The accuracy rule for weights: of the pairs (indices, probabilities) the last count."""
    S = trial.options.max_seqlen_k or trial.inputs.k.shape[2]
    weights = torch.zeros(*found[0].shape[:-1], S + 1)  # the last column is of what is no key
    for indices, probabilities in zip(found[::2], found[1::2], strict=True):
        weights.scatter_(-1, torch.where(indices < 0, S, indices), probabilities)
    weights = weights[..., :S]
    if case.lengths:
        by_sequence = torch.zeros(len(case.lengths), case.H, trial.options.max_seqlen_q, S)
        start = 0
        for i, (T, _) in enumerate(case.lengths):
            by_sequence[i, :, :T] = weights[:, start : start + T]
            start += T
        weights = by_sequence
    hold({"weights": weights}, trial)


@pytest.mark.parametrize("case", trials(), ids=str)
def test_top_keys_of_many(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sought in a few cells they are those that are found among all."""
    trial = problem(replace(case, dtype=fp32, weights="per head", grads=()))
    q, k = (as_given(trial, x) for x in trial.inputs[:2])
    S = trial.options.max_seqlen_k or trial.inputs.k.shape[2]
    every = lens.top_keys(q, k, S, **arguments(trial))
    monkeypatch.setattr(maps, "CELL", 2)
    monkeypatch.setattr(maps, "likely_keys", sought := Mock(wraps=maps.likely_keys))
    indices, probabilities, left_out = lens.top_keys(q, k, 2, **arguments(trial))
    assert sought.called == (S >= 16)
    hold_weights(case, trial, *every[:2], indices, probabilities)  # of the keys that are named
    likeliest = every[0][..., :2]
    hold_weights(case, trial, *every[:2], likeliest, probabilities)
    lse = run(trial, "cpu")["lse"].nan_to_num(neginf=0).view(left_out.shape)
    bound = 1e-6 + 2**-20 * lse.abs()  # of a score's rounding errors in fp32
    assert bool(((left_out - every[1][..., 2:].sum(-1)).abs() <= bound).all())


def test_blocks_of_rows_are_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows cut into several blocks, with options that stand by position."""
    monkeypatch.setattr(maps, "ELEMENTS", 1)
    monkeypatch.setattr(maps, "HEIGHT", 7)
    for name in ("align_tensor", "everything", "bottom_right_wide", "causal"):
        case = next(c for c in TAKEN if c.name == name)
        test_top_keys(case, monkeypatch)


def test_wider_dtypes_and_one_x_for_all_heads() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 9, 8).bfloat16(), torch.randn(2, 2, 11, 8).bfloat16()
    weights = attnfast.attention(q.float(), k.float(), k.float(), return_weights=True, causal=True)[
        1
    ]
    x, y = torch.randn(2, 11, 300), torch.randn(2, 9, 300)
    close = {"atol": 1e-5, "rtol": 1e-5}
    for heads in ("each", "mean"):
        w = weights.mean(1) if heads == "mean" else weights
        (x4, y4) = (x, y) if heads == "mean" else (x[:, None], y[:, None])
        found = lens.apply(q, k, x, heads=heads, causal=True)
        torch.testing.assert_close(found, w @ x4, **close)
        found = lens.apply_transposed(q, k, y, heads=heads, causal=True)
        torch.testing.assert_close(found, w.mT @ y4, **close)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q, k: lens.top_keys(q, k, 12), "top_keys: n must be at most the number of keys"),
        (lambda q, k: lens.attention_map(q, k, 0), "attention_map: rows must be from 1 to"),
        (lambda q, k: lens.attention_map(q, k, reduce="sum"), "attention_map: reduce must be one"),
        (lambda q, k: lens.attention_map(q, k[0]), "attention_map: k must be (B, H_kv, S, D)"),
        (lambda q, k: lens.top_keys(q, k, 0), "top_keys: n must be from 1 to"),
        (lambda q, k: lens.top_keys(q, 3, 1), "top_keys: k must be a floating-point torch.Tensor"),
        (lambda q, k: lens.apply(q, k, q[:, :1, :5]), "apply: x must be (B, H_kv, S, D_v)"),
        (lambda q, k: lens.apply(q, k, k, heads="all"), "apply: heads must be one of"),
        (lambda q, k: lens.apply(q, k, k, dropout_p=0.1), "unexpected keyword argument"),
        (
            lambda q, k: lens.apply(q, k, k, cu_seqlens_k=torch.tensor([0, 1])),
            "apply: cu_seqlens_q must be given with the others of",
        ),
        (lambda q, k: lens.apply_transposed(q, k, k), "apply_transposed: y must be of q's shape"),
    ],
)
def test_messages(call: Any, message: str) -> None:
    q, k = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 11, 8)
    with pytest.raises((TypeError, ValueError), match=r"\w") as error:
        call(q, k)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def pooled_by_hand(p: Tensor, rows: int, columns: int, reduce: str) -> Tensor:
    """Cells of (B, H, T, S), one by one."""
    T, S = p.shape[2:]
    found = torch.zeros(*p.shape[:2], rows, columns, dtype=p.dtype)
    for r in range(rows):
        for c in range(columns):
            cell = p[:, :, r * T // rows : (r + 1) * T // rows]
            cell = cell[..., c * S // columns : (c + 1) * S // columns].flatten(2)
            if cell.shape[2]:
                found[:, :, r, c] = cell.mean(2) if reduce == "mean" else cell.amax(2)
    return found


@pytest.mark.parametrize("case", [x for x in trials()[::3] if "large" not in x.name], ids=str)
def test_attention_map(case: Case) -> None:
    """Small scores, which fp32 holds to its last digits: test_pooled.py has the accuracy rule."""
    trial = problem(replace(case, dtype=fp32, grads=()))
    q, k = (as_given(trial, x) for x in trial.inputs[:2])
    wide = in_double(arguments(trial))
    lengths = case.lengths or ((q.shape[2], k.shape[2]),)
    for (rows, columns), reduce in (((5, 9), "mean"), ((3, 4), "max")):
        found = lens.attention_map(q, k, rows, columns, reduce, **arguments(trial))
        mean = lens.attention_map(q, k, rows, columns, reduce, heads="mean", **arguments(trial))
        torch.testing.assert_close(mean, found.mean(1))
        if case.lengths:
            dense = attnfast.varlen_attention(
                q.double(), k.double(), k.double(), return_weights=True, **wide
            )[1]
            want = [
                pooled_by_hand(dense[i : i + 1, :, :T, :S], *found.shape[2:], reduce)
                for i, (T, S) in enumerate(lengths)
            ]
        else:
            dense = attnfast.attention(
                q.double(), k.double(), k.double(), return_weights=True, **wide
            )[1]
            want = [pooled_by_hand(dense, *found.shape[2:], reduce)]
        torch.testing.assert_close(found.double(), torch.cat(want), atol=2e-5, rtol=2e-5)


class Blocks(torch.nn.Module):
    """Layers of attention alone, which keep the mean of their heads' weights."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        layer = attnfast.MultiheadAttention
        layers = (layer(32, 4, batch_first=True, **options) for _ in range(3))
        self.layers = torch.nn.ModuleList(layers)

    def forward(self, x: Tensor, padding: Tensor, weights: list[Tensor] | None = None) -> Tensor:
        for layer in self.layers:
            out, found = layer(x, x, x, key_padding_mask=padding, need_weights=weights is not None)
            x = x + out
            if weights is not None:
                weights.append(found)
        return x


@pytest.mark.parametrize("options", [{}, {"window": (5, 2), "num_kv_heads": 2}], ids=str)
def test_rollout(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Blocks(**options).double()
    x, padding = torch.randn(2, 13, 32).double(), torch.zeros(2, 13, dtype=torch.bool)
    padding[1, 9:] = True
    weights: list[Tensor] = []
    model(x, padding, weights)
    want = torch.eye(13).double().expand(2, 13, 13)
    for w in weights:
        want = (0.3 * torch.eye(13) + 0.7 * w) @ want
    found = lens.rollout(model, x, padding=padding, positions=(0, -6), residual=0.3)
    torch.testing.assert_close(found, want[:, [0, 7]])
    assert bool((found[1, :, 9:] == 0).all())


def test_rollout_refuses() -> None:
    x, padding = torch.randn(2, 13, 32), torch.zeros(2, 13, dtype=torch.bool)
    model, plain = Blocks(), torch.nn.Linear(32, 32)
    cross = attnfast.MultiheadAttention(32, 4, batch_first=True)
    for call, message in (
        (lambda: lens.rollout(plain, x), "model must be a module in which attention of attnfast"),
        (lambda: lens.rollout(x), "model must be a torch.nn.Module, got Tensor"),
        (lambda: lens.rollout(model, x, padding, positions=(13,)), "positions must be from -13 to"),
        (lambda: lens.rollout(model, x, padding, positions=(0.5,)), "positions must be ints"),
        (lambda: lens.rollout(model, x, padding, residual=2), "residual must be from 0 to 1"),
        (lambda: lens.rollout(cross, x, x[:, :5], x[:, :5]), "self-attention of 13 tokens"),
    ):
        with pytest.raises((TypeError, ValueError), match=r"\w") as error:
            call()
        assert message in str(error.value)
    with lens.observe(model) as seen:
        lens.rollout(model, x, padding)
    assert len(seen.table()) == 12

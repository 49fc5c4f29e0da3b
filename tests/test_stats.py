"""AttentionStats: its derived numbers, its summary, and the ways it is handed around."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils import _pytree

from attnfast.call import Inputs, Options
from attnfast.reference import reference_attention
from attnfast.stats import AttentionStats

B, H, T, S = 2, 3, 4, 5
FIELDS = ("lse", "max_logit", "entropy", "reach", "focus")


def stats_of(
    q: Tensor, k: Tensor, mask: Tensor | None = None, received: bool = True
) -> AttentionStats:
    options = Options(1.0, stats=2 if received else 1, weights=2)
    _, lse, _, rows, per_key, _ = reference_attention(Inputs(q, k, k, mask), options)
    return AttentionStats(lse, *rows.unbind(0), per_key)


@pytest.fixture
def stats() -> AttentionStats:
    """Of random scores; query 1 of each head has no keys."""
    torch.manual_seed(0)
    mask = torch.ones(1, 1, T, 1, dtype=torch.bool)
    mask[:, :, 1] = False
    return stats_of(torch.randn(B, H, T, 2), torch.randn(B, H, S, 2), mask)


def test_breadth_and_focus_of_known_rows() -> None:
    """A row over n equal keys looks at n keys, each with probability 1 / n."""
    mask = torch.arange(S) < torch.arange(T).view(T, 1)  # query t has t keys
    stats = stats_of(torch.zeros(1, 1, T, 2), torch.randn(1, 1, S, 2), mask.view(1, 1, T, S))
    assert_close(stats.breadth[0, 0], torch.tensor([0.0, 1.0, 2.0, 3.0]))
    assert_close(stats.focus[0, 0], torch.tensor([0.0, 1.0, 1 / 2, 1 / 3]))


def test_breadth_has_a_gradient(stats: AttentionStats) -> None:
    leaves = [getattr(stats, name).clone().requires_grad_() for name in FIELDS]
    tracked = AttentionStats(*leaves)
    (gradient,) = torch.autograd.grad(tracked.breadth.sum(), leaves[2])
    assert_close(gradient, stats.breadth)


def test_detach(stats: AttentionStats) -> None:
    tracked = AttentionStats(*(getattr(stats, name).clone().requires_grad_() for name in FIELDS))
    detached = tracked.detach()
    assert not any(getattr(detached, name).requires_grad for name in FIELDS)
    assert detached.received is None
    assert stats.detach().received is not None


def test_per_head_leaves_out_rows_without_keys(stats: AttentionStats) -> None:
    heads = stats.per_head()
    keyed = [0, 2, 3]
    assert_close(heads.pop("max_logit"), stats.max_logit.amax((0, 2)))
    assert set(heads) == {"entropy", "breadth", "focus", "reach"}
    for name, value in heads.items():
        assert_close(value, getattr(stats, name)[:, :, keyed].mean((0, 2)))


def test_per_head_without_batch_dimension(stats: AttentionStats) -> None:
    alone = AttentionStats(*(getattr(stats, name)[0] for name in FIELDS))
    batch = AttentionStats(*(getattr(stats, name)[:1] for name in FIELDS))
    assert_close(alone.per_head(), batch.per_head())


@pytest.mark.parametrize("shape", [(0, H, T), (B, H, 0), (H, 0)], ids=str)
def test_per_head_of_no_rows(shape: tuple[int, ...]) -> None:
    heads = AttentionStats(*(torch.zeros(shape) for _ in FIELDS)).per_head()
    assert (heads.pop("max_logit") == -math.inf).all()
    assert all((value == torch.zeros(H)).all() for value in heads.values())


def test_repr(stats: AttentionStats) -> None:
    text = repr(stats)
    assert text.startswith(f"AttentionStats(2, 3, 4: max_logit {stats.max_logit.max().item():.4g}")
    assert f"breadth {stats.per_head()['breadth'].mean().item():.4g}" in text
    meta = AttentionStats(*(torch.zeros(B, H, T, device="meta") for _ in FIELDS))
    assert repr(meta) == "AttentionStats(2, 3, 4)"


@pytest.mark.parametrize("received", [False, True])
def test_is_a_pytree(stats: AttentionStats, received: bool) -> None:
    if not received:
        stats = AttentionStats(*(getattr(stats, name) for name in FIELDS))
    leaves, spec = _pytree.tree_flatten(stats)
    assert len(leaves) == len(FIELDS) + received
    again = _pytree.tree_unflatten(leaves, spec)
    assert isinstance(again, AttentionStats)
    assert all(getattr(again, name) is getattr(stats, name) for name in (*FIELDS, "received"))


def test_returned_by_transforms_and_compiled_code() -> None:
    q, k = torch.randn(B, H, T, 2), torch.randn(B, H, S, 2)
    expected = stats_of(q, k)
    compiled = torch.compile(stats_of, fullgraph=True, backend="aot_eager")(q, k)
    transformed, _ = torch.func.vjp(lambda q: stats_of(q, k), q)
    for result in (compiled, transformed):
        assert isinstance(result, AttentionStats)
        for name in (*FIELDS, "breadth", "focus", "received"):
            assert_close(getattr(result, name), getattr(expected, name))


def test_copies(stats: AttentionStats) -> None:
    for result in (copy.deepcopy(stats), pickle.loads(pickle.dumps(stats))):
        assert_close(result.entropy, stats.entropy)
    with pytest.raises(AttributeError):
        stats.lse = stats.entropy  # type: ignore[misc]

"""FlexAttention's function on our kernels: score_mods, masks, and gradients that torch lacks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as theirs

from attnfast import BlockMask
from attnfast.integrations import flex
from attnfast.integrations._score_mods import edits_of

B, H, T, S, D = 2, 4, 100, 130, 16
INF = float("inf")
rng = torch.Generator().manual_seed(0)
TABLE = torch.randn(H, T + S, generator=rng)
FULL = torch.randn(B, H, T, S, generator=rng)
SLOPES = torch.rand(H, generator=rng)
DOCUMENTS = torch.randint(0, 3, (B, S), generator=rng)

Mod = Callable[..., Any]
MODS: dict[str, Mod] = {
    "nothing": lambda s, b, h, q, k: s,
    "scale": lambda s, b, h, q, k: s * 0.5,
    "softcap": lambda s, b, h, q, k: 20 * torch.tanh(s / 20),
    "softcap, alibi": lambda s, b, h, q, k: (s / 2).tanh() * 2 - SLOPES[h] * (q - k).abs(),
    "alibi of both sides": lambda s, b, h, q, k: (
        s - (q - k).abs() * torch.exp2(-((h + 1) * 8.0 / H))
    ),
    "alibi before": lambda s, b, h, q, k: s + (k - q) * torch.exp2(-((h + 1) * 8.0 / H)),
    "distance": lambda s, b, h, q, k: s + (q - k) / 7,
    "relative": lambda s, b, h, q, k: s + TABLE[h, q - k + S],
    "bias": lambda s, b, h, q, k: FULL[b, h, q, k].to(s.dtype) + s,
    "two": lambda s, b, h, q, k: 1 - s + FULL[b, h, q, k] - 0.1 * (k - q),
    "causal": lambda s, b, h, q, k: torch.where(q >= k, s, -INF),
    "after": lambda s, b, h, q, k: torch.where(q < k, -INF, s),
    "filled": lambda s, b, h, q, k: s.masked_fill(q < k, -INF),
    "either": lambda s, b, h, q, k: torch.where(q >= k, s, s - 3),
    "documents": lambda s, b, h, q, k: torch.where(DOCUMENTS[b, q] == DOCUMENTS[b, k], s, -INF),
}
MASKS: dict[str, Mod | None] = {
    "none": None,
    "causal": lambda b, h, q, k: q >= k,
    "bottom right": lambda b, h, q, k: q + S - T >= k,
}


def qkv(*, grad: bool = False, heads: int = H, batch: int = B) -> list[Tensor]:
    rng = torch.Generator().manual_seed(1)
    shapes = ((B, H, T, D), (batch, heads, S, D), (batch, heads, S, D))
    return [torch.randn(x, generator=rng).requires_grad_(grad) for x in shapes]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("mod", MODS)
def test_as_torchs(mod: str, mask: str) -> None:
    allowed = MASKS[mask]
    blocks = None if allowed is None else theirs.create_block_mask(allowed, None, None, T, S, "cpu")
    expected, expected_lse = theirs.flex_attention(*qkv(), MODS[mod], blocks, return_lse=True)
    out, lse = flex.flex_attention(*qkv(), MODS[mod], blocks, return_lse=True)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=2e-5)


def test_what_is_found() -> None:
    def found(mod: Mod) -> Any:
        return edits_of("flex_attention", mod, (B, H, T, S), torch.device("cpu"))

    capped = found(MODS["softcap, alibi"])
    assert (capped.factor, capped.softcap, capped.bias) == (1.0, 2.0, None)
    assert torch.equal(capped.slopes, SLOPES)
    assert capped.absolute
    before = found(MODS["alibi before"])
    assert not before.absolute
    assert before.slopes.tolist() == [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8]
    assert found(lambda s, b, h, q, k: s + TABLE[h, k]).bias.shape == (1, H, 1, S)
    assert found(lambda s, b, h, q, k: s + TABLE[h, q]).bias.shape == (1, H, T, 1)


def dense(mod: Mod, allowed: Mod, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    places = [torch.arange(n).view(*[1] * i, n, *[1] * (3 - i)) for i, n in enumerate((B, H, T, S))]
    k, v = (x.repeat_interleave(H // x.shape[1], 1) for x in (k, v))
    s = mod(q @ k.mT * D**-0.5, *places)
    return torch.where(allowed(*places), s, -INF).softmax(-1) @ v


@pytest.mark.parametrize("mod", ["softcap, alibi", "alibi before", "two", "either"])
def test_trains_on_the_cpu(mod: str) -> None:
    def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return q >= k

    blocks = theirs.create_block_mask(allowed, None, None, T, S, "cpu")
    given, expected = qkv(grad=True, heads=2), qkv(grad=True, heads=2)
    out = flex.flex_attention(*given, MODS[mod], blocks, enable_gqa=True)
    torch.testing.assert_close(out, dense(MODS[mod], allowed, *expected))
    out.square().sum().backward()
    dense(MODS[mod], allowed, *expected).square().sum().backward()
    for a, b in zip(given, expected, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


def test_tensors_in_the_function_have_gradients() -> None:
    found = []
    for function in (flex.flex_attention, theirs.flex_attention):
        table, slopes = TABLE.clone().requires_grad_(), SLOPES.clone().requires_grad_()

        def mod(
            s: Any,
            b: Tensor,
            h: Tensor,
            q: Tensor,
            k: Tensor,
            t: Tensor = table,
            m: Tensor = slopes,
        ) -> Any:
            return s + t[h, q - k + S] - m[h] * (q - k).abs()

        if function is theirs.flex_attention:
            out = dense(mod, lambda b, h, q, k: q < q + 1, *qkv())
        else:
            out = function(*qkv(), mod)
        found.append(torch.autograd.grad(out.square().sum(), (table, slopes)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


REFUSED: dict[str, tuple[Mod, str]] = {
    "power": (lambda s, b, h, q, k: s**2, "TypeError: unsupported operand type(s) for **"),
    "exp": (lambda s, b, h, q, k: torch.exp(s), "exp of a score"),
    "clamp": (lambda s, b, h, q, k: s.clamp(max=3), "clamp of a score"),
    "by a tensor": (lambda s, b, h, q, k: s * TABLE[h, q], "score times a tensor"),
    "squared": (lambda s, b, h, q, k: s * s, "score times a tensor"),
    "sum": (lambda s, b, h, q, k: s + s, "a sum of two scores"),
    "where": (lambda s, b, h, q, k: torch.where(q > k, s, 0.0), "something else than -inf"),
    "wheres": (lambda s, b, h, q, k: torch.where(q > k, s, 2 * s), "differ by more than what is"),
    "late cap": (lambda s, b, h, q, k: torch.tanh(s + 1), "capped or biased already"),
    "no score": (lambda s, b, h, q, k: q - k, "a result of type Position"),
    "branch": (lambda s, b, h, q, k: s if q > k else -s, "RuntimeError: Boolean value of Tensor"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_functions_are_refused(name: str) -> None:
    mod, got = REFUSED[name]
    with pytest.raises(
        ValueError, match=re.escape("flex_attention: score_mod must be made of")
    ) as e:
        flex.flex_attention(*qkv(), mod)
    assert got in str(e.value)


def test_arguments() -> None:
    with pytest.raises(
        ValueError, match="as many heads as query without enable_gqa=True, got 2 and 4"
    ):
        flex.flex_attention(*qkv(heads=2))
    shared = flex.flex_attention(*qkv(batch=1))
    assert shared.shape == (B, H, T, D)
    aux = theirs.AuxRequest(lse=True, max_scores=True)
    out, found = flex.flex_attention(*qkv(), MODS["softcap"], scale=0.3, return_aux=aux)
    q, k, v = qkv()
    scores = 20 * torch.tanh(q @ k.mT * 0.3 / 20)
    torch.testing.assert_close(out, scores.softmax(-1) @ v)
    torch.testing.assert_close(found.lse, scores.logsumexp(-1))
    torch.testing.assert_close(found.max_scores, scores.amax(-1))
    ours = BlockMask.from_mask_mod(lambda b, h, q, k: q >= k, 1, 1, T, S)
    causal = theirs.create_block_mask(lambda b, h, q, k: q >= k, None, None, T, S, "cpu")
    same = [flex.flex_attention(*qkv(), block_mask=mask) for mask in (ours, causal)]
    assert torch.equal(*same)


@pytest.fixture
def active() -> Iterator[None]:
    flex.activate()
    yield
    flex.restore()


def test_activate(active: None) -> None:
    assert theirs.flex_attention is not flex._original
    theirs.flex_attention(*qkv(grad=True)).sum().backward()  # torch's raises on the CPU
    flex.activate()
    flex.restore()
    assert theirs.flex_attention.__module__ == theirs.__name__
    flex.restore()

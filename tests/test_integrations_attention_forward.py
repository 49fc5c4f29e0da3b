"""`attnfast.integrations.transformers.attention_forward`: what a layer may pass, and what not."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import attnfast
from attnfast.integrations import _transformers_calls as calls
from attnfast.integrations import transformers as integration


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    integration.register()
    yield
    integration.unregister()


class Layer(nn.Module):
    """What an attention layer shows the function."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        for key, value in attributes.items():
            setattr(self, key, value)


def heads(T: int = 6, S: int = 6, H_kv: int = 4, B: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(2)
    return tuple(torch.randn(B, L, H, 8).transpose(1, 2) for L, H in ((T, 4), (S, H_kv), (S, H_kv)))


CAUSES: dict[str, tuple[int, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "the layer says so": (6, {"is_causal": True}, {}, {"causal": True}),
    "the layer says no": (6, {"is_causal": False}, {}, {}),
    "no layer's attribute": (6, {}, {}, {"causal": True}),
    "the argument wins": (6, {"is_causal": True}, {"is_causal": False}, {}),
    "the argument wins too": (6, {"is_causal": False}, {"is_causal": True}, {"causal": True}),
    "a single query sees all": (1, {"is_causal": True}, {}, {}),
    "a prefilled static cache": (4, {"is_causal": True}, {}, {"causal": True}),
    "a window": (6, {}, {"sliding_window": 2}, {"causal": True, "window": (1, None)}),
    "a single query's window": (
        1,
        {},
        {"sliding_window": 2},
        {"window": (1, None), "align": "bottom_right"},
    ),
    "no window where not causal": (6, {"is_causal": False}, {"sliding_window": 2}, {}),
}


@pytest.mark.parametrize(("T", "attributes", "given", "expected"), CAUSES.values(), ids=CAUSES)
def test_what_holds_without_a_mask(
    T: int, attributes: dict[str, Any], given: dict[str, Any], expected: dict[str, Any]
) -> None:
    q, k, v = heads(T)
    out, weights = integration.attention_forward(Layer(**attributes), q, k, v, None, **given)
    assert weights is None
    assert out.is_contiguous()
    torch.testing.assert_close(out.transpose(1, 2), attnfast.attention(q, k, v, **expected))


def test_a_mask_alone_decides() -> None:
    q, k, v = heads()
    mask = torch.rand(2, 1, 6, 6) < 0.6
    added = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    for given in (mask, added):
        out, _ = integration.attention_forward(
            Layer(is_causal=True), q, k, v, given, is_causal=True, sliding_window=2
        )
        expected = attnfast.attention(q, k, v, mask=mask)
        rows = mask.any(-1)[:, 0]  # elsewhere a float mask attends everywhere
        torch.testing.assert_close(out[rows], expected.transpose(1, 2)[rows])


@pytest.mark.parametrize("masked", ["bool", "float", "none"])
def test_a_position_bias_adds_to_every_mask(masked: str) -> None:
    q, k, v = heads()
    bias = torch.randn(1, 4, 6, 6, requires_grad=True)
    mask = torch.rand(2, 1, 6, 6) < 0.8
    added = torch.randn(2, 1, 6, 6)
    given = {"bool": mask, "float": added, "none": None}[masked]
    layer = Layer(is_causal=masked == "none")
    out, _ = integration.attention_forward(layer, q, k, v, given, position_bias=bias, scaling=1.0)
    whole = {"bool": bias, "float": bias + added, "none": bias}[masked]
    expected = attnfast.attention(
        q,
        k,
        v,
        bias=whole,
        mask=mask if masked == "bool" else None,
        causal=masked == "none",
        scale=1.0,
    )
    assert torch.equal(out.transpose(1, 2), expected)
    grads = [torch.autograd.grad(x.square().sum(), bias)[0] for x in (out, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("T", [1, 6])
@pytest.mark.parametrize("masked", ["bool", "float", "none"])
def test_indices_are_the_only_keys(masked: str, T: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = heads(T)
    indices = torch.stack([torch.randperm(6)[:3] for _ in range(2 * T)]).view(2, T, 3)
    chosen = torch.zeros(2, 1, T, 6, dtype=torch.bool)
    chosen[:, 0].scatter_(-1, indices, True)
    gathered: list[bool] = []

    def watched(*args: Any, **options: Any) -> Any:
        gathered.append("indices" in options)
        return attnfast.attention(*args, **options)

    monkeypatch.setattr(integration, "attention", watched)
    mask = torch.rand(2, 1, T, 6) < 0.6
    added = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    given = {"bool": mask, "float": added, "none": None}[masked]
    out, _ = integration.attention_forward(Layer(), q, k, v, given, indices=indices.int())
    hidden = chosen if masked == "none" else chosen & mask
    expected = attnfast.attention(q, k, v, mask=hidden, causal=masked == "none" and T > 1)
    torch.testing.assert_close(out.transpose(1, 2), expected)
    assert gathered == ([] if masked == "float" and T == 1 else [masked != "float"])


@pytest.mark.parametrize("learning", [False, True])
@pytest.mark.parametrize("masked", ["bool", "float", "none"])
def test_a_single_query_is_decoded(
    masked: str, learning: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the kernel for few queries, which has no gradients, unless these are needed."""
    decoded: list[int] = []

    def watched(*args: Any, **options: Any) -> Any:
        decoded.append(1)
        return attnfast.decode_attention(*args, **options)

    monkeypatch.setattr(calls, "decode_attention", watched)
    q, k, v = heads(T=1, S=9, H_kv=2)
    q.requires_grad_(learning)
    mask, added = torch.rand(2, 1, 1, 9) < 0.6, torch.randn(2, 1, 1, 9)
    mask[1] = False
    given = {"bool": mask, "float": added, "none": None}[masked]
    bias, sinks = torch.randn(1, 4, 1, 9), torch.randn(4)
    out, _ = integration.attention_forward(
        Layer(), q, k, v, given, scaling=0.4, position_bias=bias, softcap=3.0, s_aux=sinks
    )
    expected = attnfast.attention(
        q,
        k,
        v,
        mask=mask if masked == "bool" else None,
        bias=bias + added if masked == "float" else bias,
        scale=0.4,
        softcap=3.0,
        sinks=sinks,
    )
    torch.testing.assert_close(out.transpose(1, 2), expected)
    assert out.requires_grad == learning
    assert len(decoded) == (not learning)


def test_every_other_option_is_passed_on() -> None:
    q, k, v = heads(H_kv=2)
    sinks = torch.randn(4)
    torch.manual_seed(3)
    out, weights = integration.attention_forward(
        Layer(),
        q,
        k,
        v,
        None,
        dropout=0.5,
        scaling=0.3,
        softcap=2.0,
        s_aux=sinks,
        output_attentions=True,
        use_cache=True,
    )
    torch.manual_seed(3)
    options = {"dropout_p": 0.5, "scale": 0.3, "softcap": 2.0, "sinks": sinks, "causal": True}
    expected = attnfast.attention(q, k, v, return_weights=True, **options)
    assert torch.equal(out.transpose(1, 2), expected[0])
    assert torch.equal(weights, expected[1])
    assert (weights == 0).float().mean() > 0.6  # half of the causal ones are dropped


@pytest.mark.parametrize("with_weights", [False, True])
@pytest.mark.parametrize("T", [1, 6])
def test_sinks_of_each_query_are_in_its_denominator(T: int, with_weights: bool) -> None:
    """As an extra key with that score, and with zeros for a value."""
    q, k, v = (x.requires_grad_() for x in heads(T, H_kv=2))
    sinks = torch.randn(2, 4, T, 1, requires_grad=True)
    mask = torch.rand(2, 1, T, 6) < 0.7
    mask[0, :, 0] = False  # all goes to the sink
    out, weights = integration.attention_forward(
        Layer(), q, k, v, mask, sinks=sinks, output_attentions=with_weights
    )
    scores = q @ k.repeat_interleave(2, 1).transpose(2, 3) * 8**-0.5
    scores = torch.cat([scores.masked_fill(~mask, -torch.inf), sinks], -1)
    shares = scores.softmax(-1)[..., :-1]
    expected = shares @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(out.transpose(1, 2), expected)
    assert (weights is None) == (not with_weights)
    if with_weights:
        torch.testing.assert_close(weights, shares)
    do = torch.randn_like(expected)
    found = torch.autograd.grad(out, (q, k, v, sinks), do.transpose(1, 2))
    torch.testing.assert_close(found, torch.autograd.grad(expected, (q, k, v, sinks), do))


def test_sinks_of_each_query_without_gradients() -> None:
    q, k, v = heads(1, H_kv=2)
    sinks = torch.randn(2, 4, 1, 1)
    out, _ = integration.attention_forward(Layer(), q, k, v, None, sinks=sinks)
    plain, lse = attnfast.attention(q, k, v, return_lse=True)
    expected = plain * torch.sigmoid(lse - sinks[..., 0])[..., None]
    torch.testing.assert_close(out.transpose(1, 2), expected)


@pytest.mark.parametrize(("given", "passed"), [({"deterministic": True}, True), ({}, None)])
def test_determinism_is_passed_on(
    given: dict[str, bool], passed: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def watched(*args: Any, **options: Any) -> Any:
        seen.append(options["deterministic"])
        return attnfast.attention(*args, **options)

    monkeypatch.setattr(integration, "attention", watched)
    integration.attention_forward(Layer(), *heads(), None, **given)
    assert seen == [passed]


def test_weights_where_the_configuration_asks_for_them() -> None:
    config = transformers.BertConfig(attn_implementation="eager", output_attentions=True)
    _, weights = integration.attention_forward(Layer(config=config), *heads(), None)
    assert weights.shape == (2, 4, 6, 6)


def test_learned_queries_are_broadcast() -> None:
    q, k, v = heads()
    out, _ = integration.attention_forward(Layer(is_causal=False), q[:1], k, v, None)
    expected = attnfast.attention(q[:1].expand(2, -1, -1, -1), k, v)
    assert torch.equal(out.transpose(1, 2), expected)


@pytest.mark.parametrize("masked", [False, True])
def test_it_compiles_whole_with_gradients(masked: bool) -> None:
    torch.compiler.reset()
    q, k, v = (x.requires_grad_() for x in heads(H_kv=2))
    bias = torch.randn(1, 4, 6, 6, requires_grad=True)
    mask = torch.rand(2, 1, 6, 6) < 0.8 if masked else None
    layer, results = Layer(), []
    for function in (
        integration.attention_forward,
        torch.compile(integration.attention_forward, backend="aot_eager", fullgraph=True),
    ):
        out, weights = function(
            layer, q, k, v, mask, position_bias=bias, sliding_window=4, output_attentions=True
        )
        gradients = torch.autograd.grad(out.square().sum(), (q, k, v, bias))
        results.append([out, weights, *gradients])
    torch.testing.assert_close(*results)


# --- many sequences in one row


def test_packed_rows_are_sequences_apart() -> None:
    ends = torch.tensor([0, 4, 7, 9], dtype=torch.int32)
    q, k, v = heads(9, 9, 2, B=1)
    options: dict[str, Any] = {"sliding_window": 3, "softcap": 5.0, "scaling": 0.3}
    out, _ = integration.attention_forward(
        Layer(), q, k, v, None, **options, cu_seq_lens_q=ends, max_length_q=4
    )
    apart = [
        integration.attention_forward(
            Layer(), q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], None, **options
        )[0]
        for a, b in itertools.pairwise(ends.tolist())
    ]
    torch.testing.assert_close(out, torch.cat(apart, 1))


def test_packed_queries_are_the_newest_of_their_keys() -> None:
    ends_q, ends_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 2, 5], [0, 4, 9]))
    q, k, v = heads(5, 9, 2, B=1)
    out, _ = integration.attention_forward(
        Layer(), q, k, v, None, cu_seq_lens_q=ends_q, cu_seq_lens_k=ends_k
    )
    apart = [
        attnfast.attention(
            q[:, :, a:b], k[:, :, c:d], v[:, :, c:d], causal=True, align="bottom_right"
        )
        for (a, b), (c, d) in zip(
            itertools.pairwise(ends_q.tolist()), itertools.pairwise(ends_k.tolist()), strict=True
        )
    ]
    torch.testing.assert_close(out.transpose(1, 2), torch.cat(apart, 2))


# --- what is refused


REFUSED: dict[str, tuple[int, dict[str, Any], str]] = {
    "blocks of keys": (
        2,
        {"block_indices": torch.zeros(2, 6, 2)},
        "block_indices .* must be None, got one",
    ),
    "indices of packed rows": (
        1,
        {"indices": torch.zeros(1, 6, 2), "cu_seq_lens_q": torch.tensor([0, 6])},
        "indices must not come with cu_seq_lens_q, got both",
    ),
    "head mask": (2, {"head_mask": torch.ones(4)}, "head_mask .* must be None, got one"),
    "a bias of packed rows": (
        1,
        {"position_bias": torch.zeros(1, 4, 6, 6), "cu_seq_lens_q": torch.tensor([0, 6])},
        "position_bias must not come with cu_seq_lens_q, got both",
    ),
    "sinks of packed rows": (
        1,
        {"sinks": torch.zeros(1, 4, 6, 1), "cu_seq_lens_q": torch.tensor([0, 6])},
        "sinks must not come with cu_seq_lens_q, got both",
    ),
    "weights of packed rows": (
        1,
        {"output_attentions": True, "cu_seq_lens_q": torch.tensor([0, 6])},
        "output_attentions must not come with cu_seq_lens_q, got both",
    ),
    "packed rows in a batch": (
        2,
        {"cu_seq_lens_q": torch.tensor([0, 6])},
        r"query must be a batch of one for cu_seq_lens_q, got \(2, 4, 6, 8\)",
    ),
    "softcap of zero": (2, {"softcap": 0.0}, "attention: softcap must be"),
}


@pytest.mark.parametrize(("B", "given", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_done_is_refused(B: int, given: dict[str, Any], message: str) -> None:
    layer = Layer(config=transformers.BertConfig())
    with pytest.raises(ValueError, match=message) as caught:
        integration.attention_forward(layer, *heads(B=B), None, **given)
    assert "\n" not in str(caught.value)
    if "head_mask" in given:
        assert "load a 'bert' model with attn_implementation='eager'" in str(caught.value)
